"""Random numbers that reading a sample draws: made from (seed, epoch, index), whoever reads it.

A transform that calls `random.random()`, `np.random.rand()` or `torch.rand(())` uses a generator of the whole process. Left
alone, its numbers depend on which worker reads and on how far prefetching ran, and with `num_workers=0` they come out of the same
stream as the training's dropout. Here each sample is read with the generators seeded from its key, and in the process that
trains they are put back afterwards. Putting back costs (numpy: 50 us), so it is done for generators that the data set uses:
    the first batches   everything seeded, saved and put back; which generators moved is noted for each sample
    from then on        those are seeded, saved and put back; the others are only watched (3 us a batch), and a batch
                        during which one of them moved after all is put back and read again, seeded
`Reading.__call__` is the place. A data set's own generator object is its own business: it must be in its `state_dict`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
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
        seed = mix(key, index)
    except TypeError:  # a key that is a name or a tuple; hash() of text differs between processes
        seed = mix(key, zlib.crc32(repr(index).encode()))
    return seed if position is None else mix(seed, position)


_differ = ctypes.CDLL(None).memcmp if sys.platform != "win32" else ctypes.cdll.msvcrt.memcmp
_differ.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Generator(Protocol):
    """One of the process' global generators. `mark` is cheap; with it `moved` tells of draws, and `put_back` undoes them."""

    @property
    def seed(self) -> Callable[[int], Any]: ...
    @property
    def save(self) -> Callable[[], Any]: ...
    @property
    def restore(self) -> Callable[[Any], Any]: ...
    @property
    def mark(self) -> Callable[[], Any]: ...
    @property
    def moved(self) -> Callable[[Any], bool]: ...
    @property
    def put_back(self) -> Callable[[Any], Any]: ...


class _Twister:
    """Looks at a Mersenne twister in memory: 624 words, and how many of them were used up.

    Drawing moves `used`; each time all are used up, all words change. So two words tell whether the copy of the words that
    was made at the last change still holds, and looking costs nanoseconds (getstate: 8 us, numpy's get_state: 25).
    """

    def __init__(self, address: int, *, used_first: bool) -> None:
        self.view = memoryview((ctypes.c_uint32 * (_WORDS + 1)).from_address(address)).cast("B").cast("I")
        self.used, self.word = (0, 1) if used_first else (_WORDS, 0)
        self.words: Sequence[int] = []
        self.first = self.second = -1

    def mark(self) -> tuple[int, Sequence[int]]:
        view, word = self.view, self.word
        if view[word] != self.first or view[word + 1] != self.second:
            self.words = view[word : word + _WORDS].tolist()
            self.first, self.second = view[word], view[word + 1]
        return view[self.used], self.words

    def moved(self, mark: tuple[int, Sequence[int]]) -> bool:
        view, word, (used, words) = self.view, self.word, mark
        return view[self.used] != used or view[word] != words[0] or view[word + 1] != words[1]


class Python:
    """The module `random`."""

    def __init__(self) -> None:
        self._inst: Any = random._inst  # pyright: ignore[reportAttributeAccessIssue]
        self._twister: _Twister | None = None
        self.seed: Callable[[int], Any] = random.seed
        self.save: Callable[[], Any] = random.getstate
        self.restore: Callable[[Any], Any] = random.setstate
        # CPython keeps {object head, int index, uint32 words[624]}; somewhere else, getstate() has to do.
        if sys.implementation.name == "cpython" and sys.getsizeof(self._inst) >= object.__basicsize__ + 4 * (_WORDS + 1):
            twister = _Twister(id(self._inst) + object.__basicsize__, used_first=True)
            self._twister = twister if self._is_seen_by(twister) else None

    @staticmethod
    def _is_seen_by(twister: _Twister) -> bool:
        saved, seen = random.getstate(), True
        for draws in (0, 3):  # draw a little, so that numbers that only happen to fit are found out
            for _ in range(draws):
                random.random()
            used, words = twister.mark()
            seen = seen and random.getstate()[1] == (*words, used)
        random.setstate(saved)
        return seen

    def mark(self) -> Any:
        return (self._twister.mark(), self._inst.gauss_next) if self._twister is not None else random.getstate()

    def moved(self, mark: Any) -> bool:
        if self._twister is None:
            return random.getstate() != mark
        return self._twister.moved(mark[0]) or self._inst.gauss_next != mark[1]

    def put_back(self, mark: Any) -> None:
        if self._twister is not None:
            (used, words), gauss = mark
            mark = (3, (*words, used), gauss)
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
        self._twister = _Twister(bits.ctypes.state_address, used_first=False)
        self._looked: tuple[int, Any] = (-1, None)
        self._waits = True

    def seed(self, value: int) -> None:
        self._random.seed(value & 0xFFFFFFFF)

    def mark(self) -> Any:
        used, words = self._twister.mark()
        if self._waits or used != self._looked[0] or words is not self._looked[1]:
            state = self.save()
            self._waits, self._looked = bool(state["has_gauss"]), (used, words)
            return used, words, state["gauss"] if self._waits else None
        return used, words, None

    def moved(self, mark: Any) -> bool:
        used, words, waiting = mark
        return self._twister.moved((used, words)) or (waiting is not None and not self.save()["has_gauss"])

    def put_back(self, mark: Any) -> None:
        used, words, waiting = mark
        key = sys.modules["numpy"].asarray(words, dtype="uint32")
        gauss = {"has_gauss": int(waiting is not None), "gauss": waiting or 0.0}
        self._random.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": used}, **gauss})


class Torch:
    """torch's CPU generator."""

    def __init__(self) -> None:
        self._generator = torch.default_generator
        # torch.manual_seed also visits every accelerator: 68 us, and nothing that a data set should touch.
        self.seed: Callable[[int], Any] = self._generator.manual_seed
        self.save: Callable[[], Any] = self._generator.get_state
        self.mark: Callable[[], Any] = self._generator.get_state
        self.restore: Callable[[Any], Any] = self._generator.set_state
        self.put_back: Callable[[Any], Any] = self._generator.set_state

    def moved(self, mark: Any) -> bool:
        # Tensor.equal takes 2.4 us for these 5 kB, this 0.4.
        state = self._generator.get_state()
        return _differ(state.data_ptr(), mark.data_ptr(), len(state)) != 0


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
