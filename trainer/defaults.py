"""What a run has when nothing else was asked for: its accelerator, callbacks, loggers and store; and its start-up lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..callbacks.base import Callback
from ..callbacks.runner import check_callbacks
from ..strategies.errors import ConfigError
from ..strategies.named_state import full_numel
from ..strategies.world import World
from . import config as configuration
from .accelerator import Accelerator
from .auto_strategy import choose_by_size

if TYPE_CHECKING:
    from ..strategies.checkpoint.store import CheckpointStore
    from .module import TrainingModule
    from .trainer import Trainer

__all__ = ["announce", "callbacks", "loggers", "make_accelerator", "mark_finished", "show_results", "store", "writes"]


def make_accelerator(trainer: Trainer) -> Accelerator:
    """Start the world, and the accelerator of this trainer in it."""
    options = trainer.options
    need_group = configuration.needs_group(trainer.strategy_asked, options["models"], options["plan"])
    world = World.start(options["device"], need_group=need_group)
    strategy, reason = trainer.strategy_asked, ""
    if strategy == "auto" and world.size > 1 and options["plan"] is None:
        strategy, reason = choose_by_size(trainer._module, world)
    seed = options["seed"]
    if seed is None:  # the order of the data follows torch's own seed, the same on all ranks
        seed = world.broadcast_json(torch.initial_seed() % 2**31)
    accelerator = Accelerator(
        strategy=strategy,
        precision=trainer.precision_asked,
        plan=options["plan"],
        models=options["models"],
        compile=options["compile"],
        activation_checkpointing=options["activation_checkpointing"],
        gradient_accumulation_steps=options["accumulate_grad_batches"],
        dataloader_config=options["dataloader_config"],
        seed=seed,
        nonfinite=options["nonfinite"],
        world=world,
    )
    accelerator._owns_world = True
    accelerator.strategy_reason = reason or accelerator.strategy_reason
    if options["gradient_clip_val"] is not None and options["gradient_clip_algorithm"] == "norm":
        configuration.tell(accelerator, gradient_clipping=options["gradient_clip_val"])
    return accelerator


def writes(trainer: Trainer) -> bool:
    """Whether this run leaves files: a fast_dev_run does not."""
    return not trainer.fast_dev_run


def callbacks(trainer: Trainer, module: TrainingModule) -> list[Callback]:
    """Return the run's callbacks: those given, the module's own, and the default ones that are not there yet."""
    options = trainer.options
    found = asked_callbacks(trainer, module)
    if options["enable_model_summary"]:
        from ..callbacks.summary import ModelSummary

        _add(found, ModelSummary)
    if options["enable_progress_bar"]:
        from ..callbacks.progress import ProgressBar

        _add(found, ProgressBar)
    from ..callbacks.checkpoint import Checkpoint

    if not writes(trainer):  # one that was given would save as well
        return [c for c in found if not isinstance(c, Checkpoint)]
    if options["enable_checkpointing"]:
        _add(found, Checkpoint)
    return found


def asked_callbacks(trainer: Trainer, module: TrainingModule) -> list[Callback]:
    """Return the callbacks given and the module's own, which take the place of given ones of their class (as in Lightning)."""
    own = check_callbacks(module.configure_callbacks())
    given = check_callbacks(trainer.options["callbacks"])
    return [*(c for c in given if type(c) not in {type(o) for o in own}), *own]


def _add(found: list[Callback], kind: type[Callback]) -> None:
    if not any(isinstance(c, kind) for c in found):
        found.append(kind())


def loggers(trainer: Trainer) -> list[Any]:
    """Return the loggers that were asked for, by name or as objects; none where nothing is written."""
    return trainer.options["loggers"] if writes(trainer) else []


def store(trainer: Trainer) -> CheckpointStore:
    """Return the store of the run's checkpoints."""
    from ..strategies.checkpoint.store import CheckpointStore

    assert trainer.run_folder is not None
    return CheckpointStore(trainer.run_folder.checkpoints, trainer.world)


def checkpoint_folder(callbacks: Sequence[Callback]) -> str | None:
    """Return the one folder that the Checkpoints among `callbacks` name for the run's checkpoints, None if none does.

    Raises:
        ConfigError: they name different ones.
    """
    places = [getattr(c, "dirpath", None) for c in callbacks]
    given = list(dict.fromkeys(str(place) for place in places if place is not None))
    if len(given) > 1:
        raise ConfigError(
            f"The Checkpoint callbacks name {len(given)} folders: {', '.join(given)}. A run has one: give all the same dirpath, "
            "or one of them alone."
        )
    return given[0] if given else None


def announce(trainer: Trainer) -> None:
    """Print the start-up lines: what was chosen, and why."""
    from ..callbacks.summary import startup_lines

    if not trainer.world.is_main:
        return
    accelerator, folder, window = trainer.accelerator, trainer.run_folder, trainer.accelerator.window
    assert folder is not None
    ranks, readers = trainer.world.size, trainer.strategy.data_shard[1]  # ranks of tp, cp and pp read the same samples
    parameters = sum(full_numel(p) for m in accelerator.models.values() for p in m.parameters())
    samples = trainer.train_loader.batch_samples
    batch = f"{samples * window.size} samples a step" if samples else f"{window.size} batches a step"
    resumed = f"step {trainer.progress.global_step}" if trainer.is_resumed else "new run"
    asked = trainer.precision.reason or ("asked for" if trainer.precision_asked is not None else "default")
    items = [
        ("device", str(trainer.world.device), f"{ranks} process{'es' if ranks > 1 else ''}; {trainer.world.device_reason}"),
        ("strategy", trainer.strategy.name, accelerator.strategy_reason),
        *((what, how, "") for what, how in trainer.strategy.explain() if what not in ("strategy", "processes")),
        ("precision", trainer.precision.name, "; ".join(n for n in (asked, trainer.precision.explain()) if n)),
        (
            "batch",
            batch,
            f"{window.size} micro-batch{'es' if window.size > 1 else ''} x {readers} rank{'s' if readers > 1 else ''}",
        ),
        ("parameters", f"{parameters:,}", ""),
        ("run", str(folder.path), "; ".join([resumed, *folder.notes])),
    ]
    print(startup_lines(items), flush=True)


def resolved(trainer: Trainer) -> dict[str, Any]:
    """Return what became of the arguments that were left open, for config.yaml."""
    accelerator = trainer.accelerator
    return {
        "resolved": {
            "device": str(trainer.world.device),
            "ranks": trainer.world.size,
            "strategy": trainer.strategy.name,
            "precision": trainer.precision.name,
            "seed": accelerator.seed,
            "accumulate_grad_batches": accelerator.window.size,
            "batch_samples": trainer.train_loader.batch_samples,
        }
    }


def show_results(trainer: Trainer, stage: str, values: Mapping[str, float]) -> None:
    """Print what an evaluation found, one line a value."""
    if trainer.world.is_main and trainer.options["enable_progress_bar"]:
        for name, value in values.items():
            print(f"{stage}  {name}  {value:.6g}", flush=True)


def mark_finished(trainer: Trainer) -> None:
    """Leave a mark in the run's folder that it came to its end, so that a later run of that name says nothing about it."""
    folder = trainer.run_folder
    if folder is not None and writes(trainer) and trainer.world.is_main and not trainer.leaving:
        (folder.path / "finished").touch()
