"""What `prepare` makes of a user's loader: the same batches, this rank's part of them, at a position that can be saved.

    for batch in loader:        before each batch the loader says what it is: `num_samples`, `is_last`, `remaining`, ...
    loader.state_dict()         epoch and position of what was handed out; what was prefetched does not count
    loader.load_state_dict(s)   the next iteration goes on there, then normal epochs follow
Read `Loader.__iter__`; sharding.py says which samples come, sources.py from where.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...strategies.errors import CheckpointError, ConfigError, DataError
from . import state as loader_state
from .config import DataLoaderConfiguration
from .reading import Failure
from .sources import Indexed, build
from .streamed import Streamed
from .transfer import to_device

if TYPE_CHECKING:
    from ...strategies.world import World

__all__ = ["Loader", "prepare_loader", "skip_first_batches"]


@dataclass
class _Course:
    """Where a loader is, shared by the loader and its `skip_first_batches` views."""

    epoch: int = 0
    """Of the iteration that comes next, or of `active`."""
    start: int = 0
    """Samples of that epoch that a resumed run has behind it."""
    saved: dict[str, Any] | None = None
    """The state that was loaded and not yet gone on from."""
    active: Loader | None = None
    """The view whose iteration is running, or was broken off; None before the first and after one that ended."""
    passes: int = 0


class Loader:
    """A prepared loader. Iterate it once an epoch; attributes it does not have are those of the user's loader.

    Order: one permutation per (seed, epoch) over the whole data set, the same on any number of ranks. A micro-batch takes the
    next B*W samples of it, rank r its contiguous slice. Epochs count up by themselves unless `set_epoch` is called (not when
    `training` is False: an evaluation sees the same order each time).

    Attributes, set before each batch is handed out:
        num_samples: real samples of the batch on this rank; 0 on a rank that only got padding in a ragged tail.
        global_samples: real samples of the micro-batch over all ranks.
        is_last: whether the batch is the epoch's last: by arithmetic with indices, by looking one ahead otherwise.
        remaining: real samples over all ranks from the start of this micro-batch to the end of the epoch; None when unknown.
        batch_samples: samples of a full micro-batch over all ranks; None when unknown.
        sized: whether the length is known (indices).
        epoch, position: samples of the epoch handed out over all ranks, this micro-batch included.
    To be set by whoever drives it:
        on_iter: called with the loader when an iteration begins, and with None when it ends or is broken off.
        limit: at most so many micro-batches an epoch.
        transfer: puts a batch on the device; None leaves batches where they are.
    """

    def __init__(
        self,
        loader: Any,
        source: Indexed | Streamed,
        *,
        training: bool,
        transfer: Callable[[Any], Any] | None,
        names: tuple[int, int],
    ) -> None:
        self.loader = loader
        self.training = training
        self.transfer = transfer
        self.on_iter: Callable[[Loader | None], None] | None = None
        self.limit: int | None = None
        self.num_samples = 0
        self.global_samples = 0
        self.is_last = False
        self.remaining: int | None = None
        self.epoch = 0
        self.position = 0
        self.sized = isinstance(source, Indexed)
        self.batch_samples = source.batch_samples
        self._source = source
        self._course = _Course()
        self._skip = 0
        self._shard = names

    # -- iterating ----------------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Any]:
        return self._indexed(self._source) if isinstance(self._source, Indexed) else self._streamed(self._source)

    def _indexed(self, source: Indexed) -> Iterator[Any]:
        start, _ = self._enter()
        turn = self._course.passes
        if self._skip and not start:
            start = source.after(self.epoch, self._skip)
        batches, counts, at, stop = source.begin(self.epoch, start, self.limit)
        if start == 0 and stop == 0 and self.training:
            raise self._no_batches()
        self.position = at
        regular, transfer, failed = source.regular, self.transfer, False
        try:
            if self.on_iter is not None:
                self.on_iter(self)
            for batch, (count, together) in zip(batches, counts, strict=False):
                if batch.__class__ is Failure:
                    raise batch.error()
                self.num_samples = count
                self.global_samples = together
                self.remaining = stop - at if regular else None
                self.position = at = at + together
                self.is_last = at >= stop
                yield batch if transfer is None else transfer(batch)
            self._leave(turn, finished=True)
        except Exception as error:
            failed = True
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader "):
                raise _worker_died(error) from error
            raise
        finally:
            source.end(batches, failed=failed)
            self._leave(turn)

    def _streamed(self, source: Streamed) -> Iterator[Any]:
        start, saved = self._enter()
        turn = self._course.passes
        self.position = start
        skip, left, begun = (0 if start else self._skip), self.limit, bool(start)
        self._micro_batches = 0
        if saved is not None:  # on other ranks they had another size
            self._micro_batches = -(-saved.get("micro_batches", 0) * saved.get("ranks", 1) // source.ranks)
        if left is not None:
            left -= self._micro_batches
        transfer = self.transfer
        micro_batches = source.begin(self.epoch, saved)
        try:
            if self.on_iter is not None:
                self.on_iter(self)
            for batch, count, together, is_last, used in micro_batches if left is None or left > 0 else ():
                begun = True
                if source.running is not None:
                    source.running.hand_out(used)
                self.position += together
                self._micro_batches += 1
                left = None if left is None else left - 1
                if skip:
                    skip -= 1
                    if left == 0:
                        break
                    continue
                self.num_samples = count
                self.global_samples = together
                self.is_last = is_last or left == 0
                if self.batch_samples is None and self._shard[1] > 1:
                    self.batch_samples = source.batch_samples = together
                yield batch if transfer is None else transfer(batch)
                if left == 0:
                    break
            if not begun and self.training and left != 0:
                raise self._no_batches()
            self._leave(turn, finished=True)
        finally:
            if source.running is not None and self._course.passes == turn:
                source.running.close()
            self._leave(turn)

    def _enter(self) -> tuple[int, dict[str, Any] | None]:
        """Begin an iteration; return at which sample, and the state that a resumed run goes on from."""
        course = self._course
        if course.active is not None:  # the one before was broken off
            course.epoch, course.start, course.saved = course.epoch + self.training, 0, None
        start, saved = course.start, course.saved
        course.active, course.saved, course.passes = self, None, course.passes + 1
        self.epoch = course.epoch
        self.is_last = False
        return start, saved

    def _leave(self, turn: int, *, finished: bool = False) -> None:
        course = self._course
        if course.passes != turn:  # a later iteration has begun: this one ends late, because something still held it
            return
        if finished:
            course.epoch, course.start, course.active = course.epoch + self.training, 0, None
        elif self.on_iter is not None:
            self.on_iter(None)

    # -- length -------------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """Micro-batches of an epoch, on every rank, with `limit`.

        Raises:
            TypeError: as Python wants it, for loaders whose length is not known before they end.
        """
        source = self._source
        if isinstance(source, Indexed):
            return max(0, source.num_batches(self._course.epoch, self.limit) - self._skip)
        if source.length is None:
            raise TypeError(f"The length of this loader is not known before it ends ({type(self.loader).__name__}).")
        length = source.length if self.limit is None else min(source.length, self.limit)
        return max(0, length - self._skip)

    def __bool__(self) -> bool:
        return True

    @property
    def total_batch_size(self) -> int | None:
        """Samples of a full micro-batch over all ranks (Accelerate's name for `batch_samples`)."""
        return self.batch_samples

    @property
    def total_dataset_length(self) -> int:
        """Samples of the data set."""
        return len(self.loader.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "loader" not in self.__dict__:
            raise AttributeError(name)
        try:
            return getattr(self.loader, name)
        except AttributeError:
            raise AttributeError(
                f"Neither a prepared loader nor its {type(self.loader).__name__} has an attribute {name!r}."
            ) from None

    def __repr__(self) -> str:
        index, ranks = self._shard
        return f"Loader({type(self.loader).__name__}, rank {index}/{ranks}, epoch {self.epoch}, position {self.position})"

    # -- position -----------------------------------------------------------------------------------------------------
    @property
    def per_rank(self) -> bool:
        """Whether each rank's `state_dict` is its own: true for iterables that each rank reads by itself."""
        course, source = self._course, self._source
        if course.active is not None and isinstance(source, Streamed) and source.taken_over:
            return False
        return source.per_rank and "parts" not in (course.saved or ())

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of `epoch`, from its start; a position that was loaded for this epoch is kept."""
        course = self._course
        if course.active is not None or epoch != course.epoch:
            course.start, course.saved = 0, None
        course.epoch, course.active = epoch, None
        self.epoch, self.position = epoch, course.start

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is, as JSON. After an epoch's end that is the start of the next one."""
        course, source = self._course, self._source
        active = course.active
        position = course.start if active is None else active.position
        state: dict[str, Any] = {"version": loader_state.VERSION, "epoch": course.epoch, "position": position}
        if isinstance(source, Indexed):
            return {**state, "kind": "indexed", "seed": source.order.seed, "samples": source.length(course.epoch)}
        state |= {"kind": "stream", "seed": source.seed}
        if active is not None:
            state |= {**source.state(position), "micro_batches": active._micro_batches}
        elif course.saved is not None:
            state |= {name: value for name, value in course.saved.items() if name not in state}
        return state

    def load_state_dict(self, state: Any) -> None:
        """Take back what `state_dict` returned: `load_states` with this rank's state only."""
        self.load_states([state])

    def load_states(self, states: Sequence[Any]) -> None:
        """Take back what `state_dict` returned on each rank, on any number of ranks and workers. The seed of the order is the
        saved one.

        Where each rank read by itself (`per_rank`), another number of ranks needs the states of all of them, in order.

        Raises:
            CheckpointError: not such states, of other data, or of loaders that only their own ranks know.
        """
        source, course = self._source, self._course
        found = self.check_states(states)
        if isinstance(source, Indexed):
            source.order.seed = found["seed"]
        else:
            source.seed = found["seed"]
        course.epoch, course.start, course.active = found["epoch"], found["position"], None
        course.saved = found if found["position"] else None
        self.epoch, self.position = course.epoch, course.start

    def check_states(self, states: Sequence[Any]) -> dict[str, Any]:
        """Return what `load_states` would go on from; change nothing. A resume asks before it loads the weights.

        Raises:
            CheckpointError: as in `load_states`.
        """
        source = self._source
        each = [loader_state.check(state, "indexed" if isinstance(source, Indexed) else "stream") for state in states]
        if not isinstance(source, Indexed):
            return source.plan(each)
        found = each[0]
        seed, source.order.seed = source.order.seed, found["seed"]
        try:
            samples = source.length(found["epoch"]) if found["position"] else None
        finally:
            source.order.seed = seed
        if samples is not None and samples != found.get("samples"):
            raise CheckpointError(
                f"The checkpoint stands at sample {found['position']} of {found.get('samples')}, and this data set has "
                f"{samples} samples. "
                "Expected the data set of the saved run. Give it the same data, or resume from the end of an epoch."
            )
        if samples is not None and found["position"] > samples:
            raise CheckpointError(
                f"The checkpoint stands at sample {found['position']} of {samples}, which is behind the end. Expected what "
                "state_dict() returned."
            )
        return found

    # -- for skip_first_batches and prepare_loader --------------------------------------------------------------------
    def _skipping(self, batches: int) -> Loader:
        view = copy.copy(self)
        view._skip = self._skip + batches
        return view

    def _no_batches(self) -> DataError:
        index, ranks = self._shard
        source = self._source
        if isinstance(source, Streamed):
            return DataError(
                f"0 batches on rank {index}: {type(self.loader).__name__} ended at once. Expected at least one batch to train on."
            )
        samples = source.length(self._course.epoch)
        if self.limit == 0:
            return DataError("0 batches: the number of batches an epoch is limited to 0. Expected at least 1 to train on.")
        sharding = source.sharding
        size = getattr(sharding, "batch_size", "its own")
        dropped = getattr(sharding, "drop_last", False)
        advice = (
            "Use a smaller batch_size, drop_last=False, or fewer ranks." if samples else "Give it a data set that has samples."
        )
        return DataError(
            f"0 batches on rank {index}: {samples} samples, world {ranks}, batch {size}, drop_last={dropped}. "
            f"Expected at least one batch to train on. {advice}"
        )


def prepare_loader(
    loader: Any,
    *,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    config: DataLoaderConfiguration | None = None,
    seed: int = 0,
    training: bool = True,
    world: World | None = None,
    transfer: Callable[[Any], Any] | None = None,
) -> Loader:
    """Make a `Loader` of a torch DataLoader, or of any other iterable of batches. All ranks call it together.

    Args:
        shard: (index, count): which part of each micro-batch is this process'.
        device: where batches go; nothing is called for batches that are to stay on the CPU.
        seed: of the order; `config.data_seed`, and a generator that the user gave the loader, go before it.
        training: an empty loader is an error, and epochs count up by themselves.
        world: needed where ranks must talk: several of them and an iterable. With indices it checks that all have the same data.
        transfer: in place of the move to the device.
    Raises:
        ConfigError, DataError: it is not a loader, has no batch, or differs between ranks.
    """
    if isinstance(loader, Loader):
        raise ConfigError("This loader is prepared already. Prepare each loader once, and keep what prepare returned.")
    config = config or DataLoaderConfiguration()
    source = build(loader, world=world, shard=shard, config=config, seed=operator.index(seed))
    device = torch.device(device)
    if transfer is None and device.type != "cpu":
        transfer = to_device(device, non_blocking=config.non_blocking)
    prepared = Loader(loader, source, training=training, transfer=transfer, names=shard)
    if isinstance(source, Indexed):
        _check_same(source, world)
        if source.num_batches(0, None) == 0:
            error = prepared._no_batches()
            if training:
                raise error
            warnings.warn(str(error).replace("to train on", "to evaluate"), stacklevel=2)
    return prepared


def skip_first_batches(loader: Loader, num_batches: int) -> Loader:
    """Return `loader` without the first `num_batches` micro-batches of each epoch; position, epoch and flags are shared.

    With indices nothing is read to skip; an iterable is read and its batches dropped. A loader that goes on from a loaded
    position skips nothing: it is there already.
    """
    if not isinstance(loader, Loader):
        raise ConfigError(f"skip_first_batches got a {type(loader).__name__}; expected a loader that prepare returned.")
    if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 0:
        raise ConfigError(f"skip_first_batches got num_batches={num_batches!r}; expected 0 or more.")
    return loader._skipping(num_batches)


def _worker_died(error: RuntimeError) -> DataError:
    return DataError(
        f"The workers of the loader stopped: {error}. Expected them to live as long as the epoch. Of a killed one, memory (or "
        "/dev/shm) usually ran out: use fewer workers or a smaller prefetch_factor. num_workers=0 shows errors of the data set."
    )


def _check_same(source: Indexed, world: World | None) -> None:
    """Different data or seeds on different ranks would mix two permutations: samples twice, others never."""
    if world is None or world.size == 1:
        return
    every = world.gather_json([source.length(0), source.order.seed, source.batch_samples])
    odd = next((rank for rank, other in enumerate(every) if other != every[0]), None)
    if odd is not None:
        names = ("samples", "seed of the order", "samples in a micro-batch")
        differences = ", ".join(f"{name} {a} and {b}" for name, a, b in zip(names, every[0], every[odd], strict=True) if a != b)
        raise DataError(
            f"Ranks 0 and {odd} have different loaders: {differences}. Expected the same data set, batch size and generator "
            "seed on every rank: "
            "the ranks divide one permutation. Build the loader in the same way everywhere."
        )
