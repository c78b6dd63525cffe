"""Positions, epochs and what a loader says of itself. Truth: the same loader run without a stop, or a plain DataLoader."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import CheckpointError, ConfigError, DataError
from drivetrain.trainer.data.config import DataLoaderConfiguration
from drivetrain.trainer.data.loader import Loader, prepare_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler


class Numbers(Dataset[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def make(n: int = 22, batch: int = 3, rank: int = 0, ranks: int = 1, seed: int = 5, **arguments: Any) -> Loader:
    arguments = {"shuffle": True, **arguments} if not arguments.keys() & {"sampler", "batch_sampler"} else arguments
    if arguments.get("num_workers"):
        arguments["multiprocessing_context"] = "fork"
    if "batch_sampler" not in arguments:
        arguments["batch_size"] = batch
    return prepare_loader(DataLoader(Numbers(n), **arguments), shard=(rank, ranks), seed=seed)


def real(loader: Loader) -> list[list[int]]:
    return [batch.tolist()[: loader.num_samples] for batch in loader]


class Buckets(Sampler[list[int]]):
    """Batches of several sizes, shuffled by the global generator of `random`."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        numbers = random.sample(range(15), 15)
        return iter([numbers[a:b] for a, b in ((0, 3), (3, 4), (4, 8), (8, 10), (10, 14), (14, 15))])


KINDS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "drop_last": {"drop_last": True},
    "replacement": {"sampler": RandomSampler(Numbers(22), replacement=True, num_samples=20)},
    "weighted": {"sampler": WeightedRandomSampler([1.0, 2, 3] * 6, 22)},
    "batch sampler": {"batch_sampler": Buckets()},
}


# -- resume -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_at_every_position(kind: str, workers: int) -> None:
    """A new process, whose own seed is another one: the state alone says where to go on. Then whole epochs follow."""
    arguments = {**KINDS[kind], "num_workers": workers}
    whole = make(**arguments)
    epochs = [real(whole) for _ in range(3)]
    length = len(epochs[0])
    for stop in range(1, length + 1) if not workers else (1, 3, length):
        first = make(**arguments)
        first.set_epoch(1)
        for number, _ in enumerate(first, start=1):
            if number == stop:
                break
        state = json.loads(json.dumps(first.state_dict()))
        second = make(seed=99, **{**arguments, "num_workers": 2 if not workers and stop == 2 else workers})
        second.load_state_dict(state)
        assert (second.epoch, second.position) == (1, first.position)
        assert real(second) == epochs[1][stop:]
        assert real(second) == epochs[2]


def test_prefetched_batches_do_not_count_as_consumed() -> None:
    loader = make(n=100, num_workers=2, prefetch_factor=4)
    batches = iter(loader)
    next(batches)
    assert loader.state_dict()["position"] == loader.position == 3


def test_persistent_workers_begin_each_epoch_anew_and_after_a_break_too() -> None:
    loader, plain = make(num_workers=2, persistent_workers=True), make()
    for batch in loader:
        assert batch.tolist() == next(iter(plain)).tolist()
        break
    assert real(loader) == real(plain)
    assert real(loader) == real(plain)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("change", [(1, 2), (2, 1), (2, 3), (3, 1), (4, 2)])
def test_another_number_of_ranks_goes_on_and_reads_every_sample_once(change: tuple[int, int], drop_last: bool) -> None:
    before, after = change
    for stop in (1, 2):
        first = [make(n=37, batch=4, rank=r, ranks=before, drop_last=drop_last) for r in range(before)]
        read: list[int] = []
        for loader in first:
            for number, batch in enumerate(loader, start=1):
                read += batch.tolist()[: loader.num_samples]
                if number == stop:
                    break
        states = [loader.state_dict() for loader in first]
        assert states == states[:1] * before
        second = [make(n=37, batch=4, rank=r, ranks=after, drop_last=drop_last) for r in range(after)]
        for loader in second:
            loader.load_state_dict(states[0])
            read += [sample for batch in real(loader) for sample in batch]
        assert len(set(read)) == len(read)
        assert len(read) == 37 if not drop_last else len(read) > 37 - 4 * after


