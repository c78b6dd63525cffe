"""The rest of an epoch that another number of ranks or of workers began: read as they would have read it.

An iterable that shards itself gives another sequence to each number of ranks, and one that divides itself among workers to each
number of those: a position in one says nothing about the other. So what is left of the epoch is read from the streams it was
begun with, in turn (`Interleaved`): batch k of each stream in the order of the ranks, which is the order of the saved run. One
process holds them all; several ranks get their batches from rank 0. The next epoch is read as usual.

    of_all      from the states of all ranks: what this rank goes on with, or why it cannot
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ...strategies.errors import CheckpointError
from .stream import END, Stream

__all__ = ["Interleaved", "of_all", "part_of", "refused"]


class Interleaved:
    """Several streams as one: the first batch of each, then the second of each, past those that have ended.

    It offers what a `Stream` does, of which those who make micro-batches see `read` and `count` only.

    Args:
        drop: end with the first stream that ends: none of its round is given (DataLoaderConfiguration(uneven="drop")).
    """

    def __init__(self, streams: Sequence[Stream], *, drop: bool) -> None:
        self.streams = list(streams)
        self.drop = drop
        self._ended = [False] * len(self.streams)
        self._round: deque[tuple[int, Any]] = deque()
        self._out: deque[int] = deque()  # whose batches were read and not yet handed out

    def open(self, epoch: int, seed: int, parts: Sequence[Mapping[str, Any]], *, by_samples: bool) -> None:
        """Go on behind what `parts` say of each stream: "batches" (or "samples") and, if it has one, its "own" state."""
        self._ended = [False] * len(self.streams)
        self._round, self._out = deque(), deque()
        for stream, part in zip(self.streams, parts, strict=True):
            if by_samples:
                stream.open(epoch, seed, samples=part["samples"], saved=part.get("own"))
            else:
                stream.open(epoch, seed, batches=part["batches"], saved=part.get("own"))

    def read(self) -> Any:
        """Return the next batch, or `END`."""
        while not self._round:
            living = [i for i, ended in enumerate(self._ended) if not ended]
            if not living:
                return END
            level = min(self.streams[i].batches for i in living)
            for i in living:
                # Where a round was broken off, the first streams are one batch ahead of the others.
                if self.streams[i].batches == level:
                    batch = self.streams[i].read()
                    self._ended[i] = batch is END
                    if batch is not END:
                        self._round.append((i, batch))
            if self.drop and any(self._ended):
                self._ended = [True] * len(self.streams)
                self._round.clear()
        index, batch = self._round.popleft()
        self._out.append(index)
        return batch

    def count(self, batch: Any) -> int:
        """How many samples a batch has."""
        return self.streams[0].count(batch)

    def hand_out(self, batches: int) -> None:
        """Note that so many more batches have been given to the training."""
        for _ in range(batches):
            self.streams[self._out.popleft()].hand_out(1)

    def close(self) -> None:
        """Let go of the iterators and their workers."""
        for stream in self.streams:
            stream.close()

    def parts(self) -> list[dict[str, Any]]:
        """Return where each stream is, for `open`."""
        return [stream.part() for stream in self.streams]


def of_all(states: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    """Return one state for all that the ranks of the saved run had: with "parts", one for each stream of the epoch, if each
    rank read its own and all their states are there; else the one of shard `index`, or what there is.

    Args:
        states: of a loader, in the order of the ranks.
        index: which shard is asking.
    Raises:
        CheckpointError: several states, and that of some stream is missing.
    """
    first = states[0]
    if "parts" in first or not first.get("per_rank"):
        return first
    shards = first.get("shards", first.get("ranks", 1))
    by_shard: dict[int, dict[str, Any]] = {}
    for number, state in enumerate(states):
        by_shard.setdefault(state.get("shard", number), state)
    missing = [shard for shard in range(shards) if shard not in by_shard]
    if missing and len(states) > 1:
        raise CheckpointError(f"The states of {shards} ranks were expected, and there is none of shard {missing[0]}.")
    mine = by_shard.get(index, first)
    return mine if missing else {**mine, "parts": [part_of(by_shard[shard]) for shard in range(shards)]}


def part_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a rank's state that says where its own stream is."""
    return {name: state[name] for name in ("batches", "samples", "own") if name in state}


def refused(name: str, state: Mapping[str, Any], ranks: int) -> CheckpointError:
    """Return the error of a position that cannot be found again on `ranks` ranks."""
    return CheckpointError(
        f"The saved run had {state.get('ranks')} ranks, each with its own batches, and this one has {ranks}: of a "
        f"{name} only its rank knows what it reads, so that no other number of ranks can go on in the middle of an epoch. "
        f"Resume on {state.get('ranks')} ranks up to the epoch's end. What can go on on any number: a data set with indices, an "
        "iterable one that rank 0 reads for all (dispatch_batches=True), or one with shard(num_shards, index)."
    )
