"""DeepSpeed's own checkpoints: its native one, and the universal one that any stage and number of processes reads.

    save_native, load_native          engine.save_checkpoint's files: for the stage and number of processes that wrote them
    save_universal, load_universal    zero/<parameter>/fp32.pt, exp_avg.pt, ...: deepspeed.checkpoint.ds_to_universal writes them
    fp32_weights                      the fp32 weights of a native one (zero_to_fp32)
These are pickles. DeepSpeed unpickles its native ones freely, so read only those that you trust. `load_universal` is a reader of
our own: it takes tensors and plain values only, and goes from any stage to any other, which DeepSpeed's does not. Our checkpoints
(save_state, the Trainer's) hold all of it without pickle; these two are for meeting other programs.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import deepspeed_engine, named_state
from .deepspeed_held import Held, trained
from .deepspeed_state import full_shape
from .errors import CheckpointError

if TYPE_CHECKING:
    from .world import World

__all__ = ["fp32_weights", "load_native", "read_universal", "save_native", "save_universal"]


def save_native(held: Held, folder: str | Path, tag: str) -> None:
    with deepspeed_engine.explained("Saving DeepSpeed's own checkpoint"):
        held.engine.save_checkpoint(str(folder), tag=tag)


def load_native(held: Held, folder: str | Path, tag: str | None, world: World) -> None:
    folder = Path(folder)
    tag = _tag(folder, tag, "latest")
    files = sorted((folder / tag).glob("*zero_pp_rank_*_optim_states.pt"))
    if files and len(files) != world.size:
        raise CheckpointError(
            f"{folder / tag} was written by {len(files)} processes, and this run has {world.size}: DeepSpeed's own format cannot "
            "be read with another number. Save in the universal format (strategy.save_universal, or python -m "
            "deepspeed.checkpoint.ds_to_universal), or with our own checkpoints, which any number reads."
        )
    held.reads_native = True
    try:
        path, _ = held.engine.load_checkpoint(str(folder), tag=tag)
    except (AssertionError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        said = str(error).strip() or f"{type(error).__name__} without a word"
        raise CheckpointError(
            f"DeepSpeed cannot read {folder / tag} into ZeRO stage {held.stage} on {world.size} process(es): {said}. It reads "
            "its own format only into the stage and number of processes that wrote it; the universal one goes into any."
        ) from error
    finally:
        held.reads_native = False
    if path is None:
        raise CheckpointError(f"DeepSpeed found no checkpoint in {folder / tag}. Name its tag, or another folder.")
    held.take_options()


def _tag(folder: Path, tag: str | None, latest: str) -> str:
    if tag is None:
        if not (folder / latest).is_file():
            raise CheckpointError(
                f"{folder} is no checkpoint of DeepSpeed: it has no file {latest!r}. Name its tag, or another folder."
            )
        tag = (folder / latest).read_text().strip()
    if not (folder / tag).is_dir():
        held = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise CheckpointError(
            f"There is no checkpoint {folder / tag}; {folder} holds {', '.join(held) or 'none'}. Name another tag."
        )
    return tag


def save_universal(held: Held, folder: str | Path, tag: str, world: World) -> None:
    """Write the native form beside it, let DeepSpeed convert it on rank 0, and remove it. Collective."""
    folder = Path(folder)
    inner = held.zero.optimizer if held.zero is not None else None
    if inner is None or not any("exp_avg_sq" in state for state in inner.state.values()):
        raise CheckpointError(
            "DeepSpeed's universal format holds Adam's state (exp_avg, exp_avg_sq) of ZeRO stages 1 to 3, and "
            f"{type(inner or held.front).__name__} of stage {held.stage} has none of it (yet). Take save_state, which holds any "
            "optimizer's, or save after the first step."
        )
    between = folder / f".{tag}.native"
    save_native(held, between, "native")
    world.barrier()
    said = None
    if world.is_main:
        said = _convert(between / "native", folder / tag)
        shutil.rmtree(between, ignore_errors=True)
    if said := world.broadcast_json(said):
        raise CheckpointError(f"DeepSpeed could not convert its checkpoint to the universal format {folder / tag}: {said}")


def _convert(source: Path, target: Path) -> str | None:
    """Run ds_to_universal; return what went wrong."""
    from deepspeed.checkpoint import ds_to_universal

    options = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    heard = io.StringIO()
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            ds_to_universal.main(options)
    except Exception as error:
        return f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__}, without a word"
    return None


def fp32_weights(folder: str | Path, tag: str | None) -> dict[str, Tensor]:
    """Return the whole fp32 weights of a native checkpoint of stages 1 to 3 (DeepSpeed's zero_to_fp32), in host memory."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = Path(folder)
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), deepspeed_engine.explained("zero_to_fp32"):
        found: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_tag(folder, tag, "latest"))
    return {name: tensor.detach() for name, tensor in found.items()}


