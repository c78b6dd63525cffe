"""Preparing what a training is made of: the part of `Accelerator` that hands models, optimizers, schedulers and loaders over.

prepare(model, optimizer, loader, scheduler)     any of them, in any order
prepare_models({"student": ..., "teacher": ...}, optimizers)     named, each by its own strategy
bind(model, "training_step")                     the step as the model's forward
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..strategies.dispatched import check_dispatched
from ..strategies.errors import ConfigError
from . import config as configuration
from .optimizers import PreparedOptimizer, PreparedScheduler, check_strays, owners

if TYPE_CHECKING:
    import torch

    from ..strategies.base import Strategy
    from ..strategies.precision.base import Precision
    from ..strategies.world import World
    from .accumulation import Window
    from .data.config import DataLoaderConfiguration
    from .data.loader import Loader

__all__ = ["Preparing"]


class Preparing:
    """prepare and its parts, and what was prepared, given back by unwrap_model."""

    world: World
    seed: int
    window: Window
    strategy: Strategy
    strategies: dict[str, Strategy]
    precision: Precision
    dataloader_config: DataLoaderConfiguration
    step_scheduler_with_optimizer: bool
    models: dict[str, nn.Module]
    prepared_models: dict[str, nn.Module]
    optimizers: dict[str, PreparedOptimizer]
    schedulers: list[PreparedScheduler]
    loaders: list[Loader]
    active_loader: Loader | None
    plugins: Any
    _bound: dict[Callable[..., Any], Callable[..., Any]]
    _iterating: list[tuple[Any, Loader]]
    _configure_hot_path: Callable[[], None]
    _give_to_plugin: Callable[..., None]

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...

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
            elif isinstance(o, LRScheduler | ReduceLROnPlateau) or (hasattr(o, "step") and hasattr(o, "get_last_lr")):
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
        prepared = PreparedOptimizer(inner, strategy, self, name)  # pyright: ignore[reportArgumentType]  only Accelerators prepare
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
        if owner is not None:
            owner.strategy.take_scheduler(scheduler, owner.optimizer)
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
