"""mxfp8-ao: Linears in MXFP8 by torchao: 8-bit floats (e4m3) with one power-of-two scale for every 32 of them.

Forward and backward products cast both sides anew; the weights stay in fp32, everything else runs in bf16 under autocast.
On a Blackwell GPU (compute capability 10.0) torchao's kernels multiply; anywhere else the format is emulated: the numbers are
rounded to it and multiplied in high precision, which shows the numerics and saves nothing.
Nothing is kept between steps. NVFP4 training has kernels only in torchao 0.18: see `NVFP4AO`.
Source: torchao.prototype.moe_training.mxfp8_linear (0.18); Open Compute Project, OCP Microscaling Formats (MX) 1.0, 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnknownName, suggest
from . import _torchao
from .base import Precision
from .formats import NumberFormat
from .linears import Choice, LinearPrecision, Matmul

__all__ = ["MXFP8AO", "NVFP4AO", "MXFP8Recipe"]

_ROUNDING = ("rceil", "floor", "ceil", "even")


@dataclass(frozen=True)
class MXFP8Recipe(Choice):
    """The knobs of `MXFP8AO`.

    Args:
        scale_rounding: how a block's scale becomes a power of two: "rceil" (NVIDIA's), "floor" (the standard's), "ceil", "even".
        weight_gradient: "mxfp8", or "high" for that product in high precision.
        emulate: None: only where the device has no MXFP8.
        skip, skip_first_and_last, min_features: which Linears; see `linears.Choice`.
    """

    scale_rounding: str = "rceil"
    weight_gradient: str = "mxfp8"
    emulate: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("scale_rounding", self.scale_rounding, _ROUNDING),
            ("weight_gradient", self.weight_gradient, ("mxfp8", "high")),
        ):
            if value not in known:
                raise UnknownName(f"{name}={value!r} is not known.{suggest(value, known)} Known: {', '.join(known)}.")


class MXFP8AO(LinearPrecision):
    """Linears in MXFP8 by torchao.

    Args:
        base: the precision of everything else: "bf16-mixed", "bf16-true" or "fp32".
    """

    name = "mxfp8-ao"
    limits = (0.08, 0.15)

    def __init__(self, recipe: MXFP8Recipe | None = None, *, base: str | Precision = "bf16-mixed") -> None:
        self.recipe = recipe if recipe is not None else MXFP8Recipe()
        super().__init__(self.recipe, base)

    def device_reason(self, device: torch.device) -> str | None:
        """Any device emulates it; without emulation (`emulate=False`) it is CUDA 10.0 or newer."""
        if reason := _torchao.missing(f"precision={self.name!r}"):
            return reason
        if self.recipe.emulate is False and not _has_mx(device):
            return (
                f"MXFP8AO was asked for without emulation on {device.type}; its kernels need CUDA compute capability 10.0 "
                "(Blackwell). Leave emulate out to see the numerics, or use precision='fp8-ao'."
            )
        return None

    def make_matmul(self, device: torch.device) -> Matmul:
        return MXFP8Matmul(self.recipe, self._emulates(device), wanted_by=f"precision={self.name!r}")

    def explain(self) -> str:
        return super().explain() + ("; emulated, no faster than bf16" if self._emulates(self._device) else "")

    def _emulates(self, device: torch.device) -> bool:
        return self.recipe.emulate if self.recipe.emulate is not None else not _has_mx(device)


class MXFP8Matmul:
    """input @ weight.T with both sides in MXFP8, and the products of the backward pass likewise."""

    multiple = 32  # the size of a block, along whichever side a product sums over

    def __init__(self, recipe: MXFP8Recipe, emulate: bool, *, wanted_by: str) -> None:
        linear = _torchao.load("prototype.moe_training.mxfp8_linear", wanted_by=wanted_by)
        common: Any = _torchao.load("quantization.quantize_.common.kernel_preference", wanted_by=wanted_by)
        self.function = linear._to_mxfp8_then_scaled_mm
        self.kernel = common.KernelPreference.EMULATED if emulate else common.KernelPreference.AUTO
        self.rounding = linear.ScaleCalculationMode(recipe.scale_rounding)
        self.high = recipe.weight_gradient == "high"
        # "ceil" and "even" differ from these two in which power of two they take now and then: they are shown as "rceil".
        by_exponent = recipe.scale_rounding == "floor"
        block = NumberFormat(torch.float8_e4m3fn, self.multiple, power_of_2=True, by_exponent=by_exponent)
        self.formats = {"input": block, "weight": block, "grad": block}

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return self.function(input, weight.to(input.dtype), self.kernel, self.rounding, self.high)

    def __repr__(self) -> str:
        return f"mxfp8 {self.rounding.value}, {self.kernel.value}"


class NVFP4AO(Precision):
    """nvfp4-ao: 4-bit floats, a scale for every 16. Refused: torchao 0.18 has it only for experts, in kernels for Blackwell."""

    name = "nvfp4-ao"

    def available(self, device: torch.device) -> str | None:
        """Never, so far: the reason, and what is nearest."""
        return (
            f"precision='nvfp4-ao' was asked for on {device.type}. torchao 0.18 has NVFP4 training only as Triton kernels for "
            "grouped products (mixture of experts) on compute capability 10.0, and none for Linears. "
            "Use precision='mxfp8-ao', or 'nvfp4-te' with TransformerEngine on a Blackwell GPU."
        )


def _has_mx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (10, 0)
