"""Weights that are written into a prepared model from outside reach ZeRO's fp32 masters and pieces, or are refused.

    model.load_state_dict(whole)         each rank takes its piece of what it is given; watched by hooks (`watch`)
    accelerator.load_model(...)          the same from safetensors files, one tensor at a time (`load_weights`)
    strategy.gathered(..., modifier_rank=0)      what that rank wrote, in every stage (`Gathered`)
Without this DeepSpeed keeps masters of the old weights, and the first optimizer step brings these back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import deepspeed_engine
from .deepspeed_held import Held
from .deepspeed_state import full_shape, stretch_of
from .deepspeed_swap import read_piece, write_piece
from .errors import ConfigError

__all__ = ["Gathered", "load_weights", "watch"]


@torch.no_grad()
def put(held: Held, value: Any, whole: Tensor) -> None:
    """Write the whole of a parameter or buffer into what this rank holds of it: the master, the piece, or all."""
    flat = whole.detach().reshape(-1)
    piece = held.parts.pieces.get(id(value)) if held.parts is not None else None
    if piece is not None and held.parts is not None:
        held.parts.fill_weight(value, flat[piece.offset : piece.offset + piece.numel])
    if not hasattr(value, "ds_tensor"):
        value.detach().copy_(whole)
        return
    offset, numel = stretch_of(value)
    write_piece(value, flat[offset : offset + numel])
    if value.shape == whole.shape:  # a small one, which every rank keeps gathered, or one inside `gathered`
        value.detach().copy_(whole)
    if held.zero is not None:
        held.zero.invalidate_secondary_tensor()


def watch(held: Held) -> None:
    """Let `load_state_dict` of the model, or of any part of it, reach what the engine holds. For as long as `held` lives."""
    for module in held.model.modules():
        held.handles.append(module.register_load_state_dict_pre_hook(partial(_arrive, held)))


def _arrive(held: Held, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
    """Called by torch for each module before it copies its own tensors out of `state`, a dict of this call's own."""
    errors: list[str] = rest[-1]
    if held.reads_native or (held.engine is None and not held.born_cut_up):
        return
    if metadata.get("assign_to_params_buffers"):
        raise ConfigError(
            f"load_state_dict(assign=True) would put other parameters into model {held.name!r}, which ZeRO does not know. "
            "Leave assign out: the values are copied."
        )
    for name, value in module.named_parameters(recurse=False):
        given = state.get(prefix + name)
        if not isinstance(given, Tensor):
            continue
        shape = full_shape(value)
        if tuple(given.shape) == shape:
            put(held, value, given)
            if value.shape != given.shape:
                state[prefix + name] = value.detach()  # empty, as this one is in pieces: nothing is left to be copied
        elif not given.numel() and math.prod(shape):
            errors.append(
                f"{prefix}{name} is given empty: the state_dict() of a model in pieces. Take accelerator.get_state_dict(model)."
            )


def load_weights(held: Held, model: nn.Module, folder: Path, *, strict: bool) -> list[str]:
    """As checkpoint/weights.py's, into a model whose tensors may lie in pieces. Collective."""
    from .checkpoint import weights

    own = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    # Of the full shape, with a memory of their own by which tied ones are found, and of one element.
    stands: dict[int, Tensor] = {id(v): torch.empty(1, dtype=v.dtype).expand(full_shape(v)) for v in own.values()}
    skipped = weights.load_weights(
        {key: stands[id(value)] for key, value in own.items()}, folder, strict=strict, fill=lambda n, t: put(held, own[n], t)
    )
    if held.parts is not None:
        held.parts.publish()
    return skipped


class Gathered:
    """A context in which parameters are whole; on leaving it all ranks have what `modifier_rank` wrote, their masters too."""

    def __init__(
        self, owners: Iterable[Held], parameters: Iterable[nn.Parameter], device: torch.device, modifier_rank: int | None
    ) -> None:
        self.parameters = list(parameters)
        self.modifier_rank = modifier_rank
        self.owners = {id(p): held for held in owners for p in held.model.parameters()}
        cut_up = [p for p in self.parameters if hasattr(p, "ds_id")]
        self.inner = deepspeed_engine.gathered(device)(cut_up, modifier_rank=modifier_rank, enabled=bool(cut_up))

    def __enter__(self) -> None:
        self.inner.__enter__()

    @torch.no_grad()
    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        if self.modifier_rank is None or error[0] is not None:
            return
        for parameter in self.parameters:
            held = self.owners.get(id(parameter))
            cut_up: Any = getattr(parameter, "ds_tensor", None)
            if cut_up is None and dist.is_initialized():
                dist.broadcast(parameter.detach(), self.modifier_rank)
            if held is None or held.parts is None or (piece := held.parts.pieces.get(id(parameter))) is None:
                continue
            flat = parameter.detach().reshape(-1)[piece.offset :] if cut_up is None else read_piece(parameter)
            held.parts.fill_weight(parameter, flat[: piece.numel])
