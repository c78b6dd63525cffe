"""The agent: starts the ranks of one node, watches them, and ends with the code of the first that failed.

    one rank fails -> 0.5 s for the others to say what they met -> SIGTERM -> 2 s -> SIGKILL -> the first error, last and once
    Ctrl-C, SIGTERM, SIGUSR1 to the agent -> handed on to every rank, once; a second Ctrl-C or SIGTERM kills
    the agent dies, even by SIGKILL -> the kernel kills the ranks
Rank 0 writes to the screen, the others into files, which are shown only when something failed. Every rank is the head of a
process group of its own: a Ctrl-C of the terminal reaches only the agent, and a rank is killed together with its workers.
With several nodes an agent runs on each (`Nodes`); the ranks meet at the first node's address, and it is they who notice when
another node fails or is lost (strategies/node_watch.py): each agent only ends its own ranks.
Why not torch's elastic agent: it replaces the workers' exit codes, listens on every interface, and takes 3 to 5 s to end.
Read `supervise` first. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from ...strategies.environment import LOOPBACK
from ...strategies.errors import ConfigError
from .report import AGAIN, DONE, FAILED, INTERRUPTED, TERMINATED, ErrorReport, read_report

_POLL_S = 0.05
_SETTLE_S = 0.5
_TERM_TO_KILL_S = 2.0
# Ranks that leave on purpose do so together, but one may still be writing when another has gone.
_LEAVE_TOGETHER_S = 60.0
_ON_PURPOSE = (DONE, AGAIN, INTERRUPTED, TERMINATED)
_FORWARDED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
_TAIL_LINES = 30


class RankProcess(Protocol):
    """What the agent needs of a process: `subprocess.Popen` and `multiprocessing.Process` are made to fit."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


@dataclass
class Rank:
    """One started rank. `code` is None while it runs, then its exit code, or minus the signal that killed it."""

    rank: int
    process: RankProcess
    error_file: Path
    log_file: Path | None
    code: int | None = None
    ended: float = 0.0  # time.time(), comparable with ErrorReport.time
    size: int = 0  # of all nodes together; 0: as many as there are here


@dataclass(frozen=True)
class Ended:
    """How it all ended: the code for the shell, and the first failure, if there was one."""

    code: int
    failure: ErrorReport | None = None
    stopped_by: str = ""  # the signal that was handed on
    alike: bool = False  # all ranks failed with the same words


@dataclass(frozen=True)
class Nodes:
    """Where this node stands among those that run the same command: `drivetrain run --nnodes 2 --node-rank 1 ...`."""

    count: int = 1
    rank: int = 0
    address: str = LOOPBACK  # of node 0
    port: int = 0  # 0, with one node: a free one

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: see there.
        """
        if self.count < 1:
            raise ConfigError(f"--nnodes {self.count}: expected 1 or more machines.")
        if self.count == 1:
            return
        if not self.address:
            raise ConfigError(
                f"--nnodes {self.count} needs --master-addr, the address of node 0 as the other machines reach it: the ranks "
                "meet there. Give the same one on every machine."
            )
        if not 0 <= self.rank < self.count:
            met = "needs --node-rank" if self.rank < 0 else f"--node-rank {self.rank}"
            raise ConfigError(
                f"--nnodes {self.count} {met}: expected a number from 0 to {self.count - 1}, another one on each machine; 0 on "
                "the one with --master-addr."
            )
        if not 0 < self.port < 65536:
            raise ConfigError(f"--master-port {self.port}: expected a port from 1 to 65535 that is free on node 0.")


@dataclass
class Signals:
    """What the agent itself was told, counted by its handlers."""

    received: list[int] = field(default_factory=list)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the loop of `supervise` acts on it within `_POLL_S`."""
        self.received.append(number)


