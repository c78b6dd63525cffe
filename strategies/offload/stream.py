"""The engine: blocks of weights pass through a few reused buffers, the next one being read while this one computes.

    buffer 0   | block 0 computes | read block 2     | block 2 computes | ...
    buffer 1   | read block 1     | block 1 computes | read block 3     | ...

`acquire(block)` waits until the block is in a buffer, `release` gives the buffer back. What comes next is learned: after this
use came that use the last time; before there was a last time, blocks come in their order, and after the last of a token the first
of the next. Backward passes are uses of their own, so a training's zigzag is learned as well. A wrong guess costs one read.
Who has to wait helps: a block is read in parts, and the thread that computes takes parts of the block that it needs.
So where reading takes longer than computing both cores read, and a reader that is not given a core holds nobody up.
A fork waits for the parts that are being read, and the child has buffers and a reader of its own. Before a process ends its
readers do.
On an accelerator a buffer is a pair: pinned host memory that the file is read into, and device memory that it is copied to on a
stream of its own; events keep copies and kernels apart.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .sources import PAGE, Layout, Source

__all__ = ["Block", "Stats", "Stream", "host_buffer"]

Use = tuple[str, int]
"""("forward" or "backward", index of the block)."""
Part = Callable[[], Iterable[Callable[[], None]] | None]
"""A piece of a block's reading; the first one returns the others."""


@dataclass
class Block:
    """Tensors that pass together. `flat` holds them in host memory, laid out as in a buffer; without it `source` is read."""

    name: str
    layout: Layout
    source: Source
    flat: Tensor | None = None


@dataclass
class Stats:
    """What a stream did so far."""

    reads: int = 0
    num_bytes: int = 0
    read_s: float = 0.0
    """Seconds that the reads took, of all threads together, whoever waited for them."""
    waited_s: float = 0.0
    """Seconds that the computation waited, or helped to read what it waited for."""
    missed: int = 0
    """Uses whose block nobody had asked for in time."""


@dataclass
class Slot:
    """One buffer, and what is in it."""

    index: int
    host: Tensor | None
    device: Tensor
    block: int | None = None
    ready: bool = False
    users: int = 0
    error: BaseException | None = None
    parts: deque[Part] = field(default_factory=deque)  # of the block that is to be read, those that nobody has begun
    reading: int = 0  # parts that are under way
    copied: Any = None  # events, on accelerators
    freed: Any = None
    views: dict[int, Any] = field(default_factory=dict)  # what the user of the stream keeps for each block in this buffer


