"""A run that was stopped and resumed does what the run that was never stopped does, bit for bit.

`reference` trains a job to its end and leaves checkpoints on its way; each is then resumed in a fresh Trainer, which must have
the same losses, learning rates, validations, epoch means, callback state and weights from there on.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.precision.mixed import FP16Mixed
from resume_jobs import Job, Result, assert_each_sample_once, assert_goes_on_as, assert_same_end, read_ledger, train

NOT_SAVING: dict[str, Any] = {"enable_checkpointing": False}


class SaveAt(Callback):
    """Saves after these steps into `folder`/steps, and at the ends of these epochs into `folder`/epochs."""

    def __init__(self, folder: Path, steps: tuple[int, ...], epochs: tuple[int, ...] = ()) -> None:
        self.folder, self.steps, self.epochs = folder, steps, epochs
        self.batches: dict[str, int] = {}

    def on_checkpoint_step(self, trainer: Any, module: Any) -> None:
        if trainer.progress.global_step in self.steps:
            self.save(trainer, "steps")

    def on_checkpoint_epoch(self, trainer: Any, module: Any) -> None:
        if trainer.progress.epoch - 1 in self.epochs:
            self.save(trainer, "epochs")

    def save(self, trainer: Any, kind: str) -> None:
        path = trainer.save_checkpoint(self.folder / kind).wait()
        self.batches[str(path)] = trainer.progress.batches


def resumed_runs_are_exact(job: Job, root: Path, steps: tuple[int, ...], epochs: tuple[int, ...] = ()) -> Result:
    """Train `job`, resume it from every cut; return the run that was never stopped."""
    saver = SaveAt(root / "cuts", steps, epochs)
    expected = train(job, root / "whole", callbacks=[saver], ledger=root, **NOT_SAVING)
    assert_each_sample_once(root, job)
    assert len(saver.batches) == len(steps) + len(epochs)
    for number, (path, batches) in enumerate(saver.batches.items()):
        torch.rand(3)  # the resumed process is at another place in its random numbers
        result = train(job, root / f"resumed{number}", resume=path, **NOT_SAVING)
        assert_goes_on_as(result, expected, batches=batches)
    return expected


JOBS = {
    "everything": (Job(), (4, 11, 12, 33), (0, 2)),
    "workers": (Job(workers=2, epochs=2), (4, 11), ()),
    "accumulation": (Job(options={"accumulate_grad_batches": 3}), (2, 4, 5), (1,)),
    "clipped sums": (Job(num_items=True, epochs=2, options={"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}), (2, 4), ()),
    "validation by step": (Job(epochs=2, options={"val_check_interval": 4}), (4, 6, 8, 11), (0,)),
    "every second epoch": (Job(epochs=4, options={"check_val_every_n_epoch": 2}), (12, 22), (0, 1)),
    "manual optimisation": (Job(epochs=2, manual=True), (4, 11), (0,)),
    "bf16-mixed": (Job(epochs=2, options={"precision": "bf16-mixed"}), (4, 11), ()),
    "max_steps at an epoch's end": (Job(epochs=2, options={"max_steps": 22}), (11, 22), ()),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_never_stopped(name: str, tmp_path: Path) -> None:
    """Mid-epoch, after an epoch's last batch (its end is then done once, after the resume) and at epochs' ends."""
    job, steps, epochs = JOBS[name]
    resumed_runs_are_exact(job, tmp_path, steps, epochs)


def test_the_loss_scale_and_its_growth_are_resumed(tmp_path: Path) -> None:
    def precision() -> FP16Mixed:
        return FP16Mixed(init_scale=2.0**19, growth_interval=3)  # overflows at first: steps are skipped, then it grows

    job = Job(epochs=2, batch_norm=False, options={"precision": precision})
    expected = resumed_runs_are_exact(job, tmp_path, (1, 2, 4, 5))
    assert expected.progress["skipped"] > 0


def ddp_jobs(root: Path) -> None:
    resumed_runs_are_exact(Job(epochs=2), root / "a", (2, 6), (0,))
    resumed_runs_are_exact(Job(epochs=2, workers=2, options={"accumulate_grad_batches": 3}), root / "b", (1, 2))
    job = Job(epochs=1, num_items=True, options={"precision": "bf16-mixed", "val_check_interval": 2})
    resumed_runs_are_exact(job, root / "c", (2, 3))


def test_two_ranks_resume_exactly(ranks: Any, tmp_path: Path) -> None:
    """44 samples in micro-batches of 8: the last one is ragged."""
    for part in "abc":
        (tmp_path / part).mkdir()
    ranks(2, ddp_jobs, tmp_path, timeout=120)


def test_four_ranks_resume_exactly(ranks: Any, tmp_path: Path) -> None:
    """DDP rebuilds its buckets after the first backward: without priming the first step would be reduced in another order."""
    ranks(4, resumed_runs_are_exact, Job(epochs=2, batch_size=3), tmp_path, (2, 4), (0,), timeout=120)


@pytest.mark.parametrize("stop", [1, 5, 11, 14])
def test_a_run_stopped_by_max_steps_goes_on_where_it_stopped(stop: int, tmp_path: Path) -> None:
    """Both halves together are the whole, in metrics.jsonl too."""
    job = Job(epochs=2)
    whole = train(job, tmp_path / "whole")
    first = train(job, tmp_path / "cut", ledger=tmp_path, max_steps=stop)
    second = train(job, tmp_path / "cut", resume="auto", ledger=tmp_path)
    assert first.losses | second.losses == whole.losses
    assert first.events + second.events == whole.events
    assert_same_end(second, whole)
    assert_each_sample_once(tmp_path, job)
    assert second.folder == first.folder
    lines, expected = read_metrics(second.folder), read_metrics(whole.folder)
    assert [(x["step"], x["epoch"], x["metrics"]) for x in lines] == [(x["step"], x["epoch"], x["metrics"]) for x in expected]


def test_epoch_means_count_every_batch_once(tmp_path: Path) -> None:
    """`samples` is summed over the epoch, `train_loss` is its mean: both cross the resume."""
    job = Job(epochs=1, dropout=0.0, augment=False)
    whole = resumed_runs_are_exact(job, tmp_path, (7,))
    values = {name: value for _, metrics in whole.logged for name, value in metrics.items()}
    assert values["samples"] == job.samples
    assert values["train_loss_epoch"] == pytest.approx(sum(whole.losses.values()) / 11, rel=1e-6)  # 11 equal batches


def losses_of(root: Path, job: Job, **options: Any) -> dict[int, list[float]]:
    result = train(job, root, ledger=root, **options)
    steps = read_metrics(result.folder)
    return {x["step"]: [x["metrics"]["train_loss_step"]] for x in steps if "train_loss_step" in x["metrics"]}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_on_another_number_of_ranks_no_sample_is_lost_and_the_losses_stay(
    before: int, after: int, ranks: Any, tmp_path: Path
) -> None:
    """With the global batch fixed. What depends on the rank count by nature (dropout, BatchNorm) is left out."""
    job = Job(epochs=2, batch_size=2, dropout=0.0, batch_norm=False, validate=False, options={"global_batch_size": 8})
    expected = losses_of(tmp_path / "whole", job)
    ranks(before, losses_of, tmp_path / "cut", job, max_steps=3)
    losses = ranks(after, losses_of, tmp_path / "cut", job, resume="auto")[0]
    assert sorted(losses) == sorted(expected)
    for step, loss in expected.items():
        assert losses[step] == pytest.approx(loss, rel=1e-6)
    together = read_ledger(tmp_path / "cut")
    for numbers in together.values():
        assert sorted(n for batch in numbers for n in batch) == list(range(job.samples))


class AskInTheStep(Callback):
    """Asks for a checkpoint at the worst moments."""

    def __init__(self, moment: str) -> None:
        self.saving: Any = None

        def hook(trainer: Any, *_: Any) -> None:
            if self.saving is None and trainer.progress.batches in (4, 5, 6) and trainer.stage == "fit":
                self.saving = trainer.save_checkpoint(trainer.root.parent.parent / "asked")

        setattr(self, moment, hook)


@pytest.mark.parametrize("moment", ["on_before_backward", "on_train_batch_end", "on_validation_end", "on_train_batch_start"])
def test_a_save_that_is_asked_for_in_the_middle_of_a_step_waits_for_its_end(moment: str, tmp_path: Path) -> None:
    job = Job(epochs=1, options={"accumulate_grad_batches": 3, "val_check_interval": 1})
    asking = AskInTheStep(moment)
    expected = train(job, tmp_path / "whole", callbacks=[asking], **NOT_SAVING)
    saved = json.loads((asking.saving.wait() / "manifest.json").read_text())["meta"]["progress"]
    assert saved["batches"] == 6
    result = train(job, tmp_path / "resumed", resume=asking.saving.path, **NOT_SAVING)
    assert_goes_on_as(result, expected, batches=6)


def test_a_step_that_fails_leaves_the_state_before_it(tmp_path: Path) -> None:
    """save_on_exception: the batch that failed counts as not trained on, and its forward pass as not done."""
    job = Job(epochs=2, options={"accumulate_grad_batches": 2})
    expected = train(job, tmp_path / "whole")
    with pytest.raises(ValueError, match="the step fails here"):
        train(
            replace(job, fail_at=(9, 0)),
            tmp_path / "cut",
            callbacks=[Checkpoint(save_on_exception=True, save_on_train_end=False)],
        )
    result = train(job, tmp_path / "cut", resume="auto")
    assert_goes_on_as(result, expected, batches=8)


class FailAt(Callback):
    def __init__(self, moment: str, count: int) -> None:
        self.left = count

        def hook(*_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise ValueError("the hook fails here")

        setattr(self, moment, hook)


@pytest.mark.parametrize(
    ("moment", "count", "batches"),
    [("on_train_epoch_end", 1, 11), ("on_validation_batch_end", 3, 11), ("on_train_epoch_start", 2, 11)],
)
def test_what_fails_at_an_epoch_s_end_is_done_again(moment: str, count: int, batches: int, tmp_path: Path) -> None:
    """The sanity check makes one validation batch, the epoch's end three."""
    job = Job(epochs=2)
    expected = train(job, tmp_path / "whole")
    with pytest.raises(ValueError, match="the hook fails here"):
        train(job, tmp_path / "cut", callbacks=[FailAt(moment, count), Checkpoint(save_on_exception=True, every_n_steps=100)])
    result = train(job, tmp_path / "cut", resume="auto")
    assert_goes_on_as(result, expected, batches=batches)
    lines, whole = read_metrics(result.folder), read_metrics(expected.folder)
    assert [(x["step"], x["metrics"]) for x in lines] == [(x["step"], x["metrics"]) for x in whole]
