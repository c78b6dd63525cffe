"""Linears that multiply in another number format: which are chosen, how they are swapped, and proof that it did something.

Every backend of this kind is one function, `matmul(input, weight) -> output`, with its own backward pass. `swap` makes an
`nn.Linear` a `LowPrecisionLinear` by changing its class: the module, its parameters and its hooks stay the same objects, so
optimizers, checkpoints (the names and plain tensors of before), tied weights and DDP need to know nothing about it.

    choose    every Linear of a model: converted, or skipped with the reason
    swap      the chosen ones; `restore` takes it back
    verify    each distinct shape, forward and backward, against high precision: near it, and not equal to bf16

The last is there because the classic fault of such a backend is to do nothing, silently.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Precision
from .formats import NumberFormat
from .mixed import BF16Mixed, BF16True

__all__ = ["Choice", "Chooser", "LinearPrecision", "LowPrecisionLinear", "Matmul", "Report"]
__all__ += ["choose", "layer_errors", "relative_error", "restore", "swap", "verify", "verify_stored"]

_SHOWN = 4  # how many names of one kind a line lists
_PRODUCTS = ("output", "input's gradient", "weight's gradient")
_ROWS = 53  # of the input of a check; no multiple of anything, so that the padding is checked too


class Matmul(Protocol):
    """input (..., in) and weight (out, in) -> (..., out) in the input's dtype, differentiable in both."""

    multiple: int
    """What the number of rows, and both sizes of a weight, must be a multiple of."""
    formats: dict[str, NumberFormat]
    """In which format the "input", the "weight" and the "grad" of the output enter their products; others stay as they are."""

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which Linears are converted. The recipe of a backend is one, with its own knobs beside these.

    Args:
        skip: names that are left alone, with `*` and `?` as in file names: ("head", "blocks.0.*").
        skip_first_and_last: leave the first and the last Linear of the model (in the order of its attributes) in high
            precision: they see the raw input and make the output, and are the most sensitive.
        min_features: Linears with fewer inputs or outputs are left alone. On an H100 float8 pays from about 1024 inputs and
            2048 outputs on (torchao/float8/README.md).
        filter: (module, name) -> whether it may be converted; asked last. torchao's and Accelerate's `module_filter_func`.
    """

    skip: Sequence[str] = ()
    skip_first_and_last: bool = True
    min_features: int = 16
    filter: Callable[[nn.Module, str], bool] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))


@dataclass
class Report:
    """What became of the Linears of one model."""

    model: str
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """name -> reason"""
    fused: list[str] = field(default_factory=list)
    """of the converted ones, those that became one module with the norm before them"""
    errors: dict[str, float] = field(default_factory=dict)
    """one converted Linear of each shape -> relative error of its output, as `verify` found it"""

    def __str__(self) -> str:
        text = f"{len(self.converted)} of {len(self.converted) + len(self.skipped)} Linears"
        if self.errors:
            text += f", output off by {min(self.errors.values()):.1%} to {max(self.errors.values()):.1%}"
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join([text, *(f"not {_names(names)} ({reason})" for reason, names in by_reason.items())])


class LowPrecisionLinear(nn.Linear):
    """An `nn.Linear` whose product is made by `matmul`. Made by `swap`, never by its constructor."""

    matmul: Matmul
    split: Any = None  # how it is cut over tp: a `split_linears.Split`

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out), in autocast's dtype where autocast is on, as with nn.Linear, else in the input's."""
        return self.through(input, self.weight, self.bias) if self.split is None else self.split(self, input)

    def through(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return input @ weight.T + bias.

        Rows are filled up with zeros to a multiple of what the product needs, which changes neither it nor any scale.
        """
        device = input.device.type
        cast = torch.is_autocast_enabled(device)
        if cast:
            input = input.to(torch.get_autocast_dtype(device))
        # No product of a converted tensor may be cast once more.
        with torch.autocast(device, enabled=False):
            width = input.shape[-1]
            rows = input.numel() // width
            fill = -rows % self.matmul.multiple
            if fill:
                padded = F.pad(input.reshape(rows, width), (0, 0, 0, fill))
                output = self.product(padded, weight)[:rows]
                output = output.reshape(*input.shape[:-1], output.shape[-1])
            else:
                output = self.product(input, weight)
            return output if bias is None else output + bias.to(output.dtype)

    def product(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return input @ weight.T, of as many rows as the product asks for."""
        return self.matmul(input, weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.matmul!r}"


def choose(model: nn.Module, choice: Choice, multiple: int, name: str = "") -> Report:
    """Return which Linears of `model` can and shall be converted.

    Raises:
        ConfigError: a pattern of `choice.skip` that meets no Linear.
    """
    report = Report(name or type(model).__name__)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for pattern in choice.skip:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in linears):
            raise ConfigError(
                f"skip={pattern!r} meets no Linear of {report.model}; it has {_names(list(linears)) or 'none'}. "
                "Correct it or leave it out."
            )
    ends = {*list(linears)[:1], *list(linears)[-1:]} if choice.skip_first_and_last else set()
    for n, module in linears.items():
        reason = _reason(n, module, choice, multiple, ends)
        if reason is None:
            report.converted.append(n)
        else:
            report.skipped[n] = reason
    return report


