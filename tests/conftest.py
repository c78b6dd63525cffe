"""What every test can use: `ranks(n, fn)` runs a function on n real processes and returns what each of them returned.

    def test_the_mean_is_that_of_all_ranks(ranks) -> None:
        assert ranks(2, mean_of_ranks) == [0.5, 0.5]

The processes are forked from pytest, so `fn` may be any function, closures too, and starting one costs milliseconds.
Each has the variables that torchrun would set, and no process group yet (`World.start` makes it). How a call goes:
    fork n       -> each runs fn, writes its result to a file, waits for the others -> results in order of rank
    an exception -> 0.5 s for the others to say what they met -> all killed -> the first is raised here, with its rank
    a hung rank  -> faulthandler writes its stack, also when it hangs in C -> all killed -> TimeoutError with the stacks
No process outlives the call, DataLoader workers of a rank included.
"""

from __future__ import annotations

import os

# Before torch is imported: with one thread no OpenMP pool exists, and a process without a pool may be forked.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
# No test talks to a server, whatever the machine's user has configured.
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
os.environ.setdefault("MPLBACKEND", "Agg")

import contextlib
import ctypes
import faulthandler
import multiprocessing
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from nodes import nodes as nodes  # the fixture: several hosts in network namespaces

torch.set_num_threads(1)

T = TypeVar("T")
GRACE_S = 0.5
"""After the first failure the other ranks have this long to say what they met, before they are killed."""
LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_", "GROUP_", "ROLE_"),
    *("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_", "MV2_", "FLUX_"),
)
"""Variables by which some launcher tells a process its rank. Tests say themselves what they want, so these go."""
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background of a shell: Ctrl-C is a thing to test all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)

STACK_SIGNAL = signal.SIGRTMIN + 7 if sys.platform == "linux" else signal.SIGUSR2
"""Makes a rank write its stack. None of the signals that drivetrain itself listens to."""

for _name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
    del os.environ[_name]


class RankError(RuntimeError):
    """What happened on the ranks: the cause of the exception that `ranks` raises, or that exception itself."""


class Ranks(Protocol):
    """The type of the fixture `ranks`."""

    def __call__(self, n: int, fn: Callable[..., T], *args: Any, timeout: float = 60, **kwargs: Any) -> list[T]: ...


@pytest.fixture
def ranks() -> Ranks:
    """Run `fn(*args, **kwargs)` on n processes and return the n results in order of rank.

    `ranks(n, fn, *args, timeout=60, **kwargs)`; `timeout` is in seconds, for all of it.

    Results are pickled (tensors are copied by value). Each rank starts with the seed 0 and one thread; the warning
    filters of the test hold there too, so a warning is an error. An exception keeps its type if it can be pickled:
    `pytest.raises` sees it as if it came from `fn`.

    Raises:
        whatever the first failing rank raised; a note on it says which rank it was, its cause has the traceback.
        RankError: a rank died without a word (killed, `os._exit`), or returned something that cannot be pickled.
        TimeoutError: some rank was not done in time; the message has the stacks of those that were not.
    """
    return run_ranks


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """A test that leaves a default process group behind would change what the next one finds."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group behind: call World.stop() or dist.destroy_process_group()")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch finds no accelerator, and say so."""
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="waits for an accelerator: torch.accelerator.is_available() is False"))


@dataclass
class Outcome:
    """What one rank ended with: a value or an error."""

    rank: int
    when: float
    """time.monotonic() of the end, the same clock on all processes."""
    value: Any = None
    error: BaseException | None = None
    text: str = ""
    """The traceback, or what is known of a death."""


