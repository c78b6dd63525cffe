"""The DeepSpeed JSON of a strategy: read, its `auto` values filled, its contradictions with the run named.

    read_config(path or dict) -> dict         a copy; duplicate keys and files that are no JSON are refused
    fill(config, run, ...) -> dict            what `deepspeed.initialize` gets
The run's own window accumulates, weighs and clips, so DeepSpeed is told of one micro-batch a step, and never to clip:
`gradient_clipping` is always written, since 0.19 clips at 1.0 where the key is absent. Source: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, UnknownName, suggest

__all__ = ["AUTO", "ZERO_KEYS", "contradictions", "fill", "precision_of", "read_config", "read_peers", "without_auto"]

AUTO = "auto"
# The fields of DeepSpeed 0.19's DeepSpeedZeroConfig, with the names that its JSON uses; pinned by a test.
ZERO_KEYS = (
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights"),
    *("elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param"),
    *("cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold"),
    *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "stage3_gather_fp16_weights_on_model_save"),
    *("ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size"),
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
    *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
    *("save_muon_momentum_buffer_in_memory", "leaf_module", "mics_shard_size", "mics_hierarchical_params_gather"),
)
# The sections of its JSON, and its single values; None is written for "not given".
SECTIONS = (
    *("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "zero_optimization", "activation_checkpointing", "aio"),
    *("flops_profiler", "autotuning", "tensorboard", "wandb", "comet", "csv_monitor", "comms_logger", "elasticity", "compile"),
    *("data_efficiency", "curriculum_learning", "checkpoint", "data_types", "pipeline", "hybrid_engine", "tensor_parallel"),
    *("expert_parallel", "weight_quantization", "compression_training", "datastates_ckpt", "timers", "zenflow"),
)
VALUES = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation"),
    *("steps_per_print", "gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
    *("communication_data_type", "seq_parallel_communication_data_type", "sparse_gradients", "disable_allgather", "dump_state"),
    *("disable_python_gc", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown"),
    *("memory_breakdown", "use_data_before_expert_parallelism", "dataloader_drop_last", "log_level", "vocabulary_size"),
)
_OFFLOAD_KEYS = (
    *("device", "nvme_path", "buffer_count", "buffer_size", "pin_memory", "max_in_cpu", "pipeline_read", "pipeline_write"),
    *("fast_init", "ratio", "super_offload", "cpuadam_cores_perc"),
)
# Lightning's and Accelerate's spellings of what is one of ours: their name -> ours.
_ALIASES = {
    "zero_stage": "stage",
    "hf_ds_config": "config",
    "offload_parameters": "offload_parameters",
    "offload_param_device": "offload_parameters",
    "offload_optimizer_device": "offload_optimizer",
    "offload_param_nvme_path": "nvme_path",
    "offload_optimizer_nvme_path": "nvme_path",
    "zero3_save_16bit_model": "stage3_gather_16bit_weights_on_model_save",
    "transformer_moe_cls_names": "moe_leaf_modules",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
}
_ELSEWHERE = {
    "logging_level": "DeepSpeed is quiet here; its logger is deepspeed.utils.logger.",
    "load_full_weights": "Our checkpoints hold the whole weights, and load under every strategy.",
    "loss_scale": "The loss scale is the precision's: precision=FP16Mixed(init_scale=...).",
    "initial_scale_power": "The loss scale is the precision's: precision=FP16Mixed(init_scale=2**16).",
    "process_group_backend": "The backend follows from the device.",
    "timeout": "The time that a collective may take is the world's: World.start(timeout_s=...).",
    "cluster_environment": "How processes are started is the launcher's to say, not the strategy's.",
}
# Sections that would do what the run does already, or that stand on another engine.
_REFUSED = {
    "torch_autocast": "Say precision='bf16-mixed' and DeepSpeedStrategy(weights_in_16_bits=False): fp32 weights under autocast.",
    "amp": "Say precision='fp16-mixed' instead.",
    "pipeline": "Pipelines have a strategy of their own.",
    "elasticity": "Restarts and changes of the number of processes are the launcher's.",
    "curriculum_learning": "The data's order is the loader's.",
    "data_efficiency": "The data's order is the loader's.",
    "tensor_parallel": "Say strategy='fsdp:2+tp:2' for example, whose checkpoints any strategy reads.",
    "expert_parallel": "Say strategy='fsdp:4+ep:2' for example, whose checkpoints any strategy reads.",
    "zenflow": "It steps the optimizer by a schedule of its own.",
}


def read_config(given: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON as a dict of our own.

    Raises:
        ConfigError: no such file, no JSON, or a key twice.
    """
    if isinstance(given, Mapping):
        return _checked(json.loads(json.dumps(given)))
    if (held := getattr(given, "config", None)) is not None and isinstance(held, Mapping):  # an HfDeepSpeedConfig of the peers
        return _checked(json.loads(json.dumps(held)))
    if not isinstance(given, str | Path):
        raise ConfigError(f"DeepSpeed's configuration is a path of a JSON file or a dict, got {type(given).__name__}.")
    path = Path(given)
    if not path.is_file():
        raise ConfigError(
            f"DeepSpeedStrategy(config={str(given)!r}): there is no such file. Give the path of a JSON file, or a dict."
        )
    try:
        found = json.loads(path.read_text(), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON: {error}. DeepSpeed's configuration is a JSON object.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}. DeepSpeed's configuration is a JSON object.")
    return _checked(found)


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config`, whose keys are DeepSpeed's; it ignores others, and those that begin with "_" are for notes.

    Raises:
        UnknownName, ConfigError: an unknown key with the nearest known one, a section that is no object.
    """
    _known(config, (*SECTIONS, *VALUES), "the DeepSpeed JSON")
    for key in SECTIONS:
        if not isinstance(config.get(key) or {}, dict):
            raise ConfigError(f"{key} of the DeepSpeed JSON is {config[key]!r}, and must be an object: {{{key!r}: {{...}}}}.")
    zero = config.get("zero_optimization") or {}
    _known(zero, ZERO_KEYS, "zero_optimization of the DeepSpeed JSON")
    for key in ("offload_optimizer", "offload_param"):
        section: Any = zero.get(key) or {}
        if section != AUTO and not isinstance(section, dict):
            raise ConfigError(f"zero_optimization.{key} of the DeepSpeed JSON is {section!r}: write {{'device': {section!r}}}.")
        if section != AUTO:
            _known(section, _OFFLOAD_KEYS, f"zero_optimization.{key} of the DeepSpeed JSON")
    for key in ("bf16", "fp16"):
        if config.get(key) and "enabled" not in config[key]:
            raise ConfigError(
                f"{key} of the DeepSpeed JSON has no 'enabled', and would be off. Write 'enabled': true, or 'auto'."
            )
    return {key: value for key, value in config.items() if value is not None}


def _known(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in given:
        if key not in names and not key.startswith("_"):
            raise UnknownName(
                f"{key!r} is no key of {where}, which would ignore it.{suggest(key, names)} Take it out or rename it."
            )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"The DeepSpeed JSON names {key!r} twice. Name it once.")
        found[key] = value
    return found


def read_peers(given: Mapping[str, Any], own: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (our arguments, keys of zero_optimization) of what the strategy has no parameter for.

    Raises:
        UnknownName: an argument that is neither.
    """
    ours: dict[str, Any] = {}
    zero: dict[str, Any] = {}
    for key, value in given.items():
        if key in _ELSEWHERE:
            raise UnknownName(f"DeepSpeedStrategy takes no {key!r}. {_ELSEWHERE[key]}")
        name = _ALIASES.get(key, key)
        if name in ZERO_KEYS and name not in own:
            zero[name] = value
        elif name in own:
            ours[name] = None if value == "none" else value
        else:
            known = [*own, *ZERO_KEYS, *_ALIASES]
            raise UnknownName(
                f"DeepSpeedStrategy takes no argument {key!r}.{suggest(key, known)} It takes: {', '.join(sorted(own))}."
            )
    return ours, zero


def precision_of(config: Mapping[str, Any]) -> str | None:
    """Return the precision that the JSON asks for: "bf16-mixed", "fp16-mixed", or None where it says nothing.

    Raises:
        ConfigError: both.
    """
    asked = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True]
    if len(asked) == 2:
        raise ConfigError("The DeepSpeed JSON enables bf16 and fp16. Enable one of them.")
    return f"{asked[0]}-mixed" if asked else None


def contradictions(config: Mapping[str, Any], run: Mapping[str, Any], world_size: int, *, has_optimizer: bool) -> list[str]:
    """Return a sentence for each value of the JSON that the run says differently.

    Args:
        run: what is known of the run: gradient_accumulation_steps, gradient_clipping, train_micro_batch_size_per_gpu, precision.
        has_optimizer: whether the run brings an optimizer of its own.
    """
    found: list[str] = []
    wants = dict(run)
    micro, steps = wants.get("train_micro_batch_size_per_gpu"), wants.get("gradient_accumulation_steps")
    if micro is not None and steps is not None:
        wants["train_batch_size"] = micro * steps * world_size
    words = {
        "train_micro_batch_size_per_gpu": "the loader's batch_size is",
        "gradient_accumulation_steps": "the run's accumulation is",
        "gradient_clipping": "the run clips at",
        "train_batch_size": "batch_size * accumulation * processes is",
    }
    for key, what in words.items():
        said, want = config.get(key, AUTO), wants.get(key)
        if said != AUTO and want is not None and said != want:
            found.append(f"{key} is {said} in the JSON, and {what} {want}")
    precision = str(wants.get("precision") or "")
    for name in ("bf16", "fp16"):
        said = config.get(name, {}).get("enabled", AUTO)
        if said != AUTO and precision and bool(said) != precision.startswith(name):
            found.append(f"{name}.enabled is {str(said).lower()} in the JSON, and the run's precision is {precision}")
    if has_optimizer and "optimizer" in config:
        kind = config["optimizer"].get("type", "an optimizer")
        found.append(f"the JSON has an optimizer section ({kind}), and the run brings its own optimizer")
    for section, instead in _REFUSED.items():
        held = config.get(section)
        if held and not (isinstance(held, Mapping) and held.get("enabled") is False):
            found.append(f"the JSON has the section {section!r}, which is not DeepSpeed's to do here ({instead.rstrip('.')})")
    if config.get("gradient_allreduce_op", "mean") != "mean":
        found.append("gradient_allreduce_op is 'sum' in the JSON, and the run averages over ranks")
    if config.get("zero_optimization", {}).get("mics_shard_size", -1) > 0:
        found.append("zero_optimization.mics_shard_size is set, and our checkpoints know no MiCS (use zero_hpz_partition_size)")
    return found


def fill(
    config: Mapping[str, Any],
    *,
    stage: int,
    zero: Mapping[str, Any],
    weights_in: str | None,
    numel: int,
    largest: int,
) -> dict[str, Any]:
    """Return the whole configuration for `deepspeed.initialize`.

    Args:
        zero: keys of zero_optimization that were given as arguments; they win over the JSON's, which cannot differ by then.
        weights_in: "bf16", "fp16", or None for fp32.
        numel, largest: elements of the model, and of its largest parameter, from which buffer sizes follow.
    """
    # The scheduler is made over the user's optimizer, beside the engine (deepspeed_schedule.py).
    made = {k: v for k, v in config.items() if k not in ("train_batch_size", "scheduler", *_REFUSED)}
    made["train_micro_batch_size_per_gpu"] = 1
    made["gradient_accumulation_steps"] = 1
    # Gradients are put together when the optimizer asks for them: a window may have any number of backward passes.
    made["managed_gradient_accumulation"] = False
    made["gradient_clipping"] = 0.0
    made.setdefault("steps_per_print", None)
    made["zero_allow_untested_optimizer"] = True
    # A client's own optimizer with offload: DeepSpeed insists on its CPUAdam otherwise, which is compiled at first use.
    made.setdefault("zero_force_ds_cpu_optimizer", False)
    made.pop("bf16", None)
    made.pop("fp16", None)
    section = {k: v for k, v in dict(config.get("zero_optimization", {})).items() if v != AUTO} | dict(zero) | {"stage": stage}
    if stage in (1, 2) and not section.get("offload_optimizer"):
        section.setdefault("compute_grad_norm", weights_in == "bf16" and stage == 1)
    # The defaults are 500 million elements: memory that a small model never needs.
    section.setdefault("reduce_bucket_size", max(min(500_000_000, numel), largest))
    section.setdefault("allgather_bucket_size", max(min(500_000_000, numel + numel % 2), 2))
    offload: Any = section.get("offload_param") or {}
    if offload.get("device") == "nvme":  # each of its five buffers would be of 100 million elements
        section["offload_param"] = {"buffer_size": largest + 1024} | {k: v for k, v in offload.items() if v != AUTO}
    made["zero_optimization"] = section
    if weights_in is not None:
        made[weights_in] = {k: v for k, v in dict(config.get(weights_in, {})).items() if v != AUTO} | {"enabled": True}
        # Gradients are summed over a window in fp32.
        made["data_types"] = {"grad_accum_dtype": "fp32"} | dict(config.get("data_types", {}))
    if weights_in == "fp16":
        made["fp16"] |= {"loss_scale": 1.0}  # the precision scales the loss
    return without_auto(made)


def without_auto(value: Any) -> Any:
    """Leave out what is still "auto": DeepSpeed's default holds then."""
    if isinstance(value, dict):
        return {k: without_auto(v) for k, v in value.items() if v != AUTO}
    return value
