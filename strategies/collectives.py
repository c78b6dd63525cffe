"""Collectives over one process group, out of place, as `World` offers them.

torch's own work in place, want equal shapes and say little when shapes differ. These return new tensors, take ragged dim 0,
and name the ranks that disagree. Groups of several backends ("cpu:gloo,cuda:nccl") route by the tensor's device.
JSON travels as bytes, never as a pickle.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, DistributedError, unknown_name

_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_MAX_DIMENSIONS = 8
_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def all_reduce(tensor: Tensor, op: str, group: dist.ProcessGroup) -> Tensor:
    """Return the elementwise `op` ("sum", "mean", "max", "min") of `tensor` over the group; `tensor` itself is unchanged.

    Shapes and dtypes must be equal on all ranks (not checked: this is the fast path). The mean of integers is refused.
    """
    if op not in _OPS:
        raise unknown_name("reduction", op, _OPS)
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ConfigError(f"The mean of a {tensor.dtype} tensor is not a {tensor.dtype}: reduce tensor.float(), or use 'sum'.")
    if tensor.dtype == torch.bool:
        # gloo has no reduction of booleans. A sum of booleans is a count, as in torch.sum.
        counts = all_reduce(tensor.to(torch.int64), op, group)
        return counts if op == "sum" else counts.bool()
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, _OPS[op], group=group)
    return result.div_(group.size()) if op == "mean" else result


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all ranks' tensors one after the other along dim 0, in order of rank. Dim 0 may differ between ranks.

    A 0-d tensor counts as one row: the result has shape (ranks,).
    Raises:
        DistributedError: ranks pass different dtypes or different shapes beyond dim 0; on every rank, naming them.
    """
    local = tensor.detach()
    local = (local.reshape(1) if local.ndim == 0 else local).contiguous()
    rows = _agree_on_rows(local, group)
    most = max(rows)
    if most == 0:
        return local.clone()
    if local.shape[0] < most:
        padded = local.new_zeros((most, *local.shape[1:]))
        padded[: local.shape[0]] = local
        local = padded
    gathered = local.new_empty((most * group.size(), *local.shape[1:]))
    _all_gather_equal(gathered, local, group)
    if min(rows) == most:
        return gathered
    return torch.cat([gathered[index * most : index * most + count] for index, count in enumerate(rows)])


def broadcast(tensor: Tensor, src: int, group: dist.ProcessGroup) -> Tensor:
    """Return the tensor of rank `src` of the group; the others pass one of the same shape and dtype. Out of place."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(result, group_src=src, group=group)
    return result


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return every rank's JSON value, in order of rank, on every rank. `group` must take CPU tensors."""
    payload = _encode(value)
    lengths = torch.zeros(group.size(), dtype=torch.int64)
    lengths[group.rank()] = payload.numel()
    dist.all_reduce(lengths, group=group)
    sizes: list[int] = lengths.tolist()
    most = max(sizes)
    buffer = torch.zeros(most, dtype=torch.uint8)
    buffer[: payload.numel()] = payload
    gathered = torch.empty(most * group.size(), dtype=torch.uint8)
    _all_gather_equal(gathered, buffer, group)
    return [_decode(gathered[index * most : index * most + size]) for index, size in enumerate(sizes)]


def broadcast_json(value: Any, src: int, group: dist.ProcessGroup) -> Any:
    """Return the JSON value of rank `src` on every rank. `group` must take CPU tensors."""
    mine = group.rank() == src
    payload = _encode(value) if mine else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([payload.numel()])
    dist.broadcast(length, group_src=src, group=group)
    buffer = payload if mine else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(buffer, group_src=src, group=group)
    return _decode(buffer)


def _agree_on_rows(local: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Return each rank's length of dim 0, after checking that everything else is equal."""
    if local.ndim > _MAX_DIMENSIONS or local.dtype not in _DTYPES:
        raise ConfigError(f"all_gather takes tensors of up to {_MAX_DIMENSIONS} dimensions and a plain dtype, got "
                          f"{local.ndim} dimensions of {local.dtype}.")  # fmt: skip
    head = [_DTYPES.index(local.dtype), local.ndim, *local.shape, *[0] * (_MAX_DIMENSIONS - local.ndim)]
    mine = torch.tensor(head, device=local.device)
    every = mine.new_empty(group.size() * len(head))
    _all_gather_equal(every, mine, group)
    heads: list[list[int]] = every.view(group.size(), len(head)).tolist()
    if any(other[:2] + other[3:] != head[:2] + head[3:] for other in heads):
        met = "; ".join(f"rank {rank}: {tuple(h[2 : 2 + h[1]])} {_DTYPES[h[0]]}" for rank, h in enumerate(heads))
        raise DistributedError(
            f"all_gather met different tensors: {met}. Expected one dtype, and equal sizes in all dimensions but the "
            "first. Pad the other dimensions first (Accelerator.pad_across_processes)."
        )
    return [other[2] for other in heads]


def _all_gather_equal(output: Tensor, local: Tensor, group: dist.ProcessGroup) -> None:
    if local.dtype == torch.bool:
        output, local = output.view(torch.uint8), local.view(torch.uint8)
    dist.all_gather_single(output, local, group=group)


def _encode(value: Any) -> Tensor:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Only JSON values travel between ranks here, got {type(value).__name__}: {error}. "
                          "Use broadcast_object or gather_object for other objects.") from None  # fmt: skip
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _decode(payload: Tensor) -> Any:
    return json.loads(payload.numpy().tobytes() if payload.numel() else b"null")
