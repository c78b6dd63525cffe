"""Held: one model of a DeepSpeedStrategy with its engine, its optimizer and the state of its gradients.

    Held(name, model)      taken by `prepare_model`
    attach(engine, front)  the engine is there: `front` is the user's optimizer, whose twin the engine steps
    begin_backward ... end_backward ... settle ... gradients ... step
The engine's own forward and backward are not used: the run calls the user's module, and any number of engines may share one
backward pass. What remains of them is what DeepSpeed itself does for a plain `loss.backward()`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import deepspeed_engine, gradients
from .deepspeed_state import Partitions
from .deepspeed_swap import keep_gradients
from .errors import ConfigError

__all__ = ["Held", "trained", "twin_of"]

# Optimizers that treat each element by itself, so that a flat piece is stepped as the whole would be.
_ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adadelta", "ASGD")


def twin_of(front: Optimizer, *, allowed: bool, stage: int) -> Optimizer:
    """Return an optimizer of the same class and options over the same parameters, with a state of its own, for ZeRO to re-point.

    Args:
        allowed: the JSON says zero_allow_untested_optimizer.
    Raises:
        ConfigError: an optimizer that looks at whole tensors, of which ZeRO would show it pieces.
    """
    kind = type(front)
    ours = kind.__module__.startswith(("torch.optim", "deepspeed.")) and (
        kind.__name__ in _ELEMENTWISE or kind.__module__.startswith("deepspeed.")
    )
    if stage and isinstance(front, torch.optim.Adagrad):
        raise ConfigError(
            "Adagrad makes its state when it is built, of whole parameters, and ZeRO steps flat pieces of them, for which it has "
            "none. Use RMSprop or AdamW."
        )
    if stage and not ours and not allowed:
        raise ConfigError(
            f"ZeRO steps flat pieces of the parameters, and {kind.__name__} is not known to treat each element by itself. Use "
            "one "
            f"of {', '.join(_ELEMENTWISE)}; or, if it does, say config={{'zero_allow_untested_optimizer': true}}."
        )
    if front.state:
        raise ConfigError(
            f"{kind.__name__} has state already, which ZeRO would lose. Prepare it before its first step; checkpoints come after."
        )
    if stage == 0:
        return front
    twin = object.__new__(kind)
    # A scheduler that was made before wraps `step` on the instance, and the twin's must be its own.
    twin.__dict__.update({k: v for k, v in front.__dict__.items() if k != "step"})
    # Without groups that are frozen as a whole: ZeRO leaves their parameters out, and fails on what remains of the group.
    twin.param_groups = [dict(group, params=list(group["params"])) for group in front.param_groups if trained(group)]
    twin.state = defaultdict(dict)
    return twin


class Held:
    """A model, and what DeepSpeed holds for it.

    Attributes:
        engine: None until its optimizer was prepared.
        front: the user's optimizer.
        parts: the pieces of stages 1 to 3; None in stage 0 and without an optimizer.
        pending: whether there are gradients that no step and no zero_grad took.
        settled: whether they were put together.
    """

    def __init__(self, name: str, model: nn.Module, stage: int) -> None:
        self.name, self.model, self.stage = name, model, stage
        self.ids = frozenset(id(p) for p in model.parameters())
        self.born_cut_up = any(hasattr(p, "ds_id") for p in model.parameters())
        self.engine: Any = None
        self.zero: Any = None  # DeepSpeed's optimizer, where it is one of stages 1 to 3
        self.front: Optimizer | None = None
        self.parts: Partitions | None = None
        self.pending = self.settled = False
        self.awaits = ""  # the type of a scheduler in the JSON that was not prepared yet
        self.running = False  # whether a bound step is under way
        self.reads_native = False  # whether DeepSpeed loads its own checkpoint just now
        self.handles: list[Any] = []  # of the hooks that go when this does
        self.swaps = False  # whether its masters and their state lie on a disk
        self._by_hooks = False  # whether ZeRO's hooks finish a backward pass by themselves
        self._waiting: Any = None
        self._view: Any = None

    # -- building -----------------------------------------------------------------------------------------------------
    def wait_for_optimizer(self, build: Callable[[], None]) -> None:
        """A model that was built in pieces cannot run without an engine: it gets one at its first forward, at the latest."""
        self._waiting = self.model.register_forward_pre_hook(lambda *_: build() if self.engine is None else None)

    def attach(self, engine: Any, front: Optimizer | None) -> None:
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None
        self.engine, self.front = engine, front
        self.ids = frozenset(id(p) for p in self.model.parameters())
        if front is None:
            return
        if self.stage:
            self.zero = engine.optimizer
            self.parts = Partitions(self.zero, self.stage)
            self.swaps = bool(getattr(self.zero, "swap_optimizer", False))
            if self.swaps:
                keep_gradients(self.zero)
            self._by_hooks = not hasattr(self.zero, "bf16_groups")
            self.zero.set_gradient_accumulation_boundary(False)
            self.handles.append(front.register_load_state_dict_pre_hook(self._refuse_state))
            self.handles.append(front.register_state_dict_pre_hook(self._refuse_state))
        # The loop clears gradients through the user's optimizer, and ZeRO's lie elsewhere.
        front.zero_grad = functools.partial(self._zero_grad, front.zero_grad)  # pyright: ignore[reportAttributeAccessIssue]

    def _refuse_state(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer is not self.front:  # the twin, which has these hooks too
            return
        raise ConfigError(
            f"The optimizer of model {self.name!r} keeps its state in ZeRO's pieces, and {type(self.front).__name__}."
            "state_dict() and load_state_dict() would see none of it. Save and load with save_state and load_state, or with the "
            "Trainer's checkpoints."
        )

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self._waiting is not None:
            self._waiting.remove()
        if self.front is not None:
            vars(self.front).pop("zero_grad", None)
        if self.engine is not None:
            deepspeed_engine.release(self.engine, self.model)
        vars(self.model).pop("forward", None) if self.running else None

    # -- running a step as the forward --------------------------------------------------------------------------------
    def bound(self, method: str) -> Callable[..., Any]:
        """Return `model.<method>` run between the hooks that stage 3 has around the model's forward.

        Within it the model may be called again, which then runs without these hooks: its own parameters are gathered already.
        """
        model, step = self.model, getattr(self.model, method)
        if method == "forward":
            return model

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return step(*args, **kwargs)
            before = vars(model).get("forward")

            def once(*inner: Any, **named: Any) -> Any:
                hooks = self._without_hooks()
                if before is None:
                    vars(model).pop("forward", None)
                else:
                    vars(model)["forward"] = before
                self.running = True
                try:
                    return step(*inner, **named)
                finally:
                    self.running = False
                    vars(model).update(hooks)

            vars(model)["forward"] = once
            try:
                return model(*args, **kwargs)
            finally:
                if vars(model).get("forward") is once:
                    vars(model).pop("forward")
                    if before is not None:
                        vars(model)["forward"] = before

        return run

    def _without_hooks(self) -> dict[str, Any]:
        """Take ZeRO's hooks (and the precision's, which is entered) off the model; return them, to be put back."""
        kept = {name: vars(self.model)[name] for name in ("_forward_pre_hooks", "_forward_hooks")}
        mine = self._hook_ids()
        for name, hooks in kept.items():
            vars(self.model)[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in mine)
        return kept

    def _hook_ids(self) -> set[int]:
        handles = [self.engine.module_forward_pre_hook, self.engine.module_forward_post_hook] if self.engine is not None else []
        offload = getattr(self.zero or getattr(self.engine, "optimizer", None), "parameter_offload", None)
        if offload is None and self.engine is not None and hasattr(self.engine.optimizer, "forward_hooks"):
            offload = self.engine.optimizer  # without an optimizer DeepSpeedZeRoOffload stands in its place
        if offload is not None:
            handles += [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
        return {handle.id for handle in handles}

    # -- gradients ----------------------------------------------------------------------------------------------------
    def begin_backward(self) -> None:
        if self.zero is None:
            return
        if self.settled and self.pending:
            raise ConfigError(
                f"A backward pass reaches model {self.name!r} after its gradients were clipped (or their norm taken) and "
                "before its "
                "optimizer stepped. ZeRO cannot add to them any more: run all backward passes of a step first."
            )
        if self._by_hooks:
            self.zero.clear_backward_seen_flag()
            self.zero.backward_prologue()
            self.zero.enter_backward()

    def end_backward(self) -> None:
        """Note whether gradients came. ZeRO's hooks have reduced them by now: it is a callback of autograd's own."""
        if self.engine is None or self.front is None:
            return
        if self.zero is None:
            self.pending = True
        elif not self._by_hooks:
            if any(p.grad is not None for p in self.model.parameters()):
                self.zero.backward_epilogue()
                self.pending = True
        else:
            if self.zero._hooks_fired_this_backward:
                self.pending = True
            self.break_backward()

    def break_backward(self) -> None:
        if self.zero is not None and self._by_hooks:
            while self.zero._backward_active_depth:
                self.zero.exit_backward()

    def settle(self) -> bool:
        """Put the gradients of the window together, once; return whether there are any. Collective the first time."""
        if not self.pending or self.engine is None:
            return False
        if self.settled:
            return True
        self.settled = True
        if self.parts is not None:
            self.parts.rest()
        if not self.swaps:  # else the averages are in memory until the step takes them over
            self._finalize()
        return True

    def _finalize(self) -> None:
        engine = self.engine
        engine._running_engine_step = True  # which is how DeepSpeed knows its accumulation boundary in this mode
        try:
            with deepspeed_engine.explained("Putting the gradients together"):
                if self.stage >= 2:
                    self.zero.finalize_gradient_accumulation_boundary()
                else:
                    engine.allreduce_gradients()
        finally:
            engine._running_engine_step = False
            if self.zero is not None:
                self.zero.set_gradient_accumulation_boundary(False)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        if self.parts is None:
            return gradients.gradients(parameters)
        return self.parts.gradients(parameters)

    def _zero_grad(self, front: Callable[..., None], set_to_none: bool = True) -> None:
        front(set_to_none)
        if self.parts is not None and self.pending:
            self.parts.clear()
        self.pending = self.settled = False

    def view(self, step: Callable[[], Any]) -> Any:
        """Return what GradScaler takes for an optimizer: the pieces of the gradients, each as a parameter's."""
        if self._view is None:
            self._view = SimpleNamespace(param_groups=[], step=step)
        found = []
        if self.settle():
            for piece in self.gradients(list(self.model.parameters())):
                holder = piece.detach()
                holder.grad = piece
                found.append(holder)
        self._view.param_groups = [{"params": found or [torch.zeros((), device=next(self.model.parameters()).device)]}]
        return self._view

    # -- the step -----------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Step the twin with the options that the user's optimizer has now. Without gradients nothing is stepped, as in torch."""
        front = self.front
        assert front is not None
        front._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  # what torch's schedulers look for
        if self.parts is None:
            front.step()
            self.pending = self.settled = False
            return True
        if not self.pending:
            return True
        inner = self.parts.inner
        groups = [g for g in front.param_groups if trained(g)]
        for mine, theirs in zip(groups, inner.param_groups, strict=True):
            theirs.update({k: v for k, v in mine.items() if k != "params"})
        for key in ("grad_scale", "found_inf"):  # how a fused optimizer is told to leave a step out
            if key in vars(front):
                vars(inner)[key] = vars(front)[key]
        if self.swaps:
            self.parts.swapped.close()
            self._finalize()
        self.zero.step()
        self.zero.zero_grad(set_to_none=True)
        self.parts.forget()
        applied = not self.zero.overflow
        self.engine.global_steps += 1
        self.engine.micro_steps += 1
        self.pending = self.settled = False
        return applied

    def take_options(self) -> None:
        """Give the user's optimizer the options (lr, ...) that a checkpoint of DeepSpeed's own gave its twin."""
        if self.front is None or self.parts is None:
            return
        for mine, theirs in zip([g for g in self.front.param_groups if trained(g)], self.parts.inner.param_groups, strict=True):
            mine.update({k: v for k, v in theirs.items() if k != "params"})

    def explain(self) -> list[tuple[str, str]]:
        parameters: list[Any] = list(self.model.parameters())
        total = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)
        here = sum(
            p.ds_tensor.numel() * p.element_size() if hasattr(p, "ds_tensor") else p.numel() * p.element_size()
            for p in parameters
        )
        rows = [("parameters held", f"{here:,} of {total:,} bytes on this rank")]
        if self.parts is not None:
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
            held = sum(m.numel() for m in self.parts.masters)
            rows.append(("masters held", f"{4 * held:,} of {4 * trained:,} bytes on this rank"))
            rows.append(("optimizer", f"{type(self.parts.inner).__name__} on the flat pieces"))
        return rows


def trained(group: dict[str, Any]) -> bool:
    """Whether ZeRO keeps this group: it drops those without a trained parameter."""
    return any(p.requires_grad for p in group["params"])
