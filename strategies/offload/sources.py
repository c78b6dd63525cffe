"""Where weights lie, and how a group of them comes into a buffer with as few reads as possible.

    source = open_source("model-folder")              safetensors: one file, shards with an index, or a checkpoint of ours
    layout = source.layout({"a.weight": torch.bfloat16, ...})         where each lies in a buffer of layout.num_bytes
    source.fill(layout, buffer)                       no memory of its own: straight from the file to its place

Neighbours in a file are neighbours in the buffer, so that a block of a model, whose tensors lie side by side in a file, is one
read. Files are read with preadv and never mapped: mapped pages count as the process's memory, those of the page cache do not.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.dtypes import DTYPES
from ..checkpoint.layout import MAX_HEADER, count, sizes
from ..checkpoint.weights import weight_files
from ..errors import CheckpointError, ConfigError, suggest

__all__ = ["CheckpointSource", "FileSource", "Layout", "MemorySource", "Place", "Source", "open_source"]

PAGE = 4096
"""Bytes to which buffers, and reads past the page cache, are aligned."""
_ALIGN = 64
"""Bytes of a cache line: a tensor that starts there is read fastest."""
_PIECE = 4 * 2**20
"""Bytes of one read: small enough that two threads which share a block are done with it at about the same time."""
_DIRECT_PIECE = 16 * 2**20
"""The same past the page cache, where each read waits for the disk by itself."""
IO = ("cached", "direct", "drop")
_TORCH = {code: dtype for dtype, code in DTYPES.values() if code}


class Place(NamedTuple):
    """Where a tensor lies in a buffer, in bytes."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Run(NamedTuple):
    """Bytes that lie side by side, in the file as in the buffer."""

    path: Path
    start: int
    num_bytes: int
    offset: int
    direct: bool


@dataclass(frozen=True)
class Layout:
    """How a group of tensors lies in a buffer: `runs` are read as they are, `single` one by one (another type, or pieces)."""

    num_bytes: int
    places: Mapping[str, Place]
    runs: tuple[Run, ...] = ()
    single: tuple[str, ...] = ()

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """Return the tensor `name` as it lies in `buffer` (uint8), sharing its memory."""
        offset, dtype, shape = self.places[name]
        return buffer[offset : offset + count(list(shape)) * dtype.itemsize].view(dtype).view(shape)


class Source:
    """Named tensors somewhere. The base class reads one tensor at a time, by `read_into`."""

    def names(self) -> Iterable[str]:
        """Return all names."""
        raise NotImplementedError

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return (type, shape) as stored."""
        raise NotImplementedError

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out`, of the stored shape, on any device; types are converted."""
        raise NotImplementedError

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of `name` in memory of their own."""
        stored, shape = self.info(name)
        out = torch.empty(shape, dtype=dtype or stored)
        self.read_into(name, out)
        return out

    def layout(self, wanted: Mapping[str, torch.dtype]) -> Layout:
        """Say how the tensors `wanted` (name -> the type to have them in) lie in a buffer."""
        places: dict[str, Place] = {}
        end = _place_each(wanted, self.info, places, 0)
        return Layout(end, places, single=tuple(wanted))

    def parts(self, layout: Layout, buffer: Tensor) -> list[Callable[[], None]]:
        """Return what `fill` does as calls that several threads may share, in any order, each call once."""

        def singly() -> None:
            for name in layout.single:
                self.read_into(name, layout.view(buffer, name))

        return [singly] if layout.single else []

    def fill(self, layout: Layout, buffer: Tensor) -> None:
        """Read all tensors of `layout` into `buffer`: uint8, contiguous, on the CPU, page-aligned."""
        with torch.inference_mode(False), torch.no_grad():
            for part in self.parts(layout, buffer):
                part()

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether `tensor` is itself what `read_into` would copy."""
        return False

    def close(self) -> None:
        """Let go of files."""

    def __contains__(self, name: object) -> bool:
        return name in set(self.names())


def _place_each(
    wanted: Mapping[str, torch.dtype],
    info: Callable[[str], tuple[torch.dtype, tuple[int, ...]]],
    places: dict[str, Place],
    end: int,
) -> int:
    """Give each tensor a place of its own from byte `end` on; return the end of the last."""
    for name, dtype in wanted.items():
        shape = info(name)[1]
        offset = _up(end, _ALIGN)
        places[name] = Place(offset, dtype, shape)
        end = offset + count(list(shape)) * dtype.itemsize
    return end


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


