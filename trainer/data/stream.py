"""Loaders without indices: an iterable of ready batches, read in order, whose position is what was handed out.

    Stream    one pass over the iterable: reads, counts, keeps the state of what has one, reads on after a resume
    alone     one process: a batch is a micro-batch
    beside    each rank has its own iterable: the ranks agree, batch by batch, on how many samples there were and on the end
    groups    one iterable for all ranks: W batches (or one batch cut into W parts) make a micro-batch
Each of these looks one batch ahead, to know the last one. What was read ahead does not count as consumed.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...strategies.errors import CheckpointError, ConfigError, DataError
from .counted import Counted
from .randomness import isolated, mix, seeded
from .reading import signals_held_back, stop_workers
from .sharding import parts
from .state import from_json, to_json

__all__ = ["END", "Micro", "Readable", "Stream", "alone", "beside", "count_samples", "cut", "groups"]

END = object()
_SNAPSHOT_EVERY = 16
"""Batches between two calls of the iterable's state_dict(), which costs 30 to 500 us: a resume drops at most so many."""


class Readable(Protocol):
    """What micro-batches are made of: a `Stream`, or several in turn (handover.py)."""

    def read(self) -> Any: ...
    def count(self, batch: Any) -> int: ...


class Micro(NamedTuple):
    """A micro-batch on its way to the loop."""

    batch: Any
    num_samples: int
    global_samples: int
    is_last: bool
    batches: int
    """How many batches of the stream it used."""


@dataclass
class Snapshot:
    """The iterable's own state, after `batches` batches with `samples` samples of the epoch."""

    batches: int
    samples: int
    state: Any


