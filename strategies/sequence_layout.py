"""SequenceLayout: which tokens of a sequence each rank of the `cp` axis holds, and which pairs of pieces attend to each other.

    balanced    the sequence is cut into 2n chunks; rank i holds chunks i and 2n-1-i. Under causal attention a late token has
                more keys than an early one, and each rank then has as much to do as any other.
    in order    n chunks; rank i holds chunk i. The last rank has nearly twice the mean to do under causal attention.
With n=2, balanced, and T=8:   rank 0  0 1 | 6 7     rank 1  2 3 | 4 5
Source: the zigzag order of Brandon et al. 2023, arXiv:2311.09431 (striped attention), and Llama 3, arXiv:2407.21783.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError

__all__ = ["SequenceLayout"]

# torch's own: the name is exchanged in backward passes (shared_sequence.py).
_arange = torch.arange


@dataclass(frozen=True)
class SequenceLayout:
    """How `ranks` ranks share a sequence, seen from `rank`."""

    ranks: int
    rank: int
    balanced: bool = True

    @property
    def pieces(self) -> int:
        """Of how many chunks a rank's part consists."""
        return 2 if self.balanced and self.ranks > 1 else 1

    @property
    def multiple(self) -> int:
        """What the length of a whole sequence must be a multiple of."""
        return self.pieces * self.ranks

    def chunks(self, rank: int | None = None) -> tuple[int, ...]:
        """Return the indices of the chunks that a rank holds, in its order."""
        rank = self.rank if rank is None else rank
        return (rank,) if self.pieces == 1 else (rank, self.multiple - 1 - rank)

    def chunk_length(self, local: int) -> int:
        """Return the length of a chunk where each rank holds `local` tokens.

        Raises:
            ConfigError: an odd number of tokens in two chunks.
        """
        if local % self.pieces:
            raise ConfigError(
                f"A rank's part of the sequence has {local} tokens, which are not {self.pieces} chunks of one length. Make the "
                f"length of the whole sequence a multiple of {self.multiple}, or say ContextParallel(load_balance=False)."
            )
        return local // self.pieces

    def check_length(self, length: int, what: str) -> None:
        """Refuse a whole sequence that cannot be shared equally.

        Raises:
            ConfigError: says to what to pad it.
        """
        if length % self.multiple:
            more = " (or of the number of ranks, with load_balance=False)" if self.pieces == 2 else ""
            raise ConfigError(
                f"{what} is {length} tokens long, which {self.ranks} ranks cannot share in {self.multiple} equal chunks. Pad the "
                f"sequences, with ignored labels, to {-(-length // self.multiple) * self.multiple}: a multiple of "
                f"{self.multiple}{more}."
            )

    def positions(self, local: int, device: torch.device | None = None, rank: int | None = None) -> Tensor:
        """Return the places in the whole sequence of the `local` tokens of a rank: (local,), int64."""
        size = self.chunk_length(local)
        return torch.cat([_arange(c * size, (c + 1) * size, device=device) for c in self.chunks(rank)])

    def all_positions(self, local: int, device: torch.device | None = None) -> Tensor:
        """Return the places of the tokens of all ranks, one rank after the other: (ranks * local,)."""
        return torch.cat([self.positions(local, device, rank) for rank in range(self.ranks)])

    def split(self, tensor: Tensor, dim: int, rank: int | None = None) -> Tensor:
        """Return a rank's part of a whole tensor along `dim`: a copy, in its order."""
        size = tensor.shape[dim] // self.multiple
        return torch.cat([tensor.narrow(dim, c * size, size) for c in self.chunks(rank)], dim)

    def join(self, tensor: Tensor, dim: int) -> Tensor:
        """Bring parts that lie one after the other along `dim`, in the order of ranks, into the order of the sequence."""
        if self.pieces == 1:
            return tensor
        size = tensor.shape[dim] // self.multiple
        order = [c for rank in range(self.ranks) for c in self.chunks(rank)]
        return torch.cat([tensor.narrow(dim, order.index(c) * size, size) for c in range(self.multiple)], dim)

    def unjoin(self, tensor: Tensor, dim: int) -> Tensor:
        """Undo `join`: from the order of the sequence to one part after the other."""
        if self.pieces == 1:
            return tensor
        size = tensor.shape[dim] // self.multiple
        order = [c for rank in range(self.ranks) for c in self.chunks(rank)]
        return torch.cat([tensor.narrow(dim, c * size, size) for c in order], dim)

    def causal_work(self, keys_of: int, local: int) -> tuple[slice, slice, bool] | None:
        """Return (queries, keys, diagonal): which of this rank's queries see which of the keys of rank `keys_of`, causally.

        All of those pairs, or with `diagonal` the lower triangle. None: no query sees any of them.
        """
        whole = slice(0, local)
        if keys_of == self.rank:
            return whole, whole, True
        if self.pieces == 1:
            return (whole, whole, False) if keys_of < self.rank else None
        half = self.chunk_length(local)
        # An earlier rank's first chunk lies before both of ours, its second after both; a later rank's lie between ours.
        return (whole, slice(0, half), False) if keys_of < self.rank else (slice(half, local), whole, False)
