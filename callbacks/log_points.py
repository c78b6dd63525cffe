"""A callback that adds values at each log point of the training: override `log_point`.

`on_log` is also called with the values of a validation and of an epoch's end. Those come at a step of their own, or after the
log point of the same step: so the first call at a multiple of `log_every_n_steps` is the log point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Callback

if TYPE_CHECKING:
    from torch import nn

    from .base import TrainerView

__all__ = ["LogPointCallback"]


class LogPointCallback(Callback):
    """Calls `log_point` once for each log point; what it adds to `metrics` goes to the loggers."""

    _last_log_point = -1

    def log_point(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        """Add to `metrics`. Every rank is here; values must be the same on all, or rank 0's are what is logged."""
        raise NotImplementedError(f"{type(self).__name__} must override log_point.")

    def on_log(self, trainer: TrainerView, module: nn.Module, metrics: dict[str, float], step: int) -> None:
        every = trainer.log_every_n_steps
        if every > 0 and step % every == 0 and step != self._last_log_point:
            self._last_log_point = step
            self.log_point(trainer, metrics, step)

    def on_load_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        self._last_log_point = -1  # a run that was rolled back comes to the same steps again
