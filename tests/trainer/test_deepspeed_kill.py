"""Killed with SIGKILL and resumed, a run under ZeRO-2 and ZeRO-3 is the one that was never killed, bit for bit.

The job is that of test_kill.py: dropout, BatchNorm, augmentation, AdamW, schedulers; the checkpoints are our own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.deepspeed_engine import library
from resume_jobs import Job, assert_each_sample_once, logged_by, main, result_of
from test_kill import killed_and_resumed

library(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "victim", "precision", "accumulation"),
    [("deepspeed:2", "agent", "bf16-mixed", 1), ("deepspeed:2", "rank", "fp32", 3), ("deepspeed:3", "rank", "fp32", 1)],
)
def test_killed_and_resumed_it_is_the_run_that_was_never_killed(
    strategy: str, victim: str, precision: str, accumulation: int, ranks: Any, tmp_path: Path
) -> None:
    job = {"epochs": 2, "samples": 47, "batch_size": 3, "step_s": 0.02}
    options = {"accumulate_grad_batches": accumulation, "precision": precision, "strategy": strategy}
    given = {"job": job, "options": options, "every": "2step"}
    (tmp_path / "whole").mkdir()
    ranks(2, main, given | {"root": str(tmp_path / "whole")}, timeout=120)
    given = given | {"root": str(tmp_path / "killed"), "options": options | {"devices": 2}}
    killed_and_resumed(given, kills=2, seed=len(strategy), script=True, victim=victim)
    assert logged_by(tmp_path / "killed") == logged_by(tmp_path / "whole")
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
    assert_each_sample_once(tmp_path / "killed", Job(**job))
