"""Pipelines against one plain loop: every schedule, beside sharding, replicas and tensor parallel; memory, frozen parts."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.contract import CASES, MIXED, Case, check_strategy
from drivetrain.strategies.contract_models import Llama
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.mesh import ParallelPlan, mesh_of
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.pipeline_chunks import Chunk
from drivetrain.strategies.pipeline_options import SCHEDULES, Pipeline
from drivetrain.strategies.tensor_parallel import TensorPlan
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BY_NAME = {case.name: case for case in (*CASES, *MIXED)}
HARD = "float64 sgd window 3, num_items"
BF16 = "bf16-mixed sgd window 3, cut short"


def cases(*names: str, steps: int, model: str = "llama") -> list[Case]:
    return [replace(BY_NAME[name], steps=steps, model=model, clip=BY_NAME[name].clip or 0.05) for name in names]


def run_suite(plan: dict[str, int], schedules: list[str], todo: list[Case], **options: Any) -> list[tuple[str, str]]:
    """Return the outcome of each case; a failure raises with the table."""
    world = World.start("cpu", need_group=True)
    try:
        found: list[tuple[str, str]] = []
        for schedule in schedules:
            results = check_strategy(
                lambda: ParallelStrategy(plan=ParallelPlan(**plan), pipeline=schedule, **options),  # noqa: B023
                world,
                cases=todo,
            )
            found += [(result.outcome, result.detail) for result in results]
        return found
    finally:
        world.stop()


@pytest.mark.parametrize(
    "schedules",
    [
        pytest.param(["1f1b"], id="one stage a rank"),
        pytest.param(["interleaved"], id="several"),
        pytest.param(["zero-bubble"], id="weights apart"),
        pytest.param(["dualpipev"], id="in a V"),
        pytest.param(["gpipe", "looped-bfs", "zbv"], id="others", marks=pytest.mark.slow),
    ],
)
def test_every_schedule_gives_the_numbers_of_a_plain_loop_and_resumes_bit_for_bit(schedules: list[str], ranks: Any) -> None:
    """Windows of three batches, sums with their counts, clipped; the last window has fewer samples than the pipeline chunks."""
    found = ranks(2, run_suite, {"pp": 2}, schedules, cases(HARD, steps=2))
    assert found == [[("pass", "")] * len(schedules)] * 2


def test_beside_sharded_data_parallel_and_replicas(ranks: Any) -> None:
    todo = cases(HARD, steps=2)
    assert ranks(4, run_suite, {"pp": 2, "dp_shard": 2}, ["1f1b"], todo)[0] == [("pass", "")]


def test_what_a_chunk_would_compute_differently_is_refused(ranks: Any) -> None:
    ((outcome, why), *_), _ = ranks(2, run_suite, {"pp": 2}, ["1f1b"], cases(HARD, steps=2, model="conv-bn"))
    assert outcome == "refused"
    assert "first_norm" in why
    assert "GroupNorm" in why


@pytest.mark.slow
def test_the_whole_suite(ranks: Any) -> None:
    """fp32 and float64, SGD and AdamW, windows, clipping, counts, two models."""
    todo = [replace(case, steps=4, model="llama") for case in CASES]
    assert {outcome for outcome, _ in ranks(2, run_suite, {"pp": 2}, ["1f1b"], todo, timeout=300)[0]} == {"pass"}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "1f1b"])
def test_every_other_schedule(schedule: str, ranks: Any) -> None:
    """What differs from the fast case: fp32, AdamW, means, 16 bits."""
    todo = cases("fp32 adamw window 3, clipped", "float64 adamw num_items, clipped", BF16, steps=3)
    assert {outcome for outcome, _ in ranks(2, run_suite, {"pp": 2}, [schedule], todo, timeout=120)[0]} == {"pass"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "plan", "schedules"),
    [
        (4, {"pp": 2, "dp_shard": 2}, ["interleaved", "zero-bubble", "zbv", "dualpipev"]),
        (4, {"pp": 2, "dp_replicate": 2}, ["1f1b", "looped-bfs"]),
        (4, {"pp": 4}, ["1f1b", "gpipe"]),
        (4, {"pp": 2, "tp": 2}, ["1f1b", "interleaved"]),
        (8, {"pp": 2, "tp": 2, "dp_shard": 2}, ["1f1b"]),
    ],
)
def test_beside_every_other_axis(size: int, plan: dict[str, int], schedules: list[str], ranks: Any) -> None:
    todo = cases(HARD, "fp32 adamw window 3, clipped", steps=2)
    found = ranks(size, run_suite, plan, schedules, todo, timeout=200)
    assert {outcome for outcome, _ in found[0]} == {"pass"}


@pytest.mark.slow
def test_sixteen_bits_beside_sharded_data_parallel(ranks: Any) -> None:
    assert ranks(4, run_suite, {"pp": 2, "dp_shard": 2}, ["1f1b"], cases(BF16, steps=2))[0] == [("pass", "")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile
@pytest.mark.parametrize(
    ("plan", "options", "model"),
    [
        pytest.param({"pp": 2, "tp": 2}, {"tensor_parallel": TensorPlan(loss_parallel=True)}, "llama", id="loss parallel"),
        pytest.param({"pp": 2, "tp": 2}, {"tensor_parallel": "sequence"}, "llama", id="sequence parallel"),
        pytest.param({"pp": 2, "dp_shard": 2, "ep": 2}, {}, "moe", id="experts"),
        pytest.param({"pp": 2}, {"activation_checkpointing": "full", "compile": "eager"}, "llama", id="blocks"),
        pytest.param({"pp": 2, "dp_shard": 2}, {"ignored_parameters": ["norm"], "sync_each_batch": True}, "llama", id="whole"),
    ],
)
def test_the_other_axes_and_options_hold_in_stages(plan: dict[str, int], options: Any, model: str, ranks: Any) -> None:
    """A loss on cut logits is made plain on the last stage; a stage gathers the sequence at its end; blocks are the model's."""
    todo = cases(HARD, steps=2, model=model)
    size = math.prod(degree for axis, degree in plan.items() if axis != "ep")
    assert ranks(size, run_suite, plan, ["1f1b"], todo, timeout=120, **options)[0] == [("pass", "")]


