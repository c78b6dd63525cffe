"""Told to end, a run saves and leaves with the code for it, on all ranks at the same step; resumed, it has lost nothing.

On several ranks one rank gets the signal, in the middle of a step, and the others learn of it through the control group.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.strategies.checkpoint import CheckpointStore
from resume_jobs import (
    Job,
    Ledger,
    Module,
    Started,
    assert_each_sample_once,
    assert_goes_on_as,
    loaders,
    logged_by,
    main,
    newest_run,
    result_of,
    steps_saved,
    train,
    trainer_for,
)

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}


class At(Callback):
    """Does something once, on one rank, at a hook of the batch `batches`."""

    def __init__(self, hook: str, batches: int, action: Callable[[Any], None], rank: int = 0) -> None:
        self.done = False

        def call(trainer: Any, *_: Any) -> None:
            if not self.done and trainer.stage == "fit" and trainer.progress.batches >= batches and trainer.world.rank == rank:
                self.done = True
                action(trainer)

        setattr(self, hook, call)


def send(name: str) -> Callable[[Any], None]:
    return lambda trainer: os.kill(os.getpid(), getattr(signal, name))


def code_of(run: Callable[[], Any]) -> int:
    """Run a training that is told to leave; return its exit code (0: it came to its end)."""
    try:
        run()
    except SystemExit as error:
        return int(str(error.code))
    return 0


def progress_in(root: Path) -> dict[str, Any]:
    info = CheckpointStore(newest_run(root) / "checkpoints").latest()
    assert info is not None
    return dict(info.meta["progress"])


@pytest.mark.parametrize("name", CODES)
def test_a_signal_saves_and_leaves_with_its_code_and_no_step_is_lost(name: str, tmp_path: Path) -> None:
    job = Job(epochs=2)
    expected = train(job, tmp_path / "whole")
    ask = At("on_before_backward", 5, send(name))
    assert code_of(lambda: train(job, tmp_path / "cut", callbacks=[ask])) == CODES[name]
    assert progress_in(tmp_path / "cut")["global_step"] == 6  # the step in which it came was finished
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (newest_run(tmp_path / "cut") / "finished").exists()
    result = train(job, tmp_path / "cut", resume="auto")
    assert_goes_on_as(result, expected, batches=6)
    assert (newest_run(tmp_path / "cut") / "finished").exists()
    assert logged_by(tmp_path / "cut") == logged_by(tmp_path / "whole")


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_end"])
@pytest.mark.parametrize(("job", "batches"), [(Job(epochs=2), 11), (Job(epochs=2, options={"val_check_interval": 4}), 4)])
def test_during_a_validation_it_leaves_at_once_and_validates_again_after_the_resume(
    job: Job, batches: int, hook: str, tmp_path: Path
) -> None:
    expected = train(job, tmp_path / "whole")
    ask = At(hook, 1, send("SIGTERM"))
    assert code_of(lambda: train(job, tmp_path / "cut", callbacks=[ask, Checkpoint("1step")])) == 143
    result = train(job, tmp_path / "cut", resume="auto")
    assert_goes_on_as(result, expected, batches=batches)
    assert [e for e in result.events if e[0] == "validated"] == [e for e in expected.events if e[0] == "validated"]
    assert logged_by(tmp_path / "cut") == logged_by(tmp_path / "whole")


def test_signals_do_not_pile_up_checkpoints(tmp_path: Path) -> None:
    """A run that is preempted again and again keeps as many checkpoints as one that is not, and the one it resumed from."""
    job = Job(epochs=3)
    for batch in (3, 8, 12, 17, 21):
        ask = At("on_train_batch_start", batch, send("SIGUSR1"))
        assert code_of(lambda ask=ask: train(job, tmp_path, resume="auto", callbacks=[ask])) == 75
        assert len(set(steps_saved(tmp_path))) <= 2
    train(job, tmp_path, resume="auto")
    assert steps_saved(tmp_path)[-1] == 33
    assert len(set(steps_saved(tmp_path))) <= 2


def test_a_fast_dev_run_that_is_told_to_end_writes_nothing(tmp_path: Path) -> None:
    ask = At("on_train_batch_start", 1, send("SIGTERM"))
    assert code_of(lambda: train(Job(), tmp_path, callbacks=[ask], fast_dev_run=3)) == 143
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_an_evaluation_of_its_own_leaves_too(what: str, tmp_path: Path) -> None:
    """There is nothing to save, and the code is the signal's."""
    ends: list[int] = []

    class Evaluated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            ends.append(batch_idx)
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        test_step = predict_step = validation_step

    trainer = trainer_for(Job(), tmp_path)
    module = Evaluated(Job(), Ledger(None))
    assert code_of(lambda: getattr(trainer, what)(module, loaders(Job())[1])) == 143
    assert ends == [0, 1]  # of three batches


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_the_second_signal_acts_at_once(name: str, code: int, tmp_path: Path) -> None:
    """The step takes ten seconds; what was saved before stays whole."""
    given = {"root": str(tmp_path), "job": {"step_s": 0.0, "fail_at": None}, "options": {"val_check_interval": 4}}
    given["job"] = {"validation_s": 10.0}
    given["options"]["num_sanity_val_steps"] = 0
    run = Started(given)
    try:
        run.wait_until(lambda: run.trained() >= 4)
        time.sleep(0.2)  # now it validates
        os.kill(run.pid, getattr(signal, name))
        time.sleep(0.7)  # two signals within half a second are one Ctrl-C that came twice
        assert run.poll() is None, run.output()
        os.kill(run.pid, getattr(signal, name))
        assert run.wait(5) == code, run.output()
    finally:
        run.kill()
    info = CheckpointStore(newest_run(tmp_path) / "checkpoints").latest()
    assert info is not None
    assert info.step == 3


