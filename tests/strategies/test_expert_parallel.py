"""Expert parallel: the numbers of one plain loop, by the conformance suite; users' own experts; what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract import CASES, MIXED, Case, cases_of, check_strategy
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.expert_parallel import ExpertParallel, dispatched
from drivetrain.strategies.experts import Experts, MoE, balance_loss, grouped_linear
from drivetrain.strategies.world import World
from torch import Tensor, nn

DOUBLE = {c.name.removeprefix("float64 "): c for c in cases_of("moe", [c for c in CASES if c.dtype == torch.float64])}
QUICK = [replace(DOUBLE[f"{name} moe"], steps=4) for name in ("sgd window 3, clipped", "adamw num_items, clipped")]


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


def test_two_ranks_of_experts_train_like_one(ranks: Any) -> None:
    for found in ranks(2, outcomes, "fsdp:2+ep:2", {}, QUICK):
        assert [o for _, o, _ in found] == ["pass"] * len(QUICK), found


WANTED = ("float64 sgd", "float64 sgd window 3, cut short", "float64 adamw num_items, clipped", "fp32 adamw window 3, clipped")
# Few steps: that many steps stay right is for tests/benchmarks/matrix.py to show.
LONG = [replace(c, steps=4) for c in cases_of("moe", [c for c in CASES if c.name in WANTED])]
LONG += [replace(c, steps=4) for c in cases_of("moe", MIXED) if c.name == "bf16-mixed sgd num_items, clipped moe"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        ("ep:2", 2),
        ("fsdp:4+ep:2", 4),
        ("hsdp:2+ep:2", 4),
        ("fsdp:2+cp:2+ep:2", 4),
        ("cp:2+ep:2", 2),
        ("fsdp:2+tp:2+ep:2", 4),
    ],
)
def test_every_case_of_the_suite_passes(strategy: str, size: int, ranks: Any) -> None:
    """Experts over some of the ranks that shard, beside replicas, and over ranks that share a sequence."""
    for found in ranks(size, outcomes, strategy, {}, LONG if size == 2 else LONG[1::3], timeout=120):
        assert {o for _, o, _ in found} == {"pass"}, found


class Scaled(nn.Module):
    """Experts of a user's own: one matrix and one scale each."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.arange(experts * 9, dtype=torch.float64).view(experts, 3, 3) / 10)
        self.scale = nn.Parameter(torch.arange(experts, dtype=torch.float64) + 1)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        parts = tokens.split(counts.tolist())
        return torch.cat([p @ m * s for p, m, s in zip(parts, self.matrix, self.scale, strict=True)])


ROWS = torch.linspace(-1, 1, 42, dtype=torch.float64).view(14, 3)


class Routed(nn.Module):
    """Sends tokens to four experts in turn, but to those of `skip`."""

    def __init__(self, skip: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.mine = Scaled(4)
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.used = [e for e in range(4) if e not in skip]

    def training_step(self, batch: Tensor) -> Tensor:
        x = self.first(batch)
        expert = torch.tensor(self.used)[(batch[:, 0] * 1000).long() % len(self.used)]  # the same token, the same expert
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=4)
        return self.mine(x[order], counts).square().sum(-1).mean()


def own_experts(skip: tuple[int, ...], words: str) -> tuple[float, dict[str, Tensor], list[int]]:
    world = World.start("cpu", need_group=True)
    torch.manual_seed(0)
    plan: Any = {"first": "replicate"}
    strategy = make_strategy(words, expert_parallel=ExpertParallel(modules=["mine"]), tensor_parallel=plan)
    strategy.start(world)
    model = Routed(skip=skip)
    strategy.prepare({"model": model}, [])
    step = strategy.bind(model, "training_step")
    loss = step(ROWS.chunk(2)[strategy.data_shard[0]])
    strategy.backward(loss)
    grads: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
    parameters: list[Any] = list(model.mine.parameters())
    found = (
        float(world.all_reduce(loss.detach())) / world.size,
        {n: g.full_tensor() for n, g in grads.items()},
        [p.to_local().shape[0] for p in parameters],
    )
    world.stop()
    return found


@pytest.mark.parametrize(
    ("skip", "words", "size"),
    [((), "fsdp:2+ep:2", 2), ((2, 3), "fsdp:2+ep:2", 2), ((), "fsdp:2+tp:2+ep:2", 4), ((2, 3), "fsdp:2+tp:2+ep:2", 4)],
    ids=["all busy", "a rank without tokens", "beside tp", "beside tp, a rank without tokens"],
)
def test_experts_of_ones_own_are_spread_by_name(skip: tuple[int, ...], words: str, size: int, ranks: Any) -> None:
    """Losses and gradients of one process; each rank holds half of the experts. Those that nobody uses get gradients of 0.

    Beside tp a rank has 7 tokens, of which it sends 4, and the other of tp 3.
    """
    torch.manual_seed(0)
    truth = Routed(skip=skip)
    loss = truth.training_step(ROWS)
    loss.backward()
    for found, grads, held in ranks(size, own_experts, skip, words):
        assert found == pytest.approx(loss.item(), rel=1e-12)
        assert held == [2, 2]
        for name, parameter in truth.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation_checkpointing": "full"}, ""),
        ({"activation_checkpointing": "selective"}, "'selective' with expert parallel .*Use activation_checkpointing='full'"),
        ({"compile": "aot_eager"}, r"compile=... with expert parallel \(ep\)"),
    ],
)
def test_blocks_of_experts_are_computed_again_and_not_compiled(options: dict[str, Any], says: str, ranks: Any) -> None:
    for found in ranks(2, outcomes, "fsdp:2+ep:2", options, [replace(c, steps=3) for c in QUICK[:1]]):
        assert [o for _, o, _ in found] == ["refused" if says else "pass"], found
        assert re.search(says, found[0][2])


