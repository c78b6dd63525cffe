"""A whole model in host memory or on the disk, one block at a time where it computes.

    cpu_offload(model)                          weights in host memory, blocks to the accelerator and back out of it
    disk_offload(model, "folder")               weights in safetensors in that folder
    model, hook = cpu_offload_with_hook(model)  the whole model comes at its first forward, and goes by hook.offload()
Names and arguments are Accelerate's.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .blocks import map_tensors
from .dispatch import dispatch_model
from .handle import weights_of

__all__ = ["UserCpuOffloadHook", "cpu_offload", "cpu_offload_with_hook", "disk_offload"]


def _main(execution_device: Any) -> torch.device:
    """The device that is named, else the accelerator that is there, else the CPU."""
    if execution_device is not None:
        if isinstance(execution_device, int):
            kind = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
            if kind is None:
                raise ConfigError(f"There is no accelerator {execution_device} here. Say 'cpu', or leave it out.")
            return torch.device(kind.type, execution_device)
        return torch.device(execution_device)
    found = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def cpu_offload(
    model: nn.Module,
    execution_device: Any = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    *,
    prefetch: bool = True,
) -> nn.Module:
    """Keep the weights in (pinned) host memory and bring each block to `execution_device` for its forward.

    Where the CPU computes, they are there already, and the model stays as it is.
    """
    device = _main(execution_device)
    options: dict[str, Any] = {"state_dict": state_dict, "preload_module_classes": preload_module_classes, "prefetch": prefetch}
    return dispatch_model(model, {"": "cpu"}, main_device=device, offload_buffers=offload_buffers, **options)


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: Any = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
    *,
    prefetch: bool = True,
    io: str = "cached",
) -> nn.Module:
    """Write the weights to `offload_dir` as safetensors and bring each block from there for its forward.

    A model without values finds them in the folder.
    """
    device = _main(execution_device)
    options: dict[str, Any] = {"preload_module_classes": preload_module_classes, "prefetch": prefetch, "io": io}
    options["offload_buffers"] = offload_buffers
    return dispatch_model(model, {"": "disk"}, main_device=device, offload_dir=offload_dir, **options)


class UserCpuOffloadHook:
    """What `cpu_offload_with_hook` returns beside the model: send it back to the host, or take the hook off."""

    def __init__(self, model: nn.Module, device: torch.device, before: UserCpuOffloadHook | None) -> None:
        self.model, self.device, self.before = model, device, before
        self._own = model.forward
        self._had = "forward" in model.__dict__

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.before is not None:
                self.before.offload()
            model.to(device)
            move = lambda t: t.to(device)  # noqa: E731
            return self._own(*map_tensors(args, move), **map_tensors(kwargs, move))

        forward.__signature__ = inspect.signature(self._own)  # type: ignore[attr-defined]
        model.forward = forward

    def offload(self) -> None:
        """Bring the model to host memory, until its next forward."""
        self.model.to("cpu")

    def remove(self) -> None:
        """Take the hook off; the model stays where it is."""
        if self._had:
            self.model.forward = self._own
        else:
            self.model.__dict__.pop("forward", None)


def cpu_offload_with_hook(
    model: nn.Module, execution_device: Any = None, prev_module_hook: UserCpuOffloadHook | None = None
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Bring the whole model to the device at its forward, and leave it there until `hook.offload()`: for models in a chain.

    Args:
        prev_module_hook: the hook of the model before it in the chain, which goes back to the host first.
    Raises:
        ConfigError: the model is dispatched.
    """
    if weights_of(model, None) is not None:
        raise ConfigError("The model is dispatched: its weights move block by block. Call remove_hook_from_submodules first.")
    return model, UserCpuOffloadHook(model, _main(execution_device), prev_module_hook)
