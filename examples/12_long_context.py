"""Long sequences, shared by the processes (context parallel): each computes its tokens, attention looks at all of them.

python examples/12_long_context.py --devices 2 --strategy cp:2 --method ring

The model's code is that of one process: its attention is torch's, its positions are torch.arange. Labels are shifted in the data
set, since a part of a sequence has no neighbour at its end. The losses are those of one process, whatever the method.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import ContextParallel, Trainer, TrainingModule
from drivetrain.strategies.base import make_strategy
from text import standard_library, windows
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Pairs(Dataset[dict[str, Tensor]]):
    """Bytes and, for each, the next."""

    def __init__(self, texts: Dataset[Any]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (text,) = self.texts[index]
        return {"bytes": text[:-1].long(), "next": text[1:].long()}


class Block(nn.Module):
    """Causal attention with rotary positions and a feed-forward. x: (batch, length, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(rotate(q, positions), rotate(k, positions), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn pairs of features by angles that grow with the position. x: (batch, heads, length, features)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).to(x.dtype)


class Model(TrainingModule):
    """A language model over bytes."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(layers)])
        self.head = nn.Linear(width, 256, bias=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x = self.embed(batch["bytes"])
        for block in self.blocks:
            x = block(x)
        labels = batch["next"].flatten()
        loss = F.cross_entropy(self.head(x).flatten(0, 1), labels, reduction="sum")
        return {"loss": loss, "num_items": (labels >= 0).sum()}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--method", choices=["all-gather", "ring", "ulysses"], default="all-gather")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-steps", type=int, default=100)
    options = parser.parse_args()
    strategy: Any = options.strategy
    if "cp" in options.strategy:
        strategy = make_strategy(options.strategy, context_parallel=ContextParallel(method=options.method))
    data = DataLoader(Pairs(windows(standard_library()[0], options.length)[0]), batch_size=4, shuffle=True)
    trainer = Trainer(strategy=strategy, devices=options.devices, max_steps=options.max_steps, log_every_n_steps=10, seed=0)
    trainer.fit(Model(), data)


if __name__ == "__main__":
    main()
