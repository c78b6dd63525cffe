"""One call of fit, validate, test or predict: put the run together, guard it, take it apart again.

Entering starts ranks (where they are missing), the world and the accelerator, attaches the module, and installs the signal
handlers. Leaving undoes it; an error is told to the callbacks and the loggers first. `prepare_fit` reads in the order in which
things happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..callbacks.base import Callback
from ..callbacks.loggers.base import RunInfo
from ..callbacks.runner import HookRunner, check_state_keys, find_misspelt, is_overridden
from ..strategies.checkpoint import rng
from ..strategies.environment import read_job
from ..strategies.errors import CheckpointError, ConfigError
from . import defaults, run_data
from . import state as run_state
from .config import tell, tell_batch_size
from .hparams import exact, plain
from .loops.evaluate import evaluate, predict
from .loops.train import TrainLoop
from .metrics import Metrics
from .module import LIGHTNING_ONLY, TrainingModule
from .optimizers import SchedulerConfig, read_optimizers
from .process import SignalHandlers, exit_code_of, move_output
from .run_folder import check_shared, open_run, write_config
from .runtime import Leave
from .seed import vary_by_rank
from .tracking import Tracking

if TYPE_CHECKING:
    from torch import nn

    from .trainer import Trainer

__all__ = ["Session"]

_MODULE_HOOKS = tuple(n for n, v in vars(TrainingModule).items() if callable(v) and not n.startswith("_"))


class Session:
    """The frame of one call. Use it with `with`."""

    def __init__(self, trainer: Trainer, stage: str, module: TrainingModule | None, datamodule: Any) -> None:
        self.trainer, self.stage, self.datamodule = trainer, stage, datamodule
        self.given = trainer.fitted if module is None and stage != "fit" else module
        self._setup_done = self._looping = False

    # -- frame --------------------------------------------------------------------------------------------------------
    def __enter__(self) -> Session:
        trainer = self.trainer
        module = _checked_module(self.given, stage=self.stage)
        find_misspelt(module, TrainingModule, _MODULE_HOOKS, LIGHTNING_ONLY)
        trainer._module, trainer.stage, trainer.leaving = module, self.stage, 0
        # Starts ranks, world and accelerator, where they are not there yet; strategy="auto" looks at the module.
        control = trainer.accelerator.world.control
        trainer._boundary, trainer._broken_off, trainer.in_window = None, False, False
        module._trainer = trainer
        trainer.datamodule = self.datamodule
        self._signals = SignalHandlers(control)
        self._signals.__enter__()
        trainer.signals = self._signals
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        trainer = self.trainer
        try:
            if self._looping and isinstance(error, Exception):
                p, world = trainer.progress, trainer.world
                rank = f", rank {world.rank} of {world.size}" if world.size > 1 else ""
                error.add_note(f"While training: epoch {p.epoch}, batch {p.batch_in_epoch}, after {p.global_step} steps{rank}.")
            if isinstance(error, Leave):  # an evaluation of its own was told to end: there is nothing to save
                trainer.leaving = error.code
            elif error is not None and trainer._hooks is not None:
                trainer.go_back()
                trainer.hooks.call("on_exception", error)
            if self._setup_done:
                if hasattr(self.datamodule, "teardown"):
                    self.datamodule.teardown(self.stage)
                self._call_setup_hooks("teardown")
        finally:
            if trainer._tracking is not None:
                status = "stopped" if trainer.leaving else "failed" if error is not None else "finished"
                trainer._tracking.close(status)
                trainer._tracking = None
            if trainer._store is not None:
                try:
                    trainer.settle_saves()  # what is under way is finished, also when the training failed
                except CheckpointError as failure:
                    if error is None:
                        raise
                    error.add_note(f"The last save failed as well: {failure}")
                finally:
                    trainer._store.unclaim()
            module = trainer.module
            for name in ("_trainer", "_metrics", "_defaults", "_log_suffix"):
                module.__dict__.pop(name, None)
            self._signals.__exit__(kind, error, trace)
        if trainer.leaving and (error is None or isinstance(error, Leave)):
            raise SystemExit(exit_code_of(trainer.leaving)) from None

    def _call_setup_hooks(self, name: str) -> None:
        self.trainer.hooks.call(name, self.stage)

    def _attach(self, callbacks: Sequence[Callback]) -> None:
        trainer, module = self.trainer, self.trainer.module
        check_state_keys(callbacks)
        trainer._hooks = HookRunner(trainer, callbacks, module, TrainingModule)  # pyright: ignore[reportArgumentType]
        if trainer.world.is_local_main:
            for owner in (self.datamodule, module):
                if hasattr(owner, "prepare_data"):
                    owner.prepare_data()
        trainer.world.barrier()
        if self.datamodule is not None and hasattr(self.datamodule, "setup"):
            self.datamodule.setup(self.stage)
        self._call_setup_hooks("setup")
        self._setup_done = True

    # -- fit ----------------------------------------------------------------------------------------------------------
    def prepare_fit(self, train: Any, val: Any, resume: str | Path | None) -> TrainLoop | None:
        """Build everything that the loop needs; None when there is nothing to do."""
        trainer, module = self.trainer, self.trainer.module
        self._resume_asked = None if resume is None else str(resume)
        restarts = read_job().restarts
        if resume is None and restarts:  # the same job again: it goes on, whatever the script says
            resume = "auto"
        self._check_fit(module)
        trainer.should_stop, trainer.rolling_back = False, None
        trainer.pending_saves.clear()
        callbacks = defaults.callbacks(trainer, module)
        trainer.run_folder = open_run(
            trainer.options["root"],
            trainer.options["name"],
            resume,
            trainer.world,
            create=defaults.writes(trainer),
            elsewhere=defaults.checkpoint_folder(callbacks),
        )
        if defaults.writes(trainer):
            move_output(trainer.root / "logs", trainer.world.rank)
        trainer.accelerator.free_memory()  # what an earlier fit of this trainer prepared; `setup` may already register objects
        trainer.callbacks, trainer.fitted = callbacks, module
        trainer._tracking = Tracking(defaults.loggers(trainer), jsonl=defaults.writes(trainer), enabled=trainer.world.is_main)
        trainer._store = defaults.store(trainer)
        if defaults.writes(trainer):
            trainer.store.claim()
            if trainer.checkpoint_callback is not None:
                check_shared(trainer.run_folder, trainer.world)
        self._attach(trainer.callbacks)
        tell_batch_size(trainer.accelerator, train)
        tell(trainer.accelerator, total_num_steps=lambda: trainer.estimated_stepping_batches)
        with trainer.strategy.init_context():
            module.configure_model()
        trainer._find_data = partial(self._prepare_data, train, val)
        self._prepare_models()
        trainer.find_data()  # `configure_optimizers` may have asked for it
        trainer.metrics = {}
        trainer._train_metrics = Metrics(trainer.world, stage="train")
        trainer.log_into(trainer.train_metrics, False, True)
        vary_by_rank(trainer.world.random_index)
        checkpoint = self._resume()
        defaults.announce(trainer)
        self._start_tracking()
        trainer.hooks.call("on_fit_start")
        self._sanity_check()
        trainer.hooks.call("on_train_start")
        if checkpoint is not None:
            with checkpoint:
                for note in run_state.restore_random(checkpoint, trainer.world.rank):
                    trainer.print(note)
        self._looping = True
        return TrainLoop(trainer)

    def finish_fit(self) -> None:
        """Call the last hooks of a training that came to its end."""
        trainer, self._looping = self.trainer, False
        trainer.catch_up()
        trainer.in_window = False
        trainer.log_into(None, False, False)  # there is no log point any more: `log` refuses
        trainer.hooks.call("on_train_end")
        if trainer.pending_saves:
            trainer.write_pending_saves()
        trainer.settle_saves()
        trainer.hooks.call("on_fit_end")
        defaults.mark_finished(trainer)

    def _check_fit(self, module: TrainingModule) -> None:
        trainer = self.trainer
        if not any(is_overridden(module, step, TrainingModule) for step in ("training_step", "compute_loss")):
            raise ConfigError(
                f"{type(module).__name__} defines no training_step(batch, batch_idx). Define it and return the loss."
            )
        if trainer.max_epochs is None and trainer.max_steps is None and trainer.clock.limit is None and not trainer.fast_dev_run:
            raise ConfigError(
                "The training would never end: max_epochs, max_steps and max_time are all None. "
                "Say how long: Trainer(max_epochs=3)."
            )
        if not module.automatic_optimization:
            if trainer.options["accumulate_grad_batches"] != 1 or trainer.options["global_batch_size"] is not None:
                raise ConfigError(
                    f"{type(module).__name__} optimises manually (automatic_optimization=False), so accumulation is "
                    "its own business: leave out accumulate_grad_batches and global_batch_size."
                )
            if trainer.gradient_clip_val is not None:
                raise ConfigError(
                    f"{type(module).__name__} optimises manually, so gradient_clip_val would never be applied. "
                    "Call self.clip_gradients(optimizer, value) in training_step."
                )

    def _prepare_models(self) -> None:
        trainer, module, accelerator = self.trainer, self.trainer.module, self.trainer.accelerator

        def build() -> dict[str, Any]:
            returned = module.configure_optimizers()
            if returned is None:
                returned = _configured(trainer, module.models())
            optimizers, configs = read_optimizers(returned, type(module).__name__)
            trainer.scheduler_configs = configs
            return optimizers

        accelerator.prepare_models(module.models(), build)
        by_inner = {id(o.optimizer): o for o in accelerator.optimizers.values()}
        for config in trainer.scheduler_configs:
            inner = getattr(config.scheduler, "optimizer", None)
            accelerator.prepare_scheduler(config.scheduler).optimizer = by_inner.get(id(inner))
        _split_schedulers(trainer, trainer.scheduler_configs)
        if accelerator._pipelined:
            from .pipelining import check_module

            check_module(module)
        if trainer.module.automatic_optimization:
            accelerator.bind(module, "training_step")
        hooks = trainer.hooks
        accelerator.before_backward = tuple(hooks.on_before_backward)
        accelerator.after_backward = tuple(hooks.on_after_backward)
        trainer.module_clips = is_overridden(module, "configure_gradient_clipping", TrainingModule)

    def _prepare_data(self, train: Any, val: Any) -> None:
        trainer, module, accelerator = self.trainer, self.trainer.module, self.trainer.accelerator
        options = trainer.options
        source = run_data.find_source(train, "fit", self.datamodule, module)
        limit_train, limit_val = options["limit_train_batches"], options["limit_val_batches"]
        if trainer.fast_dev_run:
            limit_train = limit_val = trainer.fast_dev_run
        if options["overfit_batches"]:
            limit_train = options["overfit_batches"]
            source = run_data.in_order(source)
        loader = run_data.train_loader(accelerator, source, limit_train)
        trainer._train_loader = loader
        val_source = run_data.find_source(val, "validation", self.datamodule, module)
        has_step = is_overridden(module, "validation_step", TrainingModule)
        if val_source is not None and not has_step:
            raise ConfigError(
                f"{type(module).__name__} was given validation data and defines no validation_step(batch, batch_idx). "
                "Define it, or leave the validation loader out."
            )
        trainer.val_loaders = (
            run_data.evaluation_loaders(accelerator, val_source, "limit_val_batches", limit_val) if limit_val != 0 else {}
        )
        if all(run_data.length_of(loader) == 0 for loader in trainer.val_loaders.values()):  # preparing them has warned
            trainer.val_loaders = {}
        accelerator.window.resize(run_data.accumulation(options, loader))
        trainer.num_training_batches = run_data.length_of(loader)
        trainer.val_every_steps = run_data.steps_between_validations(
            options["val_check_interval"], trainer.num_training_batches, accelerator.window.size
        )

    def _resume(self) -> Any:
        """Load the checkpoint that the run goes on from, all but the random states; return it, open."""
        trainer = self.trainer
        folder = trainer.run_folder
        trainer.is_resumed = folder is not None and folder.resume_from is not None
        trainer.resumed_mid_epoch, trainer.due = False, ()
        if folder is None or folder.resume_from is None:
            return None
        checkpoint = trainer.store.open(folder.resume_from)
        if checkpoint.meta.get("kind") != "run":
            raise CheckpointError(
                f"{folder.resume_from} was saved by Accelerator.save_state, not by a Trainer: it has no counters of a run. "
                "Load it with Accelerator.load_state."
            )
        providers = trainer.providers()
        if folder.resume_from.parent.parent != folder.path:  # a new run that starts from another one's checkpoint: its own logs
            providers.pop("tracking")
        run_state.restore(trainer.accelerator, checkpoint, providers)
        trainer.hooks.call("on_load_checkpoint", checkpoint.value("hooks"))
        if checkpoint.world_size != trainer.world.size:
            folder.notes.append(f"saved on {checkpoint.world_size} rank(s), goes on on {trainer.world.size}")
        trainer.due = tuple(checkpoint.value("due"))
        trainer.metrics = dict(checkpoint.value("metrics/last"))
        trainer.resumed_mid_epoch = trainer.progress.batch_in_epoch > 0
        return checkpoint

    def _start_tracking(self) -> None:
        trainer = self.trainer
        folder = trainer.run_folder
        assert folder is not None
        kept = plain(trainer.module)
        config = trainer.config | ({"hparams": kept} if kept else {})
        trainer.resolved_config = exact(config | defaults.resolved(trainer))
        if defaults.writes(trainer) and trainer.world.is_main:
            write_config(folder.path, trainer.resolved_config | {"resume": self._resume_asked})
        goes_on = folder.resume_from is not None and folder.resume_from.parent.parent == folder.path
        trainer.tracking.start(
            RunInfo(folder.name, folder.id, folder.path, config, resumed=goes_on, step=trainer.progress.global_step)
        )

    def _sanity_check(self) -> None:
        trainer = self.trainer
        count = trainer.options["num_sanity_val_steps"]
        if not trainer.val_loaders or count == 0 or trainer.is_resumed or trainer.fast_dev_run:
            return
        trainer.hooks.call("on_sanity_check_start")
        stage, trainer.stage = trainer.stage, "sanity_check"
        tracking, trainer._tracking = trainer._tracking, None
        tensors, values = rng.capture()
        try:
            evaluate(
                trainer,
                "validation",
                trainer.val_loaders,
                Metrics(trainer.world, stage="sanity_check"),
                limit=None if count == -1 else count,
                inference=False,
            )
        finally:  # it may be told to leave
            trainer.stage, trainer._tracking = stage, tracking
        rng.restore(tensors, values)
        trainer.metrics = {}
        trainer.hooks.call("on_sanity_check_end")

    # -- the other three ----------------------------------------------------------------------------------------------
    def _prepare_evaluation(self, stage: str, given: Any, ckpt_path: str | Path | None, limit: Any) -> Any:
        from ..strategies.checkpoint.reader import Checkpoint

        trainer, module, accelerator = self.trainer, self.trainer.module, self.trainer.accelerator
        if trainer.fitted is not module:  # otherwise they are those of the training
            trainer.callbacks = defaults.asked_callbacks(trainer, module)
        self._attach(trainer.callbacks)
        with accelerator.strategy.init_context():
            module.configure_model()
        models = module.models()
        if any(all(model is not known for known in accelerator.models.values()) for model in models.values()):
            accelerator.free_memory()  # another module's
            accelerator.prepare_models(models)
        if ckpt_path is not None:
            root, name = trainer.options["root"], trainer.options["name"]
            there, own = defaults.checkpoint_folder(trainer.callbacks), trainer.run_folder
            folder = open_run(root, name, ckpt_path, trainer.world, create=False, own=own, elsewhere=there)
            assert folder.resume_from is not None
            with Checkpoint(folder.resume_from) as checkpoint:
                run_state.load_models(accelerator, checkpoint)
        source = run_data.find_source(given, stage, self.datamodule, module)
        if source is None:
            raise ConfigError(
                f"There are no {stage} data: pass a DataLoader, or define {run_data.method_of(stage)} in the module."
            )
        limit = trainer.fast_dev_run or limit
        return run_data.evaluation_loaders(
            accelerator, source, f"limit_{'val' if stage == 'validation' else stage}_batches", limit
        )

    def evaluate(self, stage: str, given: Any, ckpt_path: str | Path | None) -> dict[str, float]:
        """Run validation or test over all loaders; return the values."""
        trainer, module = self.trainer, self.trainer.module
        if not is_overridden(module, f"{stage}_step", TrainingModule):
            raise ConfigError(
                f"{type(module).__name__} defines no {stage}_step(batch, batch_idx). "
                "Define it and self.log what you want to know."
            )
        limit = trainer.options["limit_val_batches" if stage == "validation" else "limit_test_batches"]
        loaders = self._prepare_evaluation(stage, given, ckpt_path, limit)
        metrics = Metrics(trainer.world, stage=stage)
        values = evaluate(trainer, stage, loaders, metrics, limit=None, inference=trainer.options["inference_mode"])
        trainer.metrics.update(values)
        defaults.show_results(trainer, stage, values)
        return values

    def predict(self, given: Any, ckpt_path: str | Path | None) -> list[Any]:
        """Return this rank's predictions."""
        loaders = self._prepare_evaluation("predict", given, ckpt_path, self.trainer.options["limit_predict_batches"])
        return predict(self.trainer, loaders)


