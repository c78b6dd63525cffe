"""Bare weights as Hugging Face has them: safetensors files of bounded size and an index.

    model.safetensors                                       one file, or
    model-00001-of-00003.safetensors ...                    several, and
    model.safetensors.index.json                            {"metadata": {"total_size": bytes}, "weight_map": {name: file}}

Tensors that share their memory (tied weights) are written once, under their first name; `load_weights` fills the others too.
Files are written under temporary names and renamed when all are whole, the index last: a reader never meets half a file.
Behind a URL (url_weights.py) they are the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..named_state import Place, Source, whole
from .urls import UrlPath
from .writer import Deferred, TensorFile, make_folder, sync_folder, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_SHOWN = 10


def parse_size(size: int | str) -> int:
    """Return the bytes of "5GB", "200MB", "1GiB" or a number.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"max_shard_size={size!r}: expected a size such as '5GB', '200MB', '1GiB' or a number of bytes.")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Share names out to files of at most `limit` bytes, in order; a tensor above it has a file of its own."""
    shards: list[list[str]] = []
    used = limit + 1
    for name, size in sizes.items():
        if used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards or [[]]


def save_weights(
    folder: Path | UrlPath,
    sizes: Mapping[str, int],
    read: Callable[[Sequence[str]], Mapping[str, Tensor | Deferred]],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write weights to `folder`; return the files, an index last.

    Args:
        sizes: name -> bytes, in the order in which they are to be written.
        read: returns the tensors of some names: those of one file at a time. A `Deferred` is read when its bytes are written.
        metadata: for the header of each file; {"format": "pt"} stands there anyway.
    """
    shards = plan_shards(sizes, parse_size(max_shard_size))
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    if isinstance(folder, UrlPath):
        from .url_weights import write_weights

        files = dict(zip(names, shards, strict=True))
        paths: Any = write_weights(folder, files, (INDEX, content), read, metadata, _is_weights)
        return paths
    make_folder(folder)
    partial = [folder / f".{name}.partial" for name in names]
    index = folder / INDEX
    try:
        for path, shard in zip(partial, shards, strict=True):
            path.unlink(missing_ok=True)
            TensorFile(read(shard), metadata).write(path)
        index_partial = folder / f".{INDEX}.partial"
        index_partial.unlink(missing_ok=True)
        partial.append(index_partial)
        write_json(index_partial, content)
        index.unlink(missing_ok=True)  # an older one would name files of before
        for path, name in zip(partial, names, strict=False):
            os.replace(path, folder / name)
        for old in folder.iterdir():
            if _is_weights(old.name) and old.name not in names:
                old.unlink()
        if len(shards) > 1:
            os.replace(index_partial, index)
        sync_folder(folder)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return [folder / name for name in names] + ([index] if len(shards) > 1 else [])


def _is_weights(name: str) -> bool:
    return name == SINGLE or _SHARD.fullmatch(name) is not None


def open_weights(path: Path | UrlPath) -> Any:
    """Open a safetensors file for reading, as a context: with keys(), get_tensor(name), get_slice(name)."""
    if isinstance(path, UrlPath):
        from .url_weights import UrlTensors

        return UrlTensors(path)
    from safetensors import safe_open

    return safe_open(path, "pt")


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors that have memory of their own, {other name: the name under which its memory is})."""
    first: dict[Any, str] = {}
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = memory_of(tensor) if tensor.numel() else name
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
        else:
            kept[name] = tensor.detach()
    return kept, tied


def memory_of(tensor: Tensor) -> Any:
    """Return what two names of one tensor have in common: its memory, or, where it has none of its own here, the object."""
    # A DTensor is known by its mesh: importing the class takes a second, which who shards nothing need not spend.
    if hasattr(tensor, "device_mesh") or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def weight_files(folder: Path) -> dict[str, Path]:
    """Return name -> file of the weights in `folder` (or of one safetensors file).

    Raises:
        CheckpointError: there are none, or the index is not well formed or names a file outside the folder.
    """
    from safetensors import SafetensorError

    index = folder / INDEX
    if folder.is_dir() and index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            wrong = next((f for f in weight_map.values() if not _FILE.fullmatch(f) or (folder / f).is_symlink()), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of weights: {type(error).__name__}: {error}.") from None
        if wrong is not None:
            raise CheckpointError(f"{index} names {wrong!r}, which is no plain file beside it: refused.")
        return {name: folder / file for name, file in weight_map.items()}
    path = folder / SINGLE if folder.is_dir() else folder
    if not path.is_file() or path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is no safetensors file, and there is no {INDEX}. Give the folder that save_model wrote; "
            "pickled weights (pytorch_model.bin) are not read."
        )
    try:
        with open_weights(path) as file:
            return dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def load_weights(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    strict: bool = True,
    fill: Callable[[str, Tensor], None] | None = None,
    place: Place = whole,
) -> list[str]:
    """Copy the weights in `folder` into `tensors` (a module's state dict), one at a time; return the names that were skipped.

    Args:
        fill: takes (name, the whole tensor that was read), where `tensors` are stand-ins of the right shapes for what is filled.
        place: reads what one of `tensors` is filled with (named_state.py): of a tensor that ranks hold in pieces, its own piece.
    Raises:
        CheckpointError: names missing or in excess, other shapes; nothing was loaded then. With `strict=False` those are skipped.
            Or a file is damaged: what was read before it is loaded.
    """
    from safetensors import SafetensorError

    files = weight_files(folder)
    tied = untied(tensors)[1]
    missing = [n for n in tensors if n not in files and not (n in tied and tied[n] in files)]
    # What is tied here may have been saved under another of its names.
    groups: dict[str, list[str]] = {}
    for other, first in tied.items():
        groups.setdefault(first, [first]).append(other)
    for names in groups.values():
        if any(n in files for n in names):
            missing = [n for n in missing if n not in names]
    excess = sorted(files.keys() - tensors.keys())
    shapes: list[str] = []
    wanted: dict[Path, list[str]] = {}
    for name in tensors:
        if name in files:
            wanted.setdefault(files[name], []).append(name)
    try:
        for path, names in wanted.items():
            with open_weights(path) as file:
                for name in names:
                    if tuple(file.get_slice(name).get_shape()) != tuple(tensors[name].shape):
                        shapes.append(f"{name} {file.get_slice(name).get_shape()} for {list(tensors[name].shape)}")
        if strict and (missing or excess or shapes):
            parts = [("missing", missing), ("not in the model", excess), ("of another shape", shapes)]
            told = "; ".join(f"{len(n)} {what} ({', '.join(n[:_SHOWN])}{' ...' if n[_SHOWN:] else ''})" for what, n in parts if n)
            raise CheckpointError(
                f"{folder} holds the weights of another model: {told}. Nothing was loaded; strict=False takes what fits."
            )
        wrong = {text.split(" ", 1)[0] for text in shapes}
        with torch.no_grad():
            for path, names in wanted.items():
                with open_weights(path) as file:
                    source = _source(file)
                    for name in names:
                        if name in wrong:
                            continue
                        if fill is None:
                            tensors[name].detach().copy_(place(tensors[name], name, source))
                        else:
                            fill(name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The weights in {folder} cannot be read: {error}.") from None
    return [*missing, *excess, *sorted(wrong)]


def _source(file: Any) -> Source:
    """Read the tensors of an open safetensors file. The file is mapped: of a piece, only its own bytes are read."""

    def read(name: str, *, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        if not offset or not shape:
            return file.get_tensor(name)
        return file.get_slice(name)[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

    return Source(read, shape=lambda name: file.get_slice(name).get_shape(), sliced=True)
