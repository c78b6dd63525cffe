"""What stage 3 keeps on a disk ("nvme"): read when it is asked for, written back when it was changed.

    Swapped(zero)              groups of fp32 masters and optimizer state: one is in memory at a time, until `close`
    read_piece, write_piece    this rank's 16-bit or fp32 piece of a parameter, which lies in a file of its own
    keep_gradients(zero)       gradients stay in memory until the step
DeepSpeed 0.19 writes each gradient to a file and reads it back into a place that need not be aligned as the disk wants it. Then
the read fails without a word, and the step is taken with what lay there. Here they are not written: where ZeRO accumulates
unmanaged, the averages are in memory anyway.
Private names, pinned by tests/strategies/test_deepspeed_pins.py: _swappable_optimizer_subgroup, _writeback_swap_state,
_optimizer_states_and_gradient_swap_in, _release_swap_buffers, optimizer_swapper.swap_params_info, parameter.nvme_swapper
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Swapped", "keep_gradients", "read_piece", "write_piece"]


class Swapped:
    """The groups of an engine that lie on the disk; at most one of them is in memory."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self._open: int | None = None
        self._changed = False

    def has(self, group: int) -> bool:
        """Whether the group lies on the disk: swapping is on, and it has at least a MiB."""
        return bool(getattr(self.zero, "swap_optimizer", False)) and self.zero._swappable_optimizer_subgroup(group)

    def bring(self, group: int, *, change: bool = False) -> None:
        """Read master and state of a group, unless they are there; with `change` they are written when they go."""
        if self._open != group:
            self.close()
            self.zero._optimizer_states_and_gradient_swap_in(group)
            self._open = group
        self._changed |= change

    def close(self) -> None:
        """Let the group go that is in memory. Before ZeRO swaps by itself, whose buffers it has."""
        if self._open is None:
            return
        if self._changed:
            self.zero._writeback_swap_state(self._open, write_opt_state=True, write_gradients=False)
        else:
            self.zero._release_swap_buffers(self._open)
        self._open, self._changed = None, False


def keep_gradients(zero: Any) -> None:
    """Let ZeRO take the gradients of swapped groups from memory when it steps."""
    swapper = zero.optimizer_swapper

    def keep(parameter: Any, gradient_offsets: Sequence[int], gradient_tensors: Sequence[Tensor]) -> None:
        held = swapper.swap_params_info[parameter.ds_id].unswapped_gradients
        held.update(zip(gradient_offsets, gradient_tensors, strict=True))

    swapper.swap_out_gradients = keep


def _is_away(parameter: Any) -> bool:
    return parameter.ds_tensor.status.name == "NOT_AVAILABLE"


def read_piece(parameter: Any) -> Tensor:
    """Return this rank's piece of a parameter that stage 3 holds in pieces, flat, with its padding; a copy where it was read."""
    if not _is_away(parameter):
        return parameter.ds_tensor.view(-1)
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    found = parameter.ds_tensor.detach().clone().view(-1)
    parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    return found


@torch.no_grad()
def write_piece(parameter: Any, values: Tensor) -> None:
    """Write the first elements of this rank's piece of a parameter that stage 3 holds in pieces."""
    if not _is_away(parameter):
        parameter.ds_tensor.view(-1)[: values.numel()].copy_(values)
        return
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    parameter.ds_tensor.view(-1)[: values.numel()].copy_(values)
    parameter.nvme_swapper.swap_out_and_release([parameter])
