"""Samples to batches: equal to a plain DataLoader; random numbers that depend on the sample alone."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drivetrain.strategies.errors import DataError
from drivetrain.trainer.data.collate import in_this_process
from drivetrain.trainer.data.config import DataLoaderConfiguration
from drivetrain.trainer.data.loader import Loader, prepare_loader
from drivetrain.trainer.data.randomness import Numpy, Python, Torch, generators, mix
from drivetrain.trainer.data.reading import TensorReading
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

N = 13


class Augmented(Dataset[Any]):
    """What sample i is depends on the generators named in `draws`; from sample `first` on only."""

    def __init__(self, draws: str, first: int = 0) -> None:
        self.draws = draws
        self.first = first
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        drawn = [0.0, 0.0, 0.0]
        if index >= self.first:
            drawn = [
                random.random() if "python" in self.draws else 0.0,
                float(np.random.randn()) if "numpy" in self.draws else 0.0,
                torch.rand(()).item() if "torch" in self.draws else 0.0,
            ]
        return index, torch.tensor(drawn, dtype=torch.float64)


class Many(Augmented):
    """With __getitems__, the torch way."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def make(dataset: Any, rank: int = 0, ranks: int = 1, batch: int = 4, **arguments: Any) -> Loader:
    if arguments.get("num_workers"):
        arguments["multiprocessing_context"] = "fork"
    if "sampler" not in arguments:
        arguments.setdefault("shuffle", True)
    return prepare_loader(DataLoader(dataset, batch_size=batch, **arguments), shard=(rank, ranks), seed=3)


def by_index(*loaders: Loader) -> dict[int, list[float]]:
    return {
        int(index): numbers.tolist()
        for loader in loaders
        for indices, drawn in loader
        for index, numbers in list(zip(indices, drawn, strict=True))[: loader.num_samples]
    }


def states() -> str:
    return str((random.getstate(), torch.get_rng_state().tolist(), np.random.get_state(legacy=False)))


def seed_all() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


ALL = "python numpy torch"


# -- random numbers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("draws", [ALL, "python", "numpy", "torch"])
def test_a_samples_random_numbers_do_not_depend_on_workers_ranks_or_batches(draws: str) -> None:
    expected = by_index(make(Augmented(draws)))
    assert len({tuple(numbers) for numbers in expected.values()}) == N
    seed_all()  # what the training draws meanwhile
    assert by_index(make(Augmented(draws), num_workers=2)) == expected
    assert by_index(make(Augmented(draws), batch=1), make(Augmented(draws), batch=5)) == expected
    assert by_index(*(make(Augmented(draws), rank, 3, batch=2) for rank in range(3))) == expected
    loader = make(Augmented(draws))
    loader.set_epoch(1)
    assert all(numbers != expected[index] for index, numbers in by_index(loader).items())


def test_the_seed_is_a_function_of_run_epoch_and_index() -> None:
    drawn = by_index(make(Augmented("python")))
    assert all(numbers[0] == random.Random(mix(mix(3, 0), index)).random() for index, numbers in drawn.items())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 9, N])
def test_the_training_processes_own_random_numbers_are_not_touched(workers: int, first: int) -> None:
    """Dropout draws from the same generators: its masks must not depend on how the data are read."""
    seed_all()
    np.random.randn()  # leaves the second of a pair of normal numbers in the generator
    before = states()
    for _ in make(Augmented(ALL, first), batch=1, num_workers=workers):
        assert states() == before


@pytest.mark.parametrize("draws", ["python", "numpy", "torch", ALL])
def test_a_data_set_that_begins_to_draw_late_has_the_same_numbers(draws: str) -> None:
    """Its first batches draw nothing, so the generators are only watched; the batch that draws is read again, seeded."""
    dataset = Augmented(draws, first=N - 1)
    late = make(dataset, batch=1, shuffle=False)
    assert by_index(late) == by_index(make(Augmented(draws, first=N - 1), num_workers=1, batch=1, shuffle=False))
    assert dataset.read == [*range(N), N - 1]


def test_a_data_set_that_draws_is_read_once() -> None:
    dataset = Augmented(ALL)
    for _ in range(2):
        list(make(dataset))
    assert sorted(dataset.read) == sorted([*range(N)] * 2)


def test_an_index_that_comes_twice_gets_other_numbers_the_second_time() -> None:
    loader = make(Augmented("torch"), sampler=WeightedRandomSampler([1.0, *[0.0] * (N - 1)], 6))
    drawn = [numbers[2].item() for _, batch in loader for numbers in batch]
    assert len(set(drawn)) == 6


