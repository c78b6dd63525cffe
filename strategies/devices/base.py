"""The device that a process trains on: `choose_device("auto")` says which one, and why.

Everything goes through `torch.accelerator`, so that CUDA, XPU, MPS and the others need no code of their own here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError, suggest

_KNOWN = ("auto", "cpu", "cuda", "gpu", "hpu", "mlu", "mps", "npu", "xpu")


@dataclass(frozen=True)
class DeviceChoice:
    """A device, how many of its kind this node has, the backend that its collectives use, and the reason for it."""

    device: torch.device
    count: int
    backend: str  # of torch.distributed: "gloo", "nccl", ...
    reason: str


def choose_device(name: str = "auto", *, local_rank: int = 0, local_size: int = 1) -> DeviceChoice:
    """Return the device of the rank `local_rank` among `local_size` on this node.

    Args:
        name: "auto" takes the accelerator when there is one, else the CPU; "gpu" any accelerator; "cuda", "xpu", ... that
            kind, one per local rank; "cuda:1" that very device (one rank only).
    Raises:
        ConfigError: no such device here, or more ranks than devices. It is never replaced by another kind.
    """
    found = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    kind, _, index = name.partition(":")
    if kind not in _KNOWN or (index and not index.isdigit()):
        raise ConfigError(
            f"device={name!r}: expected one of {', '.join(_KNOWN)}, or a kind with an index like 'cuda:0'.{suggest(kind, _KNOWN)}"
        )
    if kind == "cpu" or (kind == "auto" and found is None):
        reason = "asked for" if kind == "cpu" else "no accelerator found"
        return DeviceChoice(torch.device("cpu"), 1, "gloo", reason)
    if found is None or (kind not in ("auto", "gpu") and kind != found.type):
        here = f"this machine has {found.type}" if found is not None else "this machine has no accelerator that torch can use"
        raise ConfigError(f"device={name!r}: {here}. Use device='auto', or install the torch build for that device.")
    count = torch.accelerator.device_count()
    position = int(index) if index else local_rank
    if index and local_size > 1:
        raise ConfigError(f"device={name!r} with {local_size} ranks on this node: name the kind only, device={kind!r}.")
    if position >= count:
        raise ConfigError(
            f"{local_size} ranks on this node want one {found.type} device each (rank {local_rank} wants number {position}), "
            f"but there are {count}. Start {count} ranks, or train on the CPU with device='cpu'."
        )
    backend = torch.distributed.get_default_backend_for_device(found.type) or "gloo"
    reason = f"{count} {found.type} device{'s' if count > 1 else ''} found" if kind in ("auto", "gpu") else "asked for"
    return DeviceChoice(torch.device(found.type, position), count, backend, reason)


def select_device(device: torch.device) -> None:
    """Make `device` this process's current accelerator; nothing for the CPU."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
