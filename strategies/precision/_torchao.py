"""torchao, imported quietly and only when something of it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import ModuleType

from ..errors import MissingDependency

__all__ = ["NEEDED", "load", "missing"]

NEEDED = "pip install 'drivetrain[ao]'"
"""The line that installs it."""


def load(name: str, *, wanted_by: str) -> ModuleType:
    """Import `torchao.<name>` (or torchao itself, for an empty name).

    torchao logs a line for each CUDA library that a CPU cannot load, and torch one for each of its enums that is registered in
    a way of older versions. Neither says anything about the run, so both are kept from the screen while it is imported.
    Raises:
        MissingDependency: torchao is not installed, or is a version without that module.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(f"torchao.{name}" if name else "torchao")
    except ImportError as error:
        if reason := missing(wanted_by):
            raise MissingDependency(reason) from None
        raise MissingDependency(
            f"{wanted_by} needs torchao.{name}, which the installed torchao {version()} lacks ({error}). "
            f"It was written for 0.18: {NEEDED}."
        ) from error
    finally:
        logging.disable(before)


def missing(wanted_by: str) -> str | None:
    """Return None where torchao is installed, else the sentence that says what to do."""
    if importlib.util.find_spec("torchao") is not None:
        return None
    return f"{wanted_by} needs torchao, which is not installed: {NEEDED}."


def version() -> str:
    """Return the installed version."""
    from importlib.metadata import version as installed

    return installed("torchao")
