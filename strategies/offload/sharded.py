"""Weights to safetensors shards with an index, at most one shard in memory: also of a model whose weights are offloaded.

split = split_torch_state_dict_into_shards(model.state_dict(), max_shard_size="1GB")
split.filename_to_tensors, split.is_sharded                        huggingface_hub's words
save_torch_model(model, "folder", max_shard_size="1GB")            read, written and forgotten file by file
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint.weights import parse_size, plan_shards, save_weights
from ..composite import num_bytes, parts_of, parts_of_all
from .away import is_away
from .handle import weights_of

__all__ = ["StateDictSplit", "save_torch_model", "split_torch_state_dict_into_shards"]

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class StateDictSplit:
    """Which tensor goes into which file."""

    is_sharded: bool
    metadata: Mapping[str, Any]
    filename_to_tensors: Mapping[str, Sequence[str]]
    tensor_to_filename: Mapping[str, str]


def _once(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return name -> bytes; of names for one tensor the first. Values are not looked at: they may be elsewhere."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: num_bytes(tensors[name]) for name in first.values()}


def split_torch_state_dict_into_shards(
    state_dict: Mapping[str, Tensor],
    *,
    filename_pattern: str = "model{suffix}.safetensors",
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> StateDictSplit:
    """Share the tensors out to files of at most `max_shard_size`, in their order; one that is larger has a file of its own.

    Source: huggingface_hub.split_torch_state_dict_into_shards, which returns the same fields.
    """
    from ..checkpoint.weights import untied

    try:
        kept = untied(state_dict)[0]
    except RuntimeError:  # stand-ins have no memory to compare
        kept = state_dict
    sizes = _once(kept)
    shards = plan_shards(sizes, parse_size(max_shard_size))
    count = len(shards)
    names = [filename_pattern.format(suffix="" if count == 1 else f"-{i + 1:05d}-of-{count:05d}") for i in range(count)]
    by_file = dict(zip(names, shards, strict=True))
    total = {"total_size": sum(sizes.values())}
    return StateDictSplit(count > 1, total, by_file, {n: file for file, some in by_file.items() for n in some})


def save_torch_model(
    model: nn.Module, save_directory: str | os.PathLike[str], *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> list[Path]:
    """Write the weights of `model` to a folder as Hugging Face has them; return the files. Tied weights once.

    A quantised weight is written as its parts, `<name>.qdata`, `<name>.scale`, ...: for a model that was quantised alike.
    What is offloaded is read for the file that it goes to: never more than one file's tensors are in memory for it.
    """
    offloaded = weights_of(model, None)
    wholes: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    owners = {n: n for n in wholes}
    tensors = dict(wholes)
    for name, whole in wholes.items():
        made_of = offloaded.shapes(name) if offloaded is not None and is_away(whole) else parts_of(name, whole)
        if list(made_of) != [name]:
            del tensors[name]
            tensors |= made_of
            owners |= dict.fromkeys(made_of, name)
    sizes = _once(tensors)

    def read(names: Sequence[str]) -> Mapping[str, Tensor]:
        if offloaded is None:
            return {n: tensors[n].detach().cpu().contiguous() for n in names}
        held = parts_of_all({o: offloaded.tensor(o) for o in dict.fromkeys(owners[n] for n in names)})
        return {n: held[n].cpu().contiguous() for n in names}

    return save_weights(Path(save_directory), sizes, read, max_shard_size=max_shard_size)
