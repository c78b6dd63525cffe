"""Read a committed checkpoint: values and tensors, or any slice of a tensor, checked while they are read.

    checkpoint = store.open(42)
    checkpoint.tensor("model/main/weight")                               the whole tensor, whoever wrote its pieces
    checkpoint.tensor("model/main/weight", offset=(8, 0), shape=(4, 16)) what one rank of another sharding needs
    checkpoint.value("optimizer/0"), checkpoint.rank_value("loader", rank=1)

Nothing is believed before it is checked: names in the manifest are plain file names, files are opened without following
links, sizes are compared before memory is taken, each chunk's crc32 before its bytes are used. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, suggest
from .divide import check_cover
from .layout import (
    DTYPES,
    MAX_HEADER,
    MAX_JSON,
    close_folder,
    count,
    info_of,
    num_bytes,
    open_file,
    open_folder,
    read_manifest,
    sizes,
    stored_shape,
)
from .state import join
from .writer import bytes_of

_WORTH_A_THREAD = 4 * 2**20
"""Bytes that are read on a second thread, at least."""
VALUE_TENSORS = "value/"
"""Before the names of the tensors that were met inside values."""


class Span(NamedTuple):
    """Where a tensor's bytes lie in its file."""

    code: str
    shape: list[int]
    start: int
    end: int


