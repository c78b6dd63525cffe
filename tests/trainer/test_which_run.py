"""Which run a resume means, what is said about it, and what a run leaves in its folder."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.strategies.checkpoint import store
from drivetrain.strategies.errors import CheckpointError
from drivetrain.strategies.world import World
from drivetrain.trainer import run_folder
from drivetrain.trainer.run_folder import RunFolder, open_run
from resume_jobs import Job, Ledger, Module, Started, loaders, logged_by, newest_run, steps_saved, train, trainer_for

SHORT = Job(epochs=1, samples=12, validate=False)
WORLD = World.single()


def opened(root: Path, resume: Any, **options: Any) -> RunFolder:
    return open_run(root, "job", resume, WORLD, **options)


def damage(checkpoint: Path) -> None:
    """Flip one bit of the weights."""
    file = next(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def checkpoints(folder: str | Path) -> list[Path]:
    return sorted((Path(folder) / "checkpoints").glob("step-*"))


def unfinished(root: Path) -> Path:
    """A run of three steps, each saved, that did not come to its end."""
    run = Path(train(SHORT, root, callbacks=[Checkpoint("1step", save_top_k=-1)]).folder)
    (run / "finished").unlink()
    return run


def test_a_new_run_says_that_an_unfinished_one_lies_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = unfinished(tmp_path)
    result = train(SHORT, tmp_path)
    assert Path(result.folder) != run
    assert f"an unfinished run lies in {run}" in capsys.readouterr().out
    train(SHORT, tmp_path)
    assert "unfinished" not in capsys.readouterr().out


def test_auto_with_nothing_there_starts_anew_and_says_so(tmp_path: Path) -> None:
    run = opened(tmp_path, "auto")
    assert run.resume_from is None
    assert "no checkpoint" in run.notes[0]


def test_auto_means_the_newest_run_also_when_it_has_no_checkpoint_yet(tmp_path: Path) -> None:
    """A run that was killed before its first save must not become the one before it. One that never began does not count."""
    unfinished(tmp_path)
    newer = opened(tmp_path, None).path
    assert opened(tmp_path, "auto").path not in (newer, None)
    assert opened(tmp_path, "auto").resume_from is not None
    (newer / "config.yaml").touch()
    assert opened(tmp_path, "auto").resume_from is None


def test_auto_passes_over_a_damaged_checkpoint_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = unfinished(tmp_path)
    damage(checkpoints(run)[-1])
    result = train(SHORT, tmp_path, resume="auto")
    assert sorted(result.losses) == [3]
    said = " ".join(capsys.readouterr().out.split())
    assert "step 2" in said
    assert "step-00000003.2 was passed over" in said  # saved after its step, and again at its epoch's end


def test_auto_with_only_damaged_checkpoints_ends_with_code_3(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    for checkpoint in checkpoints(run):
        damage(checkpoint)
    started = Started({"root": str(tmp_path)})
    assert started.wait() == 3
    assert "None of the 3 checkpoints" in started.output()


def test_a_damaged_checkpoint_that_was_named_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    damage(checkpoints(run)[1])
    module = Module(SHORT, Ledger(None))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged.*crc32.*step-00000001, step-00000003"):
        trainer_for(SHORT, tmp_path).fit(module, *loaders(SHORT), resume=checkpoints(run)[1])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_path_to_nothing_names_what_is_near(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000009.*step-00000002, step-00000003"):
        opened(tmp_path, run / "checkpoints" / "step-00000009")
    with pytest.raises(CheckpointError, match="is a file"):
        opened(tmp_path, run / "config.yaml")


def test_best_and_last_and_a_path_are_what_they_say(tmp_path: Path) -> None:
    job = Job(epochs=3, samples=12)
    result = train(job, tmp_path, callbacks=[Checkpoint(monitor="val_loss", mode="max", save_top_k=2)])
    scores = {step: value for name, step, value in (e for e in result.events if e[0] == "validated")}
    best, last = opened(tmp_path, "best").resume_from, opened(tmp_path, "last").resume_from
    assert best is not None
    assert last is not None
    assert int(best.name[5:13]) == max(scores, key=lambda step: scores[step])
    assert int(last.name[5:13]) == 9
    assert opened(tmp_path, best).path == best.parent.parent


def test_a_checkpoint_given_to_validate_is_the_one_that_is_evaluated(tmp_path: Path) -> None:
    """A fresh Trainer and module; "best" and "last" mean the run of that name. No folder is made for it."""
    job = Job(epochs=2, samples=12)
    result = train(job, tmp_path, callbacks=[Checkpoint("1ep", save_top_k=-1)])
    values = {step: value for name, step, value in (e for e in result.events if e[0] == "validated")}
    for ckpt_path, step in ((checkpoints(result.folder)[0], 3), ("last", 6)):
        found = trainer_for(job, tmp_path).validate(Module(job, Ledger(None)), loaders(job)[1], ckpt_path=ckpt_path)
        assert found[0]["val_loss"] == values[step]
    assert len(list((tmp_path / "job").iterdir())) == 1


def test_an_older_checkpoint_of_a_run_goes_on_in_its_folder_with_the_metrics_cut_back(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    lines = logged_by(tmp_path)
    result = train(SHORT, tmp_path, resume=checkpoints(run)[0])
    assert Path(result.folder) == run
    assert logged_by(tmp_path) == lines


def test_a_checkpoint_of_another_run_starts_a_new_one_with_its_own_metrics(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "a")
    result = train(SHORT, tmp_path / "b", resume=checkpoints(run)[1])
    assert Path(result.folder).parent == tmp_path / "b" / "job"
    assert [step for step, _, metrics in logged_by(tmp_path / "b") if "train_loss_step" in metrics] == [3]
    assert len(logged_by(tmp_path / "a")) >= 3


def test_a_relative_root_and_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(SHORT, Path("runs"), max_steps=1)
    train(SHORT, Path("runs"), resume="auto")
    steps = [step for step, _, metrics in logged_by(tmp_path / "runs") if "train_loss_step" in metrics]
    assert steps == [1, 2, 3]


def test_runs_that_begin_in_the_same_second_have_their_own_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(12) as pool:
        runs = list(pool.map(lambda _: opened(tmp_path, None), range(12)))
    assert len({run.path for run in runs}) == 12
    for run in runs:
        (run.path / "config.yaml").touch()
    newest = opened(tmp_path, "auto").notes[0]
    assert max((run.path for run in runs), key=lambda path: (path.name[:15], len(path.name), path.name)).name in newest


def test_a_second_process_in_the_same_run_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Started({"root": str(tmp_path), "job": {"step_s": 0.5}})
    try:
        first.wait_until(lambda: bool(list(tmp_path.glob("job/*/checkpoints/step-*"))))
        monkeypatch.setattr(store, "_PATIENCE_S", 0.2)
        with pytest.raises(CheckpointError, match=f"another process .process {first.pid}. is saving"):
            train(SHORT, tmp_path, resume="auto")
        assert first.poll() is None
    finally:
        first.kill()
    assert logged_by(tmp_path)[0][0] == 1
    train(Job(epochs=1), tmp_path, resume="auto", max_steps=3)


def test_the_folder_is_free_for_others_when_the_training_is_over(tmp_path: Path) -> None:
    train(SHORT, tmp_path, max_steps=1)
    run = Started({"root": str(tmp_path), "job": {"epochs": 1, "samples": 12, "validate": False}})
    assert run.wait() == 0, run.output()


def test_what_a_run_leaves_by_default(tmp_path: Path) -> None:
    """The newest checkpoint, its mark that it came to its end, its configuration and metrics."""
    run = Path(train(SHORT, tmp_path).folder)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "finished", "metrics.jsonl"]
    assert steps_saved(tmp_path) == [3]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [".lock", "step-00000003"]


def test_a_finished_run_that_goes_on_is_unfinished_until_its_new_end(tmp_path: Path) -> None:
    train(SHORT, tmp_path, max_steps=1)
    assert (newest_run(tmp_path) / "finished").exists()
    started = Started({"root": str(tmp_path), "job": {"epochs": 50, "samples": 12, "validate": False, "step_s": 0.05}})
    try:
        started.wait_until(lambda: started.trained() >= 1)
        assert not (newest_run(tmp_path) / "finished").exists()
    finally:
        started.kill()


def test_a_finished_run_resumed_by_auto_ends_at_once(tmp_path: Path) -> None:
    whole = train(SHORT, tmp_path)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in checkpoints(whole.folder))
    again = train(SHORT, tmp_path, resume="auto")
    assert again.losses == {}
    assert again.progress == whole.progress
    assert sorted((p.name, p.stat().st_mtime_ns) for p in checkpoints(whole.folder)) == before
    assert (newest_run(tmp_path) / "finished").exists()


def test_config_yaml_says_what_was_asked_and_what_became_of_it(tmp_path: Path) -> None:
    job = Job(epochs=1, samples=12, validate=False, options={"accumulate_grad_batches": 3, "gradient_clip_val": 0.5})
    train(job, tmp_path, resume="auto", callbacks=[Checkpoint("1step")])
    config = yaml.safe_load((newest_run(tmp_path) / "config.yaml").read_text())
    assert config["gradient_clip_val"] == 0.5
    assert config["resume"] == "auto"
    assert config["callbacks"] == ["Recorder", "Checkpoint"]
    assert config["resolved"] == {
        "device": "cpu",
        "ranks": 1,
        "strategy": "single",
        "precision": "fp32",
        "seed": 3,
        "accumulate_grad_batches": 3,
        "batch_samples": 4,
    }


def test_a_root_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="cannot be made"):
        train(SHORT, tmp_path / "file")


@pytest.mark.parametrize("name", ["spaces and ünïcödé 🚂", "a/b"])
def test_names_of_runs(name: str, tmp_path: Path) -> None:
    train(SHORT, tmp_path, name=name, max_steps=1)
    result = train(SHORT, tmp_path, name=name, resume="auto")
    assert sorted(result.losses) == [2, 3]


def test_a_linked_root_and_a_copied_checkpoint(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "real")
    os.symlink(tmp_path / "real", tmp_path / "link")
    shutil.copytree(checkpoints(run)[0], tmp_path / "copy")
    assert sorted(train(SHORT, tmp_path / "link", resume="auto", max_epochs=2).losses) == [4, 5, 6]
    assert sorted(train(SHORT, tmp_path / "other", resume=tmp_path / "copy").losses) == [2, 3]


def test_a_clock_that_was_set_back_does_not_make_the_newest_run_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summer time ends, a battery is empty: resume='auto' still means the run that began last."""
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20261122-120000")
    first = train(SHORT, tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "19700101-000007")
    second = train(SHORT, tmp_path, max_steps=2)
    assert Path(second.folder).name == "20261122-120000-2"
    third = train(SHORT, tmp_path, resume="auto")
    assert third.folder == second.folder != first.folder
    assert sorted(third.losses) == [3]
