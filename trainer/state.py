"""Everything that a checkpoint holds, and the order in which it is restored.

    tensors        model/<model>/<name>, optimizer/<optimizer>/<model>/<parameter>/<key>     (strategies/named_state.py)
    values         optimizer/<optimizer>, precision, window, scheduler/<i>, and every provider by its name; in those of a Trainer
                   also config: its arguments and what became of them, for people and `drivetrain ckpt show`
    rank values    random states of each rank, and the state of providers that is each rank's own (`state_is_per_rank`)

`collect` takes it from a running accelerator; `restore` gives it back: first models and optimizers, then schedulers and
providers in the order of their registration, the random states last, because anything before may draw from them.
A provider is any object with `state_dict` and `load_state_dict` whose state is a tree of tensors and JSON values. One whose state
is per rank may have `load_states` (and `check_states`), which is given those of all ranks, so that a resume on another number
can merge them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..strategies.checkpoint import rng
from ..strategies.errors import CheckpointError
from ..strategies.named_state import Source

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.checkpoint.reader import Checkpoint
    from .accelerator import Accelerator

__all__ = ["Collected", "Provider", "collect", "load_models", "restore", "restore_random"]


@runtime_checkable
class Provider(Protocol):
    """Something whose state is saved."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass
class Collected:
    """What `CheckpointStore.save` takes."""

    tensors: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    rank_values: dict[str, Any] = field(default_factory=dict)
    rank_tensors: dict[str, Any] = field(default_factory=dict)


def collect(accelerator: Accelerator, providers: Mapping[str, Provider]) -> Collected:
    """Take the state of everything that `accelerator` prepared and of `providers`. Local: no rank waits for another."""
    found = Collected()
    for strategy, models, optimizers in _by_strategy(accelerator):
        tensors, values = strategy.state_tensors(models, optimizers)
        found.tensors |= tensors
        found.values |= values
    found.values["precision"] = accelerator.precision.state_dict()
    found.values["window"] = accelerator.window.state_dict()
    for i, scheduler in enumerate(accelerator.schedulers):
        found.values[f"scheduler/{i}"] = _plain_scheduler(scheduler.state_dict())
    for name, provider in providers.items():
        if _is_per_rank(provider):
            found.rank_values[name] = provider.state_dict()
        else:
            found.values[name] = provider.state_dict()
    found.rank_tensors, found.rank_values["rng"] = rng.capture()
    return found


def restore(
    accelerator: Accelerator, checkpoint: Checkpoint, providers: Mapping[str, Provider], *, strict: bool = True
) -> list[str]:
    """Give everything its state back, except the random states (`restore_random`, last). Return what was skipped.

    Raises:
        CheckpointError: the checkpoint is damaged (every file is checked first), is of another model, optimizer, number of
            schedulers, or lacks a provider's state. Nothing was loaded then.
    """
    checkpoint.require_whole(accelerator.world)
    names = checkpoint.names()
    held = set(checkpoint.value_names())
    skipped: list[str] = []
    # What can be told by names is checked before anything is loaded.
    known = {n.split("/", 2)[1] for n in names if n.startswith("model/")}
    if strict and (extra := known - set(accelerator.models)):
        raise CheckpointError(
            f"The checkpoint holds the model(s) {', '.join(sorted(extra))}, and the run has "
            f"{', '.join(accelerator.models) or 'none'}. Prepare the same models, or load with strict=False."
        )
    saved_schedulers = sum(n.startswith("scheduler/") for n in held)
    if saved_schedulers != len(accelerator.schedulers):
        raise CheckpointError(
            f"The checkpoint holds {saved_schedulers} scheduler(s) and the run has {len(accelerator.schedulers)}. "
            "Build the same ones."
        )
    for name, provider in providers.items():
        _check_provider(name, provider, checkpoint, held, accelerator.world.rank, strict=strict)
    for strategy, models, optimizers in _by_strategy(accelerator):
        own = {f"model/{n}/" for n in models}
        theirs = [n for n in names if not n.startswith("model/") or any(n.startswith(p) for p in own)]
        values = {n: checkpoint.value(n) for n in held if n.startswith(("optimizer/", "strategy/"))}
        skipped += strategy.load_state_tensors(models, optimizers, theirs, source_of(checkpoint), values, strict=strict)
    accelerator.precision.load_state_dict(checkpoint.value("precision"))
    accelerator.window.load_state_dict(checkpoint.value("window"))
    for i, scheduler in enumerate(accelerator.schedulers):
        scheduler.load_state_dict(checkpoint.value(f"scheduler/{i}"))
    for optimizer in accelerator.optimizers.values():
        # torch's schedulers warn when their optimizer never stepped in this process; it did in the one before.
        optimizer.optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
    for name, provider in providers.items():
        if not _restore_provider(name, provider, checkpoint, held, accelerator.world.rank):
            skipped.append(name)
    return skipped


