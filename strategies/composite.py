"""Weights that are made of other tensors: a quantised one is int8 or int4 values, their scales, and a class that joins them.

    parts_of("w", weight)                  {"w.qdata": int8, "w.scale": float32}: what lies in files and passes through buffers
    Composite.of("w", weight).build(get)   the weight again, around parts from wherever `get` has them

By PyTorch's own protocol for such classes (__tensor_flatten__ and __tensor_unflatten__), which those of torchao keep. A class
without it (bitsandbytes' Params4bit, which has its scales as an attribute) cannot be taken apart, and is refused
where it would have to be (offload/checks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Composite", "is_composite", "num_bytes", "parts_of", "parts_of_all"]


def is_composite(tensor: Tensor) -> bool:
    """Whether `tensor` is made of others and can be taken apart. One that is cut up over ranks (DTensor) is not meant."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh")


def parts_of(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that `tensor` is made of, by name; of one that is not made of others itself."""
    if not is_composite(tensor):
        return {name: tensor}
    found: dict[str, Tensor] = {}
    composed: Any = tensor
    for attribute in composed.__tensor_flatten__()[0]:
        found |= parts_of(f"{name}.{attribute}", getattr(tensor, attribute))
    return found


def parts_of_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain tensors that `tensors` are made of."""
    return {n: part for name, tensor in tensors.items() for n, part in parts_of(name, tensor).items()}


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, which of a composite are those of its parts."""
    return sum(t.numel() * t.element_size() for t in parts_of("", tensor).values())


@dataclass(frozen=True)
class Composite:
    """How a weight is put together."""

    kind: Any
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    parts: Mapping[str, str | Composite]
    """attribute -> the part's name"""

    @staticmethod
    def of(name: str, tensor: Tensor, stored: Mapping[str, str] | None = None) -> Composite:
        """Take note of how `tensor` is made.

        Args:
            stored: the name of a part -> the name under which `build` asks for it.
        """
        composed: Any = tensor
        attributes, context = composed.__tensor_flatten__()
        parts: dict[str, str | Composite] = {}
        for attribute in attributes:
            inner, part = getattr(tensor, attribute), f"{name}.{attribute}"
            parts[attribute] = Composite.of(part, inner, stored) if is_composite(inner) else (stored or {}).get(part, part)
        return Composite(type(tensor), context, tensor.size(), tensor.stride(), parts)

    def build(self, get: Callable[[str], Tensor]) -> Tensor:
        """Return the tensor around the parts that `get` returns; they are not copied."""
        inner = {a: part.build(get) if isinstance(part, Composite) else get(part) for a, part in self.parts.items()}
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)

    def names(self) -> list[str]:
        """Return the names that `build` asks for."""
        return [n for part in self.parts.values() for n in (part.names() if isinstance(part, Composite) else [part])]
