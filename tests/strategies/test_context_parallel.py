"""Context parallel as a strategy: the numbers of one plain loop, by the conformance suite, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.context_parallel import ContextParallel
from drivetrain.strategies.contract import CASES, MIXED, Case, cases_of, check_strategy
from drivetrain.strategies.errors import ConfigError, DrivetrainError
from drivetrain.strategies.shared_sequence import sequence_positions
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

DOUBLE = {c.name.removeprefix("float64 "): c for c in cases_of("llama", [c for c in CASES if c.dtype == torch.float64])}
QUICK = [replace(DOUBLE[f"{name} llama"], steps=6) for name in ("sgd window 3, clipped", "adamw num_items, clipped")]
# The first step is verified without gradients, inside of its autocast.
QUICK += [replace(c, steps=4) for c in cases_of("llama", MIXED) if c.name == "bf16-mixed sgd num_items, clipped llama"]
LONG = [replace(c, steps=12) for c in cases_of("llama", [c for c in CASES if c.models == 1])]
LONG += [replace(c, steps=6) for c in cases_of("llama", [c for c in MIXED if c.models == 1])]


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


@pytest.mark.parametrize(("method", "balanced"), [("all-gather", True), ("ring", True), ("ring", False), ("ulysses", True)])
def test_two_ranks_that_share_a_sequence_train_like_one(method: str, balanced: bool, ranks: Any) -> None:
    """In order, a rank's first chunk is arange(T) itself, which code of ours asks for in the backward pass as well."""
    options = {"context_parallel": ContextParallel(method=method, load_balance=balanced)}
    for found in ranks(2, outcomes, "cp:2", options, QUICK):
        assert [o for _, o, _ in found] == ["pass"] * len(QUICK), found


class Recomputed(nn.Module):
    """Attention that is run again in the backward pass."""

    def __init__(self, *, recompute: bool, by_import: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(16, 12)
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, 16)
        self.recompute, self.reentrant = recompute, reentrant
        self.by_import = by_import
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 3)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attention = F.scaled_dot_product_attention if not self.by_import else scaled_dot_product_attention
        return attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = checkpoint(self.attend, x, use_reentrant=self.reentrant) if self.recompute else self.attend(x)
        return self.head(x).tanh()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch["x"]).flatten(0, 1), batch["y"].flatten())


def batch_of(seed: int, samples: int = 2, tokens: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 16, (samples, tokens), generator=generator) for name in ("x", "y")}


def gradients_of_recomputed(method: str, options: dict[str, bool]) -> dict[str, Tensor]:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy("cp:2", context_parallel=method)
    strategy.start(world)
    model = Recomputed(recompute=True, **options)
    strategy.prepare({"model": model}, [])
    strategy.backward(strategy.bind(model, "training_step")(batch_of(1)))
    grads: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
    found = {n: g.full_tensor() for n, g in grads.items()}
    world.stop()
    return found


@pytest.mark.parametrize(
    ("method", "options"), [("all-gather", {}), ("ring", {"by_import": True}), ("ulysses", {"reentrant": True})]
)
def test_recomputed_attention_looks_at_all_ranks_too(method: str, options: dict[str, bool], ranks: Any) -> None:
    """Activation checkpointing runs the forward again inside the backward pass, where torch has no modes."""
    truth = Recomputed(recompute=False)
    truth.training_step(batch_of(1)).backward()
    for found in ranks(2, gradients_of_recomputed, method, options):
        for name, parameter in truth.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "size", "options"),
    [
        ("cp:2", 2, {}),
        ("cp:2", 2, {"context_parallel": "ring"}),
        ("cp:2", 2, {"context_parallel": "ulysses"}),
        ("fsdp:2+cp:2", 4, {"context_parallel": ContextParallel(method="ring", load_balance=False, positions="arange")}),
        ("hsdp:2+cp:2", 4, {}),
        ("cp:4", 4, {"context_parallel": "ulysses"}),
        ("cp:2+tp:2", 4, {}),
    ],
)
def test_every_case_of_the_suite_passes(strategy: str, size: int, options: dict[str, Any], ranks: Any) -> None:
    for found in ranks(size, outcomes, strategy, options, LONG if size == 2 else LONG[::3], timeout=240):
        assert {o for _, o, _ in found} == {"pass"}, found


