"""Read a committed checkpoint: values and tensors, or any slice of a tensor, checked while they are read.

    checkpoint = store.open(42)
    checkpoint.tensor("model/main/weight")                               the whole tensor, whoever wrote its pieces
    checkpoint.tensor("model/main/weight", offset=(8, 0), shape=(4, 16)) what one rank of another sharding needs
    checkpoint.value("optimizer/0"), checkpoint.rank_value("loader", rank=1)

Nothing is believed before it is checked: names in the manifest are plain file names, files are opened without following
links, sizes are compared before memory is taken, each chunk's crc32 before its bytes are used. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, suggest
from .divide import check_cover
from .layout import (
    DTYPES,
    MAX_JSON,
    close_folder,
    count,
    info_of,
    num_bytes,
    open_folder,
    read_manifest,
    stored_shape,
)
from .state import join
from .together import Alone, Ranks
from .urls import UrlFile, UrlPath, path_of
from .verified import LocalFile, VerifiedFile, Wanted
from .writer import bytes_of

VALUE_TENSORS = "value/"
"""Before the names of the tensors that were met inside values."""


class Checkpoint:
    """A committed checkpoint, open for reading. Use `with`, or call `close`; one thread at a time.

    Raises:
        CheckpointError: (from any method) a file is missing or differs from the manifest; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = path_of(path)
        self.manifest = read_manifest(self.path)
        self.info = info_of(self.path, self.manifest)
        self.step: int = self.info.step
        self.meta: Mapping[str, Any] = self.info.meta
        self.world_size: int = self.info.world_size
        self._tensors: dict[str, Any] = self.manifest["tensors"]
        self._aliases: dict[str, str] = self.manifest["aliases"]
        self._files: dict[str, VerifiedFile] = {}
        self._json: dict[str, Any] = {}
        self._folder = open_folder(self.path)
        self._closed = False

    # -- values -------------------------------------------------------------------------------------------------------
    def value_names(self) -> list[str]:
        return list(self._values(self.manifest["values"]))

    def value(self, name: str) -> Any:
        """Return a shared value, with the tensors that were in it."""
        return join(self._pick(self._values(self.manifest["values"]), name, "value"), self._value_tensor)

    def rank_value_names(self, rank: int) -> list[str]:
        return list(self._values(self._of_rank("rank_values", rank)))

    def rank_value(self, name: str, rank: int) -> Any:
        """Return what `rank` saved under `name` for itself alone."""
        values = self._values(self._of_rank("rank_values", rank))
        return join(self._pick(values, name, f"value of rank {rank}"), lambda tensor: self.rank_tensor(tensor, rank))

    # -- tensors ------------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """Return the names of the shared tensors, aliases too."""
        return [n for n in (*self._tensors, *self._aliases) if not n.startswith(VALUE_TENSORS)]

    @property
    def aliases(self) -> Mapping[str, str]:
        """Name -> the name under which the same memory was saved (tied weights)."""
        return self._aliases

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name)["dtype"]][0]

    def tensor(self, name: str, *, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """Return a shared tensor, or the part of it of `shape` at `offset`, on the CPU, in memory of its own."""
        return self._read(name, self._entry(name), offset, shape)

    def read_into(self, name: str, out: Tensor, *, offset: Sequence[int] | None = None) -> Tensor:
        """Fill `out` with the shared tensor, or with the part of its shape at `offset`; return it. Types are converted.

        A contiguous CPU tensor of the saved type is read in place, without memory of its own. If an error is raised, `out` may
        hold a part of what was to be read: check the file before (`faults`) where that matters.

        Raises:
            CheckpointError: damage; or the saved tensor has no such part.
        """
        self._fill([(name, out, offset)])
        return out

    def read_many(self, wanted: Iterable[tuple[str, Tensor]]) -> None:
        """Fill many tensors, each with the whole of what was saved under its name: every file in one pass, on two threads.

        As `read_into` otherwise. What cannot be read in place is read one tensor at a time; nothing else takes memory.
        """
        self._fill((name, out, None) for name, out in wanted)

    def _fill(self, wanted: Iterable[tuple[str, Tensor, Sequence[int] | None]]) -> None:
        direct: dict[str, list[Wanted]] = {}
        others: list[tuple[Mapping[str, Any], str, Tensor, Sequence[int] | None]] = []
        with torch.no_grad():
            for name, out, offset in wanted:
                entry, plain = self._entry(name), out.detach()
                if offset is None and list(plain.shape) != entry["shape"]:
                    raise CheckpointError(
                        f"{self.path}: {name!r} has shape {entry['shape']} and was to be read into {list(plain.shape)}."
                    )
                in_place = plain.dtype == DTYPES[entry["dtype"]][0] and plain.device.type == "cpu" and plain.is_contiguous()
                spans = None
                if in_place and not plain.is_conj() and not plain.is_neg():
                    corner = [0] * plain.dim() if offset is None else list(offset)
                    self._check_box(name, entry, corner, plain.shape)
                    spans = self._spans(entry, corner, plain)
                if spans is None:
                    others.append((entry, name, plain, offset))
                    continue
                for file, span in spans:
                    direct.setdefault(file, []).append(span)
            for file, spans in direct.items():
                self._file(file).read(spans)
            for entry, name, plain, offset in others:
                plain.copy_(self._read(name, entry, offset, plain.shape))

    def rank_names(self, rank: int) -> list[str]:
        return [n for n in self._of_rank("rank_tensors", rank) if not n.startswith(VALUE_TENSORS)]

    def rank_tensor(self, name: str, rank: int) -> Tensor:
        """Return the tensor that `rank` saved under `name` for itself alone."""
        return self._read(name, self._pick(self._of_rank("rank_tensors", rank), name, f"tensor of rank {rank}"), None, None)

    # -- checking -----------------------------------------------------------------------------------------------------
    def faults(self, *, files: Sequence[str] | None = None, full: bool = True) -> list[str]:
        """Read `files` (default: all) and return what is wrong with them, one sentence each; never raises for damage.

        Args:
            full: compare sha256 as well as crc32, where a file has one.
        """
        found: list[str] = []
        for name in self.manifest["files"] if files is None else files:
            try:
                self._file(name).verify(full=full)
                if name.endswith(".json"):
                    self._values(name)
            except CheckpointError as error:
                found.append(str(error))
        damaged = bool(found)
        for table in (self._tensors, *self.manifest["rank_tensors"]):
            for name, entry in table.items():
                if files is not None and entry["pieces"][0]["file"] not in files:
                    continue  # somebody else's share
                try:
                    if not damaged:  # the cause was said already
                        self._check_pieces(name, entry)
                except CheckpointError as error:
                    found.append(str(error))
        return found

    def require_whole(self, ranks: Ranks | None = None) -> None:
        """Read every file that this process has not yet found whole, before anything is loaded (together: each rank a share).

        Raises:
            CheckpointError: damage, on all ranks.
        """
        ranks = ranks or Alone()
        own = list(self.manifest["files"])[ranks.rank :: ranks.size]
        try:
            found = self.faults(files=[name for name in own if not self._file(name).known_whole()], full=False)
        except CheckpointError as error:
            found = [str(error)]
        faults = [fault for faults in ranks.gather_json(found) for fault in faults]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise CheckpointError(f"{faults[0]}{more} Nothing was loaded.")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if not self._closed:
            close_folder(self._folder)
            self._closed = True

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end what `close` calls may be gone already; the system closes files too.
        if hasattr(self, "_closed") and not ending():
            self.close()

    # -- inside -------------------------------------------------------------------------------------------------------
    def _entry(self, name: str) -> dict[str, Any]:
        name = self._aliases.get(name, name)
        entry = self._tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}.{suggest(name, self.names())}")
        return entry

    def _value_tensor(self, name: str) -> Tensor:
        return self.tensor(name)

    def _of_rank(self, table: str, rank: int) -> Any:
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"{self.path} was saved by {self.world_size} ranks: there is nothing of rank {rank}.")
        return self.manifest[table][rank]

    def _pick(self, table: Mapping[str, Any], name: str, kind: str) -> Any:
        if name not in table:
            raise CheckpointError(f"{self.path} holds no {kind} {name!r}.{suggest(name, table)}")
        return table[name]

    def _values(self, file: str | None) -> dict[str, Any]:
        if file is None:
            return {}
        if file not in self._json:
            try:
                content = json.loads(self._file(file).read_all(MAX_JSON))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{self.path}: {file} is not JSON: {error}.") from None
            if not isinstance(content, dict):
                raise CheckpointError(f"{self.path}: {file} holds no object.")
            self._json[file] = content
        return self._json[file]

    def _file(self, name: str) -> VerifiedFile:
        if name not in self._files:
            if self._closed:
                raise CheckpointError(f"{self.path} was closed; open it again to read from it.")
            handle = UrlFile(self.path / name) if isinstance(self.path, UrlPath) else LocalFile(self._folder, name, self.path)
            self._files[name] = VerifiedFile(handle, name, self.manifest["files"][name], self.path)
        return self._files[name]

    def _check_pieces(self, name: str, entry: Mapping[str, Any]) -> None:
        """Check that the pieces tile the tensor and are in their files as the manifest says, before memory is taken."""
        fault = check_cover(name, entry["shape"], [(p["offset"], p["shape"]) for p in entry["pieces"]])
        if fault:
            raise CheckpointError(f"{self.path}: {fault}.")
        if len({(piece["file"], piece["key"]) for piece in entry["pieces"]}) != len(entry["pieces"]):
            raise CheckpointError(f"{self.path}: tensor {name!r}: two of its pieces are the same bytes of a file.")
        for piece in entry["pieces"]:
            span = self._file(piece["file"]).header().get(piece["key"])
            if span is None or (span.code, span.shape) != stored_shape(entry["dtype"], piece["shape"]):
                there = "nothing" if span is None else f"{span.code} {span.shape}"
                raise CheckpointError(
                    f"{self.path}: {piece['file']} has {there} under {piece['key']!r}, the manifest says {entry['dtype']} "
                    f"{piece['shape']}."
                )

    def _read(
        self,
        name: str,
        entry: Mapping[str, Any],
        offset: Sequence[int] | None,
        shape: Sequence[int] | None,
    ) -> Tensor:
        full = entry["shape"]
        offset = [0] * len(full) if offset is None else list(offset)
        shape = [f - o for f, o in zip(full, offset, strict=True)] if shape is None else list(shape)
        self._check_box(name, entry, offset, shape)
        try:
            out = _empty(shape, DTYPES[entry["dtype"]][0])
        except (RuntimeError, TypeError) as error:  # no memory; or 0 elements in a shape that overflows
            raise CheckpointError(f"{self.path}: no memory for {name!r} of shape {shape}: {error}") from None
        spans = self._spans(entry, offset, out)
        if spans is not None:
            for file, span in spans:
                self._file(file).read([span])
            return out
        for piece, low, high in _overlaps(entry, offset, shape):
            self._copy(entry["dtype"], piece, low, high, offset, out)
        return out

    def _check_box(self, name: str, entry: Mapping[str, Any], offset: Sequence[int], shape: Sequence[int]) -> None:
        """Check the tensor's pieces, and that it has the box of `shape` at `offset`, before memory is taken."""
        self._check_pieces(name, entry)
        full = entry["shape"]
        if len(offset) != len(full) or any(o < 0 or n < 0 or o + n > f for o, n, f in zip(offset, shape, full, strict=True)):
            raise CheckpointError(
                f"{self.path}: {name!r} has shape {full}; there is no slice of {list(shape)} at {list(offset)}."
            )

    def _spans(self, entry: Mapping[str, Any], offset: Sequence[int], out: Tensor) -> list[tuple[str, Wanted]] | None:
        """Return which bytes of which files make up `out`, a box of the tensor, if each piece's share is in order in both.

        That is so unless something is cut along another dimension than the first.
        """
        found: list[tuple[str, Wanted]] = []
        shape = list(out.shape)
        memory = bytes_of(out)
        for piece, low, high in _overlaps(entry, offset, shape):
            if not piece["shape"][1:] == shape[1:] == [h - a for a, h in zip(low[1:], high[1:], strict=True)]:
                return None
            row = num_bytes(entry["dtype"], shape[1:])
            first, last = (low[0], high[0]) if shape else (0, 1)
            skipped, at = (first - piece["offset"][0], first - offset[0]) if shape else (0, 0)
            start = self._file(piece["file"]).header()[piece["key"]].start + skipped * row
            found.append((piece["file"], Wanted(start, memory[at * row : (at + last - first) * row])))
        return found

    def _copy(
        self, dtype: str, piece: Mapping[str, Any], low: list[int], high: list[int], at: Sequence[int], out: Tensor
    ) -> None:
        """Copy the box [low, high) of the whole tensor from a piece into `out`, whose corner is `at`."""
        file = self._file(piece["file"])
        start = file.header()[piece["key"]].start
        shape, corner = piece["shape"], piece["offset"]
        # Rows of dimension 0 lie one after the other: read those that are wanted, cut the rest in memory.
        first, last = (low[0] - corner[0], high[0] - corner[0]) if shape else (0, 1)
        rows = _empty([last - first, *shape[1:]], out.dtype)
        file.read_into(start + num_bytes(dtype, [first, *shape[1:]]), bytes_of(rows))
        box = (slice(None), *(slice(a - c, b - c) for a, b, c in zip(low[1:], high[1:], corner[1:], strict=True)))
        target = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, at, strict=True))
        # As bytes: not every type can be copied into a slice (float4, some float8).
        size = out.element_size()
        flat_out, flat_rows = _as_bytes(out, size), _as_bytes(rows, size)
        flat_out[target] = flat_rows[box]


def _overlaps(
    entry: Mapping[str, Any], offset: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[Mapping[str, Any], list[int], list[int]]]:
    """Yield each piece that has a part of the box of `shape` at `offset`, and that part's corners in the whole tensor."""
    if count(shape) == 0:
        return
    for piece in entry["pieces"]:
        low = [max(o, p) for o, p in zip(offset, piece["offset"], strict=True)]
        high = [min(o + n, p + m) for o, n, p, m in zip(offset, shape, piece["offset"], piece["shape"], strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            yield piece, low, high


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory for a tensor. By way of bytes: torch.empty warns of some types, which is not the reader's business."""
    return torch.empty(count(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).view(list(shape))


def _as_bytes(tensor: Tensor, size: int) -> Tensor:
    """View a contiguous tensor as uint8 with one more dimension."""
    return tensor.reshape(-1).view(torch.uint8).view(*tensor.shape, size)
