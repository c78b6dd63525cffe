"""The one channel through which ranks agree to stop, save or leave.

A rank that gets a signal, hits a time limit or calls `stop` only sets a flag: `request`. All ranks call `tick` at every
optimizer step. When one is due it
    reads the all-reduce started one interval ago -> the code that all ranks now act on, at the same step
    starts the next one, asynchronously, with this rank's flags and its time per step (the slowest rank's counts)
    sets the next step that is due: about a second away, 1 to 50 steps
so a request is obeyed one to two seconds later, and a tick that is not due costs one call and one comparison.
Read `tick` and `_due` first. Everything runs in the calling thread: collectives of one group from two threads deadlock.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .collectives import gather_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

# The flags of a code. Several may be set at once: SIGTERM is STOP | SAVE | TERMINATED.
STOP = 1  # leave the loop after this step
SAVE = 2  # save a checkpoint after this step
INTERRUPTED = 4  # Ctrl-C: leave with exit code 130
TERMINATED = 8  # SIGTERM: leave with exit code 143
REQUEUE = 16  # time limit or SIGUSR1: leave with exit code 75
TRIGGER = 32  # Accelerator.set_trigger
SAVE_FAILED = 64  # a checkpoint could not be written beside the training: raise that error

_BITS = 16
_SECONDS_BETWEEN = 1.0
_MAX_STEPS_BETWEEN = 50
_NEVER = 1 << 62  # larger than any step, so that the first tick is due
_UNMEASURED = 0  # no step was timed yet: ask again at the next one


class Control:
    """Requests of this rank, and what all ranks agreed on. One per World."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """`group`: a gloo group used by nothing that runs in another thread; None when there is one rank."""
        self.requested = 0  # this rank's open requests, as flags; a plain attribute, cheap to look at
        self.reason = ""  # who asked for the code that was agreed last, and why: "rank 1: SIGTERM"
        # The truth behind `requested`: a signal handler may run between any two lines below, and appending is atomic.
        self._inbox: deque[tuple[int, str]] = deque()
        self._group = group
        self._pending: Work | None = None
        self._buffer = torch.zeros(_BITS + 1, dtype=torch.int64)
        self._delivered = 0  # agreed by `agree` since the pending all-reduce started: not to be obeyed twice
        self._next = 0
        self._last_step = _NEVER
        self._last_time = 0.0

    def request(self, code: int, reason: str = "") -> None:
        """Ask all ranks to act on `code` (flags of this module). Safe in a signal handler: it only notes the wish."""
        _check_code(code)
        self._inbox.append((code, reason))
        self.requested |= code

    def tick(self, step: int) -> int:
        """Return the code that all ranks agreed on, 0 to go on. Every rank calls it once per optimizer step.

        Args:
            step: the same number on all ranks; it may start anew (a second fit).

        The code comes back non-zero at the same step on every rank; it has then been taken: the next tick starts afresh.
        """
        if self._last_step < step < self._next:
            return 0
        return self._due(step)

    def agree(self, code: int) -> int:
        """Return the union of the flags that any rank passed, at once: all ranks call it together, and wait for each other.

        For epoch ends and the like. What was agreed on is taken from the requests, as by `tick`.
        """
        _check_code(code)
        if self._group is None:
            return self._deliver(code)
        buffer = _flags(code)
        dist.all_reduce(buffer, dist.ReduceOp.MAX, group=self._group)
        agreed = _code(buffer.tolist())
        if self._pending is not None:
            self._delivered |= agreed
        return self._deliver(agreed)

    def stop(self) -> None:
        """Forget an all-reduce that is still under way; nothing is waited for, since the other ranks may be gone."""
        self._pending = None
        self._group = None

    def _due(self, step: int) -> int:
        if self._group is None:
            return self._deliver(self.requested)
        now = time.monotonic()
        agreed, interval = 0, 1
        if self._pending is not None:
            self._pending.wait()
            *flags, microseconds = self._buffer.tolist()
            agreed = _code(flags) & ~self._delivered
            if microseconds > _UNMEASURED:
                interval = max(1, min(_MAX_STEPS_BETWEEN, int(_SECONDS_BETWEEN * 1e6 / microseconds)))
        self._delivered = 0
        self._pending = None
        code = self._deliver(agreed)
        steps = 0 if self._last_step == _NEVER else step - self._last_step
        # An all-reduce is started also when a code was agreed on: the other ranks do the same, and a save is no end.
        self._buffer[:_BITS] = _flags(self._open_requests())
        self._buffer[_BITS] = max(1, int((now - self._last_time) * 1e6 / steps)) if steps > 0 else _UNMEASURED
        self._pending = dist.all_reduce(self._buffer, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._next = step + interval
        self._last_step = step
        self._last_time = now
        return code

    def _deliver(self, agreed: int) -> int:
        """Take `agreed` out of the requests and note its reason; on all ranks alike, since the reasons are gathered."""
        if agreed == 0:
            return 0
        reasons = []
        for _ in range(len(self._inbox)):
            code, reason = self._inbox.popleft()
            if code & agreed and reason:
                reasons.append(reason)
            if code & ~agreed:
                self._inbox.append((code & ~agreed, reason))
        self._open_requests()
        mine = ", ".join(dict.fromkeys(reasons))
        if self._group is None:
            self.reason = mine
        else:
            every = gather_json(mine, self._group)
            self.reason = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(every) if text)
        return agreed

    def _open_requests(self) -> int:
        """Recompute `requested` from the inbox; a handler that runs meanwhile is not lost, the inbox has grown then."""
        while True:
            count = len(self._inbox)
            requested = 0
            for code, _ in tuple(self._inbox):
                requested |= code
            self.requested = requested
            if len(self._inbox) == count:
                return requested


def _check_code(code: int) -> None:
    if not 0 <= code < 1 << _BITS:
        raise ValueError(f"A control code is a sum of flags from 0 to {(1 << _BITS) - 1}, got {code}. Use STOP, SAVE, ...")


def _flags(code: int) -> torch.Tensor:
    """Spread a code over a tensor of 0 and 1, so that the maximum over ranks is the union of flags (gloo has no BOR)."""
    return torch.tensor([code >> bit & 1 for bit in range(_BITS)])


def _code(flags: list[int]) -> int:
    return sum(1 << bit for bit, flag in enumerate(flags[:_BITS]) if flag)
