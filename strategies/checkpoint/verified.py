"""Files of a checkpoint, read so that no byte is used before its chunk's crc32 was compared with the manifest's.

`read` fills any number of places from one file in a single pass, in the order of the file: each run of chunks is read straight
to where its bytes belong (one vectored read), then checked there, on two threads. No other memory is taken than for the parts
of a chunk that nobody asked for.

A file that this process has read whole, and found whole, is known by its identity (device, inode, size, times). As long as
that is the same, what the page cache still holds of it is not checked again; what must come from the disk once more, is.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from ..errors import CheckpointError
from .layout import MAX_HEADER, TYPES, count, open_file, sizes

T = TypeVar("T")

_WORTH_A_THREAD = 4 * 2**20
"""Bytes that are read on a second thread, at least."""
_RUN = 4 * 2**20
"""Bytes that are read at a time."""
_SIP = 2**17
"""Bytes that are read at a time where they are only checked: they stay in the processor's cache (a tenth faster than 1 MiB)."""
_VECTOR = 512
"""Buffers of one read; Linux takes 1024."""
_SETTLED_S = 2.0
"""A file that was written to so shortly before it was checked may change again within one tick of the clock of its times."""
_KNOWN = 4096
"""Files whose identity is kept."""
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_PREADV = getattr(os, "preadv", None)

_whole: dict[tuple[int, ...], None] = {}
"""The identities of the files that this process has found whole, oldest first."""


class Span(NamedTuple):
    """Where a tensor's bytes lie in its file."""

    code: str
    shape: list[int]
    start: int
    end: int


class Wanted(NamedTuple):
    """Bytes that are wanted: where they begin in the file, and where they are to go."""

    start: int
    target: memoryview