class Chooser:
    """Chooses in a model, or once for all its parts: the first and last Linear of a model are not those of its stages."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self._reasons: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()

    def look_at(self, model: nn.Module, multiple: int) -> Report:
        """Choose for `model`, whose parts will be asked for."""
        report = choose(model, self.choice, multiple)
        for name in (*report.converted, *report.skipped):
            self._reasons[model.get_submodule(name)] = report.skipped.get(name)
        return report

    def choose(self, model: nn.Module, multiple: int) -> tuple[Report, bool]:
        """Return what is chosen of `model`, and whether it is a part of one that was looked at, which may have nothing."""
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        if not self._reasons or any(m not in self._reasons for m in linears.values()):
            return choose(model, self.choice, multiple), False
        reasons = {n: self._reasons[m] for n, m in linears.items()}
        report = Report(type(model).__name__, [n for n, reason in reasons.items() if reason is None])
        report.skipped = {n: reason for n, reason in reasons.items() if reason is not None}
        return report, True


def _reason(name: str, module: nn.Linear, choice: Choice, multiple: int, ends: set[str]) -> str | None:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in choice.skip):
        return "as asked"
    if not _is_linear(module):
        # Such as the output of nn.MultiheadAttention, whose weight is used without its forward: converting it would do nothing.
        return f"a {type(module).__name__}, which has its own way to multiply"
    if module.in_features % multiple or module.out_features % multiple:
        return f"{module.in_features}x{module.out_features}, not multiples of {multiple}"
    if min(module.in_features, module.out_features) < choice.min_features:
        return f"smaller than {choice.min_features}"
    if name in ends:
        return "first and last"
    return None if choice.filter is None or choice.filter(module, name) else "the filter left it out"


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a plain Linear, also one that fsdp made a unit of its own (whose class it derives from nn.Linear)."""
    kind = type(module)
    return kind is nn.Linear or (kind.__name__ == "FSDPLinear" and kind.__bases__[-1] is nn.Linear)


def swap(model: nn.Module, names: Sequence[str], matmul: Matmul) -> None:
    """Make the Linears `names` of `model` multiply by `matmul`, in place."""
    for name in names:
        module: Any = model.get_submodule(name)
        module.__class__ = LowPrecisionLinear
        module.matmul = matmul


def restore(model: nn.Module) -> int:
    """Make every `LowPrecisionLinear` of `model` a plain Linear again; return how many there were."""
    found: list[Any] = [m for m in model.modules() if type(m) is LowPrecisionLinear]
    for module in found:
        del module.matmul
        module.__class__ = nn.Linear
    return len(found)


