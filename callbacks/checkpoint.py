"""Save the run: every so often, when a metric is good, at the end, on an exception; and delete what is no longer wanted.

    Checkpoint()                                        at each epoch's end, and at the end of training; the newest is kept
    Checkpoint("500step", save_top_k=3)                 the three newest
    Checkpoint(monitor="val_loss", save_top_k=2)        after each validation: the two best, and the newest
    Checkpoint(dirpath="s3://bucket/mine")              in this folder, not in that of the run

Options and attributes have the names and the meaning of Lightning's ModelCheckpoint. What differs: `every` takes typed
intervals (interval.py); several intervals may be given; `save_last` is on, since it is what a killed run goes on from; a
checkpoint's name is its step. One that is not kept is deleted only after a newer one is committed.
The training waits for a copy of the state, not for the disk; a save that fails is raised after the step in which that is known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import timedelta
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..strategies.errors import CheckpointError, ConfigError, unknown_name
from .base import Callback
from .interval import Every

if TYPE_CHECKING:
    from torch import nn

    from ..strategies.checkpoint.store import CheckpointStore
    from .base import ProgressView, SaveHandle, TrainerView

__all__ = ["Checkpoint"]

_OPTIONS = (
    *("every", "dirpath", "monitor", "mode", "save_top_k", "save_last", "save_on_train_epoch_end", "save_on_train_end"),
    *(
        "save_on_exception",
        "every_n_steps",
        "every_n_train_steps",
        "every_n_epochs",
        "every_n_minutes",
        "train_time_interval",
        "key",
        "wait",
        "on_error",
    ),
)


class Checkpoint(Callback):
    """Saves through `trainer.save_checkpoint`, at optimizer boundaries only.

    Attributes:
        best_model_path, best_model_score: of the best so far by `monitor` (without one: the newest); "" and None at first.
        best_k_models: path -> score of all that are kept as best;  last_model_path: the newest.
        is_best: while a save is under way: whether it is the best so far.
        next_step: the optimizer step at which `on_checkpoint_step` has something to do next; before it, it returns at once.
    """

    state_is_required = False
    """A run may be resumed with other callbacks than it was saved with."""

    def __init__(
        self,
        every: str | int | timedelta | Every | Iterable[str | int | timedelta | Every] | None = None,
        *,
        dirpath: str | PathLike[str] | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        save_on_train_epoch_end: bool | None = None,
        save_on_train_end: bool = True,
        save_on_exception: bool = False,
        every_n_steps: int | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        every_n_minutes: float | None = None,
        train_time_interval: timedelta | None = None,
        key: str | None = None,
        wait: bool = False,
        on_error: str = "raise",
        **unknown: Any,
    ) -> None:
        """Without any interval: after each validation if there is a `monitor`, else at each epoch's end.

        Args:
            every: one interval or several: "500step" "1ep" "10m" "1e9tok"; a number counts optimizer steps.
            dirpath: the folder of the checkpoints, or a URL that fsspec knows (memory://, s3://, ...); by default checkpoints/ in
                the run's own folder (Trainer(root=..., name=...)). It belongs to one run: resume="auto" goes on with what is in
                it, and a new run is refused there. Several Checkpoints of a run share one.
            monitor: the name of a logged metric. Between two values of it, its last one counts.
            mode: "min" or "max": which values are good.
            save_top_k: how many of the best are kept; without `monitor`, of the newest. 0: none, -1: all.
            save_last: the newest is kept too, and every save that is due is made, good or not.
            save_on_train_epoch_end: True: at epochs' ends too. False: never there, except by an interval in epochs.
            save_on_exception: one process only: many cannot save together when one of them failed.
            key: names the state of this callback in a checkpoint, when there are several of a kind.
            wait: True: the training waits until each checkpoint is on the disk.
            on_error: "raise" ends the training when a checkpoint cannot be written (a full disk); "warn" prints a warning
                and goes on: what was saved before stays, and the next one is tried.
        Raises:
            ConfigError: an option that does not exist, or a value that makes no sense.
        """
        if unknown:
            raise _unknown_option(next(iter(unknown)))
        if mode not in ("min", "max"):
            raise ConfigError(f"Checkpoint(mode={mode!r}): expected 'min' or 'max'.")
        if on_error not in ("raise", "warn"):
            raise ConfigError(f"Checkpoint(on_error={on_error!r}): expected 'raise' or 'warn'.")
        if type(save_top_k) is not int or save_top_k < -1:
            raise ConfigError(f"Checkpoint(save_top_k={save_top_k!r}): expected a whole number, 0 for none or -1 for all.")
        if dirpath is not None and (not isinstance(dirpath, str | PathLike) or dirpath == ""):
            raise ConfigError(f"Checkpoint(dirpath={dirpath!r}): expected a folder or a URL.")
        if monitor is not None and not isinstance(monitor, str):
            raise ConfigError(f"Checkpoint(monitor={monitor!r}): expected the name of a logged metric, such as 'val_loss'.")
        if not isinstance(save_last, bool):
            raise ConfigError(f"Checkpoint(save_last={save_last!r}): expected True or False. Nothing is linked or copied here.")
        self.dirpath = dirpath
        self.monitor, self.mode, self.save_top_k, self.save_last = monitor, mode, save_top_k, save_last
        self.save_on_train_end, self.save_on_exception = save_on_train_end, save_on_exception
        self._key, self.wait, self.on_error = key, wait, on_error
        if not isinstance(every, str | int | timedelta | Every | Iterable | None):
            raise ConfigError(
                f'Checkpoint(every={every!r}): expected one interval or several, such as "500step" or ["1ep", "10m"].'
            )
        given = [every] if isinstance(every, str | int | timedelta | Every) else list(every or ())
        given += [n for n in (every_n_steps, every_n_train_steps, train_time_interval) if n is not None]
        self.intervals = [Every.parse(e) for e in given]
        self.intervals += [Every.parse(every_n_epochs, unit="ep")] if every_n_epochs is not None else []
        self.intervals += [Every(every_n_minutes * 60, "seconds")] if every_n_minutes is not None else []
        automatic = not self.intervals
        self._after_validation = automatic and (monitor is not None or save_on_train_epoch_end is False)
        self._at_epoch_without_validation = self._after_validation and save_on_train_epoch_end is None
        if save_on_train_epoch_end or (automatic and not self._after_validation):
            self.intervals.append(Every(1, "epoch"))
        # A hook that is not there costs nothing: a run that saves at epochs' ends only has no step hook.
        if self._after_validation or any(e.counter != "epoch" for e in self.intervals):
            self.on_checkpoint_step = self._on_step

        self.next_step: float = 0
        self.is_best = False
        self._kept: list[tuple[int, float | None]] = []  # best first; without a monitor newest first
        self._last: int | None = None
        self._removing: list[int] = []  # no longer wanted, but still there: a kill came first, or somebody needs them
        self._seen_monitor = False
        self._counts: list[float] = []  # of each interval, when it was last due
        self._position: tuple[int, int, int] | None = None  # of the last save
        self._sane = True
        self._validated = self._validated_once = False
        self._started_s = 0.0
        self._started_step = 0
        self._store: CheckpointStore | None = None
        self._saving: tuple[SaveHandle, list[tuple[int, float | None]], int | None] | None = None  # and what was kept before

    # -- what users read ----------------------------------------------------------------------------------------------
    @property
    def best_model_path(self) -> str:
        return self._path(self._kept[0][0]) if self._kept else ""

    @property
    def best_model_score(self) -> float | None:
        return self._kept[0][1] if self._kept else None

    @property
    def best_k_models(self) -> dict[str, float | None]:
        return {self._path(step): score for step, score in self._kept}

    @property
    def last_model_path(self) -> str:
        steps = [step for step, _ in self._kept] + ([] if self._last is None else [self._last])
        return self._path(max(steps)) if steps else ""

    @property
    def state_key(self) -> str:
        return self._key or (f"Checkpoint[{self.monitor},{self.mode}]" if self.monitor else "Checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, as it is once the save that is under way is committed."""
        return {
            "kept": [list(entry) for entry in self._kept],
            "last": self._last,
            "removing": list(self._removing),
            "seen_monitor": self._seen_monitor,
            "validated": self._validated_once,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._store is not None:
            for step in self._steps():
                self._store.release(step, by=self.state_key)
        self._kept = [(int(step), score) for step, score in state["kept"]]
        self._last = state["last"]
        self._removing = list(state["removing"])
        self._seen_monitor = state["seen_monitor"]
        self._validated_once = state["validated"]

    # -- moments ------------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._store = trainer.store
        self._started_s, self._started_step = time.monotonic(), trainer.progress.global_step
        self._counts = [0.0 for _ in self.intervals]
        self._begin(trainer)
        if trainer.is_resumed:
            trainer.store.protect(trainer.progress.global_step, by="resumed")

    def on_load_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        if self._store is not None:  # in the middle of a training that was rolled back; a resumed one has not started yet
            self._saving = None
            self._begin(trainer)

    def _begin(self, trainer: TrainerView) -> None:
        """Go on from where the progress stands, with the checkpoints that are there."""
        progress = trainer.progress
        self._counts = [n if e.is_time else e.now(progress) for e, n in zip(self.intervals, self._counts, strict=True)]
        self._position = _position(progress)
        self._validated = False
        self._plan(trainer)
        # Somebody may have deleted some by hand. Rank 0 looks, so that all ranks know the same.
        there = None
        if trainer.world.rank == 0:
            there = [step for step in self._steps() if trainer.store.path_of(step) is not None]
        there = set(trainer.world.broadcast_json(there))
        self._kept = [entry for entry in self._kept if entry[0] in there]
        self._last = self._last if self._last in there else None
        for step in self._wanted():
            trainer.store.protect(step, by=self.state_key)

    def on_sanity_check_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._sane = False

    def on_sanity_check_end(self, trainer: TrainerView, module: nn.Module) -> None:
        self._sane = True

    def on_validation_end(self, trainer: TrainerView, module: nn.Module) -> None:
        if self._sane and trainer.stage == "fit":
            self._validated = self._validated_once = True
            if self._after_validation:
                self.next_step = 0  # on_checkpoint_step follows at once, unless this is the epoch's end

    def _on_step(self, trainer: TrainerView, module: nn.Module) -> None:
        if trainer.progress.global_step >= self.next_step:
            due = self._due(trainer, at_epoch=False) or (self._after_validation and self._validated)
            self._plan(trainer)
            if due:
                self._save(trainer, at_epoch=False)

    def on_checkpoint_epoch(self, trainer: TrainerView, module: nn.Module) -> None:
        due = self._due(trainer, at_epoch=True) or (self._after_validation and self._validated)
        if due or (self._at_epoch_without_validation and not self._validated_once):
            self._save(trainer, at_epoch=True)
        self._validated = False
        self._plan(trainer)

    def on_train_end(self, trainer: TrainerView, module: nn.Module) -> None:
        if self.save_on_train_end and _position(trainer.progress) != self._position:
            self._write(trainer, self._score(trainer))
        self._settle(trainer)
        if self.monitor is not None and not self._seen_monitor and trainer.progress.global_step > self._started_step:
            raise self._no_metric(trainer)

    def on_exception(self, trainer: TrainerView, module: nn.Module, exception: BaseException) -> None:
        if not self.save_on_exception or isinstance(exception, CheckpointError) or self._store is None:
            return
        if _position(trainer.progress) == self._position:
            return
        if trainer.world.size > 1:
            trainer.print("save_on_exception: not saved. With several processes, all of them would have to save together.")
            return
        try:
            self._write(trainer, None, wait=True)
        except Exception as error:  # the exception that ended the run is the one to be seen
            trainer.print(f"save_on_exception: not saved. {type(error).__name__}: {error}")

    def save(self, trainer: TrainerView) -> bool:
        """Save now, as the newest, whatever is due: the run was told to end. Return whether this position is saved."""
        self._write(trainer, None)
        return self._position == _position(trainer.progress)

    # -- is it time? --------------------------------------------------------------------------------------------------
    def _due(self, trainer: TrainerView, *, at_epoch: bool) -> bool:
        """Ask every interval, and note for each that was due when that was."""
        due = False
        for i, every in enumerate(self.intervals):
            if every.is_time:
                # At an epoch's end ranks need not ask: the next step does.
                if not at_epoch and self._time_is_up(trainer, every.n, self._counts[i]):
                    self._counts[i] = time.monotonic() - self._started_s
                    due = True
            else:
                due = every.due(trainer.progress, self._counts[i]) or due
                self._counts[i] = every.now(trainer.progress)
        return due

    def _time_is_up(self, trainer: TrainerView, interval_s: float, last_s: float) -> bool:
        elapsed_s = time.monotonic() - self._started_s
        if trainer.world.size > 1:
            elapsed_s, last_s = trainer.world.broadcast_json([elapsed_s, last_s])  # rank 0's clock counts
        return elapsed_s - last_s >= interval_s

    def _plan(self, trainer: TrainerView) -> None:
        """Find the next step at which `_due` has to be asked."""
        progress = trainer.progress
        step, nearest = progress.global_step, math.inf
        for every in self.intervals:
            if every.counter == "global_step":
                nearest = min(nearest, every.next(step))
            elif every.is_time and trainer.world.size > 1:
                nearest = min(nearest, step + self._steps_until_time(trainer))
            elif every.counter != "epoch":
                nearest = min(nearest, step + 1)
        self.next_step = nearest

    def _steps_until_time(self, trainer: TrainerView) -> int:
        """Return after how many steps to ask again: half of those that rank 0 expects until the first interval is over.

        So a run of many ranks asks a few times an interval, not at each step, and is late by one step at most.
        """
        elapsed_s = time.monotonic() - self._started_s
        steps = trainer.progress.global_step - self._started_step
        left = [e.n - (elapsed_s - last_s) for e, last_s in zip(self.intervals, self._counts, strict=True) if e.is_time]
        wait = max(1, int(min(left) / 2 * steps / elapsed_s)) if steps and elapsed_s > 0 else 1
        return trainer.world.broadcast_json(min(wait, 1000))

    # -- save ---------------------------------------------------------------------------------------------------------
    def _save(self, trainer: TrainerView, *, at_epoch: bool) -> None:
        score = self._score(trainer)
        if (
            score is None
            and self.monitor is not None
            and (self._validated_once or (at_epoch and not self.monitor.startswith("val")))
        ):
            raise self._no_metric(trainer)
        self._validated = False
        self._write(trainer, score)

    def _write(self, trainer: TrainerView, score: float | None, *, wait: bool = False) -> None:
        """Save if it would be kept, then delete what is no longer wanted (all ranks together)."""
        position = _position(trainer.progress)
        if position == self._position:
            return
        self._settle(trainer)
        step, store = trainer.progress.global_step, trainer.store
        kept = self._ranked([entry for entry in self._kept if entry[0] != step], (step, score))
        if not self.save_last and all(entry[0] != step for entry in kept):
            return
        before = (self._kept, self._last)
        old = set(self._steps())
        # The checkpoint holds this state as it is after the save, with what is to go: a kill in between loses nothing.
        self._kept, self._last = kept, step if self.save_last else None
        self._removing = sorted(old - set(self._wanted()))
        self.is_best = bool(kept) and kept[0][0] == step and (self.monitor is None or score is not None)
        for gone in self._removing:
            store.release(gone, by=self.state_key)
        for wanted in self._wanted():
            store.protect(wanted, by=self.state_key)
        try:
            handle = trainer.save_checkpoint(
                wait=wait or self.wait, remove=self._removing, required=self.on_error == "raise" or wait
            )
        except BaseException:
            self._go_back(store, *before)
            raise
        finally:
            self.is_best = False
        self._saving, self._position = (handle, *before), position
        if handle.done:
            self._settle(trainer)

    def _settle(self, trainer: TrainerView) -> None:
        """Wait for the last save, and see what it left."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        handle, kept, last = saving
        if self.on_error == "raise":
            try:
                handle.wait()
            except BaseException:
                self._go_back(trainer.store, kept, last)
                raise
        trainer.store.join()
        if handle.failed:  # the trainer warns
            self._go_back(trainer.store, kept, last)
        self._removing = [step for step in self._removing if trainer.store.path_of(step) is not None]

    def _go_back(self, store: CheckpointStore, kept: list[tuple[int, float | None]], last: int | None) -> None:
        """Keep what was kept before a save that failed."""
        steps = set(self._steps())
        self._kept, self._last, self._position = kept, last, None
        for step in self._wanted():
            store.protect(step, by=self.state_key)
        for step in steps - set(self._wanted()):
            store.release(step, by=self.state_key)
        self._removing = [step for step in sorted(steps - set(self._wanted())) if store.path_of(step) is not None]

    def _ranked(self, entries: list[tuple[int, float | None]], new: tuple[int, float | None]) -> list[tuple[int, float | None]]:
        """Return the entries that save_top_k leaves, best first."""
        if self.monitor is None:
            ranked = [new, *entries]
        else:
            sign = 1 if self.mode == "min" else -1
            scored = [entry for entry in (*entries, new) if entry[1] is not None and not math.isnan(entry[1])]
            ranked = sorted(scored, key=lambda entry: sign * (entry[1] or 0.0))  # equal scores: the older one stays first
        return ranked if self.save_top_k == -1 else ranked[: self.save_top_k]

    def _score(self, trainer: TrainerView) -> float | None:
        if self.monitor is None or self.monitor not in trainer.metrics:
            return None
        self._seen_monitor = True
        return float(trainer.metrics[self.monitor])

    def _no_metric(self, trainer: TrainerView) -> ConfigError:
        return unknown_name("metric", str(self.monitor), trainer.metrics, where="among those logged, for Checkpoint(monitor=...)")

    def _wanted(self) -> list[int]:
        return [step for step, _ in self._kept] + ([] if self._last is None else [self._last])

    def _steps(self) -> list[int]:
        return [*self._wanted(), *self._removing]

    def _path(self, step: int) -> str:
        if self._store is None:
            return ""
        path = self._store.path_of(step)
        if path is None:  # perhaps it is being written
            self._store.join()
            path = self._store.path_of(step)
        return str(path) if path is not None else ""


def _position(progress: ProgressView) -> tuple[int, int, int]:
    return progress.global_step, progress.batches, progress.epoch


def _unknown_option(name: str) -> ConfigError:
    if name in ("filename", "auto_insert_metric_name", "enable_version_counter"):
        return ConfigError(
            f"Checkpoint has no {name}: a checkpoint is a folder named for its step, step-00000042, and its metrics stand in it "
            "(drivetrain ckpt ls shows them). Choose where they lie with Checkpoint(dirpath=...) or Trainer(root=..., name=...)."
        )
    return unknown_name("option", name, _OPTIONS, where="of Checkpoint")