class Checkpoint:
    """A committed checkpoint, open for reading. Use `with`, or call `close`; one thread at a time.

    Raises:
        CheckpointError: (from any method) a file is missing or differs from the manifest; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        entry = self._entry(name)
        with torch.no_grad():
            plain = out.detach()
            if offset is None and list(plain.shape) != entry["shape"]:
                raise CheckpointError(
                    f"{self.path}: {name!r} has shape {entry['shape']} and was to be read into {list(plain.shape)}."
                )
            in_place = plain.dtype == DTYPES[entry["dtype"]][0] and plain.device.type == "cpu" and plain.is_contiguous()
            if in_place and not plain.is_conj() and not plain.is_neg():
                self._read(name, entry, offset, plain.shape, plain)
            else:
                plain.copy_(self._read(name, entry, offset, plain.shape))
        return out

    def rank_names(self, rank: int) -> list[str]:
        return [n for n in self._of_rank("rank_tensors", rank) if not n.startswith(VALUE_TENSORS)]

    def rank_tensor(self, name: str, rank: int) -> Tensor:
        """Return the tensor that `rank` saved under `name` for itself alone."""
        return self._read(name, self._pick(self._of_rank("rank_tensors", rank), name, f"tensor of rank {rank}"), None, None)

    # -- checking -----------------------------------------------------------------------------------------------------
    def faults(self, *, files: Sequence[str] | None = None, full: bool = True) -> list[str]:
        """Read `files` (default: all) and return what is wrong with them, one sentence each; never raises for damage.

        Args:
            full: compare sha256 as well as crc32.
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

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
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
            self._files[name] = VerifiedFile(self._folder, name, self.manifest["files"][name], self.path)
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
        out: Tensor | None = None,
    ) -> Tensor:
        self._check_pieces(name, entry)
        full = entry["shape"]
        offset = [0] * len(full) if offset is None else list(offset)
        shape = [f - o for f, o in zip(full, offset, strict=True)] if shape is None else list(shape)
        if len(offset) != len(full) or any(o < 0 or n < 0 or o + n > f for o, n, f in zip(offset, shape, full, strict=True)):
            raise CheckpointError(f"{self.path}: {name!r} has shape {full}; there is no slice of {shape} at {offset}.")
        try:
            out = _empty(shape, DTYPES[entry["dtype"]][0]) if out is None else out
        except (RuntimeError, TypeError) as error:  # no memory; or 0 elements in a shape that overflows
            raise CheckpointError(f"{self.path}: no memory for {name!r} of shape {shape}: {error}") from None
        if count(shape) == 0:
            return out
        for piece in entry["pieces"]:
            low = [max(o, p) for o, p in zip(offset, piece["offset"], strict=True)]
            high = [min(o + n, p + m) for o, n, p, m in zip(offset, shape, piece["offset"], piece["shape"], strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                self._copy(entry["dtype"], piece, low, high, offset, out)
        return out

    def _copy(
        self, dtype: str, piece: Mapping[str, Any], low: list[int], high: list[int], at: Sequence[int], out: Tensor
    ) -> None:
        """Copy the box [low, high) of the whole tensor from a piece into `out`, whose corner is `at`."""
        file = self._file(piece["file"])
        start = file.header()[piece["key"]].start
        shape, corner = piece["shape"], piece["offset"]
        if low == list(at) and [h - a for h, a in zip(high, at, strict=True)] == list(out.shape) == shape:
            file.read_into(start, bytes_of(out))
            return
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


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory for a tensor. By way of bytes: torch.empty warns of some types, which is not the reader's business."""
    return torch.empty(count(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).view(list(shape))


def _as_bytes(tensor: Tensor, size: int) -> Tensor:
    """View a contiguous tensor as uint8 with one more dimension."""
    return tensor.reshape(-1).view(torch.uint8).view(*tensor.shape, size)


class _Helper:
    """Does one thing on another thread; `join` waits for it and raises what it raised."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(action,), name="drivetrain-read", daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


class VerifiedFile:
    """A file whose bytes are handed out only after their chunk's crc32 was compared with the manifest's."""

    def __init__(self, folder: int, name: str, entry: Mapping[str, Any], where: Path) -> None:
        self._name, self._where = name, where
        self._size: int = entry["bytes"]
        self._chunk: int = entry["chunk"]
        self._crc32: list[int] = entry["crc32"]
        self._sha256: str = entry["sha256"]
        self._header: dict[str, Span] | None = None
        self._turn = threading.Lock()
        self._kept: tuple[int, bytes | bytearray] = (-1, b"")  # the last chunk that was read in part: neighbours often share it
        descriptor, size = open_file(folder, name, where)
        self._raw = open(descriptor, "rb", buffering=0)  # noqa: SIM115  closed by `close`
        if size != self._size:
            self.close()
            raise self._damaged(f"has {size:,} bytes, the manifest says {self._size:,}")

    def close(self) -> None:
        self._raw.close()

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on. Whole chunks go straight to their place."""
        end = start + len(target)
        if end > self._size:
            raise self._damaged(f"ends at byte {self._size:,}, a tensor is said to end at {end:,}")
        middle = (start + len(target) // 2) // self._chunk * self._chunk
        if middle - start < _WORTH_A_THREAD:
            self._read_range(start, target)
            return
        # Reading and checking leave Python to other threads: two are nearly twice as fast.
        helper = _Helper(lambda: self._read_range(middle, target[middle - start :]))
        try:
            self._read_range(start, target[: middle - start])
        finally:
            helper.join()

    def _read_range(self, start: int, target: memoryview) -> None:
        position, end = start, start + len(target)
        while position < end:
            index = position // self._chunk
            begin = index * self._chunk
            stop = min(begin + self._chunk, self._size)
            if position == begin and end >= stop:
                part = target[begin - start : stop - start]
                self._fill(begin, part)
                self._check(index, part)
            else:
                kept = self._kept
                if kept[0] != index:
                    buffer = bytearray(stop - begin)
                    self._fill(begin, memoryview(buffer))
                    self._check(index, buffer)
                    kept = self._kept = (index, buffer)
                upto = min(stop, end)
                target[position - start : upto - start] = kept[1][position - begin : upto - begin]
            position = min(stop, end)

    def read_all(self, limit: int) -> bytes:
        if self._size > limit:
            raise self._damaged(f"has {self._size:,} bytes, more than {limit:,}")
        buffer = bytearray(self._size)
        self.read_into(0, memoryview(buffer))
        return bytes(buffer)

    def verify(self, *, full: bool) -> None:
        """Read the whole file and compare its checksums."""
        whole = hashlib.sha256()
        buffer = memoryview(bytearray(min(self._chunk, self._size)))
        for index in range(len(self._crc32)):
            begin = index * self._chunk
            part = buffer[: min(self._chunk, self._size - begin)]
            self._fill(begin, part)
            self._check(index, part)
            if full:
                whole.update(part)
        if full and whole.hexdigest() != self._sha256:
            raise self._damaged(f"sha256 mismatch (expected {self._sha256[:12]}..., got {whole.hexdigest()[:12]}...)")

    def header(self) -> dict[str, Span]:
        """Return where each tensor of a safetensors file lies; the spans tile the file exactly."""
        if self._header is None:
            try:
                self._header = self._parse()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._damaged(f"is no safetensors file: {type(error).__name__}: {error}") from None
        return self._header

    def _parse(self) -> dict[str, Span]:
        length = memoryview(bytearray(8))
        self.read_into(0, length)
        size = int.from_bytes(length, "little")
        if size > min(MAX_HEADER, self._size - 8):
            raise ValueError(f"its header is said to have {size:,} bytes, the file has {self._size:,}")
        text = memoryview(bytearray(size))
        self.read_into(8, text)
        content = json.loads(bytes(text))
        content.pop("__metadata__", None)
        widths = {code: kind.itemsize for kind, code in DTYPES.values() if code}
        spans: dict[str, Span] = {}
        for key, entry in content.items():
            start, end = sizes(entry["data_offsets"])
            shape = sizes(entry["shape"])
            if count(shape) * widths[entry["dtype"]] != end - start:
                raise ValueError(f"{key!r}: {entry['dtype']} {shape} does not take {end - start} bytes")
            spans[key] = Span(entry["dtype"], shape, start + 8 + size, end + 8 + size)
        position = 8 + size
        for span in sorted(spans.values(), key=lambda s: (s.start, s.end)):
            if span.start != position:
                raise ValueError(f"a tensor starts at byte {span.start:,}, the one before it ends at {position:,}")
            position = span.end
        if position != self._size:
            raise ValueError(f"its tensors end at byte {position:,}, the file at {self._size:,}")
        return spans

    def _fill(self, position: int, target: memoryview) -> None:
        while len(target):
            try:
                n = self._read_at(position, target)
            except OSError as error:
                raise self._damaged(f"cannot be read at byte {position:,}: {error.strerror}") from None
            if not n:
                raise self._damaged(f"ends at byte {position:,} instead of {self._size:,}")
            position, target = position + n, target[n:]

    def _read_at(self, position: int, target: memoryview) -> int:
        if hasattr(os, "preadv"):  # moves no position that another thread relies on
            return os.preadv(self._raw.fileno(), [target], position)
        with self._turn:
            self._raw.seek(position)
            return self._raw.readinto(target) or 0

    def _check(self, index: int, data: memoryview | bytearray) -> None:
        got = zlib.crc32(data)
        if got != self._crc32[index]:
            begin = index * self._chunk
            raise self._damaged(
                f"crc32 mismatch in bytes {begin:,} to {begin + len(data):,} (expected {self._crc32[index]:08x}, got {got:08x})"
            )

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {self._name} {what}. The checkpoint is damaged; use an earlier one.")
