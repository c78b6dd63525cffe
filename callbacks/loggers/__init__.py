"""Loggers, by name: `make_logger("wandb")`. Each is in the file of its name and imports its package only when it starts."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from ...strategies.errors import ConfigError, unknown_name
from .base import Logger

__all__ = ["LOGGERS", "make_logger", "make_loggers"]

LOGGERS = {
    "csv": ".csv:CSVLogger",
    "jsonl": ".jsonl:JSONLLogger",
    "tensorboard": ".tensorboard:TensorBoardLogger",
    "wandb": ".wandb:WandbLogger",
}


def make_logger(name: str, **options: Any) -> Logger:
    """Return the logger of that name: a built-in one, or an installed entry point of group `drivetrain.loggers`.

    Raises:
        UnknownName: with the nearest known name and the list of all.
    """
    if name in LOGGERS:
        module, _, attribute = LOGGERS[name].partition(":")
        return getattr(importlib.import_module(module, __name__), attribute)(**options)
    from importlib.metadata import entry_points

    installed = {point.name: point for point in entry_points(group="drivetrain.loggers")}
    if name in installed:
        return installed[name].load()(**options)
    raise unknown_name("logger", name, [*LOGGERS, *installed])


def make_loggers(given: Any) -> list[Logger]:
    """Return the loggers that the argument `loggers=` means: names, objects, or a sequence of either; None and bools add none.

    Raises:
        ConfigError: something else; two loggers that would write the same file.
    """
    if given is None or isinstance(given, bool):
        return []
    if isinstance(given, str | Logger):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise _not_a_logger(given)
    loggers: list[Logger] = []
    for item in given:
        if isinstance(item, str):
            item = make_logger(item)
        if not isinstance(item, Logger):
            raise _not_a_logger(item)
        if any(type(item) is type(other) and item.name in LOGGERS for other in loggers):
            raise ConfigError(f"loggers= has {item.name!r} twice; both would write the same place. Give it once.")
        loggers.append(item)
    return loggers


def _not_a_logger(item: Any) -> ConfigError:
    hint = " Give an instance: it is a class." if isinstance(item, type) else ""
    return ConfigError(
        f"loggers= got {item!r} ({type(item).__name__}); it takes names ({', '.join(sorted(LOGGERS))}) and Logger objects, "
        f"one or several.{hint} Your own logger subclasses drivetrain.callbacks.loggers.base.Logger."
    )
