"""Ranks whose own loaders have different numbers of batches train and evaluate to one end, and the numbers are those of one loop.

Rank 0 has 2 batches, rank 1 has 4 (the last of 1 sample). "join": rank 0 takes part in the last two with a batch that counts for
nothing; "drop": all stop when the first has no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Trainer, TrainingModule
from drivetrain.callbacks.base import Callback
from drivetrain.trainer.data.config import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = ([3, 3], [3, 3, 3, 1])


def data(rank: int) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(rank)
    return [(torch.randn(n, 4, generator=made, dtype=torch.float64), torch.randn(n, 1, generator=made, dtype=torch.float64))
            for n in SIZES[rank]]  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


class Module(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.found.append(float(trainer.metrics["val_loss"]))


def fitted(root: Path, strategy: str, uneven: str, accumulate: int) -> dict[str, Any]:
    losses, module = Losses(), Module()
    trainer = Trainer(
        max_epochs=2,
        strategy=strategy,
        root=root,
        callbacks=[losses],
        accumulate_grad_batches=accumulate,
        dataloader_config=DataLoaderConfiguration(uneven=uneven, already_sharded=True),
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    own = trainer.accelerator.process_index
    trainer.fit(module, data(own), data(own))
    weights = trainer.accelerator.get_state_dict(module)
    return {"steps": trainer.progress.global_step, "losses": losses.found, "weights": {n: w.tolist() for n, w in weights.items()}}


def by_hand(uneven: str, accumulate: int) -> dict[str, Any]:
    """One loop over what both ranks have: each step has the batches of that number of all ranks, a mean over their samples."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = [data(0), data(1)]
    last = max(map(len, own)) if uneven == "join" else min(map(len, own))
    rows = [[batches[i] for batches in own if i < len(batches)] for i in range(last)]
    steps, losses = 0, []
    for _ in range(2):
        for first in range(0, last, accumulate):
            window = [batch for row in rows[first : first + accumulate] for batch in row]
            optimizer.zero_grad()
            F.mse_loss(model(torch.cat([x for x, _ in window])), torch.cat([y for _, y in window])).backward()
            optimizer.step()
            steps += 1
        every = [batch for row in rows for batch in row]
        with torch.no_grad():
            losses.append(F.mse_loss(model(torch.cat([x for x, _ in every])), torch.cat([y for _, y in every])).item())
    return {"steps": steps, "losses": losses, "weights": {f"net.{n}": w.tolist() for n, w in model.state_dict().items()}}


@pytest.mark.parametrize(("strategy", "accumulate"), [("ddp", 1), ("ddp", 3), ("fsdp", 1)])
@pytest.mark.parametrize("uneven", ["join", "drop"])
def test_ranks_with_uneven_data_train_and_evaluate_like_one_loop(
    uneven: str, strategy: str, accumulate: int, ranks: Any, tmp_path: Path
) -> None:
    expected = by_hand(uneven, accumulate)
    results = ranks(2, fitted, tmp_path, strategy, uneven, accumulate)
    for found in results:
        assert found["steps"] == expected["steps"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    for name, value in expected["weights"].items():
        found = torch.tensor(results[0]["weights"][name], dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), rtol=1e-10, atol=1e-10)
