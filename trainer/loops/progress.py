"""The counters of a run: one object, saved in every checkpoint as it is, and the position that a resumed run goes on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Progress"]


@dataclass(slots=True)
class Progress:
    """Where a run is. Counts are the same on every rank; samples and tokens are over all ranks.

    Attributes:
        epoch: epochs that were finished, and so the number of the one that is running, from 0.
        global_step: optimizer steps, however many optimizers there are; a step that was skipped (not finite) is none.
        batches: micro-batches of this rank since the start.
        batch_in_epoch: micro-batches of this rank in the running epoch.
        samples: samples that were trained on, over all ranks; 0 where the loader cannot tell.
        tokens: the sum of all `num_items` over all ranks, as of the last log point.
        seconds: training time, the time before a resume included, as of the last log point or save.
        skipped: windows that ended without a step.
    """

    epoch: int = 0
    global_step: int = 0
    batches: int = 0
    batch_in_epoch: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name in self.__slots__:
            setattr(self, name, state[name])