def host_buffer(num_bytes: int, *, pinned: bool = False) -> Tensor:
    """Return page-aligned memory as uint8, in huge pages where the system has them to give."""
    size = max(PAGE, -(-num_bytes // PAGE) * PAGE)
    if pinned:
        memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=True)
        return memory[-memory.data_ptr() % PAGE :][:size]
    # Private: by default a forked child would read into its parent's buffers.
    pages = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # only speed: a kernel without huge pages has none to give
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Stream:
    """Blocks through buffers.

    Args:
        blocks: in the order in which they are expected.
        device: where they are computed with.
        num_buffers: 2 reads ahead by one block; 1 reads when asked, and computing waits.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, *, num_buffers: int = 2) -> None:
        self.blocks = list(blocks)
        self.device = device
        self.prefetch = num_buffers > 1
        largest = max((b.layout.num_bytes for b in self.blocks), default=0)
        self.buffer_bytes = -(-largest // PAGE) * PAGE
        self.stats = Stats()
        accelerator = device.type != "cpu"
        self._side = torch.Stream(device=device) if accelerator else None
        stages = accelerator and any(b.flat is None for b in self.blocks)
        self.slots: list[Slot] = []
        with torch.inference_mode(False):
            for index in range(min(num_buffers, len(self.blocks))):
                host = host_buffer(self.buffer_bytes, pinned=True) if stages else None
                device_memory = (
                    torch.empty(self.buffer_bytes, dtype=torch.uint8, device=device)
                    if accelerator
                    else host_buffer(self.buffer_bytes)
                )
                self.slots.append(Slot(index, host, device_memory))
        self._next: dict[Use, Use] = {}
        self._last: Use | None = None
        self._backward_slot: Slot | None = None
        self._turn = threading.Condition(threading.Lock())
        self._jobs: list[Slot] = []
        self._reader: tuple[int, threading.Thread] | None = None
        self._closed = False
        self._forking = False
        if self._side is not None:
            # Memory that a copy still writes to must not go to somebody else.
            weakref.finalize(self, self._side.synchronize).atexit = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(s.device.numel() + (s.host.numel() if s.host is not None else 0) for s in self.slots)

    # -- using a block ------------------------------------------------------------------------------------------------
    def acquire(self, block: int, phase: str = "forward") -> Slot:
        """Return the buffer that holds `block`; it stays there until `release`.

        Raises:
            CheckpointError: what reading it raised.  ConfigError: all buffers are in use.
        """
        with self._turn:
            if self._closed:
                raise ConfigError(f"{self.blocks[block].name} was offloaded and its source is closed: the hooks were removed.")
            self._retire_backward(keep=block if phase == "backward" else None)
            use = (phase, block)
            if self._last is not None:
                self._next[self._last] = use
            self._last = use
            slot = next((s for s in self.slots if s.block == block), None)
            if slot is None:
                self.stats.missed += 1
                slot = self._victim(block)
                self._order(slot, block, first=True)
            slot.users += 1
            if not slot.ready:
                begin = time.perf_counter()
                while not slot.ready and (slot.error is None or slot.reading):
                    if slot.parts:
                        self._work(slot)
                    else:  # the reader is at the last ones
                        self._turn.wait(5)
                self.stats.waited_s += time.perf_counter() - begin
            if slot.error is not None:
                error, slot.error, slot.block = slot.error, None, None
                slot.users -= 1
                raise error
            self._look_ahead()
        if slot.copied is not None:
            torch.accelerator.current_stream(self.device).wait_event(slot.copied)
        return slot

    def release(self, slot: Slot) -> None:
        """Give a buffer back."""
        if self._side is not None:
            slot.freed = torch.accelerator.current_stream(self.device).record_event()
        with self._turn:
            slot.users -= 1
            self._look_ahead()

    def acquire_backward(self, block: int) -> Slot:
        """Return the buffer that holds `block` for a backward pass; it stays until another block is acquired."""
        held = self._backward_slot
        if held is not None and held.block == block and held.ready:
            return held
        slot = self.acquire(block, "backward")
        with self._turn:
            if self._backward_slot is slot:
                slot.users -= 1  # two threads of one backward pass
            self._backward_slot = slot
        return slot

    def _retire_backward(self, keep: int | None) -> None:
        held = self._backward_slot
        if held is not None and held.block != keep:
            if self._side is not None:
                held.freed = torch.accelerator.current_stream(self.device).record_event()
            held.users -= 1
            self._backward_slot = None

    # -- what comes next ----------------------------------------------------------------------------------------------
    def _following(self, use: Use) -> Use:
        """The use that comes after `use`, as far as is known."""
        known = self._next.get(use)
        if known is not None:
            return known
        phase, block = use
        if phase == "backward":
            return ("backward", block - 1) if block else ("forward", 0)
        return ("forward", (block + 1) % len(self.blocks))

    def _look_ahead(self) -> None:
        """Order the blocks that are used next into the buffers that are free. The lock is held."""
        if not self.prefetch or self._last is None or self._closed:
            return
        in_use = {s.block for s in self.slots if s.users}
        free = [s for s in self.slots if not s.users and s.error is None]
        wanted: list[int] = []
        use = self._last
        for _ in range(4 * len(self.slots)):
            use = self._following(use)
            if use[1] not in in_use and use[1] not in wanted:
                wanted.append(use[1])
            if len(wanted) >= len(free):
                break
        held = {s.block for s in self.slots}
        for block in wanted:
            if block not in held:
                slot = next((s for s in free if s.block not in wanted and (s.ready or s.block is None)), None)
                if slot is None:
                    return
                self._order(slot, block)

    def _victim(self, block: int) -> Slot:
        """A buffer that nobody computes with; one that is being filled only when there is no other. The lock is held."""
        while True:
            free = [s for s in self.slots if not s.users]
            if not free:
                inside = ", ".join(self.blocks[s.block].name for s in self.slots if s.block is not None)
                raise ConfigError(
                    f"{self.blocks[block].name} is needed while all {len(self.slots)} buffers are in use ({inside}): offloaded "
                    "modules lie one inside the other. Name the outer one's class in no_split_module_classes."
                )
            still = [s for s in free if not s.reading]
            if still:
                slot = next((s for s in still if s.ready or s.block is None or s.error is not None), still[0])
                slot.error = None
                slot.parts.clear()  # what was foreseen in vain
                if slot in self._jobs:
                    self._jobs.remove(slot)
                return slot
            self._turn.wait(5)

    # -- reading ------------------------------------------------------------------------------------------------------
    def _order(self, slot: Slot, block: int, *, first: bool = False) -> None:
        """Have `block` read into `slot`. The lock is held."""
        slot.block, slot.ready = block, False
        slot.parts.append(lambda: self._begin(slot, self.blocks[block]))
        self._jobs.insert(0 if first else len(self._jobs), slot)
        if self.prefetch:
            self._start_reader()
            self._turn.notify_all()

    def _start_reader(self) -> None:
        """Start the reader thread, once in each process: a thread does not survive a fork. The lock is held."""
        if self._reader is None or self._reader[0] != os.getpid() or not self._reader[1].is_alive():
            _watch(self)
            thread = threading.Thread(target=_read_loop, args=(weakref.ref(self),), name="drivetrain-offload", daemon=True)
            self._reader = (os.getpid(), thread)
            thread.start()

    def _before_fork(self) -> None:
        """Wait until nothing is being read, and keep the lock: in the child nobody would end what another thread began."""
        self._turn.acquire()
        self._forking = True
        while any(s.reading for s in self.slots):
            self._turn.wait(5)

    def _after_fork(self, *, child: bool) -> None:
        self._forking = False
        if child:
            self._turn = threading.Condition(threading.Lock())  # the old one may have threads waiting that are not here
        else:
            self._turn.notify_all()
            self._turn.release()

    def _end_reader(self) -> None:
        """End the reader for good; who computes reads what it needs."""
        with self._turn:
            self.prefetch = False
            self._turn.notify_all()
        if self._reader is not None and self._reader[0] == os.getpid():
            self._reader[1].join()

    def _work(self, slot: Slot) -> None:
        """Read one part of what `slot` is to hold; an error is kept for who acquires it. The lock is let go meanwhile."""
        part = slot.parts.popleft()
        slot.reading += 1
        begin = time.perf_counter()
        more: Iterable[Callable[[], None]] | None = None
        error: BaseException | None = None
        self._turn.release()
        try:
            with torch.inference_mode(False), torch.no_grad():
                more = part()
        except BaseException as caught:
            error = caught
        finally:
            self._turn.acquire()
        slot.reading -= 1
        if self._forking:
            self._turn.notify_all()
        self.stats.read_s += time.perf_counter() - begin
        if error is not None:
            slot.error = slot.error or error
            slot.parts.clear()
        elif more and slot.error is None:
            slot.parts.extend(more)
            self._turn.notify_all()
        if slot.parts or slot.reading:
            return
        if slot in self._jobs:
            self._jobs.remove(slot)
        if slot.error is None:
            assert slot.block is not None
            self._end(slot, self.blocks[slot.block])
        self._turn.notify_all()

    def _begin(self, slot: Slot, block: Block) -> list[Callable[[], None]]:
        """Return the parts in which `block` comes into `slot`'s memory on this side."""
        size = block.layout.num_bytes
        if self._side is None:
            flat = block.flat
            return block.source.parts(block.layout, slot.device) if flat is None else [lambda: _copy(slot.device[:size], flat)]
        if block.flat is not None:
            return []
        assert slot.host is not None
        if slot.copied is not None:
            slot.copied.synchronize()  # the copy of what was in the host memory
        return block.source.parts(block.layout, slot.host)

    def _end(self, slot: Slot, block: Block) -> None:
        """All parts have come: to the accelerator with them. The lock is held, and nothing here waits."""
        try:
            if self._side is not None:
                size = block.layout.num_bytes
                from_host = slot.host[:size] if block.flat is None and slot.host is not None else block.flat
                assert from_host is not None
                if slot.freed is not None:
                    self._side.wait_event(slot.freed)
                with torch.inference_mode(False), torch.no_grad(), self._side:
                    slot.device[:size].copy_(from_host, non_blocking=True)
                slot.copied = self._side.record_event()
        except BaseException as error:
            slot.error = error
            return
        self.stats.reads += 1
        self.stats.num_bytes += block.layout.num_bytes
        slot.ready = True

    def read_once(self) -> float:
        """Read every block once, computing nothing; return the seconds. For measuring what reading costs here."""
        begin = time.perf_counter()
        for index in range(len(self.blocks)):
            with self._turn:
                while any(not s.ready and s.block is not None and s.error is None for s in self.slots):
                    self._turn.wait(1)
                slot = self._victim(index)
                self._order(slot, index)
                self._jobs.remove(slot)  # not for the reader
                while slot.parts:
                    self._work(slot)
                if slot.error is not None:
                    raise slot.error
        if self._side is not None:
            self._side.synchronize()
        return time.perf_counter() - begin

    def close(self) -> None:
        """End the reader and let go of the buffers."""
        with self._turn:
            self._closed = True
            self._jobs.clear()
        self._end_reader()
        if self._side is not None:
            self._side.synchronize()
        self.slots.clear()


def _copy(target: Tensor, values: Tensor) -> None:
    target.copy_(values)


_watched: weakref.WeakSet[Stream] = weakref.WeakSet()
_forking: list[Stream] = []
_hooked: list[bool] = []


def _watch(stream: Stream) -> None:
    """Have `stream`, whose reader starts, stopped for forks and for the end of the process."""
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=lambda: _after_fork(child=True))
        # A daemon thread that is within torch's C++ when the interpreter ends aborts the whole process.
        atexit.register(_end_readers)
    _watched.add(stream)


def _before_fork() -> None:
    _forking.extend(s for s in _watched if not s._closed)
    for stream in _forking:
        stream._before_fork()


def _after_fork(*, child: bool = False) -> None:
    while _forking:
        _forking.pop()._after_fork(child=child)


def _end_readers() -> None:
    for stream in list(_watched):
        stream._end_reader()


def _read_loop(reference: weakref.ref[Stream]) -> None:
    """The reader thread: ends when the stream is closed, or gone."""
    while True:
        stream = reference()
        if stream is None:
            return
        with stream._turn:
            slot = None if stream._forking else next((s for s in stream._jobs if s.parts), None)
            if slot is None and stream.prefetch:
                stream._turn.wait(1)
            if not stream.prefetch:
                return
            if slot is not None:
                stream._work(slot)
        del stream, slot
