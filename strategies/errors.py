"""Every exception that drivetrain raises on purpose, as one tree.

    DrivetrainError
    ├── ConfigError(ValueError)          wrong use: an argument, a name, a combination          exit code 2
    │   ├── UnknownName                  no such strategy, precision, hook, option: with did-you-mean
    │   └── MissingDependency            an optional package is not installed: with the pip line
    ├── DataError(ValueError)            the loader, the batch or the step's return value       exit code 1
    ├── NonFiniteError(ArithmeticError)  a loss or gradient is NaN or Inf; the weights are unchanged   exit code 1
    ├── LossSpikeError(ArithmeticError)  the loss left what it was before: found by the Health callback   exit code 1
    ├── CheckpointError(RuntimeError)    a checkpoint is missing, damaged or of another model   exit code 3
    └── DistributedError(RuntimeError)   ranks disagree, do not answer or could not start       exit code 1

Each message has three parts: what was met, what was expected, what to do. `suggest` writes the did-you-mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DrivetrainError(Exception):
    """The root of the tree. `exit_code` is what a launched process ends with when this error reaches its top."""

    exit_code = 1


class ConfigError(DrivetrainError, ValueError):
    """The library was asked for something that it cannot do, before any training happened."""

    exit_code = 2


class UnknownName(ConfigError):
    """A name that does not exist: a strategy, a precision, an argument, a hook."""


class MissingDependency(ConfigError, ImportError):
    """An optional package is needed and not installed."""


class DataError(DrivetrainError, ValueError):
    """A loader, a batch or what a step returned cannot be used."""


class NonFiniteError(DrivetrainError, ArithmeticError):
    """A loss or a gradient is NaN or Inf. It was met before the update: the weights are unchanged."""


class LossSpikeError(DrivetrainError, ArithmeticError):
    """A loss is far above what it was before. The weights hold the steps up to it; the checkpoints from before do not."""


class CheckpointError(DrivetrainError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 3


class DistributedError(DrivetrainError, RuntimeError):
    """Ranks disagree, do not answer, or could not start.

    Attributes:
        met_elsewhere: this rank only heard of it: another one failed, whose error is the cause.
    """

    met_elsewhere = False


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of `known`, or the empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str = "") -> UnknownName:
    """Build the error for a `name` that is not among `known`: names the nearest one and lists what exists."""
    names = sorted(known)
    place = f" {where}" if where else ""
    return UnknownName(f"There is no {kind} {name!r}{place}.{suggest(name, names)} Known: {', '.join(names)}.")