class MemorySource(Source):
    """Tensors in host memory, such as a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        tensor = self._tensors[name]
        return tensor.dtype, tuple(tensor.shape)

    def read_into(self, name: str, out: Tensor) -> None:
        with torch.no_grad():
            out.copy_(self._tensors[name].detach())

    def holds(self, name: str, tensor: Tensor) -> bool:
        return self._tensors.get(name) is tensor

    def forget(self, keep: Iterable[str]) -> None:
        """Let go of all tensors but those named."""
        kept = set(keep)
        self._tensors = {n: t for n, t in self._tensors.items() if n in kept}


class CheckpointSource(Source):
    """The weights of one model in a committed checkpoint of ours, whoever wrote its pieces; each chunk's crc32 is checked."""

    def __init__(self, folder: Path, model: str | None = None) -> None:
        from ..checkpoint.reader import Checkpoint

        self._checkpoint = Checkpoint(folder)
        self._lock = threading.Lock()  # the reader takes one thread at a time
        models = sorted({name.split("/")[1] for name in self._checkpoint.names() if name.startswith("model/")})
        if model is None and len(models) != 1:
            raise ConfigError(f"{folder} holds the models {', '.join(models) or '(none)'}. Name one of them: model='...'.")
        if model is not None and model not in models:
            raise ConfigError(f"{folder} holds no model {model!r}.{suggest(model, models)} Its models: {', '.join(models)}.")
        self._prefix = f"model/{model or models[0]}/"

    def names(self) -> Iterable[str]:
        return [n.removeprefix(self._prefix) for n in self._checkpoint.names() if n.startswith(self._prefix)]

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        key = self._prefix + name
        return self._checkpoint.dtype(key), self._checkpoint.shape(key)

    def read_into(self, name: str, out: Tensor) -> None:
        with self._lock:
            self._checkpoint.read_into(self._prefix + name, out)

    def close(self) -> None:
        self._checkpoint.close()