class Handle(Protocol):
    """A file that is open for reading."""

    size: int

    def readv(self, position: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers from `position` on, in order; return the bytes read, perhaps fewer. From any thread."""
        ...

    def cached(self, position: int, buffers: Sequence[memoryview]) -> bool:
        """Fill the buffers from memory if the system has all of it there; say whether it has."""
        ...

    def identity(self) -> tuple[int, ...] | None:
        """Return what changes whenever the content does, or None where there is no such thing."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """A file of the local file system, opened without following links (layout.open_file)."""

    def __init__(self, folder: int, name: str, where: Path) -> None:
        descriptor, self.size = open_file(folder, name, where)
        self._raw = open(descriptor, "rb", buffering=0)  # noqa: SIM115  closed by `close`
        self._descriptor = descriptor
        self._turn = threading.Lock()

    def readv(self, position: int, buffers: Sequence[memoryview]) -> int:
        if _PREADV is not None:  # moves no position that another thread relies on
            return _PREADV(self._descriptor, buffers, position)
        with self._turn:
            self._raw.seek(position)
            return self._raw.readinto(buffers[0]) or 0

    def cached(self, position: int, buffers: Sequence[memoryview]) -> bool:
        if not _NOWAIT:
            return False
        try:
            return os.preadv(self._descriptor, buffers, position, _NOWAIT) == sum(map(len, buffers))
        except OSError:  # not there, or a file system that cannot say
            return False

    def identity(self) -> tuple[int, ...] | None:
        status = os.fstat(self._raw.fileno())
        settled = status.st_ino and time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_S
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) if settled else None

    def close(self) -> None:
        self._raw.close()


class VerifiedFile:
    """A file whose bytes are handed out only after they were compared with the manifest's checksums.

    Args:
        entry: of the manifest: {bytes, chunk, crc32, and sha256 where the file is small}.
    Raises:
        CheckpointError: (from any method) it differs.
    """

    def __init__(self, handle: Handle, name: str, entry: Mapping[str, Any], where: object) -> None:
        self._name, self._where, self._handle = name, where, handle
        self._size: int = entry["bytes"]
        self._chunk: int = entry["chunk"]
        self._crc32: list[int] = entry["crc32"]
        self._sha256: str | None = entry.get("sha256")
        self._header: dict[str, Span] | None = None
        if handle.size != self._size:
            self.close()
            raise self._damaged(f"has {handle.size:,} bytes, the manifest says {self._size:,}")

    def close(self) -> None:
        self._handle.close()

    # -- reading ------------------------------------------------------------------------------------------------------
    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on."""
        self.read([Wanted(start, target)])

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Fill every target, in one pass over the chunks that hold them."""
        ordered = sorted((w for w in wanted if len(w.target)), key=lambda w: w.start)
        if ordered and (end := max(w.start + len(w.target) for w in ordered)) > self._size:
            raise self._damaged(f"ends at byte {self._size:,}, a tensor is said to end at {end:,}")
        known = self.known_whole()
        while ordered:
            now: list[Wanted] = []
            again: list[Wanted] = []  # bytes that are wanted in a second place
            for w in ordered:
                (again if now and w.start < now[-1].start + len(now[-1].target) else now).append(w)
            size = sum(len(w.target) for w in now)
            _beside(self._runs(now), lambda run: self._fill_run(run, known), 2 if size >= _WORTH_A_THREAD else 1)
            ordered = again

    def read_all(self, limit: int) -> bytes:
        if self._size > limit:
            raise self._damaged(f"has {self._size:,} bytes, more than {limit:,}")
        buffer = bytearray(self._size)
        self.read_into(0, memoryview(buffer))
        return bytes(buffer)

    def _runs(self, wanted: Sequence[Wanted]) -> Iterator[list[tuple[int, list[memoryview]]]]:
        """Yield runs of neighbouring chunks: (index of the chunk, the buffers that take its bytes)."""
        run: list[tuple[int, list[memoryview]]] = []
        parts: list[memoryview] = []  # of the chunk `index`, which is filled up to `at`
        index, at = -1, 0

        def full(upto: int) -> None:
            if at < upto:  # nobody asked for these, and they are needed for the checksum
                parts.append(memoryview(bytearray(upto - at)))
            run.append((index, list(parts)))

        for start, target in wanted:
            position, stop = start, start + len(target)
            while position < stop:
                here = position // self._chunk
                if here != index:
                    if index >= 0:
                        full(self._end(index))
                    buffers = sum(len(p) for _, p in run)
                    if run and (here != index + 1 or len(run) * self._chunk >= _RUN or buffers >= _VECTOR):
                        yield run
                        run = []
                    parts, index, at = [], here, here * self._chunk
                if at < position:
                    parts.append(memoryview(bytearray(position - at)))
                upto = min(stop, self._end(here))
                parts.append(target[position - start : upto - start])
                position = at = upto
        full(self._end(index))
        yield run

    def _end(self, index: int) -> int:
        return min((index + 1) * self._chunk, self._size)

    def _fill_run(self, run: list[tuple[int, list[memoryview]]], known: bool) -> None:
        position = run[0][0] * self._chunk
        buffers = [part for _, parts in run for part in parts]
        if known and len(buffers) <= _VECTOR and self._handle.cached(position, buffers):
            return
        self._fill(position, buffers)
        for index, parts in run:
            got = 0
            for part in parts:
                got = zlib.crc32(part, got)
            self._check(index, got)

    # -- checking -----------------------------------------------------------------------------------------------------
    def known_whole(self) -> bool:
        """Whether this process has read all of it before, found it whole, and it was not written to since."""
        return self._handle.identity() in _whole

    def verify(self, *, full: bool) -> None:
        """Read the whole file and compare its checksums; `full`: sha256 too, where it has one."""
        before = self._handle.identity()
        local = threading.local()
        chunk, sip, crc32, fill = self._chunk, min(_SIP, self._chunk, self._size), zlib.crc32, self._fill

        def check(index: int) -> None:
            buffers = getattr(local, "buffers", None)
            if buffers is None:
                buffers = local.buffers = [memoryview(bytearray(sip))]
            got, position, end = 0, index * chunk, self._end(index)
            while position < end:
                if position + sip > end:
                    buffers = [buffers[0][: end - position]]
                part = buffers[0]
                fill(position, buffers)
                got = crc32(part, got)
                position += len(part)
            self._check(index, got)

        _beside(iter(range(len(self._crc32))), check, 2 if self._size >= _WORTH_A_THREAD else 1)
        if full and self._sha256 is not None:
            self._verify_sha256(self._sha256)
        if before is not None and before == self._handle.identity():
            _whole[before] = None
            if len(_whole) > _KNOWN:
                del _whole[next(iter(_whole))]

    def _verify_sha256(self, expected: str) -> None:
        whole = hashlib.sha256()
        buffer = memoryview(bytearray(min(2**20, self._size)))
        for position in range(0, self._size, len(buffer) or 1):
            part = buffer[: self._size - position]
            self._fill(position, [part])
            whole.update(part)
        if whole.hexdigest() != expected:
            raise self._damaged(f"sha256 mismatch (expected {expected[:12]}..., got {whole.hexdigest()[:12]}...)")

    def _check(self, index: int, got: int) -> None:
        """Compare the crc32 of a chunk."""
        if got != self._crc32[index]:
            begin = index * self._chunk
            raise self._damaged(
                f"crc32 mismatch in bytes {begin:,} to {self._end(index):,} (expected {self._crc32[index]:08x}, got {got:08x})"
            )

    def _fill(self, position: int, buffers: Sequence[memoryview]) -> None:
        left = [buffer for buffer in buffers if len(buffer)]
        while left:
            try:
                n = self._handle.readv(position, left[:_VECTOR])
            except OSError as error:
                raise self._damaged(f"cannot be read at byte {position:,}: {error.strerror or error}") from None
            if not n:
                raise self._damaged(f"ends at byte {position:,} instead of {self._size:,}")
            position += n
            while left and n >= len(left[0]):
                n -= len(left.pop(0))
            if n:
                left[0] = left[0][n:]

    # -- the safetensors header ---------------------------------------------------------------------------------------
    def header(self) -> dict[str, Span]:
        """Return where each tensor of a safetensors file lies; the spans tile the file exactly."""
        if self._header is None:
            try:
                self._header = parse_header(self.read_into, self._size)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._damaged(f"is no safetensors file: {type(error).__name__}: {error}") from None
        return self._header

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {self._name} {what}. The checkpoint is damaged; use an earlier one.")


def parse_header(read_into: Callable[[int, memoryview], None], file_size: int) -> dict[str, Span]:
    """Return where each tensor of a safetensors file lies; the spans tile the file exactly.

    Args:
        read_into: fills a buffer with the bytes of the file from a position on.
    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is no safetensors file.
    """
    length = memoryview(bytearray(8))
    read_into(0, length)
    size = int.from_bytes(length, "little")
    if size > min(MAX_HEADER, file_size - 8):
        raise ValueError(f"its header is said to have {size:,} bytes, the file has {file_size:,}")
    text = memoryview(bytearray(size))
    read_into(8, text)
    content = json.loads(bytes(text))
    content.pop("__metadata__", None)
    widths = {code: size for size, code in TYPES.values() if code}
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
    if position != file_size:
        raise ValueError(f"its tensors end at byte {position:,}, the file at {file_size:,}")
    return spans


def _beside(items: Iterator[T], action: Callable[[T], None], threads: int) -> None:
    """Call `action` with every item, in any order, on so many threads. The first error stops all, and is raised.

    Reading and checking leave Python to other threads: two are nearly twice as fast.
    """
    turn = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                with turn:
                    item = next(items, None)
                if item is None:
                    return
                action(item)
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=work, name="drivetrain-read", daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
