"""Signals become requests to all ranks; handlers are put back; outcomes have the exit codes of the design."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drivetrain.strategies.control import INTERRUPTED, REQUEUE, SAVE, STOP, TERMINATED, Control
from drivetrain.strategies.world import World
from drivetrain.trainer import process
from drivetrain.trainer.process import SignalHandlers, exit_code_of, move_output


@pytest.fixture(autouse=True)
def _handlers_are_those_of_before() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    ("number", "flag", "code"),
    [(signal.SIGTERM, TERMINATED, 143), (signal.SIGINT, INTERRUPTED, 130), (signal.SIGUSR1, REQUEUE, 75)],
)
def test_the_first_signal_asks_to_save_and_leave(number: signal.Signals, flag: int, code: int) -> None:
    control = Control()
    with SignalHandlers(control) as handlers:
        assert handlers.installed
        os.kill(os.getpid(), number)
        assert control.requested == STOP | SAVE | flag
    assert control.tick(1) == STOP | SAVE | flag
    assert control.reason == number.name
    assert exit_code_of(STOP | SAVE | flag) == code


def test_an_ordinary_stop_ends_with_0_and_sigterm_outranks_the_rest() -> None:
    assert exit_code_of(STOP | SAVE) == 0
    assert exit_code_of(STOP | TERMINATED | INTERRUPTED | REQUEUE) == 143


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_second_one_acts_at_once(
    number: signal.Signals, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_SAME_SIGNAL_S", 0.0)

    def twice() -> None:
        with SignalHandlers(Control()):
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            time.sleep(5)

    with pytest.raises(raised):
        twice()


def test_one_ctrl_c_delivered_by_terminal_and_launcher_counts_once() -> None:
    control = Control()
    with SignalHandlers(control):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert control.requested == STOP | SAVE | INTERRUPTED


def test_a_second_sigusr1_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SAME_SIGNAL_S", 0.0)
    with SignalHandlers(Control()):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)


def test_what_is_ignored_stays_ignored() -> None:
    """nohup, and a parent that shields its children."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        control = Control()
        with SignalHandlers(control):
            os.kill(os.getpid(), signal.SIGINT)
        assert control.requested == 0
    finally:
        signal.signal(signal.SIGINT, old)


def test_in_another_thread_nothing_is_installed() -> None:
    seen: list[bool] = []

    def job() -> None:
        with SignalHandlers(Control()) as handlers:
            seen.append(handlers.installed)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert seen == [False]


def stop_all_by_a_signal_to_one(victim: int) -> tuple[int, int, str]:
    world = World.start("cpu", timeout_s=30)
    with SignalHandlers(world.control):
        for step in range(1, 1000):
            time.sleep(0.01)
            if step == 20 and world.rank == victim:
                os.kill(os.getpid(), signal.SIGTERM)
            code = world.control.tick(step)
            if code:
                world.stop()
                return step, exit_code_of(code), world.control.reason
    raise AssertionError("nothing was agreed on")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_any_rank_stops_all_at_the_same_step(victim: int, ranks: Any) -> None:
    first, second = ranks(2, stop_all_by_a_signal_to_one, victim)
    assert first == second
    assert first[1:] == (143, f"rank {victim}: SIGTERM")


def write_and_move(folder: Path, told: Path) -> Path | None:
    os.environ["DRIVETRAIN_LOG_FILE"] = str(told)
    with open(told, "wb") as file:
        os.dup2(file.fileno(), 1)
    os.write(1, b"before\n")
    moved = move_output(folder, 1)
    os.write(1, b"after\n")
    return moved


def test_a_ranks_output_moves_to_the_run_folder_with_what_it_had_written(tmp_path: Path, ranks: Any) -> None:
    (moved,) = ranks(1, write_and_move, tmp_path / "logs", tmp_path / "told.log")
    assert moved == tmp_path / "logs" / "rank1.log"
    assert moved.read_text() == "before\nafter\n"
    assert (tmp_path / "told.log").read_text() == "before\nafter\n"
    assert move_output(tmp_path, 0) is None
