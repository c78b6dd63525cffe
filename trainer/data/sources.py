"""What a prepared loader reads from: chosen once, from what the user gave.

    Indexed   a torch DataLoader over a data set with indices. Its place is arithmetic; nothing is exchanged between ranks.
    Streamed  everything else: iterable data sets, loaders of other libraries, lists of batches, functions that make iterators.
`build` decides. Read its table first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from ...strategies.errors import CheckpointError, ConfigError, DataError
from .config import DataLoaderConfiguration
from .dispatch import Dispatch
from .randomness import mix
from .reading import Reading, TensorReading, WorkerLoader, stop_workers
from .sharding import Batches, Order, Replayed, Request, Sequential, Shuffled, Uniform
from .stream import Group, Micro, Stream, alone, beside, groups

if TYPE_CHECKING:
    from ...strategies.world import World

__all__ = ["Indexed", "Pass", "Streamed", "build"]


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


class Streamed:
    """Ready batches in order. `how` makes the micro-batches of a pass from the opened stream.

    Attributes:
        stream: None on ranks that only receive.
        per_rank: each rank reads its own, so that its position and state are its own too.
        batch_samples: samples of a full micro-batch over all ranks; None until known.
    """

    regular = False

    def __init__(
        self,
        stream: Stream | None,
        how: Callable[[Stream | None], Iterator[Micro]],
        *,
        seed: int,
        ranks: int,
        per_rank: bool,
        batch_samples: int | None,
        length: int | None,
    ) -> None:
        self.stream = stream
        self.how = how
        self.seed = seed
        self.ranks = ranks
        self.per_rank = per_rank
        self.batch_samples = batch_samples
        self.length = length

    def begin(self, epoch: int, saved: dict[str, Any] | None) -> Iterator[Micro]:
        """Begin a pass, behind what the saved state had handed out."""
        if self.stream is not None:
            if saved is None:
                self.stream.open(epoch)
            elif self.per_rank:
                self.stream.open(epoch, batches=saved["batches"], saved=saved.get("own"))
            else:
                self.stream.open(epoch, samples=saved["position"], saved=saved.get("own"))
        return self.how(self.stream)

    def state(self) -> dict[str, Any]:
        """What is needed beside epoch, position and seed."""
        state: dict[str, Any] = {"ranks": self.ranks, "per_rank": self.per_rank, "batches": 0}
        if self.stream is not None:
            state["batches"] = self.stream.consumed
            own = self.stream.state()
            if own is not None:
                state["own"] = own
        return state

    def check(self, state: dict[str, Any]) -> None:
        """Refuse a state that cannot be continued here.

        Raises:
            CheckpointError: each rank had its own batches, and there were other ranks.
        """
        if state["position"] and state.get("per_rank") != self.per_rank and max(state.get("ranks", 1), self.ranks) > 1:
            was, now = (
                ("its own batches", "a share of one stream")
                if state.get("per_rank")
                else ("a share of one stream", "its own batches")
            )
            raise CheckpointError(
                f"In the saved run each rank read {was}, here {now}. Keep the loader's configuration, or resume at an epoch's start."
            )
        if self.per_rank and state["position"] and state.get("ranks") != self.ranks:
            raise CheckpointError(
                f"The saved run had {state.get('ranks')} ranks, each with its own batches, and this one has {self.ranks}: a position in one "
                "cannot be found in the other. Resume on as many ranks, or at an epoch's start, or let rank 0 read for all (dispatch_batches=True)."
            )


def build(
    loader: Any, *, world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration, seed: int
) -> Indexed | Streamed:
    """Choose how `loader` is read.

    | the user's loader                                  | on one rank | on several                                       |
    | DataLoader over a data set with indices            | Indexed     | Indexed                                          |
    | DataLoader over an iterable one, can shard itself  | alone       | beside: each reads its shard                     |
    |                              , cannot              | alone       | groups: rank 0 reads and sends, or all read all  |
    | anything else, or already_sharded=True             | alone       | beside: each rank's loader is its own            |
    Raises:
        ConfigError, DataError: not a loader, or options that do not fit it.
    """
    seed = seed if config.data_seed is None else config.data_seed
    if isinstance(loader, DataLoader) and not config.already_sharded and _iterates_as_torch(loader):
        if isinstance(loader.dataset, IterableDataset):
            return _iterable(loader, world, shard, config, seed)
        return _indexed(loader, shard, config, seed)
    if isinstance(loader, DataLoader) and not config.already_sharded and shard[1] > 1:
        raise ConfigError(
            f"{type(loader).__name__} iterates in its own way, and cannot be divided among {shard[1]} ranks from outside. Expected a DataLoader "
            "that keeps torch's __iter__. If it reads only its rank's part already, say DataLoaderConfiguration(already_sharded=True)."
        )
    _check_iterable(loader)
    return _own(loader, world, shard, config, seed)


# -- with indices -----------------------------------------------------------------------------------------------------
def _indexed(loader: DataLoader[Any], shard: tuple[int, int], config: DataLoaderConfiguration, seed: int) -> Indexed:
    if config.dispatch_batches:
        raise ConfigError(
            f"dispatch_batches=True was given for a DataLoader over {type(loader.dataset).__name__}, which has indices: each rank reads its own "
            "slice of them, and nothing needs to be sent. Leave dispatch_batches out (it is for iterable data sets)."
        )
    if not loader.in_order:
        raise ConfigError(
            "The DataLoader has in_order=False: batches come as workers finish, so that no position says which samples were used. "
            "Expected in_order=True, without which a run can neither be resumed nor repeated."
        )
    index, ranks = shard
    sampler, size, drop_last, mode = _taken_apart(loader)
    order = _order(sampler, seed, _generator(loader, sampler))
    sharding: Uniform | Batches
    if size is None:
        if config.split_batches and ranks > 1:
            raise ConfigError(
                f"split_batches=True was given for a DataLoader with a batch sampler of its own ({type(sampler).__name__}), whose batches "
                "differ in size. Expected a batch_size. Leave split_batches out: each rank then takes whole batches."
            )
        sharding = Batches(index, ranks)
    else:
        sharding = Uniform(_batch_per_rank(size, ranks, config), drop_last, index, ranks)
    reading = Reading(loader.dataset, loader.collate_fn, mode=mode, seeded=config.seed_samples, repeats=order.repeats)
    return Indexed(loader, order, sharding, reading)


def _batch_per_rank(size: int, ranks: int, config: DataLoaderConfiguration) -> int:
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
            f"The DataLoader has a {kind.__name__}, and its data are divided among ranks here already: each rank would get a part of a part. "
            f"Give it shuffle={getattr(sampler, 'shuffle', True)} in place of the sampler. If every rank should keep what its sampler gives, "
            "say DataLoaderConfiguration(already_sharded=True)."
        )
    if not hasattr(sampler, "__len__"):
        raise ConfigError(
            f"The sampler {kind.__name__} has no length. Expected one that ends, since an epoch's indices are listed before it is read. "
            "Give it __len__; endless data go in an IterableDataset."
        )
    return Replayed(sampler, seed)


# -- without ----------------------------------------------------------------------------------------------------------
def _iterable(
    loader: DataLoader[Any], world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration, seed: int
) -> Streamed:
    index, ranks = shard
    size = loader.batch_size
    together = None if size is None else size if config.split_batches else size * ranks
    make = {"config": config, "seed": seed, "batch_size": size}
    if ranks == 1:
        return Streamed(
            _stream(loader, **make), _alone, seed=seed, ranks=1, per_rank=False, batch_samples=together, length=_length(loader)
        )
    if config.dispatch_batches is None and not config.split_batches and _can_shard(loader.dataset, ranks):
        own = _rebuilt(loader, loader.dataset.shard(ranks, index))  # pyright: ignore[reportAttributeAccessIssue]
        mine = _stream(own, config=config, seed=mix(seed, index), batch_size=size)
        return _beside(mine, world, shard, config, seed, together)
    if config.split_batches and size is not None:
        _batch_per_rank(size, ranks, config)
    if config.dispatch_batches is False:

        def keep(stream: Stream | None) -> Iterator[Micro]:
            assert stream is not None
            for group in groups(stream, ranks, split=config.split_batches):
                yield _micro(group, index)

        return Streamed(
            _stream(loader, **make), keep, seed=seed, ranks=ranks, per_rank=False, batch_samples=together, length=None
        )
    members = _members(world, shard, "An iterable data set that cannot shard itself")
    group = members.new_group(backend="gloo")
    if group is None:
        raise ConfigError("A loader of several ranks needs the World that they belong to; this one has no process group.")
    dispatch = Dispatch(group, members.rank, members.gather_json(index))
    if members.rank == 0:
        stream = _stream(loader, **make)
        return Streamed(
            stream, lambda _: dispatch.send(groups(stream, ranks, split=config.split_batches)),
            seed=seed, ranks=ranks, per_rank=False, batch_samples=together, length=None,
        )  # fmt: skip
    return Streamed(
        None, lambda _: dispatch.receive(), seed=seed, ranks=ranks, per_rank=False, batch_samples=together, length=None
    )


def _own(loader: Any, world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration, seed: int) -> Streamed:
    """Every rank's loader is its own: nothing is divided."""
    size = loader.batch_size if isinstance(loader, DataLoader) else None
    quiet = isinstance(loader, list | tuple)
    stateful = loader if _has_state(loader) else None
    workers = isinstance(loader, DataLoader) and loader.num_workers > 0
    key = mix(seed, shard[0]) if config.seed_samples and not quiet else None
    stream = Stream(loader, stateful=stateful, seed=key, in_workers=workers, batch_size=size)
    if shard[1] == 1:
        return Streamed(stream, _alone, seed=seed, ranks=1, per_rank=False, batch_samples=size, length=_length(loader))
    return _beside(stream, world, shard, config, seed, None if size is None else size * shard[1])


