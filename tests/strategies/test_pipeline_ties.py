"""Weights that two stages share: the numbers of one plain loop, one tensor in a checkpoint, one in a norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from drivetrain.strategies.contract import CASES, MIXED, check_strategy
from drivetrain.strategies.contract_models import GPT
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.mesh import ParallelPlan
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.pipeline_options import Pipeline
from drivetrain.strategies.pipeline_split import find_chain
from drivetrain.strategies.pipeline_ties import Tie, find_ties
from drivetrain.strategies.world import World
from torch import Tensor, nn

BY_NAME = {case.name: case for case in (*CASES, *MIXED)}
HARD = "float64 sgd window 3, num_items"


def suite(plan: dict[str, int], schedules: list[str], names: list[str], steps: int, **options: Any) -> list[tuple[str, str]]:
    """The outcomes of the conformance suite on a GPT whose head is its embedding; a failure raises with the table."""
    world = World.start("cpu", need_group=True)
    todo = [replace(BY_NAME[n], steps=steps, model="gpt", clip=BY_NAME[n].clip or 0.05) for n in names]
    found: list[tuple[str, str]] = []
    for schedule in schedules:
        results = check_strategy(
            lambda: ParallelStrategy(plan=ParallelPlan(**plan), pipeline=schedule, **options),  # noqa: B023
            world,
            cases=todo,
        )
        found += [(result.outcome, result.detail) for result in results]
    world.stop()
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_an_embedding_that_is_the_head_trains_as_in_a_plain_loop(schedule: str, ranks: Any) -> None:
    """On two ranks, and (in the V) on one that has both stages; clipped, so that a norm that counts it twice shows."""
    assert ranks(2, suite, {"pp": 2}, [schedule], [HARD], 2) == [[("pass", "")]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "plan", "schedules", "options"),
    [
        (2, {"pp": 2}, ["gpipe", "interleaved", "looped-bfs", "zero-bubble", "dualpipev"], {}),
        (4, {"pp": 4}, ["1f1b"], {}),
        (4, {"pp": 2, "dp_shard": 2}, ["1f1b", "zbv"], {}),
        (4, {"pp": 2, "dp_shard": 2}, ["1f1b"], {"sync_each_batch": True}),
        (4, {"pp": 2, "dp_shard": 2}, ["1f1b", "dualpipev"], {"ignored_parameters": ["wte"]}),
        (4, {"pp": 2, "dp_replicate": 2}, ["1f1b"], {}),
        (4, {"pp": 2, "tp": 2}, ["1f1b"], {}),
    ],
)
def test_ties_beside_every_other_axis(
    size: int, plan: dict[str, int], schedules: list[str], options: dict[str, Any], ranks: Any
) -> None:
    names = [HARD, "fp32 adamw window 3, clipped", "bf16-mixed sgd window 3, cut short"]
    found = ranks(size, suite, plan, schedules, names, 3, timeout=300, **options)
    assert {outcome for outcome, _ in found[0]} == {"pass"}


def test_what_lies_in_several_stages_is_found_by_all_its_names() -> None:
    model = GPT(tied=True)
    chain = find_chain(model)
    assert find_ties(model, chain, [0]) == []
    assert find_ties(model, chain, [0, 2]) == [Tie(("wte.weight", "lm_head.weight"), (0, 1))]
    assert find_ties(GPT(tied=False), chain, [0, 2]) == []


class Twice(nn.Module):
    """Calls one layer as its first part and as its last."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.between, self.after = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.after(self.between(self.same(x))))

    def pipeline_parts(self) -> list[Any]:
        return ["same", "between", "after", "same"]


def gradients(kind: str, plan: dict[str, int], schedule: str, splits: list[str], times: int) -> Any:
    """After `times` batches without a step between them: this rank's gradients, and the norm of all."""
    world = World.start("cpu", need_group=True)
    torch.manual_seed(world.rank)  # ranks that built other values: the first one's hold
    strategy = ParallelStrategy(plan=ParallelPlan(**plan), pipeline=Pipeline(schedule=schedule, splits=splits or "auto"))
    try:
        strategy.start(world)
        model = made(kind)
        strategy.prepare({"model": model}, [])
        pipe = strategy.pipeline_of(model)
        assert pipe is not None
        for i in range(times):
            pipe.run(batch(i), lambda output, chunk: output.pow(2).mean() * chunk.share, backward=True)
        whole = strategy.full_state_dict(model)
        found = {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad  # pyright: ignore[reportAttributeAccessIssue]
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        return found, strategy.grad_norm(list(model.parameters())), whole, strategy.explain()
    except ConfigError as refusal:
        return str(refusal)
    finally:
        world.stop()


def made(kind: str) -> nn.Module:
    if kind == "activations":
        act, same = nn.Tanh(), nn.Linear(4, 4)
        return nn.Sequential(same, act, nn.Linear(4, 4), act, nn.Linear(4, 4), act, same, act).double()
    if kind == "twice":
        return Twice().double()
    if kind == "all alike":
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
        for layer in model:
            layer.weight = model[0].weight  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        return model
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model.double()


def batch(i: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "size", "plan", "schedule", "splits"),
    [
        ("twice", 2, {"pp": 2}, "1f1b", []),
        ("activations", 2, {"pp": 2}, "1f1b", []),
        ("meta", 2, {"pp": 2}, "1f1b", []),
        ("all alike", 2, {"pp": 2}, "zero-bubble", ["1", "2", "3"]),  # two of its stages on each rank
        pytest.param("all alike", 4, {"pp": 4}, "1f1b", [], marks=pytest.mark.slow),
        pytest.param("all alike", 4, {"pp": 2, "dp_shard": 2}, "zbv", ["1", "2", "3"], marks=pytest.mark.slow),
    ],
)
def test_copies_begin_equal_and_their_gradients_are_added_up_once(
    kind: str, size: int, plan: dict[str, int], schedule: str, splits: list[str], ranks: Any
) -> None:
    """Two batches without a step between: the sum of the first is not added up again. Ranks may have other random numbers."""
    found = ranks(size, gradients, kind, plan, schedule, splits, 2)
    model = made(kind) if kind != "meta" else _third()
    model.load_state_dict(found[0][2])
    for i in range(2):
        model(batch(i)).pow(2).mean().backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    seen: dict[str, list[Tensor]] = {}
    for grads, norm, _, rows in found:
        torch.testing.assert_close(norm, nn.utils.get_total_norm(truth.values()), rtol=1e-12, atol=1e-14)  # pyright: ignore
        assert any(key == "tied over stages" for key, _ in rows)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, truth[name], rtol=1e-12, atol=1e-14)
            seen.setdefault(name, []).append(grad)
    assert seen.keys() == truth.keys()
    for copies in seen.values():
        assert all(torch.equal(copy, copies[0]) for copy in copies)


def _third() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    return model


def test_one_module_in_two_stages_of_one_rank_is_refused(ranks: Any) -> None:
    for said in ranks(2, gradients, "twice", {"pp": 2}, "zbv", [], 1):
        assert "of which one rank has two that call the same module" in said