# -- several ranks ----------------------------------------------------------------------------------------------------
def leave_together(root: Path, name: str, hook: str, job: Job, batches: int) -> tuple[int, int, int]:
    """On the last rank a signal comes; return the code, the step that was saved, and the batches trained on."""
    rank = int(os.environ["WORLD_SIZE"]) - 1
    ask = At(hook, batches, send(name) if name != "stop" else lambda trainer: trainer.stop("enough"), rank)
    recorded: dict[str, Any] = {}

    class Last(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            recorded.update(step=trainer.progress.global_step, batches=trainer.progress.batches)

    code = code_of(lambda: train(job, root / "cut", callbacks=[ask, Last()]))
    done = recorded["batches"]
    longer = replace(job, step_s=0.0)
    expected = train(longer, root / "whole", max_steps=recorded["step"] + 3)
    result = train(longer, root / "cut", resume="auto", max_steps=recorded["step"] + 3)
    assert result.progress == expected.progress
    assert result.losses == {b: loss for b, loss in expected.losses.items() if b > done}
    return code, progress_in(root / "cut")["global_step"], recorded["step"]


@pytest.mark.parametrize(
    ("count", "name", "hook"),
    [
        (2, "SIGTERM", "on_before_backward"),
        (2, "SIGUSR1", "on_validation_batch_end"),
        (2, "stop", "on_train_batch_start"),
        pytest.param(4, "SIGINT", "on_after_backward", marks=pytest.mark.slow),
    ],
)
def test_whichever_rank_is_told_all_leave_at_the_same_step(count: int, name: str, hook: str, ranks: Any, tmp_path: Path) -> None:
    job = Job(epochs=200, samples=24, batch_size=3, step_s=0.02, validate="validation" in hook)
    results = ranks(count, leave_together, tmp_path, name, hook, job, 5, timeout=60)
    assert len({step for _, _, step in results}) == 1
    assert {code for code, _, _ in results} == {CODES.get(name, 0)}
    assert logged_by(tmp_path / "cut") == logged_by(tmp_path / "whole")


def two_ranks(root: Path, **job: Any) -> dict[str, Any]:
    return {"root": str(root), "every": "2step", "job": {"epochs": 2, "step_s": 0.1, **job}, "options": {"devices": 2}}


def is_told(given: dict[str, Any], to: str, name: str) -> None:
    """Start the script and send a signal to the process that the user started, or to one of its ranks."""
    run = Started(given, script=True)
    try:
        run.wait_until(lambda: run.trained() >= 2 and len(run.ranks()) == 2)
        assert run.poll() is None, run.output()
        os.kill(run.pid if to == "agent" else run.ranks()[int(to[-1])], getattr(signal, name))
        assert run.wait(30) == CODES[name], run.output()
    finally:
        run.kill()
    root = Path(given["root"])
    assert progress_in(root)["batches"] == run.trained()  # nothing was trained that was not saved
    assert (newest_run(root) / "logs" / "rank1.log").exists()


def fails(given: dict[str, Any], batch: int) -> None:
    """Start the script, of which a rank fails: all end within seconds, and the error is said last and once."""
    run = Started({**given, "job": {**given["job"], "fail_at": [batch, 1]}}, script=True)
    try:
        run.wait_until(lambda: run.last_batch() >= batch)
        began = time.monotonic()
        assert run.wait(30) == 1, run.output()
        assert time.monotonic() - began < 10
        pids = run.ranks().values()
    finally:
        run.kill()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    said = run.output().rstrip().splitlines()
    assert sum("ValueError: the step fails here" in line for line in said) == 1, run.output()
    assert any("ValueError: the step fails here" in line for line in said[-2:]), run.output()
    info = CheckpointStore(newest_run(Path(given["root"])) / "checkpoints").latest()
    assert info is not None
    assert not info.notes


def goes_on_to_its_end(given: dict[str, Any], ranks: Any) -> None:
    root = Path(given["root"])
    ranks(2, main, {**given, "options": {}, "job": {**given["job"], "step_s": 0.0}})
    assert_each_sample_once(root, Job(epochs=2))
    assert [step for step, _, metrics in logged_by(root) if "train_loss_step" in metrics] == list(range(1, 13))
    assert result_of(root)["progress"]["global_step"] == 12


def test_a_script_on_two_ranks_is_told_to_end_then_fails_then_ends_well(ranks: Any, tmp_path: Path) -> None:
    """SIGTERM to what the user started; resumed, an error on one rank; resumed, it comes to its end with nothing lost."""
    given = two_ranks(tmp_path)
    is_told(given, "agent", "SIGTERM")
    fails(given, 9)
    goes_on_to_its_end(given, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "name"), [("rank 1", "SIGTERM"), ("agent", "SIGINT"), ("agent", "SIGUSR1"), ("rank 0", "SIGUSR1")]
)
def test_a_script_on_two_ranks_is_told_in_every_way(to: str, name: str, ranks: Any, tmp_path: Path) -> None:
    given = two_ranks(tmp_path)
    is_told(given, to, name)
    goes_on_to_its_end(given, ranks)
