"""The Checkpoint callback against a real store: what is saved when, what is kept, what survives a resume.

The trainer is a stand-in of thirty lines with exactly what TrainerView promises; tests/trainer has the real one.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from drivetrain.callbacks import checkpoint as module_under_test
from drivetrain.callbacks.base import Callback, TrainerView
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.runner import is_overridden
from drivetrain.strategies.checkpoint import Checkpoint as Reader
from drivetrain.strategies.checkpoint import CheckpointStore, SaveHandle
from drivetrain.strategies.errors import CheckpointError, ConfigError, UnknownName
from drivetrain.strategies.world import World
from drivetrain.trainer.loops.progress import Progress
from torch import nn

MODULE = nn.Linear(1, 1)


class Run:
    """Calls the hooks as the loop does: steps, validations, epochs."""

    def __init__(self, root: Path, *callbacks: Checkpoint, world: World | None = None, resume: bool = False) -> None:
        self.progress, self.metrics, self.stage = Progress(), {}, "fit"
        self.world = world or World.single()
        self.store = CheckpointStore(root, self.world)
        self.callbacks = callbacks
        self.is_resumed = resume
        self.clock_s, self.step_s = 0.0, 0.0
        self.printed: list[str] = []
        self.saved: list[tuple[int, bool]] = []
        if resume:
            latest = self.store.latest()
            assert latest is not None
            with Reader(latest.path) as saved:
                self.progress.load_state_dict(saved.value("progress"))
                for callback in callbacks:
                    callback.load_state_dict(saved.value(f"callback/{callback.state_key}"))
        self.call("on_train_start")

    @property
    def view(self) -> TrainerView:
        return cast(TrainerView, self)

    def call(self, name: str, *args: Any) -> None:
        for callback in self.callbacks:
            if is_overridden(callback, name, Callback):
                getattr(callback, name)(self.view, MODULE, *args)

    def print(self, text: str) -> None:
        self.printed.append(text)

    def save_checkpoint(
        self, path: None = None, *, wait: bool = False, remove: Iterable[int] = (), required: bool = True
    ) -> SaveHandle:
        self.saved.append((self.progress.global_step, any(c.is_best for c in self.callbacks)))
        values = {"progress": self.progress.state_dict()} | {f"callback/{c.state_key}": c.state_dict() for c in self.callbacks}
        self.required = required
        meta = {"metrics": self.metrics}
        return self.store.save(self.progress.global_step, {"w": torch.ones(2)}, values, meta=meta, remove=remove, wait=False)

    def steps(self, n: int, val_loss: Iterable[float] = (), every: int = 1) -> Run:
        """Take n steps; after each `every`-th a validation gives the next of `val_loss`."""
        values = iter(val_loss)
        for _ in range(n):
            self.progress.global_step += 1
            self.progress.batches += 1
            self.progress.samples += 8
            self.clock_s += self.step_s
            if self.progress.global_step % every == 0:
                value = next(values, None)
                if value is not None:
                    self.validate(value)
            self.call("on_checkpoint_step")
        return self

    def validate(self, value: float) -> None:
        self.metrics["val_loss"] = value
        self.call("on_validation_end")

    def epoch(self, n: int, val_loss: float | None = None) -> Run:
        self.steps(n)
        if val_loss is not None:
            self.validate(val_loss)
        self.progress.epoch += 1
        self.call("on_checkpoint_epoch")
        return self

    def end(self) -> Run:
        self.call("on_train_end")
        return self

    @property
    def when(self) -> list[int]:
        return [step for step, _ in self.saved]

    @property
    def left(self) -> list[int]:
        self.store.join()
        return sorted(info.step for info in self.store.list())


def names(steps: Iterable[int]) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


# -- when -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": "4step"}, [4, 8, 10]),
        ({"every": 4}, [4, 8, 10]),
        ({"every_n_steps": 4}, [4, 8, 10]),
        ({"every_n_train_steps": 4}, [4, 8, 10]),
        ({"every": "24sample"}, [3, 6, 9, 10]),
        ({"every": ["4step", "3step"]}, [3, 4, 6, 8, 9, 10]),
        ({"every": "4step", "save_on_train_end": False}, [4, 8]),
        ({"every": "10step"}, [10]),
    ],
)
def test_every_so_many_steps_and_at_the_end(options: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    assert Run(tmp_path, Checkpoint(**options)).steps(10).end().when == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, 6, 9]),
        ({"every": "1ep"}, [3, 6, 9]),
        ({"every_n_epochs": 2}, [6, 9]),
        ({"every": "2ep", "save_on_train_end": False}, [6]),
        ({"every": "2step", "save_on_train_epoch_end": True}, [2, 3, 4, 6, 6, 8, 9]),
    ],
)
def test_every_so_many_epochs(options: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    """The end of the third epoch is the end of the training: nothing new to save."""
    run = Run(tmp_path, Checkpoint(**options))
    for _ in range(3):
        run.epoch(3)
    assert run.end().when == expected


@pytest.mark.parametrize("options", [{"every": "2m"}, {"every_n_minutes": 2}, {"train_time_interval": timedelta(minutes=2)}])
def test_every_so_many_minutes_of_training(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 50 s by this clock."""
    run = Run(tmp_path, Checkpoint(save_on_train_end=False, **options))
    run.step_s = 50
    monkeypatch.setattr(module_under_test, "time", SimpleNamespace(monotonic=lambda: run.clock_s))
    run.call("on_train_start")
    assert run.steps(20).when == [3, 6, 9, 12, 15, 18]


