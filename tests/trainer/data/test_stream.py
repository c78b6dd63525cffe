"""Loaders without indices: lists, functions, iterable data sets, loaders of other libraries; alone and on two ranks."""

from __future__ import annotations

import json
import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import CheckpointError, ConfigError, DataError
from drivetrain.strategies.world import World
from drivetrain.trainer.data.config import DataLoaderConfiguration
from drivetrain.trainer.data.dispatch import pack, unpack
from drivetrain.trainer.data.loader import Loader, prepare_loader, skip_first_batches
from drivetrain.trainer.data.stream import count_samples, cut
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Stream(IterableDataset[int]):
    """0 ... n-1; in workers each its share."""

    def __init__(self, n: int, first: int = 0, step: int = 1) -> None:
        self.n, self.first, self.step = n, first, step

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return iter(range(self.n)[self.first + worker * self.step :: self.step * workers])


class Shardable(Stream):
    """As Hugging Face's: says into how many parts it can be cut."""

    num_shards = 4

    def shard(self, num_shards: int, index: int) -> Shardable:
        return Shardable(self.n, index, num_shards)


class Stateful(IterableDataset[int]):
    """Keeps its place itself; `read` is the ledger."""

    def __init__(self, n: int) -> None:
        self.n, self.at, self.read = n, 0, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.n:
            self.at += 1
            self.read += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def said(loader: Loader) -> list[tuple[Any, ...]]:
    """Each batch's real samples, those of all ranks, whether it is the last."""
    return [(batch.tolist()[: loader.num_samples], loader.global_samples, loader.is_last) for batch in loader]


def real(loader: Loader) -> list[list[int]]:
    return [batch for batch, *_ in said(loader)]


def two(ranks: Any, what: Callable[[World], Any], count: int = 2) -> list[Any]:
    def run() -> Any:
        world = World.start("cpu", timeout_s=20)
        try:
            return what(world)
        finally:
            world.stop()

    return ranks(count, run)


def prepare(loader: Any, world: World, **options: Any) -> Loader:
    return prepare_loader(loader, shard=(world.rank, world.size), world=world, config=DataLoaderConfiguration(**options))


# -- alone ------------------------------------------------------------------------------------------------------------
SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: [torch.arange(3), torch.arange(3, 6), torch.arange(6, 7)],
    "function": lambda: lambda: iter([torch.arange(3), torch.arange(3, 6), torch.arange(6, 7)]),
    "generator function": lambda: lambda: (torch.arange(3 * i, min(7, 3 * i + 3)) for i in range(3)),
    "data set": lambda: DataLoader(Stream(7), batch_size=3),
    "worker": lambda: DataLoader(Stream(7), batch_size=3, num_workers=1, multiprocessing_context="fork"),
    "stateful data set": lambda: DataLoader(Stateful(7), batch_size=3),
}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_batches_come_in_order_with_the_last_one_known(kind: str) -> None:
    loader = prepare_loader(SOURCES[kind]())
    expected = [([0, 1, 2], 3, False), ([3, 4, 5], 3, False), ([6], 1, True)]
    assert said(loader) == expected
    assert said(loader) == expected
    assert (loader.sized, loader.remaining, loader.position) == (False, None, 7)


@pytest.mark.parametrize("kind", list(SOURCES))
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_goes_on_where_it_was(kind: str, stop: int) -> None:
    """The batch that was read ahead to know the last one is not lost."""
    first, second = (prepare_loader(SOURCES[kind]()) for _ in range(2))
    whole = real(first)
    for number, _ in enumerate(first, start=1):
        if number == stop:
            break
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second.state_dict() == {**state, "ranks": second.state_dict()["ranks"]}
    assert real(second) == whole[stop:]
    assert real(second) == whole


def test_a_data_set_with_a_state_reads_only_a_few_batches_again() -> None:
    data = Stateful(1000)
    first, second = prepare_loader(DataLoader(Stateful(1000), batch_size=2)), prepare_loader(DataLoader(data, batch_size=2))
    for number, _ in enumerate(first, start=1):
        if number == 300:
            break
    second.load_state_dict(first.state_dict())
    assert next(iter(second)).tolist() == [600, 601]
    assert data.read < 2 * 18


def test_one_without_reads_and_drops() -> None:
    loader = prepare_loader(DataLoader(Stream(10), batch_size=2))
    loader.load_state_dict({"version": 1, "kind": "stream", "epoch": 0, "position": 6, "seed": 0})
    assert real(loader) == [[6, 7], [8, 9]]


