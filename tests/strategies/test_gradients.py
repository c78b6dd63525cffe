"""Norms, clipping and scaling of lists of gradients, against torch.nn.utils."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from drivetrain.strategies import gradients
from torch import Tensor, nn


def parameters(dtypes: list[torch.dtype]) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    made = []
    for i, dtype in enumerate(dtypes):
        p = nn.Parameter(torch.zeros(3, i + 1, dtype=dtype))
        p.grad = torch.randn(3, i + 1, generator=g, dtype=torch.float64).to(dtype)
        made.append(p)
    return made


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_and_clipping_are_torchs(dtype: torch.dtype, norm_type: float) -> None:
    """Bit for bit: get the norm, turn it into a factor, multiply."""
    ours, theirs = parameters([dtype] * 4), parameters([dtype] * 4)
    norm = gradients.grad_norm(gradients.gradients(ours), norm_type)
    gradients.scale_(gradients.gradients(ours), gradients.clip_coefficient(norm, 0.7))
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, 0.7, norm_type))
    assert norm.dtype == dtype
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_small_gradient_is_left_alone() -> None:
    assert gradients.clip_coefficient(torch.tensor(0.5), 1.0).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    """300 squared is more than fp16 holds; a thousand small ones would be lost in bf16."""
    grads = [torch.full((1000,), 300.0, dtype=dtype), torch.full((1000,), 1.0, dtype=dtype)]
    norm = gradients.grad_norm(grads)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx((1000 * 300.0**2 + 1000) ** 0.5, rel=1e-6)


def test_gradients_of_several_dtypes_have_one_norm() -> None:
    held = parameters([torch.float32, torch.float64, torch.bfloat16])
    norm = gradients.grad_norm(gradients.gradients(held))
    expected = torch.cat([p.grad.double().flatten() for p in held if p.grad is not None]).norm()
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_gradients_have_norm_0_and_can_be_scaled() -> None:
    assert gradients.gradients([nn.Parameter(torch.ones(2))]) == []
    assert gradients.grad_norm([]).item() == 0.0
    gradients.scale_([], 2.0)
    gradients.clip_values_([], 1.0)


@pytest.mark.parametrize("factor", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_scaling_multiplies_every_gradient_in_place(factor: float | Tensor) -> None:
    held = parameters([torch.float32, torch.bfloat16])
    before = [p.grad.clone() for p in held if p.grad is not None]
    places = [p.grad.data_ptr() for p in held if p.grad is not None]
    gradients.scale_(gradients.gradients(held), factor)
    for p, old, place in zip(held, before, places, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, old * 0.25)
        assert p.grad.data_ptr() == place
        assert p.grad.dtype == old.dtype


def test_values_are_clamped_like_torchs() -> None:
    ours, theirs = parameters([torch.float32] * 3), parameters([torch.float32] * 3)
    gradients.clip_values_(gradients.gradients(ours), 0.3)
    nn.utils.clip_grad_value_(theirs, 0.3)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_norm_that_is_not_finite_stays_so() -> None:
    """What reads the norm must see it: neither clamped nor replaced."""
    assert gradients.grad_norm([torch.tensor([1.0, float("nan")])]).isnan()
    assert gradients.grad_norm([torch.tensor([1.0, float("inf")])]).isinf()
    assert gradients.clip_coefficient(torch.tensor(float("inf")), 1.0).item() == 0.0


def calls(number: int) -> int:
    grads = [torch.ones(2) for _ in range(number)]
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def body() -> None:
        gradients.scale_(grads, gradients.clip_coefficient(gradients.grad_norm(grads), 1.0))

    body()
    sys.setprofile(profile)
    body()
    sys.setprofile(None)
    return count


def test_calls_do_not_grow_with_the_number_of_gradients() -> None:
    assert calls(100) == calls(2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_in_any_dtype(bad: float) -> None:
    for dtypes in ([torch.float32] * 3, [torch.bfloat16] * 3, [torch.float32, torch.float16, torch.float64]):
        held = parameters(dtypes)
        assert gradients.all_finite(gradients.gradients(held))
        assert held[1].grad is not None
        held[1].grad[2, 1] = bad
        assert not gradients.all_finite(gradients.gradients(held))
    assert gradients.all_finite([])


def test_values_that_are_finite_and_huge_are_finite() -> None:
    """A norm, or a sum, of them would be Inf."""
    assert gradients.all_finite([torch.full((4,), torch.finfo(torch.float32).max), torch.full((4,), 60000.0).half()])
