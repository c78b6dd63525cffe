"""Stand-ins for parameters whose values are elsewhere: shape, type and device are there, the values are not.

    >>> weight = away_like("layers.0.weight", torch.empty(2, 3, device="meta"), torch.device("cpu"))
    >>> weight.shape, weight.device.type
    (torch.Size([2, 3]), 'cpu')
    >>> weight + 1
    Traceback (most recent call last):
    drivetrain.strategies.errors.ConfigError: layers.0.weight is not in memory: it is there only while ...

They name the device on which the module computes, not the meta device, so that code that asks `parameter.device` (transformers'
generate, PEFT's adapters) is told where its tensors belong. Whoever computes with one is told its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["Away", "away_like", "is_away"]

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default}
_NEW = {_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.rand_like.default}
_NEW |= {_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default}


class Away(Tensor):
    """A tensor without values. Make it with `away_like`."""

    _name: str

    @staticmethod
    def __new__(cls, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Away:
        self = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        self._name = name
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Away({self._name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Away:
        raise _error(self._name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _error(self._name)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, Away):
            if func in _SAME:
                return Away(first._name, first.shape, first.dtype, first.device)
            if func in _NEW:
                empty = torch.empty(first.shape, dtype=first.dtype, device="meta")
                options = {"device": first.device, **(kwargs or {})}
                return func(empty, *args[1:], **options)
            if func is _aten._to_copy.default and (kwargs or {}).get("device") == torch.device("meta"):
                return torch.empty(first.shape, dtype=(kwargs or {}).get("dtype") or first.dtype, device="meta")
            raise _error(first._name)
        raise _error(next((a._name for a in _flat([*args, *(kwargs or {}).values()]) if isinstance(a, Away)), "a parameter"))


def _flat(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found.extend(_flat(value) if isinstance(value, list | tuple) else [value])
    return found


def _error(name: str) -> ConfigError:
    return ConfigError(
        f"{name} is not in memory: it is there only while its module's forward runs. Read it by weights_of(model).tensor(name), "
        "or keep it resident: give its module a device in device_map, such as 'cpu'."
    )


def away_like(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return a stand-in for the parameter `tensor`, with its `requires_grad`, that computes on `device`."""
    stand_in = Away(name, tensor.shape, dtype or tensor.dtype, device)
    return nn.Parameter(stand_in, requires_grad=tensor.requires_grad)


def is_away(tensor: Tensor) -> bool:
    """Whether `tensor` is a stand-in."""
    return isinstance(tensor, Away)