def _beside(
    stream: Stream, world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration, seed: int, together: int | None
) -> Streamed:
    members = _members(world, shard, "A loader that each rank reads by itself")
    shards = members.gather_json(shard[0])
    counts_here = shards.index(shard[0]) == members.rank

    def agree(numbers: list[int]) -> list[int]:
        return members.all_reduce(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def how(stream: Stream | None) -> Iterator[Micro]:
        assert stream is not None
        return beside(stream, agree, ranks=members.size, counts_here=counts_here, drop=config.uneven == "drop")

    return Streamed(stream, how, seed=seed, ranks=shard[1], per_rank=True, batch_samples=together, length=None)


def _alone(stream: Stream | None) -> Iterator[Micro]:
    assert stream is not None
    return alone(stream)


def _micro(group: Group, index: int) -> Micro:
    batch, count = group.parts[index]
    return Micro(batch, count, sum(n for _, n in group.parts), group.is_last, group.batches)


def _members(world: World | None, shard: tuple[int, int], what: str) -> World:
    if world is None or world.size < shard[1]:
        raise ConfigError(
            f"{what} was to be read on {shard[1]} ranks. Expected the World whose ranks agree on it: prepare_loader(..., world=...)."
        )
    return world


def _stream(loader: DataLoader[Any], *, config: DataLoaderConfiguration, seed: int, batch_size: int | None) -> Stream:
    if config.use_stateful_dataloader and not _has_state(loader):
        loader = _rebuilt(loader, loader.dataset, stateful=True)
    stateful: Any = None
    if _has_state(loader):
        stateful = loader
    elif loader.num_workers == 0 and _has_state(loader.dataset):
        stateful = loader.dataset
    key = seed if config.seed_samples else None
    return Stream(loader, stateful=stateful, seed=key, in_workers=loader.num_workers > 0, batch_size=batch_size)


def _rebuilt(loader: DataLoader[Any], dataset: Any, *, stateful: bool = False) -> DataLoader[Any]:
    """The same loader over another data set (a shard of its own), or as a StatefulDataLoader."""
    workers = loader.num_workers
    arguments = {
        "dataset": dataset,
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "num_workers": workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor if workers else None,
        "persistent_workers": loader.persistent_workers,
        "in_order": loader.in_order,
    }
    if stateful or _has_state(loader):
        from .torchdata import stateful as make_stateful

        return make_stateful(loader, arguments)
    return DataLoader(**arguments)


def _can_shard(dataset: Any, ranks: int) -> bool:
    """Whether `dataset.shard(num_shards, index)` exists and can make so many (HF's data sets say how many: num_shards)."""
    if not callable(getattr(dataset, "shard", None)):
        return False
    count = getattr(dataset, "num_shards", getattr(dataset, "n_shards", None))
    return not isinstance(count, int) or count >= ranks


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _iterates_as_torch(loader: DataLoader[Any]) -> bool:
    kind = type(loader)
    return _has_state(loader) or (kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator)


def _check_iterable(loader: Any) -> None:
    hint = "Expected a torch DataLoader, a list of batches, or a function that returns an iterator over batches."
    if loader is None:
        raise DataError(f"There is no loader: it is None. {hint}")
    name = type(loader).__name__
    if isinstance(loader, torch.utils.data.Dataset):
        size = "None" if isinstance(loader, IterableDataset) else "32, shuffle=True"
        raise ConfigError(f"{name} is a data set, not a loader. {hint} Wrap it: DataLoader(dataset, batch_size={size}).")
    if isinstance(loader, list | tuple | dict) and any(
        isinstance(v, DataLoader) for v in (loader.values() if isinstance(loader, dict) else loader)
    ):
        raise ConfigError(f"A {name} of DataLoaders is not one loader. {hint} Prepare each of them.")
    if isinstance(loader, str | bytes | dict | torch.Tensor) or not (hasattr(loader, "__iter__") or callable(loader)):
        raise ConfigError(f"A {name} is not a loader. {hint}")
