"""The optimizer and the scheduler of a DeepSpeed JSON, and what stands for them in a script, in Accelerate's words.

    optimizer = DummyOptim(model.parameters(), lr=1e-3)                       the section "optimizer"; `auto` values from here
    scheduler = DummyScheduler(optimizer, total_num_steps=1000, warmup_num_steps=100)        the section "scheduler"
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
The section's class (DeepSpeed's WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or one of torch) is made over the
user's optimizer, whose options the strategy takes at each step. It steps once for each optimizer step, whatever the number of
processes: `total_num_steps` counts these, and is not divided by the processes as Accelerate does.
Source: deepspeed.runtime.lr_schedules; accelerate.utils.DummyOptim, DummyScheduler
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .errors import ConfigError, UnknownName, suggest

__all__ = ["DummyOptim", "DummyScheduler", "check_fixed", "checked_section", "filled_scheduler"]

_AUTO = "auto"
_OWN = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")  # pinned by test_deepspeed_pins.py


class DummyOptim(Optimizer):
    """Stands for the optimizer of the DeepSpeed JSON, as in Accelerate; `auto` values there are filled from its arguments.

    Args:
        lr, weight_decay: 1e-3 and 0 where nothing is said.
        kwargs: for further `auto` values: betas, eps, ...
    """

    stands_for = "the optimizer of a DeepSpeed JSON"

    def __init__(self, params: Iterable[Any], lr: float | None = None, weight_decay: float | None = None, **kwargs: Any) -> None:
        self.said = {k: v for k, v in {"lr": lr, "weight_decay": weight_decay, **kwargs}.items() if v is not None}
        self.explicit: list[list[str]] = []  # for each group, the keys that it was given itself
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0, **self.said})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.explicit.append(list(param_group))
        super().add_param_group(param_group)

    def asked(self) -> list[dict[str, Any]]:
        """Return the groups that DeepSpeed's own optimizer is to be made with: what they do not say themselves is the section's.

        Without those that are frozen as a whole, which ZeRO drops, and DeepSpeed's optimizer would keep.
        """
        return [{key: group[key] for key in keys} for group, keys in self._trained()]

    def _trained(self) -> list[tuple[dict[str, Any], list[str]]]:
        both = zip(self.param_groups, self.explicit, strict=True)
        return [(g, keys) for g, keys in both if any(p.requires_grad for p in g["params"])]

    def fill(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return the section with its `auto` values, and what is said here only; an `auto` that nobody knows is left out."""
        given = {**self.said, **(section.get("params") or {})}
        known = {k: self.defaults.get(k, _AUTO) if v == _AUTO else v for k, v in given.items()}
        return {**section, "params": {k: v for k, v in known.items() if v != _AUTO}}

    def take(self, inner: Optimizer, section: Mapping[str, Any]) -> None:
        """Take the options of `inner`, which the section made: those that were not known here.

        Raises:
            ConfigError: a scheduler was made over a learning rate that is another now.
        """
        fixed = {k for k, v in (section.get("params") or {}).items() if v != _AUTO}
        for (mine, explicit), theirs in zip(self._trained(), inner.param_groups, strict=True):
            if "initial_lr" in mine and "lr" in fixed and "lr" not in explicit and mine["initial_lr"] != theirs["lr"]:
                raise ConfigError(
                    f"A scheduler was made over DummyOptim with the learning rate {mine['initial_lr']}, and the DeepSpeed JSON "
                    f"says {theirs['lr']}. Write 'auto' there, or let it be made later: DummyScheduler(optimizer, "
                    "lr_scheduler_callable=...)."
                )
            taken = {k: v for k, v in theirs.items() if k != "params" and (k not in mine or (k in fixed and k not in explicit))}
            mine.update(taken)
        self.defaults.update({k: v for k, v in inner.defaults.items() if k in fixed or k not in self.defaults})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConfigError("DummyOptim stands for an optimizer of DeepSpeed's JSON, which steps once it is prepared. Prepare it.")


