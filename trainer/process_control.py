"""Who am I among the processes, and what is done by which: the part of `Accelerator` that needs the world only.

The names are Accelerate's. `ProcessControl` is a base class of `Accelerator`, kept here because it has its own subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ..strategies.errors import ConfigError

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.precision.base import Precision
    from ..strategies.world import World

__all__ = ["ProcessControl"]


class ProcessControl:
    """Process facts, barriers, and decorators that run a function on some ranks only."""

    world: World
    strategy: Strategy
    precision: Precision
    _triggered: bool = False

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def num_processes(self) -> int:
        return self.world.size

    @property
    def process_index(self) -> int:
        return self.world.rank

    @property
    def local_process_index(self) -> int:
        return self.world.local_rank

    @property
    def is_main_process(self) -> bool:
        return self.world.is_main

    @property
    def is_local_main_process(self) -> bool:
        return self.world.is_local_main

    @property
    def is_last_process(self) -> bool:
        return self.world.rank == self.world.size - 1

    @property
    def use_distributed(self) -> bool:
        return self.world.size > 1

    @property
    def state(self) -> Self:
        """This object: what Accelerate's state holds is here."""
        return self

    @property
    def distributed_type(self) -> str:
        """ "NO", "FSDP", "DEEPSPEED", or "MULTI_CPU", "MULTI_GPU", ...: equal to Accelerate's DistributedType of that name."""
        if self.world.size == 1:
            return "NO"
        by_name = {"fsdp": "FSDP", "hsdp": "FSDP", "deepspeed": "DEEPSPEED"}
        kind = self.device.type
        return by_name.get(self.strategy.name, f"MULTI_{'GPU' if kind == 'cuda' else kind.upper()}")

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16", "fp16" or "fp8", as Accelerate says it; `precision.name` is exact."""
        word, _, kind = self.precision.name.partition("-")
        return word if kind == "mixed" or word == "fp8" else "no"

    def save(self, obj: Any, f: str | Path, *, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
        """Write `obj` on the main process (or on that of each machine) by torch.save; a dict of tensors as safetensors."""
        if self.is_local_main_process if save_on_each_node else self.is_main_process:
            if safe_serialization:
                from safetensors.torch import save_file

                save_file(obj, f, metadata={"format": "pt"})
            else:
                torch.save(obj, f)

    def wait_for_everyone(self) -> None:
        """Return when every process has come here."""
        self.world.barrier()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process only."""
        if self.is_main_process:
            print(*args, **kwargs)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process runs the block first, then the others: for a download or a cache.

        with accelerator.main_process_first():
            dataset = tokenize(dataset)
        """
        yield from self._first(self.is_main_process)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The first process of each machine runs the block first, then the others of that machine."""
        yield from self._first(self.is_local_main_process)

    def _first(self, goes_first: bool) -> Iterator[None]:
        # The barrier stands in `finally`, so that an error on the first rank does not leave the others waiting for ever.
        if not goes_first:
            self.world.barrier()
        try:
            yield
        finally:
            if goes_first:
                self.world.barrier()

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate `function` to run on the main process only; it returns None on the others."""
        return _only_if(function, lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate `function` to run on the first process of each machine only."""
        return _only_if(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate `function` to run on the last process only."""
        return _only_if(function, lambda: self.is_last_process)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Callable[..., Any]:
        """Decorate a function to run on process `process_index` only: `@accelerator.on_process(process_index=1)`."""
        return self._on_index(function, process_index, lambda: self.process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Callable[..., Any]:
        """Decorate a function to run on process `local_process_index` of each machine only."""
        return self._on_index(function, local_process_index, lambda: self.local_process_index)

    def _on_index(self, function: Callable[..., Any] | None, index: int | None, own: Callable[[], int]) -> Callable[..., Any]:
        if function is None:
            return lambda f: self._on_index(f, index, own)
        if index is None:
            raise ConfigError("on_process needs the index of the process: @accelerator.on_process(process_index=1).")
        return _only_if(function, lambda: own() == index)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Give each process its contiguous part of a list, tuple, tensor, or dict of them; the caller's object is not changed.

        Sizes differ by at most one. With `apply_padding` the shorter parts repeat their last element, so that all are equal.

            with accelerator.split_between_processes(["a", "b", "c"]) as mine:
                ...                               # rank 0 of 2: ["a", "b"], rank 1: ["c"]
        Raises:
            ConfigError: a dict whose values differ in length, or nothing that can be split.
        """
        yield _part(inputs, self.world.rank, self.world.size, apply_padding)

    def set_trigger(self) -> None:
        """Raise a flag on this process; `check_trigger` sees it on every process."""
        self._triggered = True

    def check_trigger(self) -> bool:
        """Return whether any process called `set_trigger` since the last check. Collective; the flag is lowered."""
        flag, self._triggered = self._triggered, False
        if self.world.size == 1:
            return flag
        return any(self.world.gather_json(flag))


def _only_if(function: Callable[..., Any], condition: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if condition() else None

    return run


def _part(inputs: Any, rank: int, size: int, pad: bool) -> Any:
    if isinstance(inputs, Mapping):
        lengths = {len(v) for v in inputs.values()}
        if len(lengths) > 1:
            raise ConfigError(f"split_between_processes needs values of one length, got lengths {sorted(lengths)}.")
        return {key: _part(value, rank, size, pad) for key, value in inputs.items()}
    if not hasattr(inputs, "__len__") or isinstance(inputs, str | bytes):
        raise ConfigError(f"split_between_processes takes a list, tuple, tensor or a dict of them, got {type(inputs).__name__}.")
    count = len(inputs)
    base, extra = divmod(count, size)
    start = rank * base + min(rank, extra)
    stop = start + base + (1 if rank < extra else 0)
    part = inputs[start:stop]
    longest = base + (1 if extra else 0)
    if pad and stop - start < longest and count:
        last = inputs[max(stop - 1, 0) :][:1] if stop > start else inputs[-1:]
        part = torch.cat([part, last]) if isinstance(part, Tensor) else part + last
    return part
