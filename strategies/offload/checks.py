"""What cannot pass through buffers, and is refused by name before anything is written or read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..composite import parts_of
from ..errors import ConfigError
from ..placement import main_place, place_of
from .away import is_away

__all__ = ["check_buffers", "check_plain"]


def check_buffers(model: nn.Module, places: Mapping[str, Any]) -> None:
    """Refuse to offload buffers.

    Raises:
        ConfigError: with the buffers that lie in offloaded modules, and their bytes. Without any there is nothing to refuse.
    """
    main = main_place(places.values())
    away = {"disk"} if main == "cpu" else {"disk", "cpu"}
    found = {n: b.numel() * b.element_size() for n, b in model.named_buffers() if place_of(n, places) in away}
    if found:
        some = ", ".join(list(found)[:3]) + (" ..." if len(found) > 3 else "")
        raise ConfigError(
            f"offload_buffers=True: the buffers {some} ({sum(found.values()):,} bytes) would be read anew for each forward, and "
            "what their modules write to them lost. They stay where the model computes; leave offload_buffers out."
        )


def check_plain(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are neither plain tensors nor made of plain tensors.

    Raises:
        ConfigError: with the name and the type.
    """
    for name, tensor in tensors.items():
        if is_away(tensor):
            continue
        for path, part in parts_of("", tensor).items():
            if type(part) not in (Tensor, nn.Parameter, nn.Buffer):
                what = f"is of the type {type(part).__name__}, which cannot be taken apart into plain tensors"
            elif part is not tensor and not part.is_contiguous():
                what = f"is of the type {type(tensor).__name__}, whose part {path[1:]} is not contiguous"
            else:
                continue
            raise ConfigError(
                f"{name} {what}, and only such pass through buffers. Keep its module resident (give it a device in device_map), "
                "quantise with torchao's quantize_, whose weights pass, or offload the model in bfloat16."
            )
