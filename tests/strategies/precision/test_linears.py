"""Which Linears are converted, how they are swapped, and that a backend which does nothing, or too much, is found out."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import Strategy
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.precision.linears import (
    Choice,
    LinearPrecision,
    LowPrecisionLinear,
    choose,
    layer_errors,
    restore,
    swap,
)
from drivetrain.strategies.world import World
from torch import Tensor, nn


class Rounded:
    """A product of inputs and weights rounded to `bits` bits of mantissa, in plain torch."""

    multiple = 16
    formats: dict[str, Any] = {}  # noqa: RUF012  the protocol has it so

    def __init__(self, bits: int = 4) -> None:
        self.bits = bits

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self._round(input), self._round(weight).to(input.dtype))

    def _round(self, x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x.detach().float())
        rounded = torch.ldexp((mantissa * 2**self.bits).round() / 2**self.bits, exponent)
        return x + (rounded.to(x.dtype) - x).detach()


class Nothing:
    """What a backend does that is not registered where it should be: bf16's product."""

    multiple = 16

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight.to(input.dtype))


class Backend(LinearPrecision):
    name = "rounded"
    limits = (0.05, 0.05)

    def __init__(self, matmul: Any = None, **options: Any) -> None:
        super().__init__(Choice(**{"skip_first_and_last": False, **options}))
        self.matmul = matmul or Rounded()

    def make_matmul(self, device: torch.device) -> Any:
        return self.matmul


def net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])


# -- the choice -----------------------------------------------------------------------------------------------------------


def test_every_linear_is_converted_or_skipped_with_its_reason() -> None:
    model = nn.ModuleDict(
        {
            "first": nn.Linear(32, 32),
            "odd": nn.Linear(32, 30),
            "body": net(32, 64, 32),
            "attention": nn.MultiheadAttention(32, 2),
            "last": nn.Linear(32, 16),
        }
    )
    report = choose(model, Choice(skip=("body.0",)), 16, "net")
    assert report.converted == ["body.1"]
    assert report.skipped == {
        "first": "first and last",
        "odd": "32x30, not multiples of 16",
        "body.0": "as asked",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, which has its own way to multiply",
        "last": "first and last",
    }
    assert str(report) == (
        "1 of 6 Linears; not first, last (first and last); not odd (32x30, not multiples of 16); not body.0 (as asked); "
        "not attention.out_proj (a NonDynamicallyQuantizableLinear, which has its own way to multiply)"
    )


def test_the_weight_of_a_multihead_attention_is_used_without_its_forward() -> None:
    """So converting it would do nothing: this is why it is skipped."""
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    called: list[bool] = []
    attention.out_proj.register_forward_hook(lambda *_: called.append(True))
    attention(x := torch.randn(1, 4, 32), x, x)
    assert not called


def test_a_pattern_that_meets_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"skip='haed' meets no Linear of Sequential; it has 0, 1\. Correct it"):
        choose(net(16, 16, 16), Choice(skip="haed"), 16)


def test_small_linears_may_be_left_out() -> None:
    report = choose(net(64, 32, 64, 64), Choice(min_features=64, skip_first_and_last=False), 16)
    assert report.converted == ["2"]
    assert report.skipped["0"] == "smaller than 64"


def test_a_model_without_a_linear_to_convert_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it has none. It would train in bf16-mixed, which is not what was asked for"):
        Backend().convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ConfigError, match=r"not 0, 1 \(first and last\).*skip_first_and_last=False"):
        Backend(skip_first_and_last=True).convert(net(16, 16, 16))


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"base='fp16'.*'bf16-mixed', 'bf16-true', 'fp32'"):
        LinearPrecision(Choice(), base="fp16")


# -- the swap -------------------------------------------------------------------------------------------------------------


def test_modules_parameters_hooks_and_names_stay_the_same_objects() -> None:
    model = net(16, 32, 16)
    modules, parameters, names = list(model), list(model.parameters()), list(model.state_dict())
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    Backend().convert(model)
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    model(torch.randn(2, 16))
    assert calls == [1]
    assert isinstance(model[0], LowPrecisionLinear)
    assert "16, out_features=32" in repr(model[0])


def test_a_swapped_model_can_be_copied_and_had_back() -> None:
    model = net(16, 32, 16)
    x = torch.randn(3, 16)
    before = model(x)
    swap(model, ["0", "1"], Rounded())
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    assert not torch.equal(model(x), before)
    assert restore(model) == 2
    assert torch.equal(model(x), before)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_has_the_dtype_that_a_plain_linear_gives(autocast: bool) -> None:
    plain, model = net(16, 32), net(16, 32)
    swap(model, ["0"], Rounded())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(torch.randn(2, 3, 16)).dtype == plain(torch.randn(2, 3, 16)).dtype
    model(torch.randn(2, 3, 16)).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


# -- the proof ------------------------------------------------------------------------------------------------------------


def test_a_backend_that_does_nothing_is_found_out() -> None:
    with pytest.raises(ConfigError, match=r"0 of Sequential, 16x32, gives the output and gradients of bf16 bit for bit"):
        Backend(Nothing()).convert(net(16, 32))


def test_a_backend_that_is_too_far_off_is_found_out() -> None:
    with pytest.raises(ConfigError, match=r"a relative error of 0\.\d+ in its output where at most 0.05 was.*skip=\('0',\)"):
        Backend(Rounded(2)).convert(net(16, 32))


def test_a_wrong_gradient_is_found_out() -> None:
    class WrongGradient(Rounded):
        def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
            return super().__call__(input, weight + (weight - weight.detach()))  # twice the gradient

    with pytest.raises(ConfigError, match="in its weight's gradient where"):
        Backend(WrongGradient()).convert(net(16, 32))


def test_the_proof_touches_neither_the_model_nor_the_random_numbers() -> None:
    model = net(16, 32, 16)
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    state = torch.random.get_rng_state()
    Backend().convert(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(w, weights[n]) and w.grad is None for n, w in model.state_dict().items())


def test_weights_of_zero_are_no_reason_to_refuse() -> None:
    """The second matrix of a LoRA pair starts with them, and every format can hold a zero."""
    model = net(16, 32)
    nn.init.zeros_(model[0].weight)  # pyright: ignore[reportArgumentType]
    Backend().convert(model)


def test_the_report_says_how_far_off_each_shape_is() -> None:
    backend = Backend()
    strategy = Strategy(precision=backend)
    strategy.start(World.single())
    strategy.prepare_model("model", net(16, 32, 16, 32))
    assert list(backend.reports[0].errors) == ["0", "1"]  # the third has the shape of the first
    assert all(0.005 < e < 0.05 for e in backend.reports[0].errors.values())
    assert backend.explain().startswith("3 of 3 Linears, output off by ")


def test_errors_of_layers_are_those_on_the_data_that_ran() -> None:
    model, x = net(16, 32, 16), torch.randn(64, 16)
    swap(model, ["1"], Rounded())
    (name, error), *more = layer_errors(model, lambda: model(x)).items()
    hidden = F.linear(x, model[0].weight, model[0].bias)  # pyright: ignore[reportArgumentType]
    exact = F.linear(hidden, model[1].weight, model[1].bias).detach().double()  # pyright: ignore[reportArgumentType]
    assert (name, more) == ("1", [])
    assert error == pytest.approx(float((model(x).detach().double() - exact).norm() / exact.norm()), rel=1e-4)
