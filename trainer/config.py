"""Arguments: the peers' spellings, checks with a did-you-mean, and what "auto" means, each in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..strategies.base import Strategy, make_precision, make_strategy
from ..strategies.errors import ConfigError, UnknownName, suggest
from ..strategies.precision.base import Precision
from ..strategies.registry import find_strategy

if TYPE_CHECKING:
    from ..strategies.mesh import ParallelPlan
    from ..strategies.world import World

# Where the meaning is equal, the peers' argument is accepted: class -> their name -> ours.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "Accelerator": {
        "mixed_precision": "precision",
        "cpu": "device",
        "deepspeed_plugin": "deepspeed_plugins",
        "deepspeed_plugins": "deepspeed_plugins",
        "project_config": "project_dir",
        "logging_dir": "project_dir",
        "dynamo_backend": "compile",
        "dynamo_plugin": "compile",
    },
    "Trainer": {
        "ckpt_path": "resume",
        "resume_from_checkpoint": "resume",
        "logger": "loggers",
        "default_root_dir": "root",
        "gradient_accumulation_steps": "accumulate_grad_batches",
        "max_grad_norm": "gradient_clip_val",
        "mixed_precision": "precision",
        "accelerator": "device",
        "num_train_epochs": "max_epochs",
    },
    "log": {"reduce_fx": "reduce", "sync_dist": "sync"},
}
# What the peers have as an argument and what is elsewhere here: class -> their name -> where. Their "not given" is accepted.
_LOADER = "Give it to dataloader_config=DataLoaderConfiguration(...)."
ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "Accelerator": {
        "gradient_accumulation_plugin": "Write gradient_accumulation_steps=n; the last window of an epoch always steps.",
        "fsdp_plugin": "Write strategy='fsdp', or strategy=FSDPStrategy(...) with its options.",
        "device_placement": "Prepared objects are always on accelerator.device; keep the others out of prepare.",
        "rng_types": "The order of the data is made from (seed, epoch), the same on all ranks.",
        "split_batches": _LOADER,
        "dispatch_batches": _LOADER,
        "even_batches": _LOADER,
        "use_seedable_sampler": _LOADER,
    },
    "Trainer": {
        "sync_batchnorm": "Write strategy=DDPStrategy(sync_batchnorm=True).",
        "detect_anomaly": "Call torch.autograd.set_detect_anomaly(True) before fit.",
        "benchmark": "Set torch.backends.cudnn.benchmark = True before fit.",
        "profiler": "Profile in a callback, or around your loop with Accelerator.profile.",
        "plugins": "Give the object itself: strategy=, precision=.",
        "use_distributed_sampler": "Ranks always divide the data. A loader that is divided already: "
        "dataloader_config=DataLoaderConfiguration(already_sharded=True).",
        "reload_dataloaders_every_n_epochs": "The order is new in each epoch; let the data set change itself in set_epoch.",
        "barebones": "Switch off what you do not want: enable_progress_bar, enable_checkpointing, enable_model_summary.",
        "min_epochs": "EarlyStopping is what stops early: let it be patient enough.",
        "min_steps": "EarlyStopping is what stops early: let it be patient enough.",
        "gpus": "Write device='cuda', devices=n.",
    },
    "log": {"logger": "Every value goes to all loggers.", "rank_zero_only": "Write sync=False: rank 0's value is shown."},
}
_NOT_GIVEN: Mapping[str, Any] = {
    "device_placement": True,
    "use_distributed_sampler": True,
    "logger": True,
}


def resolve_peers(cls: Callable[..., Any], name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given`, arguments that `cls` (a class or function) has no parameter for, under our names.

    Raises:
        UnknownName: an argument that is neither ours nor a peer's; the nearest is named.
    """
    aliases = ALIASES[name]
    resolved: dict[str, Any] = {}
    for key, value in given.items():
        ours = aliases.get(key)
        elsewhere = ELSEWHERE[name].get(key)
        if elsewhere is not None:
            if value is None or value is False or value in ((), [], 0, _NOT_GIVEN.get(key)):
                continue
            raise UnknownName(f"{name} has no argument {key!r} (got {value!r:.60}). {elsewhere}")
        if ours is None:
            known = [p for p in inspect.signature(cls).parameters if p not in ("self", "peers")]
            raise UnknownName(f"{name} has no argument {key!r}.{suggest(key, [*known, *aliases])} Known: {', '.join(known)}.")
        resolved[ours] = _translate(key, value)
    return resolved


