"""`drivetrain ckpt` says what is in checkpoints, without the model's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.trainer.cli import ckpt
from drivetrain.trainer.cli.main import main
from safetensors.torch import load_file

OPTIONS = [
    *("--best", "--dry-run", "--every", "--help", "--json", "--last", "--max-shard-size", "--metric", "--mode", "--model"),
    *("--quick", "--to", "-h"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with three checkpoints; val_loss is best at step 20."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.3)):
        weight = torch.full((4, 3), float(step))
        tensors = {"model/main/weight": weight, "model/main/tied": weight, "model/main/bias": torch.zeros(4)}
        store.save(
            step,
            tensors,
            {"lr": step, "config": {"max_steps": 40}},
            meta={"metrics": {"val_loss": loss}, "progress": {"global_step": step}},
        )
    return tmp_path / "run"


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    code = main(["ckpt", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_options_are_those_of_this_list() -> None:
    assert ckpt.parser().option_names() == OPTIONS


def test_ls_lists_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run, run / "checkpoints"):
        code, found = told(capsys, "ls", path)
        assert (code, [c["step"] for c in found["checkpoints"]], found["broken"]) == (0, [10, 20, 30], {})
    assert main(["ckpt", "ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("step-00000020")
    assert lines[2].endswith("val_loss 0.1")


def test_show_tells_all_of_the_newest_or_of_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "show", run)[1]["step"] == 30
    _, found = told(capsys, "show", run / "checkpoints" / "step-00000010")
    assert found["step"] == 10
    assert found["tensors"]["model/main/weight"] == {"dtype": "float32", "shape": [4, 3]}
    assert found["aliases"] == {"model/main/tied": "model/main/weight"}
    assert found["values"] == ["lr", "config"]
    assert found["config"] == {"max_steps": 40}
    assert main(["ckpt", "show", str(run)]) == 0
    said = capsys.readouterr().out
    assert "model/main/bias" in said
    assert "  max_steps                     40" in said


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_verify_names_what_is_damaged(quick: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "verify", run, *quick)[0] == 0
    shard = run / "checkpoints" / "step-00000020" / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (run / "checkpoints" / "step-00000030" / "manifest.json").write_text("{")
    code, found = told(capsys, "verify", run, *quick)
    assert code == 3
    assert found["faults"]["step-00000010"] == []
    assert "crc32 mismatch" in found["faults"]["step-00000020"][0]
    assert "not JSON" in found["faults"]["step-00000030"][0]
    assert told(capsys, "ls", run)[0] == 3


def test_diff_tells_what_differs_and_by_how_much(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    assert told(capsys, "diff", folder / "step-00000010", folder / "step-00000010")[0] == 0
    store = CheckpointStore(folder)
    tensors = {"model/main/weight": torch.zeros(4, 3), "model/main/bias": torch.zeros(5), "new": torch.zeros(1)}
    store.save(40, tensors, {"lr": 30, "config": {"max_steps": 40}})
    code, found = told(capsys, "diff", folder / "step-00000030", folder / "step-00000040")
    assert code == 1
    assert found["only_first"] == ["model/main/tied"]
    assert found["only_second"] == ["new"]
    assert found["kind"] == {"model/main/bias": ["float32 [4]", "float32 [5]"]}
    assert found["values"] == {"model/main/weight": 30.0}
    assert found["other_values"] == []
    assert told(capsys, "diff", folder / "step-00000010", folder / "step-00000030")[1]["other_values"] == ["lr"]


def test_export_writes_weights_that_other_libraries_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "export", run, "--to", tmp_path / "out")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {"weight", "bias"}
    assert torch.equal(found["weight"], torch.full((4, 3), 30.0))
    _, told_ = told(capsys, "export", run, "--to", tmp_path / "many", "--max-shard-size", "20B")
    assert [Path(p).name for p in told_["files"]][-1] == "model.safetensors.index.json"
    with pytest.raises(ConfigError, match=r"holds no model 'x'; it holds main"):
        ckpt.main(["export", str(run), "--to", str(tmp_path), "--model", "x"])


def test_prune_deletes_what_no_rule_keeps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = told(capsys, "prune", run, "--last", 1, "--best", 1, "--metric", "val_loss", "--dry-run")
    assert (code, found) == (0, {"deleted": [10], "kept": [20, 30], "dry_run": True})
    assert len(CheckpointStore(run / "checkpoints").list()) == 3
    told(capsys, "prune", run, "--last", 1, "--best", 1, "--metric", "val_loss")
    assert [info.step for info in CheckpointStore(run / "checkpoints").list()] == [20, 30]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["ls", "nowhere"], CheckpointError, "There is no such folder"),
        (["ls", "."], CheckpointError, "There are no checkpoints in"),
        (["ls", ".", "--last", "1"], ConfigError, "ckpt ls has no --last; that is for prune"),
        (["prune", "."], ConfigError, "needs a rule for what stays"),
        (["diff", "."], ConfigError, "compares two checkpoints"),
        (["export", "."], ConfigError, "--to FOLDER"),
        (["look", "."], ConfigError, "invalid choice: 'look'"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        ckpt.main(arguments)


def test_checkpoints_behind_a_url_are_looked_at_in_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fsspec", reason="waits for fsspec")
    store = CheckpointStore("memory://ckpt-cli/checkpoints")
    for step in (1, 2):
        store.save(step, {"model/main/w": torch.ones(3)}, {})
    for place in ("memory://ckpt-cli", "memory://ckpt-cli/checkpoints"):
        code, found = told(capsys, "ls", place)
        assert (code, [row["step"] for row in found["checkpoints"]]) == (0, [1, 2])
    assert told(capsys, "verify", "memory://ckpt-cli/checkpoints/step-00000002") == (0, {"faults": {"step-00000002": []}})
    assert told(capsys, "prune", "memory://ckpt-cli", "--last", "1")[1]["deleted"] == [1]
    assert told(capsys, "show", "memory://ckpt-cli")[1]["step"] == 2
    code, found = told(capsys, "export", "memory://ckpt-cli", "--to", "memory://ckpt-cli/weights")
    assert (code, found["files"]) == (0, ["memory:///ckpt-cli/weights/model.safetensors"])


WITHOUT_TORCH = """
import sys
from drivetrain.trainer.cli.main import main
codes = [main(["ckpt", action, sys.argv[1]]) for action in ("ls", "show", "verify")]
print(codes, "torch" in sys.modules, file=sys.stderr)
"""


def test_looking_at_checkpoints_and_checking_them_starts_no_torch(tmp_path: Path) -> None:
    """It takes seconds to import. A value that has a tensor in it, and a type that safetensors lacks, are no reason either."""
    tensors = {"model/main/w": torch.ones(3), "model/main/c": torch.ones(2, dtype=torch.complex64)}
    CheckpointStore(tmp_path).save(1, tensors, {"config": {"a": 1}, "callback/x": {"mean": torch.ones(2)}}, meta={"n": 1})
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stderr == "[0, 0, 0] False\n"
    assert "complex64" in ended.stdout
    assert "step-00000001: whole" in ended.stdout
