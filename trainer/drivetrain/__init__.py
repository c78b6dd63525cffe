"""What `import drivetrain` gives: the names that a training script needs, each imported when it is first used (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.callbacks.base import Callback
    from drivetrain.callbacks.checkpoint import Checkpoint
    from drivetrain.callbacks.early_stopping import EarlyStopping
    from drivetrain.callbacks.health import Health
    from drivetrain.callbacks.learning_rate import LearningRateMonitor
    from drivetrain.callbacks.loggers.base import Logger
    from drivetrain.callbacks.preemption import Preemption
    from drivetrain.callbacks.watchdog import Watchdog
    from drivetrain.strategies.activation import ActivationCheckpointing
    from drivetrain.strategies.base import Strategy
    from drivetrain.strategies.compile import Compile
    from drivetrain.strategies.context_parallel import ContextParallel
    from drivetrain.strategies.ddp import DDPStrategy
    from drivetrain.strategies.deepspeed import DeepSpeedStrategy, DummyOptim, DummyScheduler
    from drivetrain.strategies.expert_parallel import ExpertParallel
    from drivetrain.strategies.experts import Experts, MoE, balance_loss
    from drivetrain.strategies.fsdp import FSDPStrategy, HSDPStrategy
    from drivetrain.strategies.mesh import ParallelPlan
    from drivetrain.strategies.muon import MuonAdamW, muon_groups
    from drivetrain.strategies.offload.casting import attach_layerwise_casting_hooks
    from drivetrain.strategies.offload.dispatch import dispatch_model, load_checkpoint_and_dispatch, load_checkpoint_in_model
    from drivetrain.strategies.offload.empty import init_empty_weights, init_on_device
    from drivetrain.strategies.offload.handle import remove_hook_from_submodules, weights_of
    from drivetrain.strategies.offload.sharded import save_torch_model, split_torch_state_dict_into_shards
    from drivetrain.strategies.offload.strategy import OffloadStrategy
    from drivetrain.strategies.offload.tiers import cpu_offload, cpu_offload_with_hook, disk_offload
    from drivetrain.strategies.parallel import ParallelStrategy
    from drivetrain.strategies.pipeline_options import Pipeline
    from drivetrain.strategies.placement import get_balanced_memory, infer_auto_device_map, infer_device_map
    from drivetrain.strategies.precision.base import Precision
    from drivetrain.strategies.shared_sequence import context_parallel_attention, sequence_positions
    from drivetrain.trainer.accelerator import Accelerator
    from drivetrain.trainer.data.config import DataLoaderConfiguration
    from drivetrain.trainer.deepspeed_plugins import DeepSpeedPlugin, get_active_deepspeed_plugin
    from drivetrain.trainer.kwargs_handlers import (
        AORecipeKwargs,
        AutocastKwargs,
        DistributedDataParallelKwargs,
        FP8RecipeKwargs,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        MSAMPRecipeKwargs,
        ProfileKwargs,
        TERecipeKwargs,
    )
    from drivetrain.trainer.launch.function import launch
    from drivetrain.trainer.module import TrainingModule
    from drivetrain.trainer.seed import seed_everything
    from drivetrain.trainer.trainer import Trainer

__version__ = "0.1.0"

# name -> the module that holds it. The layers are drivetrain.strategies < drivetrain.callbacks < drivetrain.trainer.
_HOMES = {
    "AORecipeKwargs": "drivetrain.trainer.kwargs_handlers",
    "Accelerator": "drivetrain.trainer.accelerator",
    "ActivationCheckpointing": "drivetrain.strategies.activation",
    "AutocastKwargs": "drivetrain.trainer.kwargs_handlers",
    "Callback": "drivetrain.callbacks.base",
    "Checkpoint": "drivetrain.callbacks.checkpoint",
    "Compile": "drivetrain.strategies.compile",
    "ContextParallel": "drivetrain.strategies.context_parallel",
    "DDPStrategy": "drivetrain.strategies.ddp",
    "DataLoaderConfiguration": "drivetrain.trainer.data.config",
    "DeepSpeedPlugin": "drivetrain.trainer.deepspeed_plugins",
    "DeepSpeedStrategy": "drivetrain.strategies.deepspeed",
    "DistributedDataParallelKwargs": "drivetrain.trainer.kwargs_handlers",
    "DummyOptim": "drivetrain.strategies.deepspeed",
    "DummyScheduler": "drivetrain.strategies.deepspeed",
    "EarlyStopping": "drivetrain.callbacks.early_stopping",
    "ExpertParallel": "drivetrain.strategies.expert_parallel",
    "Experts": "drivetrain.strategies.experts",
    "FP8RecipeKwargs": "drivetrain.trainer.kwargs_handlers",
    "FSDPStrategy": "drivetrain.strategies.fsdp",
    "GradScalerKwargs": "drivetrain.trainer.kwargs_handlers",
    "HSDPStrategy": "drivetrain.strategies.fsdp",
    "Health": "drivetrain.callbacks.health",
    "InitProcessGroupKwargs": "drivetrain.trainer.kwargs_handlers",
    "LearningRateMonitor": "drivetrain.callbacks.learning_rate",
    "Logger": "drivetrain.callbacks.loggers.base",
    "MSAMPRecipeKwargs": "drivetrain.trainer.kwargs_handlers",
    "MoE": "drivetrain.strategies.experts",
    "MuonAdamW": "drivetrain.strategies.muon",
    "OffloadStrategy": "drivetrain.strategies.offload.strategy",
    "ParallelPlan": "drivetrain.strategies.mesh",
    "ParallelStrategy": "drivetrain.strategies.parallel",
    "Pipeline": "drivetrain.strategies.pipeline_options",
    "Precision": "drivetrain.strategies.precision.base",
    "Preemption": "drivetrain.callbacks.preemption",
    "ProfileKwargs": "drivetrain.trainer.kwargs_handlers",
    "Strategy": "drivetrain.strategies.base",
    "TERecipeKwargs": "drivetrain.trainer.kwargs_handlers",
    "Trainer": "drivetrain.trainer.trainer",
    "TrainingModule": "drivetrain.trainer.module",
    "Watchdog": "drivetrain.callbacks.watchdog",
    "attach_layerwise_casting_hooks": "drivetrain.strategies.offload.casting",
    "balance_loss": "drivetrain.strategies.experts",
    "context_parallel_attention": "drivetrain.strategies.shared_sequence",
    "cpu_offload": "drivetrain.strategies.offload.tiers",
    "cpu_offload_with_hook": "drivetrain.strategies.offload.tiers",
    "disk_offload": "drivetrain.strategies.offload.tiers",
    "dispatch_model": "drivetrain.strategies.offload.dispatch",
    "get_active_deepspeed_plugin": "drivetrain.trainer.deepspeed_plugins",
    "get_balanced_memory": "drivetrain.strategies.placement",
    "infer_auto_device_map": "drivetrain.strategies.placement",
    "infer_device_map": "drivetrain.strategies.placement",
    "init_empty_weights": "drivetrain.strategies.offload.empty",
    "init_on_device": "drivetrain.strategies.offload.empty",
    "launch": "drivetrain.trainer.launch.function",
    "load_checkpoint_and_dispatch": "drivetrain.strategies.offload.dispatch",
    "load_checkpoint_in_model": "drivetrain.strategies.offload.dispatch",
    "muon_groups": "drivetrain.strategies.muon",
    "remove_hook_from_submodules": "drivetrain.strategies.offload.handle",
    "save_torch_model": "drivetrain.strategies.offload.sharded",
    "seed_everything": "drivetrain.trainer.seed",
    "sequence_positions": "drivetrain.strategies.shared_sequence",
    "split_torch_state_dict_into_shards": "drivetrain.strategies.offload.sharded",
    "weights_of": "drivetrain.strategies.offload.handle",
}

_FOLDERS = ("callbacks", "strategies", "trainer")

__all__ = [
    "AORecipeKwargs",
    "Accelerator",
    "ActivationCheckpointing",
    "AutocastKwargs",
    "Callback",
    "Checkpoint",
    "Compile",
    "ContextParallel",
    "DDPStrategy",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DeepSpeedStrategy",
    "DistributedDataParallelKwargs",
    "DummyOptim",
    "DummyScheduler",
    "EarlyStopping",
    "ExpertParallel",
    "Experts",
    "FP8RecipeKwargs",
    "FSDPStrategy",
    "GradScalerKwargs",
    "HSDPStrategy",
    "Health",
    "InitProcessGroupKwargs",
    "LearningRateMonitor",
    "Logger",
    "MSAMPRecipeKwargs",
    "MoE",
    "MuonAdamW",
    "OffloadStrategy",
    "ParallelPlan",
    "ParallelStrategy",
    "Pipeline",
    "Precision",
    "Preemption",
    "ProfileKwargs",
    "Strategy",
    "TERecipeKwargs",
    "Trainer",
    "TrainingModule",
    "Watchdog",
    "attach_layerwise_casting_hooks",
    "balance_loss",
    "context_parallel_attention",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "get_active_deepspeed_plugin",
    "get_balanced_memory",
    "infer_auto_device_map",
    "infer_device_map",
    "init_empty_weights",
    "init_on_device",
    "launch",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "muon_groups",
    "remove_hook_from_submodules",
    "save_torch_model",
    "seed_everything",
    "sequence_positions",
    "split_torch_state_dict_into_shards",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _FOLDERS:
        return importlib.import_module(f"drivetrain.{name}")
    import difflib

    near = difflib.get_close_matches(name, [*_HOMES, *_FOLDERS], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module 'drivetrain' has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_FOLDERS})
