"""Batches on their way to a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

__all__ = ["to_device"]


@runtime_checkable
class Movable(Protocol):
    """Tensors, and what other libraries put them in (HF's BatchEncoding, PyG's Data, packed sequences)."""

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


def to_device(device: torch.device, *, non_blocking: bool) -> Callable[[Any], Any]:
    """Return a function that moves everything in a nested batch to `device`: dicts, lists, tuples, dataclasses as they are."""
    from lightning_utilities.core.apply_func import apply_to_collection

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=non_blocking)
        return value.to(device)

    def transfer(batch: Any) -> Any:
        return apply_to_collection(batch, Movable, move)

    return transfer
