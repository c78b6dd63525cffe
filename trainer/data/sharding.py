"""Which samples come when, and on which rank: arithmetic on indices, no data.

    order     the epoch's indices, a function of (seed, epoch) alone: permutation, sequence, or any sampler replayed
    cut       a micro-batch is the next B*W of them; rank r of W takes its contiguous slice of B
    the rest  the last, ragged micro-batch is cut into contiguous nearly equal parts, as numpy.array_split does:
              7 left on 4 ranks -> 2 2 2 1.  A rank that would get none reads one sample again, and counts 0 for it.
So the union over ranks of a micro-batch is what one rank with batch B*W would read, nothing is duplicated and nothing is left
out, and a position is a plain number of samples, whatever the number of ranks. Read `Uniform.plan` first.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...strategies.errors import DataError
from .randomness import isolated, mix, seeded

__all__ = ["Batches", "Order", "Plan", "Replayed", "Request", "Sequential", "Shuffled", "Uniform", "parts"]

Request = tuple[int, int, list[Any]]
"""What is asked of a reader: (the epoch's key for random numbers, samples of the epoch before these, their indices)."""
_CHUNK = 256
"""Batches whose index tensors are made in one go: enough to make the cost per batch small, few enough to cost no memory."""


class Order(Protocol):
    """The indices of an epoch, in order."""

    seed: int
    """Decides the order together with the epoch; a checkpoint's takes its place on resume."""

    @property
    def repeats(self) -> bool:
        """Whether an index may come more than once an epoch."""
        ...

    def length(self, epoch: int) -> int: ...

    def indices(self, epoch: int) -> Tensor | list[Any]: ...


class Sequential:
    """0, 1, 2, ...: what `shuffle=False` gives. `size` is asked again each epoch, since a data set may grow."""

    repeats = False

    def __init__(self, data_source: Any, seed: int) -> None:
        self.data_source = data_source
        self.seed = seed

    def length(self, epoch: int) -> int:
        return len(self.data_source)

    def indices(self, epoch: int) -> Tensor:
        return torch.arange(len(self.data_source))


class Shuffled:
    """What `shuffle=True` and RandomSampler give: a permutation from (seed, epoch), the same on any number of ranks.

    By hand: `torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))`.
    """

    def __init__(self, data_source: Any, seed: int, *, replacement: bool = False, num_samples: int | None = None) -> None:
        self.data_source = data_source
        self.seed = seed
        self.replacement = replacement
        self.num_samples = num_samples

    @property
    def repeats(self) -> bool:
        return self.replacement or (self.num_samples is not None and self.num_samples > len(self.data_source))

    def length(self, epoch: int) -> int:
        return len(self.data_source) if self.num_samples is None else self.num_samples

    def indices(self, epoch: int) -> Tensor:
        n, wanted = len(self.data_source), self.length(epoch)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        if n == 0:
            return torch.empty(0, dtype=torch.int64)
        if self.replacement:
            return torch.randint(n, (wanted,), generator=generator)
        if wanted == n:
            return torch.randperm(n, generator=generator)
        whole = [torch.randperm(n, generator=generator) for _ in range(math.ceil(wanted / n))]
        return torch.cat(whole)[:wanted] if whole else torch.empty(0, dtype=torch.int64)


class Replayed:
    """Any other sampler or batch sampler: its indices of an epoch are listed before the epoch, no data are read.

    It runs with python's, numpy's, torch's and its own `generator` seeded from (seed, epoch), and leaves the global ones
    as they were, so that its order is the same on every rank and after a resume. One that keeps its order somewhere else
    is run through the epochs before, from a copy made when the loader was prepared; `set_epoch` is called where it has it.
    """

    repeats = True

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler: Any = sampler
        self.generator = getattr(sampler, "generator", None)
        if not isinstance(self.generator, torch.Generator):
            self.generator = None
        self.seed = seed
        self.set_epoch = getattr(sampler, "set_epoch", None)
        self._fresh: Any = None if self.set_epoch else _copy(sampler)
        self._next = 0
        self._kept: tuple[tuple[int, int], list[Any]] | None = None

    def length(self, epoch: int) -> int:
        return len(self.indices(epoch))

    def indices(self, epoch: int) -> list[Any]:
        if self._kept is None or self._kept[0] != (self.seed, epoch):
            self._kept = ((self.seed, epoch), self._list(epoch))
        return self._kept[1]

    def _list(self, epoch: int) -> list[Any]:
        if self.set_epoch is not None:
            self.set_epoch(epoch)
            return self._run(epoch)
        if epoch < self._next and self._fresh is not None:
            self.sampler, self._next = _copy(self._fresh), 0
            self.generator = getattr(self.sampler, "generator", None) if self.generator is not None else None
        for earlier in range(self._next, epoch):
            self._run(earlier)
        self._next = epoch + 1
        return self._run(epoch)

    def _run(self, epoch: int) -> list[Any]:
        key = mix(self.seed, epoch)
        declared = len(self.sampler)
        limit = 10 * declared + 1000
        with isolated(key), seeded(self.generator, key):
            found = list(itertools.islice(iter(self.sampler), limit + 1))
        if len(found) > limit:
            raise DataError(
                f"{type(self.sampler).__name__} says that it has {declared} entries and gave more than {limit}. Expected a "
                "sampler "
                "that ends: its epoch is listed before it is read. Endless data go in an IterableDataset."
            )
        return found


def _copy(sampler: Any) -> Any | None:
    """Copy a sampler without the data set that it may hold; None when it cannot be copied."""
    held = {id(v): v for v in getattr(sampler, "__dict__", {}).values() if isinstance(v, Dataset)}
    try:
        return copy.deepcopy(sampler, held)
    except Exception:  # whatever somebody else's object raises, it only means that going back is not possible
        return None


def parts(count: int, ranks: int) -> list[int]:
    """Return how many of `count` samples each of `ranks` gets: nearly equal, the first ones one more.

    >>> parts(7, 4), parts(1, 3)
    ([2, 2, 2, 1], [1, 0, 0])
    """
    each, more = divmod(count, ranks)
    return [each + (rank < more) for rank in range(ranks)]


@dataclass(frozen=True)
class Plan:
    """One pass over (the rest of) an epoch, as this rank sees it.

    Attributes:
        indices: the whole epoch's, in order, for all ranks.
        start, stop: samples of the epoch before the pass and at its end, over all ranks.
        counts: for each micro-batch (real samples on this rank, real samples over all ranks).
    """

    indices: Tensor | list[Any]
    start: int
    stop: int
    counts: Iterable[tuple[int, int]]


@dataclass(frozen=True)
class Uniform:
    """Micro-batches of B*W samples, for rank `index` of `ranks`."""

    batch_size: int
    drop_last: bool
    index: int = 0
    ranks: int = 1

    @property
    def together(self) -> int:
        """Samples of a full micro-batch over all ranks."""
        return self.batch_size * self.ranks

    def batches(self, length: int, limit: int | None = None) -> int:
        """How many micro-batches an epoch of `length` samples has."""
        count = length // self.together if self.drop_last else math.ceil(length / self.together)
        return count if limit is None else min(count, limit)

    def stop(self, length: int, start: int = 0, limit: int | None = None) -> int:
        """At which sample an epoch ends that goes on at `start`.

        `start` need not be a multiple of B*W: another number of ranks may have come so far.
        """
        end = length
        if self.drop_last:
            end = start + max(0, length - start) // self.together * self.together
        return end if limit is None else min(end, limit * self.together)

    def plan(self, indices: Tensor | list[Any], start: int = 0, limit: int | None = None) -> Plan:
        """Lay out the pass from sample `start` on, of at most `limit` micro-batches counted from the epoch's first."""
        stop = self.stop(len(indices), start, limit)
        full, rest = divmod(max(0, stop - start), self.together)
        counts: Iterable[tuple[int, int]] = itertools.repeat((self.batch_size, self.together), full)
        if rest:
            counts = itertools.chain(counts, [(parts(rest, self.ranks)[self.index], rest)])
        return Plan(indices, start, max(start, stop), counts)

    def requests(self, plan: Plan, key: int) -> Iterator[Request]:
        """The indices that this rank reads, batch by batch."""
        indices, size, together = plan.indices, self.batch_size, self.together
        whole = plan.start + (plan.stop - plan.start) // together * together
        first = plan.start + self.index * size
        if isinstance(indices, Tensor):
            # A list is sliced ten times as fast as a tensor; a few batches at a time, so that it never holds the whole epoch.
            for block in range(first, whole, together * _CHUNK):
                listed = indices[block : min(block + together * _CHUNK, whole)].tolist()
                for at in range(0, min(together * _CHUNK, whole - block), together):
                    yield key, block + at, listed[at : at + size]
        else:
            for at in range(first, whole, together):
                yield key, at, indices[at : at + size]
        if whole < plan.stop:
            at, end = self._tail(whole, plan.stop)
            yield key, at, list(indices[at:end]) if isinstance(indices, list) else indices[at:end].tolist()

    def index_tensors(self, plan: Plan) -> Iterator[Tensor]:
        """The same as index tensors (for data sets that are tensors)."""
        assert isinstance(plan.indices, Tensor)
        full = (plan.stop - plan.start) // self.together
        whole = plan.start + full * self.together
        mine = plan.indices[plan.start : whole].view(full, self.ranks, self.batch_size)[:, self.index]
        for at in range(0, full, _CHUNK):
            yield from mine[at : at + _CHUNK].unbind(0)
        if whole < plan.stop:
            at, end = self._tail(whole, plan.stop)
            yield plan.indices[at:end]

    def _tail(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's part of the ragged last micro-batch; one sample of it again for a rank that would get none."""
        each = parts(stop - start, self.ranks)
        at = start + sum(each[: self.index])
        return (at, at + each[self.index]) if each[self.index] else (start, start + 1)


@dataclass(frozen=True)
class Batches:
    """The batches of somebody's own batch sampler: a micro-batch is the next W of them, rank r takes the r-th.

    When fewer than W are left, a rank without one reads the first sample of the first of them again, and counts 0 for it.
    """

    index: int = 0
    ranks: int = 1

    def batches(self, batches: Sequence[Sequence[Any]], limit: int | None = None) -> int:
        count = math.ceil(len(batches) / self.ranks)
        return count if limit is None else min(count, limit)

    def plan(self, batches: Sequence[Sequence[Any]], start: int = 0, limit: int | None = None) -> tuple[Plan, list[list[Any]]]:
        """Lay out the pass from sample `start` on; the second value is what this rank reads, batch by batch.

        Raises:
            DataError: no batch of the epoch begins at sample `start`.
        """
        ends = [0, *itertools.accumulate(len(batch) for batch in batches)]
        if start not in ends:
            raise DataError(
                f"The position is sample {start} of the epoch, where no batch of the batch sampler begins. Expected the "
                "sampler to "
                "give the batches of the saved run again: give it the same seed, or a set_epoch method."
            )
        last = len(batches) if limit is None else min(len(batches), limit * self.ranks)
        counts: list[tuple[int, int]] = []
        mine: list[list[Any]] = []
        first = ends.index(start)
        for at in range(first, last, self.ranks):
            group = batches[at : min(at + self.ranks, last)]
            here = list(group[self.index]) if self.index < len(group) else []
            counts.append((len(here), sum(map(len, group))))
            mine.append(here or list(group[0][:1]))
        return Plan([], start, ends[max(first, last)], counts), mine
