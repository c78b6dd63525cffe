"""metrics.jsonl: one JSON object a line, always written.

    {"step": 50, "epoch": 0, "time": 1763769600.123, "metrics": {"loss": 2.31, "lr": 0.0003}}
`time` is in seconds since 1970. A number that JSON does not have is a string: "NaN", "Infinity", "-Infinity"; `read_metrics`
gives numbers again. A line is flushed when it is written, so it survives the process. After a resume `cut_back` removes what
came after the committed step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from .base import Logger, RunInfo

__all__ = ["JSONLLogger", "cut_back", "read_metrics", "replacing"]

FILE = "metrics.jsonl"


class JSONLLogger(Logger):
    """Writes <run folder>/metrics.jsonl."""

    name: ClassVar[str] = "jsonl"

    def __init__(self, *, required: bool = False) -> None:
        super().__init__(required=required)
        self._file: IO[str] | None = None
        self._bytes: int | None = None

    def start(self, run: RunInfo) -> None:
        path = run.root / FILE
        if run.resumed and path.exists():
            cut_back(path, run.step, num_bytes=self._bytes)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert self._file is not None
        values = {name: _json_number(value) for name, value in metrics.items() if name != "epoch"}
        epoch = metrics.get("epoch")
        line = {"step": step, "epoch": None if epoch is None else int(epoch), "time": round(time.time(), 3), "metrics": values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        assert self._file is not None
        path = Path(self._file.name)
        self._file.close()
        cut_back(path, step, num_bytes=state.get("bytes"))
        self._file = path.open("a", encoding="utf-8")

    def close(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._file is None else {"bytes": self._file.tell()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bytes = state.get("bytes")


def cut_back(path: Path, step: int, *, num_bytes: int | None = None) -> int:
    """Remove the lines whose step is greater than `step`, and a torn one; return how many went.

    Written anew beside the file and renamed over it, so at any instant there is a whole file.

    Args:
        num_bytes: how long the file was at the checkpoint: lines of the same step that came after it go too (they come again).
    """
    data = path.read_bytes()
    kept = data
    # A length that does not end on a line's end is that of another file.
    if num_bytes is not None and num_bytes <= len(data) and (num_bytes == 0 or data[num_bytes - 1 : num_bytes] == b"\n"):
        kept = data[:num_bytes]
    lines = [line for line in kept.splitlines(keepends=True) if _is_up_to(line, step)]
    removed = len(data.splitlines()) - len(lines)
    if removed:
        with replacing(path) as file:
            file.writelines(line.decode() for line in lines)
    return removed


def _is_up_to(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, or of the one in a run folder: dicts of step, epoch, time, metrics.

    A line that is torn is left out.
    """
    path = Path(path)
    lines = []
    for line in (path / FILE if path.is_dir() else path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            entry["metrics"] = {name: float(value) for name, value in entry["metrics"].items()}
            lines.append(entry)
    return lines


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Write a file anew: under another name in its folder, flushed to the disk, renamed last."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
