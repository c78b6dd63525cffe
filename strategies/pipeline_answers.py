"""What stands in the place of a pipelined model's forward, which no rank can run.

    module(x)            says that it cannot be called
    with answering(...)  on the rank that has the last stage, for one chunk: it returns what the stages made of the chunk
So a validation_step that calls its model and then judges the output runs unchanged, once for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError

__all__ = ["Answering", "owners_of", "stand_in"]


def owners_of(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the modules whose forward is the whole chain: the model, and what it wraps that holds all the parts."""
    found = [model]
    prefix: list[str] = []
    parts = [name.split(".")[:-1] for name in names]
    while parts and all(len(p) > len(prefix) and p[: len(prefix) + 1] == parts[0][: len(prefix) + 1] for p in parts):
        prefix = parts[0][: len(prefix) + 1]
        module = model.get_submodule(".".join(prefix))
        if type(module).forward is not nn.Module.forward:
            found.append(module)
    return found


def stand_in(owners: Sequence[nn.Module]) -> None:
    """Let the forward of `owners` say that it cannot be called."""
    for owner in owners:
        vars(owner)["forward"] = _NotCalled(type(owner).__name__)


class Answering:
    """A context in which calling one of `owners` with `inputs` returns `output`."""

    def __init__(self, owners: Sequence[nn.Module], inputs: tuple[Any, ...], output: Any) -> None:
        self._owners, self._inputs, self._output = owners, inputs, output

    def __enter__(self) -> None:
        for owner in self._owners:
            vars(owner)["forward"] = self._answer

    def __exit__(self, *error: object) -> None:
        stand_in(self._owners)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(self._inputs) or not all(map(_same, args, self._inputs)):
            raise ConfigError(
                f"{type(self._owners[0]).__name__} was called with something else than the input of the pipeline, which ran "
                "already. Call it with what pipeline_input(batch) returns, and do what prepares that there."
            )
        return self._output


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b))


class _NotCalled:
    """Stands where a pipelined model's forward was."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"{self._name} was called, and under a pipeline no rank has all of it. Let the Trainer run the step: the stages run "
            "the parts of its forward, and the last one calls compute_loss(output, batch). In a loop of your own, use "
            "accelerator.forward_backward(model.compute_loss, batch)."
        )
