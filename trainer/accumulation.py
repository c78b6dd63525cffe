"""One accumulation window: the micro-batches whose gradients make one optimizer step, and how each is weighted.

The promise is that a step's gradient is that of the mean over all that the window held, over all its micro-batches and ranks,
however they were cut. With W ranks (whose gradients the backward pass averages) and A micro-batches a window:

    a full window                         every micro-loss is multiplied by 1/A
    a window of one micro-batch           micro-loss times n*W/g            g: the micro-batch's samples over all ranks
    a window cut short by the data's end  micro-loss times n*W/N     n: this rank's samples, N: the window's over all ranks
    the same, when N is not known ahead   micro-loss times n*W/(A*G), and the gradients times A*G/N before the step
                                                                    G: samples of a full micro-batch over all ranks
    no sample counts (a list of batches)  micro-loss times 1/A, and the gradients times A/k when only k micro-batches came
    a loop left within the last window    the same n*W/N, and the gradients times N over what the window held in the end
    sums with their counts (`num_items`)  micro-sum divided by P, and the gradients times P*L/T before the step
                                                                    P: a power of two, T: all counts of window and ranks,
                                                                    L: W, times the ranks that share a sequence (cp)

`begin` opens the next micro-batch, `weigh_sum` takes a sum with its count, `settle` returns the factor that remains for the
gradients where `uneven` says that there is one. P is a power of two so that dividing by it rounds nothing; it keeps the sums in
range.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.errors import DataError

if TYPE_CHECKING:
    from ..strategies.world import World
    from .data.loader import Loader

__all__ = ["MEAN", "SUM", "Window", "mixed_window"]

MEAN, SUM = 1, 2


class Window:
    """The open window. Plain attributes; `begin` is called once a micro-batch.

    Attributes:
        size: micro-batches of a full window; `wanted`, of the next one.
        number: counts windows; a step belongs to the window of its number.
        index: which micro-batch of the window is open, from 1.
        sync: whether the open micro-batch is the window's last, the one that ends with an optimizer step.
        scale: what the open micro-batch's mean loss is multiplied by.
        backwards: backward passes since the window opened.
        kind: what the window's losses are: MEAN, SUM, or 0 before the first.
        total: the items of the last settled window of sums, over all ranks: a number on the CPU, else a tensor on the device.
        uneven: whether the gradients are still to be multiplied by what `settle` returns, when `sync`.
    """

    __slots__ = (
        "_divisor",
        "_expected",
        "_factor",
        "_held",
        "_inverse",
        "_items",
        "_remaining",
        "_settled",
        "_summed",
        "backwards",
        "index",
        "kind",
        "loss_ranks",
        "number",
        "ranks",
        "samples",
        "scale",
        "size",
        "sync",
        "total",
        "uneven",
        "wanted",
    )

    def __init__(self, size: int = 1, ranks: int = 1, loss_ranks: int | None = None) -> None:
        self.ranks = ranks  # that read their own samples, over which the backward pass averages
        self.loss_ranks = ranks if loss_ranks is None else loss_ranks  # the same, counting those that have a part of a sample
        self.number = 0
        self.index = 0
        self.sync = True
        self.scale = 1.0
        self.backwards = 0
        self.samples: int | None = None  # this rank's real samples in the open micro-batch, where known
        self.total: Tensor | float = 0.0
        self._divisor = 0.0  # P; 0 until the first sum
        self._open()
        self.size = self.wanted = size
        self._inverse = 1.0 / size

    def _open(self) -> None:
        """Forget the window before. `begin` does the same in line."""
        self.kind = 0
        self.uneven = False
        self._items: Any = 0
        self._held = 0  # samples of the window so far, over all ranks
        self._expected = 0  # samples that `scale` was made for; 0 when they are not counted
        self._remaining: int | None = None  # the window's samples where they are known ahead and it is cut short
        self._factor: Tensor | float | None = None
        self._settled = False
        self._summed = 0  # the micro-batch of the last sum, from 1

    def resize(self, size: int) -> None:
        """Set the micro-batches of a full window; takes effect with the next window."""
        self.wanted = size
        if self.sync:
            self.size, self._inverse = size, 1.0 / size

    def begin(self, loader: Loader | None, *, ends_with_data: bool = True) -> None:
        """Open the next micro-batch, the one that `loader` has just handed out (None: not one of ours)."""
        if self.sync:
            self.number += 1
            self.index = 1
            self.backwards = self.kind = self._held = self._expected = 0
            self._items, self._remaining, self._settled, self.uneven, self._summed = 0, None, False, False, 0
            if self.wanted != self.size:
                self.size, self._inverse = self.wanted, 1.0 / self.wanted
            if loader is not None and loader.batch_samples is not None:
                self._expected = self.size * loader.batch_samples
                if loader.remaining is not None and loader.remaining < self._expected and ends_with_data:
                    self._remaining = loader.remaining
        else:
            self.index += 1
        self.sync = self.index >= self.size
        if loader is None:
            self.samples = None
            self.scale = self._inverse
            self.uneven = self.kind == SUM or self.index != self.size
            return
        self.samples = loader.num_samples
        if self.size == 1 and loader.batch_samples is not None:  # the window is this micro-batch, whatever its size
            even = loader.num_samples * self.ranks == loader.global_samples
            self.scale = 1.0 if even else loader.num_samples * self.ranks / loader.global_samples
            self.uneven = False
            return
        if loader.is_last and ends_with_data:
            self.sync = True
        if self._remaining is not None:
            self.scale = loader.num_samples * self.ranks / self._remaining
            self._held += loader.global_samples
            self.uneven = self.kind == SUM or self._held != self._remaining  # the loop was left in this window: it goes on
            return
        if self._expected:
            # Whole batches have the plain 1/A, so that nothing is rounded that a hand-written loop would not round.
            self._held += loader.global_samples
            whole = loader.global_samples == loader.batch_samples and loader.num_samples * self.ranks == loader.global_samples
            self.scale = self._inverse if whole else loader.num_samples * self.ranks / self._expected
            self.uneven = self.kind == SUM or self._held != self._expected
        else:
            self.scale = self._inverse
            self.uneven = self.kind == SUM or self.index != self.size

    def alone(self, loader: Loader | None, *, fresh: bool) -> None:
        """Take a backward pass outside of `accumulate`: the caller steps when it wants, so every micro-batch is `sync`.

        Args:
            fresh: an optimizer stepped since the backward pass before, so that a new window begins.
        """
        if fresh:
            self.number += 1
            self.backwards = 0
            self._open()
        self.samples = None if loader is None else loader.num_samples
        self.scale = self._inverse
        if loader is not None and loader.num_samples * self.ranks != loader.global_samples:
            self.scale *= loader.num_samples * self.ranks / loader.global_samples

    def close(self) -> None:
        """Let the next micro-batch open a new window, whatever this one held: its gradients are not stepped on."""
        self.sync = True
        if self.index:
            self.index = self.size

    def weigh_sum(self, loss: Tensor, num_items: Tensor | int, world: World) -> Tensor:
        """Return `loss`, a sum over `num_items` items, divided by the power of two that the window uses.

        Raises:
            DataError: the window already holds a loss that is a mean, or the micro-batch another sum.
        """
        if self.kind == MEAN:
            raise mixed_window()
        if self.index and self._summed == self.index:
            raise DataError(
                "One micro-batch gave two losses with num_items, and their counts cannot be told apart. Add them up to one loss "
                "before backward, or give each its mean, without num_items."
            )
        self.kind, self.uneven, self._summed = SUM, True, self.index
        if not self._divisor:
            self._divisor = _power_of_two(num_items, world)
        if self.samples == 0:  # a rank that only got padding: its items count for nothing
            self._items = self._items + num_items * 0
            return loss * 0.0
        self._items = self._items + num_items
        return loss * (1.0 / self._divisor)

    def divisor_of(self, samples: int, world: World) -> float:
        """Return P for a pipeline, whose sums are divided on the rank that has them: all ranks choose it before, by samples."""
        if not self._divisor:
            self._divisor = _power_of_two(samples, world)
        return self._divisor

    def count_sum(self, num_items: Tensor | int) -> None:
        """Count the items of a micro-batch whose sum was divided by `divisor_of` already."""
        if self.kind == MEAN:
            raise mixed_window()
        self.kind, self.uneven, self._summed = SUM, True, self.index
        self._items = self._items + num_items

    def settle(self, world: World) -> Tensor | float | None:
        """Return what the window's gradients are still to be multiplied by; None for 1. 0.0 means: it held no items.

        Collective (one scalar over all ranks) when the window holds sums; the value is kept until the next window.
        """
        if not self._settled:
            self._settled = True
            self._factor = self._settle(world)
        return self._factor

    def _settle(self, world: World) -> Tensor | float | None:
        if self.kind == SUM:
            count = self._items if isinstance(self._items, Tensor) else torch.tensor(float(self._items), dtype=torch.float64)
            if world.size > 1 and (self.loss_ranks > 1 or world.mesh is not None):
                count = world.all_reduce(count.to(torch.float64) * (not world.is_duplicate))
            if count.device.type == "cpu":  # no device to wait for: a plain number
                self.total = total = count.item()
                return self._divisor * self.loss_ranks / total if total else 0.0
            self.total = count
            return torch.where(count > 0, self._divisor * self.loss_ranks / count, 0.0)
        if self._remaining is not None:
            return None if self._held == self._remaining else self._remaining / self._held
        if self._expected:
            return None if self._held == self._expected else self._expected / self._held
        return None if self.index == self.size else self.size / self.index

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs. Windows are saved when closed only; P alone outlives one."""
        return {"divisor": self._divisor, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, with no window open."""
        self._divisor, self.number = float(state["divisor"]), int(state["number"])
        self.index, self.sync, self.backwards = 0, True, 0
        self._open()


def _power_of_two(num_items: Tensor | int, world: World) -> float:
    """Return a power of two near the number of items, the same on all ranks."""
    count = torch.as_tensor(num_items, dtype=torch.float64).detach()
    if world.size > 1:
        count = world.all_reduce(count.to(world.device), "max")
    return 2.0 ** math.floor(math.log2(max(1.0, float(count.item()))))


def mixed_window() -> DataError:
    """The error for a window that holds both kinds of losses."""
    return DataError(
        "One accumulation window holds both a loss that is a mean and one that is a sum with num_items. They cannot be averaged "
        "together. Return {'loss': sum, 'num_items': n} for every micro-batch, or the mean for every one."
    )
