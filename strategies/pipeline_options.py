"""Pipeline: how a model is run as a pipeline, and the schedules that there are. See pipeline_parallel.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import ConfigError, unknown_name

__all__ = ["SCHEDULES", "Pipeline", "keeps_statistics", "make_pipeline"]


@dataclass(frozen=True)
class _Schedule:
    torch_name: str
    looped: bool  # several stages on a rank
    v_shaped: bool = False


SCHEDULES: Mapping[str, _Schedule] = {
    "gpipe": _Schedule("ScheduleGPipe", False),
    "1f1b": _Schedule("Schedule1F1B", False),
    "looped-bfs": _Schedule("ScheduleLoopedBFS", True),
    "interleaved": _Schedule("ScheduleInterleaved1F1B", True),
    "zero-bubble": _Schedule("ScheduleInterleavedZeroBubble", True),
    "zbv": _Schedule("ScheduleZBVZeroBubble", True, True),
    "dualpipev": _Schedule("ScheduleDualPipeV", True, True),
}
"""Name -> torch's class, and how stages lie on ranks. torch's own names ("Interleaved1F1B") are understood too."""


@dataclass(frozen=True)
class Pipeline:
    """How a model is run as a pipeline.

    Args:
        splits: the names of the modules at which a new stage begins (all stages but the first); or "auto": by cost; or "measure":
            by the time that each part takes for a chunk of `example`, forward and backward, before training begins.
        schedule: one of `SCHEDULES`.
        microbatches: chunks that a batch is cut into; "auto": two for each rank of pp.
        stages_per_rank: "auto": 1, or 2 for the schedules that have several.
        cost: (name, module) -> what a part costs, such as its measured time; by default its parameters, tables of embeddings
            aside.
        example: with splits="measure", a batch as a rank gets it.
        batch_norm: "chunk" lets BatchNorm normalise each chunk by its own statistics, and its running ones take a step for each
            chunk: the numbers of a plain loop over the chunks, not of one over whole batches. None refuses such models.
    """

    splits: Sequence[str] | str = "auto"
    schedule: str = "1f1b"
    microbatches: int | str = "auto"
    stages_per_rank: int | str = "auto"
    cost: Callable[[str, nn.Module], float] | None = None
    example: Any = None
    batch_norm: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", _schedule_name(self.schedule))
        for name in ("microbatches", "stages_per_rank"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"Pipeline({name}={value!r}): expected a whole number of at least 1, or 'auto'.")
        if self.cost is not None and not callable(self.cost):
            raise ConfigError(
                f"Pipeline(cost={self.cost!r}): expected a function (name, module) -> number, such as the module's measured time."
            )
        if self.batch_norm not in (None, "chunk"):
            raise ConfigError(
                f"Pipeline(batch_norm={self.batch_norm!r}): expected 'chunk' (statistics of each chunk of a batch), or None."
            )
        kind, n = SCHEDULES[self.schedule], self.stages_per_rank
        if n != "auto" and ((not kind.looped and n != 1) or (kind.v_shaped and n != 2) or (kind.looped and n == 1)):
            takes = "1" if not kind.looped else "2" if kind.v_shaped else "2 or more"
            raise ConfigError(
                f"Pipeline(schedule={self.schedule!r}, stages_per_rank={n}): that schedule has {takes} stage(s) on each rank. "
                "Leave stages_per_rank out, or choose another schedule."
            )
        if isinstance(self.splits, str) and self.splits not in ("auto", "measure"):
            raise ConfigError(f"Pipeline(splits={self.splits!r}): expected 'auto', 'measure' or a list of names of modules.")
        if (self.splits == "measure") != (self.example is not None):
            raise ConfigError(
                "Pipeline(splits='measure', example=batch): each part is timed with a batch as training has them, such as "
                "next(iter(loader)). Give both, or neither."
            )
        if self.splits == "measure" and self.cost is not None:
            raise ConfigError("Pipeline(splits='measure') and cost both say what a part costs. Give one of them.")

    def stages(self, ranks: int) -> int:
        """Return how many stages there are on `ranks` ranks."""
        each = self.stages_per_rank
        return ranks * (each if isinstance(each, int) else 2 if SCHEDULES[self.schedule].looped else 1)

    def chunks(self, ranks: int) -> int:
        """Return how many chunks a batch is cut into on `ranks` ranks.

        Raises:
            ConfigError: a number that the schedule cannot run.
        """
        n = 2 * ranks if self.microbatches == "auto" else int(self.microbatches)
        least = {"1f1b": ranks, "dualpipev": 2 * ranks}.get(self.schedule, 1)
        if n < least:
            raise ConfigError(
                f"Pipeline(schedule={self.schedule!r}, microbatches={n}) on {ranks} ranks: it needs at least {least}. Raise "
                "microbatches, or use schedule='gpipe'."
            )
        rounds = max(1, n // ranks)
        if self.schedule in ("interleaved", "zero-bubble") and n % rounds:
            raise ConfigError(
                f"Pipeline(schedule={self.schedule!r}, microbatches={n}) on {ranks} ranks: they run in {rounds} rounds, which do "
                f"not divide {n}. Use {n // ranks * ranks}."
            )
        return n


def make_pipeline(option: Pipeline | str) -> Pipeline:
    """Return the Pipeline of an option: one as it is, "auto", or the name of a schedule."""
    if isinstance(option, Pipeline):
        return option
    if not isinstance(option, str):
        raise ConfigError(
            f"pipeline={option!r}: expected a Pipeline, 'auto', or the name of a schedule ({', '.join(SCHEDULES)})."
        )
    return Pipeline() if option == "auto" else Pipeline(schedule=option)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether what the module computes or keeps depends on which samples are run together."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    )


def _schedule_name(name: str) -> str:
    plain = str(name).lower().replace("_", "-")
    for known, kind in SCHEDULES.items():
        if plain in (known, kind.torch_name.lower(), kind.torch_name.lower().removeprefix("schedule")):
            return known
    raise unknown_name("schedule", str(name), SCHEDULES, where="for a pipeline")
