"""Collectives that gradients flow back through: each one's backward pass is the collective that undoes it.

    forward            backward
    all_gather         reduce_scatter (sum)
    all_to_all         all_to_all, the sizes exchanged
They cut and join along dim 0 and are run by every rank of the group, in the same order, in both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["all_gather", "all_to_all"]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, tensor.shape[0]
        whole = tensor.new_empty((tensor.shape[0] * group.size(), *tensor.shape[1:]))
        dist.all_gather_single(whole, tensor.contiguous(), group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = grad.new_empty((ctx.length, *grad.shape[1:]))
        dist.reduce_scatter_single(own, grad.contiguous(), group=ctx.group)
        return own, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.received, ctx.sent = group, list(received), list(sent)
        return exchange(tensor, ctx.received, ctx.sent, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return exchange(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def exchange(tensor: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send `sent[i]` rows to rank i of the group and return what came, `received[i]` rows of each rank; no autograd."""
    got = tensor.new_empty((sum(received), *tensor.shape[1:]))
    dist.all_to_all_single(got, tensor.contiguous(), list(received), list(sent), group=group)
    return got


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensors of all ranks, one after the other along dim 0. All have one shape."""
    return _AllGather.apply(tensor, group)  # pyright: ignore[reportReturnType]


def all_to_all(tensor: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send `sent[i]` rows of `tensor` to rank i of the group, in order; return the `received[i]` rows of each rank i."""
    return _AllToAll.apply(tensor, received, sent, group)  # pyright: ignore[reportReturnType]
