"""A byte-level GPT on real text, on any number of processes: python examples/02_gpt.py --devices 2 --precision bf16-mixed

The model is plain PyTorch; `training_step` returns the sum over tokens with their count, so the mean is exact however the batch
is cut. The same file runs on one process, on two, and under torchrun, and gives the same losses for the same global batch.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from text import standard_library, windows
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a shortcut. x: (batch, length, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(TrainingModule):
    """A GPT over the 256 byte values, its output tied to its embedding."""

    def __init__(
        self, width: int = 128, layers: int = 4, heads: int = 4, length: int = 128, learning_rate: float = 3e-3, steps: int = 500
    ) -> None:
        super().__init__()
        self.length, self.learning_rate, self.steps = length, learning_rate, steps
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, length) -> logits (batch, length, 256)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)

    def loss(self, batch: Any) -> tuple[Tensor, int]:
        """The summed cross entropy of the next byte, and how many bytes that is."""
        ids = batch[0].long()
        logits = self(ids[:, :-1]).flatten(0, 1).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"), ids[:, 1:].numel()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss, count = self.loss(batch)
        return {"loss": loss, "num_items": count}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, count = self.loss(batch)
        self.log("val_loss", loss / count, batch_size=count, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95), fused=True)
        warm = max(1, min(50, self.steps // 10))

        def factor(step: int) -> float:
            return min((step + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, temperature: float = 0.7, seed: int = 0) -> bytes:
        """Continue `prompt` by `count` bytes, drawn one after the other."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([list(prompt)])
        for _ in range(count):
            logits = self(ids[:, -self.length :])[0, -1].float()
            chosen = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            ids = torch.cat([ids, chosen[None]], 1)
        return bytes(ids[0].tolist())


def loaders(length: int, batch_size: int, limit: int | None = None) -> tuple[DataLoader, DataLoader, str]:
    """The training and validation loaders, and a line that says what the text is."""
    text, digest = standard_library(limit)
    train, held_out = windows(text, length)
    note = f"{len(text):,} bytes of the standard library's sources, sha256 {digest[:16]}"
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(held_out, batch_size=batch_size), note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--global-batch-size", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(steps=options.max_steps)
    train, held_out, note = loaders(model.length, batch_size=options.global_batch_size // options.devices, limit=2_000_000)
    trainer = Trainer(
        devices=options.devices,
        precision=options.precision,
        max_steps=options.max_steps,
        gradient_clip_val=1.0,
        val_check_interval=100,
        limit_val_batches=20,
        log_every_n_steps=10,
        name="gpt",
        seed=0,
    )
    trainer.fit(model, train, held_out)
    trainer.print(note)


if __name__ == "__main__":
    main()
