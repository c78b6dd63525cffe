"""Optimizers and schedulers: what `prepare` returns for them, and what `configure_optimizers` may return.

`PreparedOptimizer` and `PreparedScheduler` are used like the ones they hold. They know the accelerator's window, so that a loop
may call `step`, `zero_grad` and `scheduler.step` on every micro-batch: they act when the window is complete.
A scheduler steps once for each optimizer step, whatever the number of processes, and not when the step was skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..strategies.errors import ConfigError, UnknownName, suggest

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from .accelerator import Accelerator

__all__ = ["PreparedOptimizer", "PreparedScheduler", "SchedulerConfig", "read_optimizers"]


class PreparedOptimizer(Optimizer):
    """An optimizer that steps when its accelerator's window is complete.

    Attributes:
        optimizer: the one that was given to `prepare` (or what the strategy made of it).
        parameters: its parameters, over all groups.
        stepped: whether the last call of `step` changed the weights. False within a window, and when the step was skipped.
        step_was_skipped: whether the last complete window ended without a step (fp16 overflow, a value not finite, no items).
    """

    def __init__(self, optimizer: Optimizer, strategy: Strategy, accelerator: Accelerator, name: str) -> None:
        # No super().__init__: the groups and the state are those of `optimizer`, and there are no second ones.
        self.optimizer = optimizer
        self.strategy = strategy
        self.accelerator = accelerator
        self.name = name
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.stepped = self.step_was_skipped = False
        self.window = -1  # the number of the window whose gradients were last brought into their unit, or stepped on
        self._ids = frozenset(map(id, self.parameters))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.defaults

    def holds(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether any of `parameters` is one of this optimizer's."""
        return any(id(p) in self._ids for p in parameters)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step when the window is complete; within a window do nothing."""
        if closure is not None:
            self.optimizer.step(closure)
            self.stepped, self.step_was_skipped, self.window = True, False, self.accelerator.window.number
        else:
            self.accelerator.step(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, unless they are still being accumulated."""
        window = self.accelerator.window
        if window.size == 1 or window.backwards == 0 or self.window == window.number:
            self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._ids = frozenset(map(id, self.parameters))

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if "optimizer" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.__dict__["optimizer"], name)

    def __repr__(self) -> str:
        return f"Prepared({self.optimizer!r})"


class PreparedScheduler:
    """A scheduler that steps once for each step of its optimizer."""

    def __init__(self, scheduler: Any, optimizer: PreparedOptimizer | None) -> None:
        self.scheduler = scheduler
        self.optimizer = optimizer

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step when the optimizer did."""
        if self.optimizer is None or self.optimizer.stepped:
            self.scheduler.step(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if "scheduler" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.__dict__["scheduler"], name)


@dataclass(frozen=True)
class SchedulerConfig:
    """A scheduler and when it steps, in Lightning's words.

    Args:
        interval: "step" (after each optimizer step) or "epoch" (at the end of each).
        frequency: every how many of them.
        monitor: the logged name whose value ReduceLROnPlateau is given; needs `interval="epoch"` or a value at that step.
        strict: whether a missing monitored value is an error.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False

    def __post_init__(self) -> None:
        if self.interval not in ("step", "epoch"):
            raise ConfigError(
                f"A scheduler's interval is 'step' or 'epoch', got {self.interval!r}. "
                "'step' is after every optimizer step, 'epoch' at the end of every epoch."
            )
        if self.frequency < 1:
            raise ConfigError(f"A scheduler's frequency is at least 1, got {self.frequency}. Leave it out for every time.")
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.monitor is None:
            raise ConfigError("ReduceLROnPlateau needs the name of a logged value: {'scheduler': s, 'monitor': 'val_loss'}.")