class Several(nn.Module):
    """Attention over the sequence, over something else, and by torch's layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(16, 8)
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.latent = nn.Parameter(torch.randn(1, 3, 8))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embed(batch["x"])
        if self.kind == "layer":
            x = self.layer(x, x, x, need_weights=False)[0]
        elif self.kind == "latents look":
            x = F.scaled_dot_product_attention(self.latent.expand(x.shape[0], -1, -1), x, x)
        elif self.kind == "memory":  # every token looks at three vectors that all ranks have
            memory = self.latent.expand(x.shape[0], -1, -1)
            x = x + F.scaled_dot_product_attention(x, memory, memory)
        elif self.kind == "square mask":
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]
        elif self.kind == "dropout":
            q = x[:, None]
            x = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)[:, 0]
        elif self.kind == "odd heads":
            q = torch.stack([x, x, x], 1)
            x = F.scaled_dot_product_attention(q, q, q).mean(1)
        return x.square().mean()


def first_step(kind: str, options: dict[str, Any], tokens: int) -> tuple[str, float, float]:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy("cp:2", context_parallel=ContextParallel(**options))
    strategy.start(world)
    model = Several(kind)
    truth = float(model.training_step(batch_of(1, tokens=tokens)).detach())
    strategy.prepare({"model": model}, [])
    try:
        loss = strategy.bind(model, "training_step")(batch_of(1, tokens=tokens))
        return "", truth, float(world.all_reduce(loss.detach())) / 2
    except ConfigError as error:
        return str(error), truth, 0.0
    finally:
        world.stop()


@pytest.mark.parametrize(
    ("kind", "options", "tokens", "says"),
    [
        ("layer", {}, 16, "nn.MultiheadAttention .* cannot attend to keys of other ranks"),
        ("latents look", {}, 16, "Attention of 3 queries to the 8 keys"),
        ("square mask", {}, 16, r"attn_mask has the shape \(8, 8\).*Give it all columns: \(..., 8, 16\)"),
        ("dropout", {"method": "ring"}, 16, "dropout_p=0.1: ring attention"),
        ("odd heads", {"method": "ulysses"}, 16, "2 ranks some of the 3 heads"),
        ("memory", {}, 18, "18 tokens long, which 2 ranks cannot share in 4 equal chunks. Pad the sequences"),
        ("memory", {"load_balance": False}, 18, ""),
        ("memory", {}, 16, ""),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(kind: str, options: dict[str, Any], tokens: int, says: str, ranks: Any) -> None:
    """And what looks at no other token is left alone."""
    for said, truth, loss in ranks(2, first_step, kind, options, tokens):
        if says:
            assert re.search(says, said), said
        else:
            assert not said
            assert loss == pytest.approx(truth, rel=1e-5)


def in_a_loop_of_ones_own() -> list[Any]:
    world = World.start("cpu", need_group=True)
    strategy: Any = make_strategy("cp:2")
    strategy.start(world)
    model = Recomputed(recompute=False)
    strategy.prepare({"model": model}, [])
    with strategy.parts[0].sharing(batch_of(1)) as part:
        positions = sequence_positions(8).tolist()
        loss = F.cross_entropy(model(part["x"]).flatten(0, 1), part["y"].flatten())
    strategy.backward(loss)
    found = [float(world.all_reduce(loss.detach())) / 2, positions, sequence_positions(3).tolist()]
    found.append(model.qkv.weight.grad.full_tensor())  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    world.stop()
    return found


def test_a_loop_of_ones_own_shares_its_batch(ranks: Any) -> None:
    truth = Recomputed(recompute=False)
    loss = truth.training_step(batch_of(1))
    loss.backward()
    first, second = ranks(2, in_a_loop_of_ones_own)
    assert first[0] == second[0] == pytest.approx(loss.item(), rel=1e-12)
    assert (first[1], second[1]) == ([0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11])
    assert first[2] == [0, 1, 2]
    torch.testing.assert_close(first[3], truth.qkv.weight.grad)


@pytest.mark.parametrize("wrong", [{"method": "rings"}, {"positions": "rope"}, {"sequence_dim": -1}])
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DrivetrainError, match=r"method|positions|sequence_dim"):
        ContextParallel(**wrong)
