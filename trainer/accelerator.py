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
What it does lies in files beside it: `stepping` (a step), `accumulation` (its window), `optimizers`,
`process_control`, `gathering`, `saving` (save_state and load_state), `trackers`, `data/` (loaders).
No state of ours is global: several may live side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..strategies.base import Strategy, make_precision
from ..strategies.dispatched import check_dispatched
from ..strategies.errors import ConfigError
from ..strategies.precision.base import Precision
from ..strategies.world import World
from . import config as configuration
from .accumulation import Window
from .data.config import DataLoaderConfiguration
from .deepspeed_plugins import HasPlugins, read_plugins
from .gathering import Gathering
from .launch.report import install_excepthook
from .optimizers import PreparedOptimizer, PreparedScheduler, check_strays, owners
from .pipeline import Pipelines
from .process_control import ProcessControl
from .saving import Saving
from .stepping import Accumulating, Stepping
from .trackers import Trackers

if TYPE_CHECKING:
    from ..strategies.mesh import ParallelPlan
    from .data.loader import Loader

__all__ = ["Accelerator"]


class Accelerator(HasPlugins, Stepping, ProcessControl, Gathering, Saving, Trackers, Pipelines):
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
        self.project_dir = None if project_dir is None else Path(project_dir)
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

    # -- prepare ------------------------------------------------------------------------------------------------------
    def prepare(self, *objects: Any) -> Any:
        """Prepare models, optimizers, schedulers and loaders; return them in the order given (a single one bare).

        Models are named "model", "model_1", ... in the order in which they are prepared; `prepare_models` takes names.
        Raises:
            ConfigError: an object that is none of these, or a model that is prepared twice.
        """
        models = [o for o in objects if isinstance(o, nn.Module)]
        optimizers = [o for o in objects if isinstance(o, Optimizer)]
        configuration.tell_batch_size(self, *objects)
        if self.plugins is not None:
            steps = self.window.wanted
            names = self._new_names(len(models))
            self._give_to_plugin(names, trained=bool(optimizers), precision=self.precision, gradient_accumulation_steps=steps)
        names = self._new_names(len(models))
        prepared_models, prepared_optimizers = self.prepare_models(dict(zip(names, models, strict=True)), optimizers)
        done: dict[int, Any] = {id(m): prepared_models[n] for n, m in zip(names, models, strict=True)}
        done |= {id(o): p for o, p in zip(optimizers, prepared_optimizers, strict=True)}
        results = []
        for o in objects:
            if id(o) in done:
                results.append(done[id(o)])
            elif isinstance(o, LRScheduler | ReduceLROnPlateau):
                results.append(self.prepare_scheduler(o))
            elif hasattr(o, "__iter__") and not isinstance(o, str | bytes | Tensor):
                results.append(self.prepare_data_loader(o))
            else:
                raise ConfigError(
                    f"prepare takes models, optimizers, schedulers and data loaders, got {type(o).__name__} {o!r:.60}. "
                    "Keep it out of the call."
                )
        return results[0] if len(results) == 1 else tuple(results)

    def prepare_models(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Sequence[Optimizer] | Callable[[], Mapping[str, Optimizer]] = (),
    ) -> tuple[dict[str, nn.Module], list[PreparedOptimizer]]:
        """Prepare named models and the optimizers over them, jointly.

        Args:
            optimizers: those of the models, or a function that builds them once the models are ready (by name).
        Returns: what is to be called in the models' place, and the prepared optimizers in their order.
        """
        for name, model in models.items():
            if name in self.models or any(model is m for m in [*self.models.values(), *self.prepared_models.values()]):
                raise ConfigError(f"The model {name!r} ({type(model).__name__}) is prepared already. Prepare each model once.")
            check_dispatched(name, model, self.strategies.get(name, self.strategy))
        built: Mapping[str, Optimizer] = {}
        by_strategy: dict[Strategy, dict[str, nn.Module]] = {}
        for name, model in models.items():
            by_strategy.setdefault(self.strategies.get(name, self.strategy), {})[name] = model
        self.models.update(models)
        for strategy, group in by_strategy.items():
            self.prepared_models.update(strategy.prepare(group, [])[0])
        if callable(optimizers):
            built = optimizers()
        else:
            start = len(self.optimizers)
            built = {"optimizer" if start + i == 0 else f"optimizer_{start + i}": o for i, o in enumerate(optimizers)}
        self._configure_hot_path()
        return {n: self.prepared_models[n] for n in models}, [self.prepare_optimizer(o, name=n) for n, o in built.items()]

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Prepare one model."""
        return self.prepare(model)

    def prepare_optimizer(self, optimizer: Optimizer, *, name: str | None = None) -> PreparedOptimizer:
        """Prepare one optimizer, over models that are prepared already."""
        if isinstance(optimizer, PreparedOptimizer):
            raise ConfigError("This optimizer is prepared already. Prepare each optimizer once.")
        name = name or ("optimizer" if not self.optimizers else f"optimizer_{len(self.optimizers)}")
        for one in {self.strategy, *self.strategies.values()}:
            one.adopt(optimizer)
        owning = owners(optimizer, self.models)
        check_strays(optimizer, self.models, name, self.world.size)
        strategies = {self.strategies.get(n, self.strategy) for n in owning} or {self.strategy}
        if len(strategies) > 1:
            raise ConfigError(
                f"Optimizer {name!r} holds parameters of the models {', '.join(owning)}, which have different strategies. "
                "Give each model its own optimizer."
            )
        strategy = strategies.pop()
        _, (inner,) = strategy.prepare({}, [optimizer])
        prepared = PreparedOptimizer(inner, strategy, self, name)
        self.optimizers[name] = prepared
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """Prepare one scheduler; it steps when its optimizer did, whatever the number of processes."""
        inner = getattr(scheduler, "optimizer", None)
        owner = next((p for p in self.optimizers.values() if inner is p or inner is p.optimizer), None)
        if owner is None and inner is None and len(self.optimizers) == 1:  # a scheduler that keeps its optimizer elsewhere
            owner = next(iter(self.optimizers.values()))
        if owner is None and inner is not None and self.step_scheduler_with_optimizer:
            raise ConfigError(
                f"{type(scheduler).__name__} schedules an optimizer that was not prepared, so nobody could say when it stepped. "
                "Prepare the optimizer before it, or in the same call."
            )
        prepared = PreparedScheduler(scheduler, owner if self.step_scheduler_with_optimizer else None)
        self.schedulers.append(prepared)
        return prepared

    def prepare_data_loader(self, data_loader: Any, *, training: bool | None = None) -> Loader:
        """Prepare one loader: this rank's slice of every batch, on the device, at a position that can be saved."""
        from .data.loader import prepare_loader

        loader = prepare_loader(
            data_loader,
            world=self.world,
            shard=self.strategy.data_shard,
            device=self.device,
            config=self.dataloader_config,
            seed=self.seed,
            training=True if training is None else training,
        )
        loader.on_iter = partial(self._follow, loader._course)
        self.loaders.append(loader)
        return loader

    def _follow(self, course: Any, loader: Loader | None) -> None:
        """Note that an iteration began (`loader`) or ended (None); the one that began last among the running ones is active."""
        self._iterating = [(c, one) for c, one in self._iterating if c is not course]
        if loader is not None:
            self._iterating.append((course, loader))
        self.active_loader = self._iterating[-1][1] if self._iterating else None

    def _new_names(self, count: int) -> list[str]:
        start = len(self.models)
        return ["model" if start + i == 0 else f"model_{start + i}" for i in range(count)]

    def skip_first_batches(self, dataloader: Loader, num_batches: int = 0) -> Loader:
        """Return a prepared loader like `dataloader` whose next epoch starts after `num_batches`, which are not read."""
        from .data.loader import skip_first_batches

        return skip_first_batches(dataloader, num_batches)

    def join_uneven_inputs(self, joinables: Sequence[nn.Module], even_batches: bool | None = None) -> AbstractContextManager[Any]:
        """A context in which ranks may run different numbers of steps: those without data answer the others' collectives.

        Prepared loaders need none (they never end unevenly); it is for loops over data of your own. `even_batches` is accepted:
        no loader of ours pads.   Source: torch.distributed.algorithms.join.Join.
        Raises:
            ConfigError: a model that cannot be joined (only ddp's can).
        """
        if self.world.size == 1:
            return nullcontext()
        from torch.distributed.algorithms.join import Join, Joinable

        for model in joinables:
            if not isinstance(model, Joinable):
                raise ConfigError(
                    f"join_uneven_inputs takes models prepared by ddp, got {type(model).__name__} under {self.strategy.name!r}. "
                    "Use a prepared loader: its ranks end together."
                )
        return Join([m for m in joinables if isinstance(m, Joinable)])

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return the module that was given to `prepare`."""
        for name, prepared in self.prepared_models.items():
            if prepared is model:
                return self.models[name]
        return model

    def bind(self, model: nn.Module, method: str) -> Callable[..., Any]:
        """Let `forward_backward(model.<method>, ...)` run it as the model's forward; return what it runs."""
        name = next((n for n, m in self.models.items() if m is model), None)
        strategy = self.strategies.get(name, self.strategy) if name is not None else self.strategy
        bound = strategy.bind(model, method)
        self._bound[getattr(model, method)] = bound
        return bound

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
