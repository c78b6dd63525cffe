"""A layer of experts (MoE): a router sends each token to a few of many feed-forwards.

    MoE(dim, hidden, num_experts=8, top_k=2)       router -> the tokens sorted by expert -> Experts -> back, weighted
    Experts(num_experts, dim, hidden)              SwiGLU feed-forwards, their weights stacked: (experts, ...)
No expert has a capacity: every token is computed, whatever the router says. `Experts.forward(tokens, counts)` is where expert
parallel comes in (expert_parallel.py): there the tokens travel to the rank that holds their expert, and back.
Keeping the experts busy is the model's affair. The layer leaves `counts` (tokens an expert was sent in its last forward) for a
bias that evens them out (`selection_bias`, Wang et al. 2024, arXiv:2408.15664), and `balance_loss` is the classic auxiliary loss.
Legend: N tokens, D features, E experts, H hidden features, K experts a token.
Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961; torch.nn.functional.grouped_mm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError

__all__ = ["Experts", "MoE", "balance_loss", "grouped_linear"]

_GROUPED_ON_CPU = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x_ND: Tensor, weight_EHD: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply the first counts[0] rows by the first weight (transposed), the next counts[1] by the second, and so on: (N, H).

    By torch's grouped_mm where it takes these dtypes and sizes, else expert by expert. An expert without rows gets a gradient
    of 0.
    """
    if torch.is_autocast_enabled(x_ND.device.type) and x_ND.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weight_EHD = x_ND.to(dtype), weight_EHD.to(dtype)
    if _takes_grouped(x_ND, weight_EHD):
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x_ND.device)
        return F.grouped_mm(x_ND, weight_EHD.mT, offs=ends)
    parts = x_ND.split(list(counts))
    return torch.cat([part @ w.mT for part, w in zip(parts, weight_EHD.unbind(0), strict=True)])


def _takes_grouped(x: Tensor, weight: Tensor) -> bool:
    if x.shape[0] == 0:
        return False
    dtypes = {"cpu": _GROUPED_ON_CPU, "cuda": (torch.bfloat16,)}.get(x.device.type, ())
    # It wants rows that start at 16 bytes, in the backward pass too.
    return x.dtype in dtypes and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])


class Experts(nn.Module):
    """SwiGLU feed-forwards w2(silu(w1 x) * w3 x), one an expert."""

    def __init__(self, num_experts: int, dim: int, hidden: int, *, bound: float | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.bound = bound
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(inputs), as torch's Linear, or in +-bound."""
        for weight in (self.w1, self.w2, self.w3):
            bound = weight.shape[-1] ** -0.5 if self.bound is None else self.bound
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Return (N, D): the feed-forward of its expert for each of `tokens` (N, D), which are sorted by expert.

        Args:
            counts: (E,) how many tokens each expert has; the experts are those whose weights are here.
        """
        rows = counts.tolist()
        gate = grouped_linear(tokens, self.w1, rows)
        up = grouped_linear(tokens, self.w3, rows)
        return grouped_linear(F.silu(gate) * up, self.w2, rows)


class MoE(nn.Module):
    """A router and its experts, in the place of a feed-forward.

    Args:
        top_k: experts a token; its outputs are weighted by the router's probabilities, made to sum to 1.
        shared: a feed-forward that every token goes through as well, or None.
        keep_probabilities: leave those of the last forward in `probabilities`, for `balance_loss`.
    """

    selection_bias: Tensor
    counts: Tensor

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        num_experts: int,
        top_k: int = 2,
        shared: nn.Module | None = None,
        keep_probabilities: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(
                f"MoE(num_experts={num_experts}, top_k={top_k}): a token goes to at least one expert and to none twice. "
                f"Choose top_k from 1 to {num_experts}."
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = Experts(num_experts, dim, hidden)
        self.shared = shared
        # Added to the scores when experts are chosen, and not when they are weighted; state, and no parameter.
        self.register_buffer("selection_bias", torch.zeros(num_experts))
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.keep_probabilities = keep_probabilities
        self.probabilities: Tensor | None = None

    def reset_parameters(self) -> None:
        """The buffers' values, where the layer was built on the meta device."""
        self.selection_bias.zero_()
        self.counts.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) of x (..., D)."""
        x_ND = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        scores_NE = self.router(x_ND).to(wide).softmax(-1)
        chosen_NK = (scores_NE.detach() + self.selection_bias).topk(self.top_k, -1).indices
        weight_NK = scores_NE.gather(-1, chosen_NK)
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        # Sorted by expert, stable, so that the same tokens always meet in the same order.
        order = chosen_NK.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_NK.flatten(), minlength=self.num_experts)
        out = self.experts(x_ND[order // self.top_k], counts)
        y_NKD = out[order.argsort()].unflatten(0, (-1, self.top_k))
        y_ND = (y_NKD * weight_NK.unsqueeze(-1).to(y_NKD.dtype)).sum(1)
        with torch.no_grad():
            self.counts.copy_(counts)
        self.probabilities = scores_NE if self.keep_probabilities else None
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view(x.shape).to(x.dtype)


def balance_loss(probabilities_NE: Tensor, counts: Tensor) -> Tensor:
    """Return the auxiliary loss of Switch Transformers: 1 where all experts are sent as much, up to E where one has all.

    Args:
        probabilities_NE: of the router, for N tokens.
        counts: (E,) tokens that each expert was sent.
    """
    share = counts.to(probabilities_NE.dtype) / counts.sum()
    return probabilities_NE.shape[-1] * (share * probabilities_NE.mean(0)).sum()
