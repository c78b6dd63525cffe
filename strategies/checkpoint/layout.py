"""What a checkpoint looks like on the disk, and how a file of it is opened without trusting it.

    <root>/step-00000042/                     a committed checkpoint; step-00000042.2 replaced it, if saved a second time
        manifest.json                         see `encode_manifest`: everything below is named in it, with size and checksums
        shard-00000-of-00002.safetensors      the tensors that rank 0 wrote: pieces of the shared ones, and its own
        values.json                           the shared values
        values-00000.json                     the values of rank 0 alone
    <root>/.tmp-*                             a save that has not been committed, or a checkpoint that is being deleted
    <root>/.lock                              held by the process that writes here

manifest.json, format version 1:
    sha256        of every byte after this entry; it comes first, so a changed byte anywhere is noticed
    format        "drivetrain.checkpoint";  version 1
    step          optimizer steps;  sequence: counts the commits of this folder, so the highest is the newest
    meta          what the caller gave: counters, plan, metrics, ...
    world_size, torch, drivetrain, saved_at (UTC)
    files         name -> {bytes, chunk (bytes), crc32: [one per chunk], sha256: of small files}
    tensors       name -> {dtype, shape, pieces: [{file, key, offset, shape}]}; the pieces tile the tensor
    aliases       name -> the name under which the same memory was saved
    rank_tensors  per rank: name -> as in tensors;  values, rank_values: the names of the JSON files, or null

The tensor files are plain safetensors, readable with any tool. A type that the safetensors format lacks (complex, some
float8) is stored as its bytes, U8 with one more dimension, and the manifest says what it is.
This file needs no torch: the tools that list and check checkpoints start without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .urls import UrlPath
from .values import join

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "drivetrain.checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
TEMPORARY = ".tmp-"
CHUNK = 2**20
"""Bytes under one crc32: a slice of a tensor can be read and checked without reading the whole file."""
MAX_HEADER = 100 * 2**20
"""Bytes of a safetensors header; the reference implementation has the same limit."""
MAX_JSON = 2**30
"""Bytes of one JSON file."""

_DIR_FD = os.open in os.supports_dir_fd
NO_FOLDER = -1
"""Stands for the descriptor of a folder where there is none (Windows, a URL)."""
_FOLDER = re.compile(r"step-(\d{8,18})(?:\.(\d{1,9}))?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}")
_HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})",')

TYPES: Mapping[str, tuple[int, str | None]] = {
    "bool": (1, "BOOL"),
    "uint8": (1, "U8"),
    "int8": (1, "I8"),
    "int16": (2, "I16"),
    "uint16": (2, "U16"),
    "int32": (4, "I32"),
    "uint32": (4, "U32"),
    "int64": (8, "I64"),
    "uint64": (8, "U64"),
    "float16": (2, "F16"),
    "bfloat16": (2, "BF16"),
    "float32": (4, "F32"),
    "float64": (8, "F64"),
    "float8_e4m3fn": (1, "F8_E4M3"),
    "float8_e5m2": (1, "F8_E5M2"),
    "float8_e4m3fnuz": (1, None),
    "float8_e5m2fnuz": (1, None),
    "float8_e8m0fnu": (1, None),
    "float4_e2m1fn_x2": (1, None),
    "complex32": (4, None),
    "complex64": (8, None),
    "complex128": (16, None),
}
"""Torch's name, which is that in the manifest -> (bytes, code in the safetensors header or None: stored as bytes). Only the codes
that every release of safetensors reads."""


@dataclass(frozen=True)
class Shard:
    """A piece of a bigger tensor: `tensor` lies at `offset` in a tensor of `shape`."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint, as its manifest describes it.

    `notes` is filled by `CheckpointStore.latest`: one sentence for each newer checkpoint that was passed over.
    """

    step: int
    path: Path
    meta: Mapping[str, Any] = field(repr=False)
    sequence: int
    world_size: int
    num_bytes: int
    saved_at: str
    notes: tuple[str, ...] = ()


def folder_name(step: int, revision: int = 1) -> str:
    return f"step-{step:08d}" + (f".{revision}" if revision > 1 else "")


def parse_folder(name: str) -> tuple[int, int] | None:
    """Return (step, revision) of a checkpoint folder's name, None if it is not one."""
    match = _FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def stored_shape(dtype: str, shape: Sequence[int]) -> tuple[str, list[int]]:
    """Return (code, shape) under which a tensor stands in a safetensors header."""
    size, code = TYPES[dtype]
    return (code, list(shape)) if code else ("U8", [*shape, size])


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return count(shape) * TYPES[dtype][0]


