"""Who writes which piece of which tensor, and whether pieces cover their tensor.

A unit is a piece that some ranks hold alike: a full tensor that every rank of ddp has, one shard of fsdp, the same shard on
each replica of hsdp. Each unit is written once, by one of its holders, so that all ranks write about the same number of bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ConfigError
from .dtypes import DTYPE_NAMES
from .layout import Shard, count, num_bytes
from .writer import saveable


class Unit(NamedTuple):
    """A piece of a tensor: where it lies in the whole, in elements. Plain data: travels between ranks as JSON."""

    name: str
    dtype: str
    full: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)

    @classmethod
    def of(cls, fields: Sequence[Any]) -> Unit:
        name, dtype, full, offset, shape = fields
        return cls(name, dtype, tuple(full), tuple(offset), tuple(shape))


def units(tensors: Mapping[str, Tensor | Shard | tuple[Shard, ...]]) -> tuple[dict[Unit, Tensor], dict[str, str]]:
    """Return this rank's units, and the aliases: name -> the first name of the same memory.

    A tuple of shards is what a rank holds of one tensor in several boxes (ZeRO cuts a flat buffer, wherever that falls in a row).

    Raises:
        ConfigError: something that is no tensor, cannot be saved, or a shard that does not fit into its tensor.
    """
    held: dict[Unit, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in _pieces(tensors):
        shard = value if isinstance(value, Shard) else None
        tensor: Any = shard.tensor if shard else value
        if not isinstance(name, str) or not name or not isinstance(tensor, Tensor):
            raise ConfigError(f"Cannot save {name!r}: {type(tensor).__name__}. A checkpoint maps names to tensors or Shards.")
        reason = saveable(tensor)
        if reason:
            raise ConfigError(f"Cannot save the tensor {name!r}: it is {reason}.")
        shape = tuple(tensor.shape)
        offset = tuple(shard.offset) if shard else (0,) * len(shape)
        full = tuple(shard.shape) if shard else shape
        fits = len(offset) == len(full) == len(shape)
        if not fits or any(o < 0 or o + n > f for o, n, f in zip(offset, shape, full, strict=True)):
            raise ConfigError(f"The shard {name!r} of shape {shape} at {offset} does not lie in a tensor of shape {full}.")
        unit = Unit(name, DTYPE_NAMES[tensor.dtype], full, offset, shape)
        if tensor.numel():
            memory = (tensor.device, tensor.data_ptr(), tensor.stride(), tensor.is_conj(), tensor.is_neg(), *unit[1:])
            first = seen.setdefault(memory, name)
            if first != name:
                aliases[name] = first
                continue
        elif count(full):
            continue  # an empty shard of a tensor that is not empty: others have it
        held[unit] = tensor
    return held, aliases


def _pieces(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tensors.items():
        if isinstance(value, tuple):
            for shard in value:
                yield name, shard
        else:
            yield name, value


def digest(held: Iterable[Unit], aliases: Mapping[str, str]) -> str:
    """Return a name for what a rank holds: ranks with the same name hold the same units."""
    return hashlib.sha256(json.dumps([sorted(held), sorted(aliases.items())]).encode()).hexdigest()


def divide(holders: Mapping[Unit, Sequence[int]], world_size: int) -> dict[Unit, int]:
    """Give each unit to one of its holders: the biggest first, to the rank with the least so far. Same result on all ranks.

    Raises:
        ConfigError: ranks have tensors of one name and different types or full shapes.
    """
    kinds: dict[str, tuple[Any, ...]] = {}
    for unit in holders:
        kind = kinds.setdefault(unit.name, (unit.dtype, unit.full))
        if kind != (unit.dtype, unit.full):
            raise ConfigError(
                f"Ranks disagree about the tensor {unit.name!r}: {kind[0]} {kind[1]} and {unit.dtype} {unit.full}. "
                "All ranks must build the same model."
            )
    load = [0] * world_size
    writer: dict[Unit, int] = {}
    for unit in sorted(holders, key=lambda u: (-u.num_bytes, u)):
        rank = min(holders[unit], key=lambda r: (load[r], r))
        writer[unit] = rank
        load[rank] += unit.num_bytes
    return writer
