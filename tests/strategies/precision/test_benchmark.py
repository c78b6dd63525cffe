"""`drivetrain bench precision` runs on a model of the user's, and says what does not run here and why."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from drivetrain.strategies.errors import ConfigError
from drivetrain.trainer.cli.bench import main, parser

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")
MODEL = """
import sys
sys.path.insert(0, {folder!r})
from tiny_gpt import TinyGPT, data

def make():
    return TinyGPT(), data()
"""
OPTIONS = ["--help", "--json", "--one", "--only", "--picture", "--steps", "--table", "-h"]


def test_the_options_are_those_of_this_list() -> None:
    """Whoever adds, renames or drops one changes this list, and the CHANGELOG."""
    assert parser().option_names() == OPTIONS


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["speed", "x.py"], "There is no benchmark 'speed'"),
        (["precision", "no_such_file.py"], "There is no file 'no_such_file.py'"),
        (["precision", "mine.py:made"], "has no function 'made'"),
        (["precision", "mine.py", "--only", "fp8-aoo"], "Did you mean 'fp8-ao'"),
        (["precision", "mine.py", "--steps", "5"], "Use 12 or more"),
    ],
)
def test_wrong_use_is_told(argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def make(): ...")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        main(argv)


@pytest.mark.slow
def test_it_compares_a_model_of_mine_and_names_what_the_others_need(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MODEL.format(folder=str(Path(__file__).parent)))
    files = {kind: tmp_path / f"results.{kind}" for kind in ("json", "picture", "table")}
    command = [sys.executable, "-m", "drivetrain", "bench", "precision", str(mine), "--steps", "40", "--only", "fp8-ao,fp8-te"]
    for kind, path in files.items():
        command += [f"--{kind}", str(path.with_suffix(".png") if kind == "picture" else path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(files["json"].read_text())["rows"]}
    assert list(rows) == ["fp32", "bf16-mixed", "fp8-ao", "fp8-te"]
    assert "needs CUDA" in rows["fp8-te"]["needs"]
    assert 0 < abs(rows["fp8-ao"]["gap_bf16"]) < 0.1
    assert not rows["fp8-ao"]["equals_bf16"]
    assert len(rows["fp8-ao"]["errors"]) == 7
    assert "not here: fp8-te: " in files["table"].read_text()
    assert (tmp_path / "results.png").stat().st_size > 10_000
