"""Checkpoints are written while the training goes on: of one step, without loss, and what goes wrong is said."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Checkpoint
from drivetrain.callbacks.base import Callback
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.checkpoint import store as store_module
from drivetrain.strategies.errors import CheckpointError
from resume_jobs import Job, assert_goes_on_as, assert_same_end, newest_run, steps_saved, train
from torch import nn

REAL = os.write


class HeldUp(Callback):
    """Saves after batch `at`, and lets the disk take it only when the training is `later` batches further."""

    state_is_required = False

    def __init__(self, root: Path, at: int, later: int) -> None:
        self.root, self.at, self.later = root, at, later
        self.gate = threading.Event()
        self.saving: Any = None
        self.was_done = True

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.batches == self.at:
            os.write = self.write
            self.saving = trainer.save_checkpoint(self.root / "held")
        if trainer.progress.batches == self.at + self.later:
            self.was_done = self.saving.done
            os.write = REAL
            self.gate.set()

    def write(self, *args: Any) -> int:
        assert self.gate.wait(30)
        return REAL(*args)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"options": {"accumulate_grad_batches": 2}}])
def test_training_goes_on_while_the_disk_is_slow_and_the_resumed_run_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    """Dropout, momentum, schedules, running averages: nothing of a later step gets into the checkpoint."""
    job = Job(samples=28, **options)
    whole = train(job, tmp_path / "whole")
    held = HeldUp(tmp_path, 4, 2)
    same = train(job, tmp_path / "held up", callbacks=[held], enable_checkpointing=False)
    assert not held.was_done
    assert_same_end(same, whole)
    result = train(job, tmp_path / "again", resume=held.saving.wait())
    assert_goes_on_as(result, whole, batches=4)
    assert_same_end(result, whole)


def refuse(*args: Any) -> int:
    raise OSError(28, "No space left on device")


class FullDisk(Callback):
    """The disk is full from batch `at` until batch `until`."""

    def __init__(self, at: int, until: int = 10**9) -> None:
        self.at, self.until = at, until
        self.last = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.last = trainer.progress.batches
        if self.last == self.at:
            trainer.store.join()
        os.write = refuse if self.at <= self.last < self.until else REAL
        time.sleep(0.02)  # the writer's thread has a turn


@pytest.fixture(autouse=True)
def _the_disk_is_real_again() -> Any:
    yield
    os.write = REAL


def test_a_full_disk_ends_the_training_at_the_next_step_and_leaves_the_earlier_ones(tmp_path: Path) -> None:
    disk = FullDisk(4)
    with pytest.raises(CheckpointError, match=r"Saving step 6 .*No space left(.|\n)*Nothing was committed") as error:
        train(Job(), tmp_path, callbacks=[disk, Checkpoint("3step")])
    assert disk.last < 9, "it was told before the next save"
    assert any("While training: epoch" in note for note in error.value.__notes__)
    assert steps_saved(tmp_path) == [3]
    os.write = REAL
    assert_same_end(train(Job(), tmp_path, resume="auto"), train(Job(), tmp_path / "whole"))


def test_a_full_disk_may_be_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = FullDisk(4, until=10)
    train(Job(), tmp_path, callbacks=[disk, Checkpoint("3step", save_top_k=-1, on_error="warn")])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: Saving step")]
    assert [line.split(" in ")[0] for line in told] == ["warning: Saving step 6", "warning: Saving step 9"]
    assert steps_saved(tmp_path)[:2] == [3, 12]


def test_an_error_in_the_last_save_is_an_error_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing follows that would tell of it: fit waits."""
    job = Job(epochs=1)
    monkeypatch.setattr(store_module, "sync_folder", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        train(job, tmp_path, callbacks=[Checkpoint()])
    assert not (newest_run(tmp_path) / "finished").exists()


def full_on_one(root: Path, victim: int) -> Any:
    """Train while the disk of one rank fills up; return what this rank was told and when."""
    disk = FullDisk(4)
    rank = int(os.environ["RANK"])
    callbacks = [Checkpoint("3step"), *([disk] if rank == victim else [Silent()])]
    try:
        train(Job(options={"strategy": "ddp"}), root, callbacks=callbacks)
    except CheckpointError as error:
        return str(error), error.__notes__[0].split(", rank")[0]
    return None


class Silent(Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None: ...


@pytest.mark.parametrize("victim", [0, 1])
def test_all_ranks_are_told_of_a_full_disk_at_the_same_step(victim: int, ranks: Any, tmp_path: Path) -> None:
    told = ranks(2, full_on_one, tmp_path, victim)
    assert told[0] == told[1]
    assert f"[rank {victim}/2] Saving step 6" in told[0][0]
    assert steps_saved(tmp_path) == [3]


class Fails(Callback):
    """An error while a save is under way."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.batches == 5:
            os.write = lambda *args: (time.sleep(0.2), REAL(*args))[1]  # type: ignore[assignment]
            trainer.save_checkpoint()
        if trainer.progress.batches == 6:
            os.write = REAL
            raise RuntimeError("boom")


def test_a_training_that_fails_finishes_the_save_that_is_under_way(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        train(Job(), tmp_path, callbacks=[Fails(), Checkpoint("100step", save_on_train_end=False)])
    assert steps_saved(tmp_path) == [5]
    assert CheckpointStore(newest_run(tmp_path) / "checkpoints").verify(5) == []


# -- the raw API ----------------------------------------------------------------------------------------------------------
def test_save_state_returns_at_once_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(os, "write", lambda *args: gate.wait(30) and REAL(*args))
    accelerator = Accelerator()
    net = nn.Linear(3, 1)
    model, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    saved = net.weight.detach().clone()
    handle = accelerator.save_state(tmp_path, wait=False)
    with torch.no_grad():
        net.weight += 1
    assert not handle.done
    threading.Timer(0.1, gate.set).start()
    assert accelerator.load_state(tmp_path) == handle.path  # it waits for the save
    assert torch.equal(net.weight, saved)
    second = accelerator.save_state(tmp_path, wait=False)  # the next number, though the first may not have been there yet
    assert second.wait().step == 2
    monkeypatch.setattr(os, "write", refuse)
    accelerator.save_state(tmp_path, wait=False)
    with pytest.raises(CheckpointError, match="Saving step 3"):
        accelerator.end_training()
    assert model is not None
