"""Killed with SIGKILL at random moments and resumed until it ends, a run is the one that was never killed, bit for bit.

Losses are compared as they stand in metrics.jsonl (every step, every digit), each step once; the weights at the end; and the
ledger: each sample once an epoch, and a step that was trained on again had the same samples. The kills come from outside.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from resume_jobs import Job, Started, assert_each_sample_once, logged_by, main, result_of


def killed_and_resumed(given: dict[str, Any], *, kills: int, seed: int, script: bool = False, victim: str = "agent") -> int:
    """Start the job again and again, killing it `kills` times; return how many kills hit a save."""
    dice = random.Random(seed)
    root = Path(given["root"])
    hits = 0
    for kill in range(kills + 1):
        run = Started(given, script=script)
        try:
            if kill == kills:
                assert run.wait(120) == 0, run.output()
                break
            goal, pause_s = dice.randint(1, 5), dice.uniform(0, 0.06)
            run.wait_until(lambda run=run, goal=goal: run.trained() >= goal, 120)
            time.sleep(pause_s)
            if run.poll() is None:
                pid = run.pid if victim == "agent" else dice.choice(list(run.ranks().values()))
                os.kill(pid, signal.SIGKILL)
                if run.wait(20) == 0:  # it came to its end just before the signal
                    assert "finished" in {p.name for p in root.glob("job/*/*")}, run.output()
            else:
                assert run.poll() == 0, run.output()
            hits += any(root.glob("job/*/checkpoints/.tmp-*"))
        finally:
            run.kill()
    return hits


def assert_like_the_whole(root: Path, whole: Path, job: Job) -> None:
    assert logged_by(root) == logged_by(whole)
    assert result_of(root) == result_of(whole)
    assert_each_sample_once(root, job)


@pytest.mark.parametrize("name", ["every step", "every third step", "workers", "accumulation"])
def test_killed_at_random_and_resumed_it_is_the_run_that_was_never_killed(name: str, tmp_path: Path) -> None:
    job: dict[str, Any] = {"epochs": 2, "samples": 28}
    given: dict[str, Any] = {"job": job}
    if name == "every third step":
        given["every"] = "3step"
    if name == "workers":
        job["workers"] = 2
        given["every"] = "2step"
    if name == "accumulation":
        given["options"] = {"accumulate_grad_batches": 3, "precision": "bf16-mixed", "val_check_interval": 2}
    whole = Started(given | {"root": str(tmp_path / "whole")})
    assert whole.wait() == 0, whole.output()
    killed_and_resumed(given | {"root": str(tmp_path / "killed")}, kills=3, seed=len(name))
    assert_like_the_whole(tmp_path / "killed", tmp_path / "whole", Job(**job))


def test_kills_do_hit_saves(tmp_path: Path) -> None:
    """Otherwise the tests above would show less than they say."""
    given = {"root": str(tmp_path), "job": {"epochs": 4, "validate": False}, "options": {"max_steps": 24}}
    assert killed_and_resumed(given, kills=6, seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "workers", "precision", "accumulation"),
    [
        (1, "agent", 2, "fp32", 1),
        (1, "agent", 0, "bf16-mixed", 3),
        (2, "rank", 0, "fp32", 3),
        (2, "agent", 2, "bf16-mixed", 1),
        (4, "rank", 2, "fp32", 1),
        (4, "agent", 0, "bf16-mixed", 1),
    ],
)
def test_a_script_on_several_ranks_survives_kills(
    count: int, victim: str, workers: int, precision: str, accumulation: int, ranks: Any, tmp_path: Path
) -> None:
    """A single rank is killed, or the process that the user started, with which all ranks die."""
    # 47: no rank is ever left with one sample, of which BatchNorm has no variance.
    job = {"epochs": 2, "samples": 47, "batch_size": 3, "workers": workers, "step_s": 0.02}
    options = {"accumulate_grad_batches": accumulation, "precision": precision}
    given = {"job": job, "options": options, "every": "2step"}
    (tmp_path / "whole").mkdir()
    ranks(count, main, given | {"root": str(tmp_path / "whole")}, timeout=120)
    root = str(tmp_path / "killed")
    given = given | {"root": root, "options": options | {"devices": count}}
    killed_and_resumed(given, kills=3 if count < 4 else 2, seed=count, script=True, victim=victim)
    assert_like_the_whole(tmp_path / "killed", tmp_path / "whole", Job(**job))