class FileSource(Source):
    """Safetensors files.

    Args:
        files: name -> the file that holds it.
        io: "cached" reads through the page cache, which the system empties when memory is short; "drop" tells it after each
            piece that its pages are not needed again; "direct" reads past it (O_DIRECT).
    Raises:
        CheckpointError: a file is missing or no safetensors file. ConfigError: "direct" where the file system cannot.
    """

    def __init__(self, files: Mapping[str, Path], io: str = "cached") -> None:
        if io not in IO:
            raise ConfigError(f"io={io!r}: expected one of {', '.join(IO)}.{suggest(io, IO)}")
        self.io = io
        self._spans: dict[str, _Span] = {}
        self._open: dict[tuple[Path, bool], int] = {}
        for path in dict.fromkeys(files.values()):
            header = read_header(path)
            for name, span in header.items():
                if files.get(name) == path:
                    self._spans[name] = span
        if lost := [n for n in files if n not in self._spans]:
            raise CheckpointError(f"{files[lost[0]]} does not hold {lost[0]!r}, which the index says it does.")

    def names(self) -> Iterable[str]:
        return self._spans.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._spans

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        span = self._spans[name]
        return span.dtype, span.shape

    def layout(self, wanted: Mapping[str, torch.dtype]) -> Layout:
        direct = self.io == "direct"
        places: dict[str, Place] = {}
        runs: list[Run] = []
        plain = [n for n, dtype in wanted.items() if self._spans[n].dtype == dtype]
        end = 0
        for name in sorted(plain, key=lambda n: (self._spans[n].path, self._spans[n].start)):
            path, start, num_bytes, dtype, shape = self._spans[name]
            if runs and runs[-1].path == path and runs[-1].start + runs[-1].num_bytes == start:
                run = runs[-1]
                offset = run.offset + run.num_bytes
                if offset % dtype.itemsize == 0:
                    runs[-1] = run._replace(num_bytes=run.num_bytes + num_bytes)
                    places[name] = Place(offset, dtype, shape)
                    end = offset + num_bytes
                    continue
            past = direct and start % dtype.itemsize == 0
            # Past the page cache whole pages come: the place in the page is that in the file, and nothing else is in the page.
            whole_pages = past or (bool(runs) and runs[-1].direct)
            offset = _up(end, PAGE if whole_pages else _ALIGN) + (start % PAGE if past else 0)
            runs.append(Run(path, start, num_bytes, offset, past))
            places[name] = Place(offset, dtype, shape)
            end = offset + num_bytes
        converted = {n: dtype for n, dtype in wanted.items() if n not in places}
        if runs and runs[-1].direct:
            end = _up(end, PAGE)  # what the last page brings along
        end = _place_each(converted, self.info, places, end)
        return Layout(end, places, tuple(runs), tuple(converted))

    def parts(self, layout: Layout, buffer: Tensor) -> list[Callable[[], None]]:
        made: list[Callable[[], None]] = []
        for run in layout.runs:
            self._descriptor(run.path, run.direct)  # opened here, by one thread
            step = _DIRECT_PIECE if run.direct else _PIECE
            first = run.start // PAGE * PAGE if run.direct else run.start
            end = run.start + run.num_bytes
            last = _up(end, PAGE) if run.direct else end
            for start in range(first, last, step):
                size = min(step, last - start)
                needed = min(end - start, size) if run.direct else None
                made.append(partial(self._read, run.path, start, buffer, run.offset + start - run.start, size, needed))
        return [*made, *super().parts(layout, buffer)]

    def read_into(self, name: str, out: Tensor) -> None:
        path, start, num_bytes, dtype, shape = self._spans[name]
        plain = out.detach()
        with torch.no_grad():
            if plain.dtype == dtype and plain.device.type == "cpu" and plain.is_contiguous():
                self._read(path, start, plain.view(-1).view(torch.uint8), 0, num_bytes)
                return
            # By rows, so that a conversion needs little memory beside its result.
            rows = shape[0] if shape else 1
            row_bytes = num_bytes // rows if rows else 0
            step = max(1, _PIECE // row_bytes) if row_bytes else max(1, rows)
            target = plain if shape else plain.view(1)
            for row in range(0, rows if num_bytes else 0, step):
                part = torch.empty((min(step, rows - row), *shape[1:]), dtype=dtype)
                self._read(path, start + row * row_bytes, part.view(-1).view(torch.uint8), 0, part.numel() * dtype.itemsize)
                target[row : row + part.shape[0]].copy_(part)

    def _read(self, path: Path, start: int, buffer: Tensor, offset: int, num_bytes: int, needed: int | None = None) -> None:
        """Fill `buffer[offset:offset + num_bytes]` from byte `start`; past the end of a file only `needed` must come."""
        if num_bytes == 0:
            return
        if offset + num_bytes > buffer.numel():
            raise ValueError(f"{num_bytes} bytes at {offset} do not fit into a buffer of {buffer.numel()}")
        descriptor = self._descriptor(path, needed is not None)
        memory = (ctypes.c_char * num_bytes).from_address(buffer.data_ptr() + offset)
        target = memoryview(memory).cast("B")
        done = 0
        while done < (num_bytes if needed is None else needed):
            try:
                got = os.preadv(descriptor, [target[done:] if needed is not None else target[done : done + _PIECE]], start + done)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read at byte {start + done:,}: {error.strerror}.") from None
            if not got:
                raise CheckpointError(f"{path} ends at byte {start + done:,}: it was cut short since it was opened.")
            if self.io == "drop":
                os.posix_fadvise(descriptor, start + done, got, os.POSIX_FADV_DONTNEED)
            done += got

    def _descriptor(self, path: Path, direct: bool) -> int:
        key = (path, direct)
        if key not in self._open:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
            if direct and not hasattr(os, "O_DIRECT"):
                raise ConfigError(f"io='direct': this system cannot read {path} past the page cache. Use io='drop'.")
            try:
                self._open[key] = os.open(path, flags | (os.O_DIRECT if direct else 0))
            except OSError as error:
                if not direct:
                    raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from None
                raise ConfigError(
                    f"io='direct': the file system of {path} does not read past the page cache ({error.strerror}). Use io='drop'."
                ) from None
        return self._open[key]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


class _Span(NamedTuple):
    """Where a tensor's bytes lie."""

    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, _Span]:
    """Return where each tensor of a safetensors file lies.

    Raises:
        CheckpointError: there is no such file, it is no safetensors file, or it is shorter than its header says.
    """
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, total - 8):
                raise ValueError(f"its header is said to have {length:,} bytes, the file has {total:,}")
            content: dict[str, Any] = json.loads(file.read(length))
        content.pop("__metadata__", None)
        spans: dict[str, _Span] = {}
        for name, entry in content.items():
            start, end = sizes(entry["data_offsets"])
            shape, dtype = sizes(entry["shape"]), _TORCH[entry["dtype"]]
            if count(shape) * dtype.itemsize != end - start or end + 8 + length > total:
                raise ValueError(f"{name!r}: {entry['dtype']} {shape} is said to be bytes {start} to {end}")
            spans[name] = _Span(path, start + 8 + length, end - start, dtype, tuple(shape))
        return spans
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {type(error).__name__}: {error}.") from None


def open_source(checkpoint: str | os.PathLike[str], *, io: str = "cached", model: str | None = None) -> Source:
    """Open a safetensors file, a folder with one or with shards and an index, that index, or a checkpoint folder of ours.

    Args:
        model: which one, where a checkpoint of ours holds several.
    Raises:
        CheckpointError: there are no such weights. Pickled ones (pytorch_model.bin) are not read.
    """
    path = Path(checkpoint)
    if path.name.endswith(".index.json"):
        path = path.parent
    if (path / "manifest.json").is_file():
        if io != "cached":
            raise ConfigError(f"io={io!r}: the checksums of {path} are of 1 MiB each, which are read through the page cache.")
        return CheckpointSource(path, model)
    if not path.exists():
        raise CheckpointError(f"There is nothing at {path.absolute()}. Give a safetensors file, or the folder of one.")
    return FileSource(weight_files(path), io)
