"""Bare weights behind a URL (weights.py): the same files and the same bytes, written and read without a rename or a map.

    saving    the index goes first, and what else would be taken for weights; then the files; the index is put last
    reading   the header, and then the bytes of a tensor, or of the rows of it that are wanted, by ranges
So whoever reads meanwhile finds the old weights, none, or the new ones, never some of both. Unlike on a disk the old ones are
gone when a save breaks off: what must not be lost belongs into a folder of its own. One file alone is there once its put is over;
where a file system shows it sooner, its header says that it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .dtypes import DTYPES
from .urls import UrlFile, UrlPath
from .verified import Span, parse_header
from .writer import Deferred, TensorFile, bytes_of, write_json

_TYPES = {code: dtype for dtype, code in DTYPES.values() if code}


def write_weights(
    folder: UrlPath,
    files: Mapping[str, Sequence[str]],
    index: tuple[str, Mapping[str, Any]],
    read: Callable[[Sequence[str]], Mapping[str, Tensor | Deferred]],
    metadata: Mapping[str, str] | None,
    is_weights: Callable[[str], bool],
) -> list[UrlPath]:
    """Write files (name -> the tensors in it) and, where there are several, the index (its name, its content) last.

    Args:
        read: see `save_weights`;  is_weights: whether a name in the folder is that of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / index[0]).unlink(missing_ok=True)
    for old in list(folder.iterdir()):
        if is_weights(old.name):
            old.unlink(missing_ok=True)
    written: list[UrlPath] = []
    try:
        for name, names in files.items():
            written.append(folder / name)
            TensorFile(read(names), metadata).write(written[-1])
        if len(files) > 1:
            written.append(folder / index[0])
            write_json(written[-1], index[1])
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


class UrlTensors:
    """A safetensors file behind a URL, open for reading: what `safe_open` gives for one of this machine.

    Raises:
        CheckpointError: (from any method) it is not there, is no safetensors file, or is cut.
    """

    def __init__(self, path: UrlPath) -> None:
        self._path, self._file = path, UrlFile(path)
        try:
            self._spans = parse_header(self.read_into, self._file.size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {type(error).__name__}: {error}.") from None

    def __enter__(self) -> UrlTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self._spans)

    def get_tensor(self, name: str) -> Tensor:
        return UrlSlice(self, self._spans[name])[:]

    def get_slice(self, name: str) -> UrlSlice:
        return UrlSlice(self, self._spans[name])

    def read_into(self, start: int, target: memoryview) -> None:
        while len(target):
            n = self._file.readv(start, [target])
            if not n:
                raise CheckpointError(f"{self._path} ends at byte {start:,}: it was cut, or changed while it was read.")
            start, target = start + n, target[n:]


class UrlSlice:
    """One tensor of a `UrlTensors`, of which any part can be taken."""

    def __init__(self, file: UrlTensors, span: Span) -> None:
        self._file, self._span = file, span

    def get_shape(self) -> list[int]:
        return list(self._span.shape)

    def __getitem__(self, wanted: slice | tuple[slice, ...]) -> Tensor:
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        code, shape, start, end = self._span
        dtype = _TYPES[code]
        first, last = 0, 1
        if shape:  # rows of dimension 0 lie one after the other: read those that are wanted, cut the rest in memory
            first, last, _ = wanted[0].indices(shape[0])
            last = max(first, last)
        row = (end - start) // (shape[0] or 1) if shape else end - start
        out = torch.empty((last - first) * row, dtype=torch.uint8)
        self._file.read_into(start + first * row, bytes_of(out))
        rows = out.view(dtype).view([last - first, *shape[1:]] if shape else [])
        return rows[(slice(None), *wanted[1:])].contiguous() if shape and len(wanted) > 1 else rows
