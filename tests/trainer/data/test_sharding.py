"""Which samples come when, and on which rank: against permutations written out by hand and a ledger of what was read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import ConfigError, DataError
from drivetrain.trainer.data.loader import Loader, prepare_loader
from drivetrain.trainer.data.randomness import mix
from drivetrain.trainer.data.sharding import parts
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


class Numbers(Dataset[int]):
    """Sample i is i. `read` is the ledger."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


def real(loader: Loader) -> list[list[int]]:
    """The samples of each batch, padding left out."""
    return [batch.tolist()[: loader.num_samples] for batch in loader]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def on_every_rank(ranks: int, **arguments: Any) -> list[Loader]:
    return [prepare_loader(DataLoader(**arguments), shard=(rank, ranks), seed=7) for rank in range(ranks)]


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()


def test_the_ragged_tail_is_cut_as_numpy_cuts_arrays() -> None:
    import numpy as np

    for count, ranks in itertools.product(range(12), range(1, 6)):
        assert parts(count, ranks) == [len(part) for part in np.array_split(np.arange(count), ranks)]


def test_the_order_is_one_permutation_of_seed_and_epoch() -> None:
    loader = prepare_loader(DataLoader(Numbers(10), batch_size=4, shuffle=True), seed=3)
    for epoch in range(3):
        assert flat(real(loader)) == permutation(10, 3, epoch)
    assert permutation(10, 3, 0) != permutation(10, 3, 1) != permutation(10, 4, 0)


def test_without_shuffle_the_order_is_that_of_the_data_set() -> None:
    assert real(prepare_loader(DataLoader(Numbers(5), batch_size=2))) == [[0, 1], [2, 3], [4]]


