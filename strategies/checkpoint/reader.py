"""Read a committed checkpoint: values and tensors, or any slice of a tensor, checked while they are read.

    checkpoint = store.open(42)
    checkpoint.tensor("model/main/weight")                               the whole tensor, whoever wrote its pieces
    checkpoint.tensor("model/main/weight", offset=(8, 0), shape=(4, 16)) what one rank of another sharding needs
    checkpoint.value("optimizer/0"), checkpoint.rank_value("loader", rank=1)

Nothing is believed before it is checked: names in the manifest are plain file names, files are opened without following
links, sizes are compared before memory is taken, each chunk's crc32 before its bytes are used. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .contents import VALUE_TENSORS, Contents
from .dtypes import DTYPES
from .layout import count, num_bytes
from .verified import Wanted
from .writer import bytes_of

__all__ = ["VALUE_TENSORS", "Checkpoint"]


class Checkpoint(Contents):
    """A committed checkpoint, open for reading. Use `with`, or call `close`; one thread at a time.

    Raises:
        CheckpointError: (from any method) a file is missing or differs from the manifest; the message names it.
    """

    # -- tensors ------------------------------------------------------------------------------------------------------
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

    def rank_tensor(self, name: str, rank: int) -> Tensor:
        """Return the tensor that `rank` saved under `name` for itself alone."""
        return self._read(name, self._pick(self._of_rank("rank_tensors", rank), name, f"tensor of rank {rank}"), None, None)

    # -- inside -------------------------------------------------------------------------------------------------------
    def _value_tensor(self, name: str) -> Tensor:
        return self.tensor(name)

    def _rank_value_tensor(self, name: str, rank: int) -> Tensor:
        return self.rank_tensor(name, rank)

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
