"""What a running trainer offers to its loops and callbacks: counters, values, schedulers, saving and stopping.

`Trainer` inherits from `Runtime`; what callbacks may use of it is `callbacks.base.TrainerView`. Nothing here knows how a run is
put together: that is session.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..strategies import control as codes
from ..strategies.errors import CheckpointError, ConfigError, suggest
from . import state as run_state
from .boundary import EPOCH, Boundary
from .defaults import make_accelerator
from .facts import Facts
from .hparams import plain
from .launch.script import ensure_ranks
from .rollback import RollBack, RollsBack
from .running_values import RunningValues
from .save_handle import Saving

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..callbacks.base import Callback
    from ..callbacks.runner import HookRunner
    from ..strategies.base import Strategy
    from ..strategies.checkpoint.store import CheckpointStore
    from ..strategies.precision.base import Precision
    from ..strategies.world import World
    from .accelerator import Accelerator
    from .clock import Clock
    from .data.loader import Loader
    from .loops.progress import Progress
    from .metrics import Metrics
    from .module import TrainingModule
    from .optimizers import SchedulerConfig
    from .process import SignalHandlers
    from .run_folder import RunFolder
    from .tracking import Tracking

__all__ = ["Leave", "Runtime", "Saving"]

_KEPT_BY_SIGNAL = codes.INTERRUPTED | codes.TERMINATED | codes.REQUEUE


class Leave(BaseException):
    """Breaks off an evaluation, on all ranks at the same batch, because the process is to end. `code` is what was agreed on."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Runtime(RollsBack, Facts):
    """The state of a run, and what its loops and callbacks do with it."""

    # Set by Trainer.__init__.
    progress: Progress
    clock: Clock
    callbacks: list[Callback]
    max_epochs: int | None
    max_steps: int | None
    fast_dev_run: int
    log_every_n_steps: int
    options: dict[str, Any]
    config: dict[str, Any]

    def __init__(self) -> None:
        self.stage = ""
        self.metrics: dict[str, float] = {}
        self.resolved_config: dict[str, Any] = {}  # what a checkpoint says of the arguments, and of what became of them
        self.should_stop = False
        self.signals: SignalHandlers | None = None  # while a call runs: callbacks may say what a signal means
        self.leaving = 0  # the flags of the signal or limit for which the run leaves after its save
        self.stop_reason = ""
        self.is_resumed = False
        self.resumed_mid_epoch = False
        self.due: tuple[str, ...] = ()  # what a resumed run has to do first (boundary.py)
        self.rolling_back: RollBack | None = None  # what the loop does when the step is done
        self.in_window = False  # a step, or an epoch's end, is under way: no checkpoint can be taken
        self.pending_saves: list[Saving] = []
        self.save_failed = False  # set by the thread that writes; taken up after the running step
        self._saving: Saving | None = None  # the last one
        self.scheduler_configs: list[SchedulerConfig] = []
        self.step_schedulers: list[SchedulerConfig] = []
        self.epoch_schedulers: list[SchedulerConfig] = []
        self.val_loaders: dict[str, Loader] = {}
        self.val_every_steps = 0
        self.module_clips = False
        self.logs_loss = True
        self.num_training_batches: int | None = None
        self.fitted: TrainingModule | None = None  # the module of the last fit, whose callbacks `callbacks` are
        self._accelerator: Accelerator | None = None
        self._module: TrainingModule | None = None
        self._store: CheckpointStore | None = None
        self._tracking: Tracking | None = None
        self._train_metrics: Metrics | None = None
        self._train_loader: Loader | None = None
        self._hooks: HookRunner | None = None
        self.run_folder: RunFolder | None = None
        self._boundary: Boundary | None = None
        self._broken_off = False  # what is saved is `_boundary`
        self.notes_steps = False  # whether the state is noted after every step, for a Checkpoint(save_on_exception=True)
        self._asked_meanwhile = 0
        self._tokens: Tensor | None = None  # counted on a device since the last `catch_up`

    # -- what is there ------------------------------------------------------------------------------------------------
    @property
    def accelerator(self) -> Accelerator:
        """The raw API that the runs are made of, started when first asked for: what a loop of your own would use."""
        if self._accelerator is None:
            devices = self.options["devices"]
            ensure_ranks(None if devices == "auto" else devices, self.options["num_nodes"])
            self._accelerator = make_accelerator(self)  # pyright: ignore[reportArgumentType]  # a Runtime is always a Trainer
        return self._accelerator

    @property
    def module(self) -> TrainingModule:
        return _present(self._module, "module")

    @property
    def store(self) -> CheckpointStore:
        return _present(self._store, "store")

    @property
    def tracking(self) -> Tracking:
        return _present(self._tracking, "tracking")

    @property
    def hooks(self) -> HookRunner:
        return _present(self._hooks, "hooks")

    @property
    def train_metrics(self) -> Metrics:
        return _present(self._train_metrics, "train_metrics")

    @property
    def train_loader(self) -> Loader:
        return _present(self._train_loader, "train_loader")

    @property
    def root(self) -> Path:
        """The run's folder."""
        return _present(self.run_folder, "run_folder").path

    @property
    def world(self) -> World:
        return self.accelerator.world

    @property
    def strategy(self) -> Strategy:
        return self.accelerator.strategy

    @property
    def precision(self) -> Precision:
        return self.accelerator.precision

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        return self.accelerator.optimizers

    @property
    def schedulers(self) -> Sequence[Any]:
        return [config.scheduler for config in self.scheduler_configs]

    @property
    def loggers(self) -> Sequence[Any]:
        return self.tracking.loggers

    @property
    def global_step(self) -> int:
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        return self.progress.epoch

    def print(self, text: str) -> None:
        """Print on the main process only."""
        self.accelerator.print(text, flush=True)

    # -- values -------------------------------------------------------------------------------------------------------
    def log_into(self, metrics: Metrics | None, on_step: bool, on_epoch: bool) -> tuple[Metrics | None, bool, bool]:
        """Let the module's `log` go to `metrics`, with these defaults; return what it was before."""
        module = self.module
        before = (module._metrics, *module._defaults)
        module._metrics, module._defaults = metrics, (on_step, on_epoch)
        return before

    @property
    def log_suffix(self) -> str:
        """What `log` puts behind every name: which of several loaders is evaluated."""
        return self.module._log_suffix

    @log_suffix.setter
    def log_suffix(self, suffix: str) -> None:
        self.module._log_suffix = suffix

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a value from a callback: it goes out with the next log point."""
        self.train_metrics.log(name, value, on_step=True, on_epoch=False, sync=False, weight=1.0)

    def log_point(self, metrics: Metrics) -> None:
        """Reduce what was logged since the last log point, tell the callbacks, and hand it to the loggers."""
        self.catch_up()
        self.accelerator.check_finite()
        values = metrics.flush_step()
        norm = self.accelerator.last_grad_norm
        if norm is not None and self.logs_loss:
            values.setdefault("grad_norm", float(norm))
        self.publish(values)

    def count_tokens(self, count: Tensor | float) -> None:
        """Add the items of a step. On a device they are added up there, and read by `catch_up`."""
        if isinstance(count, Tensor):
            self._tokens = count if self._tokens is None else self._tokens + count
        else:
            self.progress.tokens += int(count)

    def catch_up(self) -> None:
        """Bring the counters that are not kept up at every step up to date: seconds, and tokens on a device."""
        self.clock.note()
        if self._tokens is not None:
            self.progress.tokens += int(self._tokens.item())
            self._tokens = None

    def report_epoch(self, metrics: Metrics) -> None:
        """Reduce what was logged over the epoch."""
        values = metrics.flush_epoch()
        if values:
            self.publish(values)

    def publish(self, values: dict[str, float]) -> None:
        """Make reduced values known: to callbacks (on_log may add to them), to `metrics`, and to the loggers."""
        if self.stage == "fit":
            self.metrics.update(values)
            for hook in self.hooks.on_log:
                hook(values, self.progress.global_step)
        self.metrics.update(values)
        if self._tracking is not None:
            self._tracking.log(values, self.progress.global_step, epoch=self.progress.epoch)

    # -- schedulers ---------------------------------------------------------------------------------------------------
    def run_schedulers(self, configs: Iterable[SchedulerConfig], count: int) -> None:
        """Step those of `configs` that are due at the `count`th step or epoch."""
        for config in configs:
            if count % config.frequency:
                continue
            value: float | None = None
            if config.monitor is not None:
                value = self.metrics.get(config.monitor)
                if value is None:
                    if config.strict:
                        raise ConfigError(
                            f"A scheduler monitors {config.monitor!r}, and nothing of that name was logged by the end of "
                            f"{config.interval} {count}.{suggest(config.monitor, self.metrics)} "
                            f"Logged: {', '.join(sorted(self.metrics)) or 'nothing'}."
                        )
                    continue
            self.module.lr_scheduler_step(config.scheduler, value)

    # -- limits and stopping ------------------------------------------------------------------------------------------
    def reached_limit(self) -> bool:
        """Whether the run is as long as it was asked to be."""
        progress = self.progress
        return (self.max_epochs is not None and progress.epoch >= self.max_epochs) or (
            self.max_steps is not None and progress.global_step >= self.max_steps
        )

    def take_resumed_mid_epoch(self) -> bool:
        """Return whether the epoch that begins was begun before the resume; true once."""
        resumed, self.resumed_mid_epoch = self.resumed_mid_epoch, False
        return resumed

    def stop(self, reason: str) -> None:
        """Ask all ranks to end the training after the current step."""
        self.world.control.request(codes.STOP, reason)

    def agree(self) -> None:
        """Take up, on all ranks at once, what any rank asked for. Collective; at epoch ends and after validations."""
        control = self.world.control
        code = control.agree(control.requested) | self._asked_meanwhile
        self._asked_meanwhile = 0
        if code:
            self.obey(code)

    def look_up(self, batch_idx: int) -> None:
        """Between two batches of an evaluation: leave it if any rank was told to end. All ranks have the same number of batches.

        Raises:
            Leave: on all ranks at the same batch.
        """
        control = self.world.control
        code = control.tick(batch_idx)
        if code & _KEPT_BY_SIGNAL:
            raise Leave(code)
        self._asked_meanwhile |= code

    def obey(self, code: int) -> None:
        """Do what all ranks agreed on, at a boundary: save, and stop or leave."""
        reason = self.world.control.reason
        if code & codes.SAVE_FAILED:
            self.settle_saves()
        if code & codes.SAVE and self.options["enable_checkpointing"] and not self.fast_dev_run:
            self._save_now()
        if code & (codes.STOP | _KEPT_BY_SIGNAL):
            self.should_stop = True
            self.stop_reason = reason
            self.leaving = code & _KEPT_BY_SIGNAL
            self.print(f"stopping at step {self.progress.global_step}: {reason}")

    # -- validation within fit ----------------------------------------------------------------------------------------
    def epoch_validates(self) -> bool:
        """Whether the running epoch is one that is validated."""
        every = self.options["check_val_every_n_epoch"]
        return bool(self.val_loaders) and (every is None or (self.progress.epoch + 1) % every == 0)

    def validate_in_fit(self, due: tuple[str, ...]) -> None:
        """Validate between two training steps. Told to leave, it is broken off, and the run resumes with it (`due`)."""
        from .loops.evaluate import evaluate
        from .metrics import Metrics

        self.note(due)
        metrics = Metrics(self.world, stage="validate")
        try:
            evaluate(self, "validation", self.val_loaders, metrics, limit=None, inference=False)  # pyright: ignore[reportArgumentType]
        except Leave as left:
            self._broken_off = True
            self.obey(left.code)
        else:
            self._broken_off = True  # told to leave by now, the run resumes with this validation too
            self.agree()
            self._broken_off = bool(self.leaving)
            if not self.notes_steps and not self.leaving:
                self._boundary = None  # it holds copies of the callbacks' states

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def save_checkpoint(
        self,
        path: str | Path | None = None,
        *,
        wait: bool = False,
        meta: Mapping[str, Any] | None = None,
        remove: Iterable[int] = (),
        required: bool = True,
    ) -> Saving:
        """Save the whole run; every rank calls it. The training waits for a copy of the state only, which a thread writes.

        Inside a step this is done when all that belongs to the step is done. One save is under way; the next waits for it.

        Args:
            path: a folder that holds checkpoints; by default the run's own.
            wait: return when it is committed; raise when it cannot be written at once.
            meta: small plain values to keep readable beside it.
            remove: steps that are deleted once it is committed.
            required: False: if it cannot be written, that is a warning, and the training goes on.
        Raises:
            CheckpointError: the save before could not be written. After the step in which that is known it is raised too.
        """
        saving = Saving(None if path is None else Path(path), meta or {}, remove, required)
        if self.in_window:
            if wait:
                saving.wait()
            self.pending_saves.append(saving)
        else:
            self._write(saving)
            if wait:
                self.settle_saves()
        return saving

    def tell_of_failed_save(self) -> None:
        """Let all ranks know that a checkpoint could not be written beside the training; they raise it at the same step."""
        self.save_failed = False
        self.world.control.request(codes.SAVE_FAILED, "a checkpoint could not be written")

    def settle_saves(self) -> None:
        """Wait until no save is under way.

        Raises:
            CheckpointError: the last one failed, it was required, and nobody was told yet.
        """
        saving, self.save_failed = self._saving, False
        if saving is None or saving.handle is None:
            return
        try:
            self.store.settle()
        except CheckpointError as error:
            if saving.required:
                raise
            self.print(f"warning: {error}")

    def write_pending_saves(self) -> None:
        """Write what was asked for inside the step that is now done."""
        pending, self.pending_saves = self.pending_saves, []
        for saving in pending:
            self._write(saving)

    def note(self, due: Sequence[str] | None = None, *, buffers: bool = False) -> None:
        """Keep the state as it is now, to be saved if what follows breaks off."""
        self.catch_up()
        self._boundary = Boundary.of(self, self.due_now() if due is None else due, buffers=buffers)

    def go_back(self) -> None:
        """After an exception: what is saved now is the state that was noted, unless the weights have changed since."""
        self.in_window = False
        self._broken_off = self._boundary is not None and self._boundary.step == self.progress.global_step

    def due_now(self) -> tuple[str, ...]:
        """Return what a run has to do first that is resumed from the state between two steps."""
        return (EPOCH,) if self.progress.batch_in_epoch and self.train_loader.is_last else ()

    def _save_now(self) -> None:
        """Save because the run ends or was asked to, through the Checkpoint callback, which keeps account of what may go."""
        from ..callbacks.checkpoint import Checkpoint

        in_window, self.in_window = self.in_window, False
        keepers = [c for c in self.callbacks if isinstance(c, Checkpoint)]
        keepers.sort(key=lambda c: not c.save_last)
        if not (keepers and keepers[0].save(self)):  # pyright: ignore[reportArgumentType]
            self.save_checkpoint()
        self.in_window = in_window

    def _write(self, saving: Saving) -> None:
        from ..callbacks.checkpoint import Checkpoint
        from ..strategies.checkpoint.store import CheckpointStore

        self.catch_up()
        self.settle_saves()
        store = self.store if saving.folder is None else CheckpointStore(saving.folder, self.world)
        extra: dict[str, Any] = {}
        self.hooks.call("on_save_checkpoint", extra)
        boundary = self._boundary if self._broken_off else None
        if boundary is None:
            boundary = Boundary(run_state.collect(self.accelerator, self.providers()), self.due_now(), self.metrics)
        found = boundary.found
        # What a Checkpoint knows of its checkpoints is as it will be after this save.
        found.values |= {f"callback/{c.state_key}": c.state_dict() for c in self.callbacks if isinstance(c, Checkpoint)}
        found.values |= {"config": self.resolved_config, "hooks": extra}
        found.values |= {"due": list(boundary.due), "metrics/last": dict(boundary.metrics)}
        meta = {
            "kind": "run",
            "run": self.run_folder.id if self.run_folder is not None else "",
            "progress": dict(boundary.progress),
            "metrics": dict(boundary.metrics),
            "plan": {
                "strategy": self.strategy.name,
                "precision": self.precision.name,
                "data_shards": self.strategy.data_shard[1],
            },
            "hparams": plain(self.module),
            "is_best": any(getattr(c, "is_best", False) for c in self.callbacks),
            **saving.meta,
        }
        self._saving = saving
        saving.handle = store.save(
            boundary.step,
            found.tensors,
            found.values,
            rank_values=found.rank_values,
            rank_tensors=found.rank_tensors,
            meta=meta,
            remove=saving.remove,
            wait=False,
            on_failure=self._note_failed_save,
        )

    def _note_failed_save(self) -> None:
        self.save_failed = True

    def providers(self) -> dict[str, Any]:
        """Return everything beside models and optimizers that a checkpoint holds, by name, in the order of restoring."""
        found: dict[str, Any] = {
            "progress": self.progress,
            "loader/train": self.train_loader,
            "metrics/train": RunningValues(self.train_metrics, self.module),
        }
        found |= {f"registered/{i}": o for i, o in enumerate(self.accelerator.registered)}
        found |= {f"callback/{c.state_key}": c for c in self.stateful_callbacks()}
        return found | {"tracking": self.tracking}

    def stateful_callbacks(self) -> list[Callback]:
        """Return the callbacks that have a state of their own."""
        from ..callbacks.base import Callback
        from ..callbacks.runner import is_overridden

        return [c for c in self.callbacks if is_overridden(c, "state_dict", Callback)]


def _present(value: Any, name: str) -> Any:
    if value is None:
        raise ConfigError(f"Trainer.{name} is there only while fit, validate, test or predict runs (and after it).")
    return value
