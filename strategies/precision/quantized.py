"""Integer training by torchao: products of int8, ternary weights, and weights that are int8 all the time.

    int8-ao             Linears multiply int8 (one scale a row), forward and backward; the weights stay in fp32
    bitnet-ao           BitNet b1.58: weights of -1, 0 and 1 with one scale, int8 activations; the trained weights stay in fp32
    int8-weights-ao     the Linears' weights are int8 with one scale a row, and nothing else of them is kept: a quarter of the
                        memory. Each update is rounded at random, up or down, so that small ones are not lost on average.

Everything else runs in bf16 under autocast. torchao's own switch for int8 products does nothing in 0.18 (its function is
registered in the wrong table); they are called here directly, and `linears.verify` would notice.
Source: torchao.prototype.quantized_training (0.18); Ma et al. 2024, arXiv:2402.17764 (BitNet b1.58).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from . import _torchao
from .base import Precision
from .formats import NumberFormat
from .linears import Choice, LinearPrecision, LowPrecisionLinear, Matmul, verify_stored

__all__ = ["BitNetAO", "Int8AO", "Int8Recipe", "Int8WeightsAO", "Int8WeightsRecipe"]

_PACKAGE = "prototype.quantized_training"


@dataclass(frozen=True)
class Int8Recipe(Choice):
    """The knobs of `Int8AO`: which of the three products of a Linear are int8, and which Linears (see `linears.Choice`)."""

    output: bool = True
    grad_input: bool = True
    grad_weight: bool = True


@dataclass(frozen=True)
class Int8WeightsRecipe(Choice):
    """Which Linears have int8 weights; see `linears.Choice`."""


class _TorchaoLinears(LinearPrecision):
    """What needs torchao and no particular device."""

    def device_reason(self, device: torch.device) -> str | None:
        if reason := _torchao.missing(f"precision={self.name!r}"):
            return reason
        if device.type not in ("cpu", "cuda"):
            return f"precision={self.name!r} was asked for on {device.type}; torchao has it for CPU and CUDA. Use 'bf16-mixed'."
        return None


class Int8AO(_TorchaoLinears):
    """Linears that multiply int8, with one scale for each row, cast anew for each product.

    Args:
        base: the precision of everything else: "bf16-mixed", "bf16-true" or "fp32".
    """

    name = "int8-ao"
    limits = (0.05, 0.08)

    def __init__(self, recipe: Int8Recipe | None = None, *, base: str | Precision = "bf16-mixed") -> None:
        self.recipe = recipe if recipe is not None else Int8Recipe()
        if not (self.recipe.output or self.recipe.grad_input or self.recipe.grad_weight):
            raise ConfigError("Int8Recipe leaves all three products in high precision. Set at least `output`.")
        super().__init__(self.recipe, base)

    def make_matmul(self, device: torch.device) -> Matmul:
        return Int8Matmul(self.recipe, wanted_by=f"precision={self.name!r}")


@dataclass(frozen=True)
class _Products:
    """What torchao's product asks of its config. Its own class is not frozen, and torch.compile takes it for no constant."""

    output: bool
    grad_input: bool
    grad_weight: bool


class Int8Matmul:
    """input @ weight.T in int8."""

    multiple = 16

    def __init__(self, recipe: Int8Recipe, *, wanted_by: str) -> None:
        module = _torchao.load(f"{_PACKAGE}.int8_mixed_precision", wanted_by=wanted_by)
        self.function = module._Int8MixedPrecisionTrainingLinearFunction
        self.config = _Products(recipe.output, recipe.grad_input, recipe.grad_weight)
        row, used = NumberFormat(torch.int8, "row"), {"input": recipe.output, "weight": recipe.output}
        used["grad"] = recipe.grad_input or recipe.grad_weight
        self.formats = {kind: row for kind, asked in used.items() if asked}

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return self.function.apply(input.contiguous(), weight, None, self.config)

    def __repr__(self) -> str:
        products = [n for n in ("output", "grad_input", "grad_weight") if getattr(self.config, n)]
        return f"int8 {', '.join(products)}"


class BitNetAO(_TorchaoLinears):
    """BitNet b1.58: Linears with weights of -1, 0 and 1. Made to train from scratch: a trained model loses most of what it knows.

    Args:
        choice: which Linears; see `linears.Choice`.
    """

    name = "bitnet-ao"
    # Of normally distributed weights, three values keep about 80 %. The gradient of the weight is that of the rounded input.
    limits = (0.7, 0.7)

    def __init__(self, choice: Choice | None = None, *, base: str | Precision = "bf16-mixed") -> None:
        super().__init__(choice if choice is not None else Choice(), base)

    def make_matmul(self, device: torch.device) -> Matmul:
        return BitNetMatmul(wanted_by=f"precision={self.name!r}")


class BitNetMatmul:
    """input in int8 @ weight.T in three values."""

    multiple = 16

    def __init__(self, *, wanted_by: str) -> None:
        self.bitnet = _torchao.load(f"{_PACKAGE}.bitnet", wanted_by=wanted_by)
        self.formats = {"input": NumberFormat(torch.int8, "row")}  # the weight has three values, and no largest one

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return _BitNetProduct.apply(input, weight, self.bitnet)  # pyright: ignore[reportReturnType]

    def __repr__(self) -> str:
        return "bitnet"


