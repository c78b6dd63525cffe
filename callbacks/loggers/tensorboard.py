"""TensorBoard event files in <run folder>/tensorboard. Source: torch.utils.tensorboard.SummaryWriter.

A resumed run writes another event file into the same folder, which tells TensorBoard to forget what the earlier ones hold
beyond the committed step (`purge_step`): one curve without a zigzag.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from ...strategies.errors import MissingDependency
from .base import Logger, RunInfo, redacted

__all__ = ["TensorBoardLogger"]

FOLDER = "tensorboard"


class TensorBoardLogger(Logger):
    """Writes scalars for `tensorboard --logdir <run folder>`. `writer` is the SummaryWriter, for anything else."""

    name: ClassVar[str] = "tensorboard"

    def __init__(self, *, required: bool = False) -> None:
        super().__init__(required=required)
        self.writer: Any = None

    def start(self, run: RunInfo) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency(
                "The logger 'tensorboard' needs the package tensorboard, which is not installed. "
                "Run: pip install 'drivetrain[tensorboard]', or take it out of loggers=."
            ) from error
        self.writer = SummaryWriter(str(run.root / FOLDER), purge_step=run.step + 1 if run.resumed else None)
        if not run.resumed:
            text = json.dumps(redacted(run.config), indent=2)
            self.writer.add_text("config", "\n".join("    " + line for line in text.splitlines()), 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.writer.log_dir
        self.writer.close()
        self.writer = SummaryWriter(folder, purge_step=step + 1)  # as after a resume: another file, which tells what to forget

    def close(self, status: str) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