def recomputed() -> list[tuple[str, str]]:
    """Stages of which the second has one block only."""
    world = World.start("cpu", need_group=True)
    strategy = ParallelStrategy(
        plan=ParallelPlan(pp=2), activation_checkpointing="full", pipeline=Pipeline(schedule="zbv", splits=["1", "2", "3"])
    )
    strategy.start(world)
    model = nn.Sequential(*(NormsHeads() for _ in range(4)))
    strategy.prepare({"model": model}, [])
    found = strategy.explain()
    world.stop()
    return found


def test_a_stage_of_one_block_is_computed_again_like_the_others(ranks: Any) -> None:
    """Alone it could not be told to be a repeated one."""
    assert sum("full" in key for key, _ in ranks(2, recomputed)[0]) == 2


def random_stream(degrees: dict[str, int]) -> int:
    world = World.start("cpu", need_group=True)
    mesh_of(world, ParallelPlan(**degrees))
    found = world.random_index
    world.stop()
    return found


def test_ranks_of_tp_share_a_random_stream_and_stages_do_not(ranks: Any) -> None:
    """The first rank's number is 0 however many stages there are; ranks in the order pp, dp_shard, tp."""
    assert ranks(4, random_stream, {"pp": 2, "tp": 2}) == [0, 0, 1, 1]
    assert ranks(4, random_stream, {"pp": 2, "dp_shard": 2}) == [0, 1, 2, 3]


class NormsHeads(nn.Module):
    """Norms each head, and its plan does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.scale(self.up(x).unflatten(-1, (-1, 4))).flatten(-2))


def wrong_plan() -> str:
    world = World.start("cpu", need_group=True)
    plan = {"*.up": "colwise", "*.down": "rowwise"}
    strategy = ParallelStrategy(plan=ParallelPlan(pp=2, tp=2), tensor_parallel=plan)
    strategy.start(world)
    model = nn.Sequential(NormsHeads(), NormsHeads())
    strategy.prepare({"model": model}, [])
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    try:
        pipe.run(torch.randn(4, 4), lambda output, chunk: output.pow(2).sum(), backward=True)
    except ConfigError as error:
        return str(error)
    finally:
        world.stop()
    return ""


def test_a_tensor_plan_that_lets_copies_drift_apart_is_found_in_every_stage(ranks: Any) -> None:
    found = ranks(4, wrong_plan)
    assert ["0.scale.weight" in found[0], "1.scale.weight" in found[2]] == [True, True]
    assert all("other gradients" in text for text in found)


def test_group_norm_convolutions_and_functions_between_modules(ranks: Any) -> None:
    assert ranks(2, run_suite, {"pp": 2}, ["interleaved"], cases(HARD, steps=3, model="conv"))[0] == [("pass", "")]


# -- what a rank holds ------------------------------------------------------------------------------------------------
def prepared(model: nn.Module, schedule: str = "1f1b", **options: Any) -> tuple[ParallelStrategy, World]:
    world = World.start("cpu", need_group=True)
    strategy = ParallelStrategy(plan=ParallelPlan(pp=2), pipeline=Pipeline(schedule=schedule, **options))
    strategy.start(world)
    strategy.prepare({"model": model}, [])
    return strategy, world


def local_bytes(model: nn.Module) -> int:
    storages = {}
    for p in model.parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        if not local.is_meta:
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def memory() -> tuple[int, list[str], list[tuple[str, str]]]:
    model = Llama(layers=8)
    strategy, world = prepared(model)
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    found = local_bytes(model), list(model.state_dict()), pipe.explain()
    world.stop()
    return found


def test_a_rank_holds_its_stages_and_the_names_of_the_whole_model(ranks: Any) -> None:
    whole = Llama(layers=8)
    total = sum(p.numel() * p.element_size() for p in whole.parameters())
    first, second = ranks(2, memory)
    assert first[0] + second[0] == total
    assert max(first[0], second[0]) < 0.6 * total
    assert first[1] == second[1] == list(whole.state_dict())
    assert ("splits", "chosen: by parameters") in first[2]


class Tells(Llama):
    """Has both ways to say its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, False)

    def compute_loss(self, output: Tensor, batch: Any) -> Tensor:
        return self.loss(output, batch, False)


