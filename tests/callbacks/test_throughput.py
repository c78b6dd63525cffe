"""ThroughputMonitor's rates are counts over seconds, with the validations' time left out."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.runner import is_overridden
from drivetrain.callbacks.throughput import ThroughputMonitor
from drivetrain.strategies.errors import ConfigError


class Clock:
    """Time by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_rates_are_over_the_last_log_points(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    callback = ThroughputMonitor(window=2)
    callback.on_train_start(view, view.module)
    rates = []
    for seconds in (4.0, 1.0, 1.0):
        clock.now += seconds
        view.progress.tokens += 500
        (values,) = view.train(callback, steps=10, log=lambda step: {}).values()
        rates.append(values)
    assert rates[0] == {"samples_per_second": 20.0, "tokens_per_second": 125.0, "batches_per_second": 2.5}
    assert rates[1] == {"samples_per_second": 32.0, "tokens_per_second": 200.0, "batches_per_second": 4.0}
    assert rates[2] == {"samples_per_second": 80.0, "tokens_per_second": 500.0, "batches_per_second": 10.0}


def test_the_time_of_validations_is_left_out(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    callback = ThroughputMonitor()
    callback.on_train_start(view, view.module)
    callback.on_validation_start(view, view.module)
    clock.now += 1000
    callback.on_validation_end(view, view.module)
    clock.now += 2
    assert view.train(callback, steps=10, log=lambda step: {})[10]["samples_per_second"] == 40.0


def test_mfu_from_given_flops(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    view.module.flops = 3e9
    callback = ThroughputMonitor(peak_flops=1e11)
    callback.on_train_start(view, view.module)
    clock.now += 1
    values = view.train(callback, steps=10, log=lambda step: {})[10]
    assert values["flops_per_second"] == 3e10
    assert values["mfu"] == pytest.approx(0.3)


def test_flops_are_counted_on_the_first_batch_only(view: Any) -> None:
    """A linear layer of 4 x (16 -> 8): the forward is 2*4*16*8 operations, the weight's gradient as many."""
    callback = ThroughputMonitor(flops="count")
    layer = torch.nn.Linear(16, 8)
    callback.on_train_start(view, view.module)
    for _ in range(2):
        vars(callback)["on_train_batch_start"](view, view.module, None, 0)
        layer(torch.zeros(4, 16)).sum().backward()
        vars(callback)["on_train_batch_end"](view, view.module, None, None, 0)
    assert callback.flops == 2 * (2 * 4 * 16 * 8)


def test_without_flops_to_count_a_batch_costs_nothing() -> None:
    assert not any(is_overridden(ThroughputMonitor(), f"on_train_batch_{when}", Callback) for when in ("start", "end"))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="window=0"):
        ThroughputMonitor(0)
    with pytest.raises(ConfigError, match="'measure'"):
        ThroughputMonitor(flops="measure")
