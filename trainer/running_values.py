"""What was logged in the running epoch so far, as one of the providers of trainer/state.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .metric_objects import load_objects_state, merge_objects_states, objects_state

if TYPE_CHECKING:
    from .metrics import Metrics
    from .module import TrainingModule

__all__ = ["RunningValues"]


class RunningValues:
    """Each rank has its own part."""

    state_is_per_rank = True

    def __init__(self, metrics: Metrics, module: TrainingModule) -> None:
        self.metrics, self.module = metrics, module

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.metrics.state_dict(), "objects": objects_state(self.module)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_states([state])

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's part of the states of all ranks; on another number of ranks, rank 0 takes all of it."""
        world = self.metrics.world
        self.metrics.load_states([state["values"] for state in states])
        if len(states) == world.size:
            load_objects_state(self.module, states[world.rank]["objects"])
        elif world.is_main:
            merge_objects_states(self.module, [state["objects"] for state in states])