class Stream:
    """An iterable of ready batches.

    Args:
        source: iterated once an epoch; a function is called once an epoch and returns the iterator.
        stateful: the loader or data set whose state_dict/load_state_dict hold the position, or a data set's `Counted`; None:
            the iterator is asked, if it has get_state/set_state (grain's have); else resuming reads and drops.
        seeded: random numbers drawn while reading in this process depend on (seed, epoch, batch) only; False: left alone.
        shard: which of several streams it is, whose random numbers are to differ; None: the only one.
        in_workers: only starting the iterator draws here, its workers do the reading.
        batch_size: most samples of a batch, where known.
    """

    def __init__(
        self,
        source: Any,
        *,
        stateful: Any | None = None,
        seeded: bool = True,
        shard: int | None = None,
        in_workers: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.source = source
        self.stateful = stateful
        self.seeded = seeded
        self.shard = shard
        self.in_workers = in_workers
        self.batch_size = batch_size
        self.batches = 0  # read so far in this epoch, dropped and looked ahead ones included
        self.samples = 0
        self.consumed = 0  # batches that were handed out, and their samples
        self.consumed_samples = 0
        self.last: Any = END  # the batch before the one that a resumed pass goes on with
        self._ahead: deque[int] = deque()  # samples of each batch that was read and not handed out
        self._key = 0
        self._iterator: Iterator[Any] | None = None
        self._cursor: Any = None
        self._spent: Any = None
        generator = getattr(source, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._generator_seed = 0 if self._generator is None else self._generator.initial_seed()
        self._snapshots: list[Snapshot] = []

    def open(self, epoch: int, seed: int, *, batches: int | None = None, samples: int | None = None, saved: Any = None) -> None:
        """Begin a pass; after a resume, go on behind `batches` batches (or behind `samples` samples) of the epoch.

        Raises:
            CheckpointError: the iterable ended before that position, or has no batch that ends there.
            DataError: an iterator that can be run through only once is run through again.
        """
        self.batches = self.samples = 0
        self._iterator = None
        self._snapshots = []
        self._key = mix(seed if self.shard is None else mix(seed, self.shard), epoch)
        state = None if saved is None else from_json(saved["state"])
        if saved is not None and self.stateful is not None:
            self.batches, self.samples = saved["batches"], saved["samples"]
        if isinstance(self.stateful, Counted):
            self.stateful.begin(epoch, state)
        elif state is not None and self.stateful is not None:
            self.stateful.load_state_dict(state)
        for owner in (self.source, getattr(self.source, "dataset", None)):
            set_epoch = getattr(owner, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        # The workers' seeds come from the loader's generator, if it has one, and must be those of this epoch.
        held_back = signals_held_back() if self.in_workers else contextlib.nullcontext()
        with held_back, self._isolated(), seeded(self._generator, mix(self._generator_seed, epoch)):
            self._iterator = self._new_iterator()
        self._cursor = self._iterator if self.stateful is None and _has_cursor(self._iterator) else None
        if saved is not None and self._cursor is not None:
            self.batches, self.samples = saved["batches"], saved["samples"]
            if isinstance(state, dict) and set(state) == {"bytes"}:
                state = bytes(state["bytes"].tolist())
            self._cursor.set_state(state)
        self.last = END
        while (batches is not None and self.batches < batches) or (samples is not None and self.samples < samples):
            batch = self.read()
            self.last = batch if batch is not END else self.last
            if batch is END:
                raise CheckpointError(
                    f"The position is {batches if batches is not None else samples} "
                    f"{'batches' if batches is not None else 'samples'} into "
                    f"epoch {epoch}, and {_name(self.source)} ended after {self.batches} batches with {self.samples} samples. "
                    "Expected the data "
                    "of the saved run. Give it the same data, or start a new run."
                )
        self.consumed, self.consumed_samples = self.batches, self.samples
        self._ahead.clear()
        if samples is not None and self.samples != samples:
            raise CheckpointError(
                f"The position is {samples} samples into epoch {epoch}, and {_name(self.source)} has no batch that ends there. "
                "Expected the batch size of the saved run."
            )

    def _new_iterator(self) -> Iterator[Any]:
        source: Any = self.source
        iterator: Iterator[Any] = iter(source if hasattr(source, "__iter__") else source())
        if iterator is source and self.stateful is None:
            if self._spent is source:
                raise DataError(
                    f"A {_name(source)} can be run through only once, and a second epoch was asked for. Expected something "
                    "that starts "
                    "anew: a DataLoader, a list of batches, or the function that makes the iterator (without calling it)."
                )
            self._spent = source
        return iterator

    def read(self) -> Any:
        """Return the next batch, or `END`."""
        assert self._iterator is not None
        asked = None if isinstance(self.stateful, Counted) else self.stateful
        if self.batches % _SNAPSHOT_EVERY == 0 and (asked is not None or self._cursor is not None):
            older = [snapshot for snapshot in self._snapshots if snapshot.batches < self.consumed]
            self._snapshots = older[-1:] + self._snapshots[len(older) :]
            state = self._cursor.get_state() if asked is None else asked.state_dict()
            self._snapshots.append(Snapshot(self.batches, self.samples, copy.deepcopy(state)))
        with self._isolated():
            batch = next(self._iterator, END)
        if batch is not END:
            count = self.count(batch)
            self.batches += 1
            self.samples += count
            self._ahead.append(count)
        return batch

    def hand_out(self, batches: int) -> None:
        """Note that so many more batches have been given to the training: a position counts these."""
        self.consumed += batches
        for _ in range(batches):
            self.consumed_samples += self._ahead.popleft()

    def count(self, batch: Any) -> int:
        """How many samples a batch of this stream has: see `count_samples`, which cannot know a list of loose samples."""
        count = count_samples(batch)
        if self.batch_size is not None and count > self.batch_size:
            return len(batch) if isinstance(batch, list | tuple) and len(batch) <= self.batch_size else self.batch_size
        return count

    def close(self) -> None:
        """Let go of the iterator, and of its workers unless they persist."""
        if self._iterator is not None and not getattr(self.source, "persistent_workers", False):
            stop_workers(self._iterator)
        self._iterator = None

    def part(self, position: int = 0) -> dict[str, Any]:
        """Return what of this stream was handed out: "batches", "samples", and "own", the newest state of the iterable from
        which reading on leads there, if it has one.

        Args:
            position: samples of all ranks, which is what a `Counted` is asked about.
        """
        found: dict[str, Any] = {"batches": self.consumed, "samples": self.consumed_samples}
        if isinstance(self.stateful, Counted):
            newest = Snapshot(self.consumed, self.consumed_samples, self.stateful.state_after(position))
        else:
            # From before the last batch, which is read again: where a rank has no more of its own, it is handed out to count 0.
            fitting = [s for s in self._snapshots if s.batches < self.consumed] or self._snapshots[:1]
            newest = fitting[-1] if fitting else None
        if newest is not None:
            state = newest.state
            if isinstance(state, bytes):
                state = {"bytes": torch.frombuffer(bytearray(state), dtype=torch.uint8)}
            with contextlib.suppress(ConfigError) if self._cursor is not None else contextlib.nullcontext():
                # An iterator's state may hold anything. Without it, what was used up is read again.
                encoded = to_json(state, f"{_name(self.stateful)}.state")
                found["own"] = {"batches": newest.batches, "samples": newest.samples, "state": encoded}
        return found

    def _isolated(self) -> contextlib.AbstractContextManager[None]:
        if not self.seeded or (self.in_workers and self._iterator is not None):
            return contextlib.nullcontext()
        return isolated(mix(self._key, self.batches))


def alone(stream: Readable) -> Iterator[Micro]:
    """One process: every batch, and whether it is the last."""
    batch = stream.read()
    while batch is not END:
        following = stream.read()
        count = stream.count(batch)
        yield Micro(batch, count, count, following is END, 1)
        batch = following


def beside(
    stream: Stream, agree: Callable[[list[int]], list[int]], *, ranks: int, counts_here: bool, drop: bool
) -> Iterator[Micro]:
    """This rank's own batches, in step with the others'.

    Args:
        agree: sums a list of numbers over all ranks; called once a micro-batch on every rank.
        counts_here: whether this rank's samples are counted (False: another rank reads the same ones).
        drop: stop when the first rank ends; False: until the last one does, the others hand out an old batch that counts 0.
    Raises:
        DataError: on every rank, when some rank has no batch at all and others have.
    """
    held = stream.last
    batch = stream.read()
    while True:
        following = END if batch is END else stream.read()
        here = batch is not END
        count = stream.count(batch) if here else 0
        total, living, going_on, empty = agree([count * counts_here, here, following is not END, held is END and not here])
        if living == 0 or (drop and living < ranks):
            return
        if empty:
            raise DataError(
                f"{empty} of {ranks} ranks have no batch at all{'' if here else ', this one among them'}. Expected at least "
                "one on each. "
                "Cut the data into more shards, or let rank 0 read them: DataLoaderConfiguration(dispatch_batches=True)."
            )
        if here:
            held = batch
        is_last = going_on < ranks if drop else going_on == 0
        yield Micro(held, count, total, is_last, int(here))
        if is_last:
            return
        batch = following


class Group(NamedTuple):
    """A micro-batch of all ranks: (batch, real samples) for each."""

    parts: list[tuple[Any, int]]
    is_last: bool
    batches: int


def groups(stream: Readable, ranks: int, *, split: bool) -> Iterator[Group]:
    """The micro-batches of one iterable for all ranks: W batches each, or (split) one batch in W parts.

    At the end a rank without a batch gets the first sample of the first rank's, to count for nothing.
    """
    batch = stream.read()
    while batch is not END:
        if split:
            held, used = cut(batch, parts(stream.count(batch), ranks)), 1
            batch = stream.read()
        else:
            held = []
            while batch is not END and len(held) < ranks:
                held.append((batch, stream.count(batch)))
                batch = stream.read()
            used = len(held)
            if used < ranks:
                first, count = held[0]
                held += [(_slice(first, count, 0, 1, []), 0)] * (ranks - used)
        yield Group(held, batch is END, used)


def cut(batch: Any, counts: list[int]) -> list[tuple[Any, int]]:
    """Cut a batch along its samples into parts of the given sizes; a part of size 0 holds one sample that is not counted.

    Tensors, arrays and lists whose length is the batch's are cut, nested as they may be; other values go to every part.
    Raises:
        DataError: nothing in it could be cut.
    """
    total, at, found = sum(counts), 0, []
    pieces = []
    for count in counts:
        begin, end = (at, at + count) if count else (0, 1)
        pieces.append((_slice(batch, total, begin, end, found), count))
        at += count
    if not found:
        raise DataError(
            f"A batch of type {_name(batch)} cannot be cut into {len(counts)} parts: no tensor, array or list of {total} in it. "
            "Expected nested dicts, lists or tuples of tensors. Use split_batches=False, which sends whole batches."
        )
    return pieces


def _slice(value: Any, total: int, begin: int, end: int, found: list[bool]) -> Any:
    if isinstance(value, Mapping):
        items = {key: _slice(item, total, begin, end, found) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # pyright: ignore[reportCallIssue]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_slice(item, total, begin, end, found) for item in value))
    shape = getattr(value, "shape", None)
    if shape is not None:
        if len(shape) and shape[0] == total:
            found.append(True)
            return value[begin:end]
        return value
    if isinstance(value, list | tuple):
        if any(isinstance(item, Tensor | Mapping | list | tuple) or hasattr(item, "shape") for item in value):
            return type(value)(_slice(item, total, begin, end, found) for item in value)
        if len(value) == total:
            found.append(True)
            return value[begin:end]
    return value


def count_samples(batch: Any) -> int:
    """Return how many samples a batch has: dim 0 of the first tensor in it, else the length of its first list, else 1.

    >>> count_samples({"x": torch.zeros(4, 2), "y": [1, 2, 3, 4]}), count_samples(["a", "b", "c"])
    (4, 3)
    """
    found = next(_lengths(batch), None)
    if found is None:
        found = len(batch) if isinstance(batch, list | tuple) else 1
    return found


def _lengths(value: Any) -> Iterator[int]:
    shape = getattr(value, "shape", None)
    if shape is not None:
        if len(shape):
            yield int(shape[0])
        return
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    for item in inner:
        yield from _lengths(item)
    if isinstance(value, Mapping):
        yield from (len(item) for item in value.values() if isinstance(item, list | tuple))


def _has_cursor(iterator: Any) -> bool:
    """Whether an iterator can say where it is, and be set there: get_state() and set_state(state)."""
    return callable(getattr(iterator, "get_state", None)) and callable(getattr(iterator, "set_state", None))


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
