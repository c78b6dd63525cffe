"""DeepSpeed itself: the only file that imports it. One engine for each model, and what has to be kept from reaching the user raw.

    library(device)          the package, imported quietly for the device; MissingDependency where it is not installed
    join(world)              DeepSpeed told of our process group, so that it looks for no launcher, no MPI and no compiler
    build(world, ...)        deepspeed.initialize with its variables set for as long as it runs; its bare assertions explained
Traps of 0.19 that end here: without torchrun's variables it asks mpi4py for the ranks, and then asserts LOCAL_RANK; it compiles a
shared-memory extension at the first use on a CPU; a build that was killed leaves a lock for which every later one waits forever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from .deepspeed_transformers import told
from .errors import ConfigError, MissingDependency
from .world import listening_on_loopback

if TYPE_CHECKING:
    from .world import World

__all__ = ["build", "check_locks", "explained", "join", "library", "release", "zero_init"]

_LOCK_AGE_S = 600.0
"""A build takes minutes. A lock that is older belongs to one that was killed."""
_joined: list[Any] = []
"""A weak reference to the process group that DeepSpeed's own globals were made for."""


def library(device: torch.device) -> Any:
    """Return the deepspeed package, imported for `device`.

    Raises:
        MissingDependency: it is not installed, or cannot be imported.
    """
    # DeepSpeed would look for accelerators by itself, and may find one that the run does not use.
    if device.type in ("cpu", "cuda", "xpu", "npu", "hpu", "mps", "mlu"):
        os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        if "deepspeed" not in sys.modules:
            with _hushed():
                import deepspeed

                # What its first engine imports, with a warning of torch's own about torch's own.
                import deepspeed.runtime.bf16_optimizer
                import deepspeed.runtime.zero.muon.muon_optimizer
                from deepspeed.utils import logger

                # Stage 1 in bf16 prints its memory four times an engine, whatever was asked for, and collects all garbage for it.
                deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
                # Found by trying a compiler, which says on the screen what it misses. Once, before any process is forked.
                _ = deepspeed.ops.__compatible_ops__
            # Its warnings are about what this strategy decides, and does on purpose.
            logger.setLevel(logging.ERROR)
        import deepspeed
    except ImportError as error:
        raise MissingDependency(
            f"strategy='deepspeed' needs the package deepspeed ({error}). "
            "Install it: DS_BUILD_OPS=0 pip install 'drivetrain[deepspeed]'."
        ) from error
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    found = accelerator.device_name()
    if found != device.type:
        raise ConfigError(
            f"The run is on {device.type} and DeepSpeed was imported for {found} (DS_ACCELERATOR="
            f"{os.environ.get('DS_ACCELERATOR')!r}). Set DS_ACCELERATOR={device.type} before the process starts, or unset it."
        )
    return deepspeed


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep the warnings of an import, and what the linker says that DeepSpeed asks about libaio, off the screen."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def join(world: World, *, shared_memory: bool) -> None:
    """Let DeepSpeed use our process group. Collective the first time.

    Args:
        shared_memory: let it compile and use its own shared-memory collectives on CPU.
    """
    deepspeed = library(world.device)
    import deepspeed.comm as ds_comm
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.utils import groups

    group = dist.group.WORLD
    if not _joined or _joined[0]() is not group:
        _joined[:] = [weakref.ref(group)]
        # What was made for a process group that is gone: DeepSpeed keeps it in module globals for good.
        ds_comm.comm.cdb = None
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        groups._ALL_TO_ALL_GROUP = {}
    # DeepSpeed builds this extension wherever it could be built; our gloo works without it.
    table = deepspeed.ops.__compatible_ops__
    if shared_memory:
        if not table.get("deepspeed_shm_comm", False):
            raise ConfigError("shared_memory=True: DeepSpeed's shared-memory collectives cannot be built here. Leave it out.")
        check_locks()
    elif "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False
    if ds_comm.comm.cdb is None:
        with _told(world), listening_on_loopback(world.one_node):
            ds_comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        # This module reads LOCAL_RANK, and nothing else of the environment, in the middle of a forward pass of stage 3. Left set,
        # the variable would make every later World of this process look for a launcher.
        zero_utils.os = SimpleNamespace(environ={"LOCAL_RANK": str(world.local_rank)})  # pyright: ignore[reportAttributeAccessIssue]
        # DeepSpeed 0.19 calls both by names that torch 2.13 has deprecated, with a warning each time.
        for ours, theirs in (("all_gather_function", "all_gather_single"), ("reduce_scatter_function", "reduce_scatter_single")):
            if hasattr(dist, theirs):
                setattr(ds_comm.comm.cdb, ours, getattr(dist, theirs))


