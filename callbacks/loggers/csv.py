"""metrics.csv: one row a log point, one column a metric.

A name that comes later gets its column then: the file is written anew.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from .base import Logger, RunInfo
from .jsonl import replacing

__all__ = ["CSVLogger"]

FILE = "metrics.csv"
_FIRST = ["step", "epoch", "time"]


class CSVLogger(Logger):
    """Writes <run folder>/metrics.csv. Columns: step, epoch, time (seconds since 1970), then the metrics as they appear."""

    name: ClassVar[str] = "csv"

    def __init__(self, *, required: bool = False) -> None:
        super().__init__(required=required)
        self._path: Path | None = None
        self._file: IO[str] | None = None
        self._columns = list(_FIRST)

    def start(self, run: RunInfo) -> None:
        self._path = run.root / FILE
        self._cut_back(run.step if run.resumed else None)

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        self._cut_back(step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert self._path is not None
        row = {"step": step, "epoch": "", "time": round(time.time(), 3), **metrics}
        if "epoch" in metrics:
            row["epoch"] = int(metrics["epoch"])
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            with self._path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            self._write_all(rows)
        assert self._file is not None
        csv.DictWriter(self._file, self._columns).writerow(row)
        self._file.flush()

    def close(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cut_back(self, step: int | None) -> None:
        """Keep the whole rows, up to `step` if there is one."""
        assert self._path is not None
        rows: list[dict[str, Any]] = []
        if self._path.exists():
            with self._path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if _is_whole(row) and (step is None or int(row["step"]) <= step)]
                self._columns = list(dict.fromkeys([*_FIRST, *(reader.fieldnames or [])]))
        self._write_all(rows)

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        """Write the header and the rows, and stand at the end."""
        assert self._path is not None
        self.close("rewritten")
        with replacing(self._path) as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self._file = self._path.open("a", encoding="utf-8", newline="")


def _is_whole(row: dict[str, Any]) -> bool:
    """A row that was being written when the process died has fewer fields than the header."""
    return None not in row.values() and row["step"].isdigit()
