"""The models that the conformance suite (contract.py) trains, and their data: small enough for a thousand steps in a test.

    MODELS["llama"].build(seed)         a Llama of four blocks: RMSNorm, RoPE, grouped-query SDPA, SwiGLU
    MODELS["llama"].batch(samples, generator, dtype)      {"x": ..., "y": ...}: y (samples, length), -1 where there is no token

Every model has `forward(x)` -> logits (samples, length, classes), `loss(logits, batch, summed)`, and `step(batch, summed)`, which
is both. They are written as users write them, and so that tensor parallel can cut them: heads are counted as `-1`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import MoE

__all__ = ["GPT", "MLP", "MODELS", "Blueprint", "ConvNet", "Learner", "Llama", "MoELlama"]

FEATURES, CLASSES, LENGTH = 6, 5, 7  # of the MLP
VOCABULARY, TOKENS = 16, 8  # of the language models; both can be divided by 2 and 4
IMAGE = 8


class Learner(nn.Module):
    """A model with its loss."""

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], summed: bool) -> Tensor:
        """The mean (or summed) cross entropy over the tokens that are not padding."""
        reduction = "sum" if summed else "mean"
        return F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), ignore_index=-1, reduction=reduction)

    def step(self, batch: Mapping[str, Tensor], summed: bool) -> Tensor:
        return self.loss(self(batch["x"]), batch, summed)


class MLP(Learner):
    """Two layers and a parameter that the module holds itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, CLASSES)
        self.temperature = nn.Parameter(torch.ones(1))
        _initialise(self, seed, lambda _: (0.3, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.norm(self.first(x)))) * self.temperature


