"""The whole tensors of a model, one at a time: what an export writes without ever holding the model.

    whole = strategy.whole_tensors(model)
    whole.sizes, whole.tied                     what there is: name -> bytes, {other name: the name under which its memory is}
    whole.on_main("...", lambda read: ...)      rank 0 acts; each tensor it reads is put together by all ranks, then dropped
    whole.all()                                 all of it at once, in the host memory of rank 0

Rank 0 leads: it says which tensor comes next, all put their pieces of it together, and at the end it says how it went. So what is
read, in which order and how far is rank 0's affair alone; an error there is raised on all ranks, and nobody waits for ever.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .checkpoint.layout import human
from .checkpoint.together import Together
from .checkpoint.weights import memory_of
from .checkpoint.writer import Deferred

if TYPE_CHECKING:
    from pathlib import Path

    from .world import World

T = TypeVar("T")
Read = Callable[[Sequence[str]], dict[str, Deferred]]
"""Names -> stand-ins of their tensors, each put together when it is written (checkpoint/writer.py)."""

__all__ = ["Read", "WholeTensors"]


def _as_held(tensor: Tensor) -> tuple[Sequence[int], torch.dtype]:
    return tensor.shape, tensor.dtype


class WholeTensors:
    """The whole tensors of one model.

    Args:
        own: the model's tensors by name, as this rank has them: whole, DTensors, stand-ins. Tied ones are the same object, or the
            same memory.
        gather: (name, own tensor) -> the whole one, at least on rank 0. Collective. None where rank 0 has all of them.
        spec: own tensor -> shape and dtype of the whole one.
    Attributes:
        sizes: bytes of the tensors that have memory of their own, in the model's order;  tied: the other names.
    """

    def __init__(
        self,
        world: World,
        own: Mapping[str, Tensor],
        *,
        gather: Callable[[str, Tensor], Tensor] | None = None,
        spec: Callable[[Tensor], tuple[Sequence[int], torch.dtype]] = _as_held,
    ) -> None:
        self._world, self._own, self._gather = world, own, gather
        self.sizes: dict[str, int] = {}
        self.tied: dict[str, str] = {}
        self._specs: dict[str, tuple[Sequence[int], torch.dtype]] = {}
        first: dict[Any, str] = {}
        for name, tensor in own.items():
            shape, dtype = spec(tensor)
            numel = math.prod(shape)
            kept = first.setdefault(memory_of(tensor) if numel else name, name)
            if kept != name:
                self.tied[name] = kept
            else:
                self.sizes[name] = numel * dtype.itemsize
                self._specs[name] = shape, dtype

    def on_main(self, what: str, folder: Path, action: Callable[[Read], T]) -> T:
        """Let rank 0 act, and return its result, plain data, on all ranks. Collective.

        Args:
            what, folder: what is done and where, for the error.
            action: is given a `Read`.
        Raises:
            CheckpointError: `action` failed; the same error on all ranks.
        """
        if not self._world.is_main:
            self._serve()
        return Together(self._world, folder).from_main(what, lambda: self._lead(lambda: action(self._read)))

    def _serve(self) -> None:
        """Give this rank's pieces of what rank 0 asks for, until it has all that it wants."""
        while self._gather is not None and (name := self._world.broadcast_json(None)) is not None:
            self._put_together(name)

    def _lead(self, action: Callable[[], T]) -> T:
        try:
            return action()
        finally:
            if self._gather is not None:
                self._world.broadcast_json(None)

    def _read(self, names: Sequence[str]) -> dict[str, Deferred]:
        def reader(name: str) -> Callable[[], Tensor]:
            return lambda: self._ask(name)

        return {name: Deferred(*self._specs[name], reader(name)) for name in names}

    def _ask(self, name: str) -> Tensor:
        if self._gather is not None:
            self._world.broadcast_json(name)
        return self._put_together(name)

    def _put_together(self, name: str) -> Tensor:
        own = self._own[name]
        with torch.no_grad():
            return own.detach() if self._gather is None else self._gather(name, own)

    def all(self) -> dict[str, Tensor]:
        """Return all tensors, whole, in host memory on rank 0; nothing on the others. Tied ones are one tensor. Collective.

        It takes `sum(sizes.values())` bytes of rank 0's host memory, and warns where so much is not free.
        """
        if not self._world.is_main:
            self._serve()
            return {}
        found = self._lead(self._gather_all)
        return {name: found[self.tied.get(name, name)] for name in self._own}

    def _gather_all(self) -> dict[str, Tensor]:
        from .placement import free_host_memory

        needed, free = sum(self.sizes.values()), free_host_memory()
        if needed > free:
            warnings.warn(
                f"The whole model is put together in the host memory of rank 0: {human(needed)}, where {human(free)} are free. "
                "save_model writes the same tensors one by one, save_state each rank's pieces.",
                stacklevel=2,
            )
        return {name: self._ask(name).cpu() for name in self.sizes}
