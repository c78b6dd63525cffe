"""Every: a number with a unit, and when it is due."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from drivetrain.callbacks.interval import Every
from drivetrain.strategies.errors import ConfigError, UnknownName
from drivetrain.trainer.loops.progress import Progress


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500step", Every(500, "global_step")),
        ("500 steps", Every(500, "global_step")),
        (500, Every(500, "global_step")),
        ("500", Every(500, "global_step")),
        ("1ep", Every(1, "epoch")),
        ("2 epochs", Every(2, "epoch")),
        ("1e9tok", Every(10**9, "tokens")),
        ("1_000 samples", Every(1000, "samples")),
        ("8ba", Every(8, "batches")),
        ("10m", Every(600, "seconds")),
        ("0.5h", Every(1800, "seconds")),
        ("90S", Every(90, "seconds")),
        (timedelta(minutes=2), Every(120, "seconds")),
        (Every(3, "epoch"), Every(3, "epoch")),
    ],
)
def test_intervals_are_read_as_people_write_them(text: Any, expected: Every) -> None:
    assert Every.parse(text) == expected
    assert Every.parse(str(expected)) == expected


def test_a_bare_number_counts_the_unit_that_is_asked_for() -> None:
    assert Every.parse(2, unit="ep") == Every(2, "epoch")


@pytest.mark.parametrize("text", ["", "step", "0step", "-1ep", "0.5ep", "nan s", "1e400m", "inf", True, None, "1 2", "1__e"])
def test_what_is_no_interval_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"interval|unit"):
        Every.parse(text)


def test_an_unknown_unit_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no unit 'stesp' in the interval '5stesp'.*Did you mean 'step'"):
        Every.parse("5stesp")


def test_counts_are_due_at_their_multiples_also_after_a_resume_in_between() -> None:
    every, due = Every.parse("500step"), []
    last = 700.0
    for step in range(701, 2100):
        progress = Progress(global_step=step)
        if every.due(progress, last):
            due.append(step)
        last = every.now(progress)
    assert due == [1000, 1500, 2000]
    assert every.next(1000) == 1500


def test_counts_that_jump_are_due_at_once_and_once() -> None:
    every, due, last = Every.parse("100sample"), [], 0.0
    for samples in range(0, 700, 32):
        if every.due(Progress(samples=samples), last):
            due.append(samples)
        last = samples
    assert due == [128, 224, 320, 416, 512, 608]


def test_time_is_due_when_it_has_passed_since_the_last_time() -> None:
    every = Every.parse("1m")
    assert not every.due(Progress(seconds=59), 0)
    assert every.due(Progress(seconds=61), 0)
    assert not every.due(Progress(seconds=120), 61)
    assert every.is_time
    assert not Every(1).is_time
