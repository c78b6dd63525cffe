"""One save on one rank: what it was given, which part of it this rank writes, and the table of all parts.

prepare (checks everything) -> plan (who writes what, the same on all ranks) -> write (this rank's files) -> index (rank 0).
`stage`, between plan and write, copies this rank's share, for a save that goes on beside the training.
Called by CheckpointStore.save, which brings the ranks to one outcome between the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .contents import VALUE_TENSORS
from .divide import Unit, digest, divide, units
from .layout import Shard, check_cover
from .state import split
from .writer import TensorFile, write_bytes, write_json

if TYPE_CHECKING:
    from .background import Staging

VALUES = "values.json"


class Job:
    """One save on one rank: what it holds, what of it this rank writes."""

    def __init__(self, step: int, rank: int, size: int) -> None:
        self.step, self.rank, self.size = step, rank, size
        self.held: dict[Unit, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.meta: dict[str, Any] = {}
        self._shard = f"shard-{rank:05d}-of-{size:05d}.safetensors"
        self._file: TensorFile | None = None
        self._staged: list[memoryview] = []  # the bytes of that file, where they were copied
        self._size = 0
        self._rank_units: dict[Unit, Tensor] = {}
        self._rank_aliases: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        self._rank_values: dict[str, Any] = {}

    def prepare(
        self,
        tensors: Mapping[str, Tensor | Shard | tuple[Shard, ...]],
        values: Mapping[str, Any],
        rank_values: Mapping[str, Any],
        rank_tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Check everything before anything is written; return what the other ranks must know."""
        if type(self.step) is not int or not 0 <= self.step < 10**18:
            raise ConfigError(f"A checkpoint's step is a whole number from 0 on, got {self.step!r}.")
        for name in (*tensors, *rank_tensors):
            if str(name).startswith(VALUE_TENSORS):
                raise ConfigError(f"The tensor {name!r} cannot be saved: names under {VALUE_TENSORS} are the store's own.")
        shared: dict[str, Tensor | Shard | tuple[Shard, ...]] = dict(tensors)
        own: dict[str, Tensor] = dict(rank_tensors)
        for source, target, found in ((values, self._values, shared), (rank_values, self._rank_values, own)):
            for name, value in source.items():
                inner, target[name] = split(value, name, prefix=VALUE_TENSORS)
                found.update(inner)
        in_meta, self.meta = split(dict(meta), "meta")
        if in_meta:
            raise ConfigError(f"meta holds plain values only; {next(iter(in_meta))} is a tensor. Put it into values.")
        self.held, self.aliases = units(shared)
        self._rank_units, self._rank_aliases = units(own)
        own_bytes = sum(unit.num_bytes for unit in self._rank_units)
        return {"digest": digest(self.held, self.aliases), "bytes": own_bytes}

    def plan(self, others: list[Any] | None) -> int:
        """Choose which of its units this rank writes; return the bytes of all shared tensors together.

        Args:
            others: every rank's units, where they differ.
        """
        everyone: Sequence[int] = range(self.size)
        holders = dict.fromkeys(self.held, everyone)
        if others is not None:
            lists: dict[Unit, list[int]] = {}
            for rank, held in enumerate(others):
                for fields in held:
                    lists.setdefault(Unit.of(fields), []).append(rank)
            holders = {unit: tuple(ranks) for unit, ranks in lists.items()}
        writers = divide(holders, self.size)
        self._lay_out([unit for unit in self.held if writers[unit] == self.rank])
        return sum(unit.num_bytes for unit in writers)

    def _lay_out(self, own: Sequence[Unit]) -> None:
        """Name this rank's file, and what is where in it."""
        content: dict[str, Tensor] = {}
        rank_index: dict[str, Any] = {}
        pieces: list[Any] = []
        for unit in own:
            pieces.append([*unit, self._shard, _add_key(content, unit.name, self.held[unit])])
        for unit, tensor in self._rank_units.items():
            key = _add_key(content, f"rank-{self.rank:05d}/{unit.name}", tensor)
            rank_index[unit.name] = _entry(unit, [_piece(unit, self._shard, key)])
        for name, target in self._rank_aliases.items():
            rank_index[name] = rank_index[target]
        self._report: dict[str, Any] = {"pieces": pieces, "aliases": self.aliases, "rank_tensors": rank_index}
        self._file = TensorFile(content) if content else None

    def stage(self, staging: Staging) -> None:
        """Copy what this rank writes and let go of the tensors themselves: they may change now."""
        if self._file is not None:
            self._staged, self._size = staging.take(self._file), self._file.size
        self._file = None
        self.held, self._rank_units = {}, {}

    def write(self, folder: Path) -> dict[str, Any]:
        """Write this rank's files; return what the manifest says of them."""
        files: dict[str, Any] = {}
        if self._staged:
            files[self._shard] = write_bytes(folder / self._shard, self._staged, self._size)
        elif self._file is not None:
            files[self._shard] = self._file.write(folder / self._shard)
        if self.rank == 0 and self._values:
            files[VALUES] = write_json(folder / VALUES, self._values)
        rank_values = f"values-{self.rank:05d}.json" if self._rank_values else None
        if rank_values:
            files[rank_values] = write_json(folder / rank_values, self._rank_values)
        return {"files": files, **self._report, "rank_values": rank_values}

    def index(self, written: list[Any]) -> dict[str, Any]:
        """Return the manifest's tables, from what every rank wrote. On rank 0.

        Raises:
            CheckpointError: the pieces of a tensor leave a hole or overlap.
        """
        index: dict[str, Any] = {}
        for report in written:
            for *fields, file, key in report["pieces"]:
                unit = Unit.of(fields)
                index.setdefault(unit.name, _entry(unit, []))["pieces"].append(_piece(unit, file, key))
        for name, entry in index.items():
            fault = check_cover(name, entry["shape"], [(p["offset"], p["shape"]) for p in entry["pieces"]])
            if fault:
                raise CheckpointError(f"{fault}. The ranks' shards must make up the whole tensor.")
        aliases = {name: target for report in written for name, target in report["aliases"].items() if name not in index}
        return {
            "files": {name: entry for report in written for name, entry in report["files"].items()},
            "tensors": index,
            "aliases": aliases,
            "rank_tensors": [report["rank_tensors"] for report in written],
            "values": VALUES if self._values else None,
            "rank_values": [report["rank_values"] for report in written],
        }


def _entry(unit: Unit, pieces: list[Any]) -> dict[str, Any]:
    return {"dtype": unit.dtype, "shape": list(unit.full), "pieces": pieces}


def _piece(unit: Unit, file: str, key: str) -> dict[str, Any]:
    return {"file": file, "key": key, "offset": list(unit.offset), "shape": list(unit.shape)}


def _add_key(content: dict[str, Tensor], name: str, tensor: Tensor) -> str:
    """Put a tensor into a file under its name, or one that is still free (two shards of one tensor)."""
    key, n = name, 1
    while key in content or key == "__metadata__":
        n += 1
        key = f"{name}~{n}"
    content[key] = tensor
    return key
