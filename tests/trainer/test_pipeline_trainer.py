"""Pipelines through the Trainer: the losses, logged values, validations and checkpoints are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}
WORDS, DIM = 11, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Words(TrainingModule):
    """Forward and compute_loss: the default training_step is made of them."""

    def __init__(self, *, summed: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Net().to(dtype)
        self.summed = summed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def compute_loss(self, output: Tensor, batch: Any) -> Any:
        _, y = batch
        right = (output.argmax(-1) == y).to(output.dtype)
        self.log("accuracy", right.mean(), on_step=True, on_epoch=True)
        self.log("right", right.sum(), reduce="sum", on_step=True)
        loss = F.cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum" if self.summed else "mean")
        return {"loss": loss, "num_items": (y != -1).sum()} if self.summed else loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        self.log("val_loss", loss)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        small = [p for p in self.parameters() if p.dim() < 2]
        large = [p for p in self.parameters() if p.dim() >= 2]
        optimizer = torch.optim.AdamW([{"params": large, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}], lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


def data(samples: int = 38, *, masked: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, WORDS, (samples, 5), generator=generator)
    y = torch.randint(0, WORDS, (samples, 5), generator=generator)
    if masked:
        y[torch.rand(y.shape, generator=generator) < 0.4] = -1
    return TensorDataset(x, y)


def strategy_of(word: Any) -> Any:
    return word() if callable(word) else word


def fit(
    root: Path,
    strategy: Any,
    *,
    summed: bool = False,
    resume: Any = None,
    make: Callable[[], Words] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train 38 samples in global batches of 8 for two epochs; return what was logged, and the predictions at the end."""
    world = World.start("cpu", need_group=True)
    try:
        trainer = Trainer(
            **{"max_epochs": 2, "global_batch_size": 8, "gradient_clip_val": 0.5, "seed": 1, **QUIET, **options},
            strategy=strategy_of(strategy),
            root=root,
            name="run",
            devices=1 if world.size == 1 else "auto",
        )
        shards = 1 if world.size == 1 or strategy != "fsdp:2+pp:2" else 2
        train = DataLoader(data(masked=summed), batch_size=options.pop("batch_size", 8) // shards, shuffle=True)
        module = (make or (lambda: Words(summed=summed)))()
        trainer.fit(module, train, DataLoader(data(13), batch_size=4), resume=resume)
        tokens = [p.tolist() for p in trainer.predict(module, DataLoader(data(6), batch_size=4))]
        rows = read_metrics(trainer.root) if world.is_main else []
        logged: dict[str, list[float]] = {}
        for row in rows:
            for key, value in row["metrics"].items():
                if not key.startswith(("time", "samples", "seconds")):
                    logged.setdefault(key, []).append(value)
        return {"logged": logged, "predicted": tokens, "metrics": dict(trainer.metrics)}
    finally:
        world.stop()


def close(found: dict[str, list[float]], truth: dict[str, list[float]], rel: float = 1e-11) -> None:
    for name in ("loss", "accuracy_step", "accuracy_epoch", "right", "val_loss", "grad_norm"):
        assert name in truth
        assert found[name] == pytest.approx(truth[name], rel=rel), name


@pytest.mark.parametrize(
    ("strategy", "size"),
    [("pp:2", 2), ("fsdp:2+pp:2", 4)],
)
def test_losses_logged_values_and_validations_are_those_of_one_process(
    strategy: str, size: int, ranks: Any, tmp_path: Path
) -> None:
    """38 samples in batches of 8: the last batch of an epoch has fewer samples than the pipeline chunks, a rank none at all."""
    (truth,) = ranks(1, fit, tmp_path / "one", "single")
    found = ranks(size, fit, tmp_path / "many", strategy)
    close(found[0]["logged"], truth["logged"])
    for rank in found:  # what schedulers and early stopping look at
        assert rank["metrics"]["val_loss"] == pytest.approx(truth["metrics"]["val_loss"], rel=1e-11)
    predicted = [t for rank in ([0] if size == 2 else [0, 1]) for batch in found[rank]["predicted"] for t in batch]
    assert sorted(predicted) == sorted(t for batch in truth["predicted"] for t in batch)
    assert found[0]["predicted"] == found[size // 2]["predicted"]  # all ranks of a pipeline have them
