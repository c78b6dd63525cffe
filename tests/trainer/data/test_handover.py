"""An epoch of an iterable data set that is gone on with on another number of ranks or of workers: each sample once.

The truth is the run that was never stopped: what comes after a stop is what it would have trained on next, in its order.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from drivetrain.strategies.errors import CheckpointError
from drivetrain.strategies.world import World
from drivetrain.trainer.data.config import DataLoaderConfiguration
from drivetrain.trainer.data.loader import Loader, prepare_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

N = 53


class Plain(IterableDataset[int]):
    """0 ... n-1, of which `shards` ranks take every so-manieth; in workers each its share of that."""

    def __init__(self, n: int = N, index: int = 0, shards: int = 1) -> None:
        self.mine = range(n)[index::shards]

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(self.mine if info is None else self.mine[info.id :: info.num_workers])


class Sharded(Plain):
    def shard(self, num_shards: int, index: int) -> Sharded:
        return type(self)(len(self.mine), index, num_shards)


class Stateful(Sharded):
    """Keeps its own place; `read` counts what was read of any shard in this process."""

    read = 0

    def __init__(self, n: int = N, index: int = 0, shards: int = 1) -> None:
        super().__init__(n, index, shards)
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < len(self.mine):
            self.at += 1
            Stateful.read += 1
            yield self.mine[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Told(Sharded):
    """As mosaicml's: finds its rank itself, and is told how many samples all ranks have read."""

    def __init__(self, n: int = N, index: int = 0, shards: int = 1) -> None:
        super().__init__(n)
        self.index, self.shards, self.begin, self.next_epoch = index, shards, 0, 0

    def __iter__(self) -> Iterator[int]:
        self.next_epoch += 1
        begin, self.begin = self.begin, 0
        return iter(self.mine[begin + self.index :: self.shards])

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        assert from_beginning
        return {"epoch": self.next_epoch - 1, "sample_in_epoch": num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["sample_in_epoch"]


Part = tuple[list[list[list[int]]], list[dict[str, Any]]]


def run(
    ranks: Any,
    count: int,
    make: Callable[[World], DataLoader[Any]],
    states: Any,
    stop: int | None,
    said: str | None = None,
    **options: Any,
) -> Part:
    """Go on from `states` for `stop` micro-batches on `count` ranks; return for each micro-batch the ranks' real samples.

    `said` is the warning that rank 0 is to give.
    """

    def body() -> Any:
        world = World.start("cpu", timeout_s=20)
        try:
            config = DataLoaderConfiguration(**options)
            loader = prepare_loader(make(world), shard=(world.rank, world.size), world=world, config=config)
            if states:
                loader.load_states(states)
            with warnings.catch_warnings(record=True) if said else contextlib.nullcontext([]) as caught:
                if said:
                    warnings.simplefilter("always")
                found = [batch.tolist()[: loader.num_samples] for batch in itertools.islice(iter(loader), stop)]
            warned = [str(w.message) for w in caught or () if str(w.message).startswith("This epoch")]
            assert warned == ([said] if said and world.rank == 0 else [])
            state = loader.state_dict()
            following = [] if stop else [batch.tolist()[: loader.num_samples] for batch in loader]  # the next epoch
            return found, state, loader.per_rank, following
        finally:
            world.stop()

    each = ranks(count, body)
    micro = [list(group) for group in zip(*(found for found, *_ in each), strict=True)]
    if stop is None:
        assert sorted(sample for _, _, _, batches in each for batch in batches for sample in batch) == list(range(N))
    return micro, [state for _, state, *_ in each] if each[0][2] else [each[0][1]]


def flat(micro: list[list[list[int]]]) -> list[list[int]]:
    """The batches of all ranks in order."""
    return [batch for group in micro for batch in group if batch]


def chain(
    ranks: Any, make: Callable[[World], DataLoader[Any]], *steps: tuple[int, int | None], **options: Any
) -> list[list[int]]:
    batches, states = [], None
    for count, stop in steps:
        micro, states = run(ranks, count, make, states, stop, **options)
        batches += flat(micro)
    return batches


def in_turn(shards: int, size: int = 2, n: int = N) -> list[list[int]]:
    """What `shards` ranks with batches of `size` read, by hand: batch k of each in the order of the ranks."""
    own = [range(n)[i::shards] for i in range(shards)]
    rounds = range(-(-n // (shards * size)) + 1)
    return [list(s[k * size : k * size + size]) for k in rounds for s in own if s[k * size : k * size + size]]


def once(batches: list[list[int]]) -> bool:
    return sorted(itertools.chain(*batches)) == list(range(N))


@pytest.mark.parametrize("kind", [Plain, Sharded, Stateful, Told])
def test_an_iterable_goes_from_one_rank_to_two_to_three_and_back_to_one(ranks: Any, kind: type[Plain]) -> None:
    """Within one epoch: the order is that of the one rank that began it, whatever comes later."""

    def make(world: World) -> DataLoader[Any]:
        data = Told(N, world.rank, world.size) if kind is Told else kind()
        return DataLoader(data, batch_size=2)

    batches = chain(ranks, make, (1, 4), (2, 3), (3, 2), (1, None))
    assert once(batches)
    if kind is not Told:  # which gives a rank every so-manieth sample, where the others are given whole batches
        assert batches == in_turn(1)


@pytest.mark.parametrize("kind", [Sharded, Stateful])
@pytest.mark.parametrize("steps", [((3, 2), (2, 3), (1, 4), (3, None)), ((2, 3), (3, None)), ((3, 4), (1, None))])
def test_an_epoch_that_several_ranks_began_goes_on_in_their_order(
    ranks: Any, kind: type[Plain], steps: tuple[tuple[int, int | None], ...]
) -> None:
    batches = chain(ranks, lambda world: DataLoader(kind(), batch_size=2), *steps)
    assert batches == in_turn(steps[0][0])


@pytest.mark.parametrize("dispatch", [True, False])
def test_ranks_that_share_one_stream_go_on_with_the_shards_of_others(ranks: Any, dispatch: bool) -> None:
    def make(world: World) -> DataLoader[Any]:
        return DataLoader(Sharded(), batch_size=2)

    micro, states = run(ranks, 3, make, None, 2)
    assert len(states) == 3
    rest, _ = run(ranks, 2, make, states, None, dispatch_batches=dispatch)
    assert flat(micro) + flat(rest) == in_turn(3)


def test_after_a_change_and_back_each_rank_reads_its_own_again(ranks: Any) -> None:
    """Where all streams have come equally far, nothing needs to be sent."""

    def make(world: World) -> DataLoader[Any]:
        return DataLoader(Sharded(), batch_size=2)

    micro, states = run(ranks, 2, make, None, 2)
    more, states = run(ranks, 1, make, states, 4)
    assert len(states) == 1
    assert [part["batches"] for part in states[0]["parts"]] == [4, 4]
    rest, states = run(ranks, 2, make, states, 1)
    assert len(states) == 2
    assert flat(micro) + flat(more) + flat(rest) == in_turn(2)[:10]


def test_shards_with_a_state_are_not_read_again_from_the_start(ranks: Any) -> None:
    def begin(world: World) -> DataLoader[Any]:
        return DataLoader(Stateful(4000), batch_size=2)

    def far(world: World) -> Any:
        loader = prepare_loader(begin(world), shard=(world.rank, world.size), world=world)
        for _ in itertools.islice(iter(loader), 300):
            pass
        return loader.state_dict()

    def go_on(world: World) -> int:
        Stateful.read = 0
        loader = prepare_loader(begin(world), world=world)
        loader.load_states(states)
        next(iter(loader))
        return Stateful.read

    def body(what: Callable[[World], Any]) -> Any:
        world = World.start("cpu", timeout_s=20)
        try:
            return what(world)
        finally:
            world.stop()

    states = ranks(2, body, far)
    assert ranks(1, body, go_on)[0] <= 2 * 2 * 18


def told(was: int, now: int) -> str:
    return (
        f"This epoch of Sharded was begun with num_workers={was}, which decides what comes when: the rest of it is read with as "
        f"many. The next epoch has num_workers={now}."
    )


@pytest.mark.parametrize(("first", "second"), [(2, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("count", [1, 2])
def test_other_workers_go_on_as_those_that_began(ranks: Any, first: int, second: int, count: int) -> None:
    """Each worker reads its own part, so that the number of workers decides what comes when."""

    def make(workers: int) -> Callable[[World], DataLoader[Any]]:
        context = {"multiprocessing_context": "fork"} if workers else {}
        return lambda world: DataLoader(Sharded(), batch_size=2, num_workers=workers, **context)  # pyright: ignore[reportArgumentType]

    whole, _ = run(ranks, count, make(first), None, None)
    micro, states = run(ranks, count, make(first), None, 3)
    rest, _ = run(ranks, count, make(second), states, None, said=told(first, second))
    assert micro + rest == whole


def test_other_ranks_and_other_workers_at_once(ranks: Any) -> None:
    def make(workers: int) -> Callable[[World], DataLoader[Any]]:
        context = {"multiprocessing_context": "fork"} if workers else {}
        return lambda world: DataLoader(Sharded(), batch_size=2, num_workers=workers, **context)  # pyright: ignore[reportArgumentType]

    whole, _ = run(ranks, 2, make(2), None, None)
    micro, states = run(ranks, 2, make(2), None, 2)
    more, states = run(ranks, 3, make(0), states, 2, said=told(2, 0))
    rest, _ = run(ranks, 1, make(1), states, None, said=told(2, 1))
    assert flat(micro) + flat(more) + flat(rest) == flat(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_batch_size_goes_on_where_a_batch_ends_or_is_refused(workers: int) -> None:
    context = {"multiprocessing_context": "fork"} if workers else {}

    def loader(size: int) -> Loader:
        return prepare_loader(DataLoader(Plain(), batch_size=size, num_workers=workers, **context))  # pyright: ignore[reportArgumentType]

    first = loader(2)
    for _ in itertools.islice(iter(first), 4):
        pass
    second = loader(4)
    if workers:
        with pytest.raises(CheckpointError, match=r"batches of 2 of Plain .* to be of 4: .* Resume with batch_size=2\."):
            second.load_state_dict(first.state_dict())
        return
    second.load_state_dict(first.state_dict())
    assert next(iter(second)).tolist() == [8, 9, 10, 11]


def test_uneven_ranks_go_on_when_some_have_ended(ranks: Any) -> None:
    """The rank without data has an old batch to hand out, which counts for nothing."""
    import torch

    def make(world: World) -> Any:
        return [torch.arange(2) + 10 * world.rank + 2 * i for i in range(2 + 3 * world.rank)]

    def body(stop: int, states: Any) -> Any:
        world = World.start("cpu", timeout_s=20)
        try:
            loader = prepare_loader(make(world), shard=(world.rank, world.size), world=world)
            if states:
                loader.load_state_dict(states[world.rank])
            found = [batch.tolist()[: loader.num_samples] for batch in itertools.islice(iter(loader), stop)]
            return found, loader.state_dict()
        finally:
            world.stop()

    first = ranks(2, body, 3, None)
    assert [found for found, _ in first] == [[[0, 1], [2, 3], []], [[10, 11], [12, 13], [14, 15]]]
    rest = ranks(2, body, 9, [state for _, state in first])
    assert [found for found, _ in rest] == [[[], []], [[16, 17], [18, 19]]]


@pytest.mark.parametrize("uneven", ["join", "drop"])
def test_what_is_dropped_of_uneven_shards_is_dropped_by_other_ranks_too(ranks: Any, uneven: str) -> None:
    """Two shards of 5 and 4 batches, gone on with by one rank."""

    class Uneven(Sharded):
        def shard(self, num_shards: int, index: int) -> Any:
            part = Uneven()
            part.mine = range(10) if index == 0 else range(10, 18)
            return part

    def body(states: Any, stop: int | None) -> Any:
        world = World.start("cpu", timeout_s=20)
        try:
            config = DataLoaderConfiguration(uneven=uneven)
            shard = (world.rank, world.size)
            loader = prepare_loader(DataLoader(Uneven(), batch_size=2), shard=shard, world=world, config=config)
            if states:
                loader.load_states(states)
            found = [batch.tolist()[: loader.num_samples] for batch in itertools.islice(iter(loader), stop)]
            return found, loader.state_dict(), loader.is_last
        finally:
            world.stop()

    whole = ranks(2, body, None, None)
    expected = [batch for group in zip(*(found for found, *_ in whole), strict=True) for batch in group if batch]
    first = ranks(2, body, None, 2)
    (rest, _, last), *_ = ranks(1, body, [state for _, state, _ in first], None)
    assert [batch for group in zip(*(found for found, *_ in first), strict=True) for batch in group] + rest == expected
    assert last
    assert len(expected) == (9 if uneven == "join" else 8)


def test_what_only_its_rank_knows_goes_on_on_as_many_ranks_and_says_what_would_work(ranks: Any) -> None:
    def body(states: Any) -> Any:
        world = World.start("cpu", timeout_s=20)
        try:
            config = DataLoaderConfiguration(already_sharded=True)
            data = DataLoader(Plain(16, world.rank, world.size), batch_size=2)
            loader = prepare_loader(data, shard=(world.rank, world.size), world=world, config=config)
            if states:
                loader.load_states(states)
                return [batch.tolist() for batch in loader]
            for _ in itertools.islice(iter(loader), 2):
                pass
            return loader.state_dict()
        except CheckpointError as error:
            return str(error)
        finally:
            world.stop()

    states = ranks(2, body, None)
    assert ranks(2, body, states) == [[[8, 10], [12, 14]], [[9, 11], [13, 15]]]
    for count in (1, 3):
        for text in ranks(count, body, states):
            assert f"had 2 ranks, each with its own batches, and this one has {count}: of a Plain only its rank knows" in text
            assert "Resume on 2 ranks up to the epoch's end." in text
            assert "dispatch_batches=True" in text


def test_one_of_several_states_is_not_enough_and_says_so(ranks: Any) -> None:
    def begin() -> Any:
        world = World.start("cpu", timeout_s=20)
        try:
            loader = prepare_loader(DataLoader(Sharded(), batch_size=2), shard=(world.rank, world.size), world=world)
            next(iter(loader))
            return loader.state_dict()
        finally:
            world.stop()

    states = ranks(2, begin)
    loader = prepare_loader(DataLoader(Sharded(), batch_size=2))
    with pytest.raises(CheckpointError, match=r"begun on 2 ranks, .* Give those of all: loader\.load_states"):
        loader.load_state_dict(states[1])
    with pytest.raises(CheckpointError, match=r"cut into 2 parts, into which it cannot be cut now"):
        prepare_loader(DataLoader(Plain(), batch_size=2)).load_states(states)


@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": 3},
        {"parts": [{}]},
        {"parts": [{"batches": 1, "samples": -2}]},
        {"own": 3},
        {"own": {"batches": 1}},
        {"shards": "x"},
        {"workers": 1.5},
        {"micro_batches": "x"},
        {"ranks": 0},
    ],
)
def test_a_state_that_is_not_well_formed_is_refused_as_such(wrong: dict[str, Any]) -> None:
    loader = prepare_loader(DataLoader(Plain(), batch_size=2))
    next(iter(loader))
    with pytest.raises(CheckpointError, match="This is not the state of a prepared loader"):
        loader.load_state_dict(loader.state_dict() | wrong)
