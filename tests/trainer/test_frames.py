"""Promise 5: from Trainer.fit to training_step there are at most six frames of ours, which a user meets in every traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from drivetrain import Trainer, TrainingModule
from drivetrain.trainer import trainer as module_of_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(module_of_trainer.__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}/" for folder in ("trainer", "strategies", "callbacks"))
LIMIT = 6


def our_frames(frame: FrameType | None) -> list[str]:
    """The functions of ours on the stack above `frame`, the innermost last, from Trainer.fit on."""
    found: list[str] = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        if frame.f_code is Trainer.fit.__code__:
            return found[::-1]
        frame = frame.f_back
    raise AssertionError(f"Trainer.fit is not on the stack: {found}")


class Looking(TrainingModule):
    def __init__(self, *, manual: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.automatic_optimization = not manual
        self.found: list[list[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.found.append(our_frames(sys._getframe(1)))
        loss = self.layer(batch[0]).mean()
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
            return None
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def look(root: Path, precision: str, manual: bool) -> list[list[str]]:
    module = Looking(manual=manual)
    trainer = Trainer(
        root=root, max_epochs=1, accumulate_grad_batches=1 if manual else 2, precision=precision, log_every_n_steps=1
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=2))
    trainer.accelerator.end_training()
    return module.found


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("size", [1, 2])
def test_at_most_six_frames_of_ours_lead_to_the_step(size: int, precision: str, manual: bool, ranks: Any, tmp_path: Path) -> None:
    """In every step alike, with the default callbacks; single and ddp."""
    for found in ranks(size, look, tmp_path, precision, manual):
        assert len(found) == 4 // size
        for frames in found:
            assert frames[0] == "trainer.py:fit"
            assert len(frames) <= LIMIT, frames
