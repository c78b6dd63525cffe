"""One micro-batch and one optimizer step: the part of `Accelerator` that every step of a training goes through.

    accumulate        opens the next micro-batch of the window (accumulation.py)
    forward_backward  the step under the precision, then `backward`
    backward          the loss weighted for its window, scaled for fp16, and its backward pass
    step              what is left for the gradients (a factor, the clipping), the check that they are finite, the optimizer
What a step asks is looked up once, in `_configure_hot_path`, so that an idle feature costs a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..strategies.errors import DataError, NonFiniteError
from ..strategies.gradients import mean_loss
from . import config as configuration
from .accumulation import MEAN, SUM, mixed_window

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.pipeline_parallel import PipelinedModel
    from ..strategies.precision.base import Precision
    from ..strategies.world import World
    from .accumulation import Window
    from .data.loader import Loader
    from .optimizers import PreparedOptimizer

__all__ = ["Accumulating", "Stepping"]


class Stepping:
    """Forward, backward and optimizer step, over accumulation windows."""

    world: World
    strategy: Strategy
    strategies: dict[str, Strategy]
    precision: Precision
    window: Window
    nonfinite: str
    models: dict[str, nn.Module]
    optimizers: dict[str, PreparedOptimizer]
    active_loader: Loader | None
    skipped_steps: int
    last_grad_norm: Tensor | None
    before_backward: Sequence[Callable[[Tensor], None]]
    after_backward: Sequence[Callable[[], None]]
    _bound: dict[Callable[..., Any], Callable[..., Any]]
    _accumulating: Accumulating
    _gated: Tensor | None = None
    loss_limit: Tensor | None = None  # 0-d: a step with a micro-batch whose mean loss is above it is left out, as if it were NaN
    pipeline_kind: int = 0  # under a pipeline: what its losses are, as in `Window.kind`
    pipeline_over: Tensor | None = None  # under a pipeline: not 0 if a micro-batch of the window was above `loss_limit`
    nonfinite_steps: int = 0  # steps left out because a gradient was NaN or Inf, as of now (CPU) or of the last `check_finite`
    wants_norm: bool = False  # whether the next step should leave its norm in last_grad_norm; the Trainer asks at log points

    def _configure_hot_path(self) -> None:
        """Look up once what every step would ask: nothing of this changes after `prepare`."""
        own = [s for s in (self.strategy, *self.strategies.values()) if not s.inference]
        self._syncing = [s for s in own if s.reduces_gradients]
        self._others = [s for s in dict.fromkeys(own) if s is not self.strategy]
        self._scales_loss = self.precision.scales_loss
        self._autocast = self.precision.autocast(self.world.device) if self.precision.autocast_dtype is not None else None
        self._convert_input = self.precision.convert_input if self.precision.param_dtype is not None else None
        self._reads_loss = self.nonfinite != "ignore" and self.world.device.type == "cpu"
        self._checks_gradients = self.nonfinite != "ignore" and not self._scales_loss
        self._gates = self.world.device.type != "cpu"
        self._pipelined = any(s.pipeline_of(model) is not None for s in own for model in self.models.values())

    # -- one micro-batch ----------------------------------------------------------------------------------------------
    @property
    def gradient_accumulation_steps(self) -> int:
        return self.window.wanted

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        configuration.check_at_least("gradient_accumulation_steps", steps, 1)
        self.window.resize(steps)

    @property
    def sync_gradients(self) -> bool:
        """Whether the open micro-batch ends its window, so that the optimizers step."""
        return self.window.sync

    def accumulate(self, *models: nn.Module) -> Accumulating:
        """Open the next micro-batch: `with accelerator.accumulate(model):` around its forward, backward and step."""
        self.window.begin(self.active_loader)
        for strategy in self._syncing:
            strategy.set_gradient_sync(models, self.window.sync)
        return self._accumulating

    def no_sync(self, *models: nn.Module) -> _NoSync:
        """A context in which backward passes leave the gradients of this rank as they are."""
        return _NoSync(self._syncing, models)

    def forward_backward(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run `step(*args)` under the precision, and the backward pass of its loss; return the step's own result.

        A step of a model that is run as a pipeline is not called: its schedule runs here, and compute_loss gives the loss.

        The result is a 0-d tensor (the mean loss), or a dict with "loss" and, if the loss is a sum, "num_items"; None skips it.
        Raises:
            DataError: anything else.
            NonFiniteError: the loss is NaN or Inf (see `nonfinite`).
        """
        if self._pipelined and (pipe := self._pipeline_of(step)) is not None:
            from .pipelining import train_batch

            return train_batch(self, pipe, args[0] if self._convert_input is None else self._convert_input(args[0]))
        step = self._bound.get(step, step)
        if self._convert_input is not None:
            args = self._convert_input(args)
        if self._autocast is None:
            output = step(*args)
        else:
            with self._autocast:
                output = step(*args)
        if isinstance(output, Tensor):
            self.backward(output)
        elif isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            self.backward(output["loss"], num_items=output.get("num_items"))
        elif output is not None or self.world.size > 1:
            raise _unusable(step, output, self.world)
        return output

    def _pipeline_of(self, step: Callable[..., Any]) -> PipelinedModel | None:
        """What runs the model that `step` is a method of in stages."""
        owner = getattr(step, "__self__", None)
        found = (s.pipeline_of(owner) for s in (self.strategy, *self.strategies.values()) if isinstance(owner, nn.Module))
        return next((pipe for pipe in found if pipe is not None), None)

    def backward(self, loss: Tensor, *, num_items: Tensor | int | None = None, **kwargs: Any) -> None:
        """Run the backward pass of `loss`, weighted for its window.

        Args:
            loss: 0-d: a mean over the micro-batch; or, with `num_items`, a sum over that many items (tokens, say).
        """
        try:
            if loss.ndim or loss.grad_fn is None:
                loss = _checked_loss(loss)
            if self._reads_loss and not math.isfinite(loss.item()):
                loss = self._loss_not_finite(loss)
        except (AttributeError, TypeError):
            raise _no_loss(loss) from None
        window = self.window
        if not window.index:  # outside of `accumulate`
            stepped = any(o.window == window.number for o in self.optimizers.values())
            window.alone(self.active_loader, fresh=stepped or not window.number)
        for hook in self.before_backward:
            hook(loss)
        if self.loss_limit is not None:
            # NaN gradients on one rank are NaN on all: every rank leaves the step out, and no value is read to decide it.
            loss = loss * torch.where(mean_loss(loss, num_items) > self.loss_limit, math.nan, 1.0).to(loss.dtype)
        if num_items is not None:
            loss = window.weigh_sum(loss, num_items, self.world)
        else:
            if window.kind == SUM:
                raise mixed_window()
            window.kind = MEAN
            if window.scale != 1.0:
                loss = loss * window.scale
        if self._scales_loss:
            loss = self.precision.scale(loss)
        window.backwards += 1
        if self._others:
            self._joint_backward(self.strategy.backward, loss, **kwargs)
        else:
            self.strategy.backward(loss, **kwargs)
        for hook in self.after_backward:
            hook()

    def _joint_backward(self, run: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        """Let the main strategy run a backward pass that may reach the models of others: each does its own around it."""
        for strategy in self._others:
            strategy.begin_backward(loss)
        try:
            run(loss, **kwargs)
        except Exception:
            for strategy in self._others:
                strategy.break_backward()
            raise
        for strategy in self._others:
            strategy.end_backward()

    def manual_backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass of `loss` from inside a step that optimises manually; gradients of all ranks are averaged."""
        try:
            if loss.ndim or loss.grad_fn is None:
                loss = _checked_loss(loss)
            if self._reads_loss and not math.isfinite(loss.item()):
                loss = self._loss_not_finite(loss)
        except (AttributeError, TypeError):
            raise _no_loss(loss) from None
        loader, ranks = self.active_loader, self.window.ranks
        if loader is not None and loader.num_samples * ranks != loader.global_samples:  # a ragged tail: ranks hold unequal parts
            loss = loss * (loader.num_samples * ranks / loader.global_samples)
        self.window.backwards += 1
        loss = self.precision.scale(loss) if self._scales_loss else loss
        if self._others:
            self._joint_backward(self.strategy.manual_backward, loss, **kwargs)
        else:
            self.strategy.manual_backward(loss, **kwargs)

    def _loss_not_finite(self, loss: Tensor) -> Tensor:
        """Raise, or (policy "skip") return a loss whose gradients are NaN, so that every rank sees it in the reduced gradient."""
        if self.nonfinite == "raise" and not self._scales_loss:
            raise NonFiniteError(
                f"The loss is {loss.item()} on rank {self.world.rank}. The weights are unchanged since the last step. "
                "Look at the batch and the learning rate, or pass nonfinite='skip' to leave such steps out."
            )
        return loss * math.nan

    def autocast(self) -> Any:
        """The context of the precision, for code outside `forward_backward` and prepared models."""
        return self.precision.autocast(self.world.device)

    # -- one optimizer step -------------------------------------------------------------------------------------------
    def step(self, optimizer: PreparedOptimizer, *, max_norm: float | None = None, clip_value: float | None = None) -> bool:
        """Clip and step `optimizer` when the window is complete; return whether it stepped. `optimizer.step()` calls this.

        Raises:
            NonFiniteError: a gradient is NaN or Inf (see `nonfinite`); the weights are unchanged.
        """
        window = self.window
        optimizer.stepped = False
        if not window.sync:
            return False
        optimizer.step_was_skipped = True
        strategy = optimizer.strategy
        parameters = optimizer.parameters
        if self._scales_loss:
            strategy.unscale_(optimizer.optimizer)
        factor = None
        if window.uneven:
            factor = window.settle(self.world)
            if isinstance(factor, float) and factor == 0.0:  # the whole window held no items: there is nothing to step on
                self.skipped_steps += 1
                optimizer.window = window.number
                return False
            if optimizer.window == window.number:  # multiplied already, by `clip_grad_norm_` or `settle_gradients`
                factor = None
        optimizer.window = window.number
        if self._checks_gradients and max_norm is None and not self.wants_norm and not self._gates:
            if not strategy.gradients_finite(parameters):
                self._gradients_not_finite(optimizer)
                return False
        elif max_norm is not None or self._checks_gradients or self.wants_norm:
            norm = strategy.grad_norm(parameters)
            self.last_grad_norm = norm
            if self._checks_gradients:
                if self._gates and _takes_found_inf(optimizer.optimizer):
                    self._gate(norm, optimizer.optimizer)
                elif not math.isfinite(norm.item()):
                    self._gradients_not_finite(optimizer)
                    return False
            if max_norm is not None:
                scale = 1.0 if factor is None else factor
                # The norm of the corrected gradient is scale * norm; both go into one multiplication.
                factor = (max_norm / (norm * scale + 1e-6)).clamp_(max=1.0) * scale
                self.last_grad_norm = norm * scale
            elif factor is not None:
                self.last_grad_norm = norm * factor
        if factor is not None:
            strategy.scale_gradients(parameters, factor)
        if clip_value is not None:
            strategy.clip_values(parameters, clip_value)
        stepped = strategy.step(optimizer.optimizer)
        optimizer.stepped, optimizer.step_was_skipped = stepped, not stepped
        return stepped

    def _gate(self, norm: Tensor, optimizer: Any) -> None:
        """Let a fused `optimizer` leave its step out, on the device, when `norm` is not finite: no value is read here.

        `check_finite` reads the count of such steps, at a log point.
        """
        bad = (~torch.isfinite(norm)).float()
        optimizer.grad_scale, optimizer.found_inf = None, bad
        self._gated = bad if self._gated is None else self._gated + bad

    def check_finite(self) -> int:
        """Return how many steps were left out on the device since the last call, because a gradient was NaN or Inf.

        Raises:
            NonFiniteError: any, under nonfinite="raise". The weights are those before the first of them.
        """
        if self._gated is None:
            return 0
        count, self._gated = int(self._gated.item()), None
        if count and self.nonfinite == "raise":
            raise NonFiniteError(
                f"In {count} step(s) since the last log point a gradient was NaN or Inf. Those steps were left out: the "
                "weights hold none of it. Lower the learning rate, clip the gradients, or pass nonfinite='skip' to go on."
            )
        self.skipped_steps += count
        self.nonfinite_steps += count
        return count

    def _gradients_not_finite(self, optimizer: PreparedOptimizer) -> None:
        """Raise, or count the step as skipped."""
        if self.nonfinite == "raise":
            names = _not_finite_names(optimizer, self.models)
            raise NonFiniteError(
                f"A gradient of optimizer {optimizer.name!r} is NaN or Inf ({names}). The weights are unchanged since the last "
                "step. Lower the learning rate, clip the gradients, or pass nonfinite='skip' to leave such steps out."
            )
        self.skipped_steps += 1
        self.nonfinite_steps += 1

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor | None:
        """Scale the gradients of `parameters` to a joint norm of at most `max_norm` when the window is complete.

        Returns the norm before, 0-d, the same on all ranks; None within a window, where there is nothing to clip yet.
        """
        ready = self._ready(parameters)
        if ready is None:
            return None
        strategy, held = ready
        norm = strategy.grad_norm(held, norm_type)
        strategy.scale_gradients(held, (max_norm / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp every gradient element of `parameters` to [-clip_value, clip_value] when the window is complete."""
        ready = self._ready(parameters)
        if ready is not None:
            ready[0].clip_values(ready[1], clip_value)

    def _ready(self, parameters: Any) -> tuple[Strategy, list[nn.Parameter]] | None:
        """Bring the gradients of `parameters` into the unit of the loss; return their strategy, and them as a list."""
        if not self.window.sync:
            return None
        held: list[nn.Parameter] = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        strategy = self.strategy
        for optimizer in self.optimizers.values():
            # Those of another optimizer may not be complete yet: its backward pass may still come (a GAN's other half).
            if len(self.optimizers) == 1 or optimizer.holds(held):
                self.settle_gradients(optimizer)
                strategy = optimizer.strategy
        return strategy, held

    def settle_gradients(self, optimizer: PreparedOptimizer) -> None:
        """Bring the gradients of `optimizer` into the unit of the loss, once a window: `step` and the clipping do it too.

        Until then they may lack a factor: fp16's scale, that of a window cut short, the count of `num_items`.
        """
        window = self.window
        if window.sync and optimizer.window != window.number:
            self.unscale_gradients(optimizer)
            factor = window.settle(self.world) if window.uneven else None
            if factor is not None:
                optimizer.strategy.scale_gradients(optimizer.parameters, factor)
            optimizer.window = window.number

    def unscale_gradients(self, optimizer: PreparedOptimizer | None = None) -> None:
        """Bring fp16's scaled gradients back to the loss's unit, once a window; other precisions have nothing to do."""
        if self._scales_loss and self.window.sync:
            for one in [optimizer] if optimizer is not None else self.optimizers.values():
                one.strategy.unscale_(one.optimizer)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last complete window ended without a step of some optimizer."""
        return any(o.step_was_skipped for o in self.optimizers.values())


class Accumulating:
    """What `accumulate` returns: the window is opened by the call, so that entering and leaving cost nothing."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _NoSync:
    __slots__ = ("_models", "_strategies")

    def __init__(self, strategies: Sequence[Strategy], models: Sequence[nn.Module]) -> None:
        self._strategies, self._models = strategies, models

    def __enter__(self) -> None:
        for strategy in self._strategies:
            strategy.set_gradient_sync(self._models, False)

    def __exit__(self, *error: object) -> None:
        for strategy in self._strategies:
            strategy.set_gradient_sync(self._models, True)


def _takes_found_inf(optimizer: Any) -> bool:
    """Whether `optimizer` itself leaves out a step for which `found_inf` is set (torch's fused ones)."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _checked_loss(loss: Tensor) -> Tensor:
    if loss.dim() and loss.numel() == 1:
        loss = loss.reshape(())
    if loss.dim():
        raise DataError(f"The loss must be a scalar, got shape {tuple(loss.shape)}. Did you forget .mean()?")
    if not loss.requires_grad:
        raise DataError(
            "The loss has no gradient: it does not depend on any parameter that requires one. "
            "Was it detached, computed under no_grad, or is the whole model frozen?"
        )
    return loss


def _no_loss(loss: Any) -> DataError:
    if isinstance(loss, Tensor):
        return DataError(f"The loss must be a real scalar tensor, got {loss.dtype}. Did you mean loss.abs() or loss.real?")
    return DataError(
        f"The loss must be a scalar tensor with a gradient, got {type(loss).__name__} {loss!r:.60}. Compute it with torch's "
        "functions from what the model returned."
    )


def _unusable(step: Callable[..., Any], output: Any, world: World) -> DataError:
    name = getattr(step, "__name__", "training_step")
    if output is None:
        return DataError(
            f"{name} returned None on rank {world.rank}. On {world.size} processes every rank must take part in every step. "
            "Return a loss of weight 0, such as {'loss': total * 0, 'num_items': 0}."
        )
    loss_kind = f" whose loss is {type(output['loss']).__name__}" if isinstance(output, Mapping) and "loss" in output else ""
    found = (
        f"a dict with the keys {sorted(map(str, output))}{loss_kind}"
        if isinstance(output, Mapping)
        else f"{type(output).__name__} {output!r:.60}"
    )
    return DataError(
        f"{name} returned {found}. Expected the loss as a scalar tensor with a gradient, or {{'loss': tensor, ...}}, "
        "with 'num_items' beside it when the loss is a sum."
    )


def _not_finite_names(optimizer: PreparedOptimizer, models: Mapping[str, nn.Module]) -> str:
    held = {id(p) for p in optimizer.parameters}
    found = [
        name
        for model in models.values()
        for name, p in model.named_parameters()
        if id(p) in held and p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    return f"{', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}" or "a sum that overflows"
