"""Which modules of a model are handled as one unit: gathered together, freed together, compiled or recomputed together.

    choose_units(model)                         "auto": the repeated blocks, and what is big beside them
    choose_units(model, units=["Block"])        modules of these classes (names or classes)
    choose_units(model, units=20_000_000)       the smallest modules that have so many parameters
    choose_units(model, units=lambda name, module: ...)
    choose_units(model, units=None)             none: the whole model is one unit
The root is not among them: what lies in no unit is the root's own. A unit is a module that is *called* (its forward runs), for
its parameters are there only while it runs; and it holds no parameter that is also used outside of it, such as a tied weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .errors import ConfigError, UnknownName, suggest

__all__ = ["Units", "choose_units", "repeated_blocks"]

Units = str | int | None | Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]

_BIG = 8_000_000
"""Parameters of a module beside the blocks (an embedding, a head) from which on it is a unit of its own: 32 MB in fp32."""
_SMALL = 1_000_000
"""A block of a single layer is a unit only if it has more parameters: a collective for less is not worth its latency."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def choose_units(model: nn.Module, units: Units = "auto") -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the units in the order of `model.named_modules()`: a module before those inside it.

    Raises:
        UnknownName: a class name that no module has.
        ConfigError: `units` is nothing of the above.
    """
    if units is None:
        return []
    if units == "auto":
        chosen = repeated_blocks(model)
        return _untied(model, [*chosen, *_big(model, chosen)])
    if isinstance(units, int) and not isinstance(units, bool):
        return _untied(model, _by_size(model, units))
    if callable(units) and not isinstance(units, type):
        wanted = units
        return _untied(model, [(n, m) for n, m in model.named_modules() if n and _runs(m) and wanted(n, m)])
    if not isinstance(units, Iterable) or isinstance(units, str):
        raise ConfigError(
            f"units={units!r} says nothing about modules. Expected 'auto', None, a number of parameters, class names "
            "(['Block']), or a function (name, module) -> bool."
        )
    return _untied(model, _by_class(model, list(units)))


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the blocks that a model is a stack of: those it names itself, or the outermost that repeat."""
    named = _named_by_model(model)
    return _blocks(model) if named is None else named


def _runs(module: nn.Module) -> bool:
    """Whether the module can be called, and has parameters at all."""
    return type(module).forward is not nn.Module.forward and any(True for _ in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _named_by_model(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """What transformers' models say themselves: the classes that must not be split."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    found = [(n, m) for n, m in model.named_modules() if n and type(m).__name__ in names and _runs(m)]
    return found or None


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules that stand at least twice, of one class, in one container."""
    found: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        children = list(module.named_children())
        count: dict[type, int] = {}
        for _, child in children:
            kind = getattr(type(child), "_drivetrain_class", type(child))  # blocks.py gives some of them another class
            count[kind] = count.get(kind, 0) + 1
        for key, child in children:
            path = f"{name}.{key}" if name else key
            repeated = (
                isinstance(module, _CONTAINERS)
                and count[getattr(type(child), "_drivetrain_class", type(child))] > 1
                and _runs(child)
            )
            layer = not any(True for _ in child.children())
            if repeated and (not layer or _size(child) >= _SMALL):
                found.append((path, child))
            else:
                visit(path, child)

    visit("", model)
    return found


def _big(model: nn.Module, chosen: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Layers beside the chosen modules that are big enough for a collective of their own; the root would hold all at once."""
    inside = {id(m) for _, unit in chosen for m in unit.modules()}
    return [
        (n, m)
        for n, m in model.named_modules()
        if n and id(m) not in inside and _runs(m) and not any(True for _ in m.children()) and _size(m) >= _BIG
    ]


def _by_size(model: nn.Module, least: int) -> list[tuple[str, nn.Module]]:
    """The innermost modules with at least `least` parameters that are in no other such module yet."""
    if least < 1:
        raise ConfigError(f"units={least}: a unit has at least 1 parameter. Leave it out to have the repeated blocks chosen.")
    found: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> int:
        """Collect units in `module`; return how many of its parameters are in none."""
        left = sum(p.numel() for p in module.parameters(recurse=False))
        for key, child in module.named_children():
            left += visit(f"{name}.{key}" if name else key, child)
        if name and left >= least and _runs(module):
            found.append((name, module))
            return 0
        return left

    visit("", model)
    order = {id(m): i for i, m in enumerate(model.modules())}
    return sorted(found, key=lambda unit: order[id(unit[1])])


def _by_class(model: nn.Module, classes: list[Any]) -> list[tuple[str, nn.Module]]:
    known = {type(m).__name__ for m in model.modules()}
    for wanted in classes:
        name = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", None)
        if name is None or (isinstance(wanted, type) and not issubclass(wanted, nn.Module)):
            raise ConfigError(f"units={classes!r}: {wanted!r} is no module class. Expected class names or classes.")
        if isinstance(wanted, str) and wanted not in known:
            raise UnknownName(
                f"units={classes!r}: no module of {type(model).__name__} is of a class {name!r}.{suggest(name, known)} "
                f"Its classes: {', '.join(sorted(known))}."
            )
    names = {c for c in classes if isinstance(c, str)}
    types = tuple(c for c in classes if isinstance(c, type))
    found = [(n, m) for n, m in model.named_modules() if n and (type(m).__name__ in names or isinstance(m, types))]
    for name, module in found:
        if type(module).forward is nn.Module.forward:
            raise ConfigError(
                f"units={classes!r}: {name} is a {type(module).__name__}, which has no forward, so nobody could say when its "
                "parameters are needed. Name the class of the modules inside it."
            )
    return [(n, m) for n, m in found if _runs(m)]


def _untied(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Leave out units with a parameter that is also used outside: all uses must lie in one unit, and that is the root."""
    used: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            used[id(parameter)] = used.get(id(parameter), 0) + 1
    seen: set[int] = set()
    kept: list[tuple[str, nn.Module]] = []
    for name, unit in chosen:
        if id(unit) in seen:
            continue
        seen.add(id(unit))
        inside: dict[int, int] = {}
        for module in unit.modules():
            for parameter in module.parameters(recurse=False):
                inside[id(parameter)] = inside.get(id(parameter), 0) + 1
        if all(used[key] == count for key, count in inside.items()):
            kept.append((name, unit))
    order = {id(m): i for i, m in enumerate(model.modules())}
    return sorted(kept, key=lambda unit: order[id(unit[1])])
