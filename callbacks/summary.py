"""What is trained: the start-up lines (value and reason of every choice) and the table of the model's modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.parameter import is_lazy

from ..strategies.errors import ConfigError
from ..strategies.named_state import full_numel
from .base import Callback

if TYPE_CHECKING:
    from torch import nn

    from .base import TrainerView

__all__ = ["ModelSummary", "Row", "startup_lines", "summarize", "table"]


@dataclass(frozen=True)
class Row:
    """One module of the table. A parameter that several modules share counts in each of them, and once in the whole model."""

    name: str
    type: str
    parameters: int
    trainable: int
    num_bytes: int
    dtypes: tuple[str, ...]
    lazy: bool = False
    """Some parameter has no shape before the first batch; it is not counted."""


class ModelSummary(Callback):
    """Print the modules of the model, their parameters, bytes and precision when the training starts (rank 0).

    Args:
        max_depth: how deep to go: 1 shows the module's own children, 0 only the whole, -1 everything.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ConfigError(f"ModelSummary(max_depth={max_depth!r}): it is -1 (everything), 0 (the whole) or a depth.")
        self.max_depth = max_depth

    def on_fit_start(self, trainer: TrainerView, module: nn.Module) -> None:
        if trainer.world.is_main:
            trainer.print(table(summarize(module, max_depth=self.max_depth)))


def summarize(module: nn.Module, *, max_depth: int = 1) -> list[Row]:
    """Return a row for each module down to `max_depth` that has parameters below it; the last row is the whole.

    Sizes are those of the whole model, also when its parameters are sharded.
    """
    rows = [
        _row(name, child) for name, child in module.named_modules() if name and (max_depth < 0 or name.count(".") < max_depth)
    ]
    return [row for row in rows if row.parameters or row.lazy] + [_row("", module)]


def _row(name: str, module: nn.Module) -> Row:
    every = list(module.parameters())
    parameters = [p for p in every if not is_lazy(p)]
    return Row(
        name=name,
        type=_class_name(module),
        parameters=sum(full_numel(p) for p in parameters),
        trainable=sum(full_numel(p) for p in parameters if p.requires_grad),
        num_bytes=sum(full_numel(p) * p.element_size() for p in parameters),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        lazy=len(parameters) < len(every),
    )


def _class_name(module: nn.Module) -> str:
    """The name of the user's class: torch's fully_shard puts one before it, FSDPModule its first base."""
    first, *rest = type(module).__bases__
    return (rest[0] if rest and first.__name__ == "FSDPModule" else type(module)).__name__


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, the whole model as the last line."""
    cells = [("module", "type", "parameters", "trainable", "size", "precision")]
    for row in rows:
        count = f"{row.parameters:,}" + (" + lazy" if row.lazy else "")
        trainable = "all" if row.trainable == row.parameters else f"{row.trainable:,}"
        name = row.name or "total"
        cells.append((name, row.type, count, trainable, _size(row.num_bytes), " ".join(row.dtypes)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = (False, False, True, True, True, False)
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def startup_lines(items: Iterable[tuple[str, str, str]]) -> str:
    """Return one line for each (name, value, reason), in columns: what was chosen, and why.

    >>> print(startup_lines([("device", "cpu", "2 processes"), ("precision", "bf16-mixed", "asked for")]))
    device     cpu         2 processes
    precision  bf16-mixed  asked for
    """
    items = [(name, str(value), reason) for name, value, reason in items]
    first = max((len(name) for name, _, _ in items), default=0)
    # A long value (a path) must not push all the reasons to the right.
    second = max((len(value) for _, value, _ in items if len(value) <= 24), default=0)
    return "\n".join(f"{name:<{first}}  {value:<{second}}  {reason}".rstrip() for name, value, reason in items)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
