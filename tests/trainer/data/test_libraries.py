"""Data sets and loaders of other libraries, which we never import: what they offer is found by protocol.

Everywhere the same: stopped after any batch and gone on from there in a new loader, each sample of the epoch comes once, in the
order of the run that was never stopped.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.strategies.world import World
from drivetrain.trainer.data.config import DataLoaderConfiguration
from drivetrain.trainer.data.loader import prepare_loader
from torch.utils.data import DataLoader, IterableDataset

SAMPLES = 30

hugging_face = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="waits for Hugging Face datasets (pip install datasets)"
)
grain = pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="waits for grain (pip install grain)")
theirs = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def numbers(batch: Any) -> list[int]:
    """The samples' numbers, whatever they came in."""
    batch = batch["x"] if isinstance(batch, dict) else batch
    return [int(x) for x in batch]


def stopped_and_resumed(make: Callable[[], Any], stop: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the batches of an unbroken epoch, and those of one that was stopped after `stop` and gone on with."""
    straight = [numbers(b) for b in prepare_loader(make(), seed=3)]
    first, second = prepare_loader(make(), seed=3), prepare_loader(make(), seed=3)
    parts = []
    for batch in first:
        parts.append(numbers(batch))
        if len(parts) == stop:
            break
    second.load_state_dict(first.state_dict())
    return straight, parts + [numbers(b) for b in second]


@hugging_face
@theirs
@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_data_set_of_hugging_face(workers: int) -> None:
    import datasets

    def make() -> DataLoader[Any]:
        data = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).with_format("torch")
        return DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)  # pyright: ignore[reportArgumentType]

    straight, resumed = stopped_and_resumed(make, 3)
    assert resumed == straight
    assert sorted(itertools.chain(*straight)) == list(range(SAMPLES))
    assert list(itertools.chain(*straight)) != list(range(SAMPLES))


def _iterable(shards: int = 1, buffer: int = 0) -> DataLoader[Any]:
    import datasets

    data = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).to_iterable_dataset(num_shards=shards)
    data = data.shuffle(seed=1, buffer_size=buffer) if buffer else data
    return DataLoader(data.with_format("torch"), batch_size=4)  # pyright: ignore[reportArgumentType]


@hugging_face
@theirs
@pytest.mark.parametrize("stop", [1, 5])
def test_an_iterable_data_set_of_hugging_face_goes_on_by_its_own_state(stop: int) -> None:
    straight, resumed = stopped_and_resumed(lambda: _iterable(2), stop)
    assert resumed == straight
    assert sorted(itertools.chain(*straight)) == list(range(SAMPLES))
    loader = prepare_loader(_iterable(2))
    next(iter(loader))
    assert "own" in loader.state_dict()  # its own state_dict was asked


def _on_two(shards: int) -> list[int]:
    world = World.start()
    loader = prepare_loader(_iterable(shards), shard=(world.rank, world.size), world=world)
    found = [x for batch in loader if loader.num_samples for x in numbers(batch)]
    world.stop()
    return found


@hugging_face
@theirs
@pytest.mark.parametrize("shards", [4, 1])
def test_an_iterable_data_set_of_hugging_face_is_divided_among_ranks(shards: int, ranks: Any) -> None:
    """By its own shards where it has enough; else rank 0 reads and sends."""
    found = ranks(2, _on_two, shards)
    assert sorted(itertools.chain(*found)) == list(range(SAMPLES))
    assert all(found)


@grain
@theirs
@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_data_set_of_grain(workers: int) -> None:
    import grain as g

    def make() -> DataLoader[Any]:
        return DataLoader(g.MapDataset.range(SAMPLES), batch_size=4, shuffle=True, num_workers=workers)  # type: ignore[arg-type]

    straight, resumed = stopped_and_resumed(make, 3)
    assert resumed == straight
    assert sorted(itertools.chain(*straight)) == list(range(SAMPLES))


class Counting:
    """A data source of grain that counts what is read."""

    def __init__(self, samples: int) -> None:
        self.samples, self.read = samples, 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: Any) -> int:
        self.read += 1
        return int(index)

    def __repr__(self) -> str:
        return "Counting()"  # its loader compares this with the one in a state


def _pipeline(source: Counting) -> Any:
    import grain as g

    at_once = g.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return g.MapDataset.source(source).shuffle(seed=1).to_iter_dataset(at_once).filter(lambda x: x != 7).batch(4)


def _loader_of_grain(source: Counting) -> Any:
    import grain as g

    sampler = g.samplers.IndexSampler(
        num_records=len(source), shuffle=True, seed=1, num_epochs=1, shard_options=g.sharding.NoSharding()
    )
    keep = g.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    loader = g.DataLoader(data_source=source, sampler=sampler, operations=[g.transforms.Batch(4)], read_options=keep)
    return loader


@grain
@theirs
@pytest.mark.parametrize("stop", [1, 5, 7])
@pytest.mark.parametrize("make", [_pipeline, _loader_of_grain])
def test_what_reads_by_grain_goes_on_by_the_state_of_its_iterator(make: Callable[[Counting], Any], stop: int) -> None:
    straight, resumed = stopped_and_resumed(lambda: make(Counting(SAMPLES)), stop)
    assert resumed == straight
    expected = set(range(SAMPLES)) - ({7} if make is _pipeline else set())
    assert sorted(itertools.chain(*straight)) == sorted(expected)


@grain
@theirs
@pytest.mark.parametrize("make", [_pipeline, _loader_of_grain])
def test_what_reads_by_grain_reads_only_a_few_batches_again(make: Callable[[Counting], Any]) -> None:
    first, source = prepare_loader(make(Counting(4000))), Counting(4000)
    for number, _ in enumerate(first, start=1):
        if number == 700:
            break
    second = prepare_loader(make(source))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    next(iter(second))
    assert source.read <= (16 + 3) * 4  # those since its last state, and one ahead; 2,800 samples lie before


@grain
@theirs
def test_a_pipeline_of_grain_that_reads_ahead_in_threads_goes_on_exactly() -> None:
    import grain as g

    def make() -> Any:
        data = g.MapDataset.range(SAMPLES).shuffle(seed=1).random_map(lambda x, rng: x * 100 + rng.integers(100), seed=2)
        return data.batch(4).to_iter_dataset()

    straight, resumed = stopped_and_resumed(make, 3)
    assert resumed == straight
    assert sorted(x // 100 for x in itertools.chain(*straight)) == list(range(SAMPLES))


@hugging_face
@theirs
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
@pytest.mark.parametrize("stateful", [False, True])
def test_a_buffer_that_hugging_face_does_not_save_loses_no_samples(stateful: bool) -> None:
    """Its state knows that the buffer was filled, and not with what: 16 samples would never come."""
    import datasets

    def make() -> DataLoader[Any]:
        data = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).to_iterable_dataset(num_shards=2)
        data = data.shuffle(seed=1, buffer_size=16).map(lambda x: x).with_format("torch")
        if stateful:
            from torchdata.stateful_dataloader import StatefulDataLoader

            return StatefulDataLoader(data, batch_size=4)  # pyright: ignore[reportArgumentType]
        return DataLoader(data, batch_size=4)  # pyright: ignore[reportArgumentType]

    straight, resumed = stopped_and_resumed(make, 3)
    assert resumed == straight
    assert sorted(itertools.chain(*straight)) == list(range(SAMPLES))


def _hugging_face_part(states: Any, stop: int | None, buffer: int) -> Any:
    world = World.start()
    try:
        loader = prepare_loader(_iterable(6, buffer), shard=(world.rank, world.size), world=world)
        if states:
            loader.load_states(states)
        batches = [numbers(batch)[: loader.num_samples] for batch in itertools.islice(iter(loader), stop)]
        return batches, loader.state_dict(), loader.per_rank
    finally:
        world.stop()


@hugging_face
@theirs
@pytest.mark.parametrize("buffer", [0, 7])
def test_an_iterable_data_set_of_hugging_face_goes_on_on_other_numbers_of_ranks(buffer: int, ranks: Any) -> None:
    found: list[int] = []
    states: Any = None
    for count, stop in ((2, 1), (3, 1), (1, None)):
        each = ranks(count, _hugging_face_part, states, stop, buffer)
        found += [x for batches, _, _ in each for batch in batches for x in batch]
        states = [state for _, state, _ in each] if each[0][2] else [each[0][1]]
    assert sorted(found) == list(range(SAMPLES))


# -- mosaicml-streaming, which is not installed here: a stand-in with the protocol that counted.py describes ---------------
class Streaming(IterableDataset[int]):
    """As StreamingDataset: finds its rank by itself; the order is one of (shuffle_seed, epoch); a stale state is not taken."""

    def __init__(self, rank: int = 0, ranks: int = 1, samples: int = SAMPLES) -> None:
        self.rank, self.ranks, self.samples = rank, ranks, samples
        self.next_epoch = 0
        self.resume: dict[str, Any] | None = None
        self.read: list[int] = []

    def _resume(self, epoch: int) -> tuple[int, int]:
        if self.resume is None or self.resume["epoch"] < epoch:
            return epoch, 0
        return self.resume["epoch"], self.resume["sample_in_epoch"]

    def __iter__(self) -> Iterator[int]:
        epoch, start = self._resume(self.next_epoch)
        self.next_epoch = epoch + 1
        order = random.Random(1000 + epoch).sample(range(self.samples), self.samples)
        for sample in order[start + self.rank :: self.ranks]:
            self.read.append(sample)
            yield sample

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        epoch, offset = self._resume(self.next_epoch - 1)
        return {"epoch": epoch, "sample_in_epoch": num_samples + offset * (not from_beginning), "shuffle_seed": 1000}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        self.resume = obj


@pytest.mark.parametrize("stop", [1, 5, 8])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("options", [{}, {"already_sharded": True}])
def test_a_data_set_that_is_told_its_position_goes_on_there(stop: int, epoch: int, options: dict[str, Any]) -> None:
    """In a new process, also in a later epoch, whose number such a data set otherwise counts from 0."""

    def loader(data: Streaming) -> Any:
        return prepare_loader(DataLoader(data, batch_size=4), config=DataLoaderConfiguration(**options))

    whole = loader(Streaming())
    epochs = [[numbers(batch) for batch in whole] for _ in range(epoch + 2)]
    assert all(sorted(itertools.chain(*e)) == list(range(SAMPLES)) for e in epochs)
    assert epochs[0] != epochs[1]
    first = loader(Streaming())
    for _ in range(epoch):
        list(first)
    parts = []
    for batch in first:
        parts.append(numbers(batch))
        if len(parts) == stop:
            break
    second = loader(Streaming())
    second.load_state_dict(first.state_dict())
    assert parts + [numbers(batch) for batch in second] == epochs[epoch]
    assert [numbers(batch) for batch in second] == epochs[epoch + 1]


def test_a_data_set_that_is_told_its_position_reads_only_a_few_batches_again() -> None:
    first, data = prepare_loader(DataLoader(Streaming(samples=400), batch_size=4)), Streaming(samples=400)
    for number, _ in enumerate(first, start=1):
        if number == 70:
            break
    second = prepare_loader(DataLoader(data, batch_size=4))
    second.load_state_dict(first.state_dict())
    next(iter(second))
    assert len(data.read) <= (16 + 2) * 4


def test_a_data_set_that_is_told_its_position_goes_back_within_one_process() -> None:
    """A rollback, also over the end of an epoch."""
    loader = prepare_loader(DataLoader(Streaming(), batch_size=4))
    epochs = []
    for batches in (8, 8):
        epoch = []
        state: Any = None
        for batch in loader:
            epoch.append(numbers(batch))
            if len(epoch) == 3:
                state = loader.state_dict()
        assert len(epoch) == batches
        epochs.append((state, epoch))
    for state, epoch in reversed(epochs):
        loader.load_state_dict(state)
        assert [numbers(batch) for batch in loader] == epoch[3:]
    assert [numbers(batch) for batch in loader] == epochs[1][1]


def _streaming_on_two(stop: int, **options: Any) -> Any:
    world = World.start()
    try:

        def loader() -> Any:
            data = DataLoader(Streaming(world.rank, world.size), batch_size=4)
            return prepare_loader(data, shard=(world.rank, world.size), world=world, config=DataLoaderConfiguration(**options))

        first, parts = loader(), []
        for batch in first:
            parts.append(numbers(batch)[: first.num_samples])
            if len(parts) == stop:
                break
        second = loader()
        second.load_state_dict(first.state_dict())
        return parts + [numbers(batch)[: second.num_samples] for batch in second]
    except ConfigError as error:
        return str(error)
    finally:
        world.stop()


def test_a_data_set_that_finds_its_rank_is_read_by_every_rank(ranks: Any) -> None:
    """Sent from rank 0, as other iterables are, only that rank's half of it would ever be seen."""
    found = ranks(2, _streaming_on_two, 2)
    assert sorted(itertools.chain(*found[0], *found[1])) == list(range(SAMPLES))
    assert all("reads its rank's share by itself" in said for said in ranks(2, _streaming_on_two, 2, dispatch_batches=True))


def test_a_data_set_that_cannot_be_set_back_says_so() -> None:
    class Onward(Streaming):
        """Keeps its next epoch to itself."""

        def __getattribute__(self, name: str) -> Any:
            if name == "next_epoch":
                raise AttributeError(name)
            return super().__getattribute__(name)

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.samples))

        def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
            return {"epoch": 0, "sample_in_epoch": num_samples}

    loader = prepare_loader(DataLoader(Onward(), batch_size=4))
    list(loader)
    state = loader.state_dict() | {"epoch": 0}
    list(loader)
    loader.load_state_dict(state)
    with pytest.raises(CheckpointError, match="stands at epoch 2 and was to go back to epoch 0"):
        list(loader)
