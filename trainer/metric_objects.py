"""Objects that compute their own value over an epoch: torchmetrics, torcheval, or anything with compute, update and reset.

How the ranks are brought together, in `compute_object`:
    torchmetrics    has its own synchronisation (`sync`), which runs inside `compute` whenever a process group exists
    torcheval       has `merge_state`: the objects of all ranks are gathered and merged into a copy
    neither         is refused on several ranks: the mean of an F1 over ranks is not the F1
Their states are no part of a module's state_dict, so `objects_state` saves them, by the name of the module that they are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.errors import ConfigError, DistributedError
from .metric_parts import as_number, one_element

if TYPE_CHECKING:
    from torch import nn

    from ..strategies.world import World

__all__ = ["compute_object", "is_metric_object", "load_objects_state", "merge_objects_states", "objects_state"]


def is_metric_object(value: Any) -> bool:
    """Tell whether a value computes itself: it has compute, update and reset to call."""
    return all(callable(getattr(value, method, None)) for method in ("compute", "update", "reset"))


def compute_object(name: str, metric: Any, world: World, *, sync: bool) -> Tensor | float:
    """Return the object's value over all ranks and reset it. All ranks call it together unless `sync` is False.

    Raises:
        ConfigError: the object cannot do what was asked on several ranks.
        DataError: it computes something that is not a single number.
    """
    if world.size > 1:
        if world.is_duplicate and sync:
            metric.reset()  # it has seen what the object of another rank has seen
        own = hasattr(metric, "sync_on_compute")
        if own and bool(metric.sync_on_compute) != sync:
            kind = type(metric).__name__
            raise ConfigError(
                f"log({name!r}, sync={sync}) got a {kind} with sync_on_compute={metric.sync_on_compute}. Both say whether it "
                f"is computed over all ranks: log it with sync={not sync}, or make it with sync_on_compute={sync}."
            )
        if sync and not own:
            return _computed(name, _merged(name, metric, world), reset=metric)
        if sync:
            _type_empty_lists(metric, world)
    return _computed(name, metric, reset=metric)


def _type_empty_lists(metric: Any, world: World) -> None:
    """Give a list state that is empty on this rank a tensor of no rows, of the type that the other ranks have.

    torchmetrics 1.9 sends float32 for an empty list; beside another rank's int64 rows that aborts the process in gloo.
    """
    lists = {key: value for key, value in getattr(metric, "metric_state", {}).items() if isinstance(value, list)}
    if not lists:
        return
    mine = {key: [str(value[0].dtype).removeprefix("torch."), *value[0].shape[1:]] for key, value in lists.items() if value}
    for theirs in world.gather_json(mine):
        for key, value in lists.items():
            if not value and key in theirs:
                dtype, *shape = theirs[key]
                value.append(torch.empty((0, *shape), dtype=getattr(torch, dtype), device=metric.device))


def _merged(name: str, metric: Any, world: World) -> Any:
    """A copy of the object that has seen what all ranks saw."""
    if not callable(getattr(metric, "merge_state", None)):
        raise ConfigError(
            f"log({name!r}) got a {type(metric).__name__} on {world.size} ranks, and it can neither synchronise itself "
            "(torchmetrics) nor merge_state (torcheval); a mean of its values over the ranks would be another number. "
            "Give it one of the two, log its parts with reduce='sum', or log it with sync=False (rank 0's own is reported)."
        )
    everyone = world.gather_object(metric)
    merged = copy.deepcopy(everyone[0])  # merged in order of rank on every rank, so that all get the same bits
    merged.merge_state(everyone[1:])
    return merged


def _computed(name: str, metric: Any, *, reset: Any) -> Tensor | float:
    with warnings.catch_warnings():
        # A rank whose shard was empty has not updated its object; the other ranks' states make the value all the same.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        value = metric.compute()
    reset.reset()
    if isinstance(value, Mapping):
        raise ConfigError(
            f"log({name!r}) got a {type(metric).__name__} that computes a dict with {', '.join(map(repr, list(value)[:5]))}; "
            "one name reports one number. Pass a collection to log_dict, which logs each of its metrics."
        )
    return one_element(name, value) if isinstance(value, Tensor) else as_number(name, value)


def check_holders(name: str, holders: int, world: World) -> None:
    """Refuse to compute an object that some ranks never logged: its synchronisation would wait for them for ever."""
    mesh = world.mesh
    if mesh is not None and mesh.size("pp") > 1:
        raise ConfigError(
            f"log({name!r}) got an object that computes its value over all ranks, and in a pipeline only the last stage has one. "
            "Log its parts with reduce='sum', or as a mean."
        )
    expected = world.size if mesh is None else mesh.size("loss")
    if holders != expected:
        raise DistributedError(
            f"The object logged as {name!r} was logged on {holders} of {expected} ranks, and all of them compute it together. "
            "Log it on every rank, at least once; on a rank without data of its own it counts for nothing."
        )


# -- state ----------------------------------------------------------------------------------------------------------------
def _objects(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The torchmetrics-like children: modules with a `metric_state`."""
    for name, child in module.named_modules():
        if isinstance(getattr(child, "metric_state", None), Mapping) and hasattr(child, "_update_count"):
            yield name, child


def objects_state(module: nn.Module) -> dict[str, Any]:
    """Return this rank's states of the torchmetrics objects in `module`: tensors and JSON, for a resume in mid-epoch."""
    return {
        name: {"updates": child._update_count, "state": {key: _copied(value) for key, value in child.metric_state.items()}}
        for name, child in _objects(module)
    }


def load_objects_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Take back what `objects_state` returned. Objects that are new since then start empty."""
    for name, child in _objects(module):
        if name in state:
            for key, value in state[name]["state"].items():
                old = getattr(child, key)
                setattr(child, key, _copied(value, old.device if hasattr(old, "device") else child.device))
            child._update_count = state[name]["updates"]
            child._computed = None


def merge_objects_states(module: nn.Module, states: Sequence[Mapping[str, Any]]) -> None:
    """Give `module` what all ranks of a run had seen, for a resume on another number of ranks. Only rank 0 does this."""
    load_objects_state(module, states[0])
    for state in states[1:]:
        for name, child in _objects(module):
            if name in state and state[name]["updates"]:
                if not child._update_count:
                    load_objects_state(module, {name: state[name]})
                    continue
                incoming = {key: _copied(value, child.device) for key, value in state[name]["state"].items()}
                updates = child._update_count
                child.merge_state(incoming)
                child._update_count = updates + state[name]["updates"]


def _copied(value: Any, device: Any = None) -> Any:
    if isinstance(value, list):
        return [_copied(item, device) for item in value]
    return value.detach().to(device, copy=True) if device is not None else value.detach().clone()