def test_a_users_generator_decides_by_its_seed() -> None:
    """However far it was moved on: that state is not in any checkpoint."""
    for moved in (0, 5):
        generator = torch.Generator().manual_seed(11)
        torch.rand(moved, generator=generator)
        loader = prepare_loader(DataLoader(Numbers(9), batch_size=3, shuffle=True, generator=generator), seed=3)
        assert flat(real(loader)) == permutation(9, 11, 0)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 23])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_sample_is_read_once_over_all_ranks(n: int, batch: int, ranks: int, drop_last: bool) -> None:
    if drop_last and n < batch * ranks:
        with pytest.raises(DataError, match=rf"0 batches on rank 0: {n} samples, world {ranks}, batch {batch}, drop_last=True"):
            on_every_rank(ranks, dataset=Numbers(n), batch_size=batch, drop_last=drop_last)
        return
    loaders = on_every_rank(ranks, dataset=Numbers(n), batch_size=batch, shuffle=True, drop_last=drop_last)
    single = prepare_loader(DataLoader(Numbers(n), batch_size=batch * ranks, shuffle=True, drop_last=drop_last), seed=7)
    each = [real(loader) for loader in loaders]
    whole = real(single)
    assert {len(batches) for batches in each} == {len(whole)} == {len(loaders[0])}
    # The union over ranks of a micro-batch is the single rank's micro-batch, in the same order.
    assert [flat(together) for together in zip(*each, strict=True)] == whole
    seen = sorted(flat(whole))
    assert len(set(seen)) == len(seen) == (n // (batch * ranks) * batch * ranks if drop_last else n)


def test_a_rank_without_samples_gets_one_that_counts_nothing() -> None:
    loaders = on_every_rank(4, dataset=Numbers(10), batch_size=2)
    tails = [list(loader)[-1].tolist() for loader in loaders]
    assert tails == [[8], [9], [8], [8]]
    assert [loader.num_samples for loader in loaders] == [1, 1, 0, 0]
    assert {loader.global_samples for loader in loaders} == {2}


def test_the_loader_says_of_each_batch_what_it_is() -> None:
    loader = on_every_rank(2, dataset=Numbers(11), batch_size=2)[1]
    said = [(loader.num_samples, loader.global_samples, loader.remaining, loader.position, loader.is_last) for _ in loader]
    assert said == [(2, 4, 11, 4, False), (2, 4, 7, 8, False), (1, 3, 3, 11, True)]
    assert (loader.batch_samples, loader.sized, loader.epoch) == (4, True, 0)


def test_samples_of_padding_are_the_only_ones_read_twice() -> None:
    """The ledger of the data set itself: four ranks over one set object."""
    numbers = Numbers(10)
    for loader in on_every_rank(4, dataset=numbers, batch_size=2):
        list(loader)
    assert sorted(numbers.read) == sorted([*range(10), 8, 8])


# -- samplers ---------------------------------------------------------------------------------------------------------
def test_random_sampler_with_num_samples_goes_through_the_set_again() -> None:
    numbers = Numbers(4)
    loader = prepare_loader(DataLoader(numbers, batch_size=3, sampler=RandomSampler(numbers, num_samples=10)), seed=1)
    drawn = flat(real(loader))
    assert [sorted(drawn[:4]), sorted(drawn[4:8]), len(drawn)] == [[0, 1, 2, 3], [0, 1, 2, 3], 10]
    assert flat(real(loader)) != drawn


def test_random_sampler_with_replacement_is_the_same_on_all_ranks() -> None:
    numbers = Numbers(5)
    loaders = on_every_rank(2, dataset=numbers, batch_size=2, sampler=RandomSampler(numbers, replacement=True, num_samples=8))
    one, other = (real(loader) for loader in loaders)
    expected = torch.randint(5, (8,), generator=torch.Generator().manual_seed(mix(7, 0))).tolist()
    assert flat(a + b for a, b in zip(one, other, strict=True)) == expected


@pytest.mark.parametrize("kind", ["weighted", "weighted with a generator", "subset", "list", "own"])
def test_any_sampler_is_replayed_alike_on_all_ranks_and_in_a_later_process(kind: str) -> None:
    class Own(Sampler[int]):
        """Keeps its order in a generator that nobody outside can see."""

        def __init__(self) -> None:
            import random

            self.hidden = random.Random(5)

        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Any:
            return iter(self.hidden.sample(range(8), 8))

    def sampler() -> Any:
        return {
            "weighted": lambda: WeightedRandomSampler([1.0, 2, 3, 4], 8),
            "weighted with a generator": lambda: WeightedRandomSampler(
                [1.0, 2, 3, 4], 8, generator=torch.Generator().manual_seed(3)
            ),
            "subset": lambda: SubsetRandomSampler([3, 1, 2, 0, 7, 5, 6, 4]),
            "list": lambda: [3, 3, 1, 0, 2, 7, 6, 5],
            "own": Own,
        }[kind]()

    def epochs(ranks: int, first: int = 0) -> list[list[int]]:
        plain = [DataLoader(Numbers(8), batch_size=4 // ranks, sampler=sampler()) for _ in range(ranks)]
        loaders = [prepare_loader(loader, shard=(rank, ranks), seed=7) for rank, loader in enumerate(plain)]
        for loader in loaders:
            loader.set_epoch(first)
        return [flat(flat(group) for group in zip(*map(real, loaders), strict=True)) for _ in range(first, 3)]

    before = torch.get_rng_state()
    alone = epochs(1)
    assert torch.equal(before, torch.get_rng_state()), "the training's own random numbers were touched"
    assert epochs(2) == alone
    assert epochs(2, first=2) == alone[2:], "a run that begins at epoch 2 has the order of epoch 2"
    if kind != "list":
        assert alone[0] != alone[1]


def test_an_epoch_of_a_replayed_sampler_can_be_gone_back_to() -> None:
    loader = prepare_loader(DataLoader(Numbers(8), sampler=SubsetRandomSampler(range(8))), seed=1)
    first, second = real(loader), real(loader)
    loader.set_epoch(0)
    assert real(loader) == first != second


def test_a_sampler_that_never_ends_is_refused() -> None:
    class Endless(Sampler[int]):
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            return itertools.cycle([0, 1, 2])

    with pytest.raises(DataError, match=r"Endless says that it has 3 entries and gave more"):
        prepare_loader(DataLoader(Numbers(3), sampler=Endless()))


def test_a_distributed_sampler_is_refused_with_what_to_give_instead() -> None:
    sampler = DistributedSampler(Numbers(8), num_replicas=2, rank=0)
    with pytest.raises(ConfigError, match="shuffle=True in place of the sampler"):
        prepare_loader(DataLoader(Numbers(8), sampler=sampler), shard=(0, 2))


class ByLength(Sampler[list[int]]):
    """Batches of different sizes, as bucketing samplers make."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Any:
        numbers = itertools.count()
        return iter([list(itertools.islice(numbers, size)) for size in self.sizes])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_batches_of_a_batch_sampler_are_dealt_to_the_ranks(ranks: int) -> None:
    sizes = [3, 1, 4, 2, 5]
    loaders = on_every_rank(ranks, dataset=Numbers(15), batch_sampler=ByLength(sizes))
    dealt = [real(loader) for loader in loaders]
    in_turn = [batch for group in zip(*dealt, strict=True) for batch in group if batch]
    assert in_turn == list(ByLength(sizes))
    assert [len(loader) for loader in loaders] == [-(-5 // ranks)] * ranks
    assert {(loader.position, loader.is_last, loader.remaining) for loader in loaders} == {(15, True, None)}


def test_torchs_own_batch_sampler_is_taken_apart() -> None:
    sampler = BatchSampler(SequentialSampler(range(7)), 3, drop_last=True)
    for arguments in ({"batch_sampler": sampler}, {"sampler": sampler, "batch_size": None}):
        tens = [10, 11, 12, 13, 14, 15, 16]
        data = torch.tensor(tens)
        loader = prepare_loader(DataLoader(data, **arguments))  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert [batch.tolist() for batch in loader] == [tens[:3], tens[3:6]]
        assert loader.batch_samples == 3


def test_without_batching_each_index_is_a_batch() -> None:
    loaders = on_every_rank(2, dataset=Numbers(5), batch_size=None)
    assert [list(loader) for loader in loaders] == [[0, 2, 4], [1, 3, 4]]
    assert [loader.num_samples for loader in loaders] == [1, 0]


def test_split_batches_makes_the_loaders_batch_the_global_one() -> None:
    from drivetrain.trainer.data.config import DataLoaderConfiguration

    config = DataLoaderConfiguration(split_batches=True)
    loaders = [prepare_loader(DataLoader(Numbers(8), batch_size=4), shard=(r, 2), config=config) for r in range(2)]
    assert [real(loader) for loader in loaders] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    with pytest.raises(ConfigError, match=r"batch_size=4 the global one, and 3 ranks cannot share it equally.* 1, 2, 4 ranks"):
        prepare_loader(DataLoader(Numbers(8), batch_size=4), shard=(0, 3), config=config)
