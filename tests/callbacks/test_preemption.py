"""Told to leave in any way, all ranks save and leave at the same step with code 75; resumed, nothing is lost."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.interval import parse_seconds
from drivetrain.callbacks.preemption import Preemption, _started_at
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.environment import JobEnvironment, read_job
from drivetrain.strategies.errors import ConfigError
from resume_jobs import (  # pyright: ignore[reportMissingImports]
    Job,
    assert_goes_on_as,
    logged_by,
    newest_run,
    train,
)

LONG = Job(epochs=200, samples=24, batch_size=3, step_s=0.01, validate=False)


class At(Callback):
    """Does something once, after so many batches."""

    def __init__(self, batches: int, action: Any, hook: str = "on_before_backward") -> None:
        def call(trainer: Any, *_: Any) -> None:
            if not self.done and trainer.stage == "fit" and trainer.progress.batches >= batches:
                self.done = True
                action()

        self.done = False
        setattr(self, hook, call)


def left(job: Job, root: Path, *callbacks: Callback, **options: Any) -> int:
    """Train until it leaves; return the exit code, 0 when it came to its end."""
    try:
        train(job, root, callbacks=callbacks, **options)
    except SystemExit as ended:
        return int(str(ended.code))
    return 0


def saved_batches(root: Path) -> int:
    info = CheckpointStore(newest_run(root) / "checkpoints").latest()
    assert info is not None
    return int(info.meta["progress"]["batches"])


def goes_on(root: Path, job: Job) -> None:
    """What was left in root/cut, resumed for three more steps, is the run in root/whole that was never left."""
    job = replace(job, step_s=0.0)
    batches = saved_batches(root / "cut")
    result = train(job, root / "cut", resume="auto", max_steps=batches + 3)
    expected = train(job, root / "whole", max_steps=batches + 3)
    assert_goes_on_as(result, expected, batches=batches)


def under_slurm(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    for name, value in more.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on the PATH, which writes down how it was called; it fails when the file `fails` is beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/called\nif [ -e {folder}/fails ]; then echo "Invalid job id" >&2; exit 1; fi\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "called"


# -- why it leaves ----------------------------------------------------------------------------------------------------
def test_it_leaves_before_the_jobs_time_is_over_and_nothing_is_lost(tmp_path: Path) -> None:
    limit_s = time.time() - _started_at(None) + 1.3
    preemption = Preemption(limit_s, grace=1.0)
    assert left(LONG, tmp_path / "cut", preemption) == 75
    assert preemption.asked == "the time limit is 1 s away"
    goes_on(tmp_path, LONG)


def test_the_end_that_slurm_tells_counts_and_so_does_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_slurm(monkeypatch, SLURM_JOB_END_TIME=str(int(time.time()) + 1000))
    assert left(LONG, tmp_path / "end", Preemption(grace=1000)) == 75
    assert left(LONG, tmp_path / "not yet", Preemption(grace=10), max_steps=5) == 0
    under_slurm(monkeypatch, SLURM_JOB_END_TIME=str(2**40), SLURM_JOB_START_TIME=str(int(time.time()) - 3600))
    assert left(LONG, tmp_path / "start", Preemption("61m", grace="90s")) == 75
    assert left(LONG, tmp_path / "later", Preemption("65m", grace="90s"), max_steps=5) == 0


def test_a_file_that_appears_is_obeyed_also_during_a_validation(tmp_path: Path) -> None:
    job = Job(epochs=2, samples=24, batch_size=3)
    file = tmp_path / "ask me"
    asks = At(8, file.touch, "on_validation_batch_start")
    assert left(job, tmp_path / "cut", asks, Preemption(file=file, check_every_s=1e-9)) == 75
    result = train(job, tmp_path / "cut", resume="auto")
    expected = train(job, tmp_path / "whole")
    assert_goes_on_as(result, expected, batches=8)
    assert logged_by(tmp_path / "cut") == logged_by(tmp_path / "whole")


def test_a_file_that_was_there_before_is_nothing_until_it_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the run that is started again would leave again, and again."""
    file = tmp_path / "stop"
    file.touch()
    assert left(LONG, tmp_path / "old", Preemption(file=file, check_every_s=1e-9), max_steps=5) == 0
    assert f"{file} is there already" in capsys.readouterr().out
    touched = At(3, lambda: os.utime(file, ns=(0, file.stat().st_mtime_ns + 1)))
    assert left(LONG, tmp_path / "new", touched, Preemption(file=file, check_every_s=1e-9)) == 75


