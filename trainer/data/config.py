"""How prepared loaders behave: Accelerate's fields, what ours means by each, and three of our own."""

from __future__ import annotations

from dataclasses import dataclass

from ...strategies.errors import ConfigError

__all__ = ["DataLoaderConfiguration"]

_YES_NO = ("split_batches", "even_batches", "use_seedable_sampler", "non_blocking", "use_stateful_dataloader", "seed_samples")
_UNEVEN = ("join", "drop")


@dataclass(frozen=True)
class DataLoaderConfiguration:
    """Options for every loader that one Accelerator prepares.

    Attributes:
        split_batches: the loader's batch is the global one, each rank gets its part (it must divide by the number of
            ranks). False: the loader's batch is per device, the global one is that times the number of ranks.
        dispatch_batches: how an iterable data set that cannot shard itself reaches several ranks. None or True: rank 0
            reads and sends each rank only its slice. False: every rank reads everything and keeps its slice (costs
            every rank the reading, and no messages). Data sets with indices are never dispatched: True is refused there.
        even_batches: accepted in both meanings. All ranks always make the same number of batches, and no sample is ever
            repeated to get there: the last batch is cut into nearly equal parts.
        use_seedable_sampler: accepted in both meanings. The order is always made from (seed, epoch).
        data_seed: seed of the order; None takes the Accelerator's. A generator given to the loader goes before both.
        non_blocking: copy batches to the device without waiting (of use with pin_memory=True).
        use_stateful_dataloader: read iterable data sets through torchdata's StatefulDataLoader, which asks the data set
            for its state, also in workers. Data sets with indices do not need it: their position is a number.
        seed_samples: the random numbers that reading a sample draws (python's, numpy's and torch's global generators)
            depend on (seed, epoch, index) alone: not on workers, ranks or what the training draws. Costs about 5 us a
            sample in workers and for data sets that draw; about 2 us a batch for others (num_workers=0).
        already_sharded: the loader is this rank's own already (a data set that reads its rank itself): take every batch of it.
        uneven: what to do when ranks with their own iterables end at different batches. "join": those without data get
            an empty batch that counts for nothing, until the last rank is done. "drop": all stop with the first.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False
    seed_samples: bool = True
    already_sharded: bool = False
    uneven: str = "join"

    def __post_init__(self) -> None:
        for name in (*_YES_NO, "already_sharded"):
            _check(name, getattr(self, name), (True, False))
        _check("dispatch_batches", self.dispatch_batches, (None, True, False))
        _check("uneven", self.uneven, _UNEVEN)
        if self.data_seed is not None and (not isinstance(self.data_seed, int) or isinstance(self.data_seed, bool)):
            raise ConfigError(
                f"DataLoaderConfiguration got data_seed={self.data_seed!r}; expected a whole number, or None for the run's seed."
            )
        if self.already_sharded and (self.dispatch_batches or self.split_batches):
            other = "dispatch_batches=True" if self.dispatch_batches else "split_batches=True"
            raise ConfigError(
                f"DataLoaderConfiguration got already_sharded=True with {other}: a rank's own batches are neither sent nor cut. "
                "Leave one of them out."
            )


def _check(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        known = ", ".join(map(repr, choices))
        raise ConfigError(f"DataLoaderConfiguration got {name}={value!r}; expected one of {known}.")
