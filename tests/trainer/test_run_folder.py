"""Which folder a run writes to, and which checkpoint a resume means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from drivetrain import Trainer, TrainingModule
from drivetrain.strategies.checkpoint.store import CheckpointStore
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.strategies.world import World
from drivetrain.trainer.run_folder import open_run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WORLD = World.single()
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "seed": 0}


def save(run: Path, *steps: int, best: int | None = None) -> None:
    """Put checkpoints into a run's folder, and what a run that trained leaves there."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    for step in steps:
        CheckpointStore(run / "checkpoints", WORLD).save(
            step, {"model/model/w": torch.ones(1)}, {}, meta={"kind": "run", "is_best": step == best}
        )


def damage(run: Path, step: int) -> None:
    (file,) = (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def opened(root: Path, resume: str | Path | None, name: str | None = None, **options: Any) -> Any:
    return open_run(root, name, resume, WORLD, **options)


def test_a_new_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Also when two begin in the same second."""
    first, second = opened(tmp_path, None), opened(tmp_path, None)
    assert first.path != second.path
    assert first.path.parent == tmp_path / "default"
    assert first.checkpoints.is_dir()
    assert first.resume_from is None


def test_a_run_that_writes_nothing_makes_no_folder(tmp_path: Path) -> None:
    opened(tmp_path / "runs", None, create=False)
    assert not (tmp_path / "runs").exists()


def test_a_new_run_says_that_an_unfinished_one_lies_there(tmp_path: Path) -> None:
    save(tmp_path / "default" / "20260101-000000", 3)
    (note,) = opened(tmp_path, None).notes
    assert "20260101-000000" in note
    assert "resume='auto'" in note


def test_auto_goes_on_in_the_newest_run(tmp_path: Path) -> None:
    base = tmp_path / "mine"
    for name, step in (("20260101-000000", 9), ("20260102-000000", 2), ("20260102-000000-2", 4), ("20260102-000000-10", 5)):
        save(base / name, step)
    found = opened(tmp_path, "auto", "mine")
    assert found.id == "20260102-000000-10"
    assert found.resume_from == found.path / "checkpoints" / "step-00000005"


def test_auto_without_any_checkpoint_starts_anew_and_says_so(tmp_path: Path) -> None:
    found = opened(tmp_path, "auto")
    assert found.resume_from is None
    assert "starting anew" in found.notes[0]


def test_auto_passes_over_a_damaged_checkpoint_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "default" / "20260101-000000"
    save(run, 2, 4)
    damage(run, 4)
    found = opened(tmp_path, "auto")
    assert found.resume_from is not None
    assert found.resume_from.name == "step-00000002"
    assert any("step-00000004" in note for note in found.notes)


def test_auto_with_nothing_but_damage_is_refused(tmp_path: Path) -> None:
    """Exit code 3: starting anew would throw the run away without a word."""
    run = tmp_path / "default" / "20260101-000000"
    save(run, 2)
    damage(run, 2)
    with pytest.raises(CheckpointError) as raised:
        opened(tmp_path, "auto")
    assert "step-00000002" in str(raised.value)
    assert raised.value.exit_code == 3


def test_last_and_best_name_checkpoints_of_the_newest_run(tmp_path: Path) -> None:
    save(tmp_path / "default" / "20260101-000000", 2, 4, 6, best=4)
    for word, step in (("last", 6), ("best", 4)):
        found = opened(tmp_path, word)
        assert found.resume_from is not None
        assert found.resume_from.name == f"step-{step:08d}"
        assert found.id == "20260101-000000"
    save(tmp_path / "default" / "20260102-000000", 2)
    with pytest.raises(CheckpointError, match=r"was saved as the best.*Checkpoint\(monitor"):
        opened(tmp_path, "best")
    for word in ("last", "best"):
        with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*resume=None"):
            opened(tmp_path / "empty", word)


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    """A checkpoint, a run, or a folder of checkpoints. In the same run it goes on there; elsewhere a new run starts from it."""
    run = tmp_path / "default" / "20260101-000000"
    save(run, 2, 4)
    found = opened(tmp_path, run / "checkpoints" / "step-00000002")
    assert (found.path, found.resume_from) == (run, run / "checkpoints" / "step-00000002")
    found = opened(tmp_path, run)
    assert (found.path, found.resume_from) == (run, run / "checkpoints" / "step-00000004")
    for given in (run / "checkpoints" / "step-00000002", run / "checkpoints"):
        found = opened(tmp_path, given, "other")
        assert found.path.parent == tmp_path / "other"
        assert found.resume_from is not None
        assert found.resume_from.parent == run / "checkpoints"


def test_a_path_that_is_none_says_what_lies_near(tmp_path: Path) -> None:
    run = tmp_path / "default" / "20260101-000000"
    save(run, 2, 4)
    with pytest.raises(CheckpointError, match=r"step-00000003.*In that folder: step-00000002, step-00000004"):
        opened(tmp_path, run / "checkpoints" / "step-00000003")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is a file.*pickled are not read"):
        opened(tmp_path, pickled)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        opened(tmp_path, tmp_path / "default" / "20260101-000000" / "nothing")


@pytest.mark.parametrize("name", ["../up", "/tmp/elsewhere", "a\nb", "..", "."])
def test_a_name_that_is_no_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"A run's name is a plain folder name.*root="):
        opened(tmp_path, None, name)


@pytest.mark.parametrize("name", ["größe 🚆", "with space", "group/one"])
def test_unusual_names_work(name: str, tmp_path: Path) -> None:
    assert opened(tmp_path, None, name).path.parent == tmp_path / name


@pytest.mark.skipif(os.geteuid() == 0, reason="waits for a user who is not root: root may write everywhere")
def test_a_root_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="The run folder cannot be made"):
        opened(tmp_path, None)


def test_a_root_that_is_a_file_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"The run folder cannot be made.*Pass root="):
        opened(tmp_path / "runs", None)


class Plain(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root: Path, **options: Any) -> Trainer:
    trainer = Trainer(**(QUIET | {"root": root, "log_every_n_steps": 1} | options))
    trainer.fit(Plain(), DataLoader(TensorDataset(torch.ones(6, 1)), batch_size=2))
    return trainer


def test_a_run_leaves_its_configuration_its_values_and_a_checkpoint(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=2, name="mine", gradient_clip_val=0.5)
    root = trainer.root
    assert root.parent == tmp_path / "mine"
    config = yaml.safe_load((root / "config.yaml").read_text())
    assert (config["max_epochs"], config["gradient_clip_val"], config["strategy"]) == (2, 0.5, "auto")
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in (root / "checkpoints").glob("step-*")][-1:] == ["step-00000006"]
    assert (root / "finished").exists()


def test_a_finished_run_is_no_reason_to_speak(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1)
    trainer = fit(tmp_path, max_epochs=1)
    assert trainer.run_folder is not None
    assert trainer.run_folder.notes == []


def test_relative_roots_survive_a_change_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Moving(Plain):
        def on_train_start(self) -> None:
            (tmp_path / "elsewhere").mkdir()
            os.chdir(tmp_path / "elsewhere")

    trainer = Trainer(**QUIET, root="runs", max_epochs=1)
    trainer.fit(Moving(), DataLoader(TensorDataset(torch.ones(4, 1))))
    assert trainer.root.parent == tmp_path / "runs" / "default"
    assert list((trainer.root / "checkpoints").glob("step-*"))
    assert not list((tmp_path / "elsewhere").iterdir())