def sent_and_returned() -> list[float]:
    world = World.start("cpu", need_group=True)
    group = world.group()
    assert group is not None
    tokens = torch.arange(6.0).view(3, 2) + 10 * world.rank
    out = dispatched(lambda x, counts: x * 100 + counts.sum(), tokens, torch.tensor([1, 2] if world.rank else [3, 0]), group)
    world.stop()
    return out.flatten().tolist()


def test_each_token_comes_back_from_its_expert_to_its_place(ranks: Any) -> None:
    """By hand: rank 0 keeps its 3 tokens and gets 1 of rank 1, whose other 2 stay there."""
    first, second = ranks(2, sent_and_returned)
    assert first == [4.0 + 100 * x for x in (0, 1, 2, 3, 4, 5)]
    assert second == [1004.0, 1104.0, 1202.0, 1302.0, 1402.0, 1502.0]


def refusal(strategy: str, model: str, options: dict[str, Any]) -> str:
    world = World.start("cpu", need_group=True)
    models = {
        "moe": lambda: MoE(4, 4, num_experts=3),
        "plain": lambda: nn.Linear(4, 4),
        "list": lambda: nn.Sequential(nn.Linear(4, 5)),
    }
    try:
        made = make_strategy(strategy, **options)
        made.start(world)
        made.prepare({"model": models[model]()}, [])
    except ConfigError as error:
        return str(error)
    finally:
        world.stop()
    return ""


@pytest.mark.parametrize(
    ("strategy", "model", "options", "says"),
    [
        ("fsdp:2+ep:2", "moe", {}, "experts has 3 experts, which ep=2 does not divide"),
        ("fsdp:2+ep:2", "plain", {}, "ep=2 spreads experts, and model 'model' has no Experts"),
        (
            "fsdp:2+ep:2",
            "list",
            {"expert_parallel": ExpertParallel(modules=["0"])},
            "0 has 5 experts, which ep=2 does not divide",
        ),
        ("fsdp:2+ep:2", "plain", {"expert_parallel": "experts"}, "expected 'auto' or an ExpertParallel"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_name(
    strategy: str, model: str, options: dict[str, Any], says: str, ranks: Any
) -> None:
    for said in ranks(2, refusal, strategy, model, options):
        assert re.search(says, said), said


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_group_of_products_is_its_products(dtype: torch.dtype, width: int) -> None:
    """grouped_mm where torch has it, expert by expert where not; gradients too, also of an expert without tokens."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randn(3, width, 8, dtype=dtype, requires_grad=True)
    out = grouped_linear(x, weight, [2, 0, 4])
    grad = torch.randn(6, width, dtype=dtype)
    found = torch.autograd.grad(out, [x, weight], grad)
    by_hand = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])
    expected = torch.autograd.grad(by_hand, [x, weight], grad)
    for a, b in zip((out, *found), (by_hand, *expected), strict=True):
        torch.testing.assert_close(a, b)


def test_the_layer_is_the_weighted_sum_of_the_chosen_experts() -> None:
    torch.manual_seed(0)
    layer = MoE(6, 5, num_experts=4, top_k=2, keep_probabilities=True).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    found = layer(x)
    scores = layer.router(x).softmax(-1)
    by_hand = torch.zeros_like(x)
    for b in range(2):
        for t in range(3):
            best = scores[b, t].topk(2)
            for share, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
                w1, w2, w3 = (w[expert] for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
                by_hand[b, t] += share * (w2 @ (nn.functional.silu(w1 @ x[b, t]) * (w3 @ x[b, t])))
    torch.testing.assert_close(found, by_hand)
    assert int(layer.counts.sum()) == 12
    assert layer.probabilities is not None
    assert float(balance_loss(torch.full((3, 4), 0.25), torch.tensor([5, 5, 5, 5]))) == 1.0
    layer.selection_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    layer(x)
    assert layer.counts.tolist() == [6, 6, 0, 0]


def test_layers_built_without_memory_have_their_values_by_themselves() -> None:
    with torch.device("meta"):
        layer = MoE(4, 4, num_experts=2)
    layer.to_empty(device="cpu")
    for module in (layer, layer.experts):
        module.reset_parameters()
    assert layer.selection_bias.tolist() == [0, 0]
    assert isinstance(layer.experts, Experts)
    assert float(layer.experts.w1.detach().abs().max()) <= 0.5
