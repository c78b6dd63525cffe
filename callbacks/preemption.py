"""Leave in time and come back: before the job's time is over, when a file appears, at a signal. Exit code 75: "start me again".

    Preemption()                                      under Slurm: two minutes before the job's end, and at SIGTERM
    Preemption("3h55m", grace="5m")                   this job may run for so long
    Preemption(file="/shared/stop", requeue=True)     `touch /shared/stop`; Slurm is asked to start the job again

SIGUSR1, and SIGTERM with code 143, the trainer obeys by itself; this adds the other reasons. Any rank may see one. All ranks save
and leave at the same step, one or two seconds later (strategies/control.py), or in the middle of a validation, with which the
resumed run then begins. A batch costs two calls; the clock is looked at every batch, the file about once a second.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..strategies.control import REQUEUE, SAVE, STOP
from ..strategies.environment import JobEnvironment, read_job
from ..strategies.errors import ConfigError
from .base import Callback
from .interval import parse_seconds

if TYPE_CHECKING:
    from torch import nn

    from .base import TrainerView

__all__ = ["Preemption"]

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")


class Preemption(Callback):
    """Save, leave with exit code 75 and, if asked to, have Slurm start the job again; it then resumes by itself.

    Attributes:
        asked: why this rank asked all ranks to leave; "" as long as it did not.
    """

    def __init__(
        self,
        time_limit: float | str | timedelta | None = None,
        *,
        grace: float | str | timedelta = "2m",
        file: str | Path | None = None,
        signals: str | Iterable[str] | None = None,
        requeue: bool = False,
        check_every_s: float = 1.0,
    ) -> None:
        """Say for what to leave.

        Args:
            time_limit: of the job, from its start: Slurm's start of the job where that is known, else that of the launcher or of
                this process. Besides, the end that Slurm tells (SLURM_JOB_END_TIME) always counts.
            grace: so long before the limit the save is asked for. It must be enough for the longest step and the save.
            file: a path whose appearance asks for it, or a newer one in its place; one that was there before is nothing.
            signals: the names of those that mean "start me again" too. None: SIGTERM under Slurm, which sends it before it
                kills. A launcher must hand them on: ours does SIGTERM and SIGUSR1.
            requeue: let rank 0 run `scontrol requeue` at the end. Not after a SIGTERM, which `scancel` sends too, unless
                `signals` names it.
            check_every_s: how often to look for the file.
        Raises:
            ConfigError: a value that makes no sense.
        """
        self.time_limit_s = None if time_limit is None else parse_seconds(time_limit, "Preemption(time_limit=...)")
        self.grace_s = parse_seconds(grace, "Preemption(grace=...)")
        if self.time_limit_s is not None and self.grace_s >= self.time_limit_s:
            raise ConfigError(
                f"Preemption(time_limit={time_limit!r}, grace={grace!r}): the grace time is before the end of the limit, so "
                "expected it to be shorter. Give a longer time_limit or a shorter grace."
            )
        if not check_every_s > 0:
            raise ConfigError(f"Preemption(check_every_s={check_every_s!r}): expected seconds above 0.")
        given = (signals,) if isinstance(signals, str) else signals
        self.signals = None if given is None else tuple(given)
        for name in self.signals or ():
            if name not in _SIGNALS:
                raise ConfigError(f"Preemption(signals=...) has {name!r}, expected names among {', '.join(_SIGNALS)}.")
        self.file = None if file is None else Path(file).expanduser().absolute()
        self.requeue, self.check_every_s = requeue, check_every_s
        self.asked = ""
        self._job = JobEnvironment()
        self._deadline = math.inf  # in time.monotonic()
        self._next = math.inf
        self._stamp: int | None = None

    def setup(self, trainer: TrainerView, module: nn.Module, stage: str) -> None:
        self._job = job = read_job()
        self.asked = ""
        if self.requeue and stage == "fit" and trainer.world.is_main:
            self._check_requeue()
        names = self.signals
        if names is None:
            names = ("SIGTERM",) if job.scheduler == "slurm" else ()
        for name in names:
            trainer.signals.means(name, REQUEUE)
        ends = [] if job.ends_at is None else [job.ends_at]
        if self.time_limit_s is not None:
            ends.append((_started_at(job.agent_pid) if job.started_at is None else job.started_at) + self.time_limit_s)
        left_s = min(ends, default=math.inf) - time.time()
        self._deadline = time.monotonic() + left_s - self.grace_s
        self._stamp = _stamp(self.file)
        if self._stamp is not None:
            trainer.print(f"preemption: {self.file} is there already; it counts when it is touched again")
        self._next = self._deadline if self.file is None else 0.0

    def on_train_batch_end(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() >= self._next:
            self._look(trainer)

    def on_validation_batch_end(
        self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if time.monotonic() >= self._next:
            self._look(trainer)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: TrainerView, module: nn.Module, stage: str) -> None:
        self._next = math.inf
        if not (self.requeue and stage == "fit" and trainer.leaving & REQUEUE and trainer.world.is_main):
            return
        if self.signals is None and "SIGTERM" in trainer.stop_reason:
            trainer.print(
                "preemption: not requeued, since the job may have been cancelled: SIGTERM. signals=('SIGTERM',) does it"
            )
            return
        trainer.store.join()  # what was saved must be on the disk before Slurm kills the job
        command = ["scontrol", "requeue", self._job.id]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            failure = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = f"{type(error).__name__}: {error}"
        if failure:
            trainer.print(f"preemption: `{' '.join(command)}` failed ({failure}). The run is saved: submit the job again")
        else:
            trainer.print(f"preemption: job {self._job.id} is requeued")

    def _look(self, trainer: TrainerView) -> None:
        """Ask all ranks to leave, if there is a reason; else say when to look again."""
        now = time.monotonic()
        if now >= self._deadline:
            self._ask(trainer, f"the time limit is {self.grace_s:g} s away")
        elif self.file is not None and _stamp(self.file) not in (None, self._stamp):
            self._ask(trainer, f"{self.file} has appeared")
        else:
            self._next = min(now + self.check_every_s, self._deadline) if self.file is not None else self._deadline

    def _ask(self, trainer: TrainerView, reason: str) -> None:
        self.asked, self._next = reason, math.inf
        trainer.world.control.request(STOP | SAVE | REQUEUE, reason)

    def _check_requeue(self) -> None:
        if self._job.scheduler != "slurm":
            raise ConfigError(
                "Preemption(requeue=True) asks Slurm to start the job again, and this is no Slurm job: SLURM_JOB_ID is not set. "
                "Leave requeue out here."
            )
        if shutil.which("scontrol") is None:
            raise ConfigError(
                "Preemption(requeue=True) runs `scontrol requeue`, and scontrol is not on the PATH of this node. Put it there, "
                "or leave requeue out and let the batch script do it when the exit code is 75."
            )


def _stamp(file: Path | None) -> int | None:
    """When the file was last written, None if it is not there or cannot be seen."""
    try:
        return None if file is None else file.stat().st_mtime_ns
    except OSError:
        return None


def _started_at(agent_pid: int | None) -> float:
    """Return when the launcher or this process started, in seconds since 1970; now, where the system does not tell."""
    try:
        # Field 22, in clock ticks since the machine started; the name in field 2 may hold spaces.
        fields = Path(f"/proc/{agent_pid or os.getpid()}/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - max(0.0, uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