def count(shape: Sequence[int]) -> int:
    """Return the number of elements, as Python's own integer: it cannot overflow."""
    total = 1
    for n in shape:
        total *= n
    return total


def encode_manifest(content: Mapping[str, Any]) -> bytes:
    """Write a manifest; its first entry is the sha256 of all bytes that follow that entry."""
    rest = json.dumps(content, allow_nan=False, separators=(",", ":"))[1:].encode()
    return b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",' + rest


def decode_manifest(data: bytes, where: object) -> dict[str, Any]:
    """Read what `encode_manifest` wrote.

    Raises:
        CheckpointError: not a manifest, changed since it was written, of another format version, or not well formed.
    """
    head = _HEAD.match(data)
    whole = head is not None and hashlib.sha256(data[head.end() :]).hexdigest().encode() == head[1]
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {MANIFEST} is not JSON ({error}): it was damaged after it was written.") from None
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{where}: the checkpoint has format version {version}, this drivetrain reads up to {VERSION}: install a newer one."
        )
    if not whole:
        raise CheckpointError(f"{where}: {MANIFEST} has another sha256 than it states: it was changed after it was written.")
    try:
        _check_manifest(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: {MANIFEST} is not well formed: {type(error).__name__}: {error}.") from None
    return content


def _check_manifest(content: dict[str, Any]) -> None:
    """Check types and names: whoever uses the manifest afterwards may rely on them."""
    _need(content["format"] == FORMAT and content["version"] == VERSION, f"format {content['format']!r}")
    for name in ("step", "sequence", "world_size"):
        _need(type(content[name]) is int and content[name] >= 0, f"{name} is {content[name]!r}")
    _need(isinstance(content["meta"], dict), "meta is no object")
    _need(isinstance(content["saved_at"], str), "saved_at is no string")
    for name, entry in content["files"].items():
        _need(_FILE.fullmatch(name) is not None and name != MANIFEST, f"file name {name!r}")
        chunks = -(-size_of(entry["bytes"]) // size_of(entry["chunk"], least=1))
        _need(len(entry["crc32"]) == chunks, f"{name}: {len(entry['crc32'])} checksums for {chunks} chunks")
        _need(all(type(crc) is int for crc in entry["crc32"]) and isinstance(entry.get("sha256", ""), str), f"{name}: checksums")
    world_size = content["world_size"]
    _need(len(content["rank_tensors"]) == world_size == len(content["rank_values"]), "not one entry a rank")
    for table in (content["tensors"], *content["rank_tensors"]):
        for name, entry in table.items():
            _need(entry["dtype"] in TYPES, f"tensor {name!r}: dtype {entry['dtype']!r}")
            sizes(entry["shape"])
            _need(isinstance(entry["pieces"], list) and len(entry["pieces"]) > 0, f"tensor {name!r}: no pieces")
            for piece in entry["pieces"]:
                _need(piece["file"] in content["files"], f"tensor {name!r}: its file {piece['file']!r} is not listed")
                _need(isinstance(piece["key"], str), f"tensor {name!r}: key")
                ranks = len(sizes(piece["offset"])), len(sizes(piece["shape"]))
                _need(ranks == (len(entry["shape"]),) * 2, f"tensor {name!r}: a piece has other dimensions")
    for name, target in content["aliases"].items():
        _need(target in content["tensors"], f"alias {name!r} of {target!r}, which is not saved")
    for name in (content["values"], *content["rank_values"]):
        _need(name is None or name in content["files"], f"the values {name!r} are not listed")


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def size_of(value: Any, least: int = 0) -> int:
    _need(type(value) is int and least <= value < 2**62, f"{value!r} is no size")
    return value


def sizes(values: Any) -> list[int]:
    _need(isinstance(values, list) and len(values) <= 64, f"{values!r} is no shape")
    return [size_of(v) for v in values]


def check_cover(name: str, shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """Return why (offset, shape) `pieces` do not tile a tensor of `shape`, or None: every element once, none outside."""
    for offset, size in pieces:
        if len(offset) != len(shape) or any(o < 0 or o + n > f for o, n, f in zip(offset, size, shape, strict=True)):
            return f"tensor {name!r}: a piece of shape {list(size)} at {list(offset)} is outside {list(shape)}"
    total = sum(count(size) for _, size in pieces)
    if total != count(shape) or not pieces:
        return f"tensor {name!r}: its pieces hold {total:,} of {count(shape):,} elements"
    ordered = sorted(pieces, key=lambda piece: tuple(piece[0]))
    for index, (offset, size) in enumerate(ordered):
        for later in range(index + 1, len(ordered)):
            other, other_size = ordered[later]
            # In this order nothing further can overlap in dimension 0: linear for the usual cut along one dimension.
            if other and other[0] >= offset[0] + size[0]:
                break
            if all(o < p + m and p < o + n for o, n, p, m in zip(offset, size, other, other_size, strict=True)):
                return f"tensor {name!r}: two pieces overlap at {list(other)}"
    return None


def open_folder(path: Path | UrlPath) -> int:
    """Open a checkpoint folder; files are opened relative to it, so swapping the folder underneath changes nothing."""
    if not _DIR_FD or isinstance(path, UrlPath):
        return NO_FOLDER
    return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))


def close_folder(folder: int) -> None:
    if folder != NO_FOLDER:
        os.close(folder)


def open_file(folder: int, name: str, where: Path, limit: int | None = None) -> tuple[int, int]:
    """Open a file of a checkpoint for reading; return (descriptor, bytes).

    Raises:
        CheckpointError: the name is not a plain file name, or it is a symlink, no regular file, or has over `limit` bytes.
    """
    if not _FILE.fullmatch(name):
        raise CheckpointError(f"{where}: {name!r} is no file name of a checkpoint: refused.")
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY
    for flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    try:
        if os.path.islink(where / name):  # said here for the message's sake; O_NOFOLLOW is what refuses it
            raise OSError(errno.ELOOP, "it is a symlink")
        descriptor = os.open(name, flags, dir_fd=folder) if folder != NO_FOLDER else os.open(where / name, flags)
    except OSError as error:
        raise CheckpointError(f"{where}: {name} is missing or cannot be opened: {error.strerror}.") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (limit is not None and status.st_size > limit):
        os.close(descriptor)
        kind = f"has {status.st_size:,} bytes, more than {limit:,}" if stat.S_ISREG(status.st_mode) else "is no regular file"
        raise CheckpointError(f"{where}: {name} {kind}: refused.")
    return descriptor, status.st_size


def read_manifest(path: Path | UrlPath) -> dict[str, Any]:
    """Read and check the manifest of the checkpoint folder `path`.

    Raises:
        CheckpointError: there is none, or see `decode_manifest`.
    """
    if isinstance(path, UrlPath):
        return decode_manifest(path.read_limited(MANIFEST, MAX_JSON), path)
    try:
        folder = open_folder(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from None
    try:
        descriptor, size = open_file(folder, MANIFEST, path, MAX_JSON)
        with open(descriptor, "rb") as file:
            return decode_manifest(file.read(size), path)
    finally:
        close_folder(folder)


def info_of(path: Path, manifest: Mapping[str, Any]) -> CheckpointInfo:
    """Describe the checkpoint at `path`.

    Raises:
        CheckpointError: its folder is named for another step.
    """
    named = parse_folder(path.name)
    if named and named[0] != manifest["step"]:
        raise CheckpointError(f"{path}: the manifest is of step {manifest['step']}: the folder was renamed or swapped.")
    return CheckpointInfo(
        step=manifest["step"],
        path=path,
        meta=join(manifest["meta"], {}),
        sequence=manifest["sequence"],
        world_size=manifest["world_size"],
        num_bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        saved_at=manifest["saved_at"],
    )


def human(size: float) -> str:
    """Return a number of bytes for people to read."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def library_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("drivetrain")
    except PackageNotFoundError:
        return "unknown"
