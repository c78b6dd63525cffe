"""What the start-up lines of a Trainer say of who holds what, held against numbers computed by hand."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """8 * 16 + 16 + 16 * 8 + 8 = 280 parameters: 1,120 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


class Net(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def compute_loss(self, output: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(output, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.compute_loss(self(batch[0]), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def said(strategy: str, root: Path) -> str:
    """All that this rank's run prints."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        Trainer(strategy=strategy, max_steps=1, root=root, enable_progress_bar=False, enable_checkpointing=False).fit(
            Net(), DataLoader(TensorDataset(x, x.flip(1)), batch_size=4)
        )
    return out.getvalue()


WHOLE = 2 * 1120
HELD = {
    ("fsdp", 2): WHOLE // 2,
    ("hsdp", 4): WHOLE // 2,
    # fc1 and its bias in two, fc2's columns in two, its bias (8 numbers) on both.
    ("tp", 2): 2 * (64 + 8 + 64 + 8) * 4,
    # And of that rows in two.
    ("fsdp:2+tp:2", 4): 2 * (32 + 4 + 32 + 4) * 4,
    ("pp", 2): 1120,
}


@pytest.mark.parametrize(
    ("strategy", "n"), [way if way == ("fsdp", 2) else pytest.param(*way, marks=pytest.mark.slow) for way in HELD]
)
def test_rank_0_says_what_a_rank_holds(strategy: str, n: int, ranks: Any, tmp_path: Path) -> None:
    first, *others = ranks(n, said, strategy, tmp_path)
    held = HELD[strategy, n]
    for what, size, whole in (("parameters", held, WHOLE), ("gradients", held, WHOLE), ("optimizer state", 2 * held, 2 * WHOLE)):
        assert re.search(rf"{what} held +{size:,} of {whole:,} bytes on this rank", first), first
    for text in others:
        assert "held" not in text
