"""The peers' options for fully sharded training (FSDP version 1 of Accelerate and Lightning) under our names, or refused by them.

`read_peers` turns what `FSDPStrategy` was given beside its own arguments into those; what has no meaning under fully_shard is
refused with what takes its place. An option that says what happens anyway is accepted in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .activation import ActivationCheckpointing
from .errors import ConfigError, UnknownName, suggest
from .mesh import ParallelPlan

__all__ = ["read_peers"]

# Another spelling of the same.
_ALIASES = {
    "auto_wrap_policy": "units",
    "transformer_cls_names_to_wrap": "units",
    "min_num_params": "units",
    "mixed_precision_policy": "mixed_precision",
    "ignored_modules": "ignored_parameters",
    "fsdp_plan": "plan",
}
# What fully_shard always does: only the other value would be a wish that is not fulfilled.
_ALWAYS: Mapping[str, tuple[Any, str]] = {
    "use_orig_params": (True, "fully_shard always keeps the model's own parameters and their names."),
    "limit_all_gathers": (True, "fully_shard always limits how far gathering runs ahead."),
    "fsdp_version": (2, "FSDP here is version 2 (torch's fully_shard); version 1 is deprecated in torch."),
    "save_distributed_checkpoint": (True, "Each rank always writes its own piece, and any number of ranks reads them."),
    "param_init_fn": (None, "A model built under torch.device('meta') is filled by its modules' reset_parameters()."),
    "cluster_environment": (None, "The launcher's variables are read by the world."),
}
_ELSEWHERE = {
    "state_dict_type": "Checkpoints have one format, which any strategy on any number of ranks reads. Leave it out.",
    "state_dict_config": "Checkpoints have one format. Leave it out.",
    "optim_state_dict_config": "Checkpoints have one format. Leave it out.",
    "cpu_ram_efficient_loading": "Build the model under torch.device('meta'): no rank ever holds the whole of it. Leave it out.",
    "process_group": "The processes are the world's; one that you initialised yourself is joined.",
    "process_group_backend": "The backend follows from the device.",
    "timeout": "The time that a collective may take is the world's: World.start(timeout_s=...).",
    "device_id": "The device is the run's: Trainer(device=...) or Accelerator(device=...).",
    "kwargs": "Pass the arguments themselves.",
}
_SHARDING = {
    "FULL_SHARD": (True, False),
    "SHARD_GRAD_OP": (False, False),
    "HYBRID_SHARD": (True, True),
    "HYBRID_SHARD_ZERO2": (False, True),
    "_HYBRID_SHARD_ZERO2": (False, True),
}
"""Name in version 1 -> (reshard_after_forward, replicated as well)."""
_NUMBERS = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}


def read_peers(peers: Mapping[str, Any], own: Iterable[str], *, hybrid: bool) -> dict[str, Any]:
    """Return `peers` under our names and with our values.

    Args:
        own: the names that the strategy takes itself.
        hybrid: the strategy is hsdp, which replicates as well.
    Raises:
        UnknownName: an option that nobody has, or that lies elsewhere.
        ConfigError: a value that cannot be had here; the message says what takes its place.
    """
    given: dict[str, Any] = {}
    for key, value in peers.items():
        if key in _ELSEWHERE:
            raise UnknownName(f"FSDPStrategy takes no {key!r}. {_ELSEWHERE[key]}")
        if key in _ALWAYS:
            expected, why = _ALWAYS[key]
            if value is not None and value != expected:
                raise ConfigError(f"FSDPStrategy({key}={value!r}) cannot be had. {why} Leave it out.")
        elif key == "sharding_strategy":
            given |= _sharding(value, hybrid)
        elif key == "cpu_offload":
            given["offload"] = "cpu" if getattr(value, "offload_params", value) else None
        elif key == "activation_checkpointing_policy":
            if value is not None:
                given["activation_checkpointing"] = _checkpointing(value)
        elif key == "backward_prefetch":
            _check_prefetch(value)
        elif key in ("device_mesh", "data_parallel_size", "tensor_parallel_size"):
            given["plan"] = _plan(key, value, given.get("plan"))
        elif key == "auto_wrap_policy" and value in ("transformer_based_wrap", "TRANSFORMER_BASED_WRAP"):
            given.setdefault("units", "auto")
        elif key == "auto_wrap_policy" and value in ("no_wrap", "NO_WRAP"):
            given["units"] = None
        elif key == "auto_wrap_policy" and value in ("size_based_wrap", "SIZE_BASED_WRAP"):
            given.setdefault("units", 100_000_000)  # the peers' default of min_num_params
        elif key == "transformer_cls_names_to_wrap" and isinstance(value, str):
            given["units"] = [name.strip() for name in value.split(",")]
        elif key in _ALIASES:
            if value is not None:
                given[_ALIASES[key]] = value
        else:
            known = sorted({*own, *_ALIASES, *_ALWAYS, "sharding_strategy", "cpu_offload", "backward_prefetch", "device_mesh"})
            raise UnknownName(f"FSDPStrategy takes no argument {key!r}.{suggest(key, known)} It takes: {', '.join(sorted(own))}.")
    return given


def _sharding(value: Any, hybrid: bool) -> dict[str, Any]:
    name = str(getattr(value, "name", value)).upper()
    name = _NUMBERS.get(name, name)
    if name == "NO_SHARD":
        raise ConfigError(
            "sharding_strategy='NO_SHARD' holds the whole model on each process. Use strategy='ddp', which does that."
        )
    if name not in _SHARDING:
        raise UnknownName(
            f"There is no sharding_strategy {value!r}.{suggest(name, _SHARDING)} Here it is reshard_after_forward=True "
            "(FULL_SHARD) or False (SHARD_GRAD_OP), and strategy='hsdp' for the hybrid ones."
        )
    reshard, replicated = _SHARDING[name]
    if replicated and not hybrid:
        raise ConfigError(
            f"sharding_strategy={name!r} shards inside a group and replicates over groups. Use strategy='hsdp', HSDPStrategy(), "
            "or a plan with both axes: FSDPStrategy(plan=ParallelPlan(dp_replicate=2, dp_shard=-1))."
        )
    return {"reshard_after_forward": reshard}


def _checkpointing(policy: Any) -> ActivationCheckpointing:
    """Lightning's set of module classes."""
    if not isinstance(policy, set | frozenset | list | tuple):
        raise ConfigError(
            f"activation_checkpointing_policy={policy!r:.60}: expected a set of module classes. A function over modules is "
            "activation_checkpointing=ActivationCheckpointing(units=lambda name, module: ...)."
        )
    return ActivationCheckpointing(units=tuple(policy))


