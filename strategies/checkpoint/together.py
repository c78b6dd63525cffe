"""Actions that end the same way on all ranks: what goes wrong on one of them is raised on every one.

attempt(action)                 (result, None) or (None, the error): nothing is raised before all ranks were told
together.agree(what, outcome)   every rank's result, or the error of the first that failed
together.from_main(what, act)   rank 0 acts; every rank gets its result, or its error
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import CheckpointError, ConfigError, DrivetrainError

T = TypeVar("T")


class Ranks(Protocol):
    """What the store needs of World: all ranks call it together, JSON goes over the control group."""

    rank: int
    size: int

    def gather_json(self, value: Any) -> list[Any]: ...
    def broadcast_json(self, value: Any, src: int = 0) -> Any: ...


class Alone:
    """One process that needs no World: tools, tests."""

    rank = 0
    size = 1

    def gather_json(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        return value


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


class Together:
    """One outcome on all ranks, for actions in the folder `root`."""

    def __init__(self, ranks: Ranks, root: Path) -> None:
        self.ranks = ranks
        self._root = root

    def agree(self, what: str, outcome: tuple[Any, Exception | None]) -> list[Any]:
        """Tell each other how it went; return all reports, or raise on every rank what went wrong on any."""
        result, error = outcome
        told = {"failure": _describe(error) if error else None, "report": result}
        answers = self.ranks.gather_json(told)
        for rank, answer in enumerate(answers):
            if answer["failure"]:
                raise self._failure(what, rank, answer["failure"]) from (error if rank == self.ranks.rank else None)
        return [answer["report"] for answer in answers]

    def from_main(self, what: str, action: Callable[[], T]) -> T:
        """Do something on rank 0 and tell all ranks the result, or raise on all of them."""
        result, error = attempt(action) if self.ranks.rank == 0 else (None, None)
        told = self.ranks.broadcast_json({"failure": _describe(error) if error else None, "result": result})
        if told["failure"]:
            raise self._failure(what, 0, told["failure"]) from error
        return told["result"]

    def _failure(self, what: str, rank: int, failure: Mapping[str, str]) -> DrivetrainError:
        where = f"[rank {rank}/{self.ranks.size}] " if self.ranks.size > 1 else ""
        text = f"{where}{what} in {self._root} failed: {failure['text']}"
        if failure["kind"] == "config":
            return ConfigError(text)
        committed = "\nNothing was committed; the earlier checkpoints are untouched." if what.startswith("Saving") else ""
        return CheckpointError(text + committed)


def _describe(error: Exception) -> dict[str, str]:
    text = str(error) if isinstance(error, DrivetrainError) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += ". Free some space, keep fewer checkpoints, or choose another root."
    return {"kind": "config" if isinstance(error, ConfigError) else "checkpoint", "text": text}
