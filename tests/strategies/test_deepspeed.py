"""DeepSpeedStrategy against a plain PyTorch loop, by the conformance suite and by cases of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract import CASES, MIXED, Case, check_strategy
from drivetrain.strategies.deepspeed_engine import check_locks, library
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.world import World

SINGLE = {c.name.removeprefix("fp32 "): c for c in CASES if c.dtype == torch.float32}
DOUBLE = {c.name.removeprefix("float64 "): c for c in CASES if c.dtype == torch.float64}
BF16 = {c.name.removeprefix("bf16-mixed "): c for c in MIXED}

library(torch.device("cpu"))  # here, once, and not in every forked rank


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    gc.freeze()  # stage 3 collects all garbage for each engine, and pytest's own is no part of that
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_gives_the_numbers_of_a_plain_loop(stage: int, ranks: Any) -> None:
    """Two processes; a window of three that is cut short, clipping, and the state given to a fresh strategy half-way."""
    cases = [replace(SINGLE["sgd window 3, clipped"], steps=4), replace(BF16["adamw num_items, clipped"], steps=4)]
    for found in ranks(2, outcomes, f"deepspeed:{stage}", {}, cases):
        assert [o for _, o, _ in found] == ["pass"] * len(cases), found


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_whole_suite(stage: int, size: int, ranks: Any) -> None:
    """fp32 and bf16, windows of one and three, clipping, counted losses, two models; float64 is refused, in a sentence."""
    steps = 8
    cases = [replace(c, steps=steps) for c in (*SINGLE.values(), *BF16.values())]
    for found in ranks(size, outcomes, f"deepspeed:{stage}", {}, cases, timeout=240):
        assert [(n, o, d) for n, o, d in found if o != "pass"] == []
    for found in ranks(size, outcomes, f"deepspeed:{stage}", {}, [replace(DOUBLE["sgd"], steps=2)]):
        ((_, outcome, sentence),) = found
        assert outcome == "refused"
        assert "is float64, which DeepSpeed does not average" in sentence


OFFLOAD = {"offload_optimizer": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, OFFLOAD),
        (2, OFFLOAD),
        (3, OFFLOAD),
        (3, OFFLOAD | {"offload_parameters": "cpu"}),
        (3, {"offload_parameters": "cpu", "stage3_param_persistence_threshold": 0, "sub_group_size": 40}),
        (2, {"overlap_comm": True, "round_robin_gradients": True}),
        (2, {"weights_in_16_bits": False}),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else "+".join(v),
)
def test_offload_and_other_options_give_the_same_numbers(stage: int, options: dict[str, Any], size: int, ranks: Any) -> None:
    names = ("sgd window 3, clipped", "adamw window 3, cut short", "adamw num_items, clipped", "sgd two models")
    cases = [replace(kind[name], steps=6) for kind in (SINGLE, BF16) for name in names]
    for found in ranks(size, outcomes, f"deepspeed:{stage}", options, cases, timeout=240):
        assert [(n, o, d) for n, o, d in found if o != "pass"] == []


def without_a_launcher(case: Case) -> list[tuple[str, str, str]]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    found = outcomes("deepspeed:3", {"stage3_param_persistence_threshold": 0}, [case])
    assert "LOCAL_RANK" not in os.environ
    return found


def test_it_needs_none_of_torchruns_variables(ranks: Any) -> None:
    """DeepSpeed would look for MPI, assert LOCAL_RANK, and read it again in the first forward passes of stage 3."""
    ((found,),) = ranks(1, without_a_launcher, replace(SINGLE["sgd"], steps=4))
    assert found[1] == "pass", found


def test_a_lock_that_a_killed_build_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    check_locks()  # a build may be under way
    os.utime(lock, (0, 0))
    with pytest.raises(ConfigError, match=f"Remove it: rm {lock}"):
        check_locks()
