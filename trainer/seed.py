"""Seeds and deterministic mode: what may be random, and from what it is drawn."""

from __future__ import annotations

import random
import sys

import torch

from ..strategies.errors import ConfigError

__all__ = ["seed_everything", "set_deterministic", "vary_by_rank"]

_LARGEST = 2**32 - 1


def seed_everything(seed: int) -> None:
    """Seed python, numpy (if it was imported) and torch, on every device, with the same number on every rank.

    Raises:
        ConfigError: `seed` is not a whole number from 0 to 2**32 - 1, numpy's range.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _LARGEST:
        raise ConfigError(
            f"seed must be a whole number from 0 to {_LARGEST}, got {seed!r}. Write seed=1 for example, or leave it out."
        )
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch.manual_seed(seed)


def vary_by_rank(rank: int) -> None:
    """Give every rank but the first random streams of its own, so that dropout differs between ranks. Rank 0 is left as it is.

    `rank` is World.random_index: ranks of tp compute the same activations, and must drop the same of them.
    """
    if rank:
        seed_everything((torch.initial_seed() + rank) % _LARGEST)


def set_deterministic(deterministic: bool | str) -> None:
    """Switch torch's deterministic algorithms on (True), or on with a warning where there is none ("warn").

    Source: torch.use_deterministic_algorithms.
    """
    if deterministic not in (True, False, "warn"):
        raise ConfigError(
            f"deterministic must be True, False or 'warn', got {deterministic!r}. "
            "'warn' goes on where torch has no such algorithm."
        )
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        torch.backends.cudnn.benchmark = False
