"""Values of all processes brought together: the part of `Accelerator` that moves tensors between ranks.

Every function takes a tensor or a nested list, tuple, dict, namedtuple or dataclass of them, as Accelerate's do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from ..strategies.world import World
    from .data.loader import Loader

__all__ = ["Gathering"]

_REDUCTIONS = ("sum", "mean", "max", "min", "none")


class Gathering:
    """gather, reduce, broadcast and pad, over all processes."""

    world: World
    active_loader: Loader | None

    def gather(self, tensor: Any) -> Any:
        """Concatenate each tensor over all processes along dim 0 (a 0-d tensor becomes one element of a 1-d one).

        Sizes of dim 0 may differ between ranks; other dimensions must be equal.
        """
        return _each_tensor(tensor, self._gather)

    def _gather(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return self.world.all_gather(tensor.reshape(1) if tensor.dim() == 0 else tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather over processes exactly the samples of the current batch: what was padded is left out, nothing is duplicated.

        Call it inside a loop over a prepared loader, with per-sample tensors of the batch's length (0-d tensors: one a rank).
        Lengths may differ between ranks. Objects other than tensors (or `use_gather_object=True`) come back as one flat list.
        """
        mesh = self.world.mesh
        if mesh is not None and mesh.size("cp") > 1:
            raise ConfigError(
                f"gather_for_metrics was called with cp={mesh.size('cp')}, where each process has a part of every sequence, and "
                "knows no whole sample. Log means or sums, or evaluate without cp."
            )
        loader = self.active_loader
        real = loader.num_samples if loader is not None else None
        if self.world.is_duplicate:  # it has the samples of another rank
            real = 0
        if use_gather_object or not _holds_tensor(input_data):
            mine = (
                list(input_data) if isinstance(input_data, Iterable) and not isinstance(input_data, str | bytes) else [input_data]
            )
            if real == 0:
                mine = []
            return [item for part in self.world.gather_object(mine) for item in part]

        def one(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            if tensor.dim() == 0:
                return self.world.all_gather(tensor.reshape(1)[: 0 if real == 0 else 1])
            if real == 0:  # this rank only got padding
                return self.world.all_gather(tensor[:0])
            return self.world.all_gather(tensor)

        return _each_tensor(input_data, one)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Combine each tensor over all processes: "sum", "mean", "max", "min", or "none" (each keeps its own); times `scale`.

        Raises:
            UnknownName: another word for `reduction`.
        """
        if reduction not in _REDUCTIONS:
            raise unknown_name("reduction", str(reduction), _REDUCTIONS)

        def one(value: Tensor) -> Tensor:
            value = value.detach()
            reduced = value.clone() if reduction == "none" else self.world.all_reduce(value, reduction)
            return reduced * scale if scale != 1.0 else reduced

        return _each_tensor(tensor, one)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        """Return process `from_process`'s tensors on every process."""
        return _each_tensor(tensor, lambda value: self.world.broadcast(value, from_process))

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        """Pad each tensor along `dim` with `pad_index` to the largest size over all processes."""

        def one(value: Tensor) -> Tensor:
            if dim >= value.dim() or dim < -value.dim():
                raise ConfigError(f"pad_across_processes: there is no dim {dim} in a tensor of shape {tuple(value.shape)}.")
            size = torch.tensor(value.shape[dim], device=value.device)
            longest = int(self.world.all_reduce(size, "max").item())
            if longest == value.shape[dim]:
                return value
            shape = list(value.shape)
            shape[dim] = longest - value.shape[dim]
            padding = value.new_full(shape, pad_index)
            return torch.cat([padding, value] if pad_first else [value, padding], dim)

        return _each_tensor(tensor, one)


def _holds_tensor(data: Any) -> bool:
    found: list[Tensor] = []
    _each_tensor(data, lambda t: (found.append(t), t)[1])
    return bool(found)


def _each_tensor(data: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return `data` with `function` of each tensor in its place."""
    # Imported here: it is a fifth of the modules that `import drivetrain` would load, and a training does without it.
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(data, Tensor, function)
