"""tests/benchmarks/precision.py runs, on a model of the user's too, and says what does not run here and why."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "precision.py"
MODEL = """
import sys
sys.path.insert(0, {folder!r})
from tiny_gpt import TinyGPT, data

def make():
    return TinyGPT(), data()
"""


@pytest.mark.slow
def test_it_compares_a_model_of_mine_and_names_what_the_others_need(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MODEL.format(folder=str(Path(__file__).parent)))
    files = {kind: tmp_path / f"results.{kind}" for kind in ("json", "picture", "table")}
    command = [sys.executable, str(BENCHMARK), "--steps", "40", "--only", "fp8-ao,fp8-te", "--model", f"{mine}:make"]
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
