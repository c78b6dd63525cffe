"""Rank 0 reads, every other rank gets its slice: for iterables that cannot shard themselves.

A message is a header of six integers (what, real samples, samples of all ranks, is it the last, bytes of the structure, bytes of
the tensors) and then those bytes. The structure is pickled without the tensors, which travel as they lie in memory.
Each rank is sent its own part only, so rank 0 sends every byte once. An error of rank 0 is a message too: nobody waits
for a rank that is gone. The messages go over a gloo group of their own, from the thread that trains.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...strategies.errors import DataError
from .stream import Group, Micro

__all__ = ["Dispatch", "pack", "unpack"]

_END, _BATCH, _ERROR = 0, 1, 2
_ALIGN = 16
_PATIENCE_S = 5
_KEEP = 4  # messages a rank that may be under way: two micro-batches


class Dispatch:
    """Sends and receives micro-batches between the ranks of one World.

    Args:
        shards: for each rank, which part of a micro-batch is its own (several ranks may share one).
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, shards: Sequence[int]) -> None:
        self.group = group
        self.rank = rank
        self.shards = list(shards)
        self._sending: list[tuple[Any, Tensor]] = []

    def send(self, micro_batches: Iterator[Group]) -> Iterator[Micro]:
        """Rank 0: send each rank its part of every micro-batch and yield this rank's."""
        patience: timedelta | None = timedelta(seconds=_PATIENCE_S)
        try:
            for parts, is_last, batches in micro_batches:
                total = sum(count for _, count in parts)
                packed: dict[int, tuple[bytes, Tensor]] = {}
                for rank, shard in enumerate(self.shards):
                    if rank != self.rank:
                        batch, count = parts[shard]
                        if shard not in packed:
                            packed[shard] = pack(batch)
                        self._send(rank, _BATCH, *packed[shard], count, total, is_last)
                batch, count = parts[self.shards[self.rank]]
                yield Micro(batch, count, total, is_last, batches)
                if is_last:
                    break
            else:
                self._tell_all(_END)
            patience = None
        except Exception as error:
            self._tell_all(_ERROR, f"{type(error).__name__}: {error}".encode())
            raise
        finally:
            self._wait(patience)

    def receive(self) -> Iterator[Micro]:
        """The other ranks: yield what rank 0 sends.

        Raises:
            DataError: rank 0 could not read.
        """
        header = torch.empty(6, dtype=torch.int64)
        while True:
            dist.recv(header, group_src=0, group=self.group)
            what, count, total, is_last, structure, payload = header.tolist()
            if what == _END:
                return
            blob = torch.empty(structure + payload, dtype=torch.uint8)
            if len(blob):
                dist.recv(blob, group_src=0, group=self.group)
            described = bytes(blob[:structure].tolist())
            if what == _ERROR:
                raise DataError(
                    f"[rank {self.rank}/{len(self.shards)}] rank 0, which reads for all, could not go on: {described.decode()}"
                )
            yield Micro(unpack(described, blob[structure:]), count, total, bool(is_last), 0)
            if is_last:
                return

    def _send(
        self, rank: int, what: int, structure: bytes, tensors: Tensor, count: int = 0, total: int = 0, is_last: bool = False
    ) -> None:
        header = torch.tensor([what, count, total, int(is_last), len(structure), len(tensors)], dtype=torch.int64)
        self._post(rank, header)
        if structure or len(tensors):
            self._post(rank, torch.cat([torch.frombuffer(bytearray(structure), dtype=torch.uint8), tensors]))

    def _post(self, rank: int, tensor: Tensor) -> None:
        # Memory that is being sent must stay alive, and waiting here would hold rank 0 up until the slowest has come.
        if len(self._sending) > _KEEP * len(self.shards):
            for work, _ in self._sending[: -2 * len(self.shards)]:
                work.wait()
            self._sending = self._sending[-2 * len(self.shards) :]
        self._sending.append((dist.isend(tensor, group_dst=rank, group=self.group), tensor))

    def _tell_all(self, what: int, text: bytes = b"") -> None:
        for rank in range(len(self.shards)):
            if rank != self.rank:
                self._send(rank, what, text, torch.empty(0, dtype=torch.uint8))

    def _wait(self, patience: timedelta | None) -> None:
        """Let what was sent arrive: this process may end right after. After a break not for long, ranks may be gone."""
        with contextlib.suppress(RuntimeError) if patience else contextlib.nullcontext():
            for work, _ in self._sending:
                work.wait(*[patience] if patience else [])
        self._sending = []


def pack(batch: Any) -> tuple[bytes, Tensor]:
    """Take a batch apart into its structure (pickled, between ranks of one run only) and the bytes of its tensors."""
    buffer = io.BytesIO()
    packer = _Packer(buffer)
    packer.dump(batch)
    payload = torch.empty(packer.size, dtype=torch.uint8)
    for tensor, at in packer.found:
        if tensor.numel():
            payload[at : at + tensor.nbytes] = tensor.contiguous().reshape(-1).view(torch.uint8)
    return buffer.getvalue(), payload


def unpack(structure: bytes, payload: Tensor) -> Any:
    """Put a batch together again; its tensors have memory of their own."""
    return _Unpacker(io.BytesIO(structure), payload).load()


class _Packer(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.found: list[tuple[Tensor, int]] = []
        self.size = 0

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.device.type != "cpu" or obj.layout is not torch.strided or obj.is_quantized:
            return None
        tensor, at = obj.detach().resolve_conj().resolve_neg(), self.size
        self.found.append((tensor, at))
        self.size += -(-tensor.nbytes // _ALIGN) * _ALIGN
        return at, tensor.nbytes, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, payload: Tensor) -> None:
        super().__init__(buffer)
        self.payload = payload

    def persistent_load(self, pid: Any) -> Tensor:
        at, size, dtype, shape = pid
        if not size:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return self.payload[at : at + size].clone().view(getattr(torch, dtype)).reshape(shape)
