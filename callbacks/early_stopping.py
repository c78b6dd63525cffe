"""Stop the training when a metric no longer improves. Options and meaning are Lightning's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..strategies.errors import ConfigError, unknown_name
from .base import Callback

if TYPE_CHECKING:
    from torch import nn

    from .base import TrainerView

__all__ = ["EarlyStopping", "monitored"]


class EarlyStopping(Callback):
    """Look at `monitor` after each validation (or each training epoch) and stop once it has not improved `patience` times.

    Metrics are reduced over the ranks, so every rank decides the same. The state (best value, how often it did not improve)
    is in the checkpoint.

    Args:
        monitor: the name of a metric. One logged with on_step and on_epoch is found under its plain name too.
        min_delta: a smaller change is no improvement.
        patience: so many looks in a row without improvement stop the training.
        mode: "min" or "max".
        strict: a metric that is not there is an error; otherwise the look is left out.
        check_finite: stop when it is NaN or infinite.
        stopping_threshold: stop when it is better than this.
        divergence_threshold: stop when it is worse than this.
        check_on_train_epoch_end: look there instead of after the validation. None: where the metric first appears.
        verbose: print each improvement, too.
    """

    def __init__(
        self,
        monitor: str,
        *,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        verbose: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise unknown_name("mode", str(mode), ("min", "max"), where="for EarlyStopping")
        if patience < 1:
            raise ConfigError(f"EarlyStopping(patience={patience}): it is the number of looks without improvement, at least 1.")
        self.monitor = monitor
        self.mode = mode
        self.min_delta = abs(min_delta)
        self.patience = patience
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.verbose = verbose
        self.best_score = math.inf if mode == "min" else -math.inf
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason: str | None = None
        self._at_train_epoch_end = check_on_train_epoch_end
        self._validated = False

    @property
    def state_key(self) -> str:
        return f"EarlyStopping[{self.monitor},{self.mode}]"

    def state_dict(self) -> dict[str, Any]:
        best = torch.tensor(self.best_score, dtype=torch.float64)  # infinite before the first look, which JSON has no word for
        at_epoch_end = self._at_train_epoch_end
        return {"best": best, "wait": self.wait_count, "stopped_epoch": self.stopped_epoch, "at_train_epoch_end": at_epoch_end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score = float(state["best"])
        self.wait_count = state["wait"]
        self.stopped_epoch = state["stopped_epoch"]
        if self.check_on_train_epoch_end is None:
            self._at_train_epoch_end = state["at_train_epoch_end"]

    def on_validation_end(self, trainer: TrainerView, module: nn.Module) -> None:
        if trainer.stage != "fit":
            return
        self._validated = True
        if self._at_train_epoch_end is None and monitored(trainer.metrics, self.monitor) is not None:
            self._at_train_epoch_end = False
        if self._at_train_epoch_end is False:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, module: nn.Module) -> None:
        if self._at_train_epoch_end is None and monitored(trainer.metrics, self.monitor) is not None:
            self._at_train_epoch_end = True
        # Before the first validation nobody can know whether the name will come with it, unless there will be none.
        validated = self._validated or not trainer.num_val_batches
        if self._at_train_epoch_end or (self._at_train_epoch_end is None and validated):
            self._look(trainer)

    def _look(self, trainer: TrainerView) -> None:
        value = monitored(trainer.metrics, self.monitor)
        if value is None:
            if self.strict:
                raise unknown_name("metric", self.monitor, trainer.metrics, where="among those logged, for EarlyStopping")
            return
        reason = self._reason_to_stop(value)
        if reason is not None:
            self.stopped_epoch = trainer.progress.epoch
            self.stopping_reason = reason
            trainer.stop(f"early stopping: {reason}")
        elif self.verbose and self.wait_count == 0:
            trainer.print(f"early stopping: {self.monitor} improved to {value:.6g}")

    def _reason_to_stop(self, value: float) -> str | None:
        """Take a new value into account; return why the training should stop, or None."""
        name = self.monitor
        if self.check_finite and not math.isfinite(value):
            return f"{name} is {value}"
        if self.stopping_threshold is not None and self._is_better(value, self.stopping_threshold):
            return f"{name} is {value:.6g}, better than the stopping threshold {self.stopping_threshold:g}"
        if self.divergence_threshold is not None and self._is_better(self.divergence_threshold, value):
            return f"{name} is {value:.6g}, worse than the divergence threshold {self.divergence_threshold:g}"
        if self._is_better(value, self.best_score, self.min_delta):
            self.best_score = value
            self.wait_count = 0
            return None
        self.wait_count += 1
        if self.wait_count < self.patience:
            return None
        return f"{name} did not improve on {self.best_score:.6g} in {self.wait_count} looks in a row"

    def _is_better(self, value: float, than: float, by: float = 0.0) -> bool:
        return value < than - by if self.mode == "min" else value > than + by


def monitored(metrics: Mapping[str, float], name: str) -> float | None:
    """Return the value that `monitor=name` means: the metric of that name, or its epoch's or step's value, or None."""
    for candidate in (name, f"{name}_epoch", f"{name}_step"):
        if candidate in metrics:
            return float(metrics[candidate])
    return None
