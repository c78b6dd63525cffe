"""Data sets and loaders of other libraries, which we never import: what they offer is found by protocol.

Everywhere the same: stopped after any batch and gone on from there in a new loader, each sample of the epoch comes once, in the
order of the run that was never stopped.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from drivetrain.strategies.world import World
from drivetrain.trainer.data.loader import prepare_loader
from torch.utils.data import DataLoader

SAMPLES = 30

hugging_face = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="waits for Hugging Face datasets (pip install datasets)"
)
grain = pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="waits for grain (pip install grain)")
slow = pytest.mark.slow  # importing these takes seconds
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
@slow
@theirs
@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_data_set_of_hugging_face(workers: int) -> None:
    import datasets  # pyright: ignore[reportMissingImports]

    def make() -> DataLoader[Any]:
        data = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).with_format("torch")
        return DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)

    straight, resumed = stopped_and_resumed(make, 3)
    assert resumed == straight
    assert sorted(itertools.chain(*straight)) == list(range(SAMPLES))
    assert list(itertools.chain(*straight)) != list(range(SAMPLES))


def _iterable(shards: int = 1) -> DataLoader[Any]:
    import datasets  # pyright: ignore[reportMissingImports]

    data = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).to_iterable_dataset(num_shards=shards)
    return DataLoader(data.with_format("torch"), batch_size=4)


@hugging_face
@slow
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
@slow
@theirs
@pytest.mark.parametrize("shards", [4, 1])
def test_an_iterable_data_set_of_hugging_face_is_divided_among_ranks(shards: int, ranks: Any) -> None:
    """By its own shards where it has enough; else rank 0 reads and sends."""
    found = ranks(2, _on_two, shards)
    assert sorted(itertools.chain(*found)) == list(range(SAMPLES))
    assert all(found)


@grain
@slow
@theirs
@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_data_set_of_grain(workers: int) -> None:
    import grain as g  # pyright: ignore[reportMissingImports]

    def make() -> DataLoader[Any]:
        return DataLoader(g.MapDataset.range(SAMPLES), batch_size=4, shuffle=True, num_workers=workers)  # type: ignore[arg-type]

    straight, resumed = stopped_and_resumed(make, 3)
    assert resumed == straight
    assert sorted(itertools.chain(*straight)) == list(range(SAMPLES))


@grain
@slow
@theirs
@pytest.mark.parametrize("stop", [1, 5])
def test_a_pipeline_of_grain_is_read_as_a_loader(stop: int) -> None:
    """Its iterators have get_state, not state_dict: a resume reads what was used up, and drops it."""
    import grain as g  # pyright: ignore[reportMissingImports]

    def make() -> Any:
        return g.MapDataset.range(SAMPLES).shuffle(seed=1).batch(4).to_iter_dataset()

    straight, resumed = stopped_and_resumed(make, stop)
    assert resumed == straight
    assert sorted(itertools.chain(*straight)) == list(range(SAMPLES))
