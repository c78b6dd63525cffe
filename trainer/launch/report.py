"""How a process ends: its exit code, what it says about its error, and where the agent finds that.

    an error reaches the top -> `report` -> the error file of the agent, if one started this process
                                         -> torchrun's error file, so that its summary names the cause
                                         -> else the screen
Errors of wrong use are one paragraph; DRIVETRAIN_TRACEBACK=1 shows the whole. Read `report` first. Imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import re
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from ...strategies.environment import debug_tracebacks, read_environment
from ...strategies.errors import DrivetrainError

DONE = 0
FAILED = 1
WRONG_USE = 2
CHECKPOINT_REFUSED = 3
AGAIN = 75  # saved, and wants to be started again (EX_TEMPFAIL)
INTERRUPTED = 130
TERMINATED = 143

# What a rank says when it only met the death of another one. From gloo, NCCL and the store.
_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|aborted) by peer|connection refused|broken pipe|socket closed|"
    r"remote process exited|nccl ?remote|ncclremoteerror|nccl communicator was aborted|recvvalue failed|"
    r"application timeout caused pair closure|store of rank 0 is gone",
    re.IGNORECASE,
)
_SAVE_S = 30.0
_ROOT = Path(__file__).resolve().parents[2]
# Whose frames are not the user's: ours (this may be a checkout, with the user's examples beside it) and Python's.
_NOT_USERS = (
    *(f"{_ROOT / name}{os.sep}" for name in ("trainer", "strategies", "callbacks")),
    os.path.dirname(os.__file__),
    "<frozen",
)


@dataclass(frozen=True)
class ErrorReport:
    """What a failing rank tells the agent, as JSON."""

    rank: int
    size: int
    text: str  # to be shown as it is
    exit_code: int
    time: float  # time.time() when it was reported; one machine, so comparable between ranks
    consequence: bool  # it only met the death of another rank


def exit_code(error: BaseException | None) -> int:
    """Return the code that a process ends with when `error` reached its top; 0 for None."""
    if error is None:
        return DONE
    if isinstance(error, DrivetrainError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        if error.code is None:
            return DONE
        return error.code & 0xFF if isinstance(error.code, int) else FAILED
    return FAILED


def is_consequence(error: BaseException) -> bool:
    """Did this rank fail only because another one had gone?"""
    if getattr(error, "met_elsewhere", False):
        return True
    seen: BaseException | None = error
    while seen is not None:
        if _CONSEQUENCE.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


def describe(error: BaseException, *, prefix: str = "") -> str:
    """Return what the user sees of an error: one paragraph when the error is ours, else the traceback. Ends without newline.

    Args:
        prefix: before the line that names the error: "[rank 1/2] ".
    """
    only = "".join(traceback.TracebackException.from_exception(error).format_exception_only()).rstrip("\n")
    if isinstance(error, DrivetrainError) and not debug_tracebacks():
        if prefix and str(error).startswith("[rank "):
            prefix = ""  # it names its rank itself
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        place = _place(error)
        where = f"{place}; " if place else ""
        return f"{prefix}{type(error).__name__}: {error}{notes} ({where}DRIVETRAIN_TRACEBACK=1 shows the traceback)"
    if isinstance(error, KeyboardInterrupt):
        return f"{prefix}KeyboardInterrupt"
    trace = _without_ours(error.__traceback__)
    if trace is None:  # it never came to the user's code: no such module, or the script cannot be parsed
        *where, last = only.split("\n")
        return "\n".join((*where, prefix + last))
    whole = "".join(traceback.format_exception(type(error), error, trace)).rstrip("\n")
    return whole[: -len(only)] + prefix + only if whole.endswith(only) else f"{prefix}{whole}"


def report(error: BaseException) -> int:
    """Tell the agent, or the screen, that `error` ended this process; return the exit code. Never raises."""
    code = exit_code(error)
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return code
    prefix, rank, size = _who()
    text = f"{prefix}{error.code}" if isinstance(error, SystemExit) else describe(error, prefix=prefix)
    consequence = is_consequence(error)
    # Where ranks on several nodes talk to each other: then the error of another one is known here, in its own words.
    node_watch = sys.modules.get("drivetrain.strategies.node_watch")
    cause = node_watch.news_of_all() if node_watch is not None and consequence else None
    if cause is not None and cause.rank != rank:
        code = cause.exit_code
    elif node_watch is not None and not consequence and code not in (AGAIN, INTERRUPTED, TERMINATED):
        node_watch.tell_all(text, code)
    path = os.environ.get("DRIVETRAIN_ERROR_FILE")
    if path:
        told = ErrorReport(rank, size, text, code, time.time(), consequence)
        if cause is not None:
            told = ErrorReport(cause.rank, size, cause.text, code, time.time(), False)
        try:
            write_report(Path(path), told)
        except OSError:
            _say(text)
        return code
    if prefix and consequence:
        lines = [line for line in (str(error) if cause is None else cause.text).splitlines() if line]
        who = "another rank had gone" if cause is None else f"rank {cause.rank} had failed"
        text = f"{prefix}stopped because {who}: {lines[-1] if lines else type(error).__name__}"
    elastic = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if elastic and "TORCHELASTIC_RUN_ID" in os.environ:
        # Its summary calls the earliest the root cause, in whole seconds and the lowest rank first where they are equal.
        timestamp = int(time.time()) + is_consequence(error)
        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(timestamp)}}
        with contextlib.suppress(OSError):
            Path(elastic).write_text(json.dumps({"message": message}))
    _say(text)
    return code


def report_and_exit(error: BaseException) -> NoReturn:
    """Report `error` and end the process at once with its code, after the `atexit` functions.

    At once: the interpreter's own shutdown waits for threads and destroys process groups, either of which may hang when
    another rank is gone.
    """
    end(report(error))


def finish_saves(code: int) -> None:
    """Wait for checkpoints that are being written beside the program, as Python's own end does, which `os._exit` leaves out.

    After an error at most `_SAVE_S` seconds: with a rank gone a save may never end. Then a folder that no one takes for a
    checkpoint is left of it.
    """
    background = sys.modules.get("drivetrain.strategies.checkpoint.background")
    if background is not None:  # else nothing was ever saved
        with contextlib.suppress(Exception):
            background.join_all(None if code == DONE else _SAVE_S)


def end(code: int) -> NoReturn:
    """Finish saves, run the `atexit` functions, flush, and leave with `code`, whatever other threads are still running."""
    finish_saves(code)
    with contextlib.suppress(BaseException):
        threading.Timer(5.0, os._exit, [code]).start()  # a function that hangs does not hold up the end
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(code)


def install_excepthook() -> None:
    """From now on an uncaught error of ours ends the script with one paragraph and its exit code, not with a traceback and 1.

    Only in a plain script: an excepthook that somebody else has set is left alone. A second call does nothing.
    """
    if sys.excepthook is sys.__excepthook__ and not hasattr(sys, "ps1"):
        sys.excepthook = _excepthook


def write_report(path: Path, told: ErrorReport) -> None:
    """Write the error file; whole or not at all, since the agent may read at any moment. A first error is kept."""
    if path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(told)))
    temporary.replace(path)


def read_report(path: Path) -> ErrorReport | None:
    """Read an error file; None when there is none."""
    try:
        return ErrorReport(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if threading.current_thread() is not threading.main_thread():
        # Some library's thread that only wants the error to be seen (multiprocessing's resource_sharer does so); nothing has
        # come to its end here. In a loader's worker whose trainer was killed it is about that, and there is nothing to say.
        if not _is_orphan():
            sys.__excepthook__(kind, error, trace)
        return
    if isinstance(sys.stderr, io.StringIO):
        # init_process_group puts a hook around this one, which collects what is written here and prints it afterwards. There is
        # no afterwards: this process ends.
        sys.stderr = sys.__stderr__
    launched = bool(_who()[0])
    if launched or isinstance(error, DrivetrainError):
        report_and_exit(error.with_traceback(trace))
    sys.__excepthook__(kind, error, trace)


def _is_orphan() -> bool:
    """Is this a process of `multiprocessing` whose parent has gone?"""
    process = sys.modules.get("multiprocessing.process")
    parent = process.parent_process() if process is not None else None
    return parent is not None and not parent.is_alive()


def _who() -> tuple[str, int, int]:
    """Return the prefix "[rank 1/2] " (empty when alone), the rank and the number of ranks."""
    try:
        env = read_environment()
    except DrivetrainError:
        return "", 0, 1
    return (f"[rank {env.rank}/{env.size}] " if env.size > 1 else ""), env.rank, env.size


def _place(error: BaseException) -> str:
    """Return `train.py:12 in main`: the last line of the user's own code on the way to the error."""
    user = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_USERS) and f"{os.sep}site-packages{os.sep}" not in frame.filename
    ]
    if not user:
        return ""
    return f"{os.path.basename(user[-1].filename)}:{user[-1].lineno} in {user[-1].name}"


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames that start the script: the user's own file comes first, as if it had been started alone."""
    own = trace
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not (file.startswith(os.path.dirname(__file__)) or file == "<frozen runpy>" or file.endswith("runpy.py")):
            break
        trace = trace.tb_next
    started_here = own is not None and own.tb_frame.f_code.co_filename == os.path.join(os.path.dirname(__file__), "child.py")
    return trace if trace is not None or started_here else own


def _say(text: str) -> None:
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
