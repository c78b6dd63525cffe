"""`launch(fn, devices=2)`: run a function on n processes of this machine and return what each returned.

For notebooks, interactive sessions, tests, and scripts that want results back. The processes are
    forked    normally: any function will do (closures, notebook cells), and a start costs milliseconds instead of the 2 s that
              `import torch` takes. Each gets one CPU thread: an OpenMP pool that this process has used does not survive a fork
              (tried: with set_num_threads(1) all is well, with 2 the child hangs in its first matrix product).
    spawned   where an accelerator was already used here, whose driver does not survive a fork, and where there is no fork:
              then the function must be importable.
Results and errors of one's own processes travel pickled, over a pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ...strategies.environment import read_environment
from ...strategies.errors import ConfigError, DistributedError
from .agent import Rank, check_ranks, forwarding_signals, kill_all, listening_socket, rank_variables, reset_signals, supervise
from .child import die_with_parent
from .report import exit_code, finish_saves, report

T = TypeVar("T")


class LaunchedProcess:
    """A `multiprocessing` process, as the agent wants to see it."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid

    def poll(self) -> int | None:
        """Return its exit code, minus the signal that killed it, or None while it runs."""
        return self._process.exitcode


def launch(fn: Callable[..., T], *args: Any, devices: int, method: str = "auto") -> list[T]:
    """Run `fn(*args)` on `devices` processes that know their rank; return their results in order of rank.

    Inside, `Trainer()`, `Accelerator()` and `World.start()` join the group by themselves. Rank 0 writes to the screen.

    Args:
        method: "fork", "spawn", or "auto" (see the module's docstring).
    Raises:
        whatever the first failing rank raised, with its rank and traceback as notes; the others are stopped then.
        DistributedError: a rank died without an exception, or its exception or result cannot be pickled.
        ConfigError: this process is itself one of several ranks, or `fn` cannot be sent to a spawned process.
        KeyboardInterrupt: Ctrl-C; the ranks got it too, and have ended.
    """
    check_ranks(devices)
    _check_alone()
    context = multiprocessing.get_context(_method(method, fn, args))
    folder = Path(tempfile.mkdtemp(prefix="drivetrain-"))
    ranks: list[Rank] = []
    pipes: list[Connection] = []
    answers: dict[int, bytes] = {}

    def drain() -> None:
        # A rank whose result is larger than a pipe holds could not end otherwise.
        for rank, pipe in enumerate(pipes):
            with contextlib.suppress(EOFError, OSError):
                if rank not in answers and pipe.poll():
                    answers[rank] = pipe.recv_bytes()

    try:
        with forwarding_signals() as signals:
            with listening_socket() as listener:
                for rank in range(devices):
                    ranks.append(_start(context, listener, folder, rank, devices, fn, args, pipes))
            ended = supervise(ranks, signals=signals, drain=drain)
        drain()
        if ended.stopped_by == signal.SIGINT.name and ended.failure is None:
            raise KeyboardInterrupt
        if ended.failure is not None:
            raise _error(ended.failure.rank, devices, answers, ended.failure.text)
        if ended.code:
            raise DistributedError(
                f"The {devices} processes ended with exit code {ended.code} ({ended.stopped_by or 'on purpose'})."
            )
        return [_result(rank, devices, answers) for rank in range(devices)]
    except BaseException:
        kill_all(ranks)
        raise
    finally:
        for pipe in pipes:
            pipe.close()
        shutil.rmtree(folder, ignore_errors=True)


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", fn))


def _check_alone() -> None:
    env = read_environment()
    if env.is_launched:
        raise ConfigError(
            f"launch() was called in rank {env.rank} of {env.size}, which would start {env.size} times as many processes. Call "
            "the function directly, or start the script as one process: `python script.py`."
        )
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        raise ConfigError(
            "launch() was called in a process that already has a process group. Call the function directly, or destroy it."
        )


