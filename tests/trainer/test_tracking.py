"""A logger that fails, hangs or is missing costs one warning, never the training."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.loggers.base import Logger, RunInfo
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.errors import ConfigError, DrivetrainError
from drivetrain.trainer import tracking as tracking_module
from drivetrain.trainer.tracking import LoggerWarning, Tracking


class Recorder(Logger):
    """Keeps what it is told; fails in the methods named."""

    def __init__(self, *fails: str, required: bool = False) -> None:
        super().__init__(required=required)
        self.fails = fails
        self.seen: list[Any] = []

    def tell(self, what: str, value: Any) -> None:
        if what in self.fails:
            raise OSError(f"no luck in {what}\nsecond line")
        self.seen.append((what, value))

    def start(self, run: RunInfo) -> None:
        self.tell("start", run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.tell("log", (dict(metrics), step))

    def close(self, status: str) -> None:
        self.tell("close", status)


class RemoteRecorder(Recorder):
    remote = True
    close_timeout_s = 5.0


class Hanging(RemoteRecorder):
    """A server that takes the connection and never answers."""

    close_timeout_s = 0.1

    def __init__(self, what: str, **options: Any) -> None:
        super().__init__(**options)
        self.what = what
        self.release = threading.Event()

    def tell(self, what: str, value: Any) -> None:
        if what == self.what:
            self.release.wait(30)
        super().tell(what, value)


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(name="demo", id="7", root=tmp_path)


def train(tracking: Tracking, run: RunInfo, steps: int = 3) -> list[str]:
    """A run of a few log points; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracking.start(run)
        for step in range(steps):
            tracking.log({"loss": 1.0}, step, epoch=0)
        tracking.close("finished")
    assert all(w.category is LoggerWarning for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("kind", [Recorder, RemoteRecorder])
def test_every_logger_hears_the_run_its_metrics_and_its_end(kind: type[Recorder], run: RunInfo) -> None:
    logger = kind()
    assert train(Tracking(logger), run, steps=2) == []
    logged = [("log", ({"epoch": 0.0, "loss": 1.0}, step)) for step in range(2)]
    assert logger.seen == [("start", "7"), *logged, ("close", "finished")]
    assert [line["metrics"] for line in read_metrics(run.root)] == [{"loss": 1.0}] * 2


def test_metrics_jsonl_is_always_on_and_only_once(run: RunInfo) -> None:
    assert [logger.name for logger in Tracking().loggers] == ["jsonl"]
    assert [logger.name for logger in Tracking(["csv", "jsonl"]).loggers] == ["csv", "jsonl"]
    assert Tracking(jsonl=False).loggers == []


def test_other_ranks_write_nothing(run: RunInfo) -> None:
    logger = Recorder()
    tracking = Tracking(logger, enabled=False)
    assert train(tracking, run) == []
    assert logger.seen == []
    assert tracking.state_dict() == {}
    assert list(run.root.iterdir()) == []
    with pytest.raises(ConfigError):
        Tracking("wandbb", enabled=False)  # but a wrong name fails on every rank


def test_empty_metrics_write_no_line(run: RunInfo) -> None:
    tracking = Tracking()
    tracking.start(run)
    tracking.log({}, 5, epoch=0)
    tracking.close()
    assert read_metrics(run.root) == []


@pytest.mark.parametrize("kind", [Recorder, RemoteRecorder])
@pytest.mark.parametrize("fails", ["start", "log", "close"])
def test_a_failing_logger_is_one_warning(kind: type[Recorder], fails: str, run: RunInfo) -> None:
    (message,) = train(Tracking(kind(fails)), run)
    assert kind.__name__ in message
    assert f"OSError: no luck in {fails}" in message
    assert "second line" not in message
    assert len(read_metrics(run.root)) == 3


@pytest.mark.parametrize("kind", [Recorder, RemoteRecorder])
@pytest.mark.parametrize("fails", ["start", "log"])
def test_a_required_logger_stops_the_training(kind: type[Recorder], fails: str, run: RunInfo) -> None:
    tracking = Tracking(kind(fails, required=True))

    def some_log_points() -> None:
        tracking.start(run)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # a remote one is heard of at one of the next log points
            tracking.log({"loss": 1.0}, 1)
            time.sleep(0.01)

    with pytest.raises(DrivetrainError, match=f"no luck in {fails}.*required=False"):
        some_log_points()
    tracking.close("failed")


def test_a_required_logger_that_cannot_close_does_not_fail_a_training_that_is_over(run: RunInfo) -> None:
    assert len(train(Tracking(Recorder("close", required=True)), run)) == 1


@pytest.mark.parametrize("what", ["start", "log", "close"])
def test_a_hanging_server_never_holds_the_training_up(what: str, run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logger waits for 30 s in `what`; the log points do not, and the end waits for its own timeout only."""
    monkeypatch.setattr(tracking_module, "QUEUE_LENGTH", 10)
    logger = Hanging(what)
    start = time.monotonic()
    (message,) = train(Tracking(logger), run, steps=50 if what != "close" else 3)
    assert time.monotonic() - start < 10
    assert "does not keep up" in message or "left behind" in message
    assert len(read_metrics(run.root)) == (50 if what != "close" else 3)
    logger.release.set()


def test_the_disk_s_own_failure_is_one_warning_too(run: RunInfo) -> None:
    (run.root / "metrics.jsonl").mkdir()
    (message,) = train(Tracking(), run)
    assert "IsADirectoryError" in message
    assert "has all metrics" not in message


def test_states_of_loggers_come_back_before_the_start(run: RunInfo) -> None:
    class Numbered(Recorder):
        def state_dict(self) -> dict[str, Any]:
            return {"n": len(self.seen)}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.seen.append(("state", state["n"]))

    def make() -> tuple[Tracking, list[Numbered]]:
        loggers = [Numbered(), Numbered()]
        return Tracking(loggers), loggers

    first, loggers = make()
    first.start(run)
    loggers[1].seen.append("more")
    first.log({"loss": 1.0}, 1)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert set(state) == {"jsonl", "Numbered", "Numbered.2"}
    second, loggers = make()
    second.load_state_dict(state)
    second.start(run)
    assert [logger.seen[:2] for logger in loggers] == [[("state", 2), ("start", "7")], [("state", 3), ("start", "7")]]
    second.close()


def test_a_kill_leaves_whole_lines(run: RunInfo, ranks: Any) -> None:
    """Each line is flushed at its log point: SIGKILL right after it loses none."""
    import os
    import signal

    def die() -> None:
        tracking = Tracking()
        tracking.start(run)
        for step in range(5):
            tracking.log({"loss": float(step)}, step)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="SIGKILL"):
        ranks(1, die)
    assert [line["metrics"]["loss"] for line in read_metrics(run.root)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_no_thread_is_left_of_a_logger_that_ended(run: RunInfo) -> None:
    before: Callable[[], set[threading.Thread]] = lambda: set(threading.enumerate())  # noqa: E731
    threads = before()
    train(Tracking(RemoteRecorder()), run)
    assert before() == threads