def saved() -> tuple[list[str], list[str], list[tuple[str, str]]]:
    model = Tells()
    strategy, world = prepared(model)
    whole = strategy.full_state_dict(model)
    here = [name for name, tensor in model.state_dict().items() if not tensor.is_meta]
    said: list[str] = []
    for state in (
        model.state_dict(),
        model.layers.state_dict(),
        {n: t.clone() for n, t in model.state_dict().items()},
    ):
        try:
            torch.save(state, io.BytesIO())
        except ConfigError as error:
            said.append(str(error))
    rows = strategy.explain()
    world.stop()
    assert list(whole) == (list(model.state_dict()) if world.is_main else [])
    assert not any(tensor.is_meta for tensor in whole.values())
    return here, said, rows


def test_what_another_stage_holds_is_never_saved_as_if_it_were_there(ranks: Any) -> None:
    """By torch.save of a state_dict, of a part, or of copies (an average of the weights)."""
    first, second = ranks(2, saved)
    assert sorted(first[0] + second[0]) == sorted(Llama().state_dict())
    for said in (first[1], second[1]):
        assert len(said) == 3
        assert all("get_state_dict" in text for text in said)
    assert ("training_step", "not called: the last stage calls compute_loss for each chunk of a batch") in first[2]
    assert any(key == "reshard_after_forward" and value.startswith("False") for key, value in first[2])


class Initialised(nn.Linear):
    """Counts how often it was filled."""

    filled = 0

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.weight.is_meta:
            type(self).filled += 1


def on_meta() -> tuple[int, list[bool]]:
    with torch.device("meta"):
        model = nn.Sequential(*(Initialised(4, 4) for _ in range(6)))
    _, world = prepared(model, splits=["2"])
    world.stop()
    return Initialised.filled, [p.is_meta for p in model.parameters()]


def test_a_model_on_the_meta_device_is_filled_stage_by_stage(ranks: Any) -> None:
    first, second = ranks(2, on_meta)
    assert first == (2, [False] * 4 + [True] * 8)
    assert second == (4, [True] * 4 + [False] * 8)


def frozen(which: str) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
    for i in {"first stage": (0, 1), "middle": (1, 2), "none": ()}[which]:
        model[i].requires_grad_(False)
    strategy, world = prepared(model, "zero-bubble" if which == "middle" else "1f1b")
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    x = torch.arange(24.0, dtype=torch.float64).reshape(6, 4) / 10

    def loss_of(output: Tensor, chunk: Chunk) -> Tensor:
        return output.pow(2).mean() * chunk.share

    pipe.run(x, loss_of, backward=True)
    found = {
        n: None if p.grad is None else p.grad.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        for n, p in model.named_parameters()
        if not p.is_meta
    }
    world.stop()
    return found


