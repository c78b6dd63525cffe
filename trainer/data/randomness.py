"""Random numbers that reading a sample draws: made from (seed, epoch, index), whoever reads it.

A transform that calls `random.random()`, `np.random.rand()` or `torch.rand(())` uses a generator of the whole process. Left
alone, its numbers depend on which worker reads and on how far prefetching ran, and with `num_workers=0` they come out of the same
stream as the training's dropout. Here each sample is read with the generators seeded from its key, and in the process that
trains they are put back afterwards. Putting back costs (numpy: 50 us), so it is done for generators that the data set uses:
    the first batches   everything seeded, saved and put back; which generators moved is noted for each sample
    from then on        those are seeded, saved and put back; the others are only watched (1 us a batch), and a batch
                        during which one of them moved after all is put back and read again, seeded
`Reading.__call__` is the place. A data set's own generator object is its own business: it must be in its `state_dict`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Generator", "generators", "isolated", "mix", "seed_of", "seeded"]

_MASK = (1 << 64) - 1
_WORDS = 624  # of a Mersenne twister, which python and numpy both use


def mix(a: int, b: int) -> int:
    """Return 64 well mixed bits of two numbers (splitmix64): neighbouring seeds and epochs have nothing in common.

    >>> hex(mix(0, 0)), mix(1, 2) != mix(2, 1)
    ('0xe220a8397b1dcdaf', True)
    """
    z = (a * 0xD1342543DE82EF95 + (b + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def seed_of(key: int, index: Any, position: int | None) -> int:
    """Return the seed of one sample. `position` tells apart the times that an index comes in one epoch."""
    try:
        seed = mix(key, operator.index(index))  # samplers give numpy's numbers and tensors as well
    except TypeError:  # a key that is a name or a tuple; hash() of text differs between processes
        seed = mix(key, zlib.crc32(repr(index).encode()))
    return seed if position is None else mix(seed, position)


class Generator(Protocol):
    """One of the process' global generators. Two equal `glance`s: nobody drew in between. With a `mark`, `put_back` undoes."""

    @property
    def seed(self) -> Callable[[int], Any]: ...
    @property
    def save(self) -> Callable[[], Any]: ...
    @property
    def restore(self) -> Callable[[Any], Any]: ...
    @property
    def glance(self) -> Callable[[], Any]: ...
    @property
    def mark(self) -> Callable[[], Any]: ...
    @property
    def put_back(self) -> Callable[[Any], Any]: ...


# Drawing moves a twister's count of used words; each time all are used up, all words change. So the count and two words tell
# whether anything was drawn; looking at them in memory costs 0.1 us (random.getstate 8 us, numpy's get_state 25, torch's 1).
def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


class Python:
    """The module `random`."""

    def __init__(self) -> None:
        self._inst: Any = random._inst  # pyright: ignore[reportAttributeAccessIssue]
        self._whole: memoryview | None = None
        self.seed: Callable[[int], Any] = random.seed
        self.save: Callable[[], Any] = random.getstate
        self.restore: Callable[[Any], Any] = random.setstate
        # CPython keeps {object head, int index, uint32 words[624]}; somewhere else, getstate() has to do.
        size = 4 * (_WORDS + 1)
        if sys.implementation.name == "cpython" and sys.getsizeof(self._inst) >= object.__basicsize__ + size:
            whole = _memory(id(self._inst) + object.__basicsize__, size)
            self._whole = whole if self._is_seen_in(whole) else None
        self._few = None if self._whole is None else self._whole[:12]

    @staticmethod
    def _is_seen_in(whole: memoryview) -> bool:
        saved, seen = random.getstate(), True
        for draws in (0, 3):  # draw a little, so that numbers that only happen to fit are found out
            for _ in range(draws):
                random.random()
            used, *words = whole.cast("I").tolist()
            seen = seen and random.getstate()[1] == (*words, used)
        random.setstate(saved)
        return seen

    def glance(self) -> Any:
        return (self._few.tobytes(), self._inst.gauss_next) if self._few is not None else random.getstate()

    def mark(self) -> Any:
        return (self._whole.tobytes(), self._inst.gauss_next) if self._whole is not None else random.getstate()

    def put_back(self, mark: Any) -> None:
        if self._whole is not None:
            used, *words = struct.unpack(f"={_WORDS + 1}I", mark[0])
            mark = (3, (*words, used), mark[1])
        random.setstate(mark)


