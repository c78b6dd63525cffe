"""A hang is noticed within the deadline, whoever hangs is named, and with action="abort" the run ends with exit code 1."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.watchdog import Heartbeat, Watchdog, read_heartbeats, who_lags
from drivetrain.strategies.errors import ConfigError

SCRIPT = """
import os, pathlib, signal, time
import torch
from drivetrain import Trainer, TrainingModule
from drivetrain.callbacks.watchdog import Watchdog
from torch.utils.data import DataLoader, TensorDataset

class Net(TrainingModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 5 and self.trainer.world.rank == self.trainer.world.size - 1:
            pathlib.Path({root!r}, "hangs").write_text(str(os.getpid()))
            self.{how}()
        time.sleep(0.1)
        return self.net(batch[0]).sum()
    def is_stopped(self):
        os.kill(os.getpid(), signal.SIGSTOP)
    def sleeps_for_ever(self):
        time.sleep(1000)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = Trainer(max_epochs=1, devices={devices}, root={root!r}, name="run", callbacks=Watchdog({deadline}, action={action!r}))
trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(80, 2)), batch_size=4))
print("done", flush=True)
"""
DEADLINE_S = 2.0


def started(root: Path, how: str, devices: int, action: str = "abort") -> tuple[subprocess.Popen[str], int]:
    """Start a training; return it when a rank hangs, with that rank's process id."""
    script = root / "train.py"
    script.write_text(SCRIPT.format(root=str(root), how=how, devices=devices, deadline=DEADLINE_S, action=action))
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit = time.monotonic() + 60
    while not (root / "hangs").exists() or not (root / "hangs").read_text():
        assert time.monotonic() < limit, "it does not begin to train"
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    return run, int((root / "hangs").read_text())


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_the_run_ends_within_the_deadline_and_five_seconds(tmp_path: Path) -> None:
    run, pid = started(tmp_path, "is_stopped", 2)
    began = time.monotonic()
    try:
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert time.monotonic() - began < DEADLINE_S + 5
    assert run.returncode == 1, said
    assert f"Who lags is rank 1 (process {pid} on " in said
    assert re.search(r"its process does not run \(stopped or dead\), last seen after [345] batches, ", said), said
    assert "in the backward pass" in said  # where rank 0 waits
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    stacks = next(tmp_path.glob("run/*/logs/watchdog-rank0.txt")).read_text()
    assert "forward_backward" in stacks


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_own_code_shows_where(tmp_path: Path) -> None:
    """Both processes run; the one that has come less far is named, and its own stacks show the line."""
    run, pid = started(tmp_path, "sleeps_for_ever", 2)
    try:
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 1, said
    assert f"Who lags is rank 1 (process {pid} on " in said
    assert "after 5 batches, in the forward pass" in said


@pytest.mark.slow
def test_one_process_that_hangs_is_ended_with_its_stack(tmp_path: Path) -> None:
    run, _ = started(tmp_path, "sleeps_for_ever", 1)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 1, said
    assert "in sleeps_for_ever" in said
    assert "Nothing has moved for 2 s: after 5 batches, in the forward pass." in said


@pytest.mark.slow
def test_a_process_that_was_stopped_and_goes_on_is_not_ended(tmp_path: Path) -> None:
    """Ctrl-Z and fg: the time in which the process itself did not run does not count."""
    run, pid = started(tmp_path, "is_stopped", 1)
    time.sleep(2 * DEADLINE_S)
    os.kill(pid, signal.SIGCONT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert "done" in said


def test_it_warns_again_and_again_and_says_when_it_goes_on(view: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view.root = tmp_path
    watchdog = Watchdog(0.2)
    watchdog.on_fit_start(view, view.module)
    watchdog.on_train_batch_end(view, view.module, None, None, 0)
    limit = time.monotonic() + 30
    while len(watchdog.warnings) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    watchdog.on_train_batch_start(view, view.module, None, 0)
    while len(watchdog.warnings) < 3 and time.monotonic() < limit:
        time.sleep(0.01)
    watchdog.teardown(view, view.module, "fit")
    said = capsys.readouterr().err.splitlines()
    assert said == watchdog.warnings
    assert said[0].startswith("watchdog: nothing has moved for 0 s: after 0 batches, waiting for the next batch.")
    assert said[1].startswith("watchdog: nothing has moved for ")
    assert said[-1].startswith("watchdog: it goes on after ")


def test_before_the_first_step_more_time_is_given(view: Any, tmp_path: Path) -> None:
    view.root = tmp_path
    watchdog = Watchdog(0.05, startup=1000)
    watchdog.on_fit_start(view, view.module)
    time.sleep(0.4)
    watchdog.teardown(view, view.module, "fit")
    assert watchdog.warnings == []


def test_a_run_leaves_no_thread_and_no_heartbeat(ranks: Any, tmp_path: Path) -> None:
    from resume_jobs import Job, train  # pyright: ignore[reportMissingImports]

    def run() -> tuple[int, list[str]]:
        import threading

        watchdog = Watchdog(60)
        watchdog._beat_s = 0.01
        result = train(Job(epochs=1), tmp_path, callbacks=[watchdog])
        names = [thread.name for thread in threading.enumerate()]
        return names.count("watchdog"), sorted(path.name for path in Path(result.folder).glob("heartbeats/rank*"))

    assert [count for count, _ in ranks(2, run)] == [0, 0]
    assert not list(tmp_path.rglob("heartbeats/rank*"))


HERE = Heartbeat(0, 10, "one", 5, 20, 7, "in the backward pass")


def test_who_lags_is_told_from_the_heartbeats() -> None:
    ahead = [replace(HERE, rank=rank, pid=10 + rank) for rank in (0, 2)]
    before = {0: ahead[0], 2: ahead[1], 1: replace(HERE, rank=1, pid=11, count=19, doing="in the forward pass")}
    later = {rank: replace(heartbeat, beat=9) for rank, heartbeat in before.items()}
    assert who_lags(before, later, 3) == "Who lags is rank 1 (process 11 on one): after 7 batches, in the forward pass."
    stopped = later | {2: before[2]}
    assert "rank 2 (process 12 on one): its process does not run" in who_lags(before, stopped, 3)
    assert "rank 3: no heartbeat was ever seen" in who_lags(before, later, 4)
    assert "rank 1 (process 11" in who_lags(before, later | {3: HERE}, 3)
    same = {rank: replace(heartbeat, count=20) for rank, heartbeat in later.items()}
    assert who_lags(before, same, 3).startswith("All ranks run, and are at the same point")


def test_torn_heartbeats_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rank0.json").write_text('{"rank": 0, "pi')
    (tmp_path / "rank1.json").write_text("{}")
    assert read_heartbeats(tmp_path) == {}


@pytest.mark.parametrize(("options", "said"), [({"deadline": 0}, "deadline"), ({"action": "kill"}, "action='kill'")])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Watchdog(**options)
