"""What `self.log` collects between two log points, and how it becomes one number per name.

    training_step      log("loss", loss)      added to a running sum on the loss's own device: no host read, nothing kept alive
    log point          flush_step()           one collective over the ranks, one copy to the host, for all names together
    epoch's end        flush_epoch()          the same for the sums over the epoch, which then start anew

Every mean is weighted, exactly: by the real samples of each batch, or by the `weight` given. `on_step` reports the last
optimizer step in which a name was logged (over the micro-batches of that step's window, and the ranks), `on_epoch` the whole
epoch. A rank whose batch is only padding (`batch_samples == 0`) counts for nothing.

One all-reduce serves every name and reduction (metric_parts.py says how). The names and their order are agreed by
`World.gather_json` when the set changes: the vector's first element tells every rank that some rank has a new name.

Read `Metrics.log` first; everything that is not the plain case leaves it for `_log_other`. Objects with compute/update/reset
(torchmetrics, torcheval) are in metric_objects.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..strategies.errors import ConfigError, DataError, unknown_name
from .metric_objects import check_holders, compute_object, is_metric_object
from .metric_parts import (
    EMPTY,
    REDUCTIONS,
    Entry,
    Part,
    add,
    as_number,
    fold_on_host,
    joined,
    one_element,
    pack,
    read,
    results,
    to_vector,
    weighted,
)

if TYPE_CHECKING:
    from ..strategies.world import World

__all__ = ["Metrics", "Reduction"]

Reduction = Literal["mean", "sum", "max", "min"]
_OPTIONS = ("on_step", "on_epoch", "prog_bar", "reduce", "sync")
_NUMBERS = frozenset((int, float))


class Metrics:
    """The running values of everything that is logged in one stage ("train", "validate", ...).

    The loop sets two plain attributes before each training_step: `batch_samples`, the real samples of this rank's micro-batch
    (the default weight), and `window`, any integer that is another one for each optimizer step, such as `global_step`.
    """

    state_is_per_rank = True  # each rank saves its own running sums; `load_states` for another number of ranks

    def __init__(self, world: World, *, stage: str) -> None:
        self.world = world
        self.stage = stage
        self.batch_samples: int = 1
        self.window: int = 0
        self.prog_bar_names: set[str] = set()  # as reported, with their endings
        self._entries: dict[str, Entry] = {}
        self._agreed: dict[str, Entry] | None = None  # in the order of the packed vector; None: nothing agreed yet

    def log(
        self,
        name: str,
        value: Any,
        *,
        on_step: bool,
        on_epoch: bool,
        prog_bar: bool = False,
        reduce: Reduction = "mean",
        sync: bool = True,
        weight: float | Tensor | None = None,
    ) -> None:
        """Add `value` to what `name` reports. At most four Python and C calls for the mean of a tensor whose name is known.

        Args:
            value: a tensor of one element (detached and copied, never read), a number, or an object with compute/update/reset.
            prog_bar: show it in the progress bar, as of the last log point.
            reduce: over micro-batches, steps and ranks.
            sync: reduce over the ranks; otherwise each rank reports its own.
            weight: of this value in a mean, in any unit (tokens), also as a tensor; by default the real samples of the batch.
        Raises:
            ConfigError: the options are wrong, or others than in an earlier call of this name.
            DataError: the value is not a single number. The message names the metric.
        """
        try:
            entry = self._entries[name]
        except (KeyError, TypeError):
            entry = self._register(name, (on_step, on_epoch, prog_bar, reduce, sync))
        if entry.options != (on_step, on_epoch, prog_bar, reduce, sync):
            raise _conflict(entry, (on_step, on_epoch, prog_bar, reduce, sync))
        # For a sum every value has the weight 1, and none may be given: None is no number, so that goes the long way.
        w: Any = (entry.unit or self.batch_samples) if weight is None else (None if entry.unit else weight)
        if not (w.__class__ in _NUMBERS and 0 < w < math.inf and self.batch_samples and entry.kind == "value"):
            return self._log_other(entry, value, weight)
        if not (entry.placed and entry.extreme is None and value.__class__ is Tensor and value.ndim == 0):
            return self._add(entry, value, w) if value.__class__ in _NUMBERS else self._log_other(entry, value, weight)
        detached = value.detach()
        try:
            if on_epoch:
                part = entry.epoch
                if part.scale:
                    part.tensor.add_(detached, alpha=w / part.scale)
                else:
                    part.tensor.copy_(detached)
                    part.scale = w
                part.weight += w
            if on_step:
                part = entry.step
                if part.window != self.window:  # the first micro-batch of another step: what the last one left is dropped
                    part.tensor.copy_(detached)
                    part.window = self.window
                    part.scale = part.weight = w
                    part.number = 0.0
                    part.weighted = False
                elif part.scale:
                    part.tensor.add_(detached, alpha=w / part.scale)
                    part.weight += w
                else:
                    part.tensor.copy_(detached)
                    part.scale = w
                    part.weight += w
        except RuntimeError:
            # Another device or kind of number than before. Whatever refuses the value does so at the first part, before it
            # changes anything, so nothing was counted yet.
            self._log_other(entry, value, weight)

    def holds(self, name: str) -> bool:
        """Whether a value of that name was logged and is not reported yet."""
        entry = self._entries.get(name)
        return entry is not None and bool(entry.step.scale or entry.epoch.scale or entry.object is not None)

    def log_dict(self, values: Any, **options: Any) -> None:
        """Log each item of a mapping, or of a collection of torchmetrics, with the same options."""
        for name, value in values.items():
            self.log(name, value, **options)

    # -- the log points -----------------------------------------------------------------------------------------------
    def flush_step(self) -> dict[str, float]:
        """Return the last value of every on_step name that was logged since the last call. All ranks call it together."""
        found = self._reduce(step=True)
        for entry in self._entries.values():
            entry.step.clear()
        return found

    def flush_epoch(self) -> dict[str, float]:
        """Return the epoch's value of every on_epoch name, and begin anew. All ranks call it together.

        Objects with compute/update/reset are computed and reset here.
        """
        found = self._reduce(step=False)
        for entry in self._entries.values():
            entry.epoch.clear()
        return found

    def clear(self) -> None:
        """Forget all running values, as after a validation that was broken off. Names and their options stay."""
        for entry in self._entries.values():
            entry.step.clear()
            entry.epoch.clear()
            if entry.object is not None:
                entry.object.reset()

    def _reduce(self, *, step: bool) -> dict[str, float]:
        size = self.world.size
        if size == 1:
            return self._report(_alone(self._selected(self._entries.values(), step), step), step)
        if self._agreed is None:
            self._agreed = {}
            self._agree()
        new = [e for e in self._entries.values() if e.sync and e.kind and e.name not in self._agreed]
        entries = self._selected(self._agreed.values(), step)
        flag, *values = self._all_reduced(float(len(new)), entries, step)
        found = results(entries, values, step=step, size=size)
        if flag:
            # Some rank logged names for the first time: agree on them, and reduce them too. This happens once for a name.
            entries = self._selected(self._agree(), step)
            found |= results(entries, self._all_reduced(0.0, entries, step)[1:], step=step, size=size)
        found |= _alone([e for e in self._selected(self._entries.values(), step) if not e.sync], step)
        return self._report(found, step)

    def _selected(self, entries: Iterable[Entry], step: bool) -> list[Entry]:
        return [entry for entry in entries if (entry.on_step if step else entry.on_epoch)]

    def _all_reduced(self, flag: float, entries: list[Entry], step: bool) -> list[float]:
        """The flag and the packed parts, summed over the ranks: one collective, one copy to the host."""
        host, held = pack(entries, step=step, rank=self.world.rank, size=self.world.size)
        vector = to_vector([flag, *host], [(index + 1, factor, tensor) for index, factor, tensor in held], self.world.device)
        if self.world.is_duplicate:  # its values are those of another rank, and would count twice
            vector[1:] = 0
        return self.world.all_reduce(vector, "sum").tolist()

    def _agree(self) -> list[Entry]:
        """Exchange the names that are new on some rank; return their entries, in an order that is the same on all ranks."""
        agreed = self._agreed if self._agreed is not None else {}
        mine = [[e.name, e.kind, *e.options] for e in self._entries.values() if e.sync and e.kind and e.name not in agreed]
        new: dict[str, Entry] = {}
        for rank, rows in enumerate(self.world.gather_json(mine)):
            for name, kind, *options in rows:
                entry = self._entries.get(name) or self._register(name, tuple(options))
                if entry.options != tuple(options):
                    # The same entries meet here on every rank, in the same order, so every rank raises for the same name.
                    raise _conflict(entry, tuple(options), f"on rank {rank}")
                entry.set_kind(kind)
                new[name] = agreed[name] = entry
        return list(new.values())

    def _report(self, found: dict[Entry, float], step: bool) -> dict[str, float]:
        """Name the values; compute the objects, of which only the number of ranks that have them is known so far."""
        if not step:
            objects = [entry for entry in found if entry.kind == "object"]
            computed: list[Any] = []
            for entry in objects:
                if entry.sync:
                    check_holders(entry.name, int(found[entry]), self.world)
                computed.append(compute_object(entry.name, entry.object, self.world, sync=entry.sync))
            for entry, value in zip(objects, _all_read(computed), strict=True):
                found[entry] = value
        return {entry.reported(step=step): value for entry, value in found.items()}

    # -- every value that is not the plain case -----------------------------------------------------------------------
    def _register(self, name: str, options: tuple[Any, ...]) -> Entry:
        """Make the entry of a name that was never logged here, after checking the name and the options."""
        if not isinstance(name, str) or not name:
            raise ConfigError(f"log() got {name!r} as a metric's name; it takes a string that is not empty.")
        on_step, on_epoch, prog_bar, reduce, _ = options
        if reduce not in REDUCTIONS:
            raise unknown_name("reduction", str(reduce), REDUCTIONS, where=f"for the metric {name!r}")
        if not on_step and not on_epoch:
            raise ConfigError(
                f"log({name!r}) has on_step=False and on_epoch=False, so it would never be reported. "
                "Set on_step=True (the value at each log point) or on_epoch=True (over the epoch)."
            )
        entry = Entry(name, options)
        reported = {entry.reported(step=True)} if on_step else set()
        reported |= {entry.reported(step=False)} if on_epoch else set()
        for other in self._entries.values():
            if twice := reported & {other.reported(step=True), other.reported(step=False)}:
                raise ConfigError(
                    f"log({name!r}) and log({other.name!r}) would both be reported as {twice.pop()!r}: a name with on_step and "
                    "on_epoch gets the endings _step and _epoch. Give one of them another name."
                )
        self._entries[name] = entry
        if prog_bar:
            self.prog_bar_names |= reported
        return entry

    def _log_other(self, entry: Entry, value: Any, weight: Any) -> None:
        """Log numbers, sums and extremes, weights on the device, objects, and the first tensor of a name."""
        tensors = weight.__class__ is Tensor and value.__class__ is Tensor and weight.ndim == value.ndim == 0
        if tensors and entry.placed and not entry.unit and self.batch_samples:
            return self._add(entry, value.detach(), weight.detach())  # as with tokens that are counted on the device
        w = self.batch_samples if weight is None else _checked_weight(entry, weight)
        if value.__class__ in _NUMBERS:
            pass
        elif isinstance(value, Tensor):
            value = one_element(entry.name, value)
        elif is_metric_object(value):
            return self._log_object(entry, value, w)
        else:
            value = as_number(entry.name, value)
        if entry.kind != "value":
            entry.set_kind("value")
        if not self.batch_samples or (w.__class__ is not Tensor and w == 0):
            return  # padding, or of no weight: the name is known, the value counts for nothing, be it NaN
        self._add(entry, value, w)

    def _add(self, entry: Entry, value: Any, w: Any) -> None:
        """Add a checked value to the running values."""
        if w.__class__ is Tensor:
            value, w = weighted(entry, value, w)
        elif value.__class__ is Tensor and not (entry.placed and value.device == entry.epoch.tensor.device):
            entry.place(value.device)
        if entry.on_epoch:
            add(entry, entry.epoch, value, w)
        if entry.on_step:
            add(entry, self._step_part(entry), value, w)

    def _step_part(self, entry: Entry) -> Part:
        """The part of the current step's window; what an earlier step left in it is dropped."""
        part = entry.step
        if part.window != self.window:
            part.clear()
            part.window = self.window
        return part

    def _log_object(self, entry: Entry, value: Any, w: float | Tensor) -> None:
        """Remember the object for `flush_epoch`; what its forward returned for this batch is the step's value."""
        if entry.kind != "object":
            entry.set_kind("object")
        if entry.object is not value and entry.epoch.weight:
            raise ConfigError(
                f"log({entry.name!r}) got a second {type(value).__name__} within one epoch; one name reports one object. "
                "Make it once, in __init__, or give the two different names."
            )
        entry.object = value
        if not self.batch_samples:
            return
        entry.epoch.weight += 1
        if entry.on_step:
            last = getattr(value, "_forward_cache", None)
            if not isinstance(last, Tensor):
                raise ConfigError(
                    f"log({entry.name!r}, on_step=True) got a {type(value).__name__} that has no value for this batch. Call "
                    "the object itself (its forward) instead of update(), or log it with on_step=False, on_epoch=True."
                )
            last = one_element(entry.name, last)
            entry.place(last.device)
            add(entry, self._step_part(entry), last, w)

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return this rank's running values, as a float64 tensor and JSON. Each rank saves its own: see `load_states`.

        The states of objects are not in it: metric_objects.objects_state has them.
        """
        entries = [entry for entry in self._entries.values() if entry.kind == "value"]
        parts = [part for entry in entries for part in (entry.step, entry.epoch)]
        rows = [[part.scale, part.number, part.weight, 0.0, 0.0] for part in parts]
        held = [(i, 3, part.tensor) for i, part in enumerate(parts) if part.scale]
        held += [(i, 4, part.weight_tensor) for i, part in enumerate(parts) if part.weighted]
        for (i, column, _), value in zip(held, read([tensor for _, _, tensor in held]), strict=True):
            rows[i][column] = value
        return {
            "names": [[entry.name, *entry.options] for entry in entries],
            "windows": [part.window for part in parts],
            "values": torch.tensor(rows, dtype=torch.float64).reshape(len(parts), 5),
            "is_duplicate": self.world.is_duplicate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a `state_dict()`: the running means go on, bit for bit, where they stood."""
        self._entries.clear()
        self.prog_bar_names.clear()
        self._agreed = None
        rows = state["values"].tolist()
        for k, (name, *options) in enumerate(state["names"]):
            entry = self._register(name, tuple(options))
            entry.set_kind("value")
            for i, part in ((2 * k, entry.step), (2 * k + 1, entry.epoch)):
                part.scale, part.number, part.weight, value, weight_value = rows[i]
                part.window = state["windows"][i]
                part.weighted = bool(weight_value)
                # On the CPU until the next value comes, to whose device `place` moves them.
                part.tensor = torch.tensor(value, dtype=torch.float64)
                part.weight_tensor = torch.tensor(weight_value, dtype=torch.float64)

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's part of the states of all ranks, in order of rank, of the run that is resumed.

        On as many ranks each takes its own. Otherwise rank 0 (the first that counts) takes them all and the others none: what
        is reported over the ranks stays what it was.
        """
        speaks = [not state.get("is_duplicate", False) for state in states]
        if self.world.mesh is None and all(speaks):
            same, first = len(states) == self.world.size, self.world.rank == 0
        else:  # ranks of tp and pp hold what another one counts: who that is may be another now
            now = [not duplicate for duplicate in self.world.gather_json(self.world.is_duplicate)]
            same, first = speaks == now, self.world.rank == now.index(True)
        if same:
            self.load_state_dict(states[self.world.rank])
        else:
            self.load_state_dict(_merged([s for s, counts in zip(states, speaks, strict=True) if counts and first]))


def _alone(entries: list[Entry], step: bool) -> dict[Entry, float]:
    """The values of this rank alone."""
    return results(entries, fold_on_host(*pack(entries, step=step, rank=0, size=1)), step=step, size=1)


def _merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fold the states of several ranks into one: sums and weights add up, extremes stay the extremes."""
    names: dict[str, list[Any]] = {}
    rows: dict[tuple[str, int], list[float]] = {}
    windows: dict[tuple[str, int], int | None] = {}
    for state in states:
        values = state["values"].tolist()
        for k, (name, *options) in enumerate(state["names"]):
            names.setdefault(name, options)
            reduce = options[_OPTIONS.index("reduce")]
            for half in range(2):
                scale, number, weight, value, weight_value = values[2 * k + half]
                row = rows.setdefault((name, half), [0.0, EMPTY.get(reduce, 0.0), 0.0, 0.0, 0.0])
                row[1] = joined(reduce, [row[1], number, *([scale * value] if scale else [])])
                row[2] += weight + weight_value
                window = state["windows"][2 * k + half]
                windows[name, half] = window if windows.get((name, half)) is None else windows[name, half]
    order = [(name, half) for name in names for half in range(2)]
    return {
        "names": [[name, *options] for name, options in names.items()],
        "windows": [windows[key] for key in order],
        "values": torch.tensor([rows[key] for key in order], dtype=torch.float64).reshape(len(order), 5),
    }