def time_on_many_ranks(root: Path) -> tuple[list[int], int]:
    """Every rank has its own clock, wrong in its own way; rank 0's counts. Return the saves, and how often ranks talked."""
    world = World.start("cpu")
    talks = 0
    broadcast = world.broadcast_json

    def counted(*args: Any) -> Any:
        nonlocal talks
        talks += 1
        return broadcast(*args)

    world.broadcast_json = cast(Any, counted)
    run = Run(root, Checkpoint("20m"), world=world)
    run.clock_s, run.step_s = 1000.0 * world.rank, 50.0 + 20 * world.rank
    module_under_test.time = cast(Any, SimpleNamespace(monotonic=lambda: run.clock_s))
    try:
        run.call("on_train_start")
        talks = 0
        for _ in range(90):
            run.steps(1)
        return run.when, talks
    finally:
        world.stop()


def test_ranks_with_different_clocks_save_at_the_same_steps_and_seldom_talk(ranks: Any, tmp_path: Path) -> None:
    """20 minutes are 24 steps. Each save itself takes 5 talks."""
    told = ranks(2, time_on_many_ranks, tmp_path)
    assert told[0] == told[1]
    assert told[0][0] == [24, 48, 72]
    assert told[0][1] < 3 * (8 * 2 + 6)


def test_with_a_monitor_after_each_validation(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="val_loss"))
    run.steps(10, [3.0, 2.0, 1.0], every=3)
    assert run.when == [3, 6, 9]


def test_a_validation_at_the_end_of_the_epoch_is_saved_there(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="val_loss", save_on_train_end=False))
    run.epoch(4, 0.5).epoch(4).epoch(4, 0.4)
    assert run.when == [4, 12]  # no validation, nothing to say about the second epoch


def test_the_sanity_check_is_no_validation(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="val_loss"))
    run.call("on_sanity_check_start")
    run.validate(0.0)
    run.call("on_sanity_check_end")
    run.steps(2)
    assert run.when == []


def test_nothing_is_saved_where_nothing_was_trained(tmp_path: Path) -> None:
    assert Run(tmp_path, Checkpoint("1step")).end().when == []
    run = Run(tmp_path, Checkpoint("1step")).steps(1).end()
    assert run.when == [1]
    assert Run(tmp_path, Checkpoint("1step"), resume=True).end().when == []


# -- what is kept ---------------------------------------------------------------------------------------------------------
LOSSES = [0.5, 0.3, 0.9, 0.1, math.nan, 0.4, 0.2, 0.8]


