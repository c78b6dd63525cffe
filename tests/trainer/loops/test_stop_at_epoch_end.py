"""A stop that is asked for at an epoch's end ends the training there, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from drivetrain import Callback, EarlyStopping, Trainer, TrainingModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Flat(TrainingModule):
    """Its logged value never improves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).pow(2).mean()
        self.log("flat", torch.ones(()), on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class OneRankAsks(Callback):
    """The last rank alone asks, behind the second epoch."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.progress.epoch == 1 and trainer.world.rank == trainer.world.size - 1:
            trainer.stop("enough")


def trained(root: str, callback: str) -> tuple[int, int, int]:
    chosen = EarlyStopping("flat", patience=2, check_on_train_epoch_end=True) if callback == "early" else OneRankAsks()
    trainer = Trainer(
        max_epochs=6,
        root=root,
        callbacks=[chosen],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Flat(), DataLoader(TensorDataset(torch.randn(16, 2)), batch_size=4 // trainer.accelerator.num_processes))
    progress = trainer.progress
    trainer.accelerator.end_training()
    return progress.epoch, progress.global_step, progress.batch_in_epoch


def test_a_stop_at_an_epochs_end_trains_no_step_of_the_next(tmp_path: Path, ranks: Any) -> None:
    """Failed before: the request was only looked at behind the next epoch's first step, or a second later on several ranks."""
    for callback, epochs in (("early", 3), ("one rank", 2)):
        expected = (epochs, 4 * epochs, 0)
        assert trained(str(tmp_path / callback), callback) == expected
        assert ranks(2, trained, str(tmp_path / f"{callback} 2"), callback) == [expected, expected]
