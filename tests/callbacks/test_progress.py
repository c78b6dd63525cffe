"""The bar and the lines show the last log point, cost next to nothing, and keep off the screens of other ranks."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.progress import ProgressBar, draws_bars
from drivetrain.callbacks.runner import is_overridden
from torch import nn


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def with_sgd(view: Any, lr: float = 3e-4) -> Any:
    view.optimizers = {"main": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)}
    return view


def test_a_pipe_gets_one_plain_line_for_each_log_point(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    out = io.StringIO()
    callback = ProgressBar(file=out)
    with_sgd(view).max_steps = 500
    callback.on_train_start(view, view.module)
    for _ in range(2):
        now += 2.0
        view.train(callback, steps=10, log=lambda step: {"loss": 2.3125})
    now += 3600
    view.train(callback, steps=5)
    callback.on_train_end(view, view.module)
    assert out.getvalue().splitlines() == [
        "step 10/500  epoch 1  loss 2.312  lr 3.0e-04  40 samples/s  ETA 1:38",
        "step 20/500  epoch 1  loss 2.312  lr 3.0e-04  40 samples/s  ETA 1:36",
        "trained 25 steps in 1:00:04  0.0555 samples/s  loss 2.312",
    ]


def test_the_values_of_a_validation_are_a_line_without_speed(view: Any) -> None:
    out = io.StringIO()
    callback = ProgressBar(file=out)
    callback.on_train_start(with_sgd(view), view.module)
    view.train(callback, steps=10)
    view.validate(callback, {"val_loss": 1.5})
    assert out.getvalue().splitlines()[1] == "step 10  epoch 1  val_loss 1.5"


def test_only_metrics_logged_for_the_bar_are_shown_when_there_are_any(view: Any) -> None:
    out = io.StringIO()
    callback = ProgressBar(file=out)
    callback.on_train_start(view, view.module)
    view.module._metrics = SimpleNamespace(prog_bar_names={"loss"})
    view.train(callback, steps=10, log=lambda step: {"loss": 1.0, "detail": 2.0})
    assert "loss 1" in out.getvalue()
    assert "detail" not in out.getvalue()


def test_a_resumed_run_counts_from_where_it_was(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    out = io.StringIO()
    view.max_epochs, view.num_training_batches = 2, 60
    view.progress.global_step, view.progress.samples = 100, 800
    callback = ProgressBar(file=out)
    callback.on_train_start(view, view.module)
    now += 1.0
    view.train(callback, steps=10)
    callback.on_train_end(view, view.module)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 110/120  epoch 1  loss 0.009091  80 samples/s  ETA 0:01"
    assert lines[1] == "trained 10 steps in 0:01  80 samples/s  now at step 110  loss 0.009091"


def test_a_terminal_gets_a_bar_with_the_last_values(view: Any) -> None:
    screen = Screen()
    view.max_steps, view.max_epochs = 40, 3
    callback = ProgressBar(file=screen)
    callback.on_train_start(view, view.module)
    view.train(callback, steps=40)
    view.validate(callback, {"val_loss": 1.5})
    callback.on_train_end(view, view.module)
    text = screen.getvalue()
    assert "epoch 1/3" in text
    assert "40/40" in text
    assert "loss 0.025  val_loss 1.5" in text
    assert text.splitlines()[-1].startswith("trained 40 steps in 0:0")


def test_validation_has_a_bar_of_its_own_that_goes_away(view: Any) -> None:
    screen = Screen()
    view.val_loaders = {"a": range(7)}
    callback = ProgressBar(file=screen)
    callback.on_train_start(view, view.module)
    view.train(callback, steps=3)
    callback.on_validation_start(view, view.module)
    for i in range(7):
        vars(callback)["on_validation_batch_end"](view, view.module, None, None, i)
    assert "/7 [" in screen.getvalue()
    callback.on_validation_end(view, view.module)
    assert callback._evaluation is None
    callback.on_train_end(view, view.module)


def test_no_color_is_honoured(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    green = "\x1b[32m"
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        screen = Screen()
        callback = ProgressBar(file=screen)
        view.max_steps = 100
        callback.on_train_start(view, view.module)
        view.train(callback, steps=1)
        callback.on_train_end(view, view.module)
        assert (green in screen.getvalue()) is coloured


def test_what_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not draws_bars(io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    assert draws_bars(Screen())
    monkeypatch.setenv("TERM", "dumb")
    assert not draws_bars(Screen())
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    assert draws_bars(io.StringIO())


def test_a_step_costs_one_call_on_a_terminal_and_none_in_a_pipe(view: Any) -> None:
    assert not is_overridden(ProgressBar(bar=False), "on_train_batch_end", Callback)
    callback = ProgressBar(file=Screen())
    assert is_overridden(callback, "on_train_batch_end", Callback)
    callback.on_train_start(view, view.module)
    callback._next = 1 << 62  # no redraw falls into the count
    hook = vars(callback)["on_train_batch_end"]
    counted: list[str] = []
    sys.setprofile(lambda frame, event, arg: counted.append(event) if event in ("call", "c_call") else None)
    hook(view, view.module, None, None, 0)
    sys.setprofile(None)
    assert counted[:-1] == ["call"]  # the last one is the end of the profiling
    callback.on_train_end(view, view.module)


def test_the_bar_is_drawn_about_ten_times_a_second_whatever_the_speed(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    callback = ProgressBar(file=Screen())
    callback.on_train_start(view, view.module)
    drawn: list[float] = []
    draw = callback._draw
    monkeypatch.setattr(callback, "_draw", lambda trainer: drawn.append(now) or draw(trainer))
    for seconds, steps in ((0.001, 5000), (0.5, 60), (0.0001, 50000), (0.03, 300)):
        before = now
        drawn.clear()
        for _ in range(steps):
            now += seconds
            vars(callback)["on_train_batch_end"](view, view.module, None, None, 0)
        rate = len(drawn) / (now - before)
        assert 6 <= rate <= 10.1 or seconds == 0.5
        if seconds == 0.5:  # each slow batch is drawn, after at most 16 of them
            assert 44 <= len(drawn) <= 60
    callback.on_train_end(view, view.module)


def test_other_ranks_show_nothing(view: Any) -> None:
    view.world = SimpleNamespace(is_main=False)
    for file in (Screen(), io.StringIO()):
        callback = ProgressBar(file=file)
        callback.on_train_start(view, view.module)
        view.train(callback, steps=20)
        view.validate(callback, {"val_loss": 1.5})
        callback.on_train_end(view, view.module)
        assert file.getvalue() == ""


def test_a_terminal_without_a_width_still_gets_a_bar(view: Any) -> None:
    """`docker run -t` and `script` make terminals of 0 columns, on which tqdm draws nothing by itself."""
    reader, writer = os.openpty()
    os.set_blocking(reader, False)
    view.max_steps = 10
    with os.fdopen(writer, "w") as screen:
        callback = ProgressBar(file=screen, bar=True)
        callback.on_train_start(view, view.module)
        view.train(callback, steps=3)
        callback.on_train_end(view, view.module)
        text = os.read(reader, 10_000).decode()
    os.close(reader)
    assert "3/10" in text
    assert "trained 3 steps" in text


def test_no_thread_is_started_for_the_bar(view: Any) -> None:
    """tqdm would start a monitor thread; a thread beside forked loader workers is a hazard."""
    before = threading.active_count()
    callback = ProgressBar(file=Screen())
    callback.on_train_start(view, view.module)
    assert threading.active_count() == before
    callback.on_exception(view, view.module, ValueError())
    assert callback._bar is None


def test_the_epoch_shown_is_never_beyond_the_last(view: Any) -> None:
    """Behind the last epoch the counter stands at the number of epochs, which would read as one more."""
    from drivetrain.callbacks.progress import _running_epoch

    view.max_epochs = 3
    view.progress.epoch = 3
    assert _running_epoch(view) == 3
    view.progress.epoch = 1
    assert _running_epoch(view) == 2
