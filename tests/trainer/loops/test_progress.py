"""The counters count what they say, on any number of ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from drivetrain import Trainer, TrainingModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, EPOCHS = 21, 2


class Sums(TrainingModule):
    """Its loss is a sum over three items a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.net(batch[0]).sum(), "num_items": 3 * len(batch[0])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def counters(root: str, batch_size: int) -> dict[str, Any]:
    trainer = Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        root=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Sums(), DataLoader(TensorDataset(torch.randn(SAMPLES, 4)), batch_size=batch_size))
    found = asdict(trainer.progress)
    trainer.accelerator.end_training()
    return found


def test_the_counters_are_those_of_a_run_by_hand(tmp_path: Path, ranks: Any) -> None:
    """21 samples in micro-batches of 4 over all ranks: 6 an epoch, 3 windows; 3 items a sample."""
    alone = counters(str(tmp_path / "one"), 4)
    assert alone["global_step"] == 3 * EPOCHS
    assert alone["batches"] == 6 * EPOCHS
    assert alone["samples"] == SAMPLES * EPOCHS
    assert alone["tokens"] == 3 * SAMPLES * EPOCHS
    assert alone["epoch"] == EPOCHS
    for found in ranks(2, counters, str(tmp_path / "two"), 2):
        assert {k: v for k, v in found.items() if k != "seconds"} == {k: v for k, v in alone.items() if k != "seconds"}