class Universal:
    """A universal checkpoint, read one tensor at a time and without running what a pickle says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "zero" / "optimizer_state.pt").is_file():
            raise CheckpointError(
                f"{folder} is no universal checkpoint of DeepSpeed: it has no zero/optimizer_state.pt. Convert a native one: "
                "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder ... --output_folder ..."
            )
        state = self._load(folder / "zero" / "optimizer_state.pt")
        flat = state.get("optimizer_state_dict") or {}  # stage 3 keeps all of rank 0's state here
        self.groups: list[dict[str, Any]] = state.get("param_groups") or flat.get("param_groups") or []
        self.step = next((s["step"] for s in flat.get("state", {}).values() if "step" in s), None)
        files = sorted(folder.glob("*mp_rank_*_model_states.pt"))
        self.models = [self._load(path) for path in files]

    def _load(self, path: Path) -> Any:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        try:
            with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} holds more than tensors and plain values, and is not read: {error}") from None
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from None

    def keys(self, parameter: str) -> list[str]:
        """What there is of a trained parameter: "fp32", "exp_avg", ..., "step"."""
        return sorted(path.stem for path in (self.folder / "zero" / parameter).glob("*.pt"))

    def tensor(self, parameter: str, key: str, shape: tuple[int, ...]) -> Tensor:
        if not key:  # stage 3 says once how many steps there were
            return torch.as_tensor(self.step, dtype=torch.float32).clone()
        found = self._load(self.folder / "zero" / parameter / f"{key}.pt")
        found = found["param"] if isinstance(found, dict) else found
        if key == "step":
            return torch.as_tensor(found, dtype=torch.float32)
        if found.numel() != _numel(shape):
            raise CheckpointError(f"{self.folder} holds {tuple(found.shape)} for {parameter}, which is {shape} now.")
        return found.view(shape)

    def beside(self, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """A buffer or a parameter that nobody trained, from the model's own files; of stage 3 in one piece for each process."""
        pieces = [m["frozen_param_fragments"][key] for m in self.models if key in (m.get("frozen_param_fragments") or {})]
        if pieces and sum(p.numel() for p in pieces) >= _numel(shape):
            return torch.cat([p.reshape(-1) for p in pieces])[: _numel(shape)].view(shape)
        found = self.models[0]["module"].get(key) if self.models else None
        return found if isinstance(found, Tensor) and tuple(found.shape) == shape else None


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def read_universal(
    folder: str | Path, tag: str | None, name: str, model: nn.Module, optimizer: Optimizer
) -> tuple[list[str], named_state.Source, dict[str, Any]]:
    """Return (names, source, values) of a universal checkpoint, as `Strategy.load_state_tensors` of any strategy takes them.

    Args:
        name: of the user's `model` in these names; its `optimizer` is called "optimizer".
    Raises:
        CheckpointError: no such checkpoint, other shapes, other parameter groups, or more than tensors in a file.
    """
    folder = Path(folder)
    read = Universal(folder / _tag(folder, tag, "latest_universal"))
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    first: dict[int, str] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), key)
    sources: dict[str, Any] = {}
    for key, value in own.items():
        shape = full_shape(value)
        saved = first.get(id(value), key)  # a tied parameter is there under one of its names
        saved = next((k for k, v in own.items() if v is value and read.keys(k)), saved)
        if "fp32" in read.keys(saved):
            sources[f"model/{name}/{key}"] = (saved, "fp32", shape)
        elif (found := read.beside(key, shape)) is not None:
            sources[f"model/{name}/{key}"] = found
        if first.get(id(value)) != key:
            continue
        for state in read.keys(saved):
            if state != "fp32":
                sources[f"optimizer/optimizer/{name}/{key}/{state}"] = (saved, state, shape)
        if read.step is not None and "exp_avg" in read.keys(saved):
            sources[f"optimizer/optimizer/{name}/{key}/step"] = (saved, "", ())

    def tensor(full: str) -> Tensor:
        found = sources[full]
        return found if isinstance(found, Tensor) else read.tensor(*found)

    values = {"optimizer/optimizer": _described(read, name, first, optimizer)}
    return list(sources), named_state.Source(tensor), values


def _described(read: Universal, name: str, names: Mapping[int, str], optimizer: Optimizer) -> dict[str, Any]:
    mine = [g for g in optimizer.param_groups if trained(g)]
    if len(mine) != len(read.groups):
        raise CheckpointError(
            f"{read.folder} holds {len(read.groups)} parameter group(s), and the optimizer has {len(mine)}. Build the same ones."
        )
    theirs = {id(g): {k: v for k, v in saved.items() if k != "params"} for g, saved in zip(mine, read.groups, strict=True)}
    groups = [
        {k: v for k, v in g.items() if k != "params"}
        | theirs.get(id(g), {})
        | {"params": [f"{name}/{names[id(p)]}" for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "param_groups": groups, "scalars": {}}
