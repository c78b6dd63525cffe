"""Tensors that are cut up over ranks (DTensors) beside plain ones: norms, checks, and the pieces that a checkpoint holds.

Gradients and state are handled as each rank's own piece, and what must be known of the whole is agreed in one small collective:
DTensor's own operators would do it too, at a hundred Python calls a tensor, and refuse lists that mix both kinds.
A plain tensor among them is the same on all ranks, and counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

# Private in name; distributed checkpoints of torch itself are written with it. It knows the strided shards of fsdp + tp.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from . import gradients
from .checkpoint.layout import Shard
from .errors import ConfigError

__all__ = ["box", "local", "locals_of", "norm", "piece", "read_like"]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's piece: the memory itself, without autograd. A plain tensor is its own piece."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def locals_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return this rank's piece of every gradient that exists; pieces without elements are left out."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    return [g for g in grads if g.numel()]


def norm(
    grads: Sequence[Tensor],
    norm_type: float = 2.0,
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the joint norm over all ranks: 0-d, float64 for float64 gradients, else float32; the same on all ranks.

    Collective: one all-reduce of a number for each way in which the gradients are cut, and one over `group`.
    Args:
        group: the stages of a pipeline, each with gradients of its own, maybe none; `device` is where they meet.
        dtype: of the result, where a rank may have no gradients to tell it by.
    """
    by_cut: dict[Any, list[Any]] = {}
    for grad in grads:
        cut = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        by_cut.setdefault(cut, []).append(grad)
    if not by_cut and group is None:
        return torch.zeros(())
    device = local(grads[0]).device if grads else torch.device("cpu") if device is None else device
    wide = torch.float32 if device.type == "mps" else torch.float64
    powers: list[Tensor] = []
    for cut, some in by_cut.items():
        held = [g for g in map(local, some) if g.numel()]
        own = gradients.grad_norm(held, norm_type).to(device, wide)
        # A maximum over ranks loses a NaN (gloo compares), so there it counts as Inf.
        power = own.nan_to_num(nan=math.inf, posinf=math.inf) if math.isinf(norm_type) else own**norm_type
        for axis, placement in enumerate(() if cut is None else cut[1]):
            if placement.is_partial():
                raise ConfigError(
                    f"A gradient is a partial sum over axis {axis} of its mesh ({placement}): it was not reduced yet. Take the "
                    "norm after a backward pass that averages gradients."
                )
            if not isinstance(placement, Replicate):
                op = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
                dist.all_reduce(power, op, group=some[0].device_mesh.get_group(axis))
        powers.append(power)
    kind = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    together = torch.stack(powers) if powers else torch.zeros(1, dtype=wide, device=device)
    total = together.max() if math.isinf(norm_type) else together.sum()
    if group is not None:
        dist.all_reduce(total, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=group)
    if not math.isinf(norm_type):
        total = total ** (1.0 / norm_type)
    return total.to(kind if dtype is None else dtype)


def box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (offset, shape) of this rank's piece in the whole."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def piece(name: str, tensor: Tensor) -> Tensor | Shard:
    """Return what a checkpoint takes for `tensor`: this rank's `Shard`, or the tensor itself where every rank has all of it.

    Raises:
        ConfigError: a DTensor that is a partial sum; nobody has its value.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if any(p.is_partial() for p in tensor.placements):
        raise ConfigError(f"Cannot save {name!r}: it is a partial sum ({tensor.placements}), which no rank has the value of.")
    held = tensor._local_tensor.detach()
    if all(isinstance(p, Replicate) for p in tensor.placements):
        return held
    offset, shape = box(tensor)
    # A rank without a piece: torch gives the offset behind the end in the cut dimension, and a shape with a 0.
    return Shard(held.reshape(shape), tuple(min(o, n) for o, n in zip(offset, tensor.shape, strict=True)), tuple(tensor.shape))


def read_like(
    parameter: Tensor, shape: Sequence[int], read: Callable[..., Tensor], *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a tensor of `shape`, cut as `parameter` is; `read(offset=, shape=)` is asked for this rank's piece alone.

    A tensor of another shape than the parameter (the factors of Adafactor) is cut like it if it is as long, else held whole.
    Args:
        dtype: to which the piece is cast; None leaves it.
    """
    if not isinstance(parameter, DTensor) or not shape:
        whole = read()
        return whole if dtype is None else whole.to(dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    dims = [dim for p in placements if (dim := getattr(p, "dim", None)) is not None]
    if len(shape) != parameter.dim() or any(shape[dim] != parameter.shape[dim] for dim in dims):
        placements = tuple(Replicate() for _ in placements)
    size, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    corner = [min(o, n) for o, n in zip(offset, shape, strict=True)]
    held = read(offset=corner, shape=list(size))
    held = held.to(parameter._local_tensor.device, dtype or held.dtype)
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
