"""`import drivetrain` is light, silent and says which names it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import drivetrain
import pytest

PUBLIC = [
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


PROBE = """
import json, sys
import torch
before = set(sys.modules)
happened = []
WATCHED = {"socket.connect", "socket.bind", "socket.getaddrinfo"}
WATCHED |= {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system"}
sys.addaudithook(lambda event, args: happened.append(event) if event in WATCHED else None)
import threading
threads = threading.active_count()
from drivetrain import Trainer
print(json.dumps({"new": sorted(set(sys.modules) - before), "events": happened, "threads": threading.active_count() - threads}))
"""


def python(code: str, folder: Path) -> str:
    """Run `code` in a fresh interpreter outside of the repository; return what it printed, errors included."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_public_surface_is_pinned_and_sorted() -> None:
    """A name that comes or goes is a decision: change this list, and say it in the CHANGELOG."""
    assert sorted(drivetrain.__all__) == drivetrain.__all__
    assert drivetrain.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_exists_and_says_what_it_is(name: str) -> None:
    assert getattr(drivetrain, name).__doc__
    assert name in dir(drivetrain)


def test_the_three_folders_are_attributes_without_an_import_of_their_own(tmp_path: Path) -> None:
    code = "import drivetrain; print(drivetrain.callbacks.__name__, drivetrain.strategies.__name__, drivetrain.trainer.__name__)"
    assert python(code, tmp_path) == "drivetrain.callbacks drivetrain.strategies drivetrain.trainer\n"


@pytest.mark.parametrize(("wrong", "right"), [("Acelerator", "Accelerator"), ("trainer_module", None), ("CallBack", "Callback")])
def test_an_unknown_name_gives_the_nearest(wrong: str, right: str | None) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{wrong}'") as caught:
        getattr(drivetrain, wrong)
    assert (f"Did you mean {right!r}?" in str(caught.value)) is (right is not None)


def test_an_unknown_name_fails_a_from_import_with_an_import_error() -> None:
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from drivetrain import Trayner")


@pytest.fixture(scope="module")
def cost(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `from drivetrain import Trainer` does after `import torch`, in a fresh interpreter."""
    printed = python(PROBE, tmp_path_factory.mktemp("probe"))
    assert printed.count("\n") == 1, f"importing prints:\n{printed}"
    return json.loads(printed)


def test_importing_costs_at_most_a_hundred_modules_above_torch(cost: dict[str, Any]) -> None:
    assert len(cost["new"]) <= 100, cost["new"]


@pytest.mark.parametrize(
    "heavy", ["torch._dynamo", "torch._inductor", "torch.distributed.", "tqdm", "yaml", "tyro", "numpy.", "wandb"]
)
def test_importing_leaves_what_is_heavy_to_those_who_use_it(cost: dict[str, Any], heavy: str) -> None:
    assert [name for name in cost["new"] if name == heavy or name.startswith(heavy)] == []


def test_importing_starts_nothing_and_asks_nobody(cost: dict[str, Any]) -> None:
    assert cost["events"] == []
    assert cost["threads"] == 0


def test_importing_drivetrain_alone_does_not_even_import_torch(tmp_path: Path) -> None:
    """The face is lazy: tools that only read the version pay nothing."""
    assert python("import drivetrain, sys; print('torch' in sys.modules, drivetrain.__version__)", tmp_path) == (
        f"False {drivetrain.__version__}\n"
    )


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.argv = ["drivetrain", "--help"]
from drivetrain.trainer.cli.main import main
try:
    code = main()
except SystemExit as ended:
    code = ended.code
print("torch" in sys.modules, code)
"""
    printed = python(code, tmp_path)
    assert printed.splitlines()[-1] in ("False 0", "False None")
    assert "usage" in printed.lower()