def test_a_resumed_run_has_the_random_numbers_of_the_unbroken_one() -> None:
    whole = [batch[1].tolist() for batch in make(Augmented(ALL), batch=2)]
    for workers in (0, 2):
        loader = make(Augmented(ALL), batch=2, num_workers=workers)
        loader.load_state_dict({**loader.state_dict(), "position": 6})
        assert [batch[1].tolist() for batch in loader] == whole[3:]


def test_numbers_drawn_while_collating_are_the_same_with_and_without_workers() -> None:
    def noisy(samples: list[Any]) -> Any:
        return default_collate(samples)[1] + torch.rand(()) + random.random()

    runs = [[batch.tolist() for batch in make(Augmented("torch"), collate_fn=noisy, num_workers=workers)] for workers in (0, 2)]
    assert runs[0] == runs[1]


def test_data_sets_with_getitems_are_seeded_by_batch() -> None:
    runs = [by_index(make(Many(ALL), num_workers=workers)) for workers in (0, 2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", ["numpy", "tensor", "batches of tensors"])
def test_indices_may_be_numbers_of_numpy_or_torch(kind: str) -> None:
    """Samplers give what `np.random.permutation` or `torch.randperm` made."""
    order = [5, 1, 3, 0]
    given: Any = {
        "numpy": {"sampler": list(np.array(order)), "batch_size": 2},
        "tensor": {"sampler": list(torch.tensor(order)), "batch_size": 2},
        "batches of tensors": {"batch_sampler": list(torch.tensor(order).view(2, 2))},
    }[kind]
    plain = {"sampler": order, "batch_size": 2}
    runs = [by_index(prepare_loader(DataLoader(Augmented("torch"), **options), seed=3)) for options in (given, plain)]
    assert runs[0] == runs[1]
    assert sorted(runs[0]) == sorted(order)


def test_seeding_can_be_switched_off() -> None:
    config = DataLoaderConfiguration(seed_samples=False)
    loader = prepare_loader(DataLoader(Augmented("torch"), batch_size=4), config=config)
    torch.manual_seed(5)
    drawn = [numbers[2].item() for _, batch in loader for numbers in batch]
    torch.manual_seed(5)
    assert drawn == [torch.rand(()).item() for _ in range(N)]


DRAWS: dict[Any, list[Callable[[], Any]]] = {
    Python: [random.random, lambda: random.gauss(0, 1), lambda: random.getrandbits(40)],
    Numpy: [np.random.rand, np.random.randn, lambda: np.random.randint(9)],
    Torch: [
        lambda: torch.rand(()).item(),
        lambda: torch.randn(()).item(),
        lambda: torch.randn((), dtype=torch.float64).item(),
        lambda: torch.randint(9, ()).item(),
        lambda: torch.randn(20).tolist(),
    ],
}


@pytest.mark.parametrize("looks", ["memory", "state"])
@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("draws", [1, 3, 700, 2000])
def test_watching_a_generator_sees_every_draw_and_can_undo_it(kind: Any, draws: int, looks: str) -> None:
    """Of every kind: half of the normal numbers come out of a store beside the generator. And where its memory is not known."""
    generator: Any = next(generator for generator in generators() if isinstance(generator, kind))
    if looks == "state" and kind is not Numpy:
        generator = kind()
        generator._whole = generator._few = generator._waiting = None
    for draw in DRAWS[kind]:
        generator.seed(3)
        for begin in (0, 1):  # with and without a number in that store
            mark, before = generator.mark(), generator.glance()
            assert generator.glance() == before
            first = [draw() for _ in range(draws)]
            assert generator.glance() != before
            generator.put_back(mark)
            assert generator.glance() == before
            assert [draw() for _ in range(draws + begin)][:draws] == first
            state = generator.save()
            draw()
            generator.restore(state)


def test_the_memory_of_every_generator_is_known_here() -> None:
    """Otherwise watching costs tens of microseconds a batch, and nobody would notice."""
    every: list[Any] = generators()
    assert len(every) == 3
    assert all(generator._few is not None for generator in every)


def test_looking_for_the_memory_draws_nothing_and_works_under_another_default_device() -> None:
    before = states()
    with torch.device("meta"):
        assert Torch()._few is not None
    assert Python()._few is not None
    assert states() == before


def test_a_single_draw_of_any_kind_is_seen() -> None:
    every: list[Any] = generators()
    for generator in every:
        for draw in DRAWS[type(generator)]:
            for _ in range(1400):  # past the point where all words are made anew, twice
                before = generator.glance()
                draw()
                assert generator.glance() != before


def test_a_data_set_that_puts_its_random_numbers_back_itself_is_read_once() -> None:
    class Careful(Dataset[int]):
        read = 0

        def __len__(self) -> int:
            return 80

        def __getitem__(self, index: int) -> int:
            Careful.read += 1
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(index)
                torch.rand(3)
            return index

    assert sum(len(batch) for batch in make(Careful())) == 80
    assert Careful.read == 80


# -- collating --------------------------------------------------------------------------------------------------------
Point = namedtuple("Point", "x y")
ROWS: dict[str, Callable[[int], Any]] = {
    "tensor": lambda i: torch.tensor([i, i + 1.0]),
    "pair": lambda i: (torch.tensor([i]), torch.tensor(i * 1.0)),
    "tensor and number": lambda i: (torch.tensor([i]), i, float(i), str(i), np.float32(i), None if i < 0 else True),
    "dict": lambda i: {"y": torch.tensor(i), "x": [torch.tensor([i]), i], "name": f"n{i}"},
    "ordered dict": lambda i: OrderedDict(b=torch.tensor(i), a=i),
    "named tuple": lambda i: Point(torch.tensor(i), i),
    "list": lambda i: [torch.tensor(i), (torch.tensor(i), i)],
    "subclass": lambda i: (torch.nn.Parameter(torch.tensor([i * 1.0])), torch.tensor(True)),
    "array": lambda i: np.arange(i, i + 3),
    "number": lambda i: i,
    "empty tensors": lambda i: (torch.empty(0, 2), torch.tensor(i)),
    "nested tuple": lambda i: ((torch.tensor(i), {"a": torch.tensor([i])}), torch.tensor(i, dtype=torch.bfloat16)),
    "tuple, then list": lambda i: (torch.tensor(i), i) if i == 0 else [torch.tensor(i), i],
    "nothing": lambda i: (),
}
WRONG: dict[str, Callable[[int], Any]] = {
    "shapes": lambda i: (torch.zeros(i + 1),),
    "lengths": lambda i: tuple(torch.zeros(1) for _ in range(i + 1)),
    "keys": lambda i: {f"k{i}": torch.zeros(1)},
    "types": lambda i: (torch.zeros(1) if i == 0 else "a",),
    "sparse": lambda i: (torch.eye(2).to_sparse(),),
    "an object": lambda i: (torch.zeros(1), object()),
    "a row that is a number": lambda i: (torch.zeros(1),) if i == 0 else 3,
}


def told(batch: Any) -> str:
    tensors = batch if isinstance(batch, list) else []
    return f"{type(batch)} {batch!r} {[t.requires_grad for t in tensors if isinstance(t, torch.Tensor)]}"


@pytest.mark.parametrize("kind", ROWS)
def test_collating_gives_what_torch_gives(kind: str) -> None:
    rows = [ROWS[kind](i) for i in range(3)]
    assert told(in_this_process(default_collate)(rows)) == told(default_collate(rows))


@pytest.mark.parametrize("kind", WRONG)
def test_what_torch_cannot_collate_fails_in_the_same_way(kind: str) -> None:
    rows = [WRONG[kind](i) for i in range(3)]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        default_collate(rows)
    with pytest.raises(expected.type) as caught:
        in_this_process(default_collate)(rows)
    assert str(caught.value) == str(expected.value)


def test_types_that_a_user_registers_with_torch_are_followed() -> None:
    from torch.utils.data._utils.collate import default_collate_fn_map as types

    def total(batch: Any, *, collate_fn_map: Any) -> Any:
        return sum(batch)

    rows = [(torch.tensor(i), i) for i in range(4)]
    collate = in_this_process(default_collate)
    theirs: Any = types
    plain = told(collate(rows))
    for kind in (torch.Tensor, tuple):
        before = dict(theirs)
        try:
            theirs[kind] = total if kind is torch.Tensor else lambda batch, *, collate_fn_map: "tuples"
            assert told(collate(rows)) == told(default_collate(rows)) != plain
        finally:
            theirs.clear()
            theirs.update(before)
    assert told(collate(rows)) == plain


def test_a_collate_function_of_ones_own_is_left_alone() -> None:
    assert in_this_process(list) is list


# -- the same batches as a plain DataLoader ---------------------------------------------------------------------------
X: Any = torch.arange(N * 6.0).view(N, 3, 2)
Y: Any = torch.arange(N)


@pytest.mark.parametrize(
    ("dataset", "fast"),
    [
        (TensorDataset(X, Y), True),
        (TensorDataset(X), True),
        (Subset(TensorDataset(X, Y), [5, 3, -1, 0]), True),
        (Subset(Subset(TensorDataset(X, Y), [5, 3, 9, 0, 1]), range(1, 4)), True),
        (TensorDataset(X.transpose(1, 2)), False),
        (TensorDataset(torch.nn.Parameter(X)), False),
        (ConcatDataset([TensorDataset(X, Y), TensorDataset(X, Y)]), False),
        (StackDataset(X, Y), False),
        (StackDataset(x=X, y=Y), False),
        (Many(""), False),
        (Subset(Many(""), [3, 4, 5]), False),
        ([{"a": i, "b": "x"} for i in range(5)], False),
    ],
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_equal_those_of_a_plain_loader_with_the_same_order(dataset: Any, fast: bool, drop_last: bool) -> None:
    loader = prepare_loader(DataLoader(dataset, batch_size=3, shuffle=True, drop_last=drop_last), seed=2)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(mix(2, 0))).tolist()
    plain = list(DataLoader(dataset, batch_size=3, sampler=order, drop_last=drop_last))
    ours = list(loader)
    assert (TensorReading.of(dataset, default_collate) is not None) is fast
    assert str(ours) == str(plain)
    assert [type(batch) for batch in ours] == [type(batch) for batch in plain]


def test_batches_of_tensors_have_memory_of_their_own() -> None:
    tensors = TensorDataset(torch.zeros(8))
    for (batch,) in prepare_loader(DataLoader(tensors, batch_size=4)):
        batch += 1
    assert tensors.tensors[0].sum() == 0


def test_a_weighted_sampler_over_tensors_takes_the_short_way_too() -> None:
    sampler = WeightedRandomSampler([1.0] * N, N)
    direct = make(TensorDataset(Y), sampler=sampler)
    source: Any = direct._source
    assert source._tensors is not None
    long_way = make(Y, sampler=sampler)
    assert [batch[0].tolist() for batch in direct] == [batch.tolist() for batch in long_way]


# -- errors -----------------------------------------------------------------------------------------------------------
class Broken(Dataset[Any]):
    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if index == 4:
            if self.how == "raises":
                raise KeyError("no such picture")
            if self.how == "stops":
                raise StopIteration
            if self.how == "none":
                return None
            if self.how == "ragged":
                return torch.zeros(3)
        return torch.zeros(2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"Sample 4 of Broken{where} could not be read: KeyError: 'no such picture' Repair the sample"),
        ("stops", r"Sample 4 of Broken{where} could not be read: StopIteration"),
        ("none", r"Sample 4 of Broken{where} is None"),
        ("ragged", r"The samples 3, 4, 5 of Broken{where} do not make a batch: RuntimeError: stack expects"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named(how: str, message: str, workers: int, seeded: bool) -> None:
    config = DataLoaderConfiguration(seed_samples=seeded)
    plain = DataLoader(Broken(how), batch_size=3, num_workers=workers, multiprocessing_context="fork" if workers else None)
    where = r" \(worker 0\)" if workers else ""
    with pytest.raises(DataError, match=message.format(where=where)) as caught:
        list(prepare_loader(plain, config=config))
    if workers:
        assert "in __getitem__" in "".join(caught.value.__notes__), "the worker's traceback is a note"


def test_workers_can_be_spawned() -> None:
    plain = DataLoader(TensorDataset(Y), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert [batch[0].tolist() for batch in prepare_loader(plain)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]


# -- signals ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="waits for a platform that says who sent a signal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("iterable", [False, True])
def test_signals_to_the_whole_process_group_do_not_end_the_workers(name: str, iterable: bool) -> None:
    """A job system that asks for a checkpoint signals every process; the trainer needs its workers until it has saved."""

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            info = get_worker_info()
            assert info is not None
            return iter(range(info.id, N, 2))

    streamed = DataLoader(Stream(), num_workers=2, multiprocessing_context="fork")
    batches = iter(prepare_loader(streamed) if iterable else make(TensorDataset(Y), num_workers=2, batch=1))
    next(batches)
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", f"-{name.removeprefix('SIG')}", str(worker.pid)], check=True)
    assert len(list(batches)) == N - 1


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_says_so() -> None:
    loader = make(TensorDataset(Y), num_workers=1, batch=1)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    started = time.monotonic()
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0, "what torch's own handler does when the parent sends SIGTERM"
    assert time.monotonic() - started < 10
    with pytest.raises(DataError, match=r"The workers of the loader stopped: .* exited unexpectedly"):
        list(batches)


def test_a_worker_that_takes_too_long_is_an_error_of_the_data() -> None:
    class Slow(Broken):
        def __getitem__(self, index: int) -> Any:
            time.sleep(1)

    with pytest.raises(DataError, match=r"The workers of the loader stopped: DataLoader timed out after 0\.2 seconds"):
        list(make(Slow(""), num_workers=1, timeout=0.2))
