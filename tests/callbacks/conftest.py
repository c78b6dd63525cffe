"""A stand-in for the trainer: what a callback may see of it (TrainerView), filled by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.runner import is_overridden
from drivetrain.strategies.world import World
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))  # for resume_jobs, the training that is stopped and resumed


@dataclass
class Progress:
    epoch: int = 0
    global_step: int = 0
    batches: int = 0
    batch_in_epoch: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass
class View:
    """The parts of a Trainer that callbacks use, and what they told it."""

    progress: Progress = field(default_factory=Progress)
    metrics: dict[str, float] = field(default_factory=dict)
    module: nn.Module = field(default_factory=lambda: nn.Linear(2, 1))
    world: Any = field(default_factory=World.single)
    stage: str = "fit"
    optimizers: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    max_epochs: int | None = None
    num_training_batches: int | None = None
    num_val_batches: list[float] = field(default_factory=lambda: [1])
    log_every_n_steps: int = 10
    val_loaders: Any = None
    stopped: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def stop(self, reason: str) -> None:
        self.stopped.append(reason)

    def print(self, text: str) -> None:
        self.printed.append(text)

    def train(self, *callbacks: Any, steps: int, log: Callable[[int], dict[str, float]] = lambda step: {"loss": 1 / step}) -> Any:
        """Steps of eight samples, with the hooks that a loop calls; return what the loggers would get, by step."""
        logged = {}
        starts = [c for c in callbacks if is_overridden(c, "on_train_batch_start", Callback)]
        ends = [c for c in callbacks if is_overridden(c, "on_train_batch_end", Callback)]
        for _ in range(steps):
            for c in starts:
                c.on_train_batch_start(self, self.module, None, 0)
            self.progress.batches += 1
            self.progress.samples += 8
            self.progress.global_step = step = self.progress.global_step + 1
            for c in ends:
                c.on_train_batch_end(self, self.module, None, None, 0)
            if step % self.log_every_n_steps == 0:
                logged[step] = values = log(step)
                for c in callbacks:
                    c.on_log(self, self.module, values, step)
        return logged

    def validate(self, callback: Any, values: dict[str, float]) -> None:
        """One validation that found `values`."""
        callback.on_validation_start(self, self.module)
        if self.stage == "fit":
            self.metrics |= values
            callback.on_log(self, self.module, values, self.progress.global_step)
        callback.on_validation_end(self, self.module)


@pytest.fixture
def view() -> View:
    """A trainer on one process, before its first step."""
    return View()
