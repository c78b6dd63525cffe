"""How fast the training goes: samples, batches and tokens a second, and the model FLOPs utilisation (MFU).

Rates are over all ranks and over the last `window` log points; the time that validations took is left out. Nothing is measured
between log points, so a step costs nothing (counting FLOPs costs two calls a batch).
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ..strategies.errors import ConfigError
from .log_points import LogPointCallback

if TYPE_CHECKING:
    from torch import nn

    from .base import TrainerView

__all__ = ["ThroughputMonitor"]


class ThroughputMonitor(LogPointCallback):
    """Log `samples_per_second`, `batches_per_second`, `tokens_per_second` (where steps return `num_items`), and with FLOPs
    `flops_per_second` of one device, and `mfu`.

    Args:
        window: over how many log points, at least 1.
        flops: of one micro-batch on one rank, forward and backward; None: the module's own `flops` attribute if it has one;
            "count": measured once, on the first batch, with torch's FlopCounterMode (matrix products and convolutions only).
        peak_flops: what one device can do a second in the run's precision, from its data sheet. Without it there is no MFU.
    """

    def __init__(self, window: int = 10, *, flops: float | str | None = None, peak_flops: float | None = None) -> None:
        if window < 1:
            raise ConfigError(f"ThroughputMonitor(window={window}): it spans at least 1 log point.")
        if isinstance(flops, str) and flops != "count":
            raise ConfigError(f"ThroughputMonitor(flops={flops!r}): it takes a number, None or 'count'.")
        self.window = window
        self.flops = flops
        self.peak_flops = peak_flops
        self._points: deque[tuple[float, int, int, int]] = deque(maxlen=window + 1)
        self._paused = 0.0
        self._pause_start = 0.0
        self._counter: Any = None
        if flops == "count":  # only then are these hooks there at all: the runner calls what an instance has
            vars(self)["on_train_batch_start"] = self._start_counting
            vars(self)["on_train_batch_end"] = self._stop_counting

    def on_train_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._points.clear()
        self._paused = 0.0
        self._add(trainer)
        if self.flops is None:
            own = getattr(module, "flops", None)
            own = own() if callable(own) else own
            self.flops = float(own) if isinstance(own, int | float) else None

    def on_load_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, module, checkpoint)
        self._points.clear()  # the counts of a run that was rolled back went down

    def on_validation_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: TrainerView, module: nn.Module) -> None:
        self._paused += time.perf_counter() - self._pause_start

    def log_point(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        self._add(trainer)
        (t0, samples0, tokens0, batches0), (t1, samples1, tokens1, batches1) = self._points[0], self._points[-1]
        seconds = t1 - t0
        if seconds <= 0:
            return
        batches = (batches1 - batches0) / seconds
        if samples1 > samples0:
            metrics["samples_per_second"] = (samples1 - samples0) / seconds
        if tokens1 > tokens0:
            metrics["tokens_per_second"] = (tokens1 - tokens0) / seconds
        metrics["batches_per_second"] = batches * trainer.world.size
        if self.flops is not None and not isinstance(self.flops, str):
            metrics["flops_per_second"] = batches * self.flops
            if self.peak_flops:
                metrics["mfu"] = batches * self.flops / self.peak_flops

    def _add(self, trainer: TrainerView) -> None:
        progress = trainer.progress
        self._points.append((time.perf_counter() - self._paused, progress.samples, progress.tokens, progress.batches))

    def _start_counting(self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int) -> None:
        if self.flops == "count":
            from torch.utils.flop_counter import FlopCounterMode

            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def _stop_counting(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
            self.flops = counter.get_total_flops()

    def on_exception(self, trainer: TrainerView, module: nn.Module, exception: BaseException) -> None:
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
