"""Ring attention: keys and values travel around the ranks of `cp`; nobody ever holds those of the whole sequence.

    n times:  send the held keys and values to the next rank, while own queries attend to them; merge by log-sum-exp
    backward: the same way once more; the gradients of keys and values travel with them and come home after n hops
A block's product is softmax over its own keys; two blocks are merged by their log-sum-exps, so the result is that of one softmax
over all keys. Sums are kept in at least float32. Scores are computed for a few hundred queries at a time, so memory grows with
the length of a part, not with its square.
Source: Liu et al. 2023, arXiv:2310.01889; the backward pass from saved log-sum-exps is that of FlashAttention, arXiv:2205.14135.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sequence_layout import SequenceLayout

__all__ = ["ring_attention"]

# torch's own: the name is exchanged in backward passes (shared_sequence.py).
_arange = torch.arange
_ROWS = 512
"""Queries of which scores are held at a time."""


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Return the attention of this rank's queries to the keys of all ranks.

    Args:
        q: (..., heads, local, features); k and v the same with as many heads, or fewer that divide q's (GQA).
        attn_mask: bool (True: is attended to) or added to the scores; its rows are this rank's queries, its columns the keys of
            all ranks in the order of the sequence; broadcast over leading dimensions. It gets no gradient.
    """
    groups = q.shape[-3] // k.shape[-3]
    q_GTD, k_1SD, v_1SD = q.unflatten(-3, (k.shape[-3], groups)), k.unsqueeze(-3), v.unsqueeze(-3)
    if attn_mask is not None and attn_mask.dim() > 2:
        heads = attn_mask.shape[-3]
        attn_mask = attn_mask.unsqueeze(-3) if heads == 1 else attn_mask.unflatten(-3, (k.shape[-3], groups))
    out: Any = _Ring.apply(q_GTD, k_1SD, v_1SD, attn_mask, group, layout, is_causal, scale)
    return out.flatten(-4, -3)


class _Ring(torch.autograd.Function):
    """q (..., heads of k, groups, local, features), k and v (..., heads of k, 1, local, features)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        group: dist.ProcessGroup,
        layout: SequenceLayout,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=wide)
        lse = q.new_full(q.shape[:-1], -math.inf, dtype=wide)
        for owner, (k_held, v_held) in _travel([k, v], group):
            for rows, keys, bias in _blocks(q, k_held, owner, layout, is_causal, mask):
                block, block_lse = _attend(q[..., rows, :], k_held[..., keys, :], v_held[..., keys, :], bias, scale, wide)
                merged = torch.logaddexp(lse[..., rows], block_lse)
                # A query that has seen no key yet: -inf - -inf would be NaN, and its weight is 0 all the same.
                safe = merged.masked_fill(merged == -math.inf, 0.0)
                keep, add = (lse[..., rows] - safe).exp().unsqueeze(-1), (block_lse - safe).exp().unsqueeze(-1)
                out[..., rows, :] = out[..., rows, :] * keep + block * add
                lse[..., rows] = merged
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, result, lse)
        ctx.of = (group, layout, is_causal, scale, wide)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, mask, out, lse = ctx.saved_tensors
        group, layout, is_causal, scale, wide = ctx.of
        delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        # exp(score - lse) of a query that saw no key is 0 with any finite number in the place of -inf.
        lse = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
        dq = torch.zeros_like(q, dtype=wide)
        sums = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v)]  # contiguous, to be sent
        for owner, (k_held, v_held) in _travel([k, v], group):
            dk, dv = sums
            for rows, keys, bias in _blocks(q, k_held, owner, layout, is_causal, mask):
                q_rows, k_keys, v_keys = q[..., rows, :].to(wide), k_held[..., keys, :].to(wide), v_held[..., keys, :].to(wide)
                grad_rows = grad[..., rows, :].to(wide)
                p = (_scores(q_rows, k_keys, bias, scale) - lse[..., rows, :]).exp()
                ds = p * (grad_rows @ v_keys.mT - delta[..., rows, :]) * scale
                dq[..., rows, :] += ds @ k_keys
                dk[..., keys, :] += (ds.mT @ q_rows).sum(-3, keepdim=True)
                dv[..., keys, :] += (p.mT @ grad_rows).sum(-3, keepdim=True)
            # One hop behind the keys: what is summed here goes to whoever holds these keys next.
            sums = _hop(sums, group)
        return dq.to(q.dtype), sums[0].to(k.dtype), sums[1].to(v.dtype), None, None, None, None, None


def _travel(tensors: list[Tensor], group: dist.ProcessGroup) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (the rank that they are of, the tensors), own ones first, while the next ones are on their way."""
    rank, n = group.rank(), group.size()
    held = [t.contiguous() for t in tensors]
    for hop in range(n):
        pending, coming = _send(held, group) if hop < n - 1 else ([], held)
        yield (rank - hop) % n, held
        for work in pending:
            work.wait()
        held = coming


def _send(tensors: list[Tensor], group: dist.ProcessGroup, tag: int = 0) -> tuple[list[dist.Work], list[Tensor]]:
    """Begin to send to the next rank and to receive from the one before; return what to wait for, and what will hold it."""
    rank, n = group.rank(), group.size()
    coming = [torch.empty_like(t) for t in tensors]
    ops = [dist.P2POp(dist.isend, t, group=group, group_peer=(rank + 1) % n, tag=tag + i) for i, t in enumerate(tensors)]
    ops += [dist.P2POp(dist.irecv, t, group=group, group_peer=(rank - 1) % n, tag=tag + i) for i, t in enumerate(coming)]
    return dist.batch_isend_irecv(ops), coming


def _hop(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    # Tags of their own: keys and values are under way at the same time.
    pending, coming = _send(tensors, group, len(tensors))
    for work in pending:
        work.wait()
    return coming


def _blocks(
    q: Tensor, k: Tensor, owner: int, layout: SequenceLayout, is_causal: bool, mask: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield (queries, keys, bias) of the pairs that have work to do; the bias is added to scores."""
    local, keys_local = q.shape[-2], k.shape[-2]
    work = layout.causal_work(owner, local) if is_causal else (slice(0, local), slice(0, keys_local), False)
    if work is None:
        return
    queries, keys, diagonal = work
    columns = None if mask is None else mask.index_select(-1, layout.positions(keys_local, mask.device, owner))
    for start in range(queries.start, queries.stop, _ROWS):
        rows = slice(start, min(start + _ROWS, queries.stop))
        bias = None
        if diagonal:
            # Own tokens are in rising order, so the triangle is that of their indices. Keys behind the last row are left out.
            later = _arange(rows.stop, device=q.device) > _arange(rows.start, rows.stop, device=q.device)[:, None]
            yield rows, slice(0, rows.stop), torch.zeros(later.shape, device=q.device).masked_fill_(later, -math.inf)
            continue
        if columns is not None:
            bias = columns[..., rows, :] if columns.shape[-2] > 1 else columns
            if bias.dtype == torch.bool:
                bias = torch.zeros(bias.shape, device=q.device).masked_fill_(~bias, -math.inf)
        yield rows, keys, bias


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT) * scale
    return scores if bias is None else scores + bias


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the attention over this block's keys alone and its log-sum-exp, in `wide`."""
    scores = _scores(q.to(wide), k.to(wide), bias, scale)
    lse = scores.logsumexp(-1)
    safe = lse.masked_fill(lse == -math.inf, 0.0)
    return (scores - safe.unsqueeze(-1)).exp() @ v.to(wide), lse
