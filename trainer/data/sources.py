"""What a prepared loader reads from: chosen once, from what the user gave.

    Indexed   a torch DataLoader over a data set with indices. Its place is arithmetic; nothing is exchanged between ranks.
    Streamed  everything else: iterable data sets, loaders of other libraries, lists of batches, functions that make iterators.
`build` decides. Read its table first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset

from ...strategies.errors import ConfigError, DataError
from .config import DataLoaderConfiguration
from .counted import Counted, forgets, has_state, is_counted
from .dispatch import Dispatch
from .indexed import Indexed, batch_per_rank, indexed
from .reading import WorkerStart
from .stream import Group, Micro, Readable, Stream, alone, beside, groups
from .streamed import Streamed, TakesOver

if TYPE_CHECKING:
    from ...strategies.world import World

__all__ = ["Indexed", "Streamed", "build"]


def build(
    loader: Any, *, world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration, seed: int
) -> Indexed | Streamed:
    """Choose how `loader` is read.

    | the user's loader                                  | on one rank | on several                                       |
    | DataLoader over a data set with indices            | Indexed     | Indexed                                          |
    | DataLoader over an iterable one, can shard itself  | alone       | beside: each reads its shard                     |
    |                              , cannot              | alone       | groups: rank 0 reads and sends, or all read all  |
    |                              , looks for its rank  | alone       | beside: it reads its share by itself (counted.py)|
    | anything else, or already_sharded=True             | alone       | beside: each rank's loader is its own            |
    Raises:
        ConfigError, DataError: not a loader, or options that do not fit it.
    """
    seed = seed if config.data_seed is None else config.data_seed
    if isinstance(loader, DataLoader) and not config.already_sharded and _iterates_as_torch(loader):
        if isinstance(loader.dataset, IterableDataset):
            return _iterable(loader, world, shard, config, seed)
        return indexed(loader, shard, config, seed)
    if isinstance(loader, DataLoader) and not config.already_sharded and shard[1] > 1:
        raise ConfigError(
            f"{type(loader).__name__} iterates in its own way, and cannot be divided among {shard[1]} ranks from outside. "
            "Expected a DataLoader "
            "that keeps torch's __iter__. If it reads only its rank's part already, say "
            "DataLoaderConfiguration(already_sharded=True)."
        )
    _check_iterable(loader)
    return _own(loader, world, shard, config, seed)


# -- without ----------------------------------------------------------------------------------------------------------
def _iterable(
    loader: DataLoader[Any], world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration, seed: int
) -> Streamed:
    index, ranks = shard
    size = loader.batch_size
    together = None if size is None else size if config.split_batches else size * ranks
    name = type(loader.dataset).__name__
    if is_counted(loader.dataset) and ranks > 1:
        if config.dispatch_batches or config.split_batches:
            wrong = "dispatch_batches=True" if config.dispatch_batches else "split_batches=True"
            raise ConfigError(
                f"{name} reads its rank's share by itself; expected no {wrong}, which would divide rank "
                "0's share again. Leave it out of DataLoaderConfiguration(...)."
            )
        mine = _stream(loader, config=config, number=index)
        return _beside(mine, world, shard, config, seed, name=name, together=together)
    if config.split_batches and size is not None:
        batch_per_rank(size, ranks, config)

    def part(number: int, shards: int, workers: int | None = None) -> Stream:
        """One of the streams that `shards` ranks read; with `workers` for what is left of an epoch."""
        if shards == 1:
            return _stream(loader, config=config, workers=workers)
        own = loader.dataset.shard(shards, number)  # pyright: ignore[reportAttributeAccessIssue]
        return _stream(loader, own, config=config, number=number, workers=workers)

    workers = 0 if is_counted(loader.dataset) else loader.num_workers
    give = _given(world, shard, config)
    takes_over = TakesOver(part, give.how, give.reads, lambda n: n == 1 or _can_shard(loader.dataset, n), config.uneven == "drop")
    if ranks > 1 and config.dispatch_batches is None and not config.split_batches and _can_shard(loader.dataset, ranks):
        mine = part(index, ranks)
        return _beside(mine, world, shard, config, seed, name=name, together=together, workers=workers, takes_over=takes_over)
    give.prepare()
    return Streamed(
        part(0, 1) if give.reads else None,
        give.how,
        name=name,
        seed=seed,
        shard=shard,
        per_rank=False,
        batch_samples=together,
        batch_size=size,
        length=_length(loader) if ranks == 1 else None,
        workers=workers,
        takes_over=takes_over,
    )


def _own(loader: Any, world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration, seed: int) -> Streamed:
    """Every rank's loader is its own: nothing is divided."""
    known = loader if isinstance(loader, DataLoader) else None
    size = None if known is None else known.batch_size
    seeded = config.seed_samples and not isinstance(loader, list | tuple)
    name = type(loader).__name__ if known is None else type(known.dataset).__name__

    def stream(workers: int | None = None) -> Stream:
        source = loader if known is None or workers is None else _rebuilt(known, known.dataset, workers=workers)
        stateful = _stateful(source)
        in_workers = isinstance(source, DataLoader) and source.num_workers > 0
        return Stream(source, stateful=stateful, seeded=seeded, shard=shard[0], in_workers=in_workers, batch_size=size)

    workers, takes_over = 0, None
    # With indices the batches are the same for any number of workers; only torchdata's state is not.
    if known is not None and (has_state(known) or (isinstance(known.dataset, IterableDataset) and not is_counted(known.dataset))):
        workers = known.num_workers
        if _iterates_as_torch(known):
            takes_over = TakesOver(lambda _, __, workers: stream(workers))
    mine = stream()
    if shard[1] == 1:
        return Streamed(
            mine, _alone, name=name, seed=seed, shard=shard, per_rank=False, batch_samples=size, batch_size=size,
            length=_length(loader), workers=workers, takes_over=takes_over,
        )  # fmt: skip
    together = None if size is None else size * shard[1]
    return _beside(mine, world, shard, config, seed, name=name, together=together, workers=workers, takes_over=takes_over)


