"""Attention over a shared sequence is torch's attention over the whole one: outputs and all gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.sequence_attention import METHODS, attention_over_ranks
from drivetrain.strategies.sequence_layout import SequenceLayout
from drivetrain.strategies.world import World
from torch import Tensor

_T = 16


def _whole(heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, _T, 4), (2, key_heads, _T, 4), (2, key_heads, _T, 6), (2, heads, _T, 6)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def _mask(kind: str | None, layout: SequenceLayout | None) -> Tensor | None:
    """A mask of the whole sequence, or what a rank of `layout` is given of it."""
    generator = torch.Generator().manual_seed(1)
    if kind is None:
        return None
    local = _T if layout is None else _T // layout.ranks
    rows = torch.arange(_T) if layout is None else layout.positions(local)
    if kind == "added, by head":
        return torch.randn(1, 4, _T, _T, generator=generator, dtype=torch.float64)[..., rows, :]
    if kind == "bool, all rows":
        return torch.rand(_T, _T, generator=generator) < 0.6
    if kind == "bool, all keys of one row":
        return torch.rand(2, 1, 1, _T, generator=generator) < 0.6
    assert kind == "bool, own keys of one row"
    return (torch.rand(2, 1, 1, _T, generator=generator) < 0.6)[..., rows]


def _attend(
    attend: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, mask: Tensor | None, **options: Any
) -> list[Tensor]:
    q, k, v = (t.clone().requires_grad_() for t in tensors)
    out = attend(q, k, v, mask, **options)
    out.backward(grad)
    grads: list[Any] = [q.grad, k.grad, v.grad]
    return [out.detach(), *grads]


_CASES = {
    "plain": (4, 4, None, {}),
    "causal": (4, 4, None, {"is_causal": True}),
    "causal gqa": (4, 2, None, {"is_causal": True, "enable_gqa": True, "scale": 0.7}),
    "one key head": (4, 1, None, {"enable_gqa": True}),
    "mask by head": (4, 4, "added, by head", {}),
    "mask by head gqa": (4, 2, "added, by head", {"enable_gqa": True}),
    "mask all rows": (4, 4, "bool, all rows", {"scale": 0.3}),
    "mask of keys": (4, 4, "bool, all keys of one row", {}),
    "mask of own keys": (4, 4, "bool, own keys of one row", {}),
}


def _errors(balanced: bool) -> dict[str, float]:
    world = World.start()
    group = world.group()
    assert group is not None
    layout = SequenceLayout(world.size, world.rank, balanced)
    found: dict[str, float] = {}
    for method in METHODS:
        for name, (heads, key_heads, kind, options) in _CASES.items():
            *whole, grad = _whole(heads, key_heads)
            truth = _attend(F.scaled_dot_product_attention, whole, grad, _mask(kind, None), **options)
            parts = [layout.split(t, -2) for t in whole]
            more = {"method": method, "group": group, "layout": layout}
            mine = _attend(attention_over_ranks, parts, layout.split(grad, -2), _mask(kind, layout), **options, **more)
            found[f"{method} {name}"] = max(
                float((a - layout.split(b, -2)).abs().max()) for a, b in zip(mine, truth, strict=True)
            )
    world.stop()
    return found


@pytest.mark.parametrize(("n", "balanced"), [(2, True), (2, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_every_method_is_torchs_attention_of_the_whole_sequence(n: int, balanced: bool, ranks) -> None:
    """Outputs and the gradients of q, k and v; every mask, grouped heads, scale."""
    for found in ranks(n, _errors, balanced):
        assert len(found) == len(METHODS) * len(_CASES)
        assert max(found.values()) < 1e-12, found
