"""A DeepSpeed model's state in our format, and whole; the strategy's methods of the same names call these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import named_state
from .deepspeed_held import Held
from .deepspeed_state import Receiver, Stand, Stretch, full_shape, read_stretch, receiver_of, shards, stretch_of
from .deepspeed_swap import read_piece, write_piece
from .whole_tensors import WholeTensors

if TYPE_CHECKING:
    from .world import World

__all__ = ["load_state_tensors", "state_tensors", "whole_tensors"]


def _named(model: nn.Module) -> dict[str, Any]:
    """Every parameter and persistent buffer under its names; a tied parameter under all of them."""
    return {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def state_tensors(
    held: Mapping[int, Held], models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], rank: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors: dict[str, Any] = {}
    for name, model in models.items():
        parts = held[id(model)].parts if id(model) in held else None
        for key, value in _named(model).items():
            full = f"model/{name}/{key}"
            if not isinstance(value, nn.Parameter):
                if rank == 0:
                    tensors[full] = value.detach()
            elif parts is not None and id(value) in parts.pieces:
                if found := parts.weight(value):
                    tensors[full] = found
            elif hasattr(value, "ds_tensor"):
                offset, numel = stretch_of(value)
                if found := shards(read_piece(value)[:numel], offset, full_shape(value)):
                    tensors[full] = found
            else:
                tensors[full] = value.detach()
    values: dict[str, Any] = {}
    names = named_state.parameter_names(models)
    for optimizer_name, optimizer in optimizers.items():
        owner = next((h for h in held.values() if h.front is optimizer), None)
        if owner is None or owner.parts is None:
            more, described = named_state.optimizer_state(models, {optimizer_name: optimizer})
            tensors |= more
            values |= described
            continue
        scalars: dict[str, dict[str, Any]] = {}
        groups = []
        for group in optimizer.param_groups:
            groups.append({k: v for k, v in group.items() if k != "params"} | {"params": [names[id(p)] for p in group["params"]]})
            for parameter in group["params"]:
                if id(parameter) not in owner.parts.pieces:
                    continue
                own, plain = owner.parts.state(parameter, names[id(parameter)])
                prefix = f"optimizer/{optimizer_name}/{names[id(parameter)]}"
                tensors |= {f"{prefix}/{key}": value for key, value in own.items() if not isinstance(value, tuple) or value}
                if plain:
                    scalars[names[id(parameter)]] = plain
        owner.parts.swapped.close()
        values[f"optimizer/{optimizer_name}"] = {"class": type(optimizer).__name__, "param_groups": groups, "scalars": scalars}
    return tensors, values


def load_state_tensors(
    held: Mapping[int, Held],
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    names: list[str],
    read: Callable[[str], Tensor],
    values: Mapping[str, Any],
    *,
    strict: bool,
) -> list[str]:
    """Read everything first, check it as every strategy does, and only then change the weights."""
    source = named_state.Source.of(read)
    own = {
        f"model/{name}/{key}": (held.get(id(model)), value)
        for name, model in models.items()
        for key, value in _named(model).items()
    }
    weights: dict[str, Tensor] = {}
    states: list[tuple[Held | None, Optimizer, dict[str, Any]]] = []

    def place_weight(stand: Any, name: str, source: named_state.Source) -> Tensor:
        owner, value = own[name]
        piece = owner.parts.pieces.get(id(value)) if owner is not None and owner.parts is not None else None
        if piece is not None:
            weights[name] = read_stretch(name, source, piece.offset, piece.numel, full_shape(value))
        elif hasattr(value, "ds_tensor"):
            weights[name] = read_stretch(name, source, *stretch_of(value), full_shape(value))
        else:
            weights[name] = source(name)
        return stand

    def place_state(stand: Any, name: str, source: named_state.Source) -> Any:
        real = stand.stands_for
        owner = next((h for h in held.values() if h.parts is not None and id(real) in h.parts.pieces), None)
        shape = source.shape(name)
        if owner is None or owner.parts is None or shape != full_shape(real) or not shape:
            return source(name)
        piece = owner.parts.pieces[id(real)]
        return Stretch(read_stretch(name, source, piece.offset, piece.numel, shape))

    stands = {id(value): Stand(value) for _, value in own.values()}
    receivers: Any = {
        name: Receiver({key: stands[id(value)] for key, value in _named(model).items()}) for name, model in models.items()
    }

    def read_optimizers() -> None:
        def taker(optimizer: Optimizer) -> Callable[[dict[str, Any]], None]:
            owner = next((h for h in held.values() if h.front is optimizer), None)
            return lambda state: states.append((owner, optimizer, state))

        stubs = {name: receiver_of(optimizer, stands, taker(optimizer)) for name, optimizer in optimizers.items()}
        named_state.load_optimizer_state(receivers, stubs, names, source, values, place=place_state)

    skipped = named_state.load_model_tensors(receivers, names, source, strict=strict, before=read_optimizers, place=place_weight)
    _apply(own, weights, states)
    for model in models.values():
        owner = held.get(id(model))
        if owner is not None and owner.parts is not None:
            owner.parts.publish()
    return skipped


@torch.no_grad()
def _apply(
    own: Mapping[str, tuple[Held | None, Any]],
    weights: Mapping[str, Tensor],
    states: list[tuple[Held | None, Optimizer, dict[str, Any]]],
) -> None:
    for name, read in weights.items():
        owner, value = own[name]
        if owner is not None and owner.parts is not None and id(value) in owner.parts.pieces:
            owner.parts.fill_weight(value, read)
        elif hasattr(value, "ds_tensor"):
            write_piece(value, read)
            if value.ds_status.name == "AVAILABLE":  # a small one, which every rank keeps gathered
                value.partition()
        else:
            value.copy_(read)
    for owner, optimizer, state in states:
        if owner is None or owner.parts is None:
            optimizer.load_state_dict(state)
            continue
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        owner.parts.fill_state({id(flat[index]): entry for index, entry in state["state"].items()})


def whole_tensors(held: Held | None, model: nn.Module, world: World) -> WholeTensors:
    """Return the model's tensors, the pieces of each put together when it is read. Trained ones are in fp32."""
    own = _named(model)
    if held is None or held.engine is None:
        return WholeTensors(world, own)

    def spec(value: Any) -> tuple[Sequence[int], torch.dtype]:
        parts = held.parts
        piece = parts.pieces.get(id(value)) if parts is not None else None
        if piece is not None and parts is not None:
            return full_shape(value), parts.masters[piece.group].dtype
        return full_shape(value), value.ds_tensor.dtype if hasattr(value, "ds_tensor") else value.dtype

    return WholeTensors(world, own, gather=lambda _, value: _whole(held, value, world), spec=spec)


def _whole(held: Held, value: Any, world: World) -> Tensor:
    piece = held.parts.pieces.get(id(value)) if held.parts is not None else None
    if piece is not None and held.parts is not None:
        stretch, offset = held.parts.stretch(value)
    elif hasattr(value, "ds_tensor"):
        offset, numel = stretch_of(value)
        stretch = read_piece(value)[:numel]
    else:
        return value.detach()
    shape = full_shape(value)
    numel = 1
    for n in shape:
        numel *= n
    whole = torch.zeros(numel, dtype=stretch.dtype, device=world.device)
    whole[offset : offset + stretch.numel()].copy_(stretch)
    if world.size > 1:  # every element has one holder, and zeros change nothing
        dist.all_reduce(whole, group=world.group())
    return whole.view(shape)
