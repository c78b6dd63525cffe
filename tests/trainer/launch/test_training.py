"""A whole training on two processes, started as a user would: how it ends when something or somebody ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from drivetrain import Trainer, TrainingModule

class Line(TrainingModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        if batch_idx == 2:
            with open(f"pid{os.environ['RANK']}", "w") as file:
                file.write(str(os.getpid()))
            if "boom" in sys.argv and os.environ["RANK"] == "1":
                raise ValueError("boom")
        return ((self.line(batch[0]) - batch[1]) ** 2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

x = torch.randn(64, 4)
trainer = Trainer(devices=2, max_epochs=10**6, strategy="ddp", enable_progress_bar=False, seed=1, name="run",
                  **({"max_step": 3} if "typo" in sys.argv else {}))
trainer.fit(Line(), DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8))
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "train.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def both_train(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    """Wait until both ranks are in their steps; return their process ids."""
    deadline = time.monotonic() + 60
    files = [folder / f"pid{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number", "code", "reason"),
    [
        ("rank 1", signal.SIGTERM, 143, "rank 1: SIGTERM"),
        ("rank 0", signal.SIGUSR1, 75, "rank 0: SIGUSR1"),
        ("agent", signal.SIGINT, 130, "rank 0: SIGINT; rank 1: SIGINT"),
    ],
)
def test_a_signal_to_any_process_saves_and_leaves(
    whom: str, number: signal.Signals, code: int, reason: str, tmp_path: Path
) -> None:
    process = start(tmp_path)
    try:
        pids = {"agent": process.pid, **{f"rank {rank}": pid for rank, pid in enumerate(both_train(tmp_path, process))}}
        os.kill(pids[whom], number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert reason in out + err
    (checkpoint,) = tmp_path.glob("runs/run/*/checkpoints/step-*/manifest.json")
    assert f"step {int(checkpoint.parent.name.removeprefix('step-'))}" in out + err


@pytest.mark.slow
def test_an_error_in_a_step_is_last_once_and_says_where(tmp_path: Path) -> None:
    process = start(tmp_path, "boom")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert err.strip().endswith("[rank 1/2] ValueError: boom\nWhile training: epoch 0, batch 2, after 2 steps, rank 1 of 2.")
    assert err.count("Traceback") == 1


def test_a_misspelt_argument_is_one_paragraph_and_exit_code_2_before_anything_starts(tmp_path: Path) -> None:
    process = start(tmp_path, "typo")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("UnknownName: Trainer has no argument 'max_step'. Did you mean 'max_steps'?")
    assert len(err.splitlines()) == 1
