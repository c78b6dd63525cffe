"""How often something happens: a number with a unit, such as "500step" "1ep" "10m" "1e9tok".

step     optimizer steps          batch   micro-batches of one rank       ep   epochs
sample   over all ranks           tok     tokens, over all ranks          s m h   seconds, minutes, hours of training

every = Every.parse("500step")
if every.due(progress, last):  ...;  last = every.now(progress)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ..strategies.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from .base import ProgressView

# Spelling -> (the field of progress, how many of its units one is).
_UNITS: Mapping[str, tuple[str, int]] = {
    **dict.fromkeys(("step", "steps"), ("global_step", 1)),
    **dict.fromkeys(("batch", "batches", "ba"), ("batches", 1)),
    **dict.fromkeys(("ep", "epoch", "epochs"), ("epoch", 1)),
    **dict.fromkeys(("sample", "samples", "sp"), ("samples", 1)),
    **dict.fromkeys(("tok", "token", "tokens"), ("tokens", 1)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1)),
    **dict.fromkeys(("m", "min", "minute", "minutes"), ("seconds", 60)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600)),
}
_NAMES: Mapping[str, str] = {
    "global_step": "step",
    "batches": "batch",
    "epoch": "ep",
    "samples": "sample",
    "tokens": "tok",
    "seconds": "s",
}
_TEXT = re.compile(r"\s*([+-]?[0-9_]*\.?[0-9_]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Every:
    """An interval of `n` units; `counter` is the field of the progress that it counts."""

    n: float
    counter: str = "global_step"

    def __post_init__(self) -> None:
        if self.counter not in _NAMES:
            raise unknown_name("counter", self.counter, _NAMES, where="to measure an interval by")
        if not (self.n > 0 and math.isfinite(self.n)) or (not self.is_time and self.n != int(self.n)):
            raise ConfigError(
                f"The interval {self} is not possible: expected a {'number' if self.is_time else 'whole number'} above 0, "
                'such as "500step", "1ep", "10m" or "1e9tok".'
            )

    @classmethod
    def parse(cls, text: str | int | timedelta | Every, *, unit: str = "step") -> Every:
        """Read an interval; a bare number counts `unit`.

        Raises:
            ConfigError: not a number above 0, not whole where things are counted, or no such unit.
        """
        if isinstance(text, Every):
            return text
        if isinstance(text, timedelta):
            return cls(text.total_seconds(), "seconds")
        match = None if isinstance(text, bool) else _TEXT.fullmatch(str(text))
        if match is None:
            raise ConfigError(
                f'{text!r} is no interval. Expected a number and a unit, such as "500step", "1ep", "10m", "1e9tok".'
            )
        spelling = match[2] or unit
        if spelling.lower() not in _UNITS:
            raise unknown_name("unit", spelling, _UNITS, where=f"in the interval {text!r}")
        counter, factor = _UNITS[spelling.lower()]
        try:
            return cls(float(match[1]) * factor, counter)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"{text!r} is no interval: {error}.") from None

    @property
    def is_time(self) -> bool:
        """Clocks differ from rank to rank: whoever acts on time together must agree first."""
        return self.counter == "seconds"

    def now(self, progress: ProgressView) -> float:
        """Return the count that the interval is measured by."""
        return getattr(progress, self.counter)

    def due(self, progress: ProgressView, last: float) -> bool:
        """Say whether it is time again; `last` is what `now` was the last time, 0 before the first.

        A counted interval is due at each multiple of n, whatever `last` was: "500step" at 500, 1000, ... also after a resume
        at 700. When a count jumps over a multiple (samples, tokens), it is due at once.
        """
        now = self.now(progress)
        return now - last >= self.n if self.is_time else now // self.n > last // self.n

    def next(self, count: float) -> float:
        """Return the first count after `count` at which a counted interval is due."""
        return (count // self.n + 1) * self.n

    def __str__(self) -> str:
        return f"{self.n:.15g}{_NAMES[self.counter]}"


_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)")


def parse_seconds(value: float | str | timedelta, what: str) -> float:
    """Read a length of time: seconds, a timedelta, "3h55m", "90s", "1d12h", "3:55:00" or "1-12:00:00".

    Args:
        what: for the error: "Preemption(time_limit=...)".
    Raises:
        ConfigError: none of these, or not above 0.
    """
    seconds: float | None = None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        text = value.replace(" ", "").lower()
        if match := (_CLOCK.fullmatch(text) or _PARTS.fullmatch(text)):
            days, hours, minutes, rest = (float(part or 0) for part in match.groups())
            seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    if seconds is None or not seconds > 0:
        raise ConfigError(f'{what} is {value!r}: expected a length of time above 0, such as "3h55m", "90s", 90 or "3:55:00".')
    return seconds
