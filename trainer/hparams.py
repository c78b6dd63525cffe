"""A module's hyperparameters: the arguments it was made with, kept beside its weights so that a checkpoint can make it again.

    class Net(TrainingModule):
        def __init__(self, width: int = 64, learning_rate: float = 1e-3):
            super().__init__()
            self.save_hyperparameters()              self.hparams.width
    Net.load_from_checkpoint("runs/mine/20261122-014255/checkpoints/step-00001200")

What is plain (numbers, strings, None, lists and dicts of them) goes into checkpoints, config.yaml and the loggers. Nothing is
unpickled, so anything else stays in `hparams` only, and `load_from_checkpoint` asks for it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..strategies.errors import CheckpointError, ConfigError, suggest

if TYPE_CHECKING:
    from torch import nn

    from ..strategies.checkpoint.reader import Checkpoint

__all__ = ["Hyperparameters", "init_arguments", "plain", "rebuild"]


class Hyperparameters(dict[str, Any]):
    """A dict whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"There is no hyperparameter {name!r}.{suggest(name, self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def init_arguments(module: nn.Module, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of every `__init__` of `module` that is running, from `frame` outwards.

    Raises:
        ConfigError: none is.
    """
    found: dict[str, Any] = {}
    met = False
    while frame is not None:
        code, values = frame.f_code, frame.f_locals
        first = code.co_varnames[0] if code.co_argcount else ""
        if code.co_name != "__init__" or values.get(first) is not module:
            break
        met = True
        names, _, keywords, _ = inspect.getargvalues(frame)
        names = [*names, *code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]]
        found = {n: values[n] for n in names if n != first and n in values} | (values[keywords] if keywords else {}) | found
        frame = frame.f_back
    if not met:
        raise ConfigError(
            f"save_hyperparameters() reads the arguments of {type(module).__name__}.__init__, and was called outside of it. "
            "Call it there, or give it a dict."
        )
    return found


def chosen(found: Mapping[str, Any], names: Iterable[str], ignore: Iterable[str]) -> Hyperparameters:
    """Return those of `found` that are asked for, all by default, and say which of them no checkpoint can hold.

    Raises:
        ConfigError: a name that is none of them.
    """
    names = list(names)
    for name in names:
        if name not in found:
            raise ConfigError(f"There is no argument {name!r} to save.{suggest(name, found)} Known: {', '.join(found)}.")
    kept = Hyperparameters({n: v for n, v in found.items() if (not names or n in names) and n not in set(ignore)})
    if rest := [n for n, v in kept.items() if not _is_plain(v)]:
        listed = ", ".join(f"{n} ({type(kept[n]).__name__})" for n in rest)
        warnings.warn(
            f"No checkpoint can hold the hyperparameters {listed}: they are no plain values. load_from_checkpoint will ask for "
            f"them. Say that it is meant: save_hyperparameters(ignore={rest!r}).",
            stacklevel=3,
        )
    return kept


def plain(module: Any) -> dict[str, Any]:
    """Return the hyperparameters of `module` that are plain values."""
    return {n: exact(v) for n, v in module.hparams.items() if _is_plain(v)}


def exact(value: Any) -> Any:
    """Return a plain value as the built-in type that files know, where it is a subclass (numpy's floats, enumerations)."""
    if isinstance(value, list | tuple):
        return [exact(v) for v in value]
    if isinstance(value, dict):
        return {str(k): exact(v) for k, v in value.items()}
    if isinstance(value, str):
        return str.__str__(value)
    kind = next((t for t in (bool, int, float) if isinstance(value, t)), None)
    return value if kind is None else kind(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | str)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, given its folder or that of a run (whose newest whole one it is then).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from ..strategies.checkpoint.reader import Checkpoint
    from ..strategies.world import World
    from .run_folder import open_run

    folder = open_run(Path("runs"), None, Path(path), World.single(), create=False).resume_from
    assert folder is not None
    return Checkpoint(folder)


def rebuild(cls: type[Any], checkpoint: Checkpoint, given: Mapping[str, Any], *, strict: bool) -> Any:
    """Make a `cls` with the hyperparameters of `checkpoint` and those `given`, and load its weights.

    Raises:
        ConfigError: an argument that neither of them has.
        CheckpointError: the weights are of another model.
    """
    from ..strategies.base import Strategy
    from .state import source_of

    parameters = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    saved = checkpoint.meta.get("hparams", {})
    arguments = {n: v for n, v in saved.items() if takes_any or n in parameters} | dict(given)
    for name, p in parameters.items():
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in arguments:
            raise ConfigError(
                f"{cls.__name__} needs the argument {name!r}, which {checkpoint.path} does not hold. Pass it: "
                f"{cls.__name__}.load_from_checkpoint(path, {name}=...); or call save_hyperparameters() in its __init__."
            )
    module = cls(**arguments)
    module.configure_model()
    names = [n for n in checkpoint.names() if n.startswith("model/")]
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no model. Expected a checkpoint of {cls.__name__}.")
    Strategy().load_state_tensors(module.models(), {}, names, source_of(checkpoint), {}, strict=strict)
    if checkpoint.meta.get("kind") == "run":
        module.on_load_checkpoint(checkpoint.value("hooks"))
    return module
