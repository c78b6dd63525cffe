"""Where metrics go: a Logger is told about the run once, then gets plain numbers at each log point, then the end.

    start(run)  ->  log({"loss": 2.31, "epoch": 0.0}, step=50), ...  ->  close("finished")

All of it on rank 0 only. A logger is an aid: Tracking (trainer/tracking.py) catches what it raises, says so once and goes on,
unless the logger was made with `required=True`. One that talks to a server sets `remote = True`: then its calls run on a thread
of their own, from a queue of bounded length, and the training never waits for it.

No logger stores the environment or the command line. What it stores of the configuration goes through `redacted` first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Logger", "RunInfo", "redacted"]


@dataclass(frozen=True)
class RunInfo:
    """What a logger may know of the run.

    Attributes:
        root: the run folder, which exists; whatever a logger writes lies in it.
        config: the run's options, as JSON-like values.
        resumed: the run goes on, from `step`: what was logged after it belongs to a past that did not happen.
    """

    name: str
    id: str
    root: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    resumed: bool = False
    step: int = 0


class Logger:
    """Takes metrics. Override `log`, and what else you need.

    class Shout(Logger):
        def log(self, metrics, step):
            print(step, metrics)
    """

    name: ClassVar[str] = ""
    remote: ClassVar[bool] = False
    """It talks to a server: its calls may take any time, so they are made on a thread of their own."""
    notice: str | None = None
    """What the user should be told, once: set in `start` by a logger that does less than was asked."""
    close_timeout_s: float = 60.0
    """Of a remote logger: how long the end of a run waits for what is still to be sent."""

    def __init__(self, *, required: bool = False) -> None:
        """Args: required: an error of this logger ends the training; otherwise it is a warning."""
        self.required = required

    def start(self, run: RunInfo) -> None:
        """Begin the run, or go on with it if `run.resumed`. `load_state_dict` has been called before."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one log point; they may be NaN or infinite. `epoch` is among them."""
        raise NotImplementedError(f"{type(self).__name__} must override log(metrics, step).")

    def close(self, status: str) -> None:
        """End the run. `status` is "finished", "failed" or "stopped" (to be resumed). Called also after an exception."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on in the same place, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back, before `start`."""

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        """The running training went back to `step`, at which `state_dict` was `state`: forget what came later, if you can."""


_SECRET_WORDS = {
    "token",
    "secret",
    "secrets",
    "password",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
    "apikey",
    "bearer",
}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("auth", "key"), ("signing", "key")}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
REDACTED = "<redacted>"


def redacted(value: Any, key: str = "") -> Any:
    """Return a configuration as JSON-like values without its secrets.

    A value whose key says token, secret, password, API key or the like is replaced, and so is the password in a URL.
    (`max_tokens` and `tokenizer` stay.) An object that is not JSON-like becomes its type's name: its repr might show anything.
    """
    words = [word.lower() for word in _WORD.findall(key)]
    secret = not _SECRET_WORDS.isdisjoint(words) or not _SECRET_PAIRS.isdisjoint(itertools.pairwise(words))
    if secret and value is not None and not isinstance(value, bool):
        return REDACTED
    if isinstance(value, Mapping):
        return {str(k): redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(v) for v in value]
    if isinstance(value, str | Path):
        return _URL_PASSWORD.sub(REDACTED, str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    return f"<{type(value).__name__}>"
