"""Attention over a sequence that is shared by the ranks of `cp`: three ways, one meaning.

    method       what travels                          good for
    all-gather   keys and values, to everyone          any mask, any kernel of torch's SDPA; few key heads (GQA)
    ring         keys and values, from rank to rank    the longest sequences: nobody holds all keys (ring_attention.py)
    ulysses      queries, keys, values, outputs        many heads: each rank then has the whole sequence of some heads
Each returns for a rank's queries what torch's scaled_dot_product_attention of the whole sequence would; in gradients too.
Tensors are (..., heads, tokens, features); tokens are shared as SequenceLayout says.
Source: Llama 3, arXiv:2407.21783 (all-gather); Jacobs et al. 2023, arXiv:2309.14509 (Ulysses).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .autograd_collectives import all_gather, all_to_all
from .errors import ConfigError, unknown_name
from .ring_attention import ring_attention
from .sequence_layout import SequenceLayout

__all__ = ["METHODS", "attention_over_ranks"]

METHODS = ("all-gather", "ring", "ulysses")

# Ours, when F.scaled_dot_product_attention is taken over.
_sdpa = F.scaled_dot_product_attention


def attention_over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    method: str,
    group: dist.ProcessGroup,
    layout: SequenceLayout,
) -> Tensor:
    """Return the attention of this rank's queries to the keys of all ranks; the arguments are those of torch's SDPA.

    Args:
        attn_mask: bool or added. Columns are the keys of the whole sequence, in its order. Rows are this rank's queries, or those
            of the whole sequence, of which this rank's are taken, or one for all. A mask with one row and this rank's keys (a
            padding mask that was shared like the tokens) is completed.
    Raises:
        ConfigError: what the method cannot do, or a mask of any other shape.
    """
    if method not in METHODS:
        raise unknown_name("method of context parallel", method, METHODS)
    _check(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, method)
    if attn_mask is not None:
        attn_mask = _whole_mask(attn_mask, q.shape[-2], k.shape[-2], group, layout)
    if method == "ulysses":
        return _ulysses(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, group, layout)
    if method == "ring":
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if q.dim() == 3:  # no heads: one
            more = None if attn_mask is None or attn_mask.dim() < 3 else attn_mask.unsqueeze(-3)
            mask = attn_mask if more is None else more
            heads = (t.unsqueeze(-3) for t in (q, k, v))
            return ring_attention(*heads, group=group, layout=layout, attn_mask=mask, is_causal=is_causal, scale=scale).squeeze(
                -3
            )
        return ring_attention(q, k, v, group=group, layout=layout, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    return _all_gather(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, group, layout)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool, method: str
) -> None:
    if q.dim() < 3 or q.shape[:-3] != k.shape[:-3] or k.shape[:-1] != v.shape[:-1]:
        raise ConfigError(
            f"Attention under context parallel takes queries, keys and values as (..., heads, tokens, features), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}. Expand them to the same leading dimensions."
        )
    if q.shape[-3] != k.shape[-3] and (not enable_gqa or q.dim() < 4 or q.shape[-3] % k.shape[-3]):
        raise ConfigError(
            f"{q.shape[-3]} heads of queries do not go with {k.shape[-3]} of keys. Say enable_gqa=True where the one "
            "divides the other."
        )
    if is_causal and mask is not None:
        raise ConfigError(
            "attn_mask and is_causal=True were both given, which torch refuses as well. Put the triangle into the mask."
        )
    if is_causal and q.shape[-2] != k.shape[-2]:
        raise ConfigError(
            f"is_causal with {q.shape[-2]} queries and {k.shape[-2]} keys on a rank: under context parallel both are the same "
            "sequence. Give a mask over the whole sequence instead."
        )
    if method == "ring" and dropout_p > 0:
        raise ConfigError(
            f"dropout_p={dropout_p}: ring attention never holds all the weights of a query and drops none. "
            "Use ContextParallel(method='all-gather') or 'ulysses', or no dropout in attention."
        )
    if method == "ring" and mask is not None and mask.requires_grad:
        raise ConfigError(
            "An attn_mask that is trained gets no gradient from ring attention. Use ContextParallel(method='all-gather')."
        )


def _whole_mask(mask: Tensor, local: int, keys: int, group: dist.ProcessGroup, layout: SequenceLayout) -> Tensor:
    """Return the mask with this rank's queries (or one row) and all keys."""
    n = layout.ranks
    rows, columns = (1, *mask.shape)[-2:]
    if columns == keys * n and rows in (1, local):
        return mask
    if columns == keys * n and rows == local * n:
        return mask.index_select(-2, layout.positions(local, mask.device))
    if columns == keys and rows == 1:
        parts = all_gather(mask.unsqueeze(0).to(torch.uint8) if mask.dtype == torch.bool else mask.unsqueeze(0), group)
        return layout.join(torch.cat(list(parts.unbind(0)), -1), -1).to(mask.dtype)
    if columns == 1 and rows in (1, local):
        return mask
    raise ConfigError(
        f"attn_mask has the shape {tuple(mask.shape)} where this rank holds {local} of {local * n} queries and {keys} of "
        f"{keys * n} keys. Give it all columns: (..., {local}, {keys * n}) or (..., {local * n}, {keys * n}), in the order of "
        "the sequence; sequence_positions() says which rows this rank has."
    )