# -- Llama ------------------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Causal attention over `heads` queries and `kv_heads` keys and values, with rotary positions."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        # -1: how many heads there are on this rank.
        q, k, v = (w(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(
            rotate(q, positions), rotate(k, positions), v, is_causal=True, enable_gqa=self.n_heads != self.n_kv_heads
        )
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    """Attention and feed-forward, each on the normed residual stream."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(Learner):
    """The Llama of torchtitan and of Meta's own code, by their names, tiny. `tied` shares the embedding with the head."""

    def __init__(
        self,
        seed: int = 0,
        *,
        vocabulary: int = VOCABULARY,
        dim: int = 16,
        layers: int = 4,
        heads: int = 4,
        kv_heads: int = 2,
        hidden: int = 24,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        _initialise(self, seed, _spread)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return logits (samples, length, vocabulary) of tokens (samples, length)."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        hidden = self.tok_embeddings(x)
        for layer in self.layers:
            hidden = layer(hidden, positions)
        return self.output(self.norm(hidden))

    def pipeline_parts(self) -> list[Any]:
        """The modules in order. Positions go along: under sequence parallel a layer's input is a part of the sequence."""
        layers = [(f"layers.{i}", functools.partial(self._one_layer, i)) for i in range(len(self.layers))]
        return [("tok_embeddings", self._begin), *layers, ("norm", self._finish), "output"]

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.tok_embeddings(x), torch.arange(x.shape[1], device=x.device)

    def _one_layer(self, index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[index](hidden, positions), positions

    def _finish(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.norm(hidden)


class MoELlama(Llama):
    """The Llama with a layer of four experts, two a token, in the place of each feed-forward."""

    def __init__(self, seed: int = 0, *, dim: int = 16, hidden: int = 8, **options: Any) -> None:
        super().__init__(seed, dim=dim, hidden=hidden, **options)
        for layer in self.layers:
            layer.feed_forward = MoE(dim, hidden, num_experts=4, top_k=2)
        _initialise(self, seed, _spread)


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Turn pairs of features of x (samples, heads, length, head_dim) by angles that grow with `positions` (length,)."""
    half = x.shape[-1] // 2
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    # In steps of two: where half is the length of a part, arange(half) would be taken for positions under context parallel.
    speed = theta ** (-torch.arange(0, 2 * half, 2, device=x.device, dtype=exact) / (2 * half))
    angle = positions.to(exact)[:, None] * speed
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(exact).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


# -- GPT --------------------------------------------------------------------------------------------------------------------
class GPTAttention(nn.Module):
    """Causal attention; queries, keys and values by layers of their own. Keys have no bias: its true gradient is 0, and AdamW
    would make steps of what rounding leaves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q, k, v = (w(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for w in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).reshape(batch, length, -1))


class GPTBlock(nn.Module):
    """The block of GPT-2: LayerNorm, biases, GELU. It calls the layers of its feed-forward itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = GPTAttention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc": nn.Linear(dim, 4 * dim), "proj": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["proj"](F.gelu(self.mlp["fc"](self.ln_2(x))))


class GPT(Learner):
    """A GPT-2 with learned positions and a head that is tied to the embedding."""

    def __init__(self, seed: int = 0, *, dim: int = 16, layers: int = 2, heads: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, dim)
        self.wpe = nn.Embedding(TOKENS, dim)
        self.h = nn.ModuleList(GPTBlock(dim, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        _initialise(self, seed, _spread)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._embed(x)
        for block in self.h:
            hidden = block(hidden)
        return self.lm_head(self.ln_f(hidden))

    def _embed(self, x: Tensor) -> Tensor:
        return self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))

    def pipeline_parts(self) -> list[Any]:
        return [(("wte", "wpe"), self._embed), "h", "ln_f", "lm_head"]


# -- images -----------------------------------------------------------------------------------------------------------------
class ConvNet(Learner):
    """Two convolutions with GroupNorm or BatchNorm, and a class for each of four parts of the image. Before BatchNorm there is no
    bias: its true gradient is 0, and AdamW would make steps of what rounding leaves (3e-3 of it in twelve steps, of it alone)."""

    def __init__(self, seed: int = 0, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=not batch_norm)
        self.first_norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=not batch_norm)
        self.second_norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, CLASSES)
        _initialise(self, seed, _spread)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        x = F.avg_pool2d(F.relu(self.second_norm(self.second(x))), IMAGE // 2)  # (samples, channels, 2, 2)
        return self.head(x.flatten(2).transpose(1, 2))

    def pipeline_parts(self) -> list[Any]:
        def pool(x: Tensor) -> Tensor:
            return F.avg_pool2d(x, IMAGE // 2).flatten(2).transpose(1, 2)

        return ["first", "first_norm", F.relu, "second", "second_norm", F.relu, pool, "head"]


# -- what the suite takes ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Blueprint:
    """How to build a model of the suite, and its data.

    Attributes:
        build: of a seed.
        length: how many tokens a sample has.
        inputs: x of (samples, generator, dtype).
        classes: of each token.
        per_sample: a sample's loss depends on no other sample. Where it does (BatchNorm), a window is not one big batch.
    """

    build: Callable[[int], Learner]
    length: int
    inputs: Callable[[int, torch.Generator, torch.dtype], Tensor]
    classes: int
    per_sample: bool = True

    def batch(self, samples: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        x = self.inputs(samples, generator, dtype)
        return {"x": x, "y": torch.randint(0, self.classes, (samples, self.length), generator=generator)}


def _features(*shape: int) -> Callable[[int, torch.Generator, torch.dtype], Tensor]:
    return lambda samples, generator, dtype: torch.randn(samples, *shape, generator=generator, dtype=torch.float64).to(dtype)


def _tokens(samples: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, VOCABULARY, (samples, TOKENS), generator=generator)


MODELS: Mapping[str, Blueprint] = {
    "mlp": Blueprint(MLP, LENGTH, _features(LENGTH, FEATURES), CLASSES),
    "llama": Blueprint(Llama, TOKENS, _tokens, VOCABULARY),
    "llama-2": Blueprint(lambda seed: Llama(seed, layers=2), TOKENS, _tokens, VOCABULARY),
    "moe": Blueprint(lambda seed: MoELlama(seed, layers=2), TOKENS, _tokens, VOCABULARY),
    "gpt": Blueprint(GPT, TOKENS, _tokens, VOCABULARY),
    "conv": Blueprint(ConvNet, 4, _features(3, IMAGE, IMAGE), CLASSES),
    "conv-bn": Blueprint(lambda seed: ConvNet(seed, batch_norm=True), 4, _features(3, IMAGE, IMAGE), CLASSES, per_sample=False),
}
"""Name, as in `Case.model`, -> how to build it."""


def _spread(parameter: Tensor) -> tuple[float, float]:
    """(deviation, mean) of a parameter's values: weights by how many inputs they sum, norms around 1."""
    if parameter.dim() < 2:
        return 0.1, 1.0
    inputs = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()  # 3: experts, stacked
    return 0.8 / math.sqrt(inputs), 0.0


@torch.no_grad()
def _initialise(model: nn.Module, seed: int, spread: Callable[[Tensor], tuple[float, float]]) -> None:
    """Give every parameter random values of its own, also those that start as 0 or 1: a gradient that is lost is seen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        deviation, mean = spread(parameter)
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if not parameter.is_meta:
            parameter.copy_(drawn * deviation + mean)