def test_a_position_that_the_data_do_not_have_is_refused() -> None:
    loader = prepare_loader(DataLoader(Stream(10), batch_size=2))
    loader.load_state_dict({"version": 1, "kind": "stream", "epoch": 0, "position": 5, "seed": 0})
    with pytest.raises(CheckpointError, match="5 samples into epoch 0, and DataLoader has no batch that ends there"):
        list(loader)
    loader.load_state_dict({"version": 1, "kind": "stream", "epoch": 0, "position": 12, "seed": 0})
    with pytest.raises(CheckpointError, match="ended after 5 batches with 10 samples"):
        list(loader)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_keeps_its_own_position(workers: int) -> None:
    pytest.importorskip("torchdata.stateful_dataloader", reason="waits for torchdata")
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make() -> Loader:
        context = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        return prepare_loader(StatefulDataLoader(Shardable(40), batch_size=2, **context))  # pyright: ignore[reportArgumentType]

    first, second = make(), make()
    whole = real(first)
    for number, _ in enumerate(first, start=1):
        if number == 17:
            break
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert real(second) == whole[17:]
    assert real(second) == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_data_loader_with_indices_has_our_order() -> None:
    pytest.importorskip("torchdata.stateful_dataloader", reason="waits for torchdata")
    from torchdata.stateful_dataloader import StatefulDataLoader

    data: Any = torch.arange(20)
    runs = [real(prepare_loader(kind(data, batch_size=3, shuffle=True), seed=4)) for kind in (DataLoader, StatefulDataLoader)]
    assert runs[0] == runs[1]


def test_torchdata_reads_in_workers_with_their_state_when_asked() -> None:
    pytest.importorskip("torchdata.stateful_dataloader", reason="waits for torchdata")
    config = DataLoaderConfiguration(use_stateful_dataloader=True)
    loader = prepare_loader(DataLoader(Stream(9), batch_size=2), config=config)
    source: Any = loader._source
    assert type(source.stream.stateful).__name__ == "StatefulDataLoader"
    assert real(loader) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_torchdata_nodes_keep_their_own_position() -> None:
    nodes = pytest.importorskip("torchdata.nodes", reason="waits for torchdata")

    def make() -> Loader:
        batches = nodes.Batcher(nodes.SamplerWrapper(torch.utils.data.SequentialSampler(range(40))), 2, drop_last=False)
        return prepare_loader(nodes.Loader(nodes.Mapper(batches, torch.tensor)))

    first, second = make(), make()
    whole = real(first)
    for number, _ in enumerate(first, start=1):
        if number == 18:
            break
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert real(second) == whole[18:]


def test_an_iterator_that_can_only_be_run_through_once_says_so_the_second_time() -> None:
    loader = prepare_loader(iter([torch.zeros(2)]))
    assert len(list(loader)) == 1
    with pytest.raises(DataError, match=r"can be run through only once.*without calling it"):
        list(loader)


def test_an_empty_iterable_is_an_error_in_training_only() -> None:
    with pytest.raises(DataError, match="0 batches on rank 0: list ended at once"):
        list(prepare_loader([]))
    assert list(prepare_loader([], training=False)) == []


def test_limit_skip_and_length_hold_for_iterables() -> None:
    loader = prepare_loader(DataLoader(Stream(10), batch_size=2))
    loader.limit = 3
    assert said(loader) == [([0, 1], 2, False), ([2, 3], 2, False), ([4, 5], 2, True)]
    assert real(skip_first_batches(loader, 1)) == [[2, 3], [4, 5]]
    with pytest.raises(TypeError, match="not known before it ends"):
        len(loader)
    assert len(prepare_loader([1, 2, 3])) == 3


