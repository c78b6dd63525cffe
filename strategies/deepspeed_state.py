"""Where a rank's piece of each parameter lies in ZeRO's flat fp32 partitions, and how it is saved and loaded by name.

ZeRO lays the parameters of a group end to end and cuts that line into equal parts, wherever this falls in a parameter (stages 1
and 2); stage 3 cuts each parameter by itself. Either way a rank holds a stretch of the flattened parameter: at most one of each.
    Piece         the stretch: which flat partition, where in it, where in the parameter
    boxes         the stretch as boxes of the parameter's shape, which is what a checkpoint holds (Shard)
    Partitions    the pieces of one engine: its masters, their gradients and their optimizer state
Names are those of named_state.py, so every strategy reads what was saved here, and the other way round; the fp32 masters are what
is saved, not the 16-bit copies. These names of DeepSpeed are private and pinned by tests/strategies/test_deepspeed_pins.py:
    stages 1, 2   round_robin_bit16_groups, round_robin_bit16_offsets, partition_size, single_partition_of_fp32_groups,
                  averaged_gradients
    stage 1, bf16 bf16_groups, fp32_groups_flat_partition, fp32_groups_gradient_flat_partition
    stage 3       fp16_groups, grad_position, fp32_partitioned_groups_flat, fp16_partitioned_groups_flat, averaged_gradients,
                  _offload_boundary_param_ids
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import named_state
from .checkpoint.layout import Shard
from .deepspeed_swap import Swapped
from .errors import ConfigError

__all__ = ["Partitions", "Piece", "boxes", "full_shape", "read_stretch", "shards", "stretch_of"]


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened parameter: `numel` elements from `offset` on, at `start` of the flat partition `group`."""

    group: int
    start: int
    numel: int
    offset: int


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's shape, also where stage 3 holds it in pieces."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def stretch_of(parameter: Any) -> tuple[int, int]:
    """Return (offset, numel) of this rank's piece of a parameter that stage 3 holds in pieces."""
    import torch.distributed as dist

    size = parameter.ds_tensor.ds_numel
    offset = min(size * dist.get_rank(group=parameter.ds_process_group), parameter.ds_numel)
    return offset, min(size, parameter.ds_numel - offset)


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (corner, size) of the boxes that elements `start` to `stop` of a flattened tensor of `shape` make up, in their order.

    A stretch is at most a part of a row, whole rows, and a part of a row, in each dimension: 2 * len(shape) - 1 boxes.

    >>> list(boxes(2, 9, (4, 3)))
    [((0, 2), (1, 1)), ((1, 0), (2, 3))]
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and stop - start < row:
        for corner, size in boxes(start - first * row, stop - first * row, shape[1:]):
            yield (first, *corner), (1, *size)
        return
    whole_from, whole_to = -(-start // row), stop // row
    if start < whole_from * row:
        yield from boxes(start, whole_from * row, shape)
    if whole_from < whole_to:
        yield (whole_from, *(0 for _ in shape[1:])), (whole_to - whole_from, *shape[1:])
    if whole_to * row < stop:
        yield from boxes(whole_to * row, stop, shape)


def shards(stretch: Tensor, offset: int, shape: tuple[int, ...]) -> tuple[Shard, ...]:
    """Return the flat `stretch`, which begins at `offset` of a tensor of `shape`, as what a checkpoint takes. A view."""
    found, at = [], 0
    for corner, size in boxes(offset, offset + stretch.numel(), shape):
        count = math.prod(size)
        found.append(Shard(stretch.detach()[at : at + count].view(size), corner, shape))
        at += count
    return tuple(found)


def read_stretch(name: str, source: named_state.Source, offset: int, numel: int, shape: tuple[int, ...]) -> Tensor:
    """Read elements `offset` to `offset + numel` of a flattened tensor of `shape`, and no others: 1-d."""
    if numel == math.prod(shape):
        return source(name).reshape(-1)
    parts = [source(name, offset=c, shape=s).reshape(-1) for c, s in boxes(offset, offset + numel, shape)]
    return torch.cat(parts) if parts else torch.empty(0)


class Partitions:
    """The pieces of one engine's trained parameters on this rank.

    Args:
        zero: DeepSpeed's optimizer of stage 1, 2 or 3.
    """

    def __init__(self, zero: Any, stage: int) -> None:
        self.zero, self.stage = zero, stage
        self.pieces: dict[int, Piece] = {}  # by id of the parameter
        self._alive: list[Any] = []  # the parameters themselves, so that no id is given to another
        self.swapped = Swapped(zero)
        if stage == 3:
            self._read_stage3()
        elif hasattr(zero, "bf16_groups"):
            self._read_bf16()
        else:
            self._read_flat()

    # -- the layout ---------------------------------------------------------------------------------------------------
    def _read_flat(self) -> None:
        import torch.distributed as dist

        zero = self.zero
        for i, group in enumerate(zero.round_robin_bit16_groups):
            size = int(zero.partition_size[i])
            begin = dist.get_rank(group=zero.real_dp_process_group[i]) * size
            for parameter, at in zip(group, zero.round_robin_bit16_offsets[i], strict=True):
                self._add(parameter, i, at, begin, size)

    def _read_bf16(self) -> None:
        zero = self.zero
        for i, group in enumerate(zero.bf16_groups):
            size = zero.fp32_groups_flat_partition[i].numel()
            at = 0
            for parameter in group:
                self._add(parameter, i, at, zero.dp_rank * size, size)
                at += parameter.numel()

    def _add(self, parameter: Tensor, group: int, at: int, begin: int, size: int) -> None:
        """Note the part of a parameter, which lies at `at` of the line, that falls into the partition from `begin` on."""
        low, high = max(at, begin), min(at + parameter.numel(), begin + size)
        self.pieces[id(parameter)] = Piece(group, max(low - begin, 0), max(high - low, 0), max(low - at, 0))
        self._alive.append(parameter)

    def _read_stage3(self) -> None:
        zero = self.zero
        for group in zero.fp16_groups:
            for parameter in group:
                i, start, numel = zero.grad_position[zero.get_param_id(parameter)]
                offset = min(numel * zero._get_param_partition_rank(parameter), parameter.ds_numel)
                self.pieces[id(parameter)] = Piece(i, start, min(numel, parameter.ds_numel - offset), offset)
                self._alive.append(parameter)

    @property
    def inner(self) -> Optimizer:
        """The torch optimizer that steps the flat partitions."""
        return self.zero.optimizer

    @property
    def masters(self) -> list[Tensor]:
        """The flat fp32 partitions of this rank, one a group (stage 3: a sub-group)."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        if hasattr(self.zero, "bf16_groups"):
            return self.zero.fp32_groups_flat_partition
        return self.zero.single_partition_of_fp32_groups

    def master(self, group: int, *, change: bool = False) -> Tensor:
        """Return a flat partition; one that lies on a disk is brought, and stays until another is (or `swapped.close`)."""
        if self.swapped.has(group):
            self.swapped.bring(group, change=change)
        return self.masters[group]

    def stretch(self, parameter: Tensor) -> tuple[Tensor, int]:
        """Return this rank's piece of the fp32 master of a trained parameter, flat, and where in the parameter it begins."""
        piece = self.pieces[id(parameter)]
        found = self.master(piece.group)[piece.start : piece.start + piece.numel].detach()
        return self._lasting(found, piece.group), piece.offset

    def _lasting(self, found: Tensor, group: int) -> Tensor:
        return found.clone() if self.swapped.has(group) else found

    def options_of(self, group: int) -> int:
        """Which of the optimizer's groups the partition `group` belongs to."""
        return self.zero.sub_group_to_group_id[group] if self.stage == 3 else group

    # -- gradients ----------------------------------------------------------------------------------------------------
    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return this rank's pieces of the averaged gradients of `parameters`, in place; those it holds nothing of are left out.

        Call after the gradients of a window were put together; there are none before a backward pass.
        """
        zero = self.zero
        flats: dict[int, Tensor | None] = {}
        found: list[Tensor] = []
        for parameter in parameters:
            piece = self.pieces.get(id(parameter))
            if piece is None or not piece.numel:
                continue
            if self.stage == 3 and not (zero.offload_optimizer and not zero.swap_optimizer):
                # A tensor for each parameter: the buffer that ZeRO reduces into.
                held = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[cast(Any, parameter).ds_id]
                found.append(held.view(-1)[: piece.numel])
                continue
            if piece.group not in flats:
                flats[piece.group] = self._flat_gradient(piece.group)
            flat = flats[piece.group]
            if flat is not None:
                found.append(flat[piece.start : piece.start + piece.numel])
        return found

    def _flat_gradient(self, group: int) -> Tensor | None:
        zero = self.zero
        if hasattr(zero, "bf16_groups"):
            return zero.fp32_groups_gradient_flat_partition[group]
        if self.stage == 3 or zero.cpu_offload:
            return self.masters[group].grad
        held = zero.averaged_gradients.get(group)
        if held is None:
            return None
        if getattr(held, "flat_partition", None) is None:
            # Flattened here instead of in ZeRO's step, which takes a list with a `flat_partition` as it is.
            held = zero.averaged_gradients[group] = _Flat(held)
        return held.flat_partition.view(-1)

    def rest(self) -> None:
        """Let ZeRO copy all gradients to an offloaded optimizer, under stage 3: it leaves out what rested in this window."""
        if self.stage == 3:
            held = self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            self.zero._offload_boundary_param_ids.update(key for key in held)

    @torch.no_grad()
    def forget(self) -> None:
        """After a step, set the gradients to zero where DeepSpeed keeps them.

        It writes the next ones over these, or adds to them after the first micro-batch. A parameter that rests in the next
        window, or in its first micro-batch, would be stepped with what is left here.
        """
        zero = self.zero
        if self.stage == 3:
            held = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            torch._foreach_zero_([g for g in held.values() if g.numel()])
        elif getattr(zero, "cpu_offload", False):
            for gradient in [m.grad for m in self.masters if m.grad is not None] + list(zero.accumulated_grads_in_cpu.values()):
                gradient.zero_()

    def clear(self) -> None:
        """Forget all gradients, those of a window that was not stepped on too."""
        zero = self.zero
        if hasattr(zero, "bf16_groups"):
            zero.clear_hp_grads()
            zero.clear_lp_grads()
            return
        zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            # A parameter that takes no part in the next window would keep the gradient of this one.
            held = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            torch._foreach_zero_([g for g in held.values() if g.numel()])
            zero._offload_boundary_param_ids = set()
            if zero.offload_optimizer:
                zero.reset_cpu_buffers()
        else:
            zero.micro_step_id = -1  # INITIAL_MICRO_STEP_ID
            zero.averaged_gradients = {}
            zero.all_grad_tensors = {}
            if zero.cpu_offload:
                zero._offload_accumulated_param_ids = set()
                zero.reset_cpu_buffers()
        for master in self.masters:
            if master.grad is not None and (zero.offload_optimizer if self.stage == 3 else zero.cpu_offload):
                master.grad.zero_()

    # -- state --------------------------------------------------------------------------------------------------------
    def weight(self, parameter: Tensor) -> tuple[Shard, ...]:
        """Return this rank's piece of the fp32 master of a trained parameter."""
        return shards(*self.stretch(parameter), full_shape(parameter))

    def state(self, parameter: Tensor, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (tensors, plain values) of the optimizer's state of a parameter: pieces of what is as long as the partition.

        Raises:
            ConfigError: a tensor that is neither as long as the partition nor one number.
        """
        piece = self.pieces[id(parameter)]
        master = self.master(piece.group)
        tensors: dict[str, Any] = {}
        scalars: dict[str, Any] = {}
        for key, value in self.inner.state.get(master, {}).items():
            if not isinstance(value, Tensor):
                scalars[key] = value
            elif value.numel() == master.numel() and value.dim():
                stretch = self._lasting(value.view(-1)[piece.start : piece.start + piece.numel], piece.group)
                tensors[key] = shards(stretch, piece.offset, full_shape(parameter))
            elif value.numel() == 1:
                tensors[key] = value.detach().clone()
            else:
                raise ConfigError(
                    f"The state {key!r} of {type(self.inner).__name__} for {name} has shape {tuple(value.shape)} beside a "
                    f"partition of {master.numel()} elements: it cannot be saved by parameter. Use an optimizer that treats each "
                    "element by itself, such as AdamW or SGD."
                )
        return tensors, scalars

    @torch.no_grad()
    def fill_weight(self, parameter: Tensor, stretch: Tensor) -> None:
        piece = self.pieces[id(parameter)]
        self.master(piece.group, change=True)[piece.start : piece.start + piece.numel].copy_(stretch)

    @torch.no_grad()
    def fill_state(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Replace the optimizer's state by what was read: id(parameter) -> key -> a stretch (`Stretch`), a number or a value."""
        inner = self.inner
        for group, master in enumerate(self.masters):
            if not self.swapped.has(group):
                inner.state.pop(master, None)
                continue
            own = inner.state[self.master(group, change=True)]  # its tensors have files, and stay
            for key, value in list(own.items()):
                if isinstance(value, Tensor) and value.numel() == master.numel():
                    value.zero_()
                else:
                    del own[key]
        for key, state in states.items():
            piece = self.pieces.get(key)
            if piece is None:
                continue
            master = self.master(piece.group, change=True)
            own = inner.state[master]
            for name, value in state.items():
                if isinstance(value, Stretch):
                    if name not in own:
                        own[name] = torch.zeros_like(master, dtype=value.tensor.dtype, requires_grad=False)
                    own[name][piece.start : piece.start + piece.numel].copy_(value.tensor)
                elif isinstance(value, Tensor):
                    own[name] = value.detach().clone()
                else:
                    own[name] = value

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the parameters that the model computes with up to the masters. Collective."""
        zero = self.zero
        if self.stage < 3:
            zero.update_lp_params()
            if not hasattr(zero, "bf16_groups"):
                for i in range(len(zero.bit16_groups)):
                    zero._update_model_bit16_weights(i)
            return
        zero._partition_all_parameters()
        for i in range(len(self.masters)):
            self.master(i)
            zero._reassign_or_swap_out_partitioned_parameters(i)
        self.swapped.close()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()


class Stretch:
    """A stretch of a flattened tensor that was read: told apart from a number that belongs to the whole parameter."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Flat(list[Tensor]):
    """A group's gradients, flattened: DeepSpeed looks for the attribute."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.flat_partition = torch.cat([p.reshape(-1) for p in parts])
        super().__init__([self.flat_partition])


class Stand(Tensor):
    """Stands for a tensor that is held in pieces, with its whole shape and no memory: named_state.py asks its `place` for such.

    What is copied into it is dropped: `place` has kept what it read.
    """

    stands_for: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Stand:
        stand = Tensor._make_wrapper_subclass(cls, full_shape(real), dtype=real.dtype, device=torch.device("meta"))
        stand.stands_for = real
        return stand

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


class Receiver:
    """Stands for a model whose tensors are read in stretches.

    With it the checks and messages are those of every other strategy, and nothing is changed before all of them passed.
    """

    def __init__(self, tensors: Mapping[str, Stand]) -> None:
        self._tensors = dict(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def named_parameters(self, remove_duplicate: bool = True) -> list[tuple[str, Tensor]]:
        return [(key, stand) for key, stand in self._tensors.items() if isinstance(stand.stands_for, nn.Parameter)]


def receiver_of(optimizer: Optimizer, stands: Mapping[int, Stand], take: Callable[[dict[str, Any]], None]) -> Any:
    """Return what looks like `optimizer` over stand-ins, and gives what is loaded into it to `take`."""
    stub: Any = type(type(optimizer).__name__, (), {"load_state_dict": lambda self, state: take(state)})()
    stub.param_groups = [dict(g, params=[stands.get(id(p), p) for p in g["params"]]) for g in optimizer.param_groups]
    stub.state = {}
    return stub
