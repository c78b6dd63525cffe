"""The fixture `ranks` itself: results in order, errors with their rank, hung ranks killed and shown, nobody left."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def identity() -> tuple[str, ...]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    return tuple(os.environ[name] for name in names)


def reduce_on_a_group(factor: float) -> tuple[bool, list[float]]:
    before = dist.is_initialized()
    dist.init_process_group("gloo")
    tensor = torch.full((3,), factor * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return before, tensor.tolist()


def fail_on(rank: int, error: BaseException, after_s: float = 0.0) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(after_s)
        raise error
    time.sleep(30)


def hang_on(rank: int, pids: Path) -> str:
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    if int(os.environ["RANK"]) == rank:
        a_line_that_never_ends()
    return "done"


def a_line_that_never_ends() -> None:
    time.sleep(1000)


def alive(pid: int) -> bool:
    """Whether there is such a process; a zombie that its parent has not collected yet is not one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_in_order_of_rank_and_each_rank_knows_who_it_is(ranks: Any) -> None:
    assert ranks(3, identity) == [(str(r), str(r), "3", "3", "127.0.0.1", "1") for r in range(3)]
    assert "RANK" not in os.environ


def test_no_group_is_there_before_and_collectives_work_after_it_is_made(ranks: Any) -> None:
    assert ranks(2, reduce_on_a_group, factor=2.0) == [(False, [6.0] * 3)] * 2
    assert not dist.is_initialized()


def test_one_rank_works_too_and_closures_are_fine(ranks: Any) -> None:
    here = os.getpid()
    assert ranks(1, lambda: os.getpid() != here) == [True]


def test_tensors_come_back_by_value(ranks: Any) -> None:
    """Through multiprocessing queues they got lost when the sender ended first."""
    a, b = ranks(2, lambda: torch.arange(300_000) + int(os.environ["RANK"]))
    assert torch.equal(a, torch.arange(300_000))
    assert torch.equal(b, a + 1)


def test_every_rank_draws_from_the_same_seed_whatever_ran_before(ranks: Any) -> None:
    torch.rand(7)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    assert ranks(2, lambda: torch.rand(3).tolist()) == [expected] * 2


def test_an_error_keeps_its_type_and_names_its_rank_and_line(ranks: Any) -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="by nought") as caught:
        ranks(2, fail_on, 1, ZeroDivisionError("by nought"))
    assert caught.value.__notes__ == ["raised on rank 1 of 2"]
    assert "[rank 1/2]" in str(caught.value.__cause__)
    assert "in fail_on" in str(caught.value.__cause__)
    assert time.monotonic() - start < 25, "the rank that had not failed was waited for"


def test_the_rank_that_failed_first_is_the_one_named(ranks: Any) -> None:
    def fail_one_after_the_other() -> None:
        rank = int(os.environ["RANK"])
        time.sleep(0.2 * (1 - rank))
        raise KeyError(rank)

    with pytest.raises(KeyError) as caught:
        ranks(2, fail_one_after_the_other)
    assert caught.value.args == (1,)
    assert "failed after it" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_pickled_still_shows_its_text(ranks: Any) -> None:
    class Local(Exception):
        pass

    with pytest.raises(RuntimeError, match=r"(?s)rank 0/2.*Local: only here"):
        ranks(2, fail_on, 0, Local("only here"))


def test_a_result_that_cannot_be_pickled_is_an_error(ranks: Any) -> None:
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        ranks(1, lambda: lambda: 0)


def test_a_killed_rank_is_named_with_its_signal(ranks: Any) -> None:
    def kill_rank_one() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    with pytest.raises(RuntimeError, match="rank 1 died without a word: signal SIGKILL"):
        ranks(2, kill_rank_one)


def test_interrupting_a_rank_does_not_interrupt_pytest(ranks: Any) -> None:
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        ranks(1, fail_on, 0, KeyboardInterrupt())


def test_a_hung_rank_is_killed_and_its_stack_is_shown(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[1\] of 2 did not return within 2 s") as caught:
        ranks(2, hang_on, 1, tmp_path, timeout=2)
    assert "in a_line_that_never_ends" in str(caught.value)
    assert not any(alive(int(file.read_text())) for file in tmp_path.iterdir())


def test_a_rank_that_hangs_in_a_collective_shows_where(ranks: Any) -> None:
    """The main thread sits in C++ there: only a handler that needs no interpreter lock gets through."""

    def wait_for_nobody() -> None:
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            dist.barrier()

    with pytest.raises(TimeoutError, match="in wait_for_nobody"):
        ranks(2, wait_for_nobody, timeout=3)


def test_a_rank_that_returned_but_cannot_end_is_shown_and_killed(ranks: Any) -> None:
    def leave_a_thread() -> None:
        threading.Thread(target=a_line_that_never_ends).start()

    with pytest.raises(TimeoutError, match=r"(?s)returned, but did not end.*in a_line_that_never_ends"):
        ranks(1, leave_a_thread, timeout=2)


def test_what_a_rank_started_does_not_outlive_it(ranks: Any, tmp_path: Path) -> None:
    def leave_a_child_behind() -> None:
        import subprocess

        child = subprocess.Popen(["sleep", "1000"])
        (tmp_path / "pid").write_text(str(child.pid))
        child.returncode = 0  # or Popen's destructor warns of it

    ranks(1, leave_a_child_behind)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_warning_on_a_rank_is_an_error_as_in_any_test(ranks: Any) -> None:
    with pytest.raises(UserWarning, match="careful"):
        ranks(1, lambda: warnings.warn("careful", stacklevel=1))


def test_a_rank_may_use_loader_workers(ranks: Any) -> None:
    def read() -> list[int]:
        loader = torch.utils.data.DataLoader(range(8), batch_size=4, num_workers=2)  # pyright: ignore[reportArgumentType]
        return torch.cat(list(loader)).tolist()

    assert ranks(2, read) == [list(range(8))] * 2