def run_ranks(n: int, fn: Callable[..., T], *args: Any, timeout: float = 60, **kwargs: Any) -> list[T]:
    """The body of the fixture `ranks`."""
    __tracebackhide__ = True
    # The first optimizer of a process imports torch._dynamo, in two to three seconds: once here, not in every rank of every test.
    import torch._dynamo  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    port = free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank_main, args=(rank, n, port, folder, fn, args, kwargs)) for rank in range(n)]
    outcomes: dict[int, Outcome] = {}
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of a fork beside threads. By its text, since the ranks inherit this filter.
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            for process in processes:
                process.start()
        deadline = time.monotonic() + timeout
        _collect(processes, outcomes, folder, deadline)
        failed = sorted((o for o in outcomes.values() if o.text), key=lambda o: o.when)
        if failed:
            raise _error_of(failed, n)
        hung = [rank for rank in range(n) if rank not in outcomes]
        if not hung:
            (folder / "release").touch()
            hung = _not_exited(processes, time.monotonic() + 2 * GRACE_S + max(0.0, deadline - time.monotonic()))
        if hung:
            raise TimeoutError(_stacks(processes, hung, outcomes, folder, timeout))
        return [outcomes[rank].value for rank in range(n)]
    finally:
        for process in processes:
            _kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(rank: int, n: int, port: int, folder: Path, fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """One rank's life. multiprocessing ends it with `os._exit`, so nothing of pytest's own runs when it goes."""
    os.setpgid(0, 0)  # so that one kill takes the rank's own children too
    _die_with_parent()
    # An open descriptor, never closed: the stack may be asked for when this function has already returned.
    faulthandler.register(STACK_SIGNAL, file=os.open(folder / f"stack{rank}", os.O_WRONLY | os.O_CREAT), all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), NODE_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(GLOO_SOCKET_IFNAME="lo" if sys.platform == "linux" else "lo0")
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    try:
        outcome = Outcome(rank, 0.0, value=fn(*args, **kwargs))
    except BaseException as error:
        outcome = Outcome(rank, 0.0, error=error, text=traceback.format_exc())
    outcome.when = time.monotonic()
    _write(outcome, folder)
    # Rank 0 serves the store, so it must not go while others still ask it. (Under torchrun the agent serves it.)
    while not (folder / "release").exists():
        time.sleep(0.005)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):  # what fn left open; its result is already known
        dist.destroy_process_group()


def _write(outcome: Outcome, folder: Path) -> None:
    rank = outcome.rank
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)  # some exceptions can be written and not read
    except Exception as error:
        why = f"what rank {rank} returned cannot be pickled: {type(error).__name__}: {error}"
        text = outcome.text or f"{why}\nReturn numbers, strings, lists, dictionaries, tensors."
        data = pickle.dumps(Outcome(rank, outcome.when, text=text))
    (folder / f"tmp{rank}").write_bytes(data)
    (folder / f"tmp{rank}").rename(folder / f"done{rank}")


def _collect(processes: list[Any], outcomes: dict[int, Outcome], folder: Path, deadline: float) -> None:
    """Fill `outcomes` until each rank has one, the time is over, or GRACE_S has passed since the first failure."""
    while len(outcomes) < len(processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if rank in outcomes:
                continue
            dead = not process.is_alive()  # asked first: what it wrote before it died is there now
            done = folder / f"done{rank}"
            if done.exists():
                outcomes[rank] = pickle.loads(done.read_bytes())
            elif dead:
                text = f"rank {rank} died without a word: {_how_it_died(process.exitcode)}"
                outcomes[rank] = Outcome(rank, time.monotonic(), text=text)
            if rank in outcomes and outcomes[rank].text:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.005)


def _how_it_died(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _error_of(failed: list[Outcome], n: int) -> BaseException:
    """The exception of the rank that failed first, with a note that names it; its cause shows what all of them met."""
    first = failed[0]
    text = "\n".join(f"[rank {o.rank}/{n}] {o.text.rstrip()}" for o in failed)
    # KeyboardInterrupt would end pytest; the control flow exceptions of pytest (skip, fail) are wanted as they are.
    if first.error is None or isinstance(first.error, KeyboardInterrupt | GeneratorExit):
        return RankError("\n" + text)
    error = first.error
    later = f"; rank(s) {[o.rank for o in failed[1:]]} failed after it" if failed[1:] else ""
    error.add_note(f"raised on rank {first.rank} of {n}{later}")
    error.__cause__ = RankError("\n" + text)
    return error


def _not_exited(processes: list[Any], deadline: float) -> list[int]:
    """Wait for the ends of the processes; return the ranks that are still there at the deadline."""
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [rank for rank, process in enumerate(processes) if process.is_alive()]


def _stacks(processes: list[Any], hung: list[int], outcomes: dict[int, Outcome], folder: Path, timeout: float) -> str:
    """Ask the hung ranks for their stacks and write the message."""
    for rank in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank].pid, STACK_SIGNAL)
    time.sleep(0.3)
    n = len(processes)
    what = f"did not return within {timeout:g} s"
    if any(rank in outcomes for rank in hung):
        what = "returned, but did not end (a thread or process that nobody stopped?)"
    parts = [f"rank(s) {hung} of {n} {what}; killed. Done: {sorted(set(outcomes) - set(hung))}."]
    for rank in hung:
        stack = (folder / f"stack{rank}").read_text() or "(none written)"
        parts.append(f"[rank {rank}/{n}] stack:\n{stack}")
    return "\n".join(parts)


def _kill(process: Any) -> None:
    """End the rank and everything that it started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join()
    process.close()


def _die_with_parent() -> None:
    """Linux: when pytest is killed, its ranks are too (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