def _gathered(tensor: Tensor, group: dist.ProcessGroup, layout: SequenceLayout) -> Tensor:
    """Return the tensor with the tokens of all ranks, in the order of the sequence."""
    parts = all_gather(tensor.unsqueeze(0), group)
    return layout.join(torch.cat(list(parts.unbind(0)), -2), -2)


def _all_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    group: dist.ProcessGroup,
    layout: SequenceLayout,
) -> Tensor:
    local = q.shape[-2]
    k, v = _gathered(k, group, layout), _gathered(v, group, layout)
    if not is_causal:
        return _sdpa(q, k, v, mask, dropout_p, False, scale=scale, enable_gqa=enable_gqa)
    # Each chunk sees the keys up to its own end: a triangle at the lower right, for which torch has fast kernels.
    size = layout.chunk_length(local)
    found: list[Tensor] = []
    for queries, chunk in zip(q.split(size, -2), layout.chunks(), strict=True):
        end = (chunk + 1) * size
        if end == size:
            found.append(
                _sdpa(queries, k[..., :end, :], v[..., :end, :], None, dropout_p, True, scale=scale, enable_gqa=enable_gqa)
            )
        else:
            triangle = _triangle(size, end, queries.device)
            found.append(
                _sdpa(queries, k[..., :end, :], v[..., :end, :], triangle, dropout_p, scale=scale, enable_gqa=enable_gqa)
            )
    return torch.cat(found, -2)


def _triangle(queries: int, keys: int, device: torch.device) -> Tensor:
    """The lower right triangle: torch's object that stands for it, for which it has fast kernels, or a mask of it.

    Under selective activation checkpointing torch runs a dispatch mode, in which no such object can be made.
    """
    if torch._C._len_torch_dispatch_stack():
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return causal_lower_right(queries, keys)


def _ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    group: dist.ProcessGroup,
    layout: SequenceLayout,
) -> Tensor:
    n, heads = layout.ranks, q.shape[-3] if q.dim() > 3 else 1
    if heads % n:
        raise ConfigError(
            f"ContextParallel(method='ulysses') gives each of {n} ranks some of the {heads} heads, which {n} does not divide. "
            "Use method='all-gather' or 'ring', or a cp that divides the heads."
        )
    if k.shape[-3] % n:
        # Fewer heads of keys than ranks: as many copies as make them divisible.
        copies = n // math.gcd(k.shape[-3], n)
        k, v = k.repeat_interleave(copies, -3), v.repeat_interleave(copies, -3)
    q, k, v = (_to_heads(t, group, layout) for t in (q, k, v))
    if mask is not None:
        # Rows are this rank's queries here, and all are needed there.
        if mask.shape[-2] > 1:
            mask = _gathered(mask.to(torch.uint8) if mask.dtype == torch.bool else mask, group, layout).to(mask.dtype)
        if mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask.tensor_split(n, -3)[layout.rank]
    out = _sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _to_tokens(out, group, layout)


def _to_heads(tensor: Tensor, group: dist.ProcessGroup, layout: SequenceLayout) -> Tensor:
    """(..., heads, local, features) of all heads -> (..., heads / n, tokens, features) of the whole sequence."""
    n = layout.ranks
    parts = torch.stack(tensor.chunk(n, -3))
    got = all_to_all(parts, [1] * n, [1] * n, group)
    return layout.join(torch.cat(list(got.unbind(0)), -2), -2)


def _to_tokens(tensor: Tensor, group: dist.ProcessGroup, layout: SequenceLayout) -> Tensor:
    """Undo `_to_heads`."""
    n = layout.ranks
    parts = torch.stack(layout.unjoin(tensor, -2).chunk(n, -2))
    got = all_to_all(parts, [1] * n, [1] * n, group)
    return torch.cat(list(got.unbind(0)), -3)