def test_the_state_is_five_numbers_whatever_the_size() -> None:
    loader = make(n=1000)
    next(iter(loader))
    assert loader.state_dict() == {"version": 1, "kind": "indexed", "epoch": 0, "position": 3, "seed": 5, "samples": 1000}


def test_resuming_reads_no_data() -> None:
    class Ledger(Numbers):
        read = 0

        def __getitem__(self, index: int) -> int:
            self.read += 1
            return index

    ledger = Ledger(1000)
    loader = prepare_loader(DataLoader(ledger, batch_size=2, shuffle=True))
    loader.load_state_dict({"version": 1, "kind": "indexed", "epoch": 4, "position": 990, "seed": 0, "samples": 1000})
    assert len(list(loader)) == 5
    assert ledger.read == 10


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1}, "is not the state of a prepared loader"),
        (None, "is not the state of a prepared loader"),
        ({"version": 9, "kind": "indexed", "epoch": 0, "position": 0, "seed": 0}, "has version 9; this drivetrain reads up to 1"),
        (
            {"version": 1, "kind": "stream", "epoch": 0, "position": 0, "seed": 0},
            "loader read an iterable, this one reads indices",
        ),
        ({"version": 1, "kind": "indexed", "epoch": 0, "position": -3, "seed": 0}, "is not the state of a prepared loader"),
        (
            {"version": 1, "kind": "indexed", "epoch": 0, "position": 24, "seed": 0, "samples": 22},
            "which is behind the end",
        ),
        (
            {"version": 1, "kind": "indexed", "epoch": 0, "position": 3, "seed": 0, "samples": 30},
            "stands at sample 3 of 30, and this data set has 22 samples",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(state: Any, message: str) -> None:
    loader = make()
    before = loader.state_dict()
    with pytest.raises(CheckpointError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


# -- epochs -----------------------------------------------------------------------------------------------------------
def test_epochs_count_up_unless_they_are_set() -> None:
    loader = make()
    first, second = real(loader), real(loader)
    assert first != second
    loader.set_epoch(0)
    assert real(loader) == first
    assert real(loader) == second


def test_after_an_epoch_the_state_is_the_start_of_the_next() -> None:
    loader = make()
    list(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)


def test_on_the_last_batch_the_state_is_the_end_of_the_epoch() -> None:
    """A checkpoint inside the loop body: the resumed epoch has nothing left, the one after it is whole."""
    loader, resumed = make(), make()
    for _ in loader:
        if loader.is_last:
            resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    assert real(resumed) == real(loader)


def test_setting_the_epoch_that_was_loaded_keeps_the_position_and_another_drops_it() -> None:
    loader = make()
    epochs = [real(loader) for _ in range(3)]
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "position": 6})
    loader.set_epoch(1)
    assert real(loader) == epochs[1][2:]
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "position": 6})
    loader.set_epoch(2)
    assert real(loader) == epochs[2]


def test_an_evaluation_sees_the_same_order_each_time() -> None:
    loader = prepare_loader(DataLoader(Numbers(9), batch_size=2, shuffle=True), training=False)
    assert real(loader) == real(loader)


# -- iterations -------------------------------------------------------------------------------------------------------
def test_whoever_listens_hears_the_beginning_and_the_end() -> None:
    loader, heard = make(n=4, batch=2), []
    loader.on_iter = heard.append
    for _ in loader:
        assert heard == [loader]
    assert heard == [loader, None]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_that_is_broken_off_is_over(workers: int) -> None:
    """Accelerate's D6: after a break the loader stayed active, and the next steps were taken for the end of its data."""
    loader, heard = make(num_workers=workers), []
    loader.on_iter = heard.append
    for _ in loader:
        break
    assert heard == [loader, None]

    def fails() -> None:
        for _ in loader:
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert heard == [loader, None] * 2


def test_a_limit_ends_the_epoch() -> None:
    loader = make(n=20, batch=2, ranks=2)
    loader.limit = 3
    assert [(loader.is_last, loader.remaining) for _ in loader] == [(False, 12), (False, 8), (True, 4)]
    assert (len(loader), loader.position) == (3, 12)
    assert loader.state_dict()["epoch"] == 1
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 4})
    assert len(list(loader)) == 2