@pytest.mark.parametrize(
    ("options", "left", "best"),
    [
        ({}, [4, 8], 4),
        ({"save_top_k": 3}, [2, 4, 7, 8], 4),
        ({"save_top_k": 3, "mode": "max"}, [1, 3, 8], 3),
        ({"save_top_k": 2, "save_last": False}, [4, 7], 4),
        ({"save_top_k": 0}, [8], None),
        ({"save_top_k": -1}, [1, 2, 3, 4, 6, 7, 8], 4),
    ],
)
def test_the_best_are_kept_and_the_newest(options: dict[str, Any], left: list[int], best: int | None, tmp_path: Path) -> None:
    callback = Checkpoint(monitor="val_loss", **options)
    run = Run(tmp_path, callback).steps(8, LOSSES).end()
    assert run.left == left
    assert callback.best_model_score == (None if best is None else LOSSES[best - 1])
    assert callback.best_model_path == ("" if best is None else str(tmp_path / names([best])[0]))
    if options.get("save_last", True):
        assert callback.last_model_path == str(tmp_path / names([8])[0])


@pytest.mark.parametrize(("top_k", "left"), [(1, [6]), (3, [4, 5, 6]), (0, [6]), (-1, [1, 2, 3, 4, 5, 6])])
def test_without_a_monitor_the_newest_are_kept(top_k: int, left: list[int], tmp_path: Path) -> None:
    callback = Checkpoint("1step", save_top_k=top_k)
    assert Run(tmp_path, callback).steps(6).left == left
    assert callback.best_k_models == {str(tmp_path / name): None for name in reversed(names(left if top_k else []))}


def test_what_would_not_be_kept_is_not_even_written(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="val_loss", save_last=False, save_on_train_end=False)).steps(8, LOSSES)
    assert run.when == [1, 2, 4]


def test_the_best_is_known_as_such_while_it_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="val_loss")).steps(8, LOSSES)
    assert [step for step, is_best in run.saved if is_best] == [1, 2, 4]


def test_two_callbacks_do_not_delete_what_the_other_keeps(tmp_path: Path) -> None:
    best, newest = Checkpoint(monitor="val_loss", save_last=False), Checkpoint("1step", save_top_k=2)
    run = Run(tmp_path, newest, best).steps(8, LOSSES)
    assert run.left == [4, 7, 8]
    run.steps(1, [0.05], every=9).steps(2)
    assert run.left == [9, 10, 11]
    assert best.best_model_score == 0.05


def test_a_step_that_is_saved_again_counts_once(tmp_path: Path) -> None:
    """At the last step of an epoch: by the step, and by the epoch with its validation."""
    callback = Checkpoint(["1ep", "3step"], monitor="val_loss", save_top_k=2)
    run = Run(tmp_path, callback).epoch(3, 0.5).epoch(3, 0.4)
    assert run.when == [3, 3, 6, 6]
    assert run.left == [3, 6]
    assert [Path(path).name for path in callback.best_k_models] == ["step-00000006.2", "step-00000003.2"]


def test_a_save_that_fails_deletes_nothing_and_changes_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Checkpoint("1step")
    run = Run(tmp_path, callback).steps(3)
    before = callback.state_dict()

    def full(*args: Any, **kwargs: Any) -> None:
        raise CheckpointError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(run.store, "save", full)
        with pytest.raises(CheckpointError, match="no space"):
            run.steps(1)
    assert callback.state_dict() == {**before, "removing": []}  # what was going when that was taken is gone
    assert run.left == [3]
    assert run.steps(1).left == [5]


def test_a_save_that_fails_beside_the_training_is_raised_at_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Checkpoint("2step")
    run = Run(tmp_path, callback).steps(2)
    run.store.join()

    def two_more_saves() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            run.steps(2)
            run.store.join()
        run.steps(2)

    # By the next save, or, where the writer was quick, at the end of the one that failed.
    with pytest.raises(CheckpointError, match=r"Saving step 4 .*No space left"):
        two_more_saves()
    assert Path(callback.last_model_path).name == "step-00000002"
    assert run.left == [2]


