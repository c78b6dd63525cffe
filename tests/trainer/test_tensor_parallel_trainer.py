"""The Trainer on tensor parallel: one process's losses, with validation, logging and a run that goes on from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import ParallelPlan, Trainer, TrainingModule
from drivetrain.strategies.contract_models import VOCABULARY, Llama
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Model(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.llama = Llama(layers=2).double()

    def loss_of(self, batch: Any) -> Tensor:
        return self.llama.step({"x": batch[0], "y": batch[1]}, False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(size: int) -> DataLoader[Any]:
    tokens = torch.randint(0, VOCABULARY, (32, 9), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=size)


def fit(root: str, options: dict[str, Any], size: int, max_steps: int, resume: Any) -> dict[str, list[float]]:
    """Train, and return what is logged by the end, over all runs of this folder."""
    trainer = Trainer(
        max_steps=max_steps, root=root, name="run", log_every_n_steps=1, val_check_interval=2, gradient_clip_val=0.5,
        enable_progress_bar=False, enable_model_summary=False, seed=1, **options)  # fmt: skip
    trainer.fit(Model(), loader(size), loader(size), resume=resume)
    lines = [
        json.loads(line)["metrics"]
        for path in sorted(Path(root).rglob("metrics.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {key: [line[key] for line in lines if key in line] for key in ("train_loss", "val_loss")}


CASES = [
    pytest.param(2, {"strategy": "tp:2+sp"}, 8, id="tp and sp"),
    pytest.param(4, {"plan": ParallelPlan(dp_shard=2, tp=2)}, 4, id="a plan of fsdp and tp"),
]


@pytest.mark.parametrize(("ranks_", "options", "size"), CASES)
def test_it_logs_and_resumes_like_one_process(ranks: Any, tmp_path: Path, ranks_: int, options: Any, size: int) -> None:
    """Two steps, and two more from the checkpoint: the losses, averages and validations of four steps on one process."""
    expected = ranks(1, fit, str(tmp_path / "one"), {"strategy": "single"}, 8, 4, None)[0]
    ranks(ranks_, fit, str(tmp_path / "many"), options, size, 2, None)
    found = ranks(ranks_, fit, str(tmp_path / "many"), options, size, 4, "auto")[0]
    assert len(expected["train_loss"]) == 4
    assert expected["val_loss"]
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-12), key
