"""Context parallel as a strategy: the numbers of one plain loop, by the conformance suite, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.context_parallel import ContextParallel
from drivetrain.strategies.contract import CASES, Case, cases_of, check_strategy
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

DOUBLE = {c.name.removeprefix("float64 "): c for c in cases_of("llama", [c for c in CASES if c.dtype == torch.float64])}
QUICK = [replace(DOUBLE[f"{name} llama"], steps=6) for name in ("sgd window 3, clipped", "adamw num_items, clipped")]


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


@pytest.mark.parametrize("method", ["all-gather", "ring", "ulysses"])
def test_two_ranks_that_share_a_sequence_train_like_one(method: str, ranks: Any) -> None:
    for found in ranks(2, outcomes, "cp:2", {"context_parallel": ContextParallel(method=method)}, QUICK):
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

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embed(batch["x"])
        x = checkpoint(self.attend, x, use_reentrant=self.reentrant) if self.recompute else self.attend(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["y"].flatten())


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
