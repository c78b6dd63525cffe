"""A small mixture of experts, its experts spread over the processes (expert parallel).

python examples/11_moe.py --devices 2 --strategy fsdp:2+ep:2

The model is plain PyTorch with `MoE` in the place of its feed-forwards. It keeps its experts busy itself, in one of two ways:
--balance bias moves a bias on the router's choice after each step (Wang et al. 2024, arXiv:2408.15664), --balance loss adds the
auxiliary loss of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961). The log shows the share of the busiest expert.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import MoE, Trainer, TrainingModule, balance_loss
from text import standard_library, windows
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Block(nn.Module):
    """Causal attention and a layer of experts, each behind a norm and beside a shortcut. x: (batch, length, width)."""

    def __init__(self, width: int, heads: int, experts: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.moe = MoE(width, width, num_experts=experts, top_k=2, keep_probabilities=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norm_2(x))


class Model(TrainingModule):
    """A language model over bytes."""

    def __init__(self, balance: str, width: int = 64, layers: int = 2, experts: int = 8, length: int = 64) -> None:
        super().__init__()
        self.balance, self.length = balance, length
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, 4, experts) for _ in range(layers)])
        self.head = nn.Linear(width, 256, bias=False)

    @property
    def layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (text,) = batch
        x = self.bytes(text[:, :-1].long()) + self.places(torch.arange(self.length, device=text.device))
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten().long())
        self.log("busiest", torch.stack([m.counts.max() / m.counts.sum() for m in self.layers]).mean())
        if self.balance == "loss":
            for layer in self.layers:
                assert layer.probabilities is not None
                loss = loss + 0.01 * balance_loss(layer.probabilities, layer.counts)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step: experts that were sent more than their share become a little less attractive, on all ranks alike."""
        if self.balance == "bias":
            for layer in self.layers:
                counts = self.trainer.world.all_reduce(layer.counts.float())
                layer.selection_bias += 0.01 * (counts.mean() - counts).sign()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--balance", choices=["bias", "loss", "none"], default="bias")
    parser.add_argument("--max-steps", type=int, default=200)
    options = parser.parse_args()
    model = Model(options.balance)
    data = DataLoader(windows(standard_library()[0], model.length)[0], batch_size=16, shuffle=True)
    trainer = Trainer(
        strategy=options.strategy, devices=options.devices, max_steps=options.max_steps, log_every_n_steps=20, seed=0
    )
    trainer.fit(model, data)


if __name__ == "__main__":
    main()