def run_command(
    command: Sequence[str],
    *,
    ranks: int,
    python: Sequence[str] = (),
    logs: Path | None = None,
    environ: Mapping[str, str] | None = None,
    nodes: Nodes = Nodes(),
) -> int:
    """Run `script.py args...` or `-m module args...` on `ranks` processes of this machine; return the exit code.

    Args:
        nodes: where they stand when other machines run the same, with as many ranks each.
        python: options of the interpreter, such as `-X dev`.
        logs: folder for the output of ranks above 0; by default a temporary one, kept only when a rank failed.
    """
    if logs is not None:
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--logs {logs}: this folder cannot be made: {error}. Name another one.") from error
    _open_standard_streams()
    folder = Path(tempfile.mkdtemp(prefix="drivetrain-"))
    started: list[Rank] = []
    try:
        with forwarding_signals() as signals:
            # With several nodes rank 0 itself listens, at an address that others reach.
            with listening_socket() if nodes.count == 1 else contextlib.nullcontext() as listener:
                for rank in range(ranks):
                    started.append(_spawn(command, python, rank, ranks, nodes, listener, folder, logs, environ or os.environ))
            ended = supervise(started, signals=signals)
        if ended.code:
            kill_all(started)  # DataLoader workers of ranks that were killed
        return _tell(ended, started, folder, keep=logs is None, size=ranks * nodes.count)
    except BaseException:
        kill_all(started)
        raise
    finally:
        if not folder.joinpath("kept").exists():
            shutil.rmtree(folder, ignore_errors=True)


def supervise(ranks: list[Rank], *, signals: Signals | None = None, drain: Callable[[], None] | None = None) -> Ended:
    """Wait until all ranks have ended, ending them all when one fails or the user insists.

    Args:
        signals: what the agent is told meanwhile; handed on.
        drain: called at every turn, to empty pipes.
    """
    told = signals or Signals()
    handled = 0
    stopped_by = 0
    killed = False
    failed_at = terminated_at = left_at = 0.0
    while True:
        if drain is not None:
            drain()
        running = _collect(ranks)
        now = time.monotonic()
        if not running:
            return _verdict(ranks, stopped_by, killed)
        while handled < len(told.received):
            number = told.received[handled]
            handled += 1
            if number in (signal.SIGINT, signal.SIGTERM) and number in told.received[: handled - 1]:
                killed = True
                kill_all(ranks)
            else:
                handed_on = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
                stopped_by = handed_on if handed_on != signal.SIGUSR1 else stopped_by
                _signal(running, handed_on)
        if not failed_at and any(_has_failed(rank, stopped_by) for rank in ranks):
            failed_at = now
        if not left_at and any(rank.code not in (None, DONE) for rank in ranks):
            left_at = now
        if not failed_at and left_at and now - left_at > _LEAVE_TOGETHER_S:
            failed_at = now
        if failed_at and not terminated_at and now - failed_at > _SETTLE_S:
            terminated_at = now
            _signal(running, signal.SIGTERM)
        if terminated_at and now - terminated_at > _TERM_TO_KILL_S:
            kill_all(ranks)
        time.sleep(_POLL_S)


