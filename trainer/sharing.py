"""`Accelerator.maybe_context_parallel`: a loop of one's own whose sequences are shared by the ranks of `cp`.

    with accelerator.maybe_context_parallel(buffers=[x, y], buffer_seq_dims=[1, 1], no_restore_buffers={x, y}):
        loss = loss_of(model(x), y)                  # x and y are this rank's tokens here; attention looks at those of all
        accelerator.backward(loss)
A model called without it computes whole sequences on every rank of `cp`: the same gradients, and nothing is saved.
Unlike a Trainer's step nothing is verified, so a model that counts positions with torch.arange is refused until
ContextParallel(positions=...) says what they are, and a slice of a table of its own is seen by nobody: give it positions as a
buffer, or use `sequence_positions`. Source: Accelerate 1.10, torch.distributed.tensor.experimental.context_parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..strategies.errors import ConfigError

if TYPE_CHECKING:
    from ..strategies.base import Strategy

__all__ = ["SharedSequences"]


class SharedSequences:
    """The part of `Accelerator` that shares the sequences of a loop of one's own."""

    strategy: Strategy

    def maybe_context_parallel(
        self,
        buffers: Sequence[Tensor] | None = None,
        buffer_seq_dims: Sequence[int] | None = None,
        no_restore_buffers: Iterable[Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Return a context in which `buffers` are this rank's parts of themselves; without `cp` one that does nothing.

        The backward pass belongs inside, unless all buffers that it needs are in `no_restore_buffers`: torch refuses it behind.
        Args:
            buffers: tensors that are as long as the sequence: tokens, labels, positions, tables. Changed in place.
            buffer_seq_dims: the dimension of the sequence in each of them.
            no_restore_buffers: those of them that are not made whole again at the end.
        Raises:
            ConfigError: numbers that do not match, a parameter, a kept buffer that is none, or (with cp) no buffers.
        """
        tensors, dims, kept = list(buffers or ()), list(buffer_seq_dims or ()), list(no_restore_buffers or ())
        if len(tensors) != len(dims):
            raise ConfigError(
                f"maybe_context_parallel got {len(tensors)} buffers and {len(dims)} buffer_seq_dims. Give each its dimension."
            )
        if any(isinstance(t, nn.Parameter) or t.requires_grad for t in tensors):
            raise ConfigError(
                "maybe_context_parallel(buffers=...) has a tensor that is trained: it would be cut in place. Cut it in the "
                "model, by drivetrain.sequence_positions."
            )
        if not all(any(k is t for t in tensors) for k in kept):
            raise ConfigError("no_restore_buffers has a tensor that is not in buffers. Name the same objects in both.")
        return self.strategy.sharing(tensors, dims, kept)
