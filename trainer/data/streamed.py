"""Loaders without indices as a source: what `Loader` asks, whichever way the batches reach this rank.

`Streamed.plan` decides how a saved position is gone on from:
    as usual              the epoch was begun as it would be here
    with other workers    the stream is read with as many as it was begun with, until the epoch ends
    taken over            the epoch was begun as other streams: they are read in turn, for all ranks (handover.py)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ...strategies.errors import CheckpointError
from .counted import Counted
from .handover import Interleaved, of_all, part_of, refused
from .stream import Micro, Readable, Stream

__all__ = ["Streamed", "TakesOver"]


class TakesOver(NamedTuple):
    """How the rest of an epoch is read that was begun with other streams.

    Attributes:
        stream: (shard, shards, workers) -> that stream, read by so many workers.
        how: makes the micro-batches of all ranks from the streams in turn; None where only the workers may differ.
        reads: whether this rank reads them; False: it receives.
        can_shard: whether the data set can be cut into so many.
        drop: end with the first of them.
    """

    stream: Callable[[int, int, int], Stream]
    how: Callable[[Readable | None], Iterator[Micro]] | None = None
    reads: bool = True
    can_shard: Callable[[int], bool] = lambda shards: shards == 1
    drop: bool = False


class Streamed:
    """Ready batches in order. `how` makes the micro-batches of a pass from the opened stream.

    Attributes:
        stream: None on ranks that only receive.
        per_rank: each rank reads its own, so that its position and state are its own too.
        batch_samples: samples of a full micro-batch over all ranks; None until known.
        workers: processes that each read a part of the stream; 0 where their number does not change what comes.
        seed: of the random numbers drawn while reading; a checkpoint's takes its place on resume.
        running: what the running pass reads from.
    """

    regular = False

    def __init__(
        self,
        stream: Stream | None,
        how: Callable[[Readable | None], Iterator[Micro]],
        *,
        name: str,
        seed: int,
        shard: tuple[int, int],
        per_rank: bool,
        batch_samples: int | None,
        batch_size: int | None = None,
        length: int | None = None,
        workers: int = 0,
        takes_over: TakesOver | None = None,
    ) -> None:
        self.stream = stream
        self.how = how
        self.name = name
        self.seed = seed
        self.index, self.ranks = shard
        self.per_rank = per_rank
        self.batch_samples = batch_samples
        self.batch_size = batch_size
        self.length = length
        self.workers = workers
        self.takes_over = takes_over
        self.running: Stream | Interleaved | None = stream
        self._begun = (self.shards, workers)
        self.taken_over = False

    @property
    def shards(self) -> int:
        """Into how many streams an epoch is cut that begins here."""
        return self.ranks if self.per_rank else 1

    def begin(self, epoch: int, saved: dict[str, Any] | None) -> Iterator[Micro]:
        """Begin a pass, behind what the planned state had handed out."""
        state = saved or {}
        workers = state.get("workers", self.workers)
        self._begun = (state.get("shards", self.shards), workers)
        self.taken_over = "parts" in state
        changed = self.batch_size != state.get("batch_size", self.batch_size)
        if workers != self.workers and self.index == 0:
            warnings.warn(
                f"This epoch of {self.name} was begun with num_workers={workers}, which decides what comes when: the rest of it "
                f"is read with as many. The next epoch has num_workers={self.workers}.",
                stacklevel=2,
            )
        if self.taken_over:
            assert self.takes_over is not None
            assert self.takes_over.how is not None
            self.running = None
            if self.takes_over.reads:
                shards = len(state["parts"])
                streams = [self.takes_over.stream(shard, shards, workers) for shard in range(shards)]
                self.running = Interleaved(streams, drop=self.takes_over.drop)
                self.running.open(epoch, self.seed, state["parts"], by_samples=changed or shards == 1)
            return self.takes_over.how(self.running)
        stream = self.stream
        if stream is not None and workers != self.workers:
            assert self.takes_over is not None
            stream = self.takes_over.stream(self.index, self.shards, workers)
        self.running = stream
        if stream is not None:
            if saved is None:
                stream.open(epoch, self.seed)
            elif not self.per_rank:
                stream.open(epoch, self.seed, samples=saved["position"], saved=saved.get("own"))
            elif changed:
                stream.open(epoch, self.seed, samples=saved["samples"], saved=saved.get("own"))
            else:
                stream.open(epoch, self.seed, batches=saved["batches"], saved=saved.get("own"))
        return self.how(stream)

    def state(self, position: int) -> dict[str, Any]:
        """Return what is needed beside epoch, position and seed."""
        shards, workers = self._begun
        state: dict[str, Any] = {
            "ranks": self.ranks,
            "per_rank": self.per_rank and not self.taken_over,
            "shard": self.index,
            "shards": shards,
            "workers": workers,
            "batch_size": self.batch_size,
            "batches": 0,
        }
        if self.taken_over:
            state["parts"] = self.running.parts() if isinstance(self.running, Interleaved) else []
        elif isinstance(self.running, Stream):
            state |= self.running.part(position)
        return state

    def plan(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state that `begin` goes on from here, made of those of all ranks of the saved run, or of this rank's.

        Raises:
            CheckpointError: it cannot be gone on from on these ranks, or with these workers.
        """
        if not states[0]["position"]:
            return states[0]
        if self.stream is not None and isinstance(self.stream.stateful, Counted):
            return self._counted(states)
        take = self.takes_over
        found = of_all(states, self.index)
        parts = found.get("parts", [])
        shards = len(parts) or found.get("shards", found.get("ranks", 1) if found.get("per_rank") else 1)
        if shards == self.shards and ("parts" not in states[0] or len({part["batches"] for part in parts}) < 2):
            # Begun as it would be here; if others read it meanwhile, they have come equally far in all streams.
            own = parts[self.index if self.per_rank else 0] if parts else {}
            found = {**{name: value for name, value in found.items() if name != "parts"}, **own}
        elif take is None or take.how is None:
            raise refused(self.name, found, self.ranks)
        elif shards > 1 and (not parts if take.reads else "parts" not in found):
            raise CheckpointError(
                f"The epoch was begun on {shards} ranks, each with its own part of the data, and this is the state of one of "
                "them. Give those of all: loader.load_states([...]), in the order of the ranks."
            )
        elif not take.can_shard(shards):
            raise CheckpointError(
                f"The epoch was begun with {self.name} cut into {shards} parts, into which it cannot be cut now. Expected the "
                "data set of the saved run."
            )
        elif not take.reads:
            found = {**found, "parts": []}
        elif shards == 1:
            found = {**found, "parts": [{**part_of(found), **(parts or [{}])[0], "samples": found["position"]}]}
        self._check_workers(found)
        return found

    def _check_workers(self, found: dict[str, Any]) -> None:
        """Leave in `found` with how many workers to go on: those that the epoch was begun with, where it matters."""
        was = found.setdefault("workers", self.workers)
        size = found.get("batch_size")
        if max(was, self.workers) < 2 and "own" not in found and not any("own" in part for part in found.get("parts", ())):
            found["workers"] = self.workers  # one worker reads what none reads
        elif was != self.workers and self.takes_over is None:
            raise CheckpointError(
                f"{was} workers read {self.name} in the saved run, each its own part, and here {self.workers}: the batches are "
                f"others. Resume with num_workers={was}."
            )
        if was > 1 and size is not None and size != self.batch_size:
            raise CheckpointError(
                f"{was} workers made batches of {size} of {self.name} in the saved run, and here they are to be of "
                f"{self.batch_size}: other samples would lie before the position. Resume with batch_size={size}."
            )

    def _counted(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A data set that is told its position goes on from it on any number of ranks and workers."""
        found = dict(states[0] if len(states) <= self.index else states[self.index])
        own = found.get("own")
        if own is None:
            raise CheckpointError(
                f"The checkpoint holds no state of {self.name}. Expected one that was saved with this data set."
            )
        samples = own["samples"] if self.per_rank else found["position"]
        found["own"] = {**own, "samples": samples}
        return {**found, "batches": own["batches"], "shards": self.shards, "workers": self.workers}
