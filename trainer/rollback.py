"""Go back to a checkpoint in the middle of a training, and on with other data: those since then are left out.

    trainer.roll_back(step, reason)     in a hook: notes where the data are now (`RollBack`)
    restore(trainer, back)              the loop, when that step is done: everything is as the checkpoint holds it
    go_on(trainer, back)                the loader behind the batches that the run is to forget
In between the loop does what the checkpoint had still to do: an epoch's end, if the data are in a later epoch by now. The result
is the run that never saw those data. Only its clock goes on, and what a callback keeps over `load_state_dict` on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..strategies.checkpoint.reader import Checkpoint
from ..strategies.errors import CheckpointError, ConfigError
from . import state as run_state
from .launch.report import report

if TYPE_CHECKING:
    from ..strategies.world import World
    from .accelerator import Accelerator
    from .data.loader import Loader
    from .loops.progress import Progress
    from .runtime import Runtime

__all__ = ["RollBack", "RollsBack", "go_on", "restore"]


@dataclass(frozen=True)
class RollBack:
    """Where to go back to, and where the data go on.

    Attributes:
        step: of the checkpoint.
        reason: one sentence for the user.
        epoch, batch_in_epoch, loader: where the data are: the loader's state behind the last batch.
        samples: that were trained on by then, the ones to forget included.
    """

    step: int
    reason: str
    epoch: int
    batch_in_epoch: int
    samples: int
    loader: Mapping[str, Any]


class RollsBack:
    """The part of the trainer that callbacks heal a training with: leave steps out, roll back, or end it at once."""

    progress: Progress
    in_window: bool
    rolling_back: RollBack | None

    if TYPE_CHECKING:

        @property
        def accelerator(self) -> Accelerator: ...
        @property
        def world(self) -> World: ...
        @property
        def train_loader(self) -> Loader: ...

    @property
    def nonfinite(self) -> str:
        """What happens when a loss or gradient is NaN or Inf: "raise", "skip" or "ignore"."""
        return self.accelerator.nonfinite

    @nonfinite.setter
    def nonfinite(self, policy: str) -> None:
        self.accelerator.nonfinite = policy
        self.accelerator._configure_hot_path()

    @property
    def nonfinite_steps(self) -> int:
        """Steps left out because a gradient was NaN or Inf: at once on a CPU, as of the last log point on an accelerator."""
        return self.accelerator.nonfinite_steps

    def leave_out_above(self, limit: float | None) -> None:
        """Leave out every step with a micro-batch whose mean loss is above `limit`: decided on the device, nothing is read."""
        device = self.world.device
        self.accelerator.loss_limit = None if limit is None else torch.tensor(limit, dtype=torch.float32, device=device)

    def roll_back(self, to: int, reason: str) -> None:
        """Go on from the checkpoint of step `to` when this step is done, with the data behind it: those in between are left out.

        Every rank calls it at the same step, from on_log or on_train_batch_end. The step's validation and checkpoint do not
        happen, checkpoints after `to` are deleted, and metrics.jsonl is cut back.
        Raises:
            ConfigError: no training step is under way.
        """
        if not self.in_window:
            raise ConfigError("roll_back was called between two training steps. Call it in on_log or on_train_batch_end.")
        progress = self.progress
        self.rolling_back = RollBack(
            to, reason, progress.epoch, progress.batch_in_epoch, progress.samples, dict(self.train_loader.state_dict())
        )

    def abort(self, error: BaseException) -> NoReturn:
        """Report `error` and end this process now, from any thread: the one that trains hangs, and will not do it."""
        os._exit(report(error))


def restore(trainer: Runtime, back: RollBack) -> None:
    """Take back the state of the checkpoint, random states included; forget what came after it. Every rank calls it.

    Raises:
        CheckpointError: it is not there any more, or damaged.
    """
    trainer.rolling_back = None
    trainer.pending_saves.clear()
    trainer.settle_saves()
    trainer._boundary, trainer._broken_off = None, False
    seconds = trainer.progress.seconds
    with Checkpoint(_present(trainer.store.path_of(back.step), back.step)) as checkpoint:
        providers = trainer.providers()
        tracking = providers.pop("tracking")
        run_state.restore(trainer.accelerator, checkpoint, providers)
        trainer.progress.seconds = seconds  # the time was spent, and counts against max_time
        trainer.due = tuple(checkpoint.value("due"))
        trainer.metrics.clear()
        trainer.metrics.update(checkpoint.value("metrics/last"))
        trainer.hooks.call("on_load_checkpoint", checkpoint.value("hooks"))
        tracking.roll_back(checkpoint.value("tracking"), trainer.progress.global_step)
        _forget_later(trainer, checkpoint.manifest["sequence"])
        run_state.restore_random(checkpoint, trainer.world.rank)
    left_out = back.samples - trainer.progress.samples
    trainer.print(f"back to step {back.step}: {back.reason}; {left_out} samples are left out")


def _present(path: Path | None, step: int) -> Path:
    if path is None:
        raise CheckpointError(f"The checkpoint of step {step}, to roll back to, is gone. Keep it: trainer.store.protect({step}).")
    return path


def go_on(trainer: Runtime, back: RollBack) -> None:
    """Put the loader behind the data that are left out; the loop goes on there."""
    trainer.train_loader.load_state_dict(back.loader)
    trainer.progress.batch_in_epoch = back.batch_in_epoch
    trainer.resumed_mid_epoch = True


def _forget_later(trainer: Runtime, sequence: int) -> None:
    """Delete the checkpoints that were committed after the one that the run went back to."""
    later = None
    if trainer.world.is_main:
        later = sorted({info.step for info in trainer.store.list() if info.sequence > sequence})
    later = trainer.world.broadcast_json(later)
    if later:
        trainer.store.remove(later)