class _BitNetProduct(torch.autograd.Function):
    """The product of torchao's BitNet, for a plain weight: torchao's own wants a tensor class of its own as the parameter."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bitnet: Any) -> Tensor:
        rows, row_scale = bitnet.quantize_int8_rowwise(input.reshape(-1, input.shape[-1]), eps=1e-5)
        scale = bitnet.get_bitnet_scale(weight)
        values = bitnet.quantize_bitnet_weight(weight, scale)
        scale = scale.to(input.dtype)
        ctx.save_for_backward(rows, row_scale, values, scale)
        output = bitnet.scaled_int8_mm(rows.contiguous(), values.contiguous().T, row_scale, scale)
        return output.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_scale, values, scale = ctx.saved_tensors
        grad = grads[0].reshape(-1, values.shape[0])
        # As if the weight's rounding were not there, and with the input as it was rounded.
        grad_input = (grad @ values.to(grad.dtype)) * scale if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ (rows * row_scale.view(-1, 1)) if ctx.needs_input_grad[1] else None
        if grad_input is not None:
            grad_input = grad_input.view(*grads[0].shape[:-1], values.shape[1])
        return grad_input, grad_weight, None


class Int8WeightsAO(_TorchaoLinears):
    """Linears whose weights are int8 at all times, each row with its scale; gradients and optimizer state are plain tensors.

    Works with torch's SGD, Adam and AdamW (not fused), under `single` and `ddp`. Updates are rounded by random numbers of
    their own, the same on all ranks and in each run. Saved as two plain tensors, `<name>.weight.int8` and `.scale`.
    """

    name = "int8-weights-ao"
    limits = (0.05, 0.08)

    def __init__(self, recipe: Int8WeightsRecipe | None = None, *, base: str | Precision = "bf16-mixed") -> None:
        self.recipe = recipe if recipe is not None else Int8WeightsRecipe()
        super().__init__(self.recipe, base)
        self._steps = 0

    def make_matmul(self, device: torch.device) -> Matmul:
        return Int8WeightMatmul(wanted_by=f"precision={self.name!r}")

    def convert(self, model: nn.Module) -> nn.Module:
        """Convert as every `LinearPrecision`, and the weights themselves.

        The parameters stay the same objects, so an optimizer that was built before keeps working.
        Raises:
            ConfigError: a weight that something else uses too.
        """
        model = super().convert(model)
        weight_class = _weight_class(f"precision={self.name!r}")
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(name)
        for name in self.reports[-1].converted:
            others = [n for n in owners[id(model.get_submodule(name).weight)] if n != name]
            if others:
                raise ConfigError(
                    f"precision={self.name!r}: the weight of {name} is also that of {others[0]}, which could not use it as int8. "
                    f"Leave it out: Int8WeightsRecipe(skip=({name!r},))."
                )
        for name in self.reports[-1].converted:
            module = model.get_submodule(name)
            assert isinstance(module, LowPrecisionLinear)
            new = nn.Parameter(weight_class.from_float(module.weight), requires_grad=module.weight.requires_grad)
            if name in self.reports[-1].errors:  # one of each shape
                product = functools.partial(module.product, weight=new.to(self._device))
                verify_stored(self.reports[-1], name, self.name, self.limits[0], module.weight.detach(), product, self._device)
            torch.utils.swap_tensors(module.weight, new)
            module.register_state_dict_post_hook(_to_plain)
        return model

    def step(self, optimizer: Optimizer) -> bool:
        """Step `optimizer`.

        Raises:
            ConfigError: an optimizer that does with its weights what int8 ones cannot.
        """
        self._steps += 1
        device = self._device
        try:
            # Ranks that drew for themselves would round their copies apart.
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                torch.manual_seed(self._steps)
                return super().step(optimizer)
        except NotImplementedError as error:
            raise ConfigError(
                f"{type(optimizer).__name__} does with its weights what int8 ones cannot ({str(error)[:120]}...). "
                "Use torch.optim.AdamW or SGD without fused=True."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were rounded."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the random numbers of a saved run."""
        self._steps = int(state.get("steps", 0))


class Int8WeightMatmul:
    """input @ (int8 weight * scale).T. A plain weight (before it is converted, for the check) is rounded first."""

    multiple = 16

    def __init__(self, *, wanted_by: str) -> None:
        self.weight_class = _weight_class(wanted_by)
        self.formats = {"weight": NumberFormat(torch.int8, "row")}

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return _Int8WeightProduct.apply(input, weight, self.weight_class)  # pyright: ignore[reportReturnType]

    def __repr__(self) -> str:
        return "int8 weight"


class _Int8WeightProduct(torch.autograd.Function):
    """torchao's own takes scales in the input's dtype only; ours are fp32, and so is what the optimizer sees."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Any, weight_class: Any) -> Tensor:
        held = weight if isinstance(weight, weight_class) else weight_class.from_float(weight)
        values, scale = held.int_data, held.scale.to(input.dtype)
        ctx.save_for_backward(input, values, scale)
        return (input @ values.to(input.dtype).T) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, values, scale = ctx.saved_tensors
        (grad,) = grads
        grad_input = (grad * scale) @ values.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, -2).T @ input.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight, None


def _to_plain(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """In a state dict, put the two plain tensors in the place of the weight: what is copied into them is the weight."""
    weight: Any = state.pop(f"{prefix}weight")
    held: Any = module.weight
    del weight
    state[f"{prefix}weight.int8"], state[f"{prefix}weight.scale"] = held.int_data, held.scale


def _weight_class(wanted_by: str) -> Any:
    """Return torchao's tensor class, with what AdamW's weight decay needs added: multiplying a weight multiplies its scales."""
    cls: Any = _torchao.load(f"{_PACKAGE}.int8", wanted_by=wanted_by).Int8QuantizedTrainingLinearWeight
    aten = torch.ops.aten
    if aten.mul_.Tensor not in cls._ATEN_OP_TABLE[cls]:

        @cls.implements([aten.mul_.Tensor, aten.mul_.Scalar])
        def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            args[0].scale.mul_(args[1])
            return args[0]

    return cls
