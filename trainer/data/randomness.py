"""Random numbers that reading a sample draws: made from (seed, epoch, index), whoever reads it.

A transform that calls `random.random()`, `np.random.rand()` or `torch.rand(())` uses a generator of the whole process. Left alone,
its numbers depend on which worker reads and on how far prefetching ran, and with `num_workers=0` they come out of the same
stream as the training's dropout. Here each sample is read with the generators seeded from its key, and in the process that
trains they are put back afterwards. Putting back costs (numpy: 50 us), so it is done for generators that the data set uses:
    the first batches   everything seeded, saved and put back; which generators moved is noted for each sample
    from then on        those are seeded, saved and put back; the others are only watched (4 us a batch), and a batch
                        during which one of them moved after all is put back and read again, seeded
`Reading.__call__` is the place. A data set's own generator object is its own business: it must be in its `state_dict`.
"""

from __future__ import annotations

import contextlib
import ctypes
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
        seed = mix(key, index)
    except TypeError:  # a key that is a name or a tuple; hash() of text differs between processes
        seed = mix(key, zlib.crc32(repr(index).encode()))
    return seed if position is None else mix(seed, position)


class Generator(Protocol):
    """One of the process' global generators."""

    def seed(self, value: int) -> None: ...

    def save(self) -> Any: ...

    def restore(self, state: Any) -> None: ...

    def mark(self) -> Any:
        """Return something cheap from which `moved` can tell, and `put_back` undo, that numbers were drawn."""
        ...

    def moved(self, mark: Any) -> bool: ...

    def put_back(self, mark: Any) -> None: ...


class Python:
    """The module `random`."""

    def __init__(self) -> None:
        self._inst: Any = random._inst  # pyright: ignore[reportAttributeAccessIssue]
        # CPython keeps {PyObject head, int index, uint32 words[624]}. Reading it costs 0.4 us, getstate() 8 us.
        self._address = id(self._inst) + object.__basicsize__
        self._fast = self._layout_is_known()

    def _layout_is_known(self) -> bool:
        if sys.implementation.name != "cpython" or sys.getsizeof(self._inst) < object.__basicsize__ + 4 * (_WORDS + 1):
            return False
        saved, known = random.getstate(), True
        for draws in (0, 3):  # draw a little, so that an index that only happens to fit is found out
            for _ in range(draws):
                random.random()
            state = random.getstate()[1]
            known = known and struct.unpack(f"i{_WORDS}I", self._raw()) == (state[-1], *state[:-1])
        random.setstate(saved)
        return known

    def _raw(self) -> bytes:
        return ctypes.string_at(self._address, 4 * (_WORDS + 1))

    def seed(self, value: int) -> None:
        random.seed(value)

    def save(self) -> Any:
        return random.getstate()

    def restore(self, state: Any) -> None:
        random.setstate(state)

    def mark(self) -> Any:
        return (self._raw(), self._inst.gauss_next) if self._fast else random.getstate()

    def moved(self, mark: Any) -> bool:
        return self.mark() != mark

    def put_back(self, mark: Any) -> None:
        if not self._fast:
            random.setstate(mark)
            return
        index, *words = struct.unpack(f"i{_WORDS}I", mark[0])
        random.setstate((3, (*words, index), mark[1]))


class Numpy:
    """numpy's global generator (`np.random.rand` and the like)."""

    def __init__(self) -> None:
        self._random: Any = sys.modules["numpy"].random

    def seed(self, value: int) -> None:
        self._random.seed(value & 0xFFFFFFFF)

    def save(self) -> Any:
        return self._random.get_state(legacy=False)

    def restore(self, state: Any) -> None:
        self._random.set_state(state)

    def mark(self) -> Any:
        # numpy's struct of it is {uint32 key[624]; int pos}, at an address that numpy gives away for such uses.
        return ctypes.string_at(self._random.get_bit_generator().ctypes.state_address, 4 * (_WORDS + 1))

    def moved(self, mark: Any) -> bool:
        return self.mark() != mark

    def put_back(self, mark: Any) -> None:
        # The second half of a pair of normal numbers that may wait in the generator is not in the mark, and stays.
        *words, position = struct.unpack(f"{_WORDS}Ii", mark)
        state = self._random.get_state(legacy=False)
        state["state"] = {"key": sys.modules["numpy"].asarray(words, dtype="uint32"), "pos": position}
        self._random.set_state(state)


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
        return not torch.equal(self._generator.get_state(), mark)


def generators() -> list[Generator]:
    """Return the global generators of this process: numpy's only if something imported it, and if it can be seeded."""
    found: list[Generator] = [Python(), Torch()]
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and type(numpy.random.get_bit_generator()).__name__ == "MT19937":
        found.append(Numpy())
    return found


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
