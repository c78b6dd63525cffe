"""Log the learning rate (momentum, weight decay) of every optimizer and parameter group at each log point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..strategies.errors import unknown_name
from .log_points import LogPointCallback

if TYPE_CHECKING:
    from .base import TrainerView

__all__ = ["LearningRateMonitor", "learning_rates"]


class LearningRateMonitor(LogPointCallback):
    """Log `lr`, as it stands after the step and its scheduler: the rate of the next step.

    Names: `lr` for a single group; `lr/<group>` for several (its "name" in the group, else its number); `lr-<optimizer>` and
    `lr-<optimizer>/<group>` for several optimizers.

    Args:
        logging_interval: None or "step": at each log point; "epoch": at the first log point of each epoch.
        log_momentum: `momentum...` too: SGD's momentum, Adam's first beta.
        log_weight_decay: `weight_decay...` too.
    """

    def __init__(
        self, logging_interval: str | None = None, *, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise unknown_name("interval", str(logging_interval), ("step", "epoch"), where="for LearningRateMonitor")
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self._epoch = -1

    def log_point(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        if self.logging_interval == "epoch":
            if trainer.progress.epoch == self._epoch:
                return
            self._epoch = trainer.progress.epoch
        metrics.update(learning_rates(trainer.optimizers))
        if self.log_momentum:
            metrics.update(_by_group("momentum", trainer.optimizers, _momentum))
        if self.log_weight_decay:
            metrics.update(_by_group("weight_decay", trainer.optimizers, lambda group: group.get("weight_decay")))


def learning_rates(optimizers: Mapping[str, Any]) -> dict[str, float]:
    """Return the learning rates by the names above. A rate that is a tensor is read from its device."""
    return _by_group("lr", optimizers, lambda group: group.get("lr"))


def _by_group(what: str, optimizers: Mapping[str, Any], value_of: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, optimizer in optimizers.items():
        groups = optimizer.param_groups
        base = what if len(optimizers) == 1 else f"{what}-{name}"
        for i, group in enumerate(groups):
            value = value_of(group)
            if value is not None:
                key = base if len(groups) == 1 else f"{base}/{group.get('name', i)}"
                found[key if key not in found else f"{key}.{i}"] = float(value)
    return found


def _momentum(group: Mapping[str, Any]) -> Any:
    return group["betas"][0] if "betas" in group else group.get("momentum")