@pytest.mark.parametrize("which", ["first stage", "middle"])
def test_frozen_stages_take_no_gradient_and_the_others_the_same(which: str, ranks: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
    model(torch.arange(24.0, dtype=torch.float64).reshape(6, 4) / 10).pow(2).mean().backward()
    truth = {n: p.grad for n, p in model.named_parameters()}
    found = {k: v for rank in ranks(2, frozen, which) for k, v in rank.items()}
    assert found.keys() == truth.keys()
    held = {"first stage": ("0.", "1."), "middle": ("1.", "2.")}[which]
    for name, grad in found.items():
        if name.startswith(held):
            assert grad is None
        else:
            torch.testing.assert_close(grad, truth[name], rtol=1e-12, atol=1e-14)


class Several(nn.Module):
    """Hands on two tensors, one of them of whole numbers, and takes a dict of other things beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def pipeline_parts(self) -> list[Any]:
        return [("a", lambda x, marks: (self.a(x), marks)), ("b", lambda x, marks: self.b(x) * marks[:, None])]

    def pipeline_input(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch["x"], batch["marks"]


def several() -> Any:
    torch.manual_seed(0)
    model, losses = Several(), []
    strategy, world = prepared(model)
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    for samples in (5, 2):
        batch = {"x": torch.ones(samples, 4), "marks": torch.arange(samples), "names": ["n"] * samples}
        seen: list[int] = []

        def loss_of(output: Tensor, chunk: Chunk) -> Tensor:
            seen.append(len(chunk.batch["names"]))  # noqa: B023
            return output.sum() * (chunk.samples > 0)

        pipe.run(batch, loss_of, backward=True)
        total = pipe.run(batch, lambda output, chunk: output.detach().sum() if chunk.samples else None, backward=False)
        losses.append((sum(float(t) for t in total if t is not None), seen))
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if not p.is_meta}  # pyright: ignore
    world.stop()
    return losses, grads


def test_several_tensors_go_from_stage_to_stage_and_lists_are_cut_with_the_samples(ranks: Any) -> None:
    torch.manual_seed(0)
    model = Several()
    sums = []
    for samples in (5, 2):
        output = model.b(model.a(torch.ones(samples, 4))) * torch.arange(samples)[:, None]
        output.sum().backward()
        sums.append(output.sum().item())
    first, second = ranks(2, several)
    assert [s for s, _ in second[0]] == pytest.approx(sums, rel=1e-5)
    assert [c for _, c in second[0]] == [[2, 1, 1, 1], [1, 1, 1, 1]]
    for name, grad in {**first[1], **second[1]}.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad, rtol=1e-5, atol=1e-6)


class Both(nn.Module):
    """Takes a pair as one argument and returns one, as the parts of an nn.Sequential do that hand on more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pair: Any) -> tuple[Tensor, Tensor]:
        x, y = pair if isinstance(pair, tuple) else (pair, pair)
        return self.a(x) + y, self.b(y)


def pairs() -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Both() for _ in range(4)))
    strategy, world = prepared(model, "interleaved")
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    found = pipe.run(torch.ones(4, 4), lambda output, chunk: output[0].sum() + output[1].sum(), backward=True)
    world.stop()
    return found


def test_a_tuple_in_a_sequential_stays_one_argument(ranks: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Both() for _ in range(4)))
    first, second = ranks(2, pairs)
    assert first == []
    assert sum(t.item() for t in second) == pytest.approx(sum(t.sum().item() for t in model(torch.ones(4, 4))), rel=1e-5)


def fails_on_the_last_stage() -> str:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    strategy, _ = prepared(model)
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    pipe.run(torch.ones(4, 4), lambda output, chunk: F.cross_entropy(output, torch.zeros(9).long()), backward=True)
    return ""


def test_an_error_in_the_loss_is_told_as_it_is(ranks: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        ranks(2, fails_on_the_last_stage)


def refused(**options: Any) -> str:
    world = World.start("cpu", need_group=True)
    try:
        strategy = ParallelStrategy(plan=options.pop("plan", ParallelPlan(pp=2)), **options)
        strategy.start(world)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        strategy.prepare({"model": model}, [])
        model(torch.ones(1, 4))
    except ConfigError as error:
        return str(error)
    finally:
        world.stop()
    return ""


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"offload": "cpu"}, "offload"),
        ({"reshard_after_forward": True}, "reshard_after_forward=True"),
        ({"pipeline": "2f2b"}, "no schedule"),
        ({"pipeline": Pipeline(schedule="interleaved")}, "2 part"),
        ({"ignored_parameters": ["nothing"]}, "nothing"),
        ({}, "no rank has all of it"),
        ({"plan": ParallelPlan(tp=2, pp=2), "tensor_parallel": {"0": "colwise", "2": "rowwise"}}, "called '2'"),
    ],
)
def test_what_does_not_work_is_refused_by_name(options: dict[str, Any], why: str, ranks: Any) -> None:
    for message in ranks(4 if "plan" in options else 2, refused, **options):
        assert why in message
