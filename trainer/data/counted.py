"""Data sets that are told how far they were read: mosaicml-streaming's StreamingDataset, by protocol.

    state_dict(num_samples, from_beginning)   its state after so many samples of the epoch, those of all ranks together
    load_state_dict(state)                    begin the next iteration there; the state has "epoch" and "sample_in_epoch"
    next_epoch                                what it takes the next iteration for, where it is not the one that was loaded
Such a data set finds out by itself which rank and which worker asks, and reads that share only: each rank's loader is its own.
Its state lies in shared memory, so that it is asked and set here, also where workers read.
"""

from __future__ import annotations

import inspect
from typing import Any

from ...strategies.errors import CheckpointError

__all__ = ["Counted", "forgets", "has_state", "is_counted"]

_COUNTS = ["num_samples", "from_beginning"]


def has_state(value: Any) -> bool:
    """Whether `value` has state_dict() and load_state_dict(state)."""
    return callable(getattr(value, "load_state_dict", None)) and _required(value) == []


def forgets(dataset: Any) -> bool:
    """Whether the state of `dataset` leaves samples out: Hugging Face's, shuffled in a buffer whose samples are not in it.

    Such a state is refilled from behind what the buffer held, with a word in the log only (huggingface/datasets#7901). The class
    is found along the chain of private attributes, since nothing public says so.
    """
    waiting, seen = [getattr(dataset, "_ex_iterable", None)], 0
    while waiting and seen < 1000:
        inner, seen = waiting.pop(), seen + 1
        if inner is None:
            continue
        if type(inner).__name__.startswith("BufferShuffled"):
            return True
        waiting += [getattr(inner, "ex_iterable", None), *getattr(inner, "ex_iterables", ())]
    return False


def is_counted(dataset: Any) -> bool:
    """Whether `dataset` has the state_dict of the module docstring."""
    return callable(getattr(dataset, "load_state_dict", None)) and _required(dataset) == _COUNTS


def _required(value: Any) -> list[str] | None:
    """Return the names of the arguments without which value.state_dict cannot be called; None if there is no such method."""
    method = getattr(value, "state_dict", None)
    if not callable(method):
        return None
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # written in C
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


class Counted:
    """The position of such a data set: what `Stream` asks where it asks others for their state_dict."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._next = 0  # the epoch that it would read next by itself

    def state_after(self, samples: int) -> dict[str, Any]:
        """Return its state after `samples` of all ranks together."""
        return dict(self.dataset.state_dict(samples, True))

    def begin(self, epoch: int, state: dict[str, Any] | None) -> None:
        """Let the next iteration be that of `epoch`, from where `state` says, else from its start.

        Raises:
            CheckpointError: it is further on already, and cannot be set back.
        """
        if state is not None or epoch != self._next:
            if epoch < self._next and not hasattr(self.dataset, "next_epoch"):
                raise CheckpointError(
                    f"{type(self.dataset).__name__} stands at epoch {self._next} and was to go back to epoch {epoch}; expected "
                    "an attribute next_epoch to set it back by. Start the run again: a new process begins where it is told."
                )
            if hasattr(self.dataset, "next_epoch"):
                self.dataset.next_epoch = epoch
            start = {**self.dataset.state_dict(0, True), "sample_in_epoch": 0} if state is None else state
            # A state that was taken before the epoch's first sample may still have the number of the epoch before it.
            self.dataset.load_state_dict({**start, "epoch": epoch})
        self._next = epoch + 1
