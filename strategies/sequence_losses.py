"""Means of losses over a sequence that is shared by the ranks of `cp`: divided by what all parts count, in every step.

    F.cross_entropy, F.nll_loss, F.linear_cross_entropy, nn.CrossEntropyLoss, ...    reduction="mean", of class numbers
The parts of a sequence may hold different numbers of labels that count (padding, prompts), and the mean of the parts' means is
not the mean then. So a part's mean is answered with its sum, times the number of ranks, over the number of labels of all parts
(their weights, where classes have some): the mean over the ranks, which is what is trained on, is the mean of the whole.
One all-reduce of a number for each such loss; no host read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MEANS", "mean_over_parts"]

_FIRST = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
MEANS: Mapping[Any, tuple[str, ...]] = {
    F.cross_entropy: _FIRST,
    F.nll_loss: _FIRST[:-1],
    **({F.linear_cross_entropy: ("input", "linear_weight", "target")} if hasattr(F, "linear_cross_entropy") else {}),
}
"""The losses that are answered, and the names of their arguments by position."""


def mean_over_parts(
    func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], lengths: set[int], group: dist.ProcessGroup
) -> Tensor:
    """Return this rank's share of the mean over all parts; whatever is no mean over tokens of a part is torch's own."""
    given = dict(zip(MEANS[func], args, strict=False)) | dict(kwargs)
    target = given.get("target")
    plain = given.get("reduction", "mean") == "mean" and given.get("size_average") is None and given.get("reduce") is None
    if not plain or not isinstance(target, Tensor) or target.is_floating_point() or not _of_tokens(target, lengths):
        return func(*args, **kwargs)
    with torch.no_grad():
        ignored = given.get("ignore_index")
        counts = target != (-100 if ignored is None else ignored)
        weight = given.get("weight")
        held = counts.sum() if weight is None else (weight[target.where(counts, 0)] * counts).sum()
        held = held.to(torch.float32 if held.device.type == "mps" else torch.float64)
        dist.all_reduce(held, group=group)
    total = func(**{**given, "reduction": "sum"})
    return total * (group.size() / held).to(total.dtype)


def _of_tokens(target: Tensor, lengths: set[int]) -> bool:
    """Whether there may be a label for each token of a part; of anything else the ranks count the same."""
    return any(length and target.numel() % length == 0 for length in lengths)