def verify(model: nn.Module, report: Report, precision: str, limits: tuple[float, float], device: torch.device) -> None:
    """Multiply by one converted Linear of each shape, forward and backward, and compare with high precision.

    Its own weights are used, and random inputs of its shape. What is found is noted in `report.errors`.
    Args:
        limits: relative errors (2-norm of the difference over that of the truth): of the output, and of the gradients.
    Raises:
        ConfigError: all that it gives equals bf16's bit for bit (the backend does nothing), or an error is above its limit.
    """
    seen: set[tuple[int, int, torch.dtype]] = set()
    for name in report.converted:
        module = model.get_submodule(name)
        assert isinstance(module, LowPrecisionLinear)
        shape = (module.out_features, module.in_features, module.weight.dtype)
        if shape in seen:
            continue
        seen.add(shape)
        errors = _errors(module, device)
        report.errors[name] = errors["output"]
        where = f"precision={precision!r}: {name} of {report.model}, {module.in_features}x{module.out_features},"
        if errors["equal"]:
            raise _does_nothing(where, "output and gradients")
        for what, limit in zip(_PRODUCTS, (limits[0], limits[1], limits[1]), strict=True):
            if not errors[what] <= limit:
                raise ConfigError(
                    f"{where} has a relative error of {errors[what]:.3g} in its {what} where at most {limit:g} was expected. Its "
                    f"weights may hold outliers: leave it in high precision, with skip=({name!r},) in the recipe."
                )


@torch.no_grad()
def verify_stored(
    report: Report,
    name: str,
    precision: str,
    limit: float,
    weight: Tensor,
    product: Callable[[Tensor], Tensor],
    device: torch.device,
) -> None:
    """Compare the `product` with a weight that was put into another form for good with that of the `weight` that it was.

    Raises:
        ConfigError: it equals bf16's bit for bit, or is off by more than `limit`.
    """
    if weight.is_meta or not weight.any():
        return
    where = f"precision={precision!r}: {name} of {report.model}, {weight.shape[1]}x{weight.shape[0]},"
    own = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.shape[1], generator=own).to(device, torch.bfloat16)
    weight = weight.to(device)
    with torch.autocast(device.type, enabled=False):
        found = product(x)
        error = relative_error(found, x.double() @ weight.double().T)
        if torch.equal(found, F.linear(x, weight.to(torch.bfloat16))):
            raise _does_nothing(where, "output")
    if not error <= limit:
        raise ConfigError(
            f"{where} is off by {error:.3g} once its weight is stored, where at most {limit:g} was expected. That is a fault of "
            f"the backend, or its weights hold outliers: leave it in high precision, with skip=({name!r},) in the recipe."
        )


def _does_nothing(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where} gives the {what} of bf16 bit for bit: nothing was converted. That is a fault of the backend with this version "
        "of torch or of its package. Use 'bf16-mixed' or another backend."
    )


def _errors(module: LowPrecisionLinear, device: torch.device) -> dict[str, float]:
    """Return the relative errors of the output and of both gradients, and whether all three equal those of bf16."""
    own = torch.Generator().manual_seed(0)  # the run's random numbers are not touched
    weight = module.weight.detach()
    if weight.is_meta or not weight.any():  # no values yet, or zeros (the B of a LoRA pair), which every format can hold
        weight = torch.randn(weight.shape, generator=own) / weight.shape[1] ** 0.5
    dtype = torch.bfloat16 if module.weight.dtype == torch.float32 else module.weight.dtype
    weight = weight.to(device, module.weight.dtype)
    x = torch.randn(_ROWS, module.in_features, generator=own).to(device, dtype)
    grad = torch.randn(_ROWS, module.out_features, generator=own).to(device, dtype)
    leaf = nn.Parameter(weight.clone())
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": leaf, "bias": None}
    found = _products(probe.forward, x, leaf, grad)
    plain = nn.Parameter(weight.clone())
    usual = _products(lambda x: F.linear(x, plain.to(dtype)), x, plain, grad)
    exact, slope = weight.double(), grad.double()
    truth = (x.double() @ exact.T, slope @ exact, slope.T @ x.double())
    errors = {what: relative_error(f, t) for what, f, t in zip(_PRODUCTS, found, truth, strict=True)}
    return errors | {"equal": all(torch.equal(f, u) for f, u in zip(found, usual, strict=True))}


