"""Control: what one rank asks for reaches all ranks at the same step, with its reason, and costs next to nothing until then."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from drivetrain.strategies.control import REQUEUE, SAVE, STOP, TERMINATED, Control
from drivetrain.strategies.world import World


def steps_until_agreed(asking: int, at_step: int, code: int, reason: str, step_s: float) -> tuple[int, int, str, int]:
    world = World.start("cpu", timeout_s=30)
    for step in range(1, 400):
        time.sleep(step_s * (1 + world.rank))
        if step == at_step and world.rank == asking:
            world.control.request(code, reason)
        agreed = world.control.tick(step)
        if agreed:
            result = (step, agreed, world.control.reason, world.control.requested)
            world.stop()
            return result
    raise AssertionError("nothing was agreed on")


@pytest.mark.parametrize(("asking", "step_s"), [(0, 0.0), (1, 0.0), (2, 0.004)])
def test_all_ranks_get_the_code_at_the_same_step_whoever_asked(asking: int, step_s: float, ranks: Any) -> None:
    """Ranks run at different speeds; the interval is agreed too, so they still read the same all-reduce at the same step."""
    results = ranks(3, steps_until_agreed, asking, 70, STOP | SAVE | TERMINATED, "SIGTERM", step_s)
    assert len(set(results)) == 1
    step, code, reason, left = results[0]
    assert (code, reason, left) == (STOP | SAVE | TERMINATED, f"rank {asking}: SIGTERM", 0)
    assert 70 < step <= 70 + 2 * 50


def several_requests() -> list[tuple[int, int, str]]:
    world = World.start("cpu", timeout_s=30)
    seen = []
    for step in range(1, 12):
        time.sleep(0.0 if step < 3 else 1.1 if step == 3 else 0.0)
        if step == 4:
            world.control.request(SAVE if world.rank == 0 else STOP, f"wish {world.rank}")
        code = world.control.agree(0) if step == 5 else world.control.tick(step)
        if step == 5:
            code = world.control.agree(world.control.requested)
        if code:
            seen.append((step, code, world.control.reason))
    world.stop()
    return seen


def test_agree_unites_the_flags_of_all_ranks_at_once_and_tick_does_not_repeat_them(ranks: Any) -> None:
    first, second = ranks(2, several_requests)
    assert first == second == [(5, SAVE | STOP, "rank 0: wish 0; rank 1: wish 1")]


def a_second_loop_starts_at_step_one() -> list[int]:
    world = World.start("cpu", timeout_s=30)
    for step in range(1, 300):
        world.control.tick(step)
    world.control.request(REQUEUE, "time limit")
    codes = [world.control.tick(step) for step in range(1, 150)]
    world.stop()
    return codes


def test_a_second_loop_may_count_its_steps_from_one(ranks: Any) -> None:
    first, second = ranks(2, a_second_loop_starts_at_step_one)
    assert first == second
    assert [code for code in first if code] == [REQUEUE]


def test_a_tick_that_is_not_due_is_one_call() -> None:
    control = Control()
    control._last_step, control._next = 1, 1000  # as after a boundary
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    for step in range(2, 102):
        control.tick(step)
    sys.setprofile(None)
    assert calls - 1 == 100  # the last one is sys.setprofile(None)


def test_alone_the_request_comes_back_at_the_next_tick_once() -> None:
    control = World.single().control
    assert control.tick(1) == 0
    control.request(STOP, "enough")
    assert control.requested == STOP
    assert [control.tick(2), control.tick(3)] == [STOP, 0]
    assert (control.reason, control.requested) == ("enough", 0)


def test_a_request_made_while_another_is_taken_is_not_lost() -> None:
    """A signal handler may run between any two lines: simulated by a request in the middle of the delivery."""
    control = Control()
    control.request(STOP, "first")
    whole = control._open_requests

    def interrupted() -> int:
        control._open_requests = whole  # pyright: ignore[reportAttributeAccessIssue]
        control.request(SAVE, "second")
        return whole()

    control._open_requests = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    assert control.tick(1) == STOP
    assert control.requested == SAVE
    assert control.tick(2) == SAVE


def test_a_code_that_is_no_sum_of_flags_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 65535, got -1"):
        Control().request(-1)
