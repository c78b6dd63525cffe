"""Saved values, put together again (state.py takes them apart, and says how they look). Needs no torch."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def join(value: Any, tensors: Mapping[str, Tensor] | Callable[[str], Tensor]) -> Any:
    """Put together what `split` took apart; `tensors` maps names, or is called with each name.

    Raises:
        CheckpointError: not something that `split` makes.
    """
    read = tensors if callable(tensors) else tensors.__getitem__
    try:
        return _join(value, read)
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise CheckpointError(f"Saved values are not well formed: {type(error).__name__}: {error}.") from None


def _join(value: Any, read: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(v, read) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {k: _join(v, read) for k, v in value.items()}
    if len(value) != 1:
        raise ValueError(f"{tag} beside other keys")
    return _JOINERS[tag](value[tag], read)


def _pairs(items: Any, read: Callable[[str], Tensor]) -> list[tuple[Any, Any]]:
    return [(k, _join(v, read)) for k, v in items]


def _numpy(name: str, read: Callable[[str], Tensor]) -> Any:
    return read(name).numpy()


_JOINERS: Mapping[str, Callable[[Any, Callable[[str], Tensor]], Any]] = {
    "$tensor": lambda name, read: read(name),
    "$array": _numpy,
    "$number": lambda name, read: _numpy(name, read)[()],
    "$float": lambda text, _: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
    "$tuple": lambda items, read: tuple(_join(v, read) for v in items),
    "$dict": lambda items, read: dict(_pairs(items, read)),
    "$OrderedDict": lambda items, read: OrderedDict(_pairs(items, read)),
    "$Counter": lambda items, read: Counter(dict(_pairs(items, read))),
    "$deque": lambda parts, read: deque((_join(v, read) for v in parts[1]), maxlen=parts[0]),
}