def _check_prefetch(value: Any) -> None:
    name = str(getattr(value, "name", value)).upper()
    if name not in ("NONE", "BACKWARD_PRE", "NO_PREFETCH"):
        raise ConfigError(
            f"backward_prefetch={value!r} cannot be had: fully_shard gathers the next unit before it is needed (BACKWARD_PRE). "
            "Leave it out, or say how many units ahead: FSDPStrategy(backward_prefetch=2)."
        )


def _plan(key: str, value: Any, before: ParallelPlan | None) -> ParallelPlan | None:
    """Lightning's device_mesh=(replicas, shards) and the sizes of its ModelParallelStrategy."""
    if value is None or (key != "device_mesh" and value == "auto"):
        return before
    if key == "device_mesh" and isinstance(value, tuple) and len(value) == 2:
        return ParallelPlan(dp_replicate=value[0], dp_shard=value[1])
    if key == "data_parallel_size" and isinstance(value, int):
        return ParallelPlan(dp_shard=value, tp=before.tp if before else 1)
    if key == "tensor_parallel_size" and isinstance(value, int):
        return ParallelPlan(dp_shard=before.dp_shard if before else -1, tp=value)
    raise ConfigError(f"{key}={value!r} is no plan. Say FSDPStrategy(plan=ParallelPlan(dp_replicate=..., dp_shard=...)).")
