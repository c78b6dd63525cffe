"""The running value of one logged name, and how many of them become one vector.

`Metrics` (metrics.py) holds an `Entry` for each name, with a `Part` for the current step's window and one for the epoch.
`pack` writes the parts of many names into one float64 vector, such that adding up the vectors of all ranks loses nothing:
    mean, sum   [sum, weight]                              sums add up
    max, min    [count, W slots, W slots]                  each rank fills its own slot of W (of a number, of a tensor), the
                                                           others are 0, and 0 + x is exactly x: the sum gathers them
    an object   [how often logged, how many ranks have it]
`results` reads the sum of the vectors. So one all-reduce does for every reduction at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..strategies.errors import ConfigError, DataError

__all__ = ["Entry", "Part", "add", "as_number", "fold_on_host", "one_element", "pack", "read", "results", "to_vector"]

REDUCTIONS = ("mean", "sum", "max", "min")
EMPTY = {"max": -math.inf, "min": math.inf}
"""The extremes of nothing."""


class Part:
    """A running value.

    mean, sum   the sum so far is `number + scale * tensor`, the sum of the weights `weight`, `+ weight_tensor` if `weighted`
    max, min    the extreme so far is that of `number` and `tensor`; `weight` counts the values
    The tensors are 0-d float64 on the device of the values that were logged. With scale 0 `tensor` holds nothing.
    """

    __slots__ = ("empty", "number", "scale", "tensor", "weight", "weight_tensor", "weighted", "window")

    def __init__(self, reduce: str) -> None:
        self.empty = EMPTY.get(reduce, 0.0)
        self.tensor = self.weight_tensor = torch.empty(0)  # until the first tensor comes: `Entry.place`
        self.clear()

    def clear(self) -> None:
        self.scale: float = 0
        self.number = self.empty
        self.weight: float = 0
        self.weighted = False  # `weight_tensor` holds something
        self.window: int | None = None  # the optimizer step that this belongs to


class Entry:
    """One logged name: its options (on_step, on_epoch, prog_bar, reduce, sync), and its running values."""

    __slots__ = (
        "epoch",
        "extreme",
        "kind",
        "name",
        "object",
        "on_epoch",
        "on_step",
        "options",
        "placed",
        "reduce",
        "step",
        "sync",
        "unit",
    )

    def __init__(self, name: str, options: tuple[Any, ...]) -> None:
        self.name = name
        self.options = options
        self.on_step, self.on_epoch, _, self.reduce, self.sync = options
        self.unit = 0 if self.reduce == "mean" else 1  # the weight of each value where there are no weights
        self.extreme: Callable[..., Tensor] | None = {"max": torch.maximum, "min": torch.minimum}.get(self.reduce)
        self.placed = False  # the accumulators for tensors exist: `Metrics.log` adds to them directly
        self.kind = ""  # "value" or "object", as the first value says
        self.object: Any = None  # the object with compute/update/reset that is logged under this name
        self.step = Part(self.reduce)
        self.epoch = Part(self.reduce)

    def reported(self, *, step: bool) -> str:
        """The name in the results: with an ending when both the step's and the epoch's value are reported."""
        if self.on_step and self.on_epoch:
            return f"{self.name}_step" if step else f"{self.name}_epoch"
        return self.name

    def set_kind(self, kind: str) -> None:
        if self.kind and self.kind != kind:
            article = {"value": "a number or tensor", "object": "an object with compute/update/reset"}
            raise ConfigError(
                f"log({self.name!r}) got {article[kind]}, and {article[self.kind]} before (on this or another rank). "
                "One name reports one thing: give one of them another name."
            )
        self.kind = kind

    def place(self, device: torch.device) -> None:
        """Make the accumulators, or move them to the device of the value that came now."""
        # Outside of inference mode, so that a name may be logged inside it first, and outside it later.
        with torch.inference_mode(False):
            for part in (self.step, self.epoch):
                if part.tensor.dim() or part.tensor.device != device:
                    zero = torch.zeros((), dtype=wide(device), device=device)
                    part.tensor = part.tensor.to(zero) if part.scale else zero
                    part.weight_tensor = part.weight_tensor.to(zero) if part.weighted else zero.clone()
        self.placed = self.kind == "value"


def add(entry: Entry, part: Part, value: Any, weight: Any) -> None:
    """Add one checked value to one part: a number, or a 0-d tensor on the part's device.

    Args:
        weight: a number, or a 0-d tensor if the value is already multiplied by it (see `weighted`).
    """
    if weight.__class__ is Tensor:
        if part.weighted:
            part.weight_tensor.add_(weight)
        else:
            part.weight_tensor.copy_(weight)
            part.weighted = True
        weight = 1.0
    else:
        weight = entry.unit or weight
        part.weight += weight
    if value.__class__ is not Tensor:
        part.number = part.number + value * weight if entry.extreme is None else joined(entry.reduce, (part.number, value))
    elif not part.scale:
        part.tensor.copy_(value)
        part.scale = weight
    elif entry.extreme is None:
        part.tensor.add_(value, alpha=weight / part.scale)
    else:
        entry.extreme(part.tensor, value, out=part.tensor)


def weighted(entry: Entry, value: Tensor | float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return value * weight, and the weight, in float64 on the device of the accumulators."""
    if isinstance(value, Tensor) and weight.device != value.device:
        # Towards the accelerator, without waiting for it; the other way would have to.
        if weight.device.type == "cpu":
            weight = weight.to(value.device, non_blocking=True)
        else:
            value = value.to(weight.device, non_blocking=True)
    weight = weight.to(wide(weight.device))
    if not (entry.placed and entry.epoch.tensor.device == weight.device):
        entry.place(weight.device)
    # A micro-batch without a token has the weight 0 and often NaN for its mean, which must not reach the sum.
    return torch.where(weight > 0, value * weight, 0.0), weight