class DummyScheduler(LRScheduler):
    """Stands for the scheduler of the DeepSpeed JSON, as in Accelerate; what it makes is stepped, saved and asked through it.

    Args:
        optimizer: a DummyOptim, or an optimizer of torch.
        total_num_steps, warmup_num_steps: for `auto` values, in optimizer steps. In a Trainer the first is known without it.
        lr_scheduler_callable: called with the optimizer, returns the scheduler; where the JSON has none.
        kwargs: for further `auto` values.
    """

    stands_for = "the scheduler of a DeepSpeed JSON"
    interval = "step"  # in a Trainer, where torch's own are stepped after each epoch if nothing is said

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Optimizer], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # No super().__init__, which would step and count.
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # what `prepare` returned
            optimizer = inner
        self.optimizer = optimizer
        self.total_num_steps, self.warmup_num_steps = total_num_steps, warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs
        self.made: Any = None

    def _there(self) -> Any:
        if self.made is None:
            raise ConfigError("DummyScheduler stands for a scheduler of DeepSpeed's JSON, which there is once it is prepared.")
        return self.made

    def step(self, *args: Any, **kwargs: Any) -> None:
        self._there().step(*args, **kwargs)

    def get_last_lr(self) -> list[Any]:
        return [group["lr"] for group in self._there().optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return self._there().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._there().load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"DummyScheduler({'not prepared' if self.made is None else type(self.made).__name__})"


def filled_scheduler(
    scheduler: Any, optimizer: Optimizer, section: Mapping[str, Any] | None, total: int | Callable[[], int] | None
) -> Any:
    """Make what a DummyScheduler stands for, and return it; None for another scheduler, which is the run's own.

    Raises:
        ConfigError: a scheduler of the run's own beside that of the JSON, or a DummyScheduler that stands for none.
    """
    dummy = scheduler if isinstance(scheduler, DummyScheduler) else None
    if section and (dummy is None or dummy.lr_scheduler_callable is not None):
        raise ConfigError(
            f"The DeepSpeed JSON has a scheduler ({section.get('type')}), and the run brings its own. Prepare "
            "DummyScheduler(optimizer) for that of the JSON, or take the section out."
        )
    if dummy is None:
        return None
    if dummy.lr_scheduler_callable is not None:
        dummy.made = dummy.lr_scheduler_callable(optimizer)
    elif section:
        dummy.made = make_scheduler(section, dummy, total)
    else:
        raise ConfigError(
            "DummyScheduler stands for the scheduler of the DeepSpeed JSON, which has no section 'scheduler'. Give it "
            "one, or say lr_scheduler_callable=, or prepare a scheduler of torch."
        )
    return dummy.made


def make_scheduler(section: Mapping[str, Any], dummy: DummyScheduler, total: int | Callable[[], int] | None) -> Any:
    """Return the scheduler that a section asks for, over the optimizer that `dummy` was made with.

    Args:
        total: the run's optimizer steps, where it knows them: a number, or a function that is asked when it is needed.
    Raises:
        UnknownName: no such class or parameter.
        ConfigError: an `auto` that nobody can fill, a parameter that is missing, what the section and `dummy` say differently.
    """
    kind = section.get("type")
    found = _class_of(kind)
    known = [name for name in inspect.signature(found).parameters if name not in ("optimizer", "args", "kwargs")]
    given = dict(section.get("params") or {})
    for key in (*given, *dummy.kwargs):
        if key not in known:
            raise UnknownName(
                f"{kind} of the JSON's scheduler takes no {key!r}.{suggest(key, known)} It takes: {', '.join(known)}."
            )
    said = {"total_num_steps": dummy.total_num_steps, "warmup_num_steps": dummy.warmup_num_steps or None, **dummy.kwargs}
    for key, value in said.items():
        if value is not None and given.get(key, _AUTO) not in (_AUTO, value):
            raise ConfigError(
                f"scheduler.params.{key} is {given[key]} in the DeepSpeed JSON, and DummyScheduler says {value}. Write "
                "'auto' there, or say the same in both places."
            )
    if (
        kind == "OneCycle"
        and "betas" not in dummy.optimizer.defaults
        and (cycled := sorted({"cycle_min_mom", "cycle_max_mom"} & {*given}))
    ):
        raise ConfigError(
            f"The DeepSpeed JSON's OneCycle has {', '.join(cycled)}: it cycles Adam's betas, of which "
            f"{type(dummy.optimizer).__name__} has none. Leave it out with cycle_momentum=false, or take an Adam."
        )
    rates = [group["lr"] for group in dummy.optimizer.param_groups]
    filling: dict[str, Any] = {"warmup_min_lr": 0.0, "warmup_max_lr": rates if len(set(rates)) > 1 else rates[0]}
    filling |= {"warmup_num_steps": 1} | {k: v for k, v in said.items() if v is not None}
    parameters: dict[str, Any] = {}
    for name in known:
        required = inspect.signature(found).parameters[name].default is inspect.Parameter.empty
        value = given.get(name, _AUTO if required else None)
        if name not in given and not required:
            continue
        if value == _AUTO and name == "total_num_steps" and name not in filling and total is not None:
            filling[name] = total() if callable(total) else total
        if value == _AUTO and name not in filling:
            if name in given and not required:
                continue  # the class's own default
            raise ConfigError(
                f"{kind} of the JSON's scheduler needs {name!r}, which nobody said. Write it there, or say it: "
                f"DummyScheduler(optimizer, {name}=...)."
            )
        parameters[name] = filling[name] if value == _AUTO else value
    try:
        return found(dummy.optimizer, **parameters)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"The DeepSpeed JSON's scheduler {kind} cannot be made with {parameters} over {type(dummy.optimizer).__name__}: "
            f"{error}. Change scheduler.params."
        ) from error


