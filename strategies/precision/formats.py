"""Number formats, and what becomes of a tensor's values in one: how large, how scaled, which vanish, which saturate.

    measure(x, NumberFormat(torch.float8_e4m3fn, "tensor"))    -> amax, scale, underflow, subnormal, overflow

Nothing is cast for the training here: it is the arithmetic of a cast, done once more, to be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["MEASURED", "NumberFormat", "measure"]

MEASURED = ("amax", "scale", "underflow", "subnormal", "overflow")
_EPS = 1e-12  # as torchao: the least amax, so that zeros have a scale


@dataclass(frozen=True)
class NumberFormat:
    """A format and how values are scaled into it.

    Args:
        dtype: float8, float16, bfloat16, float32 or int8.
        scaled: "no", "tensor", "row" (along the last dimension), or the size of a block along the last dimension.
        power_of_2: scales are rounded down to a power of two.
        by_exponent: the scale follows from the exponent of the largest value only, so that it may saturate (the MX standard's
            "floor").
    """

    dtype: torch.dtype
    scaled: str | int = "no"
    power_of_2: bool = False
    by_exponent: bool = False

    @property
    def largest(self) -> float:
        return 127.0 if self.dtype == torch.int8 else torch.finfo(self.dtype).max

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.scaled == "no" else f"{name}, scaled by {self.scaled if isinstance(self.scaled, str) else 'block'}"


def measure(tensor: Tensor, form: NumberFormat) -> Tensor:
    """Return five numbers (`MEASURED`) in a float64 tensor on the device of `tensor`; nothing is read from it.

        amax        the largest absolute value
        scale       what values are multiplied by; of several the smallest, which is that of the largest values
        underflow   share of all values that are not 0 and become 0
        subnormal   share that does not become 0 and is below the smallest normal number, with fewer digits
        overflow    share beyond the largest number, or not finite
    Raises:
        ConfigError: an empty tensor.
    """
    x = tensor.detach()
    if not x.numel():
        raise ConfigError("An empty tensor has no largest value. Measure layers that see a batch.")
    x = x.float() if x.dtype != torch.float64 else x
    rows = _groups(x, form)
    amax = rows.abs().amax(dim=1, keepdim=True)
    scale = _scale(amax.double(), form).to(x.dtype)
    y = rows * scale
    # The largest value times its own scale may come out a rounding above the largest number, which is no overflow.
    largest = form.largest * (1 if form.scaled == "no" else 1 + 1e-6)
    if form.dtype == torch.int8:
        q = y.round()
        over = ~(y.abs() <= largest)
        small = torch.zeros_like(over)
    else:
        info = torch.finfo(form.dtype)
        over = ~(y.abs() <= largest)
        q = y.clamp(-info.max, info.max).to(form.dtype).to(x.dtype)
        small = (q != 0) & (q.abs() < info.smallest_normal)
    count = x.numel()  # what fills up the last block is zeros, and none of these
    lost = (rows != 0) & (q == 0)
    shares = [part.sum().double() / count for part in (lost, small, over)]
    return torch.stack([amax.max().double(), scale.min().double(), *shares])


def _groups(x: Tensor, form: NumberFormat) -> Tensor:
    if form.scaled in ("no", "tensor"):
        return x.reshape(1, -1)
    last = x.shape[-1] if x.dim() else 1
    rows = x.reshape(-1, last)
    if form.scaled == "row":
        return rows
    assert isinstance(form.scaled, int)
    return torch.nn.functional.pad(rows, (0, -last % form.scaled)).reshape(-1, form.scaled)


def _scale(amax: Tensor, form: NumberFormat) -> Tensor:
    if form.scaled == "no":
        return torch.ones_like(amax)
    amax = amax.clamp(min=_EPS)
    if form.by_exponent:
        return torch.exp2(torch.tensor(form.largest).log2().floor() - amax.log2().floor())
    scale = form.largest / amax
    return torch.exp2(scale.log2().floor()) if form.power_of_2 else scale
