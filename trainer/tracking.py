"""The loggers of a run, and what happens when one of them fails: nothing.

    Tracking(loggers)  ->  load_state_dict  ->  start(run)  ->  log(metrics, step), ...  ->  close("finished")

metrics.jsonl is always among them. Whatever a logger raises is one warning, and the training goes on, unless the logger was made
with `required=True`. Loggers that talk to a server (`remote`) run on a thread of their own, fed by a queue of bounded length: the
training never waits for them while it runs, and only a bounded time at its end. Their warnings are given from the main thread.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..callbacks.loggers import make_loggers
from ..callbacks.loggers.base import Logger, RunInfo
from ..callbacks.loggers.jsonl import JSONLLogger
from ..strategies.errors import DrivetrainError

__all__ = ["LoggerWarning", "Tracking"]

QUEUE_LENGTH = 1000
"""Log points that wait for a server. Beyond that the oldest stay and new ones are dropped (metrics.jsonl has them all)."""


class LoggerWarning(UserWarning):
    """A logger failed; the training goes on without what it would have recorded."""


class Tracking:
    """Hands the metrics to all loggers. Rank 0 makes one; `enabled=False` (the other ranks) makes one that does nothing.

    Args:
        loggers: a name, a Logger, or several of either.
        jsonl: write metrics.jsonl. Off only where nothing is to be written at all (`fast_dev_run`).
    Raises:
        ConfigError, UnknownName: for what is no logger. On every rank.
    """

    def __init__(self, loggers: Any = (), *, jsonl: bool = True, enabled: bool = True) -> None:
        self.loggers: list[Logger] = make_loggers(loggers)
        if jsonl and not any(isinstance(logger, JSONLLogger) for logger in self.loggers):
            self.loggers.insert(0, JSONLLogger())
        self._handles = [(_RemoteHandle if logger.remote else _Handle)(logger) for logger in self.loggers] if enabled else []
        self.started = False

    def start(self, run: RunInfo) -> None:
        """Start every logger. A second call does nothing."""
        if self.started:
            return
        self.started = True
        for handle in self._handles:
            handle.start(run)

    def log(self, metrics: Mapping[str, float], step: int, *, epoch: int | None = None) -> None:
        """Give one log point's metrics to every logger; `epoch` goes with them. Empty metrics are nothing to log."""
        if not metrics:
            return
        values = dict(metrics) if epoch is None else {"epoch": float(epoch), **metrics}
        for handle in self._handles:
            handle.log(values, step)

    def close(self, status: str = "finished") -> None:
        """End every logger: "finished", "failed" or "stopped". Waits for remote ones for their `close_timeout_s` at most."""
        if not self.started:
            return
        self.started = False
        for handle in self._handles:
            handle.close(status)

    def state_dict(self) -> dict[str, Any]:
        """Return what lets the same run go on in each logger (JSON)."""
        return {key: state for key, logger in self._keys() if (state := logger.state_dict())} if self._handles else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back. Before `start`, as loggers decide then where to go on."""
        assert not self.started, "load_state_dict comes before start"
        for key, logger in self._keys():
            if key in state:
                logger.load_state_dict(state[key])

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        """The run went back to `step`, where `state_dict` was `state`: let the loggers that can forget what came after it."""
        for handle, (key, _) in zip(self._handles, self._keys(), strict=False):  # there are no handles but on rank 0
            handle.roll_back(state.get(key, {}), step)

    def _keys(self) -> list[tuple[str, Logger]]:
        """Each logger under its name, numbered where several of one's own class share it."""
        keys: dict[str, Logger] = {}
        for logger in self.loggers:
            name = base = logger.name or type(logger).__name__
            number = 1
            while name in keys:
                number += 1
                name = f"{base}.{number}"
            keys[name] = logger
        return list(keys.items())


class _Handle:
    """One logger, called directly; its errors become one warning."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.name = logger.name or type(logger).__name__
        self.alive = False
        self.warned = False

    def start(self, run: RunInfo) -> None:
        self.alive = True
        if not self._call("start", lambda: self.logger.start(run)):
            self.alive = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.alive:
            self._call("log", lambda: self.logger.log(metrics, step))

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        if self.alive:
            self._call("roll_back", lambda: self.logger.roll_back(state, step))

    def close(self, status: str) -> None:
        if self.alive:
            self.alive = False
            self._call("close", lambda: self.logger.close(status))

    def _call(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            # What a required logger could not close is no reason to fail a training that is over.
            if self.logger.required and what != "close":
                raise self.failure(what, error) from error
            self.warn(what, error)
            return False
        return True

    def warn(self, what: str, error: BaseException | str) -> None:
        """Warn once in a run."""
        if self.warned:
            return
        self.warned = True
        if isinstance(error, BaseException):
            error = f"failed in {what}: {_one_line(error)}"
        rest = "" if isinstance(self.logger, JSONLLogger) else "; metrics.jsonl has all metrics"
        warnings.warn(f"The logger {self.name!r} {error}. The training goes on{rest}.", LoggerWarning, stacklevel=5)

    def failure(self, what: str, error: BaseException) -> DrivetrainError:
        """What ends a training whose logger is required."""
        return DrivetrainError(
            f"The logger {self.name!r} failed in {what}: {_one_line(error)}. It was made with required=True, so the training "
            "stops here. Repair it, or make it with required=False to train without it."
        )


class _RemoteHandle(_Handle):
    """A logger on a thread of its own. The thread never warns: what it met is told at the next call from the main thread."""

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._error: tuple[str, BaseException] | None = None

    def start(self, run: RunInfo) -> None:
        self.alive = True
        self._thread = threading.Thread(target=self._work, args=(run,), name=f"logger {self.logger.name}", daemon=True)
        self._thread.start()
        if self.logger.required:
            self._started.wait()
            if self._error is not None:
                (what, error), self._error = self._error, None
                raise self.failure(what, error) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._tell()
        if not self.alive:
            return
        try:
            self._queue.put_nowait(lambda: self.logger.log(metrics, step))
        except queue.Full:
            self.warn("log", f"does not keep up: {QUEUE_LENGTH} log points wait for it, and further ones are dropped")

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        if self.alive:
            try:
                self._queue.put_nowait(lambda: self.logger.roll_back(state, step))
            except queue.Full:
                self.warn("roll_back", f"does not keep up: it was not told that the run went back to step {step}")

    def close(self, status: str) -> None:
        if self._thread is None:
            return
        self.alive = False
        try:
            self._queue.put_nowait(lambda: self.logger.close(status))
            self._queue.put_nowait(None)
        except queue.Full:
            pass  # it has not taken anything for long: the join below ends the wait
        self._thread.join(self.logger.close_timeout_s)
        if self._thread.is_alive():
            self.warn("close", f"was not done {self.logger.close_timeout_s:g} s after the end, and is left behind")
        self._thread = None
        self._tell()

    def _tell(self) -> None:
        """Say on the main thread what the logger's thread met."""
        notice, self.logger.notice = self.logger.notice, None
        if notice is not None:
            self.warn("start", f"says: {notice}")
        if self._error is not None:
            what, error = self._error
            self._error = None
            if self.logger.required and self.alive:
                raise self.failure(what, error) from error
            self.warn(what, error)

    def _work(self, run: RunInfo) -> None:
        try:
            self.logger.start(run)
        except BaseException as error:
            self._error = ("start", error)
            self.alive = False
            return
        finally:
            self._started.set()
        while (call := self._queue.get()) is not None:
            try:
                call()
            except BaseException as error:
                self._error = self._error or ("log", error)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
