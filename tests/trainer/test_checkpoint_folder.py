"""Checkpoint(dirpath=...): the checkpoints lie in a folder of the user's choice, or behind a URL, and are gone on from there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Trainer, TrainingModule
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.errors import CheckpointError, ConfigError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

_numbers = itertools.count()


class Line(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("weight", self.layer.weight.detach().abs().sum())
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).pow(2).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    samples = torch.randn(32, 2, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(samples), batch_size=4, shuffle=True)


def train(folder: Any, steps: int, saving: dict[str, Any] | None = None, **options: Any) -> tuple[Trainer, Line]:
    module = Line()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "seed": 1, "log_every_n_steps": 1}
    saves = [Checkpoint("2step", dirpath=folder, save_top_k=2, **(saving or {}))]
    trainer = Trainer(max_steps=steps, device="cpu", callbacks=saves, **quiet, **options)
    trainer.fit(module, data())
    return trainer, module


def steps_in(folder: Any) -> list[int]:
    return [info.step for info in CheckpointStore(folder).list()]


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    if request.param == "memory":
        pytest.importorskip("fsspec", reason="waits for fsspec")
        return f"memory://bucket-{next(_numbers)}/mine here"
    return "mine here" if request.param == "local" else f"file://{tmp_path}/mine%20here"


def test_checkpoints_lie_in_the_folder_and_a_run_goes_on_from_there_bit_for_bit(folder: Any, tmp_path: Path) -> None:
    """All of the newest two, which pruning leaves; metrics of one run in one file."""
    _, straight = train(tmp_path / "straight", 11, name="straight")
    first, _ = train(folder, 5)
    assert steps_in(folder) == [4, 5]
    assert not list((tmp_path / "runs").rglob("default/*/checkpoints"))
    second, module = train(folder, 11, resume="auto")
    assert torch.equal(module.layer.weight, straight.layer.weight)
    assert second.root == first.root
    lines = (second.root / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len({line.partition('"step"')[2].split(",")[0] for line in lines}) == 11
    assert steps_in(folder) == [5, 10, 11]  # that it was resumed from stays
    assert CheckpointStore(folder).verify(11) == []


def test_a_machine_without_the_runs_files_goes_on_too(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(folder, 4)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if folder == "mine here":
        folder = tmp_path / folder
    monkeypatch.chdir(elsewhere)
    trainer, _ = train(folder, 6, resume="auto")
    assert trainer.global_step == 6
    assert steps_in(folder) == [4, 6]
    assert (trainer.root / "metrics.jsonl").is_relative_to(elsewhere)


def test_a_new_run_among_the_checkpoints_of_another_is_refused(folder: Any) -> None:
    """It would replace those of the same steps."""
    train(folder, 4)
    with pytest.raises(
        ConfigError, match=r"holds checkpoints of an earlier run already \(step-00000002 to step-00000004\), which a"
    ):
        train(folder, 4)
    assert steps_in(folder) == [2, 4]


def test_auto_without_a_checkpoint_there_starts_anew_and_says_so(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(folder, 2, resume="auto")
    assert "mine here: starting anew" in capsys.readouterr().out
    assert steps_in(folder) == [2]


def test_best_and_last_and_a_checkpoint_by_name_are_those_of_the_folder(folder: Any) -> None:
    trainer, _ = train(folder, 6, {"monitor": "weight"})
    best = trainer.callbacks[0].best_model_path  # type: ignore[attr-defined]
    trainer.validate(dataloaders=data(), ckpt_path="best")
    assert trainer.callbacks[0].best_model_path == best  # type: ignore[attr-defined]
    assert train(folder, 7, resume="last")[0].global_step == 7
    assert train(folder, 8, resume=f"{CheckpointStore(folder).root}/step-00000007")[0].global_step == 8
    assert train(folder, 9, resume=str(CheckpointStore(folder).root))[0].global_step == 9
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        train(folder, 9, resume=f"{CheckpointStore(folder).root}/step-00000099")


def test_a_damaged_checkpoint_there_is_passed_over(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(folder, 4)
    root: Any = CheckpointStore(folder).root
    shard = next(path for path in (root / "step-00000004").iterdir() if path.name.endswith(".safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    train(folder, 6, resume="auto")
    assert "step-00000004 was passed over" in capsys.readouterr().out


def test_two_folders_for_one_run_are_refused(tmp_path: Path) -> None:
    saves = [Checkpoint(dirpath=tmp_path / "a"), Checkpoint(dirpath=tmp_path / "b", monitor="weight")]
    with pytest.raises(ConfigError, match=r"The Checkpoint callbacks name 2 folders: .*a, .*b. A run has one"):
        Trainer(max_steps=1, device="cpu", devices=1, root=tmp_path, callbacks=saves).fit(Line(), data())


@pytest.mark.parametrize("options", [{"dirpath": 3}, {"monitor": 3}])
def test_what_is_no_name_is_refused(options: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"Checkpoint\((dirpath|monitor)=3\): expected (a folder or a URL|the name of a logged metric)"
    ):
        Checkpoint(**options)


@pytest.mark.parametrize("resume", [True, 5])
def test_what_is_no_way_to_resume_is_refused(resume: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"resume={resume}: expected None, 'auto', 'last', 'best', or the path"):
        train(tmp_path / "mine", 2, resume=resume, root=tmp_path)


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match=r"File exists: .*mine'. Pass root= or dirpath= another folder"):
        train(tmp_path / "mine", 2, root=tmp_path)


def test_a_fast_dev_run_saves_nothing_even_if_a_checkpoint_was_asked_for(tmp_path: Path) -> None:
    train(tmp_path / "mine", -1, fast_dev_run=2, root=tmp_path / "runs")
    train(None, -1, fast_dev_run=2, root=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def on_two_ranks(folder: str, root: str, steps: int) -> int:
    trainer, _ = train(folder, steps, strategy="ddp", root=root, resume="auto")
    return trainer.global_step


def test_two_ranks_share_the_folder(tmp_path: Path, ranks: Any) -> None:
    folder = f"file://{tmp_path}/mine"
    assert ranks(2, on_two_ranks, folder, str(tmp_path), 2) == [2, 2]
    assert ranks(2, on_two_ranks, folder, str(tmp_path), 3) == [3, 3]
    assert steps_in(folder) == [2, 3]
