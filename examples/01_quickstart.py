"""Quickstart: a digit classifier on scikit-learn's 1797 digits of 8 x 8 pixels.

python examples/01_quickstart.py [--devices 2]          two processes give the same losses: see runs/quickstart/*/metrics.jsonl
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class Digits(TrainingModule):
    """Two layers over 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def data(devices: int = 1) -> tuple[DataLoader, DataLoader]:
    """The same split every time. A DataLoader's batch_size is per device: 50 a step in all."""
    digits: Any = load_digits()
    pixels, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    train, held_out = random_split(TensorDataset(pixels, labels), [1500, 297], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=50 // devices, shuffle=True), DataLoader(held_out, batch_size=100)


@torch.no_grad()
def show(model: Digits, pixels: Tensor) -> str:
    """One digit as text, and what the model takes it for."""
    chances = model.net(pixels).softmax(0)
    rows = ["".join(2 * " .:-=+*#%"[int(8 * p)] for p in row) for row in pixels.view(8, 8)]
    return "\n".join(rows) + f"\nthe model: {int(chances.argmax())}, {100 * float(chances.max()):.0f} % sure"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=None)
    options = parser.parse_args()
    trainer = Trainer(max_epochs=10, max_steps=options.max_steps, devices=options.devices, name="quickstart", seed=0)
    train, held_out = data(options.devices)
    model = Digits()
    trainer.fit(model, train, held_out)
    trainer.print(show(model, held_out.dataset[5][0]))


if __name__ == "__main__":
    main()
