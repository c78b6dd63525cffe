"""Saves that go on beside the training: the step waits only while its state is copied.

    save(wait=False)   the save before is over (back-pressure) -> checks and division of the work, on the main thread
                       -> this rank's share is copied into `Staging`, memory that every save uses again
                       -> a thread writes it and commits it, by the same protocol as any save; the training goes on
There is one of these for a World, and one save under way in it, whatever folders they go to: so the copy exists once.

Ranks agree over a gloo group that nothing but these threads uses. Collectives of one group from two threads would take each
other's answers, so the control group is out. A group notices at once when a rank dies, and needs no file system on
which names appear in time: why it is not done through files, or by polling keys of the store at which the ranks met.

An error of the thread is raised by the next save, by `wait`, or at the end of the training; what nobody asked for is told at
the exit. The thread is no daemon: Python waits for it before the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import broadcast_json, gather_json
from .layout import CheckpointInfo
from .together import Ranks
from .writer import TensorFile, bytes_of, pieces

BLOCK = 64 * 2**20
"""Bytes of staging memory that are taken at a time: pinned memory comes in powers of two."""


class SaveHandle:
    """A save that is under way.

    Attributes:
        step: of the checkpoint;  failed: True once it is known that nothing was committed (a plain attribute, cheap to ask).
    """

    def __init__(self, step: int, on_failure: Callable[[], None] | None = None) -> None:
        self.step = step
        self.failed = False
        self.seen = False  # somebody was told of the failure
        self._info: CheckpointInfo | None = None
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._on_failure = on_failure

    @property
    def done(self) -> bool:
        """Whether it is over: committed or failed. Ranks may see it at different times."""
        return self._over.is_set()

    @property
    def path(self) -> Path | None:
        """Where the checkpoint lies; None until it is committed."""
        return self._info.path if self._info is not None else None

    def wait(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Return the committed checkpoint.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
            TimeoutError: it is not over after `timeout_s`.
        """
        if not self._over.wait(timeout_s):
            raise TimeoutError(f"The save of step {self.step} was not over after {timeout_s} s; it goes on.")
        if self._error is not None:
            self.seen = True
            _open_handles.discard(self)
            raise self._error
        assert self._info is not None
        return self._info

    def run(self, action: Callable[[], CheckpointInfo]) -> None:
        """Do the save in this thread; nothing is raised here."""
        try:
            self._info = action()
            _open_handles.discard(self)
        except BaseException as error:
            self._error = error
            self.failed = True
        self._over.set()
        if self.failed and self._on_failure is not None:
            self._on_failure()


class Staging:
    """Memory for one copy of what a rank writes, used again by every save. Pinned where the state is on an accelerator."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        return sum(len(block) for block in self._blocks)

    def take(self, file: TensorFile) -> list[memoryview]:
        """Copy the tensors of `file`; return the bytes of the whole file. They are valid until the next `take`."""
        devices = {tensor.device for tensor in file.tensors if tensor.device.type != "cpu"}
        self._grow(file.size - len(file.head) - self.num_bytes, pinned=bool(devices))
        index = at = 0
        for tensor in file.tensors:
            for piece in pieces(tensor):
                while len(piece):
                    block = self._blocks[index]
                    part = piece[: len(block) - at]
                    block[at : at + len(part)].copy_(part, non_blocking=True)
                    piece, at = piece[len(part) :], at + len(part)
                    if at == len(block):
                        index, at = index + 1, 0
        for device in devices:
            torch.accelerator.synchronize(device)
        used = self._blocks[:index] + ([self._blocks[index][:at]] if at else [])
        return [file.head, *(bytes_of(block) for block in used)]

    def _grow(self, missing: int, *, pinned: bool) -> None:
        while missing > 0:
            size = min(BLOCK, missing)
            self._blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
            missing -= size


class _GroupRanks:
    """The ranks of a world, talking over a group of their own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    def gather_json(self, value: Any) -> list[Any]:
        return gather_json(value, self.group)

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        return broadcast_json(value, src, self.group)


class Background:
    """The saves of one World that go on beside its training. `Background.of(world)` is the only one there is."""

    def __init__(self, world: Ranks) -> None:
        self.staging = Staging()
        self._ranks: Ranks | None = world if world.size == 1 else None
        self._current: SaveHandle | None = None

    @classmethod
    def of(cls, world: Ranks) -> Background:
        """Return the one of `world`. Local."""
        found = _all.get(world)
        if found is None:
            found = _all[world] = cls(world)
        return found

    def open(self, world: Any) -> None:
        """Make the group of the threads (together, on the main thread; the first time only)."""
        if self._ranks is None:
            group = world.new_group(backend="gloo")
            self._ranks = _GroupRanks(group)
            world.at_stop(self.close)

    def start(
        self, step: int, action: Callable[[Ranks], CheckpointInfo], on_failure: Callable[[], None] | None = None
    ) -> SaveHandle:
        """Let `action` run on a thread, with the ranks to agree with. The save before must be over."""
        ranks = self._ranks
        assert ranks is not None
        handle = self._current = SaveHandle(step, on_failure)
        _open_handles.add(handle)
        name = f"drivetrain-save-{step}"
        threading.Thread(target=handle.run, args=(lambda: action(ranks),), name=name, daemon=False).start()
        return handle

    def join(self) -> None:
        """Wait until no save is under way, however it ends."""
        if self._current is not None:
            self._current._over.wait()

    def settle(self) -> None:
        """Wait until no save is under way.

        Raises:
            CheckpointError: the last one failed, and nobody was told yet.
        """
        handle = self._current
        if handle is not None:
            handle._over.wait()
            if handle.failed and not handle.seen:
                handle.wait()

    def close(self) -> None:
        """Wait for the save that is under way, and give the group back. Called when the world stops."""
        self.join()
        if isinstance(self._ranks, _GroupRanks):
            with contextlib.suppress(Exception):  # whoever made the default group may have destroyed all of them
                dist.destroy_process_group(self._ranks.group)
            self._ranks = None


_all: weakref.WeakKeyDictionary[Any, Background] = weakref.WeakKeyDictionary()
_open_handles: set[SaveHandle] = set()
"""Of this process: saves under way, and those that failed and that nobody was told of."""


def join_all(timeout_s: float | None = None) -> None:
    """Wait until no save of this process is under way, whichever world it belongs to; or for `timeout_s` at most."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for handle in list(_open_handles):
        handle._over.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))


def _forget_after_fork() -> None:
    # The threads stayed in the parent: whoever waited for them here would wait for ever.
    _open_handles.clear()
    for background in list(_all.values()):
        background._current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


@atexit.register
def _tell_unseen() -> None:
    for handle in list(_open_handles):
        if handle.failed:
            print(f"drivetrain: {handle._error}", file=sys.stderr, flush=True)