@contextlib.contextmanager
def _told(world: World) -> Iterator[None]:
    """Set the variables that DeepSpeed insists on for as long as it reads them."""
    # A process group is there already: the address is asserted, and never used.
    wanted = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size}
    wanted |= {"LOCAL_SIZE": world.local_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({n: str(v) for n, v in wanted.items() if n not in ("MASTER_ADDR", "MASTER_PORT") or before[n] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def build(world: World, model: nn.Module, config: Mapping[str, Any], **options: Any) -> Any:
    """Return the engine of `model`. Collective."""
    deepspeed = library(world.device)
    with _told(world), listening_on_loopback(world.one_node), explained("deepspeed.initialize"):
        offloads = config["zero_optimization"].get("offload_param") or {}
        if offloads.get("device") == "nvme" and not any(hasattr(p, "ds_id") for p in model.parameters()):
            # Here, without dtype=. The engine says one, which 0.19 reads as bfloat16 whatever it is where there is no fp16: fp32
            # weights would be rounded on their way to the disk.
            deepspeed.zero.Init(module=model, config_dict_or_path=dict(config))
        return deepspeed.initialize(model=model, config=dict(config), dist_init_required=False, **options)[0]


def has_fp16(device: torch.device) -> bool:
    """Whether DeepSpeed has fp16 on this device; it has none on a CPU."""
    library(device)
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return bool(accelerator.is_fp16_supported())


@contextlib.contextmanager
def zero_init(world: World, config: Mapping[str, Any]) -> Iterator[None]:
    """The context in which parameters are cut up as soon as their module is made; transformers knows of it. Collective."""
    deepspeed = library(world.device)
    # Told all the while: from_pretrained makes a context of its own inside. Without dtype=, which 0.19 reads as bfloat16 whatever
    # it is, where there is no fp16: the configuration says it right.
    with _told(world), told(config), deepspeed.zero.Init(config_dict_or_path=dict(config)):
        yield


def release(engine: Any, model: nn.Module) -> None:
    """Take an engine's hooks off its model. The parameters stay as they lie."""
    from deepspeed.runtime.zero import parameter_offload

    with contextlib.suppress(Exception):
        engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not model]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn DeepSpeed's assertions, many of them without a word, into sentences.

    Raises:
        ConfigError: in their place; with the line that failed where the assertion said nothing.
    """
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except AssertionError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if "deepspeed" not in frame.filename:
            raise
        text = str(error).strip() or f"it asserts {(frame.line or '').removeprefix('assert ')!r}, without a word"
        raise ConfigError(
            f"{what} failed: {text} ({Path(frame.filename).name}:{frame.lineno} of DeepSpeed). Change the option that it names; "
            "the options are those of DeepSpeedStrategy(...), its zero_optimization keys and its config."
        ) from error


def check_locks() -> None:
    """Refuse to wait for a build that was killed: its lock stays, and every later build waits for it forever.

    Raises:
        ConfigError: a lock that is older than any build.
    """
    for lock in _locks():
        age_s = time.time() - lock.stat().st_mtime
        if age_s > _LOCK_AGE_S:
            raise ConfigError(
                f"{lock} is {age_s / 60:.0f} minutes old: a build of one of DeepSpeed's extensions was killed there, and "
                "every later "
                f"one would wait for it forever. Remove it: rm {lock}"
            )


def _locks() -> list[Path]:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    return sorted(p for pattern in ("*/lock", "*/*/lock") for p in Path(root).glob(pattern))


def load_async_io(world: World) -> None:
    """Load DeepSpeed's async_io, by which it writes to a disk; it is built at the first use, which takes minutes.

    Raises:
        ConfigError: what is missing, in a sentence, instead of a compiler's output.
    """
    deepspeed = library(world.device)
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    cpu = " Or offload to the CPU: offload_optimizer='cpu'."
    if getattr(deepspeed.ops, "__installed_ops__", {}).get("async_io", False):  # built when DeepSpeed was installed
        AsyncIOBuilder().load(verbose=False)
        return
    if not deepspeed.ops.__compatible_ops__.get("async_io", False):
        raise ConfigError(
            "Offload to 'nvme' needs DeepSpeed's async_io extension, which cannot be built here: libaio's headers (apt install "
            f"libaio-dev) or a C++ compiler are missing. Install them.{cpu}"
        )
    check_locks()
    from torch.utils.cpp_extension import _get_build_directory, is_ninja_available

    if not is_ninja_available():
        raise ConfigError(
            f"Offload to 'nvme' builds DeepSpeed's async_io extension by ninja, which is not on the PATH: pip install ninja.{cpu}"
        )
    folder = Path(_get_build_directory("async_io", verbose=False))
    if world.is_main and not (folder / "async_io.so").is_file():
        print(f"deepspeed: builds its extension async_io in {folder}: minutes, once", flush=True)
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        raise ConfigError(f"DeepSpeed's async_io extension could not be built in {folder}: {error}.{cpu}") from error


def gathered(device: torch.device) -> Callable[..., Any]:
    """Return deepspeed.zero.GatheredParameters."""
    return library(device).zero.GatheredParameters


def set_leaf_modules(model: nn.Module, kinds: list[Any]) -> None:
    """Let stage 3 gather each module of these classes (or class names) as a whole: experts that not every rank uses.

    Raises:
        ConfigError: a name that no module of the model has.
    """
    from deepspeed.utils import set_z3_leaf_modules

    names = {type(m).__name__ for m in model.modules()}
    for kind in kinds:
        if isinstance(kind, str) and kind.rpartition(".")[2] not in names:
            raise ConfigError(f"moe_leaf_modules: the model has no {kind!r}. It has: {', '.join(sorted(names))}.")
    set_z3_leaf_modules(model, kinds)


def configure_activation_checkpointing(device: torch.device, config: Mapping[str, Any]) -> None:
    """Hand the section "activation_checkpointing" to DeepSpeed's own checkpoint function."""
    deepspeed = library(device)
    with explained("activation checkpointing"):
        deepspeed.checkpointing.configure(None, deepspeed_config=dict(config))