@pytest.mark.parametrize(
    ("slurm", "signals", "sent", "code"),
    [
        (False, None, "SIGTERM", 143),
        (False, "SIGTERM", "SIGTERM", 75),
        (True, None, "SIGTERM", 75),
        (True, (), "SIGTERM", 143),
        (False, ("SIGUSR2",), "SIGUSR2", 75),
        (False, ("SIGUSR2",), "SIGUSR1", 75),
    ],
)
def test_which_signals_mean_start_me_again(
    slurm: bool, signals: Any, sent: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slurm:
        under_slurm(monkeypatch)
    before = signal.getsignal(signal.SIGUSR2)
    tell = At(4, lambda: os.kill(os.getpid(), getattr(signal, sent)))
    assert left(LONG, tmp_path, tell, Preemption(signals=signals)) == code
    assert saved_batches(tmp_path) == 5
    assert signal.getsignal(signal.SIGUSR2) is before


# -- several ranks ----------------------------------------------------------------------------------------------------
def rank_sees(root: Path, what: str) -> tuple[int, int]:
    """The last of the ranks alone sees a reason; return the exit code, and the batches after which this rank left."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    file = root / f"stop-{os.environ['RANK']}"
    callbacks: list[Callback] = [Preemption(file=file, check_every_s=1e-9)]
    if what == "file" and last:
        callbacks.insert(0, At(5, file.touch))
    elif what == "time":
        began_s = time.time() - _started_at(None)
        callbacks = [Preemption(began_s + (1.5 if last else 1000), grace=1.0)]
    batches: list[int] = []

    class Ended(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            batches.append(trainer.progress.batches)

    code = left(LONG, root / "cut", *callbacks, Ended())
    goes_on(root, LONG)
    return code, batches[0]


@pytest.mark.parametrize("what", ["file", "time"])
def test_what_one_rank_sees_all_obey_at_the_same_step(what: str, ranks: Any, tmp_path: Path) -> None:
    results = ranks(2, rank_sees, tmp_path, what)
    assert len(set(results)) == 1
    assert results[0][0] == 75
    assert results[0][1] >= 5 or what == "time"


SCRIPT = """
import sys, pathlib
sys.path.insert(0, {path!r})
from drivetrain.callbacks.preemption import Preemption
from resume_jobs import Job, train
job = Job(epochs=4, samples=24, batch_size=3, step_s={step_s})
root = pathlib.Path({root!r})
result = train(job, root, resume="auto", ledger=root, callbacks=[Preemption(signals="SIGTERM")], devices=2)
print("weights", sum(float(w.double().sum()) for w in result.weights.values()).hex(), flush=True)
"""


@pytest.mark.slow
def test_a_script_on_two_ranks_is_terminated_with_75_and_started_again_loses_nothing(tmp_path: Path) -> None:
    """The signal goes to what the user started, as a batch system does it; the truth is the script that nobody stopped."""

    def start(root: Path, step_s: float) -> subprocess.Popen[str]:
        root.mkdir(exist_ok=True)
        script = root / "train.py"
        script.write_text(SCRIPT.format(path=str(Path(__file__).parents[1] / "trainer"), root=str(root), step_s=step_s))
        return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    run = start(cut, 0.2)
    try:
        deadline = time.monotonic() + 60
        while not any(len(path.read_text().splitlines()) >= 3 for path in cut.glob("ledger-*")):
            assert time.monotonic() < deadline, "it does not begin to train"
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 75, said
    ends = []
    for root in (cut, whole):
        again = start(root, 0.0)
        said, _ = again.communicate(timeout=120)
        assert again.returncode == 0, said
        ends += [line for line in said.splitlines() if line.startswith("weights")]
    assert len(ends) == 2
    assert ends[0] == ends[1]
    assert logged_by(cut) == logged_by(whole)


# -- starting again ---------------------------------------------------------------------------------------------------
def test_slurm_is_asked_to_start_the_job_again_when_all_is_saved(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    under_slurm(monkeypatch)
    file = tmp_path / "stop"
    assert left(LONG, tmp_path / "cut", At(4, file.touch), Preemption(file=file, check_every_s=1e-9, requeue=True)) == 75
    assert scontrol.read_text() == "requeue 4711\n"
    assert "job 4711 is requeued" in capsys.readouterr().out
    # The job that Slurm starts again goes on, whatever the script says about resuming.
    under_slurm(monkeypatch, SLURM_RESTART_COUNT="1")
    batches = saved_batches(tmp_path / "cut")
    job = replace(LONG, step_s=0.0)
    result = train(job, tmp_path / "cut", max_steps=batches + 3)
    assert min(result.losses) == batches + 1
    assert_goes_on_as(result, train(job, tmp_path / "whole", max_steps=batches + 3, resume=None), batches=batches)


def test_a_requeue_that_fails_is_said_and_changes_nothing(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    under_slurm(monkeypatch)
    (scontrol.parent / "fails").touch()
    tell = At(4, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert left(LONG, tmp_path / "cut", tell, Preemption(requeue=True)) == 75
    assert "failed (exit code 1: Invalid job id). The run is saved: submit the job again" in capsys.readouterr().out
    goes_on(tmp_path, LONG)


@pytest.mark.parametrize(("signals", "called"), [(None, False), ("SIGTERM", True)])
def test_a_job_that_may_have_been_cancelled_is_not_requeued_unless_asked(
    signals: Any, called: bool, scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_slurm(monkeypatch)
    tell = At(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert left(LONG, tmp_path, tell, Preemption(requeue=True, signals=signals)) == 75
    assert scontrol.exists() is called


def test_a_run_that_ends_is_not_requeued(scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_slurm(monkeypatch)
    assert left(LONG, tmp_path, Preemption(requeue=True), max_steps=3) == 0
    assert not scontrol.exists()


def test_a_requeue_that_is_not_possible_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        train(Job(), tmp_path, callbacks=[Preemption(requeue=True)])
    under_slurm(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="scontrol is not on the PATH"):
        train(Job(), tmp_path, callbacks=[Preemption(requeue=True)])


# -- what is read -----------------------------------------------------------------------------------------------------
def test_what_a_batch_system_says_of_the_job() -> None:
    given = {"SLURM_JOB_ID": "12", "SLURM_JOB_START_TIME": "100", "SLURM_JOB_END_TIME": "200", "SLURM_RESTART_COUNT": "2"}
    assert read_job(given) == JobEnvironment("slurm", "12", 100.0, 200.0, 2)
    assert read_job({}) == JobEnvironment()
    assert read_job({"TORCHELASTIC_RESTART_COUNT": "3"}).restarts == 3
    assert read_job({"DRIVETRAIN_AGENT_PID": "77"}).agent_pid == 77
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME='soon'"):
        read_job(given | {"SLURM_JOB_END_TIME": "soon"})


@pytest.mark.skipif(sys.platform != "linux", reason="waits for a system that tells when a process started: /proc")
def test_the_start_of_a_process_is_known() -> None:
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert _started_at(child.pid) == pytest.approx(before, abs=1.0)
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h55m", 14100),
        ("90s", 90),
        ("1d12h", 129600),
        ("1.5h", 5400),
        ("3:55:00", 14100),
        ("1-12:00:00", 129600),
        (7, 7),
        ("2 m", 120),
    ],
)
def test_lengths_of_time(text: Any, seconds: float) -> None:
    assert parse_seconds(text, "time_limit") == seconds


@pytest.mark.parametrize("text", ["", "soon", "3x", "5m3h", 0, -1, None, True, "10"])
def test_what_is_no_length_of_time_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="time_limit is "):
        parse_seconds(text, "time_limit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"time_limit": "1m", "grace": "2m"}, "grace time is before the end"),
        ({"signals": "SIGKILL"}, "'SIGKILL', expected names among"),
        ({"check_every_s": 0}, "check_every_s=0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Preemption(**options)
