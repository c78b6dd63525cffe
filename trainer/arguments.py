"""The Trainer's arguments: each checked where it is given, with what was met, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..strategies.base import Strategy
from ..strategies.errors import ConfigError, UnknownName, suggest
from .config import check_at_least, check_choice

__all__ = ["check", "describe", "resume_of"]

# Lightning writes "the default" as None here.
_NONE_MEANS: Mapping[str, Any] = {
    "enable_checkpointing": True,
    "enable_progress_bar": True,
    "enable_model_summary": True,
    "num_sanity_val_steps": 2,
    "log_every_n_steps": 50,
    "gradient_clip_algorithm": "norm",
    "deterministic": False,
}
_FIT = ("resume", "ckpt_path", "datamodule", "train_dataloaders", "val_dataloaders")


def check(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments, checked; peers' values that mean ours are translated.

    Raises:
        ConfigError: a value that cannot be.
    """
    options = dict(given)
    for name, default in _NONE_MEANS.items():
        if options[name] is None:
            options[name] = default
    _read_intervals(options)
    # Lightning writes "no limit" as -1 here.
    for name in ("max_epochs", "max_steps"):
        if options[name] == -1:
            options[name] = None
        if options[name] is not None:
            check_at_least(name, options[name], 0)
    devices = options["devices"]
    if isinstance(devices, str) and devices.isdigit():
        options["devices"] = devices = int(devices)
    if devices != "auto" and (not isinstance(devices, int) or isinstance(devices, bool) or devices < 1):
        raise ConfigError(
            f"devices must be 'auto' or a number of processes of at least 1, got {devices!r}. Use devices=2 for two."
        )
    if options["device"] == "gpu":
        options["device"] = "cuda"
    for name, least in (("num_nodes", 1), ("accumulate_grad_batches", 1), ("log_every_n_steps", 0), ("overfit_batches", 0)):
        check_at_least(name, options[name], least)
    if options["global_batch_size"] is not None:
        check_at_least("global_batch_size", options["global_batch_size"], 1)
        if options["accumulate_grad_batches"] != 1:
            raise ConfigError(
                f"global_batch_size={options['global_batch_size']} derives the accumulation, and accumulate_grad_batches="
                f"{options['accumulate_grad_batches']} fixes it. Give one of them."
            )
    if options["check_val_every_n_epoch"] is not None:
        check_at_least("check_val_every_n_epoch", options["check_val_every_n_epoch"], 1)
    check_choice("gradient_clip_algorithm", options["gradient_clip_algorithm"], ("norm", "value"))
    check_choice("nonfinite", options["nonfinite"], ("raise", "skip", "ignore"))
    clip = options["gradient_clip_val"]
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
        raise ConfigError(
            f"gradient_clip_val must be a number above 0, or None for no clipping, got {clip!r}. "
            "For example gradient_clip_val=1.0."
        )
    sanity, short = options["num_sanity_val_steps"], options["fast_dev_run"]
    if isinstance(sanity, bool) or not isinstance(sanity, int) or sanity < -1:
        raise ConfigError(
            f"num_sanity_val_steps must be -1 (all), 0 (none) or a number of batches, got {sanity!r}. "
            "For example num_sanity_val_steps=0 to leave the check out."
        )
    if not isinstance(short, int) or short < 0:
        raise ConfigError(
            f"fast_dev_run must be True, False or a number of batches, got {short!r}. For example fast_dev_run=3 for three."
        )
    if not isinstance(options["strategy"], str | Strategy):
        raise ConfigError(
            f"strategy must be a name or a Strategy object, got {options['strategy']!r:.60}. For example strategy='ddp'."
        )
    options["loggers"] = _loggers(options["loggers"])
    root = options["root"] or "runs"
    options["root"] = root if "://" in str(root) else Path(root)  # a URL: run_folder.py
    return options


def _read_intervals(options: dict[str, Any]) -> None:
    """Take typed intervals: val_check_interval "500step" or "2ep", max_steps and log_every_n_steps in steps, max_epochs "3ep"."""
    from ..callbacks.interval import Every

    for name, unit in (("max_steps", "step"), ("log_every_n_steps", "step"), ("max_epochs", "ep"), ("val_check_interval", "")):
        value = options[name]
        if not isinstance(value, str) or not any(c.isalpha() for c in value):  # a number in quotes is refused below
            continue
        every = Every.parse(value)
        counter = {"step": "global_step", "ep": "epoch", "": every.counter}[unit]
        if every.counter != counter or counter not in ("global_step", "epoch"):
            example = {"step": "'500step'", "ep": "'3ep'", "": "'500step' or '2ep'"}[unit]
            raise ConfigError(f"{name}={value!r} does not count what {name} counts. Give a number, or {example}.")
        if name == "val_check_interval" and counter == "epoch":
            options["val_check_interval"], options["check_val_every_n_epoch"] = None, int(every.n)
        else:
            options[name] = int(every.n)


def _loggers(given: Any) -> list[Any]:
    """Return the loggers as a list of objects and names; a string is one name, never a list of letters."""
    if given is None or given is True or given is False:
        return []
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        return [given]
    return list(given)


def describe(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as plain values, for config.yaml and the loggers."""
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    text = str(value) if isinstance(value, Path) else repr(value)
    return type(value).__name__ if " at 0x" in text else text  # an address says nothing, and differs in every run


def resume_of(peers: Mapping[str, Any], given: str | Path | None, default: str | Path | None) -> str | Path | None:
    """Return what fit resumes from: its argument (or Lightning's `ckpt_path`), else the Trainer's."""
    for name in peers:
        if name != "ckpt_path":
            raise UnknownName(f"fit has no argument {name!r}.{suggest(name, _FIT)} Known: {', '.join(_FIT)}.")
    given = given if given is not None else peers.get("ckpt_path")
    return given if given is not None else default
