"""`drivetrain env`: versions, devices and variables, for bug reports. Shows no variable that could hold a secret."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from ...strategies.environment import VARIABLES, read_environment
from ...strategies.errors import DrivetrainError
from .parser import Parser

_CORE = ("torch", "lightning-utilities", "safetensors", "tqdm", "packaging", "pyyaml", "tyro", "numpy")
_OPTIONAL = (
    *("deepspeed", "transformer-engine", "torchao", "wandb", "tensorboard", "mlflow", "torchdata", "torchmetrics", "rich"),
    *("matplotlib", "pytorch-lightning", "accelerate", "transformers"),
)
# Shown when set. A list, not a pattern: what is not here may be a password.
_SHOWN = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *(
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_NTASKS",
    ),
    *(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_RANK",
        "PMI_SIZE",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "NCCL_DEBUG",
        "TORCH_LOGS",
    ),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "WANDB_MODE", "HF_HUB_OFFLINE", "NO_COLOR"),
)


def parser() -> Parser:
    """Return the options of `drivetrain env`."""
    result = Parser("env", "Show versions, devices and variables, for bug reports.")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    return result


def main(argv: list[str]) -> int:
    """Print the report."""
    chosen = parser().parse_args(argv)
    found = report()
    if chosen.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, rows in found.items():
        print(f"{title}:")
        width = max((len(name) for name in rows), default=0)
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}".rstrip())
    return 0


def report() -> dict[str, dict[str, Any]]:
    """Collect everything: section -> name -> value."""
    return {
        "versions": {"drivetrain": _version("drivetrain"), "python": platform.python_version(), **_versions(_CORE)},
        "optional": {name: version for name, version in _versions(_OPTIONAL).items() if version != "not installed"},
        "machine": {"system": platform.platform(), "python": sys.executable, "cpus": _cpus(), "memory_gib": _memory_gib()},
        "devices": _devices(),
        "ranks": _ranks(),
        "variables": {name: os.environ[name] for name in _SHOWN if name in os.environ},
        "drivetrain variables": {name: f"{os.environ.get(name, '(not set)')}  {what}" for name, what in VARIABLES.items()},
    }


def _devices() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation is just what a bug report is about
        return {"torch": f"cannot be imported: {type(error).__name__}: {error}"}
    found: dict[str, Any] = {
        "cuda build": torch.version.cuda or "none",
        "threads": torch.get_num_threads(),
        "backends": ", ".join(
            name for name in ("gloo", "nccl", "mpi", "ucc", "xccl") if torch.distributed.is_backend_available(name)
        ),
    }
    if not torch.accelerator.is_available():
        return {**found, "accelerator": "none"}
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    found["accelerator"] = str(kind)
    for index in range(torch.accelerator.device_count()):
        found[f"{kind}:{index}"] = module.get_device_name(index) if hasattr(module, "get_device_name") else "?"
    return found


def _ranks() -> dict[str, Any]:
    try:
        env = read_environment()
    except DrivetrainError as error:
        return {"problem": str(error)}
    return {
        "launcher": env.launcher,
        "rank": env.rank,
        "size": env.size,
        "local_rank": env.local_rank,
        "node_rank": env.node_rank,
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
