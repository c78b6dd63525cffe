"""FSDPStrategy and HSDPStrategy against a plain PyTorch loop, by the conformance suite and by cases of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract import CASES, Case, check_strategy
from drivetrain.strategies.world import World

DOUBLE = {c.name.removeprefix("float64 "): c for c in CASES if c.dtype == torch.float64}
QUICK = [
    replace(DOUBLE[name], steps=6)
    for name in ("sgd window 3, clipped", "adamw window 3, cut short", "adamw num_items, clipped", "sgd two models")
]


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


FAST = [
    pytest.param("fsdp", 2, {}, id="fsdp"),
    pytest.param("hsdp", 4, {}, id="hsdp"),
]


@pytest.mark.parametrize(("strategy", "size", "options"), FAST)
def test_it_gives_the_numbers_of_a_plain_loop(strategy: str, size: int, options: dict[str, Any], ranks: Any) -> None:
    for found in ranks(size, outcomes, strategy, options, QUICK):
        assert [o for _, o, _ in found] == ["pass"] * len(QUICK), found