def _class_of(kind: Any) -> type[Any]:
    from deepspeed.runtime import lr_schedules

    if kind in _OWN:
        return getattr(lr_schedules, kind)
    theirs = [n for n, c in vars(torch.optim.lr_scheduler).items() if isinstance(c, type) and issubclass(c, LRScheduler)]
    if kind not in theirs:
        raise UnknownName(
            f"The DeepSpeed JSON's scheduler has the type {kind!r}.{suggest(str(kind), [*_OWN, *theirs])} DeepSpeed has: "
            f"{', '.join(_OWN)}; and torch.optim.lr_scheduler's classes."
        )
    return getattr(torch.optim.lr_scheduler, kind)


def checked_section(section: Mapping[str, Any] | None, stage: int) -> Mapping[str, Any]:
    """Return the section that a DummyOptim stands for.

    Raises:
        ConfigError: there is none, or a stage without an optimizer of DeepSpeed's own.
    """
    if not section:
        raise ConfigError(
            "DummyOptim stands for the optimizer of the DeepSpeed JSON, which has no section 'optimizer'. Give it one, or "
            "prepare an optimizer of torch."
        )
    if not stage:
        raise ConfigError(
            "DummyOptim and ZeRO stage 0: nothing is cut up there, so DeepSpeed's optimizer would be torch's own. Prepare an "
            "optimizer of torch, or take stage 1, 2 or 3."
        )
    return section


def check_fixed(dummy: DummyOptim, section: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each value that the JSON's optimizer fixes and `dummy` says differently."""
    fixed = {k: v for k, v in (section.get("params") or {}).items() if v != _AUTO}
    return [
        f"optimizer.params.{key} is {fixed[key]} in the JSON, and DummyOptim says {value}"
        for key, value in dummy.said.items()
        if key in fixed and fixed[key] != value and list(_listed(fixed[key])) != list(_listed(value))
    ]


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else (value,)