def _method(method: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> str:
    if method not in ("auto", "fork", "spawn"):
        raise ConfigError(f"launch(method={method!r}): expected 'auto', 'fork' or 'spawn'.")
    can_fork = sys.platform == "linux" and not _accelerator_was_used()
    if method == "fork" and not can_fork:
        raise ConfigError(
            "launch(method='fork'): this process has used an accelerator, or this is not Linux. Use method='spawn'."
        )
    if method == "fork" or (method == "auto" and can_fork):
        return "fork"
    try:
        pickle.dumps((fn, args))
    except Exception as error:
        raise ConfigError(
            f"launch() must spawn its processes here, and {_name(fn)} or its arguments cannot be sent to them: {error}. "
            "Put the function at the top level of a file that can be imported."
        ) from error
    return "spawn"


def _accelerator_was_used() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return False
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    initialised = getattr(module, "is_initialized", None)
    return True if initialised is None else bool(initialised())


def _start(
    context: Any,
    listener: socket.socket,
    folder: Path,
    rank: int,
    size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    pipes: list[Connection],
) -> Rank:
    receiving, sending = context.Pipe(duplex=False)
    pipes.append(receiving)
    error_file = folder / f"error{rank}.json"
    log_file = folder / f"rank{rank}.log" if rank else None
    variables = rank_variables(rank, size, listener.getsockname()[1], error_file, log_file)
    process = context.Process(target=_rank_main, args=(variables, sending, listener if rank == 0 else None, fn, args))
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads; the module's docstring says why it is safe here.
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        process.start()
    with contextlib.suppress(OSError):
        os.setpgid(process.pid, process.pid)  # as the child does itself: whoever comes first
    sending.close()
    return Rank(rank, LaunchedProcess(process), error_file, log_file)


def _rank_main(
    variables: dict[str, str],
    answer: Connection,
    listener: socket.socket | None,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    reset_signals()
    os.environ.update(variables)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # the terminal's Ctrl-C is for the agent, which hands it on
    die_with_parent(int(variables["DRIVETRAIN_AGENT_PID"]))
    if listener is not None:
        os.environ["DRIVETRAIN_LISTEN_FD"] = str(listener.fileno())
    if "DRIVETRAIN_LOG_FILE" in variables:
        _redirect_output(variables["DRIVETRAIN_LOG_FILE"])
    import torch

    torch.set_num_threads(1)
    try:
        result = fn(*args)
        try:
            payload = pickle.dumps((True, result))
        except Exception as error:
            raise DistributedError(
                f"What {_name(fn)} returned cannot be sent back: {error}. Return plain data or tensors."
            ) from error
        answer.send_bytes(payload)
    except BaseException as error:
        code = report(error)
        with contextlib.suppress(Exception):
            answer.send_bytes(pickle.dumps((False, error)))
        _leave(code if not isinstance(error, SystemExit) else exit_code(error))
    _leave(0)


def _leave(code: int) -> NoReturn:
    # Not through the interpreter's shutdown: a fork holds the parent's `atexit` functions, which are not its own to run.
    finish_saves(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _redirect_output(path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        with contextlib.suppress(Exception):
            stream.flush()
        os.dup2(file, fd)
    os.close(file)
    # In a notebook or under pytest these are not files on 1 and 2 but objects of the parent's.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _error(rank: int, size: int, answers: dict[int, bytes], text: str) -> BaseException:
    """Return the rank's own exception with a note, or a DistributedError with its text when it cannot be rebuilt."""
    error: Any = None
    with contextlib.suppress(Exception):
        error = pickle.loads(answers[rank])[1]
    if not isinstance(error, Exception):
        return DistributedError(text)
    error.add_note(f"Raised on rank {rank} of {size}, which failed first:\n{text}")
    return error


def _result(rank: int, size: int, answers: dict[int, bytes]) -> Any:
    if rank not in answers:
        raise DistributedError(f"[rank {rank}/{size}] ended without a result: it called os._exit, or closed its files.")
    return pickle.loads(answers[rank])[1]
