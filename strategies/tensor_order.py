"""Order: a parameter whose rows lie in another order than in the model, so that one contiguous part of them is what a rank needs.

    c_attn, whole       [ queries | keys | values ]
    held, 2 ranks       [ q of rank 0 | k of rank 0 | v of rank 0 | q of rank 1 | k of rank 1 | v of rank 1 ]
A matrix of several sections (queries, keys and values; gate and up) is cut over tp section by section, while a DTensor is cut
into contiguous parts: so its rows are put in order before. Checkpoints and exports keep the model's own order: what a rank holds
is written as several boxes (`pieces`), read from several (`read_like`), and put back into order where it is gathered (`whole`).
The optimizer's state of such a parameter lies as the parameter does. `p.full_tensor()` of torch knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import dtensors
from .checkpoint.layout import Shard

__all__ = ["Order", "order_of", "orders_of", "set_order", "state_order", "whole"]

_ATTRIBUTE = "_drivetrain_order"


@dataclass(frozen=True)
class Order:
    """How dimension `dim` is held: `runs` of (first row in the model, number of rows), one after the other."""

    dim: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of_sections(cls, dim: int, sizes: Sequence[int], ranks: int) -> Order:
        """Each rank's part of each section, rank by rank; `ranks` divides every size."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        runs = [
            (start + rank * (n // ranks), n // ranks) for rank in range(ranks) for start, n in zip(starts, sizes, strict=True)
        ]
        return cls(dim, tuple(runs))

    def apply(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor in this order: a copy."""
        return torch.cat([tensor.narrow(self.dim, start, length) for start, length in self.runs], self.dim)

    def undo(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor that is in this order as the model has it: a copy."""
        places: list[tuple[int, int, int]] = []
        at = 0
        for start, length in self.runs:
            places.append((start, at, length))
            at += length
        return torch.cat([tensor.narrow(self.dim, at, length) for _, at, length in sorted(places)], self.dim)

    def parts(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return (place in `length` held rows from `offset` on, place in the model, rows) of what these rows are."""
        found: list[tuple[int, int, int]] = []
        at = 0
        for start, rows in self.runs:
            low, high = max(at, offset), min(at + rows, offset + length)
            if low < high:
                found.append((low - offset, start + low - at, high - low))
            at += rows
        return found

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of `shape` has the dimension that is in this order."""
        return self.dim < len(shape) and shape[self.dim] == sum(length for _, length in self.runs)

    def pieces(self, held: Any) -> Any:
        """Return what a checkpoint takes for `held`, what `dtensors.piece` returned: one box for each part of it."""
        if isinstance(held, Tensor):
            return self.undo(held) if self.fits(held.shape) else held
        if not self.fits(held.shape) or not held.tensor.shape[self.dim]:
            return held
        parts = self.parts(held.offset[self.dim], held.tensor.shape[self.dim])
        return tuple(
            Shard(held.tensor.narrow(self.dim, at, rows).contiguous(), _with(held.offset, self.dim, start), held.shape)
            for at, start, rows in parts
        )

    def read(self, shape: Sequence[int], read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a `read` for `dtensors.read_like` by which a box of held rows is read from where the model has them."""
        if not self.fits(shape):
            return read

        def ordered(offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
            if offset is None or shape is None:
                return self.apply(read())
            found = [
                read(offset=_with(offset, self.dim, start), shape=_with(shape, self.dim, rows))
                for _, start, rows in (self.parts(offset[self.dim], shape[self.dim]) if math.prod(shape) else ())
            ]
            return torch.cat(found, self.dim) if found else read(offset=offset, shape=shape)

        return ordered


def _with(numbers: Sequence[int], at: int, value: int) -> tuple[int, ...]:
    return (*numbers[:at], value, *numbers[at + 1 :])


def set_order(parameter: nn.Parameter, order: Order) -> None:
    """Say that a parameter is held in `order`; asked for after it was cut up, since cutting makes another parameter of it."""
    setattr(parameter, _ATTRIBUTE, order)


def order_of(parameter: Tensor) -> Order | None:
    """The order of a parameter, if it has one. What is derived from it (detached, a gradient) does not say."""
    return getattr(parameter, _ATTRIBUTE, None)


def orders_of(models: Mapping[str, nn.Module]) -> dict[str, Order]:
    """Return `<model>/<parameter>` -> its order, of the parameters that have one."""
    return {
        f"{name}/{key}": order
        for name, model in models.items()
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if (order := order_of(parameter)) is not None
    }


def state_order(orders: Mapping[str, Order], name: str) -> Order | None:
    """The order of a tensor by its name in the state (named_state.py): of a parameter, or of an optimizer's state for it."""
    if not orders:
        return None
    if name.startswith("model/"):
        return orders.get(name.removeprefix("model/"))
    return orders.get(name.split("/", 2)[-1].rpartition("/")[0])


def whole(parameter: Tensor) -> Tensor:
    """Return all of a parameter, as the model has it. Collective for one that is cut up."""
    held = parameter.detach()
    if not isinstance(held, DTensor):
        return held
    order = order_of(parameter)
    found = held.full_tensor()
    return found if order is None else order.undo(found)


def read_like(parameter: Tensor, order: Order | None, shape: Sequence[int], read: Callable[..., Tensor]) -> Tensor:
    """`dtensors.read_like`, in the parameter's order."""
    return dtensors.read_like(parameter, shape, read if order is None else order.read(shape, read))
