"""Files of a checkpoint: written once, checksummed on the way, on the disk when the call returns.

Each `write_*` returns the file's entry in the manifest: {bytes, sha256, chunk, crc32}. Everything goes through `os.write`
on a new file (O_EXCL): nothing that exists is ever written to.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import ConfigError
from .layout import CHUNK, DTYPE_NAMES, NO_FOLDER, num_bytes, open_folder, stored_shape

if sys.byteorder != "little":
    raise ConfigError("Checkpoints are little-endian, as the safetensors format is; this machine is big-endian.")


class FileWriter:
    """A new file that knows its checksums. `close` makes it durable and returns its entry in the manifest."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"):
            flags |= getattr(os, flag, 0)
        self._descriptor = os.open(path, flags, 0o666)  # less the umask, as every other file of the user
        self._size = 0
        self._sha256 = hashlib.sha256()
        self._crc32: list[int] = []
        self._open_chunk = 0  # bytes of the last chunk so far

    def write(self, data: memoryview) -> None:
        """Append bytes, one checksum chunk at a time."""
        start = 0
        while start < len(data):
            part = data[start : start + CHUNK - self._open_chunk]
            self._write_all(part)
            self._sha256.update(part)
            if self._open_chunk:
                self._crc32[-1] = zlib.crc32(part, self._crc32[-1])
            else:
                self._crc32.append(zlib.crc32(part))
            self._open_chunk = (self._open_chunk + len(part)) % CHUNK
            start += len(part)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        return {"bytes": self._size, "sha256": self._sha256.hexdigest(), "chunk": CHUNK, "crc32": self._crc32}

    def abandon(self) -> None:
        os.close(self._descriptor)

    def _write_all(self, part: memoryview) -> None:
        while len(part):
            part = part[os.write(self._descriptor, part) :]


def write_bytes(path: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    """Write a new file of all `parts`; return its entry in the manifest."""
    writer = FileWriter(path)
    try:
        for part in parts:
            writer.write(part)
    except BaseException:
        writer.abandon()
        raise
    return writer.close()


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write `value`, which state.split made, as strict JSON."""
    return write_bytes(path, [memoryview(json.dumps(value, allow_nan=False, separators=(",", ":")).encode())])


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors in the safetensors format, one after the other: one copy at a time is in memory, if any."""
    # Widest elements first, as the reference implementation does: everything is aligned for readers that map the file.
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, tensor in order:
        dtype = DTYPE_NAMES[tensor.dtype]
        code, shape = stored_shape(dtype, tensor.shape)
        end = start + num_bytes(dtype, tensor.shape)
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = memoryview(len(text).to_bytes(8, "little") + text)
    return write_bytes(path, _parts(head, [tensor for _, tensor in order]))


def _parts(head: memoryview, tensors: list[Tensor]) -> Iterable[memoryview]:
    yield head
    for tensor in tensors:
        plain = tensor.detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        plain = plain.to("cpu").contiguous()
        yield bytes_of(plain)


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
        return "on the meta device: it has no values yet"
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
