"""The state of a run between two steps, kept aside so that it can still be saved when what follows breaks off.

    validation told to leave     the weights are what they were, the rest of the state has moved on: random states, counters
    a step that fails            the batch that failed counts as not trained on
What a checkpoint then holds is the weights and optimizer state as they are, and everything else as it was noted. `due` says what
of the last step, or of the epoch, was still to be done: a resumed run begins with that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import state as run_state

if TYPE_CHECKING:
    from .runtime import Runtime

__all__ = ["EPOCH", "STEP", "Boundary"]

STEP = "step"
"""Due: the validation after a step, and the moment for checkpoints that follows it."""
EPOCH = "epoch"
"""Due: what comes at the end of the epoch. Its batches are all trained on."""


@dataclass(frozen=True)
class Boundary:
    """What was noted.

    Attributes:
        found: the state; its tensors of models and optimizers are the live ones.
        due: STEP, EPOCH or both, in this order.
        metrics: the last reduced values.
    """

    found: run_state.Collected
    due: tuple[str, ...]
    metrics: dict[str, float]

    @classmethod
    def of(cls, trainer: Runtime, due: Sequence[str], *, buffers: bool) -> Boundary:
        """Note the state of `trainer` as it is now.

        Args:
            buffers: keep the models' buffers too, which a forward pass in training changes (running statistics).
        """
        found = run_state.collect(trainer.accelerator, trainer.providers())
        tensors = dict(found.tensors)
        if buffers:
            for model_name, model in trainer.accelerator.models.items():
                for name, _ in model.named_buffers():
                    key = f"model/{model_name}/{name}"
                    if key in tensors:
                        tensors[key] = _copied(tensors[key])
        kept = replace(
            found,
            tensors=tensors,
            values=_copied(found.values),
            rank_values=_copied(found.rank_values),
            rank_tensors=_copied(found.rank_tensors),
        )
        return cls(kept, tuple(due), dict(trainer.metrics))

    @property
    def progress(self) -> Mapping[str, Any]:
        return self.found.values["progress"]

    @property
    def step(self) -> int:
        return self.progress["global_step"]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value
