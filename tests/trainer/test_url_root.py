"""Trainer(root=<URL>): the checkpoints lie behind the URL, and a resume finds them there; the run's own files stay here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Trainer, TrainingModule
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.errors import CheckpointError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("fsspec", reason="waits for fsspec")
_numbers = itertools.count()


class Line(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    samples = torch.randn(32, 2, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(samples), batch_size=4, shuffle=True)


def train(root: str | Path, steps: int, **options: Any) -> tuple[Trainer, Line]:
    module = Line()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "seed": 1}
    trainer = Trainer(root=root, max_steps=steps, device="cpu", devices=1, **quiet, **options)
    trainer.fit(module, data())
    return trainer, module


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return f"memory://bucket-{next(_numbers)}/all runs"


def test_a_run_goes_on_from_behind_a_url_as_if_it_had_not_stopped(url: str, tmp_path: Path) -> None:
    _, straight = train(tmp_path / "local", 11)
    first, _ = train(url, 5)
    assert [p.name for p in first.store.root.glob("step-*")] == ["step-00000005"]
    assert str(first.store.root).startswith("memory://")
    assert (tmp_path / "runs" / "default" / first.store.root.parent.name / "metrics.jsonl").exists()
    assert not list(tmp_path.rglob("step-*"))[1:]  # but for the straight run's
    second, module = train(url, 11, resume="auto")
    assert second.store.root == first.store.root
    assert torch.equal(module.layer.weight, straight.layer.weight)


def test_a_machine_that_has_none_of_the_runs_files_resumes_too(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = train(url, 3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    second, _ = train(url, 6, resume="auto")
    assert second.store.root == first.store.root
    assert [info.step for info in CheckpointStore(str(first.store.root)).list()] == [3, 6]  # that it was resumed from stays


def test_a_url_can_be_resumed_by_its_name(url: str) -> None:
    first, _ = train(url, 3)
    second, _ = train("runs", 5, resume=f"{first.store.root}/step-00000003")
    assert second.global_step == 5
    with pytest.raises(CheckpointError, match="There is no checkpoint memory://"):
        train("runs", 5, resume=f"{first.store.root}/step-00000009")
