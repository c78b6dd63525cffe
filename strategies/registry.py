"""From a name to a class: built-ins as import strings, then installed entry points; an unknown name lists what exists.

find("strategy", BUILTIN_STRATEGIES, "ddp")        -> the class strategies.ddp:DDPStrategy
entry points: [project.entry-points."drivetrain.strategies"] mine = "my_package:MyStrategy"
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError, unknown_name

_BASE = __package__ or "drivetrain.strategies"

# Names of one family, each "module:attribute" relative to drivetrain.strategies. Imported only when asked for.
STRATEGIES: Mapping[str, str] = {
    "single": ".base:Strategy",
    "ddp": ".ddp:DDPStrategy",
    "fsdp": ".fsdp:FSDPStrategy",
    "hsdp": ".fsdp:HSDPStrategy",
    "offload": ".offload.strategy:OffloadStrategy",
    "deepspeed": ".deepspeed:DeepSpeedStrategy",
    "parallel": ".parallel:ParallelStrategy",
}
PRECISIONS: Mapping[str, str] = {
    "fp32": ".precision.base:Precision",
    "bf16-mixed": ".precision.mixed:BF16Mixed",
    "fp16-mixed": ".precision.mixed:FP16Mixed",
    "bf16-true": ".precision.mixed:BF16True",
    "fp16-true": ".precision.mixed:FP16True",
    "fp64": ".precision.mixed:FP64",
    "fp8": ".precision.fp8:chosen",
    "fp8-ao": ".precision.float8_ao:Float8AO",
    "fp8-ao-rowwise": ".precision.float8_ao:rowwise",
    "fp8-ao-rowwise-gw-hp": ".precision.float8_ao:rowwise_gw_hp",
    "mxfp8-ao": ".precision.mx_ao:MXFP8AO",
    "nvfp4-ao": ".precision.mx_ao:NVFP4AO",
    "int8-ao": ".precision.quantized:Int8AO",
    "int8-weights-ao": ".precision.quantized:Int8WeightsAO",
    "bitnet-ao": ".precision.quantized:BitNetAO",
    "int8-bnb": ".precision.bnb:int8",
    "nf4-bnb": ".precision.bnb:nf4",
    "fp4-bnb": ".precision.bnb:fp4",
    "fp8-te": ".precision.float8_te:Float8TE",
    "fp8-te-current": ".precision.float8_te:current",
    "fp8-te-block": ".precision.float8_te:block",
    "mxfp8-te": ".precision.float8_te:mxfp8",
    "nvfp4-te": ".precision.float8_te:nvfp4",
    "fp8-msamp": ".precision.msamp:Float8MSAMP",
}
# The peers' spellings of the same thing.
STRATEGY_ALIASES: Mapping[str, str] = {
    "single_device": "single",
    "no": "single",
    "ddp_spawn": "ddp",
    "ddp_fork": "ddp",
    "fsdp2": "fsdp",
}
AXIS_WORDS: Mapping[str, str] = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "pp": "pipeline parallel",
    "ep": "expert parallel",
    "sp": "sequence parallel",
}
# Strategies that are an axis of a plan where others stand beside them.
DATA_WORDS = ("ddp", "fsdp", "hsdp")
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


def find_strategy(text: str) -> tuple[type[Any], str | None, dict[str, int]]:
    """Return (class, number after its name, further axes) of a strategy string.

            string := part ("+" part)*        part := word [":" number]
    One part names the strategy, in any place; its number means what the strategy says: pieces for "fsdp:2", replicas for
    "hsdp:2", the stage for "deepspeed:2". The others are axes with their degrees, "tp:2"; without one, what is left of the
    processes. Axes alone, or beside ddp, fsdp or hsdp, make a ParallelStrategy, to which these are axes as well.

    Raises:
        UnknownName: a word that is neither a strategy nor an axis.
        ConfigError: two strategies, an axis twice, or a degree that is no number.
    """
    if text in STRATEGIES or text in STRATEGY_ALIASES or ("+" not in text and ":" not in text and text not in AXIS_WORDS):
        return find("strategies", "strategy", STRATEGIES, STRATEGY_ALIASES, text), None, {}
    named: list[tuple[str, str | None]] = []
    axes: dict[str, int] = {}
    for part in text.split("+"):
        word, colon, number = part.strip().partition(":")
        word = STRATEGY_ALIASES.get(word, word)
        if word in AXIS_WORDS:
            if word in axes:
                raise ConfigError(f"strategy={text!r} names the axis {word} twice. Name it once.")
            if word == "sp" and colon:
                raise ConfigError(f"strategy={text!r}: sp runs over the ranks of tp and has no degree. Say 'tp:{number}+sp'.")
            axes[word] = parse_degree(word, number) if colon else -1
        else:
            find("strategies", "strategy", STRATEGIES, STRATEGY_ALIASES, word)
            named.append((word, number if colon else None))
    if len(named) > 1:
        raise ConfigError(
            f"strategy={text!r} names two strategies. Expected one, with axes beside it where it takes them: 'fsdp:2+tp:2'."
        )
    if not axes or (named and named[0][0] not in DATA_WORDS):
        word, number = named[0]
        return find("strategies", "strategy", STRATEGIES, STRATEGY_ALIASES, word), number, axes
    data = {word: -1 if number is None else parse_degree(word, number) for word, number in named}
    return load(STRATEGIES["parallel"]), None, {**data, **axes}


def parse_degree(word: str, number: str) -> int:
    """Return the degree after `word`, as in "tp:2".

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            f"{word}:{number} has no degree. Expected a whole number of at least 1 after the colon, such as {word}:2."
        )
    return int(number)


def load(target: str) -> Any:
    """Import `"module:attribute"`; a leading dot is relative to drivetrain.strategies."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module, _BASE), attribute)
