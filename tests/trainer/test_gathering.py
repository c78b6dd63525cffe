"""gather, gather_for_metrics, reduce, broadcast and pad over ranks: exact, for nested values, scalars and ragged batches."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.errors import ConfigError, UnknownName
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

Pair = namedtuple("Pair", ["first", "second"])


def loader_of(samples: int, batch: int = 2) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(samples)), batch_size=batch)


def gathered(samples: int, skip: int) -> dict[str, Any]:
    """What gather_for_metrics gives over an epoch of `samples`, two a batch on each rank."""
    accelerator = Accelerator()
    loader = accelerator.prepare(loader_of(samples))
    found: dict[str, list[Any]] = {"tensors": [], "dicts": [], "scalars": [], "objects": [], "forced": []}
    for (batch,) in accelerator.skip_first_batches(loader, skip):
        found["tensors"] += accelerator.gather_for_metrics(batch).tolist()
        nested = accelerator.gather_for_metrics({"x": batch, "y": [batch * 2.5]})
        found["dicts"] += zip(nested["x"].tolist(), nested["y"][0].tolist(), strict=True)
        found["scalars"].append(accelerator.gather_for_metrics(batch.sum()).tolist())
        found["objects"] += accelerator.gather_for_metrics([f"sample {i}" for i in batch.tolist()])
        found["forced"] += accelerator.gather_for_metrics(batch.tolist(), use_gather_object=True)
    accelerator.end_training()
    return found


@pytest.mark.parametrize(("samples", "skip"), [(9, 0), (9, 1), (9, 2), (5, 0), (8, 0), (1, 0), (3, 0)])
def test_every_sample_is_gathered_once_in_order(samples: int, skip: int, ranks: Any) -> None:
    """Accelerate 1.15 gathers 12 of 9 samples after skip_first_batches, and drops ranks of a scalar on the last batch."""
    for size in (1, 2):
        rest = list(range(skip * 2 * size, samples))
        for found in ranks(size, gathered, samples, skip):
            assert found["tensors"] == rest
            assert found["dicts"] == [(i, i * 2.5) for i in rest]
            assert found["objects"] == [f"sample {i}" for i in rest]
            assert found["forced"] == rest
            # One value of each rank that had a sample in that micro-batch.
            together = 2 * size
            assert [len(v) for v in found["scalars"]] == [min(size, len(rest) - at) for at in range(0, len(rest), together)]
            assert sum(map(sum, found["scalars"])) == sum(rest)


def gathered_by_sampler() -> list[int]:
    """Three batches of somebody's own batch sampler on two ranks: one rank has nothing in the last round."""
    accelerator = Accelerator()
    data = TensorDataset(torch.arange(7))
    loader = accelerator.prepare(DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, False)))
    found: list[int] = []
    for (batch,) in loader:
        found += accelerator.gather_for_metrics(batch).tolist()
    accelerator.end_training()
    return found


def test_a_batch_sampler_of_its_own_is_gathered_exactly(ranks: Any) -> None:
    assert ranks(2, gathered_by_sampler) == [list(range(7))] * 2


def collectives() -> dict[str, Any]:
    accelerator = Accelerator()
    rank = accelerator.process_index
    mine = torch.tensor([1.0, 2.0]) * (rank + 1)
    found: dict[str, Any] = {
        "gather": accelerator.gather({"a": mine, "b": (torch.tensor(rank), Pair(mine, "kept"))}),
        "ragged": accelerator.gather(torch.full((rank + 1, 2), rank)).tolist(),
        "empty": accelerator.gather(torch.zeros(rank, 3)).shape,
        "default": accelerator.reduce(mine).tolist(),
        **{name: accelerator.reduce(mine, name).tolist() for name in ("sum", "mean", "max", "min", "none")},
        "scaled": accelerator.reduce([mine], "sum", scale=0.5)[0].tolist(),
        "untouched": mine.tolist(),
        "broadcast": accelerator.broadcast({"x": mine}, from_process=1)["x"].tolist(),
        "padded": accelerator.pad_across_processes(torch.ones(rank + 1, 2), dim=0, pad_index=7).tolist(),
        "first": accelerator.pad_across_processes(torch.ones(1, rank + 1), dim=1, pad_first=True).tolist(),
        "strings": accelerator.gather("kept"),
    }
    found["types"] = (type(found["gather"]["b"]).__name__, type(found["gather"]["b"][1]).__name__)
    for name, call in {
        "unknown": lambda: accelerator.reduce(mine, "average"),
        "whole": lambda: accelerator.reduce(torch.tensor(rank + 1), "mean"),
        "dim": lambda: accelerator.pad_across_processes(mine, dim=3),
    }.items():
        try:
            call()
        except ConfigError as error:
            found[name] = f"{type(error).__name__}: {error}"
    accelerator.end_training()
    return found


def test_collectives_on_two_ranks_have_the_values_that_their_names_say(ranks: Any) -> None:
    """Accelerate 1.15 sums under "none" and "min"."""
    results = ranks(2, collectives)
    for rank, found in enumerate(results):
        assert found["gather"]["a"].tolist() == [1, 2, 2, 4]
        assert found["gather"]["b"][0].tolist() == [0, 1]
        assert found["gather"]["b"][1].second == "kept"
        assert found["types"] == ("tuple", "Pair")
        assert found["ragged"] == [[0, 0], [1, 1], [1, 1]]
        assert found["empty"] == (1, 3)
        assert found["default"] == found["sum"] == [3, 6]
        assert (found["mean"], found["max"], found["min"]) == ([1.5, 3], [2, 4], [1, 2])
        assert found["none"] == found["untouched"] == ([1, 2] if rank == 0 else [2, 4])
        assert found["scaled"] == [1.5, 3]
        assert "reduce tensor.float()" in found["whole"]
        assert found["broadcast"] == [2, 4]
        assert found["padded"] == ([[1, 1], [7, 7]] if rank == 0 else [[1, 1], [1, 1]])
        assert found["first"] == ([[0, 1]] if rank == 0 else [[1, 1]])
        assert found["strings"] == "kept"
        assert "average" in found["unknown"]
        assert "UnknownName" in found["unknown"]
        assert "no dim 3" in found["dim"]


def test_on_one_process_everything_is_the_value_itself() -> None:
    accelerator = Accelerator()
    x = torch.tensor([1.0, 2.0])
    assert accelerator.gather(x).tolist() == [1, 2]
    assert accelerator.gather(torch.tensor(3.0)).tolist() == [3]
    assert accelerator.gather_for_metrics(["a", "b"]) == ["a", "b"]
    assert accelerator.gather_for_metrics("word") == ["word"]
    for name in ("sum", "mean", "max", "min", "none"):
        assert accelerator.reduce(x, name).tolist() == [1, 2]
    assert accelerator.pad_across_processes(x) is x
    with pytest.raises(UnknownName, match="There is no reduction 'summ'"):
        accelerator.reduce(x, "summ")
