"""Precisions and gradient compression through the Trainer and the Accelerator: steps, evaluation, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Trainer, TrainingModule
from drivetrain.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Digits(TrainingModule):
    """Its steps call a child: the model's own forward never runs, and cannot cast the inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(32, 8, generator=g), torch.randint(0, 3, (32,), generator=g))


@pytest.mark.parametrize("name", ["bf16-true", "fp16-true", "fp64"])
def test_true_precisions_cast_the_batches_of_every_step(name: str, tmp_path: Path) -> None:
    """The data set is fp32; a plain loop would cast it by hand, and so does this one."""
    dtype = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16, "fp64": torch.float64}[name]
    plain = Digits().to(dtype)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = []
    for start in range(0, 32, 8):
        x, y = data()[start : start + 8]
        optimizer.zero_grad()
        loss = F.cross_entropy(plain.net(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    module = Digits()
    trainer = Trainer(precision=name, strategy="single", max_epochs=1, root=tmp_path, enable_progress_bar=False, logger=False)
    trainer.fit(module, DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=8))
    assert module.losses == expected
    predicted = trainer.predict(module, DataLoader(data(), batch_size=8))
    assert predicted is not None
    assert predicted[0].dtype == dtype


def compressed(folder: str, start: int, stop: int, save_at: int | None) -> tuple[list[float], list[float]]:
    options = {"start_powerSGD_iter": 2, "min_compression_rate": 0.5}
    accelerator = Accelerator(strategy=DDPStrategy(comm_hook="power_sgd", comm_options=options), device="cpu")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    if start:
        accelerator.load_state(folder)
    x, y = data()[:]
    losses = []
    for step in range(start, stop):
        g = torch.Generator().manual_seed(100 * step + accelerator.world.rank)
        chosen = torch.randint(0, 32, (8,), generator=g)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        if step + 1 == save_at:
            accelerator.save_state(folder)
    weights = torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()
    accelerator.end_training()
    return losses, weights


def test_the_state_of_gradient_compression_is_in_the_checkpoint(ranks: Any, tmp_path: Path) -> None:
    """PowerSGD's error feedback is each rank's own; a run resumed without it would part from the other at once."""
    whole = ranks(2, compressed, str(tmp_path), 0, 12, 6)
    resumed = ranks(2, compressed, str(tmp_path), 6, 12, None)
    for (losses, weights), (losses_after, weights_after) in zip(whole, resumed, strict=True):
        assert losses[6:] == losses_after
        assert weights == weights_after
