"""Files of a checkpoint: written once, checksummed on the way, on the disk when the call returns.

Each `write_*` returns the file's entry in the manifest: {bytes, chunk, crc32}, and sha256 for a small one. Everything goes
through `os.write` on a new file (O_EXCL): nothing that exists is ever written to.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import queue
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .dtypes import DTYPE_NAMES
from .layout import CHUNK, NO_FOLDER, human, num_bytes, open_folder, stored_shape
from .urls import UrlPath, UrlSink

_BIG = 8 * 2**20
"""Bytes of a file from which on its crc32 is worth a thread, and its sha256 too slow."""
_FLUSH = 32 * 2**20
"""Bytes after which the system is asked again to bring them to the disk."""
_PART = 4 * 2**20
"""Bytes that are written at a time."""
_BACKLOG = 12
"""Parts that wait for their checksum: what a tensor is copied into lives as long."""
_MARGIN = 2**20
"""Bytes that must stay free beside a checkpoint: headers, manifest, the file system's own."""
PIECE = 16 * 2**20
"""Bytes of a tensor that are copied at a time, where its own memory cannot be written as it is."""

if sys.byteorder != "little":
    raise ConfigError("Checkpoints are little-endian, as the safetensors format is; this machine is big-endian.")


class Sink(Protocol):
    """A new file that takes bytes in order; after `finish` it is durable, after `abandon` closed, whole or not."""

    def write(self, part: memoryview, /) -> int: ...
    def written(self, size: int) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class LocalSink:
    """A new file of the local file system."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"):
            flags |= getattr(os, flag, 0)
        self._descriptor = os.open(path, flags, 0o666)  # less the umask, as every other file of the user
        self._flushed = 0

    def write(self, part: memoryview, /) -> int:
        return os.write(self._descriptor, part)

    def written(self, size: int) -> None:
        """Ask the system to begin to bring what was written so far to the disk."""
        if size - self._flushed >= _FLUSH:
            start_writing_back(self._descriptor, self._flushed, size - self._flushed)
            self._flushed = size

    def finish(self) -> None:
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def abandon(self) -> None:
        os.close(self._descriptor)


class FileWriter:
    """A new file that knows its checksums. `close` makes it durable and returns its entry in the manifest.

    Args:
        size: bytes that are coming. A big file is checksummed on a thread beside the writing, and the system is asked to bring
            it to the disk as it goes: a save takes about as long as write and fsync (tests/benchmarks/checkpoint.py). It has
            no sha256, which would take longer than the disk: strategies/README.md says why that is enough.
    """

    def __init__(self, path: Path | UrlPath, size: int) -> None:
        self._sink: Sink = UrlSink(path) if isinstance(path, UrlPath) else LocalSink(path)
        self._size = 0
        self._sha256 = hashlib.sha256() if size < _BIG else None
        self._crc32: list[int] = []
        self._open_chunk = 0  # bytes of the last chunk so far
        self._beside = None if size < _BIG else _Beside(self._add_to_crc32)

    def write(self, data: memoryview) -> None:
        """Append bytes, which must not change before `close`."""
        start = 0
        while start < len(data):
            part = data[start : start + _PART]
            if self._beside is not None:
                self._beside.put(part)
            else:
                self._add_to_crc32(part)
            if self._sha256 is not None:
                self._sha256.update(part)
            self._write_all(part)
            self._size += len(part)
            start += len(part)
            if self._beside is not None:
                self._sink.written(self._size)

    def close(self) -> dict[str, Any]:
        try:
            # The fsync goes on while the last checksums are taken.
            self._sink.finish()
            if self._beside is not None:
                self._beside.join()
        finally:
            if self._beside is not None:
                self._beside.stop()
        entry: dict[str, Any] = {"bytes": self._size, "chunk": CHUNK, "crc32": self._crc32}
        return entry if self._sha256 is None else entry | {"sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        if self._beside is not None:
            self._beside.stop()
        self._sink.abandon()

    def _write_all(self, part: memoryview) -> None:
        while len(part):
            part = part[self._sink.write(part) :]

    def _add_to_crc32(self, part: memoryview) -> None:
        start = 0
        while start < len(part):
            more = part[start : start + CHUNK - self._open_chunk]
            if self._open_chunk:
                self._crc32[-1] = zlib.crc32(more, self._crc32[-1])
            else:
                self._crc32.append(zlib.crc32(more))
            self._open_chunk = (self._open_chunk + len(more)) % CHUNK
            start += len(more)


class _Beside:
    """Calls `action` with each part, in order, on a thread of its own. At most `_BACKLOG` parts are waiting."""

    def __init__(self, action: Callable[[memoryview], None]) -> None:
        self._action = action
        self._parts: queue.Queue[memoryview | None] = queue.Queue(_BACKLOG)
        self._thread = threading.Thread(target=self._run, name="drivetrain-checksum", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # Hashing releases the GIL; nothing in it can fail.
        while (part := self._parts.get()) is not None:
            self._action(part)

    def put(self, part: memoryview) -> None:
        self._parts.put(part)

    def join(self) -> None:
        """Wait until every part was taken."""
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._parts.put(None)
            self._thread.join()


def start_writing_back(descriptor: int, start: int, size: int) -> None:
    """Ask the system to begin to write a range of a file to the disk, so that little is left for fsync. Linux only."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), 2)  # SYNC_FILE_RANGE_WRITE


