"""What each part of a model costs, by the clock: a forward and backward pass of it on a real chunk.

    Pipeline(splits="measure", example=batch)
One process measures, part by part, and tells the others, so that all cut alike. A part that is elsewhere or on the meta device is
given memory for the time that it is measured, one part at a time. The best of some runs counts, and nothing is left behind:
no gradients, no statistics, no random numbers drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ConfigError

if TYPE_CHECKING:
    from .pipeline_split import Link

__all__ = ["measure"]

_RUNS = 3


def measure(
    model: nn.Module,
    chain: Sequence[Link],
    inputs: tuple[Any, ...],
    device: torch.device,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> list[float]:
    """Return the seconds of each link of `chain` for one chunk, whose first link is called with `inputs`.

    Backward passes are run where the model has parameters that take gradients.
    Raises:
        ConfigError: a part that fails with the example, or hands on something else than tensors.
    """
    trains = any(p.requires_grad for p in model.parameters())
    found: list[float] = []
    args = tuple(value.to(device) if isinstance(value, Tensor) else value for value in inputs)
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        for i, link in enumerate(chain):
            modules = [model.get_submodule(name) for name in link.names]
            with _Present(modules, device):
                call = modules[0] if link.call is None else link.call
                best, output = float("inf"), None
                for _ in range(_RUNS):
                    args = tuple(_leaf(value, trains) for value in args)
                    start = _now(device)
                    try:
                        with (
                            torch.enable_grad() if trains else torch.no_grad(),
                            nullcontext() if autocast is None else autocast(),
                        ):
                            output = call(*link.arguments(args))
                        if trains:
                            _backward(output)
                    except Exception as error:
                        error.add_note(f"This was met while {'/'.join(link.names) or f'part {i}'} was measured with the example.")
                        raise
                    best = min(best, _now(device) - start)
            found.append(best)
            args = tuple(output) if isinstance(output, tuple | list) else (output,)
            if link is not chain[-1] and not any(isinstance(value, Tensor) for value in args):
                raise ConfigError(
                    f"{'/'.join(link.names) or f'part {i}'} returned {type(output).__name__}, and only tensors go from stage to "
                    "stage. Return tensors, or take splits by name."
                )
    return found


def _leaf(value: Any, trains: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    own = value.detach()
    return own.requires_grad_(trains and (own.is_floating_point() or own.is_complex()))


def _backward(output: Any) -> None:
    outputs = [
        t for t in (output if isinstance(output, tuple | list) else (output,)) if isinstance(t, Tensor) and t.requires_grad
    ]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class _Present:
    """The parameters and buffers of some modules on a device, with values, for the time of a `with`."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules, self._device = modules, device
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        held: dict[str, Any]
        made: dict[int, Tensor] = {}  # tied ones stay one
        for module in [m for root in self._modules for m in root.modules()]:
            for held in (module._parameters, module._buffers):
                for key, tensor in list(held.items()):
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = self._stand_in(tensor)
                    self._before.append((held, key, tensor))
                    held[key] = made[id(tensor)]

    def _stand_in(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            if tensor.is_meta:
                own = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device)
                if own.is_floating_point():
                    own.normal_(std=0.02)
            else:
                own = tensor.detach().to(self._device, copy=not isinstance(tensor, nn.Parameter))
        return nn.Parameter(own, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own

    def __exit__(self, *error: object) -> None:
        for held, key, tensor in self._before:
            held[key] = tensor