def _is_per_rank(provider: Provider) -> bool:
    """Whether each rank's state is its own: objects that say so, and loaders that each rank reads by itself."""
    return getattr(provider, "state_is_per_rank", False) or getattr(provider, "per_rank", False)


def _check_provider(name: str, provider: Provider, checkpoint: Checkpoint, held: set[str], rank: int, *, strict: bool) -> None:
    """Refuse what can be refused before anything is loaded: a provider may have `check_state`, which changes nothing."""
    merges = hasattr(provider, "load_states")
    there = name in held if not _is_per_rank(provider) else name in checkpoint.rank_value_names(0)
    there = there or (merges and (name in held or name in checkpoint.rank_value_names(0)))
    if strict and not there and getattr(provider, "state_is_required", True):
        kind = sorted(n for n in {*held, *checkpoint.rank_value_names(0)} if n.split("/")[0] == name.split("/")[0])
        raise CheckpointError(
            f"The checkpoint holds no state for {name!r}; of that kind it holds {', '.join(kind) or 'nothing'}. "
            "Register the same objects as in the run that saved it, or load with strict=False."
        )
    check, check_all = getattr(provider, "check_state", None), getattr(provider, "check_states", None)
    if check_all is not None and there:
        check_all(_states(name, checkpoint, held))
    elif check is not None and there:
        check(
            checkpoint.rank_value(name, rank if rank < checkpoint.world_size else 0)
            if _is_per_rank(provider)
            else checkpoint.value(name)
        )


def _restore_provider(name: str, provider: Provider, checkpoint: Checkpoint, held: set[str], rank: int) -> bool:
    """Give one provider its state; return False where there is none."""
    of_ranks = name in checkpoint.rank_value_names(0)
    load_states = getattr(provider, "load_states", None)
    if load_states is not None:
        if of_ranks or name in held:
            load_states(_states(name, checkpoint, held))
        return of_ranks or name in held
    if not _is_per_rank(provider):
        if name in held:
            provider.load_state_dict(checkpoint.value(name))
        return name in held
    if of_ranks:
        # A rank that the saving run did not have is given rank 0's state, and refuses it if it cannot go on from there.
        provider.load_state_dict(checkpoint.rank_value(name, rank if rank < checkpoint.world_size else 0))
    return of_ranks


def _states(name: str, checkpoint: Checkpoint, held: set[str]) -> list[Any]:
    """The states of all ranks; one where they are the same. A stream's may be either, as the number of ranks was."""
    return [checkpoint.value(name)] if name in held else [checkpoint.rank_value(name, r) for r in range(checkpoint.world_size)]


def load_models(accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Give the models their weights, and nothing else its state: for evaluation.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model. Nothing was loaded then.
    """
    checkpoint.require_whole(accelerator.world)
    for strategy, models, _ in _by_strategy(accelerator):
        names = [n for n in checkpoint.names() if n.startswith("model/")]
        strategy.load_state_tensors(models, {}, names, source_of(checkpoint), {})


def source_of(checkpoint: Checkpoint) -> Source:
    """The tensors of `checkpoint`, of which a strategy may read pieces."""
    return Source(checkpoint.tensor, shape=checkpoint.shape, dtype=checkpoint.dtype, fill=checkpoint.read_many, sliced=True)


def restore_random(checkpoint: Checkpoint, rank: int) -> list[str]:
    """Set this rank's random states; return notes. A rank that the saving run did not have keeps its own, with a note."""
    if rank >= checkpoint.world_size:
        return [f"rank {rank} keeps its own random state: {checkpoint.path.name} was saved by {checkpoint.world_size} rank(s)"]
    tensors = {n: checkpoint.rank_tensor(n, rank) for n in checkpoint.rank_names(rank) if n.startswith("rng/")}
    return rng.restore(tensors, checkpoint.rank_value("rng", rank))


def _by_strategy(accelerator: Accelerator) -> list[tuple[Strategy, dict[str, Any], dict[str, Any]]]:
    """Return (strategy, its models, its optimizers) for every strategy that holds a model."""
    groups: dict[Strategy, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, model in accelerator.models.items():
        groups.setdefault(accelerator.strategies.get(name, accelerator.strategy), ({}, {}))[0][name] = model
    for name, optimizer in accelerator.optimizers.items():
        groups.setdefault(optimizer.strategy, ({}, {}))[1][name] = optimizer.optimizer
    return [(strategy, models, optimizers) for strategy, (models, optimizers) in groups.items()]


def _plain_scheduler(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a scheduler cannot save: functions (LambdaLR's), which the user's code brings back."""
    # SequentialLR and ChainedScheduler hold their parts' states in a list under "_schedulers".
    return {
        key: [_plain_scheduler(s) if isinstance(s, dict) else s for s in value] if key == "_schedulers" else value
        for key, value in state.items()
        if not callable(value)
    }
