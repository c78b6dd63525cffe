"""strategy="auto" on several processes: ddp where the model fits each of them, fsdp where it does not, with the reason said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain import Trainer, TrainingModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(10, 10)  # 110 parameters: 440 bytes, with gradient, bucket and AdamW's state 2,200

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return (self.net(x) - x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def chosen(free: int, root: Any) -> tuple[str, str, float]:
    from drivetrain.trainer import auto_strategy

    auto_strategy.get_max_memory = lambda: {"cpu": free}  # pyright: ignore[reportAttributeAccessIssue]
    trainer = Trainer(max_steps=2, root=root, seed=0, enable_progress_bar=False, enable_model_summary=False)
    module = Regression()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 10)), batch_size=2))
    weight: Any = module.net.weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return trainer.strategy.name, trainer.accelerator.strategy_reason, whole.sum().item()


def test_a_model_that_fits_each_process_is_copied_and_one_that_does_not_is_cut_up(ranks: Any, tmp_path: Any) -> None:
    fits = ranks(2, chosen, 2 * 2200, tmp_path)[0]
    too_big = ranks(2, chosen, 2 * 2199, tmp_path)[0]
    assert fits[:2] == (
        "ddp",
        "chosen: 2 processes, 2.1 KiB of parameters, gradients and AdamW's state fit the 2.1 KiB of each",
    )
    assert too_big[:2] == (
        "fsdp",
        "chosen: 2.1 KiB of parameters, gradients and AdamW's state do not fit the 2.1 KiB that each of 2 processes has; "
        "a piece on each",
    )
    assert too_big[2] == pytest.approx(fits[2], rel=1e-6)
