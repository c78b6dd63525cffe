"""Calls hooks: for every moment the list of those who overrode it, made once, so that an unused hook costs nothing.

    runner = HookRunner(trainer, callbacks, module)
    for hook in runner.on_train_batch_start:     # an empty tuple where nobody overrode it
        hook(batch, batch_idx)

Callbacks come in the order in which they were given, then the module's own hook of the same name. `find_misspelt` names a method
that looks like a hook and is none.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..strategies.errors import ConfigError, UnknownName
from .base import Callback

if TYPE_CHECKING:
    from torch import nn

    from .base import TrainerView

__all__ = ["CALLBACK_HOOKS", "HookRunner", "find_misspelt", "is_overridden"]

# Every moment of a callback that the runner calls, by name.
CALLBACK_HOOKS: tuple[str, ...] = tuple(
    name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")
)
# A module's hook of the same name takes the same arguments without trainer and module; these two are given other things.
_NOT_THE_MODULES = (
    "on_exception",
    "on_log",
    "on_checkpoint_step",
    "on_checkpoint_epoch",
    "on_sanity_check_start",
    "on_sanity_check_end",
)


_EXAMPLE = "callbacks=[EarlyStopping(monitor='val_loss')]"


class HookRunner:
    """One tuple of callables for every hook name, as attributes."""

    def __init__(self, trainer: TrainerView, callbacks: Iterable[Callback], module: nn.Module, module_base: type) -> None:
        callbacks = list(callbacks)
        for name in CALLBACK_HOOKS:
            calls: list[Callable[..., Any]] = [
                partial(getattr(c, name), trainer, module) for c in callbacks if is_overridden(c, name, Callback)
            ]
            if name not in _NOT_THE_MODULES and is_overridden(module, name, module_base):
                calls.append(getattr(module, name))
            setattr(self, name, tuple(calls))

    def __getattr__(self, name: str) -> Sequence[Callable[..., Any]]:
        raise AttributeError(f"there is no hook {name!r}")

    def call(self, name: str, *args: Any) -> None:
        """Call everyone who overrode `name`, in order."""
        for hook in getattr(self, name):
            hook(*args)


def is_overridden(instance: Any, name: str, base: type) -> bool:
    """Return whether `instance` has its own `name`, in its class or on itself, and not the one of `base`."""
    if name in vars(instance):
        return True
    own = getattr(type(instance), name, None)
    return own is not None and own is not getattr(base, name, None)


def find_misspelt(instance: Any, base: type, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> None:
    """Refuse a method of `instance`'s own class that is one slip away from a hook's name, such as `validaton_step`.

    Only methods that the user defined are looked at, and only those whose name is very close to a hook that they did not define.

    Args:
        elsewhere: hooks of the peers that are not called here, and what to use instead.
    Raises:
        UnknownName: naming the method and the hook that was probably meant.
    """
    known = set(known)
    own = {
        name: cls.__name__
        for cls in type(instance).__mro__
        if cls not in base.__mro__ and not cls.__module__.startswith("torch.")
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("_")
    }
    for name, owner in own.items():
        if name in known or hasattr(base, name):
            continue
        if elsewhere is not None and name in elsewhere:
            raise UnknownName(
                f"{owner}.{name} is a hook of Lightning that is not called here, and would be ignored. {elsewhere[name]}"
            )
        near = difflib.get_close_matches(name, [k for k in known if k not in own], n=1, cutoff=0.9)
        prefixed = name.startswith("on_") and difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near or prefixed:
            meant = (near or prefixed or [""])[0]
            raise UnknownName(
                f"{owner}.{name} is no hook, and would never be called. Did you mean {meant!r}? "
                "If it is a method of your own, give it a name that is less like a hook's."
            )


def check_callbacks(callbacks: Any) -> list[Callback]:
    """Return `callbacks` as a list; refuse what is none, and two whose state would have the same key.

    Raises:
        ConfigError: naming the object and its place.
    """
    if isinstance(callbacks, Callback):
        callbacks = [callbacks]
    if callbacks is None:
        return []
    if isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
        raise ConfigError(f"callbacks is {callbacks!r:.60}, expected a Callback object or a list of them. Make one: {_EXAMPLE}.")
    listed = list(callbacks)
    for i, callback in enumerate(listed):
        if not isinstance(callback, Callback):
            hint = " Pass an object, not the class." if isinstance(callback, type) else f" Make one: {_EXAMPLE}."
            raise ConfigError(f"callbacks[{i}] is {callback!r:.60}, expected a Callback object.{hint}")
        find_misspelt(callback, Callback, [*CALLBACK_HOOKS, "state_dict", "load_state_dict"])
    return listed


def check_state_keys(callbacks: Sequence[Callback]) -> None:
    """Refuse two callbacks that would save their state under one key."""
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        if not is_overridden(callback, "state_dict", Callback):
            continue
        key = callback.state_key
        if key in seen:
            raise ConfigError(
                f"Two callbacks save their state under the key {key!r}: {seen[key]!r} and {callback!r}. "
                "Override state_key of one."
            )
        seen[key] = callback
