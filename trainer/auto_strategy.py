"""What strategy="auto" means for several processes: ddp where each can hold the model and all that belongs to it, else fsdp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..strategies.checkpoint.layout import human
from ..strategies.placement import get_max_memory

if TYPE_CHECKING:
    from torch import nn

    from ..strategies.world import World

__all__ = ["choose_by_size"]

_STATE = 2
"""Numbers of optimizer state for each trained parameter: AdamW's. What the optimizer really is, is known later."""


def choose_by_size(module: nn.Module | None, world: World) -> tuple[str, str]:
    """Return the strategy's name and the reason, the same on all ranks. Collective.

    ddp holds, for each trained parameter, its value, its gradient, that gradient's place in a bucket, and AdamW's two numbers.
    Activations are not counted: nine tenths of what is free now are the limit, and they need room as well.
    """
    if module is None:
        return "ddp", f"chosen: {world.size} processes"
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    needed = sum(p.nbytes for p in module.parameters()) + trained * (2 + _STATE)
    limits = get_max_memory()
    here = limits["cpu"] // world.local_size if world.device.type == "cpu" else limits.get(world.device.index or 0, 0)
    free = min(world.gather_json(here))
    said = f"{human(needed)} of parameters, gradients and AdamW's state"
    if needed <= free:
        return "ddp", f"chosen: {world.size} processes, {said} fit the {human(free)} of each"
    return "fsdp", f"chosen: {said} do not fit the {human(free)} that each of {world.size} processes has; a piece on each"