_sync_file_range: Any = None
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        _sync_file_range = ctypes.CDLL(None).sync_file_range


def write_bytes(path: Path | UrlPath, parts: Iterable[memoryview], size: int = 0) -> dict[str, Any]:
    """Write a new file of all `parts`, `size` bytes or about that; return its entry in the manifest."""
    writer = FileWriter(path, size)
    try:
        for part in parts:
            writer.write(part)
    except BaseException:
        writer.abandon()
        raise
    return writer.close()


def write_json(path: Path | UrlPath, value: Any) -> dict[str, Any]:
    """Write `value`, which state.split made, as strict JSON."""
    return write_bytes(path, [memoryview(json.dumps(value, allow_nan=False, separators=(",", ":")).encode())])


@dataclass(frozen=True)
class Deferred:
    """What stands for a tensor that is not there yet: `read` returns it when its bytes are due, and it is dropped behind them."""

    shape: Sequence[int]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class TensorFile:
    """A safetensors file that is to be written: its header, and the tensors whose bytes follow.

    Attributes:
        head: length and header, as they stand in the file;  tensors, or `Deferred` ones: in the order of their bytes;
        size: of the whole, in bytes.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None) -> None:
        # Widest elements first, as the reference implementation does: everything is aligned for readers that map the file.
        order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        start = 0
        for key, tensor in order:
            dtype = DTYPE_NAMES[tensor.dtype]
            code, shape = stored_shape(dtype, tensor.shape)
            end = start + num_bytes(dtype, tensor.shape)
            header[key] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = memoryview(len(text).to_bytes(8, "little") + text)
        self.tensors: list[Any] = [tensor for _, tensor in order]
        self.size = len(self.head) + start

    def parts(self) -> Iterator[memoryview]:
        """Yield the bytes of the whole file. What is not in order in the CPU's memory is copied, a few MiB at a time."""
        yield self.head
        for tensor in self.tensors:
            for piece in pieces(tensor.read() if isinstance(tensor, Deferred) else tensor):
                if piece.device.type == "cpu":
                    yield bytes_of(piece)
                else:
                    for part in piece.split(PIECE):
                        yield bytes_of(part.to("cpu"))

    def write(self, path: Path | UrlPath) -> dict[str, Any]:
        """Write it; return its entry in the manifest."""
        return write_bytes(path, self.parts(), self.size)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of a tensor in order, as flat uint8 tensors on its device.

    One view of the whole where its memory is in order; otherwise copies of at most `PIECE` bytes (or one row).
    """
    plain = tensor.detach()
    in_order = plain.is_contiguous() and not plain.is_conj() and not plain.is_neg()
    size = plain.numel() * plain.element_size()
    if in_order or plain.dim() == 0 or size <= PIECE:
        if size:
            yield plain.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return
    rows = max(1, PIECE * len(plain) // size)
    for first in range(0, len(plain), rows):
        yield from pieces(plain[first : first + rows] if rows > 1 else plain[first])


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor. It is valid as long as the tensor is (ctypes: numpy may be absent)."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    memory = (ctypes.c_char * size).from_address(tensor.data_ptr())
    memory._tensor = tensor  # type: ignore[attr-defined]  # keeps it alive as long as the view
    return memoryview(memory).cast("B")


def saveable(tensor: Tensor) -> str | None:
    """Return why `tensor` cannot be saved, or None. What a tensor subclass really holds is its strategy's business."""
    if cast(Any, type(tensor)).__torch_dispatch__ is not cast(Any, Tensor).__torch_dispatch__:
        return f"a {type(tensor).__name__}; pass its local part as a Shard"
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}; pass its dense values and indices"
    if tensor.device.type == "meta":
        return "on the meta device: it has no values (yet, or on this stage of a pipeline)"
    if tensor.dtype not in DTYPE_NAMES:
        return f"of type {tensor.dtype}, which has no place in the format"
    return None


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable (fsync of the folder itself)."""
    descriptor = open_folder(path)
    if descriptor == NO_FOLDER:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each durable in the one above it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_folder(path.parent)


def check_space(folder: Path, needed: int) -> None:
    """Refuse a checkpoint that the disk has no room for.

    Raises:
        CheckpointError: with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        raise CheckpointError(
            f"the checkpoint takes {human(needed)}, and {folder} has {human(free)} free. "
            "Free some space, keep fewer checkpoints, or choose another root."
        )


def wait_for(folder: Path, patience_s: float) -> Path:
    """Return `folder` once it can be seen: another machine's view of a shared file system may lag behind."""
    deadline = time.monotonic() + patience_s
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder}, made by rank 0, is not to be seen here. All ranks must see one folder: "
                "put the root on a shared file system."
            )
        time.sleep(0.05)
    return folder
