"""With the global batch fixed a run may change its ranks and workers at each resume: the samples and the losses stay.

What depends on the number of ranks by nature (dropout, BatchNorm) is left out. The weights go through checkpoints each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import resume_jobs
import torch
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.errors import ConfigError
from drivetrain.trainer.data.loader import prepare_loader
from resume_jobs import Job, read_ledger, train
from torch.utils.data import DataLoader, Dataset, IterableDataset

JOB = Job(epochs=2, samples=47, batch_size=2, dropout=0.0, batch_norm=False, validate=False, options={"global_batch_size": 12})
"""47 = 3 * 12 + 11: each epoch ends in the middle of a window, and of a micro-batch."""


class Windows(Callback):
    """How many micro-batches each step is made of."""

    def __init__(self) -> None:
        self.sizes: set[int] = set()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.sizes.add(trainer.accelerator.window.size)


def part(job: Job, root: Path, **options: Any) -> set[int]:
    windows = Windows()
    train(job, root, ledger=root, resume="auto", callbacks=[windows], **options)
    return windows.sizes


def curve(root: Path) -> dict[int, float]:
    folder = max((root / "job").iterdir())
    return {x["step"]: x["metrics"]["train_loss_step"] for x in read_metrics(folder) if "train_loss_step" in x["metrics"]}


def test_a_run_goes_from_one_rank_to_two_to_three_and_back_to_one(ranks: Any, tmp_path: Path) -> None:
    """Stopped after steps 2, 3 and 6 of 8: twice within the first epoch, and once within the second."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert ranks(1, part, JOB, whole) == [{6}]
    for size, workers, stop in ((1, 2, 2), (2, 0, 3), (3, 1, 6), (1, 0, 8)):
        windows = ranks(size, part, replace(JOB, workers=workers), cut, max_steps=stop)
        assert windows == [{6 // size}] * size, "the accumulation is derived anew"
    losses, expected = curve(cut), curve(whole)
    assert sorted(losses) == sorted(expected) == list(range(1, 9))
    assert losses == pytest.approx(expected, rel=1e-6, abs=0)
    for epoch, batches in read_ledger(cut).items():
        assert sorted(n for batch in batches for n in batch) == list(range(JOB.samples)), f"epoch {epoch}"


def test_a_number_of_ranks_that_cannot_keep_the_global_batch_is_refused_with_those_that_can(ranks: Any, tmp_path: Path) -> None:
    ranks(1, part, JOB, tmp_path, max_steps=2)
    with pytest.raises(ConfigError, match=r"not a multiple of 8, .*these numbers of ranks keep it: 1, 2, 3, 6\."):
        ranks(4, part, JOB, tmp_path)
    assert ranks(3, part, JOB, tmp_path, max_steps=3) == [{2}] * 3  # nothing has happened to the run


# -- data without indices --------------------------------------------------------------------------------------------------
class Stream(IterableDataset[Any]):
    """The samples of the job, one after the other."""

    def __init__(self, job: Job, index: int = 0, shards: int = 1) -> None:
        self.job, self.mine = job, range(job.samples)[index::shards]

    def __iter__(self) -> Iterator[Any]:
        return map(resume_jobs.Samples(self.job).__getitem__, self.mine)


class Cut(Stream):
    """Can be cut into shards: each rank reads its own, which are others on another number of ranks."""

    def shard(self, num_shards: int, index: int) -> Cut:
        return Cut(self.job, index, num_shards)


def streamed_part(kind: type[Stream], job: Job, root: Path, **options: Any) -> None:
    resume_jobs.loaders = lambda job: (DataLoader(kind(job), batch_size=job.batch_size),)  # this process is a rank's own
    train(job, root, ledger=root, resume="auto", **options)


@pytest.mark.parametrize("kind", [pytest.param(Stream, marks=pytest.mark.slow), Cut])
def test_a_run_over_an_iterable_goes_from_one_rank_to_two_to_three_and_back_to_one(
    ranks: Any, kind: type[Stream], tmp_path: Path
) -> None:
    """Each sample once. The epoch that a stop breaks has the samples of the run that was not broken, step by step; the next one
    too where rank 0 reads for all, in another order where each of now three ranks reads its own shard."""
    job = replace(JOB, augment=False)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    ranks(1, streamed_part, kind, job, whole)
    for size, stop in ((1, 2), (2, 3), (3, 6), (1, 8)):
        ranks(size, streamed_part, kind, job, cut, max_steps=stop)
    losses, expected = curve(cut), curve(whole)
    assert sorted(losses) == sorted(expected) == list(range(1, 9))
    same = range(1, 5) if kind is Cut else range(1, 9)
    assert [losses[step] for step in same] == pytest.approx([expected[step] for step in same], rel=1e-6, abs=0)
    for epoch, batches in read_ledger(cut).items():
        assert sorted(n for batch in batches for n in batch) == list(range(job.samples)), f"epoch {epoch}"


# -- far into the data ----------------------------------------------------------------------------------------------------
class Many(Dataset[int]):
    """Four million samples that count how often they are read."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 4_000_000

    def __getitem__(self, index: int) -> int:
        self.read += 1
        return index


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resume_at_batch_one_million_reads_the_batches_from_there_on_only(shuffle: bool) -> None:
    """benchmarks/faults.py --resume measures the seconds."""
    data = Many()
    generator = torch.Generator().manual_seed(3)
    loader = prepare_loader(DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator if shuffle else None))
    state = loader.state_dict()
    assert state["position"] == 0
    loader.load_state_dict(state | {"position": 999_998 * 4})
    data.read = 0
    batches = [batch.tolist() for batch in loader]
    assert data.read <= 2 * 4 + 1  # one more: whether the data set draws random numbers is found out by reading a sample
    assert len(batches) == 2
    if not shuffle:
        assert batches == [[3_999_992, 3_999_993, 3_999_994, 3_999_995], [3_999_996, 3_999_997, 3_999_998, 3_999_999]]
