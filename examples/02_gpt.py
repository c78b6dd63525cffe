"""A byte-level GPT on real text, on any number of processes.

python examples/02_gpt.py --devices 2 --precision bf16-mixed

The model is plain PyTorch; `training_step` returns the sum over bytes with their count, so the mean is exact however the batch
is cut. One process, two, and two under torchrun give the same losses. Three things make it learn fast on a CPU: each byte comes
with the pair and the triple that it ends, attention falls with distance (Press et al. 2021, arXiv:2108.12409), and Muon.
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

LINES = 16384  # of the tables of pairs and triples
FADES = (0.5, 0.03)  # by how much a head's attention falls with each byte of distance: one looks near, one far


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a shortcut. x: (batch, length, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, len(FADES), width // len(FADES)).permute(2, 0, 3, 1, 4)
        # By hand: at this size the backward of F.scaled_dot_product_attention takes half of the step on a CPU.
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
        mixed = scores.softmax(-1).to(v.dtype) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(TrainingModule):
    """A GPT over the 256 byte values, its output tied to its embedding."""

    bias: Tensor

    def __init__(
        self, width: int = 128, layers: int = 3, length: int = 128, learning_rate: float = 3e-3, steps: int = 500
    ) -> None:
        super().__init__()
        self.length, self.learning_rate, self.steps = length, learning_rate, steps
        self.bytes, self.pairs, self.triples = nn.Embedding(256, width), nn.Embedding(LINES, 32), nn.Embedding(LINES, 32)
        self.mix = nn.Linear(64, width, bias=False)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for embedding in (self.bytes, self.pairs, self.triples):
            nn.init.normal_(embedding.weight, std=0.02)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        fading = -torch.tensor(FADES)[:, None, None] * distance
        self.register_buffer("bias", fading.masked_fill(distance < 0, -math.inf), persistent=False)  # (heads, length, length)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, length) -> logits (batch, length, 256)."""
        before, two_before = F.pad(ids, (1, 0))[:, :-1], F.pad(ids, (2, 0))[:, :-2]
        pairs = self.pairs((before * 128 + ids) % LINES)
        triples = self.triples((two_before * 1_000_003 + before * 31_337 + ids * 7_919) % LINES)
        x = self.bytes(ids) + self.mix(torch.cat([pairs, triples], -1))
        bias = self.bias[:, : ids.shape[1], : ids.shape[1]]
        for block in self.blocks:
            x = block(x, bias)
        return F.linear(self.norm(x), self.bytes.weight)

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
        """Muon for the matrices of the blocks, AdamW for all else; both warm up, then follow a cosine down to a tenth."""
        matrices = [p for p in self.blocks.parameters() if p.dim() == 2]
        others = [p for p in self.parameters() if all(p is not m for m in matrices)]
        muon = torch.optim.Muon(matrices, lr=0.02)
        adamw = torch.optim.AdamW(others, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        warm = max(1, min(50, self.steps // 10))

        def factor(step: int) -> float:
            return min((step + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

        def scheduled(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        return {"muon": scheduled(muon), "adamw": scheduled(adamw)}

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, temperature: float = 0.5, seed: int = 0) -> str:
        """Continue `prompt` by `count` bytes, drawn one after the other."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([list(prompt)])
        for _ in range(count):
            logits = self(ids[:, -self.length :])[0, -1].float()
            chosen = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            ids = torch.cat([ids, chosen[None]], 1)
        return bytes(ids[0].tolist()).decode("utf-8", "replace")


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
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--global-batch-size", type=int, default=16)
    options = parser.parse_args()
    trainer = Trainer(
        devices=options.devices,
        precision=options.precision,
        max_steps=options.max_steps,
        gradient_clip_val=1.0,
        val_check_interval=100,
        limit_val_batches=40,
        log_every_n_steps=10,
        name="gpt",
        seed=0,
    )
    model = GPT(steps=options.max_steps)
    train, held_out, note = loaders(model.length, batch_size=options.global_batch_size // options.devices, limit=2_000_000)
    trainer.fit(model, train, held_out)
    trainer.print(note)
    if trainer.accelerator.is_main_process:
        print(model.generate(b"def read_lines(path):\n", count=200))


if __name__ == "__main__":
    main()