def wide(device: torch.device) -> torch.dtype:
    """The dtype in which sums are kept on a device: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# -- many parts as one vector ---------------------------------------------------------------------------------------------
Held = tuple[int, float, Tensor]
"""index in the vector, factor, 0-d tensor: what has to be added to the vector and is on a device."""


def pack(entries: Sequence[Entry], *, step: bool, rank: int, size: int) -> tuple[list[float], list[Held]]:
    """Write the parts one after the other: the numbers as a list, and what is on a device beside it."""
    host: list[float] = []
    held: list[Held] = []
    for entry in entries:
        part = entry.step if step else entry.epoch
        at = len(host)
        if entry.kind == "object" and not step:
            host += [part.weight, float(entry.object is not None)]
        elif entry.reduce in EMPTY:
            slots = [0.0] * (2 * size)
            slots[rank] = part.number
            slots[size + rank] = 0.0 if part.scale else part.empty
            host += [part.weight, *slots]
            if part.scale:
                held.append((at + 1 + size + rank, 1.0, part.tensor))
        else:
            host += [part.number, part.weight]
            if part.scale:
                held.append((at, part.scale, part.tensor))
            if part.weighted:
                held.append((at + 1, 1.0, part.weight_tensor))
    return host, held


def results(entries: Sequence[Entry], values: Sequence[float], *, step: bool, size: int) -> dict[Entry, float]:
    """Read a summed vector: the value of each name that was logged on some rank; for an object how many ranks have it."""
    found: dict[Entry, float] = {}
    at = 0
    for entry in entries:
        if entry.kind == "object" and not step:
            count, holders = values[at : at + 2]
            at += 2
            if count:
                found[entry] = holders
        elif entry.reduce in EMPTY:
            count, *slots = values[at : at + 1 + 2 * size]
            at += 1 + 2 * size
            if count:
                found[entry] = joined(entry.reduce, slots)
        else:
            total, weight = values[at : at + 2]
            at += 2
            if weight:
                found[entry] = total if entry.reduce == "sum" else total / weight
    return found


def to_vector(host: list[float], held: list[Held], device: torch.device) -> Tensor:
    """The packed vector on `device`, without a host read."""
    vector = torch.tensor(host, dtype=wide(device), device=device)
    if held:
        index = torch.tensor([i for i, _, _ in held], device=device)
        factors = torch.tensor([factor for _, factor, _ in held], dtype=vector.dtype, device=device)
        tensors = torch.stack([tensor.to(device, vector.dtype) for _, _, tensor in held])
        vector.index_add_(0, index, tensors * factors)
    return vector


def fold_on_host(host: list[float], held: list[Held]) -> list[float]:
    """The packed vector of a single rank as a list: one copy to the host for each device."""
    for (index, factor, _), value in zip(held, read([tensor for _, _, tensor in held]), strict=True):
        host[index] += factor * value
    return host


def read(tensors: Sequence[Tensor]) -> list[float]:
    """Copy 0-d tensors to the host, with one copy for each device."""
    values = [0.0] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        for i, value in zip(places, torch.stack([tensors[i].to(wide(device)) for i in places]).tolist(), strict=True):
            values[i] = value
    return values


def joined(reduce: str, values: Iterable[float]) -> float:
    """Sum, maximum or minimum of numbers. NaN stays NaN, unlike with Python's own max."""
    numbers = list(values)
    if reduce not in EMPTY:
        return sum(numbers)
    if any(math.isnan(number) for number in numbers):
        return math.nan
    return max(numbers) if reduce == "max" else min(numbers)


# -- checks ---------------------------------------------------------------------------------------------------------------
def one_element(name: str, value: Tensor, what: str = "value") -> Tensor:
    """Return the tensor detached and 0-d, or raise DataError."""
    if hasattr(value, "full_tensor"):
        raise DataError(
            f"log({name!r}) got a DTensor as its {what}; it takes a plain tensor of one element. "
            "Log value.full_tensor(), or value.to_local() if it is replicated."
        )
    if value.ndim and value.numel() != 1:
        raise DataError(
            f"log({name!r}) got a tensor of shape {tuple(value.shape)} as its {what}; it takes a single number. "
            "Reduce it first, for instance value.mean(), or log each element under its own name."
        )
    if value.dtype.is_complex:
        raise DataError(f"log({name!r}) got a complex tensor as its {what}; it takes a real number. Log its abs() or its parts.")
    return value.detach() if value.ndim == 0 else value.detach().reshape(())


def as_number(name: str, value: Any, what: str = "value") -> float:
    """Return a number as a float (numpy's too), or raise DataError."""
    if not isinstance(value, str) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass  # an array of several numbers has __float__ as well
    shown = repr(value)
    raise DataError(
        f"log({name!r}) got {shown[:60]}{'...' if len(shown) > 60 else ''} ({type(value).__name__}) as its {what}; it takes "
        "a tensor of one element, a number, or an object with compute, update and reset (torchmetrics)."
        + (" A dict of values goes to log_dict." if isinstance(value, dict) else "")
    )
