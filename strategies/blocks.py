"""The blocks of a model, and another forward for one of them: what activation.py and compile.py share.

A module gets a forward by a class of its own, derived from the class that it has and named like it. So the module stays the same
object with the same names; a deep copy runs its own parameters (a function in the module's __dict__ would run the original's);
and two blocks of one class have one class afterwards too, so that they share what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import ConfigError
from .units import Units, choose_units

__all__ = ["choose_blocks", "with_forward"]

# units.py knows a class made here by its attribute `_drivetrain_class`, the class that the user wrote.


def choose_blocks(model: nn.Module, units: Units) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the units, without those inside another: "auto" gives the repeated blocks only."""
    chosen = choose_units(model, units)
    inside = {id(m) for _, unit in chosen for m in unit.modules() if m is not unit}
    blocks = [(path, unit) for path, unit in chosen if id(unit) not in inside]
    if isinstance(units, str) and units == "auto":  # big layers beside the blocks are units too, and no blocks
        blocks = [(path, unit) for path, unit in blocks if any(True for _ in unit.children())]
    return blocks


def with_forward(path: str, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Give `module` a class whose forward is `make(forward of its class)`. Modules of one class and one `make` share theirs.

    Raises:
        ConfigError: a forward was set on the module itself, which would go before that of any class.
    """
    if "forward" in vars(module):
        raise ConfigError(
            f"{path} has a forward of its own, set on the object (module.forward = ...), which no class can take the place of. "
            "Write it into the module's class, or leave this module out (units=...)."
        )
    cls = type(module)
    made = vars(cls).get("_drivetrain_forwards")
    if made is None:
        made = {}
        cls._drivetrain_forwards = made  # pyright: ignore[reportAttributeAccessIssue]
    key = _key(make)
    if key not in made:
        body = {"forward": make(cls.forward), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        body["_drivetrain_class"] = getattr(cls, "_drivetrain_class", cls)
        made[key] = type(cls.__name__, (cls,), body)
    module.__class__ = made[key]


def _key(make: Any) -> Any:
    """What tells two `make` apart: a partial by its function and the identity of its arguments' values."""
    return (make.func, *map(repr, make.args)) if hasattr(make, "func") else make
