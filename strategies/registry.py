"""From a name to a class: built-ins as import strings, then installed entry points; an unknown name lists what exists.

find("strategy", BUILTIN_STRATEGIES, "ddp")        -> the class strategies.ddp:DDPStrategy
entry points: [project.entry-points."drivetrain.strategies"] mine = "my_package:MyStrategy"
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from .errors import unknown_name

_BASE = __package__ or "drivetrain.strategies"

# Names of one family, each "module:attribute" relative to drivetrain.strategies. Imported only when asked for.
STRATEGIES: Mapping[str, str] = {
    "single": ".base:Strategy",
    "ddp": ".ddp:DDPStrategy",
}
PRECISIONS: Mapping[str, str] = {
    "fp32": ".precision.base:Precision",
    "bf16-mixed": ".precision.mixed:BF16Mixed",
    "fp16-mixed": ".precision.mixed:FP16Mixed",
    "bf16-true": ".precision.mixed:BF16True",
    "fp16-true": ".precision.mixed:FP16True",
    "fp64": ".precision.mixed:FP64",
    "fp8-ao": ".precision.float8_ao:Float8AO",
    "fp8-ao-rowwise": ".precision.float8_ao:rowwise",
    "fp8-ao-rowwise-gw-hp": ".precision.float8_ao:rowwise_gw_hp",
}
# The peers' spellings of the same thing.
STRATEGY_ALIASES: Mapping[str, str] = {"single_device": "single", "no": "single", "ddp_spawn": "ddp", "ddp_fork": "ddp"}
PRECISION_ALIASES: Mapping[str, str] = {
    "32": "fp32",
    "32-true": "fp32",
    "no": "fp32",
    "float32": "fp32",
    "bf16": "bf16-mixed",
    "fp16": "fp16-mixed",
    "16": "fp16-mixed",
    "16-mixed": "fp16-mixed",
    "16-true": "fp16-true",
    "64": "fp64",
    "64-true": "fp64",
    "float64": "fp64",
    "fp8": "fp8-ao",
}


def entry_points(family: str) -> dict[str, Any]:
    """Return the installed entry points of group `drivetrain.<family>` by name."""
    from importlib.metadata import entry_points as installed

    return {point.name: point for point in installed(group=f"drivetrain.{family}")}


def find(family: str, kind: str, builtin: Mapping[str, str], aliases: Mapping[str, str], name: str) -> type[Any]:
    """Return the class that `name` stands for.

    Args:
        family: the entry-point group after `drivetrain.`, such as "strategies".
        kind: the word for one of them in an error, such as "strategy".
    Raises:
        UnknownName: with the nearest known name and the list of all.
    """
    name = aliases.get(name, name)
    if name in builtin:
        return load(builtin[name])
    installed = entry_points(family)
    if name in installed:
        return installed[name].load()
    raise unknown_name(kind, name, [*builtin, *installed])


def load(target: str) -> Any:
    """Import `"module:attribute"`; a leading dot is relative to drivetrain.strategies."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module, _BASE), attribute)
