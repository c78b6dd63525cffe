"""Which checkpoints a prune leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .layout import CheckpointInfo


@dataclass(frozen=True)
class Keep:
    """Which checkpoints `prune` leaves: those that any rule names. Without a rule, all.

    `metric` is looked up in `meta["metrics"]`; a checkpoint without it, or with NaN, is never among the best.
    """

    last: int = 0
    best: int = 0
    metric: str | None = None
    mode: str = "min"
    every: int = 0

    def __post_init__(self) -> None:
        if min(self.last, self.best, self.every) < 0 or self.mode not in ("min", "max") or (self.best and not self.metric):
            raise ConfigError(f"{self}: counts are at least 0, mode is 'min' or 'max', and best needs a metric.")

    def chosen(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """Return the steps that any rule names, of `infos` in order of their commits."""
        kept = {info.step for info in infos[len(infos) - self.last :]} if self.last else set[int]()
        kept |= {info.step for info in infos if self.every and info.step % self.every == 0}
        scored = [(score, info.step) for info in infos if (score := self._score(info)) is not None]
        return kept | {step for _, step in sorted(scored, reverse=self.mode == "max")[: self.best]}

    def _score(self, info: CheckpointInfo) -> float | None:
        metrics = info.meta.get("metrics")
        value = metrics.get(self.metric) if isinstance(metrics, Mapping) and self.metric else None
        return float(value) if isinstance(value, int | float) and value == value else None
