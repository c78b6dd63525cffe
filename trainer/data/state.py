"""The position of a loader as JSON, and the state of users' own loaders and data sets as JSON.

A loader with indices needs five numbers: {"version", "kind": "indexed", "epoch", "position", "seed", "samples"}. Its permutation
is a function of seed and epoch, so a resume computes it again and reads nothing. An iterable adds the batches that were
handed out and, if it has one, its own state: that is the only thing here that may be large, or differ between ranks.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...strategies.checkpoint.state import join, split
from ...strategies.errors import CheckpointError

__all__ = ["VERSION", "check", "from_json", "to_json"]

VERSION = 1
_KINDS = ("indexed", "stream")


def to_json(value: Any, key: str) -> Any:
    """Turn a tree of tensors and plain values into strict JSON; tensors become base64 text.

    Raises:
        ConfigError: something else is in it, such as a function; the message has its place.
    """
    tensors, values = split(value, key)
    return {"values": values, "tensors": {name: _encode(tensor) for name, tensor in tensors.items()}}


def from_json(value: Any) -> Any:
    """Return what was given to `to_json`.

    Raises:
        CheckpointError: not something that `to_json` makes.
    """
    try:
        tensors = {name: _decode(entry) for name, entry in value["tensors"].items()}
        return join(value["values"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"The saved state of a loader is not well formed: {type(error).__name__}: {error}.") from error


def _encode(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = base64.b64encode(bytes(flat.tolist())).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": data}


def _decode(entry: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{entry['dtype']!r} is no dtype")
    data = bytearray(base64.b64decode(entry["data"], validate=True))
    if not data:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(entry["shape"])


def check(state: Any, kind: str) -> dict[str, Any]:
    """Return `state` if a loader of this `kind` can take it.

    Raises:
        CheckpointError: not a loader's state, of another version, or of a loader of the other kind.
    """
    fine = (
        isinstance(state, Mapping)
        and state.get("kind") in _KINDS
        and all(_natural(state.get(n)) for n in ("version", "epoch", "position"))
    )
    if not fine or not isinstance(state.get("seed"), int) or not _fits(state):
        raise CheckpointError(
            f"This is not the state of a prepared loader: {state!r:.200}. Expected what its state_dict() returned."
        )
    if state["version"] > VERSION:
        raise CheckpointError(
            f"The loader's state has version {state['version']}; this drivetrain reads up to {VERSION}. Install a newer one."
        )
    if state["kind"] != kind:
        was, now = ("indices", "an iterable") if kind == "stream" else ("an iterable", "indices")
        raise CheckpointError(
            f"The checkpoint's loader read {was}, this one reads {now}. Expected the same data. Give the loader of the saved run."
        )
    return dict(state)


def _fits(state: Mapping[str, Any]) -> bool:
    """Whether what a stream's state has beside its position is of the kinds that its state_dict gives."""
    parts = state.get("parts", [])
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and {"batches", "samples"} <= set(part) for part in parts
    ):
        return False
    owns = [part["own"] for part in (state, *parts) if "own" in part]
    counts = ("ranks", "shard", "shards", "workers", "batches", "samples", "micro_batches")
    return (
        all(_natural(part[name]) for part in (state, *parts) for name in counts if part.get(name) is not None)
        and state.get("ranks") != 0
        and all(isinstance(own, Mapping) and {"batches", "samples", "state"} <= set(own) for own in owns)
        and all(_natural(own[name]) for own in owns for name in ("batches", "samples"))
    )


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
