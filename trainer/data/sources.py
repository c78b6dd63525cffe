"""What a prepared loader reads from: chosen once, from what the user gave.

    Indexed   a torch DataLoader over a data set with indices. Its place is arithmetic; nothing is exchanged between ranks.
    Streamed  everything else: iterable data sets, loaders of other libraries, lists of batches, functions that make iterators.
`build` decides. Read its table first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ...strategies.errors import CheckpointError, ConfigError, DataError
from .config import DataLoaderConfiguration
from .counted import Counted, has_state, is_counted
from .dispatch import Dispatch
from .indexed import Indexed, batch_per_rank, indexed
from .randomness import mix
from .reading import WorkerStart
from .stream import Group, Micro, Stream, alone, beside, groups

if TYPE_CHECKING:
    from ...strategies.world import World

__all__ = ["Indexed", "Streamed", "build"]


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
                f"In the saved run each rank read {was}, here {now}. Keep the loader's configuration, or resume at an epoch's "
                "start."
            )
        if self.per_rank and state["position"] and state.get("ranks") != self.ranks:
            raise CheckpointError(
                f"The saved run had {state.get('ranks')} ranks, each with its own batches, and this one has {self.ranks}: a "
                "position in one "
                "cannot be found in the other. Resume on as many ranks, or at an epoch's start, or let rank 0 read for all "
                "(dispatch_batches=True)."
            )


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
    make = {"config": config, "seed": seed, "batch_size": size}
    if is_counted(loader.dataset) and ranks > 1:
        if config.dispatch_batches or config.split_batches:
            wrong = "dispatch_batches=True" if config.dispatch_batches else "split_batches=True"
            raise ConfigError(
                f"{type(loader.dataset).__name__} reads its rank's share by itself; expected no {wrong}, which would divide rank "
                "0's share again. Leave it out of DataLoaderConfiguration(...)."
            )
        return _beside(_stream(loader, ranks=ranks, **{**make, "seed": mix(seed, index)}), world, shard, config, seed, together)
    if ranks == 1:
        return Streamed(
            _stream(loader, **make), _alone, seed=seed, ranks=1, per_rank=False, batch_samples=together, length=_length(loader)
        )
    if config.dispatch_batches is None and not config.split_batches and _can_shard(loader.dataset, ranks):
        own = loader.dataset.shard(ranks, index)  # pyright: ignore[reportAttributeAccessIssue]
        mine = _stream(loader, own, config=config, seed=mix(seed, index), batch_size=size)
        return _beside(mine, world, shard, config, seed, together)
    if config.split_batches and size is not None:
        batch_per_rank(size, ranks, config)
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
    stateful = loader if has_state(loader) else _counted(loader, shard[1])
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
            f"{what} was to be read on {shard[1]} ranks. Expected the World whose ranks agree on it: prepare_loader(..., "
            "world=...)."
        )
    return world


def _stream(
    loader: DataLoader[Any],
    dataset: Any = None,
    *,
    config: DataLoaderConfiguration,
    seed: int,
    batch_size: int | None,
    ranks: int = 1,
) -> Stream:
    """Read `loader`, over another `dataset` if one is given (a shard of its own)."""
    if dataset is not None or loader.num_workers or (config.use_stateful_dataloader and not has_state(loader)):
        loader = _rebuilt(loader, loader.dataset if dataset is None else dataset, stateful=config.use_stateful_dataloader)
    stateful: Any = _counted(loader, ranks)
    if has_state(loader):
        stateful = loader
    elif loader.num_workers == 0 and has_state(loader.dataset):
        stateful = loader.dataset
    key = seed if config.seed_samples else None
    return Stream(loader, stateful=stateful, seed=key, in_workers=loader.num_workers > 0, batch_size=batch_size)


def _counted(loader: Any, ranks: int) -> Counted | None:
    dataset = getattr(loader, "dataset", None)
    return Counted(dataset, ranks) if is_counted(dataset) else None


def _rebuilt(loader: DataLoader[Any], dataset: Any, *, stateful: bool = False) -> DataLoader[Any]:
    """The same loader over `dataset`, as a StatefulDataLoader if asked for; its workers know what to do about signals."""
    workers = loader.num_workers
    arguments = {
        "dataset": dataset,
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "num_workers": workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": WorkerStart(loader.worker_init_fn) if workers else None,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor if workers else None,
        "persistent_workers": loader.persistent_workers,
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
