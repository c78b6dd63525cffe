"""The time that a run has trained, the time before a resume included, and its limit."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from ..strategies.control import STOP
from ..strategies.errors import ConfigError

if TYPE_CHECKING:
    from ..strategies.control import Control
    from .loops.progress import Progress

__all__ = ["Clock", "parse_time"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Clock:
    """Counts training seconds into `progress.seconds`; asks for a stop when `limit` is reached.

    Attributes:
        limit: seconds of training over all resumes, None for no limit.
    """

    def __init__(self, progress: Progress, limit: float | None) -> None:
        self.progress, self.limit = progress, limit
        self._started = time.monotonic()
        self._before = 0.0
        self._asked = False

    def start(self) -> None:
        """Count from now, on top of what `progress` holds."""
        self._started, self._before, self._asked = time.monotonic(), self.progress.seconds, False

    def note(self) -> None:
        """Bring `progress.seconds` up to date."""
        self.progress.seconds = self._before + time.monotonic() - self._started

    def check(self, control: Control) -> None:
        """Ask all ranks to stop when the limit is reached on this one."""
        if self.limit is not None and not self._asked and self._before + time.monotonic() - self._started >= self.limit:
            self._asked = True
            control.request(STOP, f"max_time of {self.limit:g} s is reached")


def parse_time(value: float | str | timedelta | dict[str, float] | None) -> float | None:
    """Return seconds from a number, a timedelta, its arguments as a dict, "DD:HH:MM:SS", or "90s", "10m", "2h", "1d".

    Raises:
        ConfigError: none of these.
    """
    if value is None:
        return None
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, dict):
        return timedelta(**value).total_seconds()
    if isinstance(value, str):
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", value.strip()):
            return float(match[1]) * _UNITS[match[2]]
        if match := re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", value.strip()):
            days, hours, minutes, seconds = (int(part) for part in match.groups())
            return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise ConfigError(
        f"max_time must be seconds, a timedelta, 'DD:HH:MM:SS' or such as '90s', '10m', '2h', got {value!r}. "
        "Write max_time='10m' for ten minutes."
    )
