"""Strategy: the contract between a run and its machine. The base class is the single-device strategy.

A strategy owns where the models live, how they are cut up, and how gradients come together. One object serves one run (or one of
several models in it). The order of calls, which `contract.py` checks for every strategy:

    start(world)                                    once; the world is shared by all strategies of a run
    prepare(models, optimizers)                     both jointly: an engine may fuse them, sharding re-points parameters
    bind(model, "training_step")                    the step as that model's forward
    per micro-batch:  set_gradient_sync(models, bool) -> the step -> backward(loss)
    per window:       unscale_ -> grad_norm (or gradients_finite) -> scale_gradients -> step(optimizer)
    state_tensors / load_state_tensors              under names that do not depend on the strategy
    stop()

Override what differs; nothing above this class asks which strategy it is.  Methods that the base class leaves empty are not
called on the hot path at all when `reduces_gradients` and `precision.scales_loss` are False.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import gradients, named_state
from .errors import ConfigError
from .precision.base import Precision
from .registry import PRECISION_ALIASES, PRECISIONS, find, find_strategy

if TYPE_CHECKING:
    from pathlib import Path

    from .compile import Compiled
    from .mesh import ParallelPlan
    from .pipeline_parallel import PipelinedModel
    from .whole_tensors import WholeTensors
    from .world import World

__all__ = ["Strategy", "make_precision", "make_strategy"]


class Strategy:
    """One process, one device: the model as it is.

    Args:
        precision: a name or a `Precision`; None takes the run's.
        inference: the models are only evaluated: no gradients are kept for them and no optimizer is taken.
        activation_checkpointing: True, "full", "selective", "offload" or an `ActivationCheckpointing`; see activation.py.
        compile: True, a backend of torch.compile, or a `Compile`; see compile.py. None takes the run's, as with the other.
    """

    name = "single"
    reduces_gradients = False  # True where gradients of several ranks are averaged in the backward pass
    needs_group = False  # True where a process group is needed even for one process

    def __init__(
        self,
        *,
        precision: str | Precision | None = None,
        inference: bool = False,
        activation_checkpointing: Any = None,
        compile: Any = None,
    ) -> None:
        self.precision: Precision | None = None if precision is None else make_precision(precision)
        self.inference = inference
        self.activation_checkpointing, self.compile = activation_checkpointing, compile
        self._compiled: list[Compiled] = []
        self._unchecked = False  # whether there is something compiled that no step has run yet
        self._recomputed: dict[str, list[str]] = {}  # model -> its blocks whose activations are computed again
        self._world: World | None = None

    @classmethod
    def from_words(cls, number: str | None, axes: Mapping[str, int]) -> dict[str, Any]:
        """Return the arguments that a string such as "name:2+tp:2" stands for: `number` after the name, and further axes.

        Raises:
            ConfigError: the strategy takes no such thing.
        """
        said = "+".join([f":{number}"] * (number is not None) + [f"{axis}:{n}" for axis, n in axes.items()])
        raise ConfigError(
            f"strategy={cls.name!r} takes no degrees, got {said!r} beside it. The number of processes says how many there are: "
            f"say strategy={cls.name!r}."
        )

    # -- life ---------------------------------------------------------------------------------------------------------
    def start(self, world: World) -> None:
        """Take the world; refuse what this strategy cannot do in it.

        Raises:
            ConfigError: more processes than this strategy uses, or a precision that the device cannot do.
        """
        self._world = world
        if self.precision is None:
            self.precision = Precision()
        self.check_world(world)
        if reason := self.precision.available(world.device):
            raise ConfigError(reason)

    def check_world(self, world: World) -> None:
        """Refuse a world that this strategy cannot use."""
        if world.size > 1 and not self.inference:
            raise ConfigError(
                f"strategy='single' was asked for on {world.size} processes, which would train {world.size} models that do not "
                "know of each other. Use strategy='ddp' (or 'auto'), or start one process."
            )

    def take_plan(self, plan: ParallelPlan, world_size: int) -> None:
        """Take the run's `plan`, before `start`. Without an axis of its own a strategy can only hold copies.

        Raises:
            ConfigError: the plan does not fit the number of processes, or names an axis that the strategy has not.
        """
        others = [a for a, d in plan.resolve(world_size).degrees().items() if d > 1 and a != "dp_replicate"]
        if others:
            raise ConfigError(
                f"The plan {plan} names {', '.join(others)}, and strategy={self.name!r} holds a whole copy on each process. "
                " Leave strategy out, which then follows the plan, or the axis."
            )

    def stop(self) -> None:
        """Let go of what `start` and `prepare` made. The world is not the strategy's to stop."""
        self._compiled.clear()
        self._recomputed.clear()
        self._world = None

    @property
    def world(self) -> World:
        if self._world is None:
            raise ConfigError(f"Strategy {self.name!r} was not started. Pass it to a Trainer or an Accelerator, which starts it.")
        return self._world

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def data_shard(self) -> tuple[int, int]:
        """Which slice of every batch this rank reads: (index, count)."""
        return 0, 1

    @property
    def loss_ranks(self) -> int:
        """Over how many ranks, each with its own part of the loss, the backward pass averages gradients."""
        return self.data_shard[1]

    def take_run(self, **settings: Any) -> None:
        """Take what the run says: gradient_accumulation_steps, gradient_clipping, train_micro_batch_size_per_gpu. None is unsaid.

        A strategy that is configured beside the run (DeepSpeed's JSON) holds it against that.
        """

    # -- building -----------------------------------------------------------------------------------------------------
    def init_context(self) -> AbstractContextManager[Any]:
        """The context in which `configure_model` runs: where a strategy cuts parameters up as soon as they are made."""
        return nullcontext()

    def prepare(
        self, models: Mapping[str, nn.Module], optimizers: Sequence[Optimizer] | Callable[[], Sequence[Optimizer]]
    ) -> tuple[dict[str, nn.Module], list[Optimizer]]:
        """Convert, move and cut up `models`, then take `optimizers` (or build them, once the models are ready).

        Returns what is to be called in the models' place, and the optimizers to step, each in the order given.
        """
        prepared = {name: self.prepare_model(name, model) for name, model in models.items()}
        built = optimizers() if callable(optimizers) else optimizers
        for optimizer in built:
            self._refuse_stand_in(optimizer)
        return prepared, [self.prepare_optimizer(o) for o in built]

    def _refuse_stand_in(self, found: Any) -> None:
        """Refuse what stands for a part of a configuration that this strategy has not: DummyOptim, DummyScheduler."""
        if what := getattr(found, "stands_for", None):
            raise ConfigError(
                f"{type(found).__name__} stands for {what}, and strategy {self.name!r} has none. Use one of torch, or "
                "strategy=DeepSpeedStrategy(config=...)."
            )

    def prepare_model(self, name: str, model: nn.Module) -> nn.Module:
        """Convert `model` to the precision and move it to the device, in place."""
        assert self.precision is not None
        if meta := [key for key, tensor in model.named_parameters() if tensor.is_meta]:
            more = f", and {len(meta) - 1} more are" if meta[1:] else ""
            raise ConfigError(
                f"{meta[0]} of model {name!r} is on the meta device, where it has no values{more}. "
                "Load or initialise them before the model is prepared (model.to_empty(device=...))."
            )
        if self.inference:
            model.requires_grad_(False)
            model.eval()
        model = self.shape_blocks(name, self.precision.convert(model)).to(self.device)
        if self.precision.autocast_dtype is not None:
            from .precision.forward import run_inside

            run_inside(model, self.precision.autocast(self.device), self.device)
        return model

    def shape_blocks(self, name: str, model: nn.Module) -> nn.Module:
        """Let the blocks of a converted `model` be computed again in the backward pass, and be compiled, where that was asked."""
        if self.activation_checkpointing and not self.inference:
            from .activation import checkpoint_blocks, read_checkpointing

            if (how := read_checkpointing(self.activation_checkpointing)) is not None:
                self._recomputed[f"{name}: {how.mode}"] = checkpoint_blocks(name, model, how, self.device)
        if self.compile:
            from .compile import compile_blocks, read_compile

            if (options := read_compile(self.compile)) is not None:
                self._compiled.append(compile_blocks(name, model, options))
                self._unchecked = not self.inference
        return model

    def adopt(self, optimizer: Optimizer) -> None:
        """Give an `optimizer` that was built before its models were prepared the parameters that they hold now, if others."""

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Take an optimizer whose parameters are those of prepared models; move state that it already has to the device."""
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.device != parameter.device:
                    state[key] = value.to(parameter.device)
        return optimizer

    def take_scheduler(self, scheduler: Any, optimizer: Optimizer) -> None:
        """Take a scheduler over a prepared `optimizer`: one that stands for a configuration's (DeepSpeed's JSON) is made now."""
        self._refuse_stand_in(scheduler)

    def configured_optimizer(self, model: nn.Module) -> Any:
        """Return what `configure_optimizers` leaves to the strategy by returning None: {"optimizer": ...}; None is nothing."""
        return None

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the module that the user wrote, from what `prepare` returned for it."""
        return model

    def bind(self, model: nn.Module, method: str) -> Callable[..., Any]:
        """Return `model.<method>` such that it runs as the model's forward, with all that the strategy does around one.

        `model` is the user's module. Called once per step method, not per step.
        """
        return getattr(model, method)

    def pipeline_of(self, model: nn.Module) -> PipelinedModel | None:
        """Return what runs the user's `model` in stages, where it is never called as a whole; else None."""
        return None

    def sharing(
        self, tensors: Sequence[Tensor], dims: Sequence[int], kept: Sequence[Tensor] = ()
    ) -> AbstractContextManager[None]:
        """Return a context in which `tensors` are this rank's part of their sequence, dimension `dims`, if ranks share sequences.

        At its end they are whole again, but for those in `kept`. See context_parallel.py.
        """
        return nullcontext()

    # -- one micro-batch ----------------------------------------------------------------------------------------------
    def set_gradient_sync(self, models: Iterable[nn.Module], enabled: bool) -> None:
        """Say whether the coming backward averages gradients over ranks. Called only where `reduces_gradients`.

        `models` are the prepared ones; none means all that this strategy prepared.
        """

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass of `loss`, already divided for its window."""
        loss.backward(**kwargs)

    # A backward pass that reaches the models of several strategies is run by one of them, between these calls of all others.
    def begin_backward(self, loss: Tensor) -> None:
        """Make this strategy's models ready for a backward pass of `loss` that another strategy runs."""

    def end_backward(self) -> None:
        """Finish what that backward pass left: on return the gradients are as after `backward`. Collective where that is."""

    def break_backward(self) -> None:
        """Forget a backward pass that failed."""

    def manual_backward(self, loss: Tensor, **kwargs: Any) -> None:
        """The same, called by the user inside a step that runs under manual optimisation."""
        self.backward(loss, **kwargs)

    def requires_grad_changed(self) -> None:
        """Take notice that parameters of optimizers require gradients, or no more, from now on; also called inside a step."""

    # -- one optimizer step -------------------------------------------------------------------------------------------
    def grad_norm(self, parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Return the norm of all gradients of `parameters` over all ranks: 0-d, at least fp32, the same on all ranks."""
        return gradients.grad_norm([p.grad for p in parameters if p.grad is not None], norm_type)

    def gradients_finite(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether all gradients of `parameters`, on all ranks, are finite. Reads one value from the device."""
        return gradients.all_finite([p.grad for p in parameters if p.grad is not None])

    def scale_gradients(self, parameters: Sequence[nn.Parameter], factor: Tensor | float) -> None:
        """Multiply all gradients of `parameters` by `factor` in place."""
        gradients.scale_(gradients.gradients(parameters), factor)

    def clip_values(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        """Clamp all gradients of `parameters` to [-limit, limit] in place."""
        gradients.clip_values_(gradients.gradients(parameters), limit)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Bring scaled gradients back to the loss's unit. Called only where `precision.scales_loss`."""
        assert self.precision is not None
        self.precision.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Step `optimizer`; return whether it stepped."""
        assert self.precision is not None
        if self._unchecked:
            self._check_compiled()
        return self.precision.step(optimizer)

    def _check_compiled(self) -> None:
        """Look, after the first forward passes, whether what was to be compiled was."""
        self._unchecked = False
        for compiled in self._compiled:
            compiled.check()

    # -- state --------------------------------------------------------------------------------------------------------
    def sync_buffers(self, models: Iterable[nn.Module]) -> None:
        """Make the buffers of the prepared `models` the same on all ranks: called before an evaluation. Collective."""

    def state_tensors(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (tensors, JSON values) under the names of named_state.py. `models` are the user's modules.

        Local: no rank waits for another. A tensor may be a `Shard` where ranks hold pieces; what a rank leaves out, others write.
        """
        tensors, values = named_state.optimizer_state(models, optimizers)
        return named_state.model_tensors(models) | tensors, values

    def load_state_tensors(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        names: Iterable[str],
        read: Callable[[str], Tensor],
        values: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> list[str]:
        """Copy a checkpoint's tensors into `models` and `optimizers`; return the names skipped under `strict=False`.

        Args:
            read: returns the full tensor of a name; a `named_state.Source` can read pieces of it as well.
        """
        names = list(names)
        # All or nothing: an optimizer that does not fit is found before the weights are copied.
        return named_state.load_model_tensors(
            models,
            names,
            read,
            strict=strict,
            before=lambda: named_state.load_optimizer_state(models, optimizers, names, read, values, place=self.place),
            place=self.place,
        )

    def place(self, own: Tensor, name: str, source: named_state.Source) -> Tensor:
        """Read what `own`, a tensor of a model or a parameter with optimizer state, is filled with: here the whole of `name`."""
        return source(name)

    def load_weights(self, model: nn.Module, folder: Path, *, strict: bool = True) -> list[str]:
        """Copy the bare weights in `folder` (checkpoint/weights.py) into the user's `model`; return what was skipped.

        Each rank reads what it holds, and nothing else.
        """
        from .checkpoint.weights import load_weights

        return load_weights(model.state_dict(keep_vars=True), folder, strict=strict, place=self.place)

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole state of the user's `model`, at least on rank 0, under its own names. All ranks call it.

        Where ranks hold pieces it takes the whole model's bytes in rank 0's host memory; `whole_tensors` does not.
        """
        return model.state_dict()

    def whole_tensors(self, model: nn.Module) -> WholeTensors:
        """Return the whole tensors of the user's `model`, to be read one at a time on rank 0. All ranks call it."""
        from .whole_tensors import WholeTensors

        return WholeTensors(self.world, self.full_state_dict(model))

    def explain(self) -> list[tuple[str, str]]:
        """Return (what, how) rows for the start-up lines."""
        rows = [("strategy", self.name), ("processes", str(self.world.size))]
        for what, blocks in self._recomputed.items():
            rows.append((f"recomputed ({what})", f"{len(blocks)} blocks: {blocks[0]}" + (", ..." if blocks[1:] else "")))
        return [*rows, *(compiled.explain() for compiled in self._compiled)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(precision={self.precision.name if self.precision else None!r})"


def make_strategy(strategy: str | Strategy, **options: Any) -> Strategy:
    """Return the strategy that a string stands for (registry.py has the grammar), made with `options`.

    An object is returned as it is.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        raise ConfigError(
            f"strategy must be a name or a Strategy object, got {strategy!r}. "
            "For example strategy='ddp' or strategy=DDPStrategy()."
        )
    cls, number, axes = find_strategy(strategy)
    if number is not None or axes:
        options = cls.from_words(number, axes) | options
    return cls(**options)


def make_precision(precision: str | int | Precision) -> Precision:
    """Return the precision that a name (or Lightning's 16, 32, 64) stands for; an object is returned as it is."""
    if isinstance(precision, Precision):
        return precision
    if not isinstance(precision, str | int):
        raise ConfigError(f"precision must be a name or a Precision object, got {precision!r}. For example 'bf16-mixed'.")
    return find("precisions", "precision", PRECISIONS, PRECISION_ALIASES, str(precision))()