def test_random_numbers_of_a_stream_are_those_of_its_epoch_and_batch() -> None:
    def noise() -> Iterator[torch.Tensor]:
        for _ in range(6):
            yield torch.rand(2) + random.random()

    before = torch.get_rng_state(), random.getstate()
    loader, resumed = prepare_loader(noise), prepare_loader(noise)
    whole = [batch.tolist() for batch in loader]
    torch.rand(7)
    for number, _ in enumerate(loader, start=1):
        if number == 2:
            resumed.load_state_dict(loader.state_dict())
    again = prepare_loader(noise)
    again.set_epoch(1)
    assert [batch.tolist() for batch in resumed] == [batch.tolist() for batch in again][2:] != whole[2:]
    torch.set_rng_state(before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_draws_the_random_numbers_of_the_seed_that_was_saved(workers: int) -> None:
    """As a data set with indices does: a script may take another seed each time that it starts."""

    class Noise(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return (torch.rand(2) + random.random() * 0 for _ in range(12))

    def make(seed: int) -> Loader:
        context = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        return prepare_loader(DataLoader(Noise(), batch_size=2, **context), seed=seed)  # pyright: ignore[reportArgumentType]

    whole, first, second = make(1), make(1), make(2)
    epochs = [[batch.tolist() for batch in whole] for _ in range(2)]
    for number, _ in enumerate(first, start=1):
        if number == 2:
            break
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == epochs[0][2:]
    assert [batch.tolist() for batch in second] == epochs[1] != epochs[0]


def test_the_end_and_a_break_are_heard() -> None:
    loader, heard = prepare_loader([torch.zeros(1)] * 3), []
    loader.on_iter = heard.append
    for _ in loader:
        break
    list(loader)
    assert heard == [loader, None] * 2


# -- several ranks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dispatch", [None, False])
@pytest.mark.parametrize("n", [12, 13, 9, 3])
def test_a_stream_is_divided_among_the_ranks(ranks: Any, dispatch: bool | None, n: int) -> None:
    """Rank 0 reads and sends each its slice, or every rank reads all and keeps its slice."""
    each = two(ranks, lambda world: said(prepare(DataLoader(Stream(n), batch_size=3), world, dispatch_batches=dispatch)))
    read = [sample for group in zip(*each, strict=True) for batch, *_ in group for sample in batch]
    assert read == list(range(n))
    for (one, total, last), (other, same_total, same_last) in zip(*each, strict=True):
        assert (total, last) == (same_total, same_last) == (len(one) + len(other), total + min(one) == n)


def test_a_batch_can_be_split_in_place_of_gathered(ranks: Any) -> None:
    each = two(ranks, lambda world: said(prepare(DataLoader(Stream(9), batch_size=4), world, split_batches=True)))
    assert each == [
        [([0, 1], 4, False), ([4, 5], 4, False), ([8], 1, True)],
        [([2, 3], 4, False), ([6, 7], 4, False), ([], 1, True)],
    ]


def test_rank_0_sends_each_rank_only_its_own_part(ranks: Any) -> None:
    """Accelerate broadcasts the whole batch to every rank."""

    def run(world: World) -> int:
        import torch.distributed as dist

        sent, isend = [], dist.isend
        dist.isend = lambda tensor, **where: (sent.append(tensor.nbytes), isend(tensor, **where))[1]
        loader = prepare(DataLoader(Stream(64), batch_size=4, collate_fn=lambda items: torch.zeros(4, 1000)), world)
        assert len(list(loader)) == 4
        return sum(sent)

    sent, *others = two(ranks, run, 4)
    assert others == [0, 0, 0]
    assert 3 * 4 * 16000 < sent < 3 * 4 * 16500


Pair = namedtuple("Pair", "a b")


@dataclass
class Sample:
    x: torch.Tensor
    label: str


def test_nested_batches_of_anything_arrive_as_they_were_sent(ranks: Any) -> None:
    def batches() -> list[Any]:
        return [
            {"x": torch.arange(6).view(2, 3), "text": ["a", "b"], "deep": [(torch.zeros(2, dtype=torch.bool), None)], "n": 3},
            Pair(torch.tensor(1.5), torch.empty(0, 4, dtype=torch.bfloat16)),
            [Sample(torch.ones(2, dtype=torch.complex64).conj(), "é"), torch.arange(6).view(2, 3).T],
        ]

    class Source(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (batch for batch in batches() for _ in range(2))

    each = two(ranks, lambda world: [str(batch) for batch in prepare(DataLoader(Source(), batch_size=None), world)])
    assert each[0] == each[1] == [str(batch) for batch in DataLoader(Source(), batch_size=None)][::2]


def test_an_error_of_the_reading_rank_reaches_the_others_at_once(ranks: Any) -> None:
    def run(world: World) -> str:
        class Breaks(IterableDataset[int]):
            def __iter__(self) -> Iterator[int]:
                yield from range(8)
                raise OSError("the disk is gone")

        try:
            for _ in prepare(DataLoader(Breaks(), batch_size=2), world):
                pass
        except (OSError, DataError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    one, other = two(ranks, run)
    assert one == "OSError: the disk is gone"
    assert other == "DataError: [rank 1/2] rank 0, which reads for all, could not go on: OSError: the disk is gone"


def test_a_break_and_a_second_epoch_keep_the_ranks_together(ranks: Any) -> None:
    def run(world: World) -> list[list[int]]:
        loader = prepare(DataLoader(Stream(20), batch_size=2), world)
        for _ in loader:
            break
        return real(loader)

    assert two(ranks, run) == [[[0, 1], [4, 5], [8, 9], [12, 13], [16, 17]], [[2, 3], [6, 7], [10, 11], [14, 15], [18, 19]]]


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("stateful", [True, False])
def test_a_dispatched_stream_goes_on_on_any_number_of_ranks(ranks: Any, after: int, stateful: bool) -> None:
    def data() -> DataLoader[Any]:
        return DataLoader(Stateful(23) if stateful else Stream(23), batch_size=2)

    def begin(world: World) -> dict[str, Any]:
        loader = prepare(data(), world)
        for number, _ in enumerate(loader, start=1):
            if number == 2:
                break
        return loader.state_dict()

    state, other = two(ranks, begin)
    assert (state["position"], other["position"]) == (8, 8)

    def go_on(world: World) -> list[list[int]]:
        loader = prepare(data(), world)
        loader.load_state_dict(state)
        return real(loader)

    each = two(ranks, go_on, after)
    assert sorted(sample for batches in each for batch in batches for sample in batch) == list(range(8, 23))


def test_a_data_set_that_can_shard_itself_is_read_by_every_rank(ranks: Any) -> None:
    each = two(ranks, lambda world: said(prepare(DataLoader(Shardable(8), batch_size=2), world)))
    assert each == [[([0, 2], 4, False), ([4, 6], 4, True)], [([1, 3], 4, False), ([5, 7], 4, True)]]


@pytest.mark.parametrize("uneven", ["join", "drop"])
def test_ranks_with_different_numbers_of_batches_end_together(ranks: Any, uneven: str) -> None:
    def run(world: World) -> Any:
        mine = [torch.arange(2) + 10 * world.rank] * (1 if world.rank == 0 else 3)
        loader = prepare(mine, world, uneven=uneven)
        return said(loader), loader.batch_samples, said(loader) == said(loader)

    one, other = two(ranks, run)
    assert one[1:] == other[1:] == (4, True)
    if uneven == "join":
        assert one[0] == [([0, 1], 4, False), ([], 2, False), ([], 2, True)]
        assert other[0] == [([10, 11], 4, False), ([10, 11], 2, False), ([10, 11], 2, True)]
    else:
        assert [one[0], other[0]] == [[([0, 1], 4, True)], [([10, 11], 4, True)]]


def test_a_rank_without_any_batch_is_an_error_on_all(ranks: Any) -> None:
    def run(world: World) -> str:
        with pytest.raises(DataError) as caught:
            list(prepare([] if world.rank else [torch.zeros(2)], world))
        return str(caught.value)

    one, other = two(ranks, run)
    assert one.startswith("1 of 2 ranks have no batch at all. Expected")
    assert other.startswith("1 of 2 ranks have no batch at all, this one among them")


def test_an_iterable_for_several_ranks_needs_their_world() -> None:
    with pytest.raises(ConfigError, match="Expected the World"):
        prepare_loader(DataLoader(Stream(3)), shard=(0, 2))


def test_a_batch_that_cannot_be_split_equally_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=3 the global one, and 2 ranks"):
        prepare_loader(DataLoader(Stream(3), batch_size=3), shard=(0, 2), config=DataLoaderConfiguration(split_batches=True))


# -- parts ------------------------------------------------------------------------------------------------------------
def test_cutting_a_batch_cuts_what_has_its_length() -> None:
    import numpy as np

    batch = {
        "x": torch.arange(3),
        "n": np.arange(3),
        "text": ["a", "b", "c"],
        "scale": 2.0,
        "pair": (torch.ones(3, 2), torch.ones(7)),
    }
    one, other = cut(batch, [2, 1])
    assert (one[1], other[1]) == (2, 1)
    assert str(one[0]) == str(
        {
            "x": torch.tensor([0, 1]),
            "n": np.arange(2),
            "text": ["a", "b"],
            "scale": 2.0,
            "pair": (torch.ones(2, 2), torch.ones(7)),
        }
    )
    assert str(other[0]["text"]) == "['c']"
    with pytest.raises(DataError, match="cannot be cut into 2 parts"):
        cut({"x": 3}, [1, 1])


def test_samples_are_counted_by_the_first_dimension() -> None:
    assert [
        count_samples(b) for b in (torch.zeros(4, 2), (torch.zeros(3), 1), {"text": ["a"] * 5}, {"x": {"y": torch.zeros(2)}}, 7)
    ] == [4, 3, 5, 2, 1]


def test_what_is_unpacked_has_memory_of_its_own() -> None:
    x = torch.arange(4.0)
    one, other = unpack(*pack((x, x)))
    one += 1
    assert other.tolist() == x.tolist() == [0, 1, 2, 3]