def _beside(
    stream: Stream,
    world: World | None,
    shard: tuple[int, int],
    config: DataLoaderConfiguration,
    seed: int,
    *,
    name: str,
    together: int | None,
    workers: int = 0,
    takes_over: TakesOver | None = None,
) -> Streamed:
    members = _members(world, shard, "A loader that each rank reads by itself")
    shards = members.gather_json(shard[0])
    counts_here = shards.index(shard[0]) == members.rank

    def agree(numbers: list[int]) -> list[int]:
        return members.all_reduce(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def how(stream: Readable | None) -> Iterator[Micro]:
        assert isinstance(stream, Stream)
        return beside(stream, agree, ranks=members.size, counts_here=counts_here, drop=config.uneven == "drop")

    return Streamed(
        stream, how, name=name, seed=seed, shard=shard, per_rank=True, batch_samples=together, batch_size=stream.batch_size,
        workers=workers, takes_over=takes_over,
    )  # fmt: skip


class _Given(NamedTuple):
    """How one sequence of batches reaches all ranks, and whether this one reads it."""

    how: Callable[[Readable | None], Iterator[Micro]]
    reads: bool
    prepare: Callable[[], Any] = bool
    """Makes what the ranks talk over; all of them call it together. The first pass does it otherwise."""


def _given(world: World | None, shard: tuple[int, int], config: DataLoaderConfiguration) -> _Given:
    index, ranks = shard
    if ranks == 1:
        return _Given(_alone, True)
    if config.dispatch_batches is False:

        def keep(stream: Readable | None) -> Iterator[Micro]:
            assert stream is not None
            for group in groups(stream, ranks, split=config.split_batches):
                yield _micro(group, index)

        return _Given(keep, True)
    members = _members(world, shard, "An iterable data set that cannot shard itself")

    @functools.cache
    def dispatch() -> Dispatch:
        group = members.new_group(backend="gloo")
        if group is None:
            raise ConfigError("A loader of several ranks needs the World that they belong to; this one has no process group.")
        return Dispatch(group, members.rank, members.gather_json(index))

    def send(stream: Readable | None) -> Iterator[Micro]:
        if stream is None:
            return dispatch().receive()
        return dispatch().send(groups(stream, ranks, split=config.split_batches))

    return _Given(send, members.rank == 0, dispatch)


def _alone(stream: Readable | None) -> Iterator[Micro]:
    assert stream is not None
    return alone(stream)


def _micro(group: Group, index: int) -> Micro:
    batch, count = group.parts[index]
    return Micro(batch, count, sum(n for _, n in group.parts), group.is_last, group.batches)


def _members(world: World | None, shard: tuple[int, int], what: str) -> World:
    if world is None or world.size < shard[1]:
        raise ConfigError(
            f"{what} was to be read on {shard[1]} ranks. Expected the World whose ranks agree on it: prepare_loader(..., "
            "world=...)."
        )
    return world


def _stream(
    loader: DataLoader[Any],
    dataset: Any = None,
    *,
    config: DataLoaderConfiguration,
    number: int | None = None,
    workers: int | None = None,
) -> Stream:
    """Read `loader`, over another `dataset` (the shard `number`), or once only with so many `workers`, if they are given."""
    asked = config.use_stateful_dataloader
    if dataset is not None or workers is not None or loader.num_workers or (asked and not has_state(loader)):
        loader = _rebuilt(loader, loader.dataset if dataset is None else dataset, stateful=asked, workers=workers)
    stateful: Any = _stateful(loader)
    if stateful is None and loader.num_workers == 0 and has_state(loader.dataset) and not forgets(loader.dataset):
        stateful = loader.dataset
    workers = loader.num_workers
    return Stream(
        loader, stateful=stateful, seeded=config.seed_samples, shard=number, in_workers=workers > 0, batch_size=loader.batch_size
    )


def _stateful(loader: Any) -> Any:
    """Return what of a loader can be asked for its position, and told one; None if nothing can."""
    dataset = getattr(loader, "dataset", None)
    if has_state(loader):
        return None if forgets(dataset) else loader
    return Counted(dataset) if is_counted(dataset) else None


def _rebuilt(loader: DataLoader[Any], dataset: Any, *, workers: int | None = None, stateful: bool = False) -> DataLoader[Any]:
    """The same loader over `dataset`, as a StatefulDataLoader if asked for; its workers know what to do about signals.

    With so many `workers`, if that is given; they end with the epoch.
    """
    had, persistent = loader.num_workers > 0, loader.persistent_workers and workers is None
    workers = loader.num_workers if workers is None else workers
    arguments = {
        "dataset": dataset,
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "num_workers": workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout if workers else 0,
        "worker_init_fn": WorkerStart(loader.worker_init_fn) if workers else None,
        "multiprocessing_context": loader.multiprocessing_context if workers else None,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor if workers and had else None,
        "persistent_workers": persistent,
        "in_order": loader.in_order,
    }
    if stateful or has_state(loader):
        from .torchdata import stateful as make_stateful

        return make_stateful(loader, arguments)
    return DataLoader(**arguments)


def _can_shard(dataset: Any, ranks: int) -> bool:
    """Whether `dataset.shard(num_shards, index)` exists and can make so many (HF's data sets say how many: num_shards)."""
    if not callable(getattr(dataset, "shard", None)):
        return False
    count = getattr(dataset, "num_shards", getattr(dataset, "n_shards", None))
    return not isinstance(count, int) or count >= ranks


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _iterates_as_torch(loader: DataLoader[Any]) -> bool:
    """Whether `loader` iterates as torch's DataLoader, or torchdata's, does: what it gives follows from its attributes."""
    homes = ("torch.utils.data.dataloader", "torchdata.stateful_dataloader.stateful_dataloader")
    methods = ("__iter__", "_get_iterator")
    return all(next(c for c in type(loader).__mro__ if name in vars(c)).__module__ in homes for name in methods)


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
    if isinstance(loader, torch.nn.Module):
        raise ConfigError(
            f"{name} is a model (nn.Module), not a loader. {hint} Look at the order of the arguments: the model comes first, "
            "then its loaders."
        )
    if isinstance(loader, str | bytes | dict | torch.Tensor) or not (hasattr(loader, "__iter__") or callable(loader)):
        raise ConfigError(f"A {name} is not a loader. {hint}")
