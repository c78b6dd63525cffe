"""Accelerator: the raw API. You own the loop; `prepare` does the rest.

    accelerator = Accelerator(gradient_accumulation_steps=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

The names are those of Hugging Face Accelerate 1.x. `Trainer` is written with this class and nothing below it.
What it does lies in files beside it: `preparing`, `stepping` (a step), `accumulation` (its window), `optimizers`,
`process_control`, `gathering`, `saving` (save_state and load_state), `trackers`, `data/` (loaders).
No state of ours is global: several may live side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..strategies.base import Strategy, make_precision
from ..strategies.checkpoint.urls import local_path
from ..strategies.errors import ConfigError
from ..strategies.precision.base import Precision
from ..strategies.world import World
from . import config as configuration
from .accumulation import Window
from .data.config import DataLoaderConfiguration
from .deepspeed_plugins import HasPlugins, read_plugins
from .gathering import Gathering
from .launch.report import install_excepthook, report
from .optimizers import PreparedOptimizer, PreparedScheduler
from .pipeline import Pipelines
from .preparing import Preparing
from .process_control import ProcessControl
from .saving import Saving
from .sharing import SharedSequences
from .stepping import Accumulating, Stepping
from .trackers import Trackers

if TYPE_CHECKING:
    from ..strategies.mesh import ParallelPlan
    from .data.loader import Loader

__all__ = ["Accelerator"]


class Accelerator(HasPlugins, Preparing, Stepping, ProcessControl, Gathering, Saving, Trackers, Pipelines, SharedSequences):
    """Prepares models, optimizers, schedulers and loaders for the machine at hand, and does what a step needs beside your code.

    Args:
        strategy: a name ("auto", "single", "ddp", ...) or a `Strategy`. "auto" is single on one process and ddp on several.
        precision: a name ("fp32", "bf16-mixed", ...) or a `Precision`. Accelerate's `mixed_precision=` is the same argument.
        plan: how many processes do what (`ParallelPlan`); the strategy may be "auto" then.
        models: a strategy for each named model, for runs with several; see `prepare`.
        gradient_accumulation_steps: micro-batches a step.
        compile, activation_checkpointing: see `Compile` and `ActivationCheckpointing`; for all models that are trained.
        seed: what the order of the data (and nothing else) is drawn from.
        nonfinite: what happens when a loss or gradient is NaN or Inf: "raise" (default), "skip" the step, or "ignore".
        step_scheduler_with_optimizer: whether `scheduler.step()` waits for its optimizer; False steps at every call.
        project_dir: where `save_state()` without a path and the trackers write.
        log_with: names or objects of loggers for `init_trackers`.
        kwargs_handlers: Accelerate's words for options of the precision, of ddp, ...; see kwargs_handlers.py.
    """

    def __init__(
        self,
        *,
        strategy: str | Strategy = "auto",
        precision: str | Precision | None = None,
        device: str = "auto",
        plan: ParallelPlan | None = None,
        models: Mapping[str, str | Strategy] | None = None,
        gradient_accumulation_steps: int = 1,
        compile: Any = None,
        activation_checkpointing: Any = None,
        dataloader_config: DataLoaderConfiguration | None = None,
        project_dir: str | Path | None = None,
        log_with: Any = (),
        kwargs_handlers: Sequence[Any] | None = None,
        seed: int | None = None,
        nonfinite: str = "raise",
        step_scheduler_with_optimizer: bool = True,
        world: World | None = None,
        **peers: Any,
    ) -> None:
        install_excepthook()  # in a script, wrong use is told in a paragraph, with its exit code
        given = configuration.resolve_peers(type(self), "Accelerator", peers)
        precision = given.get("precision", precision)
        device = given.get("device", device)
        project_dir = given.get("project_dir", project_dir)
        configuration.check_choice("nonfinite", nonfinite, ("raise", "skip", "ignore"))
        configuration.check_at_least("gradient_accumulation_steps", gradient_accumulation_steps, 1)
        self._owns_world = world is None
        handled = None
        if kwargs_handlers:
            from .kwargs_handlers import apply

            handled = apply(kwargs_handlers, strategy, precision)
            strategy, precision = handled.strategy, handled.precision
        chosen = None if precision is None else make_precision(precision)
        if strategy == "auto" and not models and plan is None:
            self.plugins = read_plugins(given.get("deepspeed_plugins"))
        elif given.get("deepspeed_plugins") is not None:
            raise ConfigError("deepspeed_plugins make the strategies: leave strategy=, models= and plan= out.")
        if self.plugins is not None:
            self._main_plugin = self.plugins.active
            strategy = self._main_plugin.strategy()
            if gradient_accumulation_steps == 1:  # not said here
                gradient_accumulation_steps = self._main_plugin.gradient_accumulation_steps or 1
        if world is None:
            options = {} if handled is None else handled.world_options()
            world = World.start(device, need_group=configuration.needs_group(strategy, models, plan), **options)
            if chosen is not None and chosen.reason and world.is_main:
                print(f"precision {chosen.name}: {chosen.reason}", flush=True)
        self.world = world
        world.when_lost(lambda error: os._exit(report(error)))
        if handled is not None:
            handled.check_backend(world.backend)
            self.profile_options = handled.profile
        self.strategy, self.strategy_reason = configuration.choose_strategy(strategy, world, chosen, plan)
        self.strategy.start(self.world)
        self.strategies = configuration.start_strategies(models, self.world, chosen)
        shaping = given.get("compile", compile), activation_checkpointing
        configuration.give_shaping((self.strategy, *self.strategies.values()), *shaping)
        assert self.strategy.precision is not None
        self.precision: Precision = self.strategy.precision
        self.dataloader_config = dataloader_config if dataloader_config is not None else DataLoaderConfiguration()
        self.project_dir = None if project_dir is None else local_path(project_dir, "Accelerator(project_dir=...)")
        self.log_with = log_with
        self.seed = seed if seed is not None else 0
        self.nonfinite = nonfinite
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer

        self.models: dict[str, nn.Module] = {}  # by name, as the user wrote them
        self.prepared_models: dict[str, nn.Module] = {}  # by name, what is called in their place
        self.optimizers: dict[str, PreparedOptimizer] = {}
        self.schedulers: list[PreparedScheduler] = []
        self.loaders: list[Loader] = []
        self.registered: list[Any] = []
        self.active_loader: Loader | None = None  # the loader whose iteration is running; the innermost, if there are several
        self._iterating: list[tuple[Any, Loader]] = []
        self.skipped_steps = 0
        self.last_grad_norm: Tensor | None = None  # of the last step, before clipping; 0-d, not read

        self.window = Window(gradient_accumulation_steps, self.strategy.data_shard[1], self.strategy.loss_ranks)
        self.before_backward: Sequence[Callable[[Tensor], None]] = ()  # called with the loss; the Trainer puts its hooks here
        self.after_backward: Sequence[Callable[[], None]] = ()
        self._accumulating = Accumulating()
        self._bound: dict[Callable[..., Any], Callable[..., Any]] = {}
        configuration.tell(self, gradient_accumulation_steps=gradient_accumulation_steps)
        self._configure_hot_path()

    # -- the end ------------------------------------------------------------------------------------------------------
    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything that was prepared; return a None for each of `objects`, to overwrite your names with."""
        self.models.clear()
        self.prepared_models.clear()
        self.optimizers.clear()
        self.schedulers.clear()
        self.loaders.clear()
        self.registered.clear()
        self._bound.clear()
        self._iterating.clear()
        self.active_loader = None
        self.window.close()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
        return [None for _ in objects]

    def end_training(self) -> None:
        """Finish a save that is under way, close the trackers, stop the strategies, and the world if it was started here.

        Raises:
            CheckpointError: the last `save_state(wait=False)` failed and nobody was told; everything is stopped by then.
        """
        try:
            self._stop()
        finally:
            self.settle_saves()

    def _stop(self) -> None:
        self._end_trackers()
        self.strategy.stop()
        for strategy in self.strategies.values():
            strategy.stop()
        if self._owns_world:
            self.world.stop()

    def __repr__(self) -> str:
        what = f"{self.strategy.name} x{self.world.size}, {self.precision.name}, {self.device}"
        return f"Accelerator({what}, window={self.window.size})"