def rank_variables(
    local_rank: int,
    local_size: int,
    port: int,
    error_file: Path,
    log_file: Path | None,
    nodes: Nodes = Nodes(),
) -> dict[str, str]:
    """Return the environment of one rank on this machine: torchrun's variables and ours."""
    variables = {
        "RANK": str(nodes.rank * local_size + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(nodes.count * local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "GROUP_RANK": str(nodes.rank),
        "MASTER_ADDR": nodes.address,
        "MASTER_PORT": str(port),
        "DRIVETRAIN_AGENT_PID": str(os.getpid()),
        "DRIVETRAIN_ERROR_FILE": str(error_file),
    }
    if log_file is not None:
        variables["DRIVETRAIN_LOG_FILE"] = str(log_file)
    return variables


def threads_per_rank(ranks: int) -> int:
    """Return how many CPU threads each rank gets: the machine's divided, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks) if hasattr(os, "sched_getaffinity") else 1


@contextlib.contextmanager
def listening_socket() -> Iterator[socket.socket]:
    """Open the socket at which the ranks will meet: on loopback, a free port, already listening, so that nobody can take it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(512)
        yield listener


@contextlib.contextmanager
def forwarding_signals() -> Iterator[Signals]:
    """Note signals instead of dying of them, and put the old handlers back. Outside the main thread: nothing is changed."""
    signals = Signals()
    old: dict[int, signal._HANDLER] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _FORWARDED:
            number = getattr(signal, name, None)
            # What is ignored stays ignored: nohup.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                old[number] = signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def reset_signals() -> None:
    """Give a forked process the handlers of a fresh one, instead of the agent's."""
    for name in _FORWARDED:
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def kill_all(ranks: Sequence[Rank]) -> None:
    """Kill what is left of every rank, its workers included, and wait for the ranks themselves."""
    for rank in ranks:
        # The group also of a rank that has ended: it lives on while a worker does.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        if rank.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while _collect(list(ranks)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _spawn(
    command: Sequence[str],
    python: Sequence[str],
    local_rank: int,
    local_size: int,
    nodes: Nodes,
    listener: socket.socket | None,
    folder: Path,
    logs: Path | None,
    environ: Mapping[str, str],
) -> Rank:
    rank = nodes.rank * local_size + local_rank
    error_file = folder / f"error{rank}.json"
    log_file = (logs or folder) / f"rank{rank}.log" if local_rank else None
    port = nodes.port if listener is None else listener.getsockname()[1]
    # What a launcher above this one (torchrun, an MPI) said of its own ranks is not about ours.
    inherited = {name: value for name, value in environ.items() if not name.startswith("TORCHELASTIC_")}
    variables = {**inherited, **rank_variables(local_rank, local_size, port, error_file, log_file, nodes)}
    variables.setdefault("OMP_NUM_THREADS", str(threads_per_rank(local_size)))
    passed: tuple[int, ...] = ()
    if listener is not None and local_rank == 0:
        # The same number in the child: pass_fds keeps it.
        passed = (listener.fileno(),)
        variables["DRIVETRAIN_LISTEN_FD"] = str(listener.fileno())
    # A rank that reads from the terminal in a process group of its own would be stopped by the kernel.
    reads = local_rank == 0 and not _is_terminal(sys.stdin)
    output = open(log_file, "ab") if log_file is not None else None  # noqa: SIM115
    try:
        process = subprocess.Popen(
            [sys.executable, *python, "-m", "drivetrain.trainer.launch.child", *command],
            env=variables,
            pass_fds=passed,
            process_group=0,
            stdin=None if reads else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    finally:
        if output is not None:
            output.close()
    return Rank(rank, process, error_file, log_file, size=nodes.count * local_size)


def _collect(ranks: list[Rank]) -> list[Rank]:
    """Note the codes of ranks that have ended; return those that still run."""
    for rank in ranks:
        if rank.code is None:
            rank.code = rank.process.poll()
            rank.ended = time.time()
    return [rank for rank in ranks if rank.code is None]


def _has_failed(rank: Rank, stopped_by: int) -> bool:
    if rank.code is None or rank.code > 0:
        failed = rank.error_file.exists() or (rank.code is not None and rank.code not in _ON_PURPOSE)
        told = read_report(rank.error_file)
        return failed and (told is None or told.exit_code not in _ON_PURPOSE)
    # A script that installs no handlers dies of the signal that we handed on: on purpose.
    return rank.code < 0 and -rank.code != stopped_by


def _verdict(ranks: list[Rank], stopped_by: int, killed: bool) -> Ended:
    by = signal.Signals(stopped_by).name if stopped_by else ""
    if killed:
        return Ended(128 + stopped_by, None, by)
    failures = []
    for rank in ranks:
        if not _has_failed(rank, stopped_by):
            continue
        told = read_report(rank.error_file) or ErrorReport(
            rank.rank,
            rank.size or len(ranks),
            _last_words(rank, rank.size or len(ranks)),
            _shell_code(rank),
            rank.ended,
            _was_ended_by_us(rank, ranks),
        )
        failures.append(told)
    if failures:
        first = min(failures, key=lambda told: (told.consequence, told.time))
        words = {told.text.replace(f"[rank {told.rank}/", "[rank ?/") for told in failures}
        # By their own ranks: two that name one on another node heard of the same error.
        alike = len(words) == 1 and len(failures) == len(ranks) == len({told.rank for told in failures})
        return Ended(first.exit_code or FAILED, failures[0] if alike else first, by, alike)
    # Nobody failed: the code of those that left on purpose; SIGTERM's wins over "start me again".
    codes = [_shell_code(rank) for rank in ranks]
    return Ended(max(codes), None, by)


def _was_ended_by_us(rank: Rank, ranks: list[Rank]) -> bool:
    """Did it die of our SIGTERM or SIGKILL after another one had failed by itself?"""
    others = [other for other in ranks if other is not rank and other.ended < rank.ended]
    return rank.code in (-signal.SIGTERM, -signal.SIGKILL) and bool(others)


def _shell_code(rank: Rank) -> int:
    code = rank.code or 0
    return 128 - code if code < 0 else code


def _last_words(rank: Rank, size: int) -> str:
    """Describe the end of a rank that wrote no error: what its log ends with, and how it died."""
    code = rank.code or 0
    prefix = f"[rank {rank.rank}/{size}] "
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ": by hand, or by the kernel because the machine had no memory left (see dmesg)"
        if -code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
            how += ": a crash in native code. python -X faulthandler shows where"
    else:
        how = f"ended with exit code {code} without an exception that reached the top"
    return f"{tail(rank.log_file)}{prefix}{how}."


def tail(log_file: Path | None) -> str:
    """Return the last lines of a log, each ended; empty when there is none."""
    if log_file is None or not log_file.exists():
        return ""
    lines = log_file.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    return "".join(f"{line}\n" for line in lines)


def _tell(ended: Ended, ranks: list[Rank], folder: Path, *, keep: bool, size: int) -> int:
    """Show the first failure, last on the screen and once; keep the other ranks' output when there is any."""
    if ended.failure is None:
        if ended.stopped_by and ended.code not in (DONE, AGAIN):
            _say(f"Stopped by {ended.stopped_by}.")
        return ended.code
    logs = [rank.log_file for rank in ranks if rank.log_file is not None and rank.log_file.exists()]
    logs = [log.resolve() for log in logs if log.stat().st_size]  # a rank may have moved its log to the run folder
    if logs:
        if keep and any(log.parent == folder.resolve() for log in logs):
            (folder / "kept").touch()
        _say(f"Output of the other ranks: {' '.join(str(log) for log in logs)}")
    if len(ranks) > 1:
        here = "" if size == len(ranks) else " of this node"
        first = f"All {len(ranks)} ranks{here}" if ended.alike else f"Rank {ended.failure.rank}"
        _say(f"{first} failed{':' if ended.alike else f' first, and all {len(ranks)}{here} were stopped:'}")
    _say(ended.failure.text)
    return ended.code


def _signal(ranks: list[Rank], number: signal.Signals) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid, number)


def _open_standard_streams() -> None:
    """Put the null device where stdin, stdout or stderr was closed: the next file opened, a socket, would be a rank's output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(descriptor, True)


def _is_terminal(stream: object) -> bool:
    try:
        return bool(stream.isatty())  # pyright: ignore[reportAttributeAccessIssue]
    except (AttributeError, ValueError):
        return True  # closed: nothing to read from


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
        sys.stdout.flush()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def check_ranks(ranks: int) -> None:
    """Refuse a number of processes that makes no sense.

    Raises:
        ConfigError: fewer than one.
    """
    if ranks < 1:
        raise ConfigError(f"{ranks} processes were asked for: expected 1 or more, or 'auto' for one per accelerator.")