def test_a_save_that_fails_may_be_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier ones stay until a newer one is committed; a step that could not be saved is in no account."""
    callback = Checkpoint("2step", save_top_k=2, on_error="warn")
    run = Run(tmp_path, callback).steps(4)
    run.store.join()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        run.steps(2)
        run.store.join()
        assert run.saved[-1] == (6, True)
    assert not run.required
    with contextlib.suppress(CheckpointError):  # the trainer turns it into a line (tests/trainer/test_saving_beside.py)
        run.store.settle()
    assert run.steps(2).left == [4, 8]
    assert [Path(path).name for path in callback.best_k_models] == ["step-00000008", "step-00000004"]
    assert run.end().left == [4, 8]


def refuse(*args: Any) -> int:
    raise OSError(28, "No space left on device")


# -- resume ---------------------------------------------------------------------------------------------------------------
def test_the_best_and_the_kept_survive_a_resume(tmp_path: Path) -> None:
    """Truth: the run that was never interrupted. What was resumed from is never deleted, so it stays beside."""
    whole = Run(tmp_path / "whole", Checkpoint(monitor="val_loss", save_top_k=2)).steps(8, LOSSES)
    Run(tmp_path / "cut", Checkpoint(monitor="val_loss", save_top_k=2)).steps(5, LOSSES)
    callback = Checkpoint(monitor="val_loss", save_top_k=2)
    again = Run(tmp_path / "cut", callback, resume=True).steps(3, LOSSES[5:])
    assert sorted({*again.left} - {5}) == whole.left
    assert callback.best_model_score == 0.1
    state = callback.state_dict()
    assert state["kept"] == whole.callbacks[0].state_dict()["kept"]
    assert state["removing"] == [5]


def test_what_a_kill_kept_from_being_deleted_goes_after_the_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, Checkpoint("1step")).steps(2)
    run.store.join()
    with monkeypatch.context() as patch:
        patch.setattr(run.store, "_remove", lambda steps: list(steps))  # killed between the commit of 3 and the deletion of 2
        assert run.steps(1).left == [2, 3]
    again = Run(tmp_path, Checkpoint("1step"), resume=True).steps(1)
    assert again.left == [3, 4]  # 3 was resumed from
    assert Run(tmp_path, Checkpoint("1step"), resume=True).steps(1).left == [4, 5]


def test_a_checkpoint_that_somebody_deleted_takes_no_place_among_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="val_loss", save_top_k=1)).steps(3, [0.1, 0.5, 0.4])
    run.store.remove([1])
    run.store.release(1, by=run.callbacks[0].state_key)
    run.store.remove([1])
    callback = Checkpoint(monitor="val_loss", save_top_k=1)
    Run(tmp_path, callback, resume=True).steps(1, [0.3], every=4)
    assert callback.best_model_score == 0.3


def test_each_kind_of_checkpoint_callback_has_a_state_of_its_own() -> None:
    keys = [
        Checkpoint().state_key,
        Checkpoint(monitor="a").state_key,
        Checkpoint(monitor="a", mode="max").state_key,
        Checkpoint(key="x").state_key,
    ]
    assert keys == ["Checkpoint", "Checkpoint[a,min]", "Checkpoint[a,max]", "x"]
    assert Checkpoint("1step").state_key == Checkpoint("5step").state_key  # changing how often is no other callback


# -- errors ---------------------------------------------------------------------------------------------------------------
def test_a_metric_that_nobody_logs_is_named_at_the_first_validation(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="val_los"))
    with pytest.raises(UnknownName, match=r"no metric 'val_los' .*Did you mean 'val_loss'"):
        run.steps(1, [0.5])


def test_a_training_metric_that_nobody_logs_is_named_at_the_first_epochs_end(tmp_path: Path) -> None:
    run = Run(tmp_path, Checkpoint(monitor="train_acc"))
    run.metrics["train_accuracy"] = 0.5
    with pytest.raises(UnknownName, match=r"no metric 'train_acc'.*Known: train_accuracy"):
        run.epoch(2)


def test_a_metric_that_may_still_come_is_waited_for_until_the_end(tmp_path: Path) -> None:
    """check_val_every_n_epoch=2: the first epoch has no val_loss yet."""
    run = Run(tmp_path, Checkpoint(monitor="val_loss")).epoch(2)
    assert run.when == [2]
    assert run.epoch(2, 0.5).end().when == [2, 4]
    never = Run(tmp_path / "never", Checkpoint(monitor="val_loss")).epoch(2)
    with pytest.raises(UnknownName, match="no metric 'val_loss'"):
        never.steps(1).end()
    assert never.left == [3]  # saved all the same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "expected 'min' or 'max'"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 1.5}, "save_top_k=1.5"),
        ({"every": "5stpes"}, "no unit 'stpes'"),
        ({"every_n_epochs": 0}, "above 0"),
        ({"dirpath": ""}, r"dirpath=''.: expected a folder or a URL"),
        ({"every": 3.5}, r"every=3.5.: expected one interval or several"),
        ({"save_last": "link"}, r"save_last='link'.: expected True or False"),
        ({"filename": "{epoch}"}, r"has no filename: .* Choose where they lie with Checkpoint\(dirpath=...\) or Trainer\(root="),
        ({"save_topk": 3}, "no option 'save_topk' of Checkpoint. Did you mean 'save_top_k'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpoint(**options)


# -- on exception ---------------------------------------------------------------------------------------------------------
def test_on_exception_the_run_is_saved_if_asked_and_the_exception_stays_the_one_to_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, Checkpoint("5step", save_on_exception=True)).steps(7)
    run.call("on_exception", RuntimeError("boom"))
    assert run.when == [5, 7]
    run.call("on_exception", KeyboardInterrupt())  # nothing new
    assert run.when == [5, 7]
    run.steps(1)
    monkeypatch.setattr(run, "save_checkpoint", lambda **_: 1 / 0)
    run.call("on_exception", RuntimeError("boom"))
    assert run.printed == ["save_on_exception: not saved. ZeroDivisionError: division by zero"]
    silent = Run(tmp_path / "b", Checkpoint("5step")).steps(7)
    silent.call("on_exception", RuntimeError("boom"))
    assert silent.when == [5]


def exception_on_two(root: Path) -> list[Any]:
    world = World.start("cpu")
    try:
        run = Run(root, Checkpoint("5step", save_on_exception=True), world=world).steps(7)
        if world.rank == 1:
            run.call("on_exception", RuntimeError("boom"))
        return [run.when, run.printed]
    finally:
        world.stop()


def test_on_several_ranks_an_exception_saves_nothing_and_does_not_hang(ranks: Any, tmp_path: Path) -> None:
    told = ranks(2, exception_on_two, tmp_path)
    assert [when for when, _ in told] == [[5], [5]]
    assert "all of them would have to save together" in told[1][1][0]


# -- cost -----------------------------------------------------------------------------------------------------------------
def calls(action: Callable[[], Any]) -> int:
    """Python and C function calls of `action`, itself not counted."""
    count = 0

    def hook(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(hook)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_a_step_on_which_nothing_is_due_costs_one_call(tmp_path: Path) -> None:
    callback = Checkpoint("1000step", monitor="val_loss")
    run = Run(tmp_path, callback).steps(3)
    hook, view = callback.on_checkpoint_step, run.view
    nothing = calls(lambda: None)
    assert calls(lambda: hook(view, MODULE)) - nothing == 1


def test_a_run_that_saves_at_epochs_only_has_no_step_hook() -> None:
    assert not is_overridden(Checkpoint(), "on_checkpoint_step", Callback)
    assert is_overridden(Checkpoint("5step"), "on_checkpoint_step", Callback)
    assert is_overridden(Checkpoint(monitor="x"), "on_checkpoint_step", Callback)