def read_optimizers(returned: Any, module: str) -> tuple[dict[str, Optimizer], list[SchedulerConfig]]:
    """Turn what `configure_optimizers` returned into named optimizers and scheduler configurations.

    Accepted, as in Lightning: an optimizer; a list of them; (optimizers, schedulers); {"optimizer": o, "lr_scheduler": s or
    {...}}; a list of such dicts; and {name: optimizer}. Names are "optimizer", or "optimizer_0", ... for a list.
    Raises:
        ConfigError: anything else, or an optimizer given twice.
    """
    optimizers: dict[str, Optimizer] = {}
    schedulers: list[SchedulerConfig] = []

    def add(name: str, optimizer: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            raise _unusable(module, optimizer)
        if any(o is optimizer for o in optimizers.values()):
            raise ConfigError(f"{module}.configure_optimizers returned the same optimizer twice. Return each one once.")
        optimizers[name] = optimizer

    def add_entry(name: str, entry: Any) -> None:
        if isinstance(entry, Mapping) and "optimizer" in entry:
            add(name, entry["optimizer"])
            if entry.get("lr_scheduler") is not None:
                schedulers.append(_scheduler(entry["lr_scheduler"], monitor=entry.get("monitor")))
            if unknown := set(entry) - {"optimizer", "lr_scheduler", "monitor"}:
                key = sorted(unknown)[0]
                raise UnknownName(
                    f"{module}.configure_optimizers returned the unknown key {key!r}."
                    f"{suggest(key, ('optimizer', 'lr_scheduler', 'monitor'))} Known: optimizer, lr_scheduler, monitor."
                )
        else:
            add(name, entry)

    if returned is None:
        raise ConfigError(
            f"{module}.configure_optimizers returned None. Return an optimizer, such as torch.optim.AdamW(self.parameters())."
        )
    if isinstance(returned, tuple | list) and len(returned) == 2 and all(isinstance(part, list | tuple) for part in returned):
        listed, scheduler_list = returned
        for i, optimizer in enumerate(listed):
            add("optimizer" if len(listed) == 1 else f"optimizer_{i}", optimizer)
        schedulers.extend(_scheduler(s) for s in scheduler_list)
    elif (
        isinstance(returned, tuple)
        and len(returned) == 2
        and isinstance(returned[0], Optimizer)
        and not isinstance(returned[1], Optimizer)
    ):
        add("optimizer", returned[0])
        schedulers.append(_scheduler(returned[1]))
    elif isinstance(returned, list | tuple):
        for i, entry in enumerate(returned):
            add_entry("optimizer" if len(returned) == 1 else f"optimizer_{i}", entry)
    elif isinstance(returned, Mapping) and "optimizer" not in returned and "lr_scheduler" not in returned:
        for name, entry in returned.items():
            add_entry(str(name), entry)
    else:
        add_entry("optimizer", returned)
    if not optimizers:
        raise ConfigError(f"{module}.configure_optimizers returned no optimizer. Return at least one.")
    known = {id(o) for o in optimizers.values()}
    for config in schedulers:
        inner = getattr(config.scheduler, "optimizer", None)
        if inner is not None and id(inner) not in known:
            raise ConfigError(
                f"{type(config.scheduler).__name__} schedules an optimizer that {module}.configure_optimizers did not return. "
                "Return both."
            )
    return optimizers, schedulers


def _scheduler(entry: Any, *, monitor: str | None = None) -> SchedulerConfig:
    if isinstance(entry, SchedulerConfig):
        return entry
    if isinstance(entry, Mapping):
        known = tuple(SchedulerConfig.__dataclass_fields__)
        for key in entry:
            if key not in known:
                raise UnknownName(f"There is no scheduler option {key!r}.{suggest(str(key), known)} Known: {', '.join(known)}.")
        if "scheduler" not in entry:
            raise ConfigError(f"A scheduler configuration needs the key 'scheduler', got {sorted(entry)}.")
        options: dict[str, Any] = dict(entry)
        options.setdefault("monitor", monitor)
        options.setdefault("interval", getattr(entry["scheduler"], "interval", "epoch"))
        return SchedulerConfig(**options)
    if not isinstance(entry, LRScheduler | ReduceLROnPlateau) and not hasattr(entry, "step"):
        raise ConfigError(f"A scheduler was expected, got {type(entry).__name__}. Return a torch.optim.lr_scheduler object.")
    return SchedulerConfig(entry, monitor=monitor, interval=getattr(entry, "interval", "epoch"))


def _unusable(module: str, found: Any) -> ConfigError:
    kind = f"{type(found).__name__} {found!r}" if isinstance(found, str | int | float) else type(found).__name__
    return ConfigError(
        f"{module}.configure_optimizers returned {kind} where an optimizer was expected. Return an optimizer, a list of them, "
        "(optimizers, schedulers), {'optimizer': ..., 'lr_scheduler': ...} or {name: optimizer}."
    )


def owners(optimizer: Optimizer, models: Mapping[str, nn.Module]) -> Sequence[str]:
    """Return the names of the models whose parameters `optimizer` holds, in the order of `models`."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, model in models.items() if any(id(p) in held for p in model.parameters())]


def check_strays(optimizer: Optimizer, models: Mapping[str, nn.Module], name: str, ranks: int) -> None:
    """Refuse an optimizer of nothing that was prepared; on several ranks also one with some such parameters.

    Nobody would average their gradients, and the ranks would part.
    Raises:
        ConfigError: naming how many, and the shape of the first.
    """
    known = {id(p) for model in models.values() for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strays = [p for p in held if id(p) not in known]
    if strays and (ranks > 1 or len(strays) == len(held)):
        raise ConfigError(
            f"{len(strays)} of the {len(held)} parameters of optimizer {name!r} belong to no prepared model (the first has shape "
            f"{tuple(strays[0].shape)}), so their gradients would be each rank's own. Prepare the model before its optimizer, "
            "or in the same call, and keep what prepare returned."
        )
