"""Fixtures of the trainer's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drivetrain.strategies.world import World

sys.path.insert(0, str(Path(__file__).parent))  # for resume_jobs, which several tests share


@pytest.fixture
def on_ranks(ranks: Any) -> Callable[..., list[Any]]:
    """`on_ranks(n, fn)` runs `fn(world)` on n processes, each with its started World, and returns the n results."""

    def run(n: int, fn: Callable[[World], Any]) -> list[Any]:
        def one_rank() -> Any:
            world = World.start("cpu")
            try:
                return fn(world)
            finally:
                world.stop()

        return ranks(n, one_rank)

    return run
