"""This process and its end: signals become requests to all ranks, outcomes become exit codes.

    SIGTERM  -> save, leave, 143        SIGINT -> save, leave, 130        SIGUSR1 -> save, leave, 75 ("start me again")
The first signal only sets a flag (`Control.request`); the loop acts on it at a step's end, on all ranks at the same step.
The second SIGTERM or SIGINT acts at once. Use:
    with SignalHandlers(world.control):
        ... the loop, which asks world.control.tick(step) ...
    raise SystemExit(exit_code_of(code))
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from ..strategies.control import INTERRUPTED, REQUEUE, SAVE, STOP, TERMINATED, Control
from .launch import report
from .launch.report import end, exit_code, install_excepthook, report_and_exit

__all__ = [
    "SignalHandlers",
    "end",
    "exit_code",
    "exit_code_of",
    "install_excepthook",
    "move_output",
    "report_and_exit",
]

_FLAGS = {"SIGTERM": TERMINATED, "SIGINT": INTERRUPTED, "SIGUSR1": REQUEUE}
# A launcher and the terminal may both deliver one Ctrl-C; nobody presses it twice as fast.
_SAME_SIGNAL_S = 0.5


class SignalHandlers:
    """A context in which SIGTERM, SIGINT and SIGUSR1 ask all ranks to save and leave, through `control`.

    Leaving it puts the old handlers back. In another thread than the main one Python allows no handlers: then it does
    nothing (`installed` is False). A signal that is ignored when it begins (`nohup`) stays ignored. Contexts may be nested: the
    innermost rules.
    """

    def __init__(self, control: Control) -> None:
        self.control = control
        self.installed = False
        self._flags = dict(_FLAGS)
        self._old: dict[int, signal._HANDLER] = {}
        self._first: dict[int, float] = {}

    def __enter__(self) -> SignalHandlers:
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in self._flags:
            self._listen(name)
        self.installed = True
        return self

    def means(self, name: str, flag: int) -> None:
        """Let the signal `name` ask for `flag` (strategies/control.py) beside the save, until the context is left."""
        self._flags[name] = flag
        if self.installed:
            self._listen(name)

    def _listen(self, name: str) -> None:
        number = getattr(signal, name, None)  # Windows has no SIGUSR1
        if number is None or number in self._old:
            return
        old = signal.getsignal(number)
        # None: set by C code, which could not be put back.
        if old is signal.SIG_IGN or old is None:
            return
        self._old[number] = old
        signal.signal(number, self._handle)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old.clear()
        self.installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        first = self._first.setdefault(number, now)
        if first == now:
            self.control.request(STOP | SAVE | self._flags[name], name)
        elif number in (signal.SIGTERM, signal.SIGINT) and now - first > _SAME_SIGNAL_S:
            # A third one does not even wait for Python: the loop may hang in a driver.
            signal.signal(number, signal.SIG_DFL)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(report.TERMINATED)


def exit_code_of(code: int) -> int:
    """Return the exit code for what all ranks agreed on (`Control.tick`): 143, 130, 75, or 0 for an ordinary stop."""
    for flag, exit_with in ((TERMINATED, report.TERMINATED), (INTERRUPTED, report.INTERRUPTED), (REQUEUE, report.AGAIN)):
        if code & flag:
            return exit_with
    return report.DONE


def move_output(folder: Path, rank: int) -> Path | None:
    """Let this rank's output, which our agent sends to a temporary file, go to `folder/rank<rank>.log` from now on.

    What was written so far is copied. Does nothing (None) where the output goes to the screen: rank 0, other launchers.
    """
    told = os.environ.get("DRIVETRAIN_LOG_FILE")
    if told is None:
        return None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{rank}.log"
    with open(told, "rb") as old, open(path, "ab") as new:
        shutil.copyfileobj(old, new)
        os.dup2(new.fileno(), 1)
        os.dup2(new.fileno(), 2)
    os.unlink(told)
    os.symlink(path.resolve(), told)  # the agent shows its end when this rank dies without a word
    return path
