"""Frozen weights of 8 or 4 bits by bitsandbytes: a big model to be evaluated, or to train adapters beside.

    int8-bnb    int8 with one scale a row, and int8 activations (LLM.int8)        a quarter of fp32's memory
    nf4-bnb     4 bits: the quantiles of a normal distribution, a scale for every 64 numbers        an eighth
    fp4-bnb     4-bit floats, likewise

The Linears that are converted are frozen: their weights have no gradient, and an optimizer that was given them leaves them be.
What else the model has (norms, embeddings, adapters that were added before it is prepared) trains as before, in bf16 under
autocast. Saved as plain tensors, `<name>.weight` (packed) and `<name>.weight_absmax`: load pretrained weights before the model is
prepared. Works on a CPU too (bitsandbytes 0.50). Not with strategies that cut models up.
Source: bitsandbytes; Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8); 2023, arXiv:2305.14314 (QLoRA).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnknownName, suggest
from .base import Precision
from .formats import NumberFormat
from .linears import Choice, LinearPrecision, LowPrecisionLinear, Matmul, verify_stored

__all__ = ["BnB", "BnBRecipe", "FrozenLinear", "fp4", "int8", "nf4"]

_FORMATS = ("int8", "nf4", "fp4")
_NEEDED = "pip install bitsandbytes"


@dataclass(frozen=True)
class BnBRecipe(Choice):
    """The knobs of `BnB`.

    Args:
        format: "int8", "nf4" or "fp4".
        block_size: how many numbers share a scale, for the 4-bit formats.
        threshold: int8: activations above it are multiplied in 16 bits, as they are (6.0 in the paper). 0: none.
        skip, skip_first_and_last, min_features, filter: which Linears; see `linears.Choice`. Adapters are left alone by name:
            skip=("*.lora_*",).
    """

    format: str = "nf4"
    block_size: int = 64
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in _FORMATS:
            raise UnknownName(
                f"format={self.format!r} is not known.{suggest(self.format, _FORMATS)} Known: {', '.join(_FORMATS)}."
            )


class FrozenLinear(LowPrecisionLinear):
    """A Linear whose weight is packed. Made by `BnB.convert`, never by its constructor."""

    weight_absmax: Tensor

    def product(self, input: Tensor, weight: Tensor) -> Tensor:
        matmul: Any = self.matmul
        return matmul.packed(input, self.weight, self.weight_absmax, (self.out_features, self.in_features))


class BnB(LinearPrecision):
    """Frozen Linears of few bits by bitsandbytes.

    Args:
        recipe: a `BnBRecipe`, or the name of its format.
        base: the precision of everything else: "bf16-mixed", "bf16-true" or "fp32".
    """

    def __init__(self, recipe: BnBRecipe | str = "nf4", *, base: str | Precision = "bf16-mixed") -> None:
        self.recipe = BnBRecipe(format=recipe) if isinstance(recipe, str) else recipe
        self.name = f"{self.recipe.format}-bnb"
        self.limits = (0.03, 0.03) if self.recipe.format == "int8" else (0.2, 0.2)
        super().__init__(self.recipe, base)

    def device_reason(self, device: torch.device) -> str | None:
        """CPU and CUDA, where bitsandbytes is installed."""
        if importlib.util.find_spec("bitsandbytes") is None:
            return f"precision={self.name!r} needs bitsandbytes, which is not installed: {_NEEDED}."
        if device.type not in ("cpu", "cuda"):
            return f"precision={self.name!r} was asked for on {device.type}; it was written for CPU and CUDA. Use 'bf16-true'."
        return None

    def make_matmul(self, device: torch.device) -> Matmul:
        return BnBMatmul(self.recipe)

    def convert(self, model: nn.Module) -> nn.Module:
        """Convert and freeze. The parameters stay the same objects.

        Raises:
            ConfigError: a weight that something else uses too.
        """
        model = super().convert(model)
        uses: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                uses.setdefault(id(parameter), []).append(name)
        converted = self.reports[-1].converted
        for name in converted:
            others = [n for n in uses[id(model.get_submodule(name).weight)] if n != name]
            if others:
                raise ConfigError(
                    f"precision={self.name!r}: the weight of {name} is also that of {others[0]}, which could not use it packed. "
                    f"Leave it out: BnBRecipe(skip=({name!r},))."
                )
        for name in converted:
            module: Any = model.get_submodule(name)
            weight = module.weight
            device = weight.device
            packed, absmax = module.matmul.quantize(weight.detach().to(self._device))
            if name in self.reports[-1].errors:  # one of each shape
                product = functools.partial(
                    module.matmul.packed, weight=packed, absmax=absmax, shape=(module.out_features, module.in_features)
                )
                verify_stored(self.reports[-1], name, self.name, self.limits[0], weight.detach(), product, self._device)
            weight.requires_grad_(False)
            weight.grad = None
            weight.data = packed.to(device)
            module.register_buffer("weight_absmax", absmax.to(device))
            if module.bias is not None:
                module.bias.requires_grad_(False)
            module.__class__ = FrozenLinear
        return model

    def sharded(self, model: nn.Module) -> None:
        """Refuse: a packed weight has no rows to cut."""
        raise ConfigError(
            f"precision={self.name!r} packs weights, which fsdp cannot cut into rows. Use strategy='ddp' or 'single', or "
            "precision='bf16-true' with fsdp."
        )

    def explain(self) -> str:
        return f"{super().explain()}; those are frozen"


class BnBMatmul:
    """input @ weight.T with a weight of few bits."""

    multiple = 16

    def __init__(self, recipe: BnBRecipe) -> None:
        self.recipe = recipe
        self.bnb: Any = _load()
        self.formats = {"weight": NumberFormat(torch.int8, "row")} if recipe.format == "int8" else {}

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        """With a weight that is not packed yet: what the check multiplies."""
        return _Check.apply(input, weight, self)  # pyright: ignore[reportReturnType]

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (packed weight, scales): int8 (out, in) and (out,); or bytes (out * in / 2, 1) and one scale a block."""
        functional = self.bnb.functional
        if self.recipe.format == "int8":
            packed, absmax, _ = functional.int8_vectorwise_quant(weight.float())
            return packed, absmax
        packed, state = functional.quantize_4bit(
            weight.float().contiguous(), blocksize=self.recipe.block_size, quant_type=self.recipe.format
        )
        return packed, state.absmax

    def dequantize(self, packed: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the weight (out, in) in fp32."""
        functional = self.bnb.functional
        if self.recipe.format == "int8":
            return functional.int8_vectorwise_dequant(packed, absmax)
        return functional.dequantize_4bit(packed, self._state(absmax, shape, torch.float32))

    def packed(self, input: Tensor, weight: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
        """input (..., in) -> (..., out), by bitsandbytes' own products; differentiable in the input."""
        if self.recipe.format == "int8":
            state = self.bnb.MatmulLtState()
            state.CB, state.SCB, state.has_fp16_weights, state.threshold = weight, absmax, False, self.recipe.threshold
            return self.bnb.matmul(input, weight, state=state).to(input.dtype)
        return self.bnb.matmul_4bit(input, weight.t(), quant_state=self._state(absmax, shape, input.dtype))

    def _state(self, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        functional, form = self.bnb.functional, self.recipe.format
        code = functional.get_4bit_type(form, device=absmax.device)
        return functional.QuantState(
            absmax=absmax, shape=torch.Size(shape), code=code, blocksize=self.recipe.block_size, quant_type=form, dtype=dtype
        )

    def __repr__(self) -> str:
        return f"{self.recipe.format}, frozen"


class _Check(torch.autograd.Function):
    """The product with a weight that is rounded to the format; its gradient is that of a plain product."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, matmul: BnBMatmul) -> Tensor:
        rounded = matmul.dequantize(*matmul.quantize(weight), (weight.shape[0], weight.shape[1])).to(input.dtype)
        ctx.save_for_backward(input, rounded)
        return input @ rounded.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, rounded = ctx.saved_tensors
        (grad,) = grads
        return grad @ rounded, grad.flatten(0, -2).T @ input.flatten(0, -2), None


def int8() -> BnB:
    """int8-bnb."""
    return BnB("int8")


def nf4() -> BnB:
    """nf4-bnb."""
    return BnB("nf4")


def fp4() -> BnB:
    """fp4-bnb."""
    return BnB("fp4")


def _load() -> Any:
    """Import bitsandbytes. It logs which of its kernels it did not find, which says nothing about the run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logging.disable(before)