def test_a_loader_is_true_and_has_the_length_of_its_epochs() -> None:
    assert [len(make(n=10, batch=2, ranks=2, drop_last=drop)) for drop in (False, True)] == [3, 2]
    assert bool(make())


def test_attributes_of_the_users_loader_are_still_there() -> None:
    loader = make(n=10, batch=2, ranks=2)
    assert (loader.batch_size, loader.num_workers, loader.total_batch_size, loader.total_dataset_length) == (2, 0, 4, 10)
    assert loader.dataset.n == 10
    with pytest.raises(AttributeError, match="Neither a prepared loader nor its DataLoader has an attribute 'batchsize'"):
        _ = loader.batchsize


@pytest.mark.parametrize("skip", [0, 1, 2, 5])
def test_skipped_batches_leave_everything_else_as_it_was(skip: int) -> None:
    """Accelerate's D8b: a skipping loader forgot its padding (9 samples gathered as 12) and its flags."""
    whole = [real(make(n=9, batch=2, rank=r, ranks=2)) for r in range(2)]
    gathered: list[int] = []
    for rank in range(2):
        loader = make(n=9, batch=2, rank=rank, ranks=2)
        heard: list[Any] = []
        loader.on_iter, loader.transfer = heard.append, lambda batch: batch
        view = skip_first_batches(loader, skip)
        rest = real(view)
        assert rest == whole[rank][skip:]
        gathered += [sample for batch in rest for sample in batch]
        assert (view.transfer, len(view), view.is_last) == (loader.transfer, max(0, 3 - skip), skip < 3)
        assert heard == [view, None]
        assert loader.state_dict() == {**loader.state_dict(), "epoch": 1, "position": 0}, "the epoch is shared"
    assert len(gathered) == len(set(gathered)) == max(0, 9 - 4 * skip)


def test_the_position_of_a_skipping_view_is_that_of_the_loader() -> None:
    loader = make(n=9, batch=2)
    for _ in skip_first_batches(loader, 2):
        assert loader.state_dict()["position"] == 6
        break


def test_every_flag_of_the_users_loader_reaches_the_workers(tmp_path: Any) -> None:
    def started(worker: int) -> None:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        (tmp_path / f"{worker}").write_text(type(info.dataset).__name__)

    plain = DataLoader(
        Numbers(8),
        batch_size=2,
        num_workers=2,
        worker_init_fn=started,
        timeout=30,
        prefetch_factor=3,
        multiprocessing_context="fork",
    )
    loader = prepare_loader(plain)
    source: Any = loader._source
    workers = source._workers
    assert (workers.timeout, workers.prefetch_factor, workers.persistent_workers) == (30, 3, False)
    assert workers.multiprocessing_context is plain.multiprocessing_context
    list(loader)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "Numbers", "1": "Numbers"}


def test_a_batch_goes_to_the_device_it_was_prepared_for() -> None:
    data = [{"x": torch.ones(2), "name": "a", "pair": (torch.zeros(1), 3)}] * 4
    loader = prepare_loader(DataLoader(data, batch_size=2), device="meta")  # pyright: ignore[reportArgumentType]
    batch = next(iter(loader))
    assert (batch["x"].device.type, batch["pair"][0].device.type, batch["name"]) == ("meta", "meta", ["a", "a"])


def test_on_the_cpu_a_batch_is_handed_out_as_it_was_made() -> None:
    made: list[Any] = []
    loader = prepare_loader(DataLoader(Numbers(2), collate_fn=lambda items: made.append(items) or items))
    assert [batch is kept for batch, kept in zip(loader, made, strict=False)] == [True, True]


