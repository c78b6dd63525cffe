"""Trackers and the profiler: the part of `Accelerator` that records a run, in Accelerate's words.

    accelerator = Accelerator(log_with="tensorboard", project_dir="runs/mine")
    accelerator.init_trackers("mine", config={"lr": 0.1})
    accelerator.log({"loss": loss}, step=step)
    accelerator.end_training()
A tracker is one of our loggers (callbacks/loggers/); metrics.jsonl is always among them. Rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..callbacks.loggers.base import Logger, RunInfo
from ..strategies.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from ..strategies.world import World
    from .tracking import Tracking

__all__ = ["Trackers"]


class Trackers:
    """Recording of values and of time."""

    world: World
    project_dir: Path | None
    log_with: Any = ()
    _tracking: Tracking | None = None
    _logged_steps: int = 0
    profile_options: Any = None  # a ProfileKwargs, if one was given

    def init_trackers(
        self, project_name: str, config: Mapping[str, Any] | None = None, init_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Start the trackers of `log_with`, writing under `project_dir` (by default runs/<project_name>).

        Args:
            init_kwargs: options of trackers by their names: {"wandb": {"entity": "us"}}.
        """
        from ..callbacks.loggers import make_logger
        from .tracking import Tracking

        if self._tracking is not None:
            raise ConfigError("init_trackers was called already. Call end_training first to start others.")
        options = dict(init_kwargs or {})
        given = [self.log_with] if isinstance(self.log_with, str | Logger) else list(self.log_with or ())
        names = [g for g in given if isinstance(g, str)]
        for name in options:
            if name not in names:
                raise unknown_name("tracker", name, names or ["(none: log_with is empty)"], where="in init_kwargs")
        made = [make_logger(g, **options.get(g, {})) if isinstance(g, str) else g for g in given]
        root = self.project_dir if self.project_dir is not None else Path("runs") / project_name
        if self.world.is_main:
            root.mkdir(parents=True, exist_ok=True)
        self._tracking = Tracking(made, enabled=self.world.is_main)
        self._tracking.start(RunInfo(project_name, time.strftime("%Y%m%d-%H%M%S"), root, dict(config or {})))

    def log(self, values: Mapping[str, Any], step: int | None = None, log_kwargs: Mapping[str, Any] | None = None) -> None:
        """Record `values` (numbers or tensors of one element) at `step`; rank 0's are written.

        Raises:
            ConfigError: before init_trackers, or with options for a tracker that has none.
        """
        if self._tracking is None:
            raise ConfigError(
                "log was called before init_trackers, so there is nothing to record to. Call init_trackers(name) first."
            )
        if log_kwargs:
            raise ConfigError("log_kwargs: our trackers take no options per call. Give them to init_trackers(init_kwargs=...).")
        self._logged_steps = self._logged_steps + 1 if step is None else step
        if self.world.is_main:
            plain = {k: float(v.detach()) if isinstance(v, Tensor) else v for k, v in values.items()}
            self._tracking.log(plain, self._logged_steps)

    @property
    def trackers(self) -> list[Logger]:
        """What init_trackers started."""
        return [] if self._tracking is None else self._tracking.loggers

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """Return the tracker called `name`; with `unwrap`, the object that it drives (wandb's run, a SummaryWriter)."""
        loggers = {logger.name: logger for logger in self.trackers}
        if name not in loggers:
            raise unknown_name("tracker", name, loggers or ["(none: init_trackers was not called)"])
        logger = loggers[name]
        return getattr(logger, "run", None) or getattr(logger, "writer", None) or logger if unwrap else logger

    def _end_trackers(self) -> None:
        if self._tracking is not None:
            self._tracking.close("finished")
            self._tracking = None

    @contextmanager
    def profile(self, output_trace_dir: str | Path | None = None, **options: Any) -> Iterator[torch.profiler.profile]:
        """Profile the block by torch.profiler; with a folder, leave a Chrome trace of each rank there.

        with accelerator.profile("traces", record_shapes=True) as profiler:
            ...
            profiler.step()
        """
        if self.profile_options is not None and output_trace_dir is None and not options:
            options = self.profile_options.options()
            output_trace_dir = options.pop("output_trace_dir", None)
        with torch.profiler.profile(**options) as profiler:
            yield profiler
        if output_trace_dir is not None:
            folder = Path(output_trace_dir)
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"profile_rank{self.world.rank}.json"))