def _products(forward: Callable[[Tensor], Tensor], x: Tensor, weight: nn.Parameter, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output of `forward`, and the gradients of its input and weight."""
    inputs = x.clone().requires_grad_()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        output = forward(inputs)
        output.backward(grad)
    assert inputs.grad is not None
    assert weight.grad is not None
    return output.detach(), inputs.grad, weight.grad


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the 2-norm of the difference over that of `truth`."""
    truth = truth.detach().double()
    return float((found.detach().double() - truth).norm() / truth.norm().clamp(min=1e-300))


def layer_errors(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Call `run`, which runs `model` on real data, and return the relative error of every converted Linear's output on it."""
    errors: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LowPrecisionLinear):

            def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                assert isinstance(module, LowPrecisionLinear)
                with torch.autocast(output.device.type, enabled=False):
                    bias = None if module.bias is None else module.bias.double()
                    errors[name] = relative_error(output, F.linear(inputs[0].double(), module.weight.double(), bias))

            handles.append(module.register_forward_hook(compare))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return errors


class LinearPrecision(Precision):
    """Linears in a low precision; everything else as in `base`: bf16 autocast over fp32 weights, by default.

    A subclass gives `name`, `limits`, `make_matmul` and `device_reason`. `reports` holds what became of each model.
    """

    limits: tuple[float, float] = (0.15, 0.25)

    def __init__(self, choice: Choice, base: str | Precision = "bf16-mixed") -> None:
        self.choice = choice
        self._chooser = Chooser(choice)
        bases = {"bf16-mixed": BF16Mixed, "bf16-true": BF16True, "fp32": Precision}
        if isinstance(base, str) and base not in bases:
            raise ConfigError(
                f"base={base!r} cannot hold what {self.name} leaves in high precision. Use one of {', '.join(map(repr, bases))}."
            )
        self.base: Precision = bases[base]() if isinstance(base, str) else base
        self.param_dtype = self.base.param_dtype
        self.autocast_dtype = self.base.autocast_dtype
        self.reports: list[Report] = []
        self._device = torch.device("cpu")

    # What the subclass gives.
    def make_matmul(self, device: torch.device) -> Matmul:
        """Return the product, for `device`."""
        raise NotImplementedError

    def device_reason(self, device: torch.device) -> str | None:
        """Return why `device` cannot do it, or None."""
        return None

    # What a strategy calls.
    def available(self, device: torch.device) -> str | None:
        self._device = device
        return self.device_reason(device) or self.base.available(device)

    def look_at(self, model: nn.Module) -> None:
        """Choose among all Linears of `model`.

        Raises:
            ConfigError: none can be converted.
        """
        self._require(self._chooser.look_at(model, self.make_matmul(self._device).multiple))

    def convert(self, model: nn.Module) -> nn.Module:
        """Convert the Linears of `model` that can be, and prove that it did something.

        Raises:
            ConfigError: none can be (the reasons are listed), or `verify` finds a fault.
        """
        matmul = self.make_matmul(self._device)
        report, is_part = self._chooser.choose(model, matmul.multiple)
        if not is_part:
            self._require(report)
        model = self.base.convert(model)
        swap(model, report.converted, matmul)
        verify(model, report, self.name, self.limits, self._device)
        self.reports.append(report)
        return model

    def _require(self, report: Report) -> None:
        if not report.converted:
            why = "it has none" if not report.skipped else f"it has {str(report).partition('; ')[2]}"
            raise ConfigError(
                f"precision={self.name!r} found no Linear to convert in {report.model}: {why}. It would train in "
                f"{self.base.name}, which is not what was asked for. {self.advice(report)}"
            )

    def advice(self, report: Report) -> str:
        """What to do about a model in which nothing can be converted."""
        if any(reason == "first and last" for reason in report.skipped.values()):
            return f"Give {type(self).__name__} a recipe with skip_first_and_last=False, or use precision={self.base.name!r}."
        return f"Use precision={self.base.name!r}."

    def convert_input(self, data: Any) -> Any:
        return self.base.convert_input(data)

    def autocast(self, device: torch.device) -> Any:
        return self.base.autocast(device)

    def explain(self) -> str:
        """Return what was converted, for the start-up lines."""
        return " | ".join(f"{r.model}: {r}" if len(self.reports) > 1 else str(r) for r in self.reports)


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