def _all_read(values: Sequence[Tensor | float]) -> list[float]:
    """Computed values as numbers, with one copy to the host for all that are tensors."""
    numbers = iter(read([value for value in values if isinstance(value, Tensor)]))
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]


def _checked_weight(entry: Entry, weight: Any) -> float | Tensor:
    if entry.reduce != "mean":
        raise ConfigError(
            f"log({entry.name!r}, reduce={entry.reduce!r}) got a weight, and only a mean has weights. "
            "Leave it out, or use reduce='mean'."
        )
    if isinstance(weight, Tensor):
        return one_element(entry.name, weight, "weight")
    number = as_number(entry.name, weight, "weight")
    if not 0 <= number < math.inf:
        raise DataError(f"log({entry.name!r}) got the weight {weight!r}; a weight is a finite number of at least 0.")
    return number


def _conflict(entry: Entry, options: tuple[Any, ...], where: str = "now") -> ConfigError:
    changed = [
        f"{name}={new!r} {where} and {name}={old!r} {'before' if where == 'now' else 'on another'}"
        for name, old, new in zip(_OPTIONS, entry.options, options, strict=True)
        if old != new
    ]
    return ConfigError(
        f"log({entry.name!r}) got {', '.join(changed)}; a metric keeps its options for the whole run. "
        "Use the same ones in every call, or another name."
    )
