"""Sequence parallel beside tensor parallel: who has a part of the sequence, and where it is gathered. tensor_parallel.py uses it.

    block  [split] -> norm -> gather -> columns .. rows -> reduce-scatter -> + -> norm -> ... -> [gather]
From the first block of a stack to its last, what goes from block to block is this rank's part of the sequence, a plain tensor.
Source: Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from .errors import ConfigError
from .units import repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Blocks", "Gathered", "HeldWhole", "SequenceBlocks", "blocks_of", "on_hidden"]

_HIDDEN = ("hidden_states", "x", "hidden", "input", "inputs")
"""What the argument is called that goes through a block, where it is passed by name."""


@dataclass
class Blocks:
    """The modules of a stack of blocks by what they do with the sequence; all are paths.

    Attributes:
        first, last: blocks that split and gather.
        gathered: modules inside a block whose forward gathers its input: they hold the columns.
        columns: that gather for themselves, since the block calls them.
        rows: end with a part of the sequence.
        between: run on a part of the sequence.
    """

    first: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    gathered: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)


def blocks_of(name: str, model: nn.Module, styles: Mapping[str, Any]) -> Blocks:
    """Sort the modules of the repeated blocks of `model` by what they do with the sequence.

    Raises:
        ConfigError: there are no blocks with styles, or one holds a parameter itself, which would work on a part only; experts
            and convolutions, for which a part is not enough.
    """
    found = Blocks()
    stacks: dict[str, list[str]] = {}
    for path, block in repeated_blocks(model):
        if any(p.startswith(f"{path}.") for p in styles):
            stacks.setdefault(path.rpartition(".")[0], []).append(path)
            _sort(name, path, block, styles, found)
    if not stacks:
        raise ConfigError(
            f"sequence_parallel: model {name!r} has no repeated blocks that the tensor plan cuts, between which the sequence "
            "could be cut. Put them into an nn.ModuleList, or leave sequence_parallel out."
        )
    for paths in stacks.values():
        found.first.append(paths[0])
        found.last.append(paths[-1])
    return found


def _sort(name: str, path: str, block: nn.Module, styles: Mapping[str, Any], found: Blocks) -> None:
    """Sort the modules of one block."""
    regions: list[str] = []
    for inner, _ in block.named_modules():
        full = f"{path}.{inner}" if inner else path
        style = styles.get(full)
        if isinstance(style, ParallelStyle) or style in ("heads", "sequence"):
            continue
        if isinstance(style, str) and style.startswith("rowwise"):
            found.rows.append(full)
        elif style is not None:
            region = _region(path, full, block, styles)
            if region is None:
                found.columns.append(full)
            elif region not in regions:
                regions.append(region)
    found.gathered += regions
    for inner, module in block.named_modules():
        full = f"{path}.{inner}" if inner else path
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if not own or full in styles or any(full == r or full.startswith(f"{r}.") for r in regions):
            continue
        if any(True for _ in module.children()) or not inner:
            raise ConfigError(
                f"sequence_parallel: {full} of model {name!r} holds {own[0]} itself, which would work on a part of the sequence "
                "and get a part of its gradient. Put it into a module of its own, or leave sequence_parallel out."
            )
        if stacked := [key for key in own if module.get_parameter(key).dim() > 2]:
            raise ConfigError(
                f"sequence_parallel: {full}.{stacked[0]} of model {name!r} is of experts or of a convolution, which need more "
                "than a rank's part of the sequence. Leave sequence_parallel out ('tp:2' in the place of 'tp:2+sp')."
            )
        found.between.append(full)


def _region(path: str, full: str, block: nn.Module, styles: Mapping[str, Any]) -> str | None:
    """The outermost module below the block that holds `full` and has a forward: it is called with what is to be gathered."""
    parts = full[len(path) + 1 :].split(".")
    module = block
    for depth, part in enumerate(parts[:-1]):
        module = module.get_submodule(part)
        if type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            return ".".join([path, *parts[: depth + 1]])
    return None


class HeldWhole(ParallelStyle):
    """Parameters whole on each rank, as DTensors, so that their gradients are summed; input and output are this rank's part."""

    def __init__(self, part: Shard) -> None:
        super().__init__()
        self.part = part

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for key, parameter in module.named_parameters(recurse=False):
            whole = DTensor.from_local(parameter.detach(), device_mesh, [Replicate()], run_check=False)
            module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))

        def enter(module: nn.Module, args: Any) -> Any:
            first, *rest = args
            return (first if isinstance(first, DTensor) else _piece(first, device_mesh, self.part), *rest)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            return output.to_local() if isinstance(output, DTensor) else output

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class Gathered(ParallelStyle):
    """A module that is given this rank's part of the sequence and works on all of it: the input is gathered once, a DTensor."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            def gather(part: Tensor) -> Tensor:
                return _piece(part, device_mesh, Shard(self.dim)).redistribute(placements=[Replicate()])

            return on_hidden(module, args, kwargs, gather)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


class SequenceBlocks(ParallelStyle):
    """The first and the last of a stack of blocks: takes this rank's part of the sequence, or gathers it again."""

    def __init__(self, dim: int, *, enters: bool, leaves: bool) -> None:
        super().__init__()
        self.dim, self.enters, self.leaves = dim, enters, leaves

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        part, whole = [Shard(self.dim)], [Replicate()]

        def split(hidden: Tensor) -> Tensor:
            if hidden.shape[self.dim] % device_mesh.size():
                raise ConfigError(
                    f"sequence_parallel: a sequence of {hidden.shape[self.dim]} cannot be divided over tp={device_mesh.size()}. "
                    f"Pad it to a multiple of {device_mesh.size()}, or leave sequence_parallel out."
                )
            return DTensor.from_local(hidden, device_mesh, whole, run_check=False).redistribute(placements=part).to_local()

        def gather(hidden: Tensor) -> Tensor:
            return DTensor.from_local(hidden, device_mesh, part, run_check=False).redistribute(placements=whole).to_local()

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return on_hidden(module, args, kwargs, split)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (gather(output[0]), *output[1:])
            return gather(output)

        if self.enters:
            module.register_forward_pre_hook(enter, with_kwargs=True)
        if self.leaves:
            module.register_forward_hook(leave)
        return module


def _piece(part: Tensor, mesh: DeviceMesh, placement: Shard) -> DTensor:
    return DTensor.from_local(part, mesh, [placement], run_check=False)


def on_hidden(module: nn.Module, args: Any, kwargs: Any, change: Any) -> Any:
    """Change the argument that goes through the block: the first one, or the one of its usual name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    for key in (*_HIDDEN, *kwargs):
        if isinstance(kwargs.get(key), torch.Tensor):
            return args, {**kwargs, key: change(kwargs[key])}
    raise ConfigError(
        f"sequence_parallel: {type(module).__name__} was called without a tensor. Pass what goes through the blocks as its first "
        "argument, or leave sequence_parallel out."
    )