class Numpy:
    """numpy's global generator (`np.random.rand` and the like).

    Its normal numbers come in pairs, and the second one waits beside the twister, where only get_state() sees it. One can only
    begin to wait when the twister moves, so that is when get_state() is asked.
    """

    def __init__(self, bits: Any) -> None:
        """`bits`: the bit generator behind numpy's global functions; somebody may put another one there."""
        self._random: Any = sys.modules["numpy"].random
        self.save: Callable[[], Any] = functools.partial(self._random.get_state, legacy=False)
        self.restore: Callable[[Any], Any] = self._random.set_state
        # numpy's own is {uint32 key[624]; int pos}, at an address that it gives away for such uses.
        self._bits = bits
        self._whole = _memory(bits.ctypes.state_address, 4 * (_WORDS + 1))
        self._few = self._whole.cast("I")[:: _WORDS // 2]  # the first word, one in the middle, and pos
        self._looked, self._waiting = b"", None

    def seed(self, value: int) -> None:
        self._random.seed(value & 0xFFFFFFFF)

    def glance(self) -> Any:
        few = self._few.tobytes()
        if few != self._looked or self._waiting is not None:
            state = self.save()
            self._looked, self._waiting = few, state["gauss"] if state["has_gauss"] else None
        return few, self._waiting

    def mark(self) -> Any:
        return self._whole.tobytes(), self.glance()[1]

    def put_back(self, mark: Any) -> None:
        whole, waiting = mark
        self._looked = b""
        words = sys.modules["numpy"].frombuffer(whole, dtype="uint32")
        gauss = {"has_gauss": int(waiting is not None), "gauss": waiting or 0.0}
        self._random.set_state({"bit_generator": "MT19937", "state": {"key": words[:-1], "pos": int(words[-1])}, **gauss})


class Torch:
    """torch's CPU generator.

    Behind it lies {..., uint64 seed, int left, bool seeded, uint32 next, uint32 words[624], optional<float>, optional<double>};
    the last two are for normal numbers that wait. Where exactly is found by the words that get_state() says; if nothing is
    found there, or if it does not follow some draws, get_state() has to do.
    """

    def __init__(self) -> None:
        self._generator = torch.default_generator
        # torch.manual_seed also visits every accelerator: 68 us, and nothing that a data set should touch.
        self.seed: Callable[[int], Any] = self._generator.manual_seed
        self.save: Callable[[], Any] = self._generator.get_state
        self.mark: Callable[[], Any] = self._generator.get_state
        self.restore: Callable[[Any], Any] = self._generator.set_state
        self.put_back: Callable[[Any], Any] = self._generator.set_state
        self._few: memoryview | None = None
        self._waiting: memoryview | None = None
        if (found := self._found()) is not None:
            self._few, self._waiting = found

    def _found(self) -> tuple[memoryview, memoryview] | None:
        address = getattr(self._generator, "_cdata", None)
        state = self._bytes()
        if not isinstance(address, int) or len(state) < _TORCH_HEAD + 8 * _WORDS:
            return None
        words = struct.pack(f"={_WORDS}I", *struct.unpack_from(f"={_WORDS}Q", state, _TORCH_HEAD))
        # The object is larger than its words, so that this much of it can be read before their place is known.
        at = ctypes.string_at(address, 512).find(words[:64])
        if at < 20 or ctypes.string_at(address + at, len(words)) != words:
            return None
        # left, next and four of the words; whether a number waits, of either type. Not what lies between them: it is random.
        few = _memory(address + at - 12, 44).cast("I")[::2]
        waiting = _memory(address + at + len(words) + 4, 17)[::16]
        saved, fits = self.save(), True
        for draw in (torch.rand, torch.randn, torch.randn, torch.randn, torch.rand):
            for dtype in (torch.float32, torch.float64):
                before, seen = state, (few.tobytes(), waiting.tobytes())
                draw((), dtype=dtype, device="cpu", generator=self._generator)
                state = self._bytes()
                fits = fits and before != state and seen != (few.tobytes(), waiting.tobytes())
        self.restore(saved)
        return (few, waiting) if fits else None

    def _bytes(self) -> bytes:
        state = self.save()
        return ctypes.string_at(state.data_ptr(), state.numel())

    def glance(self) -> Any:
        if self._few is None or self._waiting is None:
            return self._bytes()
        return self._few.tobytes() + self._waiting.tobytes()


_TORCH_HEAD = 24  # bytes of get_state() before the words


def generators() -> list[Generator]:
    """Return the global generators of this process: numpy's only if something imported it, and if it can be seeded."""
    found: list[Generator] = list(_always())
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and type(bits := numpy.random.get_bit_generator()).__name__ == "MT19937":
        found.append(_numpy(bits))
    return found


@functools.cache
def _always() -> tuple[Generator, ...]:
    return Python(), Torch()


@functools.lru_cache(maxsize=1)
def _numpy(bits: Any) -> Numpy:
    return Numpy(bits)


@contextlib.contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run a block with every global generator seeded, and leave them as they were before it."""
    every = generators()
    saved = [generator.save() for generator in every]
    try:
        for generator in every:
            generator.seed(seed)
        yield
    finally:
        restore(every, saved)


@contextlib.contextmanager
def seeded(generator: torch.Generator | None, seed: int) -> Iterator[None]:
    """Run a block with somebody's own generator seeded, and leave it as it was, its initial seed too."""
    if generator is None:
        yield
        return
    saved = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(saved)


def restore(every: Sequence[Generator], saved: Sequence[Any]) -> None:
    """Put generators back to what they `save`d."""
    for generator, state in zip(every, saved, strict=True):
        generator.restore(state)