def _translate(key: str, value: Any) -> Any:
    if key == "cpu":
        return "cpu" if value else "auto"
    if key == "project_config":
        return value if isinstance(value, str) else getattr(value, "project_dir", value)
    return value


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a `value` that is none of `choices`."""
    if value not in choices:
        raise UnknownName(f"{argument}={value!r} is not known.{suggest(str(value), choices)} Known: {', '.join(choices)}.")


def check_at_least(argument: str, value: Any, least: int) -> None:
    """Refuse a `value` that is not a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"{argument} must be a whole number of at least {least}, got {value!r}. "
            f"Write {argument}={max(least, 1)} for example, or leave it out."
        )


def needs_group(strategy: str | Strategy, models: Mapping[str, str | Strategy] | None, plan: ParallelPlan | None) -> bool:
    """Return whether any of the strategies needs a process group also on one process.

    Raises:
        ConfigError: a plan that is none.
    """
    if plan is not None and not hasattr(plan, "dp_shard"):
        raise ConfigError(f"plan must be a ParallelPlan, got {plan!r:.60}. For example plan=ParallelPlan(dp_shard=-1).")
    asked = [name_for(plan) if strategy == "auto" and plan is not None else strategy, *(models or {}).values()]
    kinds = [find_strategy(s)[0] if isinstance(s, str) else s for s in asked if s != "auto"]
    return any(getattr(kind, "needs_group", False) for kind in kinds)


def name_for(plan: ParallelPlan) -> str:
    """Return the strategy that "auto" means under `plan`."""
    if any(degree != 1 for axis, degree in plan.degrees().items() if axis in ("cp", "tp", "pp", "ep")):
        return "parallel"
    if plan.dp_shard != 1:
        return "hsdp" if plan.dp_replicate != 1 else "fsdp"
    return "ddp"


def choose_strategy(
    strategy: str | Strategy, world: World, precision: Precision | None, plan: ParallelPlan | None = None
) -> tuple[Strategy, str]:
    """Return the strategy and the reason for it, with `precision` given to it where it has none of its own, and the `plan`.

    Raises:
        ConfigError: both the strategy object and the run name a precision (or a plan), and they differ.
    """
    if strategy == "auto" and plan is not None:
        made, reason = make_strategy(name_for(plan)), f"chosen: the plan is {plan}"
    elif strategy == "auto":
        name = "single" if world.size == 1 else "ddp"
        reason = "chosen: one process" if world.size == 1 else f"chosen: {world.size} processes, the whole model fits each"
        made = make_strategy(name)
    else:
        made, reason = make_strategy(strategy), "asked for"
    _give_precision(made, precision)
    if plan is not None:
        made.take_plan(plan, world.size)
    return made, reason


def start_strategies(
    models: Mapping[str, str | Strategy] | None, world: World, precision: Precision | None
) -> dict[str, Strategy]:
    """Make and start the strategy of each named model."""
    started: dict[str, Strategy] = {}
    for name, strategy in (models or {}).items():
        made = choose_strategy(strategy, world, None)[0]
        if made.precision is None and precision is not None:
            made.precision = precision
        made.start(world)
        started[name] = made
    return started


def give_shaping(strategies: Iterable[Strategy], compile: Any, activation_checkpointing: Any) -> None:
    """Give the run's `compile` and `activation_checkpointing` to the strategies, each of which may have its own.

    Raises:
        ConfigError: values that cannot be.
    """
    if compile:
        from ..strategies.compile import read_compile

        compile = read_compile(compile)
    if activation_checkpointing:
        from ..strategies.activation import read_checkpointing

        activation_checkpointing = read_checkpointing(activation_checkpointing)
    for strategy in strategies:
        if strategy.compile is None:
            strategy.compile = compile
        if strategy.activation_checkpointing is None:
            strategy.activation_checkpointing = activation_checkpointing


def tell(accelerator: Any, **settings: Any) -> None:
    """Let every strategy know what the run says; see `Strategy.take_run`."""
    for strategy in (accelerator.strategy, *accelerator.strategies.values()):
        strategy.take_run(**settings)


def tell_batch_size(accelerator: Any, *loaders: Any) -> None:
    """Let every strategy know the batch size of the first of `loaders` that has one."""
    for loader in loaders:
        size = getattr(loader, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            tell(accelerator, train_micro_batch_size_per_gpu=size)
            return


def _give_precision(strategy: Strategy, precision: Precision | None) -> None:
    if precision is None:
        return
    if strategy.precision is not None and strategy.precision.name != precision.name:
        raise ConfigError(
            f"The run asks for precision {precision.name!r} and its strategy {strategy!r} for {strategy.precision.name!r}. "
            "Name it once."
        )
    if strategy.precision is None:
        strategy.precision = make_precision(precision)
