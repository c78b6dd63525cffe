"""The names of DeepSpeed that this stands on, private ones among them: a release without one fails here, and not in a run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, DeepSpeedStrategy
from drivetrain.strategies.deepspeed_config import ZERO_KEYS
from drivetrain.strategies.deepspeed_engine import library
from torch import nn

deepspeed = library(torch.device("cpu"))

SHARED = ("optimizer", "overflow", "step", "zero_grad", "set_gradient_accumulation_boundary")
BY_HOOKS = (
    *("clear_backward_seen_flag", "backward_prologue", "enter_backward", "exit_backward", "_backward_active_depth"),
    "_hooks_fired_this_backward",
)
FLAT = (
    *("round_robin_bit16_groups", "round_robin_bit16_offsets", "partition_size", "real_dp_process_group", "bit16_groups"),
    *("single_partition_of_fp32_groups", "averaged_gradients", "all_grad_tensors", "micro_step_id", "cpu_offload"),
    *("update_lp_params", "_update_model_bit16_weights", "reset_cpu_buffers"),
    "finalize_gradient_accumulation_boundary",
)
BF16 = (
    *("bf16_groups", "fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition", "dp_rank", "clear_hp_grads"),
    *("clear_lp_grads", "backward_epilogue", "update_lp_params"),
)
STAGE3 = (
    *("fp16_groups", "grad_position", "get_param_id", "_get_param_partition_rank", "fp32_partitioned_groups_flat"),
    *("fp16_partitioned_groups_flat", "sub_group_to_group_id", "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"),
    *("offload_optimizer", "_offload_boundary_param_ids", "reset_cpu_buffers", "_partition_all_parameters"),
    *("_reassign_or_swap_out_partitioned_parameters", "persistent_parameters", "invalidate_secondary_tensor"),
    *("parameter_offload", "swap_optimizer", "_swappable_optimizer_subgroup", "_optimizer_states_and_gradient_swap_in"),
    *("_release_swap_buffers", "_writeback_swap_state"),
    "finalize_gradient_accumulation_boundary",
)
ENGINE = (
    *("module_forward_pre_hook", "module_forward_post_hook", "allreduce_gradients", "global_steps", "micro_steps"),
    *("save_checkpoint", "load_checkpoint", "destroy"),
)
KEEPS = ["parameter", "gradient_offsets", "gradient_tensors"]
PARAMETER = ("ds_id", "ds_shape", "ds_numel", "ds_tensor", "ds_status", "ds_process_group", "partition", "all_gather")


def lacking(stage: int, precision: str) -> list[str]:
    strategy = DeepSpeedStrategy(stage=stage, precision=precision, stage3_param_persistence_threshold=0)
    accelerator = Accelerator(strategy=strategy)
    model = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.ones(2, 4)).float().sum())
    engine = strategy.engine(model)
    zero: Any = engine.optimizer
    bf16 = stage == 1 and precision == "bf16-mixed"
    names = (*SHARED, *(BF16 if bf16 else (*BY_HOOKS, *(STAGE3 if stage == 3 else FLAT))))
    found = [f"{type(zero).__name__}.{n}" for n in names if not hasattr(zero, n)]
    found += [f"{type(zero).__name__}.bf16_groups" for _ in range(1) if hasattr(zero, "bf16_groups") != bf16]
    found += [f"DeepSpeedEngine.{n}" for n in ENGINE if not hasattr(engine, n)]
    if stage == 3:
        found += [f"Parameter.{n}" for n in PARAMETER if not hasattr(model.weight, n)]
        found += [
            f"hooks.{n}" for n in ("forward_hooks", "backward_hooks", "fwd_pre_hook") if not hasattr(zero.parameter_offload, n)
        ]
    optimizer.step()
    accelerator.end_training()
    return found


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16-mixed"), (2, "fp32"), (3, "fp32")])
def test_the_names_of_zero_are_there(stage: int, precision: str, ranks: Any) -> None:
    assert ranks(1, lacking, stage, precision) == [[]]


def test_the_keys_of_zero_optimization_are_those_of_the_json() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields: Any = DeepSpeedZeroConfig.model_fields
    theirs = {field.alias or name for name, field in fields.items()}
    mics = {key for key in ZERO_KEYS if key.startswith("mics_")}  # of a class of their own; refused with a sentence
    assert set(ZERO_KEYS) - mics == theirs - mics


def test_what_no_object_tells_is_in_the_source() -> None:
    """LOCAL_RANK is read by zero.Init, and by stage 3 in a forward pass; the rest is switched from outside."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage_1_and_2, utils

    assert 'os.environ["LOCAL_RANK"]' in inspect.getsource(partition_parameters)
    assert "LOCAL_RANK" in inspect.getsource(utils)
    assert "self._offload_accumulated_param_ids" in inspect.getsource(stage_1_and_2)  # there only with offload
    assert isinstance(parameter_offload.FWD_MODULE_STACK, list)
    assert "_running_engine_step" in inspect.getsource(deepspeed.DeepSpeedEngine)
    assert "see_memory_usage(" in inspect.getsource(bf16_optimizer)
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_what_swaps_to_a_disk_is_in_the_source() -> None:
    """Most machines have no libaio, and so no object to ask."""
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_optimizer_swapper, partitioned_param_swapper

    assert "self.unswapped_gradients = {}" in inspect.getsource(optimizer_utils.OptimizerStateSwapInfo)
    assert "self.swap_params_info = {}" in inspect.getsource(optimizer_utils.OptimizerSwapper)
    swapper = partitioned_optimizer_swapper.PartitionedOptimizerSwapper
    assert list(inspect.signature(swapper.swap_out_gradients).parameters)[1:] == KEEPS
    for name in ("swap_in", "swap_out_and_release", "remove_partition_and_release_buffers"):
        assert hasattr(partitioned_param_swapper.AsyncPartitionedParameterSwapper, name)


def test_the_schedulers_of_the_json_are_deepspeeds() -> None:
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
    from drivetrain.strategies import deepspeed_schedule

    assert sorted(deepspeed_schedule._OWN) == sorted(VALID_LR_SCHEDULES)
