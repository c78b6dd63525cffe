"""A training that hangs is noticed: who lags is said, and if asked for, the run ends instead of waiting for half an hour.

    Watchdog()                                after ten minutes without a step: a word, on every rank that still runs
    Watchdog("5m", action="abort")            the stacks of this rank, the rank that lags, and exit code 1

A thread of each rank looks now and then whether the training has moved: whether any hook of a batch, a validation or a save was
called. It also writes a heartbeat, a small file in the run's folder, which tells the others where this rank is and that it runs:
    the counts differ                 the rank with the lowest one lags: it hangs in its step, or waits for its loader
    a heartbeat stands still          that process was stopped, or it is dead
    all are at the same point         it is what lies between them, or all of them wait for the same file
A batch costs four calls that set two attributes. Read `_watch` first.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..strategies.errors import ConfigError, DistributedError
from .base import Callback
from .interval import parse_seconds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .base import TrainerView

__all__ = ["Watchdog"]

_LONGEST_BEAT_S = 5.0
_FOLDER = "heartbeats"


@dataclass(frozen=True)
class Heartbeat:
    """What a rank tells of itself. `count` moves with the training, `beat` with the thread: it stands when the process does."""

    rank: int
    pid: int
    host: str
    beat: int
    count: int
    batches: int
    doing: str


class Watchdog(Callback):
    """Say, or end, when no step came for `deadline`.

    Attributes:
        warnings: what was said so far.
    """

    def __init__(
        self,
        deadline: float | str | timedelta = "10m",
        *,
        action: str = "warn",
        startup: float | str | timedelta = "30m",
    ) -> None:
        """Choose how long is too long.

        Args:
            deadline: for what comes between two hooks: a forward or backward pass, the wait for a batch, a batch of a
                validation, a save. Longer than the longest of them.
            action: "warn" says it on stderr, again after twice the time, and so on. "abort" ends this process with exit code 1
                within seconds after the deadline, whatever it hangs in; the launcher then ends the others.
            startup: the deadline until the first step is done: compiling and connecting take their time. At least `deadline`.
        Raises:
            ConfigError: a value that makes no sense.
        """
        self.deadline_s = parse_seconds(deadline, "Watchdog(deadline=...)")
        self.startup_s = max(self.deadline_s, parse_seconds(startup, "Watchdog(startup=...)"))
        if action not in ("warn", "abort"):
            raise ConfigError(f"Watchdog(action={action!r}): expected 'warn' or 'abort'.")
        self.action = action
        self.warnings: list[str] = []
        self._beat_s = min(_LONGEST_BEAT_S, self.deadline_s / 8)
        self._count = 0
        self._doing = "starting"
        self._stepped = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- where the training is ----------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._stop_watching()
        self._count, self._doing, self._stepped = 0, "starting", False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(trainer, self._stop), name="watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int) -> None:
        self._doing = "in the forward pass"
        self._count += 1

    def on_before_backward(self, trainer: TrainerView, module: nn.Module, loss: Tensor) -> None:
        self._doing = "in the backward pass"
        self._count += 1

    def on_after_backward(self, trainer: TrainerView, module: nn.Module) -> None:
        self._doing = "behind the backward pass"
        self._count += 1

    def on_train_batch_end(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._doing = "waiting for the next batch"
        self._stepped = True
        self._count += 1

    def on_train_epoch_end(self, trainer: TrainerView, module: nn.Module) -> None:
        self._at("at the end of the epoch")

    def on_validation_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._at("validating")

    def on_validation_batch_end(
        self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count += 1

    def on_validation_end(self, trainer: TrainerView, module: nn.Module) -> None:
        self._at("behind the validation")

    def on_save_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        self._at("saving a checkpoint")

    def on_checkpoint_epoch(self, trainer: TrainerView, module: nn.Module) -> None:
        self._at("behind the end of the epoch")

    def on_train_end(self, trainer: TrainerView, module: nn.Module) -> None:
        self._at("at the end of the training")

    def teardown(self, trainer: TrainerView, module: nn.Module, stage: str) -> None:
        self._stop_watching()

    def _at(self, doing: str) -> None:
        self._doing = doing
        self._count += 1

    # -- the thread ---------------------------------------------------------------------------------------------------
    def _watch(self, trainer: TrainerView, stop: threading.Event) -> None:
        """Beat, and look whether the training has moved."""
        folder = trainer.root / _FOLDER if trainer.world.size > 1 and trainer.root.is_dir() else None
        pid, host = os.getpid(), socket.gethostname()
        beat, seen, warned = 0, self._count, 0
        moved = looked = time.monotonic()
        before: dict[int, Heartbeat] = {}
        while True:
            if folder is not None:
                batches, doing = trainer.progress.batches, self._doing
                _write(folder, Heartbeat(trainer.world.rank, pid, host, beat, seen, batches, doing))
            if stop.wait(self._beat_s):
                break
            now = time.monotonic()
            if now - looked > self._beat_s + max(1.0, self.deadline_s / 4):
                moved += now - looked  # this whole process was stopped, and that is no hang of its training
            looked, beat = now, beat + 1
            if self._count != seen:
                if warned:
                    self._say(trainer, f"it goes on after {now - moved:.0f} s")
                seen, moved, warned, before = self._count, now, 0, {}
            idle_s, limit_s = now - moved, self.deadline_s if self._stepped else self.startup_s
            if folder is not None and not before and idle_s >= limit_s / 2:
                before = read_heartbeats(folder)
            if idle_s >= limit_s * 2**warned:
                warned += 1
                self._expired(trainer, idle_s, before, folder)
        if folder is not None:
            with contextlib.suppress(OSError):
                (folder / f"rank{trainer.world.rank}.json").unlink(missing_ok=True)
                folder.rmdir()  # by the last one

    def _expired(self, trainer: TrainerView, idle_s: float, before: dict[int, Heartbeat], folder: Path | None) -> None:
        text = f"nothing has moved for {idle_s:.0f} s: after {trainer.progress.batches} batches, {self._doing}."
        if folder is not None:
            text += f" {who_lags(before, read_heartbeats(folder), trainer.world.size)}"
        if self.action == "abort":
            self._abort(trainer, text)
        self._say(trainer, text)

    def _say(self, trainer: TrainerView, text: str) -> None:
        world = trainer.world
        line = f"watchdog: [rank {world.rank}/{world.size}] {text}" if world.size > 1 else f"watchdog: {text}"
        self.warnings.append(line)
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def _abort(self, trainer: TrainerView, text: str) -> None:
        """Show where every thread of this process hangs, and end it."""
        path = trainer.root / "logs" / f"watchdog-rank{trainer.world.rank}.txt"
        where = ""
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f" The stacks of this rank are in {path}."
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(2, all_threads=True)
        trainer.abort(
            DistributedError(f"{text[0].upper()}{text[1:]} Expected a step within {self.deadline_s:g} s (Watchdog).{where}")
        )

    def _stop_watching(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None


# -- heartbeats -------------------------------------------------------------------------------------------------------
def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """Return the last heartbeat of every rank that left one, by rank."""
    found: dict[int, Heartbeat] = {}
    for path in folder.glob("rank*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            heartbeat = Heartbeat(**json.loads(path.read_text()))
            found[heartbeat.rank] = heartbeat
    return found


def who_lags(before: dict[int, Heartbeat], now: dict[int, Heartbeat], size: int) -> str:
    """Say in a sentence which ranks the others wait for, from two looks at the heartbeats with at least two beats in between."""
    now = {rank: heartbeat for rank, heartbeat in now.items() if rank < size}  # others: of an earlier start, on more ranks
    silent = [rank for rank in range(size) if rank not in now]
    still = [rank for rank, heartbeat in now.items() if rank in before and before[rank].beat == heartbeat.beat]
    lowest = min((heartbeat.count for heartbeat in now.values()), default=0)
    behind = [rank for rank, heartbeat in now.items() if heartbeat.count == lowest]
    if still or silent:
        parts = [
            f"{_named(now[rank])}: its process does not run (stopped or dead), last seen {_place(now[rank])}" for rank in still
        ]
        parts += [f"rank {rank}: no heartbeat was ever seen" for rank in silent]
    elif len(behind) < len(now):
        parts = [f"{_named(now[rank])}: {_place(now[rank])}" for rank in sorted(behind)]
    else:
        return "All ranks run, and are at the same point: look at what connects them, or at what they all wait for."
    return f"Who lags is {'; '.join(parts[:4])}{f'; and {len(parts) - 4} more' if len(parts) > 4 else ''}."


def _named(heartbeat: Heartbeat) -> str:
    return f"rank {heartbeat.rank} (process {heartbeat.pid} on {heartbeat.host})"


def _place(heartbeat: Heartbeat) -> str:
    return f"after {heartbeat.batches} batches, {heartbeat.doing}"


def _write(folder: Path, heartbeat: Heartbeat) -> None:
    """Renamed into place: whoever reads sees a whole one. A disk that fails is no reason to end a training."""
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        temporary = folder / f".rank{heartbeat.rank}.tmp"
        temporary.write_text(json.dumps(asdict(heartbeat)))
        temporary.replace(folder / f"rank{heartbeat.rank}.json")
