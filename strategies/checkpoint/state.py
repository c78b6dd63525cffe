"""Trees of tensors and plain values, taken apart for a checkpoint and put together again.

    split({"lr": 0.1, "betas": (0.9, 0.99), 3: tensor}, "opt") -> ({"opt/3": tensor},
        {"$dict": [["lr", 0.1], ["betas", {"$tuple": [0.9, 0.99]}], [3, {"$tensor": "opt/3"}]]})
    join(values, tensors)                                      -> the tree

What may stand in a tree: tensors, None, bool, int, float (NaN and Inf too), str, list, tuple, dict with str or int keys,
OrderedDict, Counter, deque, numpy numbers and arrays. It comes back as the same type; nothing else is accepted, since what
would bring it back is code. An object with the key "$..." is how strict JSON holds what JSON lacks:
    $tensor name   $array name (numpy)   $number name (numpy scalar)   $float "nan" | "inf" | "-inf"
    $tuple [items]   $dict [[key, value], ...]   $OrderedDict, $Counter: as $dict   $deque [maxlen, [items]]
"""

from __future__ import annotations

import math
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .values import join
from .writer import saveable

__all__ = ["check_tree", "join", "split"]

_MAX_DEPTH = 100
_MAPPINGS: Mapping[type, str] = {OrderedDict: "$OrderedDict", Counter: "$Counter"}
_ALLOWED = "tensors, None, bool, int, float, str, lists, tuples, and dicts with str or int keys"


def split(value: Any, key: str, *, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Take a tree apart: return (tensors by name, what is left as strict JSON).

    Args:
        key: what the tree is called, in errors and in the names of its tensors, such as "callback/EMA".
        prefix: stands before the names of the tensors, not in errors.
    Raises:
        ConfigError: something else than tensors and plain values is in it; the message has its place: EMA.state['fn'].
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _split(value, key, prefix + key, tensors, 0)


check_tree = split


def _split(value: Any, place: str, name: str, tensors: dict[str, Tensor], depth: int) -> Any:
    kind = type(value)
    if value is None or kind is str or kind is bool or kind is int:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{place}: nested deeper than {_MAX_DEPTH} levels. Does it contain itself?")
    if isinstance(value, Tensor):
        return {"$tensor": _add(value, place, name, tensors)}
    if kind is list or kind is tuple or kind is deque:
        items = [_split(v, f"{place}[{i}]", f"{name}/{i}", tensors, depth + 1) for i, v in enumerate(value)]
        return items if kind is list else {"$tuple": items} if kind is tuple else {"$deque": [value.maxlen, items]}
    if isinstance(value, dict):
        return _split_dict(value, place, name, tensors, depth)
    if kind is torch.Size:
        return {"$tuple": list(value)}
    if kind.__module__ == "numpy" and "numpy" in sys.modules:
        return _split_numpy(value, place, name, tensors)
    raise ConfigError(
        f"{place}: {_describe(value)}. A checkpoint holds {_ALLOWED}, nothing that needs code to come back. "
        "Leave it out of the state, or store the numbers that it can be made from."
    )


def _split_dict(value: dict[Any, Any], place: str, name: str, tensors: dict[str, Tensor], depth: int) -> Any:
    for k in value:
        if type(k) is not str and type(k) is not int:
            raise ConfigError(f"{place}: the key {k!r} is {_describe(k)}. Keys of saved dicts are str or int.")
    items = [
        (k, _split(v, f"{place}[{k!r}]" if depth else f"{place}.{k}", f"{name}/{k}", tensors, depth + 1))
        for k, v in value.items()
    ]
    tag = _MAPPINGS.get(type(value))
    # Plain JSON where it says the same. An object whose first key starts with $ would read as one of ours.
    if tag is None and all(type(k) is str and not k.startswith("$") for k in value):
        return dict(items)
    return {tag or "$dict": [list(item) for item in items]}


def _split_numpy(value: Any, place: str, name: str, tensors: dict[str, Tensor]) -> Any:
    import numpy as np

    try:
        tensor = torch.from_numpy(np.array(value, order="C"))  # a copy: read-only arrays are welcome too
    except (TypeError, ValueError):
        raise ConfigError(
            f"{place}: {_describe(value)} of {getattr(value, 'dtype', '?')} cannot be saved: numbers only."
        ) from None
    tag = "$array" if isinstance(value, np.ndarray) else "$number"
    return {tag: _add(tensor, place, name, tensors)}


def _add(tensor: Tensor, place: str, name: str, tensors: dict[str, Tensor]) -> str:
    reason = saveable(tensor)
    if reason:
        raise ConfigError(f"{place}: a tensor that is {reason}.")
    unique, n = name, 1
    while unique in tensors:  # the keys 3 and "3" of one dict
        n += 1
        unique = f"{name}~{n}"
    tensors[unique] = tensor
    return unique


def _describe(value: Any) -> str:
    kind = type(value)
    known = {"function": "function", "builtin_function_or_method": "function", "module": "module", "type": "class"}
    return known.get(kind.__name__, f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__name__)