def _checked_module(module: Any, stage: str) -> TrainingModule:
    if isinstance(module, TrainingModule):
        return module
    if module is None and stage != "fit":
        raise ConfigError(
            f"No module was given, and this trainer has fitted none yet. Pass one: trainer.{stage}(module, loader)."
        )
    if isinstance(module, type):
        raise ConfigError(f"A TrainingModule object was expected, got the class {module.__name__}. Call it: {module.__name__}().")
    raise ConfigError(
        f"A TrainingModule was expected, got {type(module).__name__}. Subclass drivetrain.TrainingModule and give it "
        "training_step and configure_optimizers; a plain nn.Module trains with the Accelerator."
    )


def _configured(trainer: Trainer, models: Mapping[str, nn.Module]) -> Any:
    """Return the optimizers that the strategies' own configurations have (DeepSpeed's JSON); None where there are none."""
    strategies, default = trainer.accelerator.strategies, trainer.strategy
    found = {name: strategies.get(name, default).configured_optimizer(model) for name, model in models.items()}
    found = {name: entry for name, entry in found.items() if entry is not None}
    return next(iter(found.values())) if len(found) == 1 else found or None


def _split_schedulers(trainer: Trainer, configs: Sequence[SchedulerConfig]) -> None:
    trainer.step_schedulers = [c for c in configs if c.interval == "step"]
    trainer.epoch_schedulers = [c for c in configs if c.interval == "epoch"]