# -- wrong use --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, "There is no loader: it is None"),
        ("train", "A str is not a loader"),
        (3, "A int is not a loader"),
        (torch.zeros(3), "A Tensor is not a loader"),
        (torch.nn.Linear(2, 2), r"Linear is a model \(nn.Module\), not a loader. Expected .* the model comes first"),
        (Numbers(3), r"Numbers is a data set, not a loader.*DataLoader\(dataset, batch_size=32, shuffle=True\)"),
        ([DataLoader(Numbers(3))], "A list of DataLoaders is not one loader"),
        ({"a": DataLoader(Numbers(3))}, "A dict of DataLoaders is not one loader"),
        (DataLoader(Numbers(3), num_workers=1, in_order=False), "in_order=False"),
    ],
)
def test_what_is_not_a_loader_is_refused_with_what_would_be_one(what: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare_loader(what)


def test_an_iterable_data_set_without_a_loader_is_refused() -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter([1])

    with pytest.raises(ConfigError, match=r"Endless is a data set, not a loader.*batch_size=None"):
        prepare_loader(Endless())


def test_a_loader_is_prepared_once() -> None:
    with pytest.raises(ConfigError, match="prepared already"):
        prepare_loader(make())


@pytest.mark.parametrize(("n", "drop_last", "samples"), [(0, False, "0 samples"), (3, True, "3 samples")])
def test_nothing_to_train_on_is_an_error_and_nothing_to_evaluate_a_warning(n: int, drop_last: bool, samples: str) -> None:
    plain = DataLoader(Numbers(n), batch_size=4, drop_last=drop_last)
    with pytest.raises(DataError, match=f"0 batches on rank 1: {samples}, world 2, batch 4, drop_last={drop_last}"):
        prepare_loader(plain, shard=(1, 2))
    with pytest.warns(UserWarning, match="0 batches on rank 0"):
        loader = prepare_loader(plain, training=False)
    assert list(loader) == []


def test_a_subclass_that_iterates_in_its_own_way_is_not_divided_behind_its_back() -> None:
    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([torch.tensor([1]), torch.tensor([2])])

    assert [batch.tolist() for batch in prepare_loader(Own(Numbers(3)))] == [[1], [2]]
    with pytest.raises(ConfigError, match="already_sharded=True"):
        prepare_loader(Own(Numbers(3)), shard=(0, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split_batches": 1}, "split_batches=1; expected one of True, False"),
        ({"dispatch_batches": "yes"}, "dispatch_batches='yes'"),
        ({"data_seed": "7"}, "data_seed='7'; expected a whole number"),
        ({"uneven": "pad"}, "uneven='pad'; expected one of 'join', 'drop'"),
        ({"already_sharded": True, "dispatch_batches": True}, "already_sharded=True with dispatch_batches=True"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataLoaderConfiguration(**arguments)


def test_dispatching_a_data_set_with_indices_is_refused() -> None:
    with pytest.raises(ConfigError, match="each rank reads its own slice"):
        prepare_loader(DataLoader(Numbers(3)), config=DataLoaderConfiguration(dispatch_batches=True))


def test_the_data_seed_decides_the_order() -> None:
    config = DataLoaderConfiguration(data_seed=5)
    assert real(prepare_loader(DataLoader(Numbers(22), batch_size=3, shuffle=True), seed=1, config=config)) == real(make())


def test_tensors_are_what_a_plain_loader_gives() -> None:
    x, y = torch.randn(10, 3), torch.arange(10)
    plain = DataLoader(TensorDataset(x, y), batch_size=4)
    for ours, theirs in zip(prepare_loader(plain), plain, strict=True):
        assert type(ours) is type(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_different_data_on_the_ranks_is_noticed(ranks: Any) -> None:
    def prepare(differ: str) -> str:
        from drivetrain.strategies.world import World

        world = World.start("cpu")
        try:
            generator = torch.Generator().manual_seed(world.rank if differ == "seed" else 0)
            data = Numbers(10 + (world.rank if differ == "data" else 0))
            prepare_loader(DataLoader(data, shuffle=True, generator=generator), shard=(world.rank, 2), world=world)
        except DataError as error:
            return str(error)
        finally:
            world.stop()
        return ""

    assert ranks(2, prepare, "") == ["", ""]
    assert all("Ranks 0 and 1 have different loaders: samples 10 and 11." in said for said in ranks(2, prepare, "data"))
    assert all("seed of the order 0 and 1." in said for said in ranks(2, prepare, "seed"))
