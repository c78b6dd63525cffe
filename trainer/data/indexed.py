"""DataLoaders over data sets with indices: how they are taken apart, and the source that is made of them.

`indexed` finds order, batch size and way of reading in the user's DataLoader; `Indexed.begin` is a pass over an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from ...strategies.errors import ConfigError
from .config import DataLoaderConfiguration
from .randomness import mix
from .reading import Reading, TensorReading, WorkerLoader, signals_held_back, stop_workers
from .sharding import Batches, Order, Replayed, Request, Sequential, Shuffled, Uniform

__all__ = ["Indexed", "Pass", "batch_per_rank", "indexed"]


class Pass(NamedTuple):
    """One pass over an epoch of an `Indexed`: the batches of this rank, and for each (its real samples, those of all ranks)."""

    batches: Iterator[Any]
    counts: Iterable[tuple[int, int]]
    start: int
    stop: int


class Indexed:
    """A data set with indices, cut into micro-batches for this rank.

    Attributes:
        batch_samples: samples of a full micro-batch over all ranks (of the largest, with somebody's own batch sampler).
        regular: whether every micro-batch but the last has so many.
    """

    per_rank = False

    def __init__(self, loader: DataLoader[Any], order: Order, sharding: Uniform | Batches, reading: Reading) -> None:
        self.order = order
        self.sharding = sharding
        self.regular = isinstance(sharding, Uniform)
        self._reading = reading
        self._tensors = None
        self._requests = _Requests()
        self._workers: WorkerLoader | None = None
        if loader.num_workers or (loader.pin_memory and torch.accelerator.is_available()):
            self._workers = WorkerLoader(reading, self._requests, loader)
        elif self.regular and reading.batched:
            self._tensors = TensorReading.of(reading.dataset, reading.collate_fn)

    @property
    def batch_samples(self) -> int | None:
        if isinstance(self.sharding, Uniform):
            return self.sharding.together
        return max(map(len, self.order.indices(0)), default=1) * self.sharding.ranks

    def num_batches(self, epoch: int, limit: int | None) -> int:
        """Micro-batches of an epoch."""
        if isinstance(self.sharding, Uniform):
            return self.sharding.batches(self.order.length(epoch), limit)
        batches = self.order.indices(epoch)
        assert isinstance(batches, list)
        return self.sharding.batches(batches, limit)

    def length(self, epoch: int) -> int:
        """Samples of an epoch, before `drop_last`."""
        if isinstance(self.sharding, Uniform):
            return self.order.length(epoch)
        return sum(map(len, self.order.indices(epoch)))

    def after(self, epoch: int, batches: int) -> int:
        """The position behind so many micro-batches of an epoch."""
        if isinstance(self.sharding, Uniform):
            return min(batches * self.sharding.together, self.order.length(epoch))
        return sum(map(len, itertools.islice(self.order.indices(epoch), batches * self.sharding.ranks)))

    def begin(self, epoch: int, start: int, limit: int | None) -> Pass:
        """Begin a pass at sample `start` of an epoch."""
        key = mix(self.order.seed, epoch)
        dataset = self._reading.dataset
        if callable(getattr(dataset, "set_epoch", None)):
            dataset.set_epoch(epoch)
        indices = self.order.indices(epoch)
        if isinstance(self.sharding, Batches):
            assert isinstance(indices, list)
            plan, mine = self.sharding.plan(indices, start, limit)
            return Pass(
                self._read(_batch_requests(mine, plan.counts, key, start), key, start), plan.counts, plan.start, plan.stop
            )
        if self._tensors is not None:
            plan = self.sharding.plan(self._tensors.resolve(indices), start, limit)
            return Pass(self._tensors.batches(self.sharding.index_tensors(plan)), plan.counts, plan.start, plan.stop)
        plan = self.sharding.plan(indices, start, limit)
        return Pass(self._read(self.sharding.requests(plan, key), key, start), plan.counts, plan.start, plan.stop)

    def _read(self, requests: Iterator[Request], key: int, start: int) -> Iterator[Any]:
        if self._workers is None:
            return map(self._reading if self._reading.seeded else self._reading.plain, requests)
        self._requests.pending = requests
        # torch draws the workers' base seed from this generator: otherwise it would come out of the training's.
        assert self._workers.generator is not None
        self._workers.generator.manual_seed(mix(mix(key, start), self.sharding.index))
        with signals_held_back():
            return iter(self._workers)

    def end(self, batches: Iterator[Any], *, failed: bool) -> None:
        """End a pass: workers that need not persist stop, after an error those that would persist as well."""
        if self._workers is not None and (failed or not self._workers.persistent_workers):
            stop_workers(batches)
            self._workers._iterator = None


class _Requests:
    """The sampler of the worker loader: gives the pass that is about to begin."""

    pending: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.pending


def _batch_requests(mine: Sequence[list[Any]], counts: Iterable[tuple[int, int]], key: int, start: int) -> Iterator[Request]:
    for indices, (_, total) in zip(mine, counts, strict=True):
        yield key, start, indices
        start += total


def indexed(loader: DataLoader[Any], shard: tuple[int, int], config: DataLoaderConfiguration, seed: int) -> Indexed:
    if config.dispatch_batches:
        raise ConfigError(
            f"dispatch_batches=True was given for a DataLoader over {type(loader.dataset).__name__}, which has indices: each "
            "rank reads its own "
            "slice of them, and nothing needs to be sent. Leave dispatch_batches out (it is for iterable data sets)."
        )
    if not loader.in_order:
        raise ConfigError(
            "The DataLoader has in_order=False: batches come as workers finish, so that no position says which samples were "
            "used. "
            "Expected in_order=True, without which a run can neither be resumed nor repeated."
        )
    index, ranks = shard
    sampler, size, drop_last, mode = _taken_apart(loader)
    order = _order(sampler, seed, _generator(loader, sampler))
    sharding: Uniform | Batches
    if size is None:
        if config.split_batches and ranks > 1:
            raise ConfigError(
                f"split_batches=True was given for a DataLoader with a batch sampler of its own ({type(sampler).__name__}), "
                "whose batches "
                "differ in size. Expected a batch_size. Leave split_batches out: each rank then takes whole batches."
            )
        sharding = Batches(index, ranks)
    else:
        sharding = Uniform(batch_per_rank(size, ranks, config), drop_last, index, ranks)
    reading = Reading(loader.dataset, loader.collate_fn, mode=mode, seeded=config.seed_samples, repeats=order.repeats)
    return Indexed(loader, order, sharding, reading)


def batch_per_rank(size: int, ranks: int, config: DataLoaderConfiguration) -> int:
    if not config.split_batches:
        return size
    if size % ranks:
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError(
            f"split_batches=True makes the loader's batch_size={size} the global one, and {ranks} ranks cannot share it equally. "
            f"Use a batch_size that {ranks} divides, or {fitting} ranks."
        )
    return size // ranks


def _taken_apart(loader: DataLoader[Any]) -> tuple[Any, int | None, bool, str]:
    """Return (sampler of indices or batches, batch size; None: the sampler's own batches, drop_last, how to read them)."""
    outer: Any = loader.batch_sampler
    mode = "batch"
    if outer is None:  # batch_size=None: what the sampler gives goes to the data set as it is
        outer = loader.sampler
        if not isinstance(outer, BatchSampler):
            return outer, 1, False, "single"
        mode = "whole"
    if _is(outer, "BatchSampler"):
        return outer.sampler, outer.batch_size, outer.drop_last, mode
    return outer, None, False, mode


def _generator(loader: DataLoader[Any], sampler: Any) -> torch.Generator | None:
    generator = getattr(sampler, "generator", None)
    if _is(sampler, "RandomSampler") and type(sampler) is not RandomSampler:
        generator = loader.generator  # torchdata's makes one with a seed of its own, different on each rank
    return generator if isinstance(generator, torch.Generator) else None


def _is(sampler: Any, name: str) -> bool:
    """Whether `sampler` is torch's class of that name, or torchdata's, which has the same attributes; not somebody's subclass."""
    kind = type(sampler)
    return kind.__name__ == name and kind.__module__ in ("torch.utils.data.sampler", "torchdata.stateful_dataloader.sampler")


def _order(sampler: Any, seed: int, generator: torch.Generator | None) -> Order:
    """A user's generator decides by the seed that it was given; its state, which other things may have moved on, does not."""
    seed = seed if generator is None else generator.initial_seed()
    kind = type(sampler)
    if _is(sampler, "SequentialSampler"):
        return Sequential(sampler.data_source, seed)
    if _is(sampler, "RandomSampler"):
        return Shuffled(sampler.data_source, seed, replacement=sampler.replacement, num_samples=sampler._num_samples)
    if isinstance(sampler, DistributedSampler):
        raise ConfigError(
            f"The DataLoader has a {kind.__name__}, and its data are divided among ranks here already: each rank would get a "
            "part of a part. "
            f"Give it shuffle={getattr(sampler, 'shuffle', True)} in place of the sampler. If every rank should keep what its "
            "sampler gives, "
            "say DataLoaderConfiguration(already_sharded=True)."
        )
    if not hasattr(sampler, "__len__"):
        raise ConfigError(
            f"The sampler {kind.__name__} has no length. Expected one that ends, since an epoch's indices are listed before it "
            "is read. "
            "Give it __len__; endless data go in an IterableDataset."
        )
    return Replayed(sampler, seed)
