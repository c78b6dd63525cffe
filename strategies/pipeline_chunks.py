"""A batch cut into the chunks that go through a pipeline one after the other. See pipeline_parallel.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import DataError

__all__ = ["Chunk", "count_samples", "cut_batch", "each_tensor", "first_input", "key_of"]

_INPUT_KEYS = ("input_ids", "inputs", "input", "x", "pixel_values", "image", "images", "tokens")


def first_input(batch: Any) -> Any:
    """Return what of a batch is the model's input: a tensor itself, the first of a sequence, or one by its usual name.

    Raises:
        DataError: nothing of that kind.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, tuple | list) and batch:
        return batch[0]
    if isinstance(batch, Mapping):
        for key in _INPUT_KEYS:
            if key in batch:
                return batch[key]
    held = f"a dict with the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise DataError(
        f"The batch is {held}, and nobody said what of it is the input of the pipeline's first stage. Define "
        "pipeline_input(self, batch) on the model and return it (a tensor, or a tuple of them)."
    )


@dataclass
class Chunk:
    """A part of a batch.

    Attributes:
        batch: the part of it.
        inputs: what the first stage is called with.
        samples: how many there are in it; 0 for one that is run only to fill the schedule.
        share: samples / those of the whole batch.
    """

    batch: Any
    inputs: tuple[Any, ...]
    samples: int
    share: float


def count_samples(inputs: tuple[Any, ...]) -> int:
    """Return how many samples there are in what the first stage is called with.

    Raises:
        DataError: nobody can tell.
    """
    n = next((len(value) for value in inputs if isinstance(value, Tensor) and value.dim()), 0)
    if not n:
        raise DataError(
            "The input of a pipeline's first stage must be a tensor whose first dimension are the samples, or a tuple that "
            f"begins with one, got {type(inputs[0]).__name__}{f' of {n} samples' if isinstance(inputs[0], Tensor) else ''}. "
            "Return it from pipeline_input(self, batch)."
        )
    return n


def cut_batch(batch: Any, inputs_of: Callable[[Any], tuple[Any, ...]], number: int) -> list[Chunk]:
    """Cut a batch into chunks as even as can be; where samples are too few, the first one is run again for nothing.

    Args:
        inputs_of: what the first stage is called with for a batch.
    Raises:
        DataError: nobody can tell how many samples there are.
    """
    n = count_samples(inputs_of(batch))
    found: list[Chunk] = []
    start = 0
    for i in range(number):
        size = n // number + (i < n % number)
        part = _slice(batch, start, start + size, n) if size else _slice(batch, 0, 1, n)
        found.append(Chunk(part, inputs_of(part), size, size / n))
        start += size
    return found


def key_of(inputs: tuple[Any, ...], backward: bool) -> Hashable:
    """What the shapes between the stages depend on."""
    return (backward, *((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else type(t) for t in inputs))


def _slice(value: Any, start: int, stop: int, n: int) -> Any:
    """Return samples `start` to `stop` of a batch of `n`: of tensors and of lists with one item a sample; all else is whole."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() and len(value) == n else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_slice(item, start, stop, n) for item in value))
    if isinstance(value, list) and len(value) == n and not any(isinstance(item, Tensor) and item.dim() for item in value):
        return value[start:stop]
    if isinstance(value, tuple | list):
        return type(value)(_slice(item, start, stop, n) for item in value)
    if isinstance(value, dict):
        return {key: _slice(item, start, stop, n) for key, item in value.items()}
    return value


def each_tensor(value: Any, function: Callable[[Any], Any], *, kind: type = Tensor) -> Any:
    """Return a tree of tuples, lists and dicts with `function` of each tensor (or other `kind`) in its place."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_tensor(item, function, kind=kind) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(item, function, kind=kind) for item in value)
    if isinstance(value, dict):
        found = {key: each_tensor(item, function, kind=kind) for key, item in value.items()}
        if type(value) is dict:
            return found
        own = copy.copy(value)  # what a transformers model returns stays of its class
        for key, item in found.items():
            own[key] = item
        return own
    return value
