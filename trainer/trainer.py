"""Trainer: owns the loop, and hands hardware, sharding and precision to a strategy.

    Trainer(max_epochs=3).fit(module, train_loader, val_loader)

What it does in `fit`, in this order: ranks (launch/) -> world, strategy, accelerator -> run folder -> the module's models and
optimizers prepared -> loaders -> state of a checkpoint, when one is resumed -> the loop (loops/train.py). Each is a file beside
this one; the Trainer holds their objects under the names of `callbacks.base.TrainerView`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..callbacks.base import Callback
from ..callbacks.runner import check_callbacks
from ..strategies.base import Strategy, make_precision
from ..strategies.precision.base import Precision
from . import arguments
from . import config as configuration
from .clock import Clock, parse_time
from .data.config import DataLoaderConfiguration
from .launch.report import install_excepthook
from .loops.progress import Progress
from .run_data import take_datamodule
from .runtime import Runtime
from .seed import seed_everything, set_deterministic
from .session import Session

if TYPE_CHECKING:
    from ..strategies.mesh import ParallelPlan
    from .module import TrainingModule

__all__ = ["Trainer"]


class Trainer(Runtime):
    """Trains, validates, tests and predicts with a `TrainingModule`.

    How much: `max_epochs`, `max_steps` (optimizer steps), `max_time` (seconds, "10m", a timedelta); at least one for `fit`.
    Where: `strategy` ("auto", "single", "ddp", ... or an object), `devices` (processes; "auto" is one, or what a launcher
    started), `num_nodes`, `device` ("auto", "cpu", "cuda", ...), `precision` ("fp32", "bf16-mixed", "fp16-mixed", ...), `plan`
    (how many processes do what: `ParallelPlan(dp_replicate=2, dp_shard=-1)`; strategy="auto" follows it).
    `compile` (True, a backend, a `Compile`), `activation_checkpointing` (True, "full", "selective", "offload", an object).
    Steps: `accumulate_grad_batches` micro-batches a step, or `global_batch_size` samples a step (accumulation follows from it);
    `gradient_clip_val` by `gradient_clip_algorithm` "norm" or "value"; `nonfinite` "raise", "skip" or "ignore".
    Validation: `val_check_interval` (optimizer steps; a part of the epoch; "500step", "2ep"), `check_val_every_n_epoch`,
    `limit_train_batches`, `limit_val_batches`, `limit_test_batches`, `limit_predict_batches` (int: batches; float: a part),
    `num_sanity_val_steps` batches before training. `fast_dev_run` runs that many batches of everything and writes nothing.
    `overfit_batches` trains on the first batches again and again, in order.
    Beside it: `callbacks`, `loggers` (objects or names; metrics.jsonl is always written), `log_every_n_steps`, and
    `enable_progress_bar`, `enable_checkpointing`, `enable_model_summary` for the three that are there by default.
    Run: `root`/`name`/<id>/ is the run's folder; `resume` None, "auto", "last", "best" or a path; `seed` for everything random,
    drawn from torch's own seed when None; `deterministic` True or "warn".

    Raises:
        ConfigError, UnknownName: an argument that is not known (the nearest is named) or cannot be.
    """

    def __init__(
        self,
        *,
        strategy: str | Strategy = "auto",
        precision: str | int | Precision | None = None,
        models: Mapping[str, str | Strategy] | None = None,
        device: str = "auto",
        devices: int | str = "auto",
        num_nodes: int = 1,
        plan: ParallelPlan | None = None,
        max_epochs: int | str | None = None,
        max_steps: int | str | None = None,
        max_time: Any = None,
        compile: Any = False,
        activation_checkpointing: Any = None,
        accumulate_grad_batches: int = 1,
        global_batch_size: int | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        nonfinite: str = "raise",
        val_check_interval: float | str | None = None,
        check_val_every_n_epoch: int = 1,
        limit_train_batches: float | None = None,
        limit_val_batches: float | None = None,
        limit_test_batches: float | None = None,
        limit_predict_batches: float | None = None,
        num_sanity_val_steps: int = 2,
        fast_dev_run: bool | int = False,
        overfit_batches: int = 0,
        callbacks: Callback | Iterable[Callback] | None = (),
        loggers: Any = (),
        log_every_n_steps: int | str = 50,
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
        enable_model_summary: bool = True,
        inference_mode: bool = True,
        dataloader_config: DataLoaderConfiguration | None = None,
        seed: int | None = None,
        deterministic: bool | str = False,
        root: str | Path = "runs",
        name: str | None = None,
        resume: str | Path | None = None,
        **peers: Any,
    ) -> None:
        install_excepthook()  # in a script, wrong use is told in a paragraph, with its exit code
        given = {k: v for k, v in locals().items() if k not in ("self", "peers", "__class__")}
        given |= configuration.resolve_peers(type(self), "Trainer", peers)
        options = arguments.check(given)
        super().__init__()
        self.options = options
        self.config = arguments.describe(options)
        self.callbacks: list[Callback] = check_callbacks(options["callbacks"])
        self.strategy_asked = options["strategy"]
        self.precision_asked = None if options["precision"] is None else make_precision(options["precision"])
        self.max_epochs: int | None = options["max_epochs"]
        self.max_steps: int | None = options["max_steps"]
        self.fast_dev_run: int = int(options["fast_dev_run"])
        if self.fast_dev_run:  # one short epoch, with its validation
            self.max_epochs, self.max_steps, options["max_time"] = 1, None, None
            options["check_val_every_n_epoch"], options["val_check_interval"] = 1, None
        self.log_every_n_steps: int = options["log_every_n_steps"]
        self.gradient_clip_val: float | None = options["gradient_clip_val"]
        self.gradient_clip_algorithm: str = options["gradient_clip_algorithm"]
        self.clip_norm = self.gradient_clip_val if self.gradient_clip_algorithm == "norm" else None
        self.clip_value = self.gradient_clip_val if self.gradient_clip_algorithm == "value" else None
        self.progress = Progress()
        self.clock = Clock(self.progress, parse_time(options["max_time"]))
        if options["seed"] is not None:
            seed_everything(options["seed"])
        set_deterministic(options["deterministic"])

    # -- what you call ------------------------------------------------------------------------------------------------
    def fit(
        self,
        module: TrainingModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        *,
        datamodule: Any = None,
        resume: str | Path | None = None,
        **peers: Any,
    ) -> None:
        """Train `module` on one loader, validating on another (or several, as a list or dict).

        Args:
            datamodule: any object with train_dataloader(), val_dataloader(), ...; it may also stand in the first loader's place.
                Its prepare_data (once a machine), setup(stage) and teardown(stage) are called, where it has them.
            resume: None (what the Trainer was given), "auto", "last", "best", or the path of a checkpoint.
        Raises:
            ConfigError: the run is not possible as it was asked for.
            DataError, NonFiniteError: the data, or the numbers, are not usable; the last checkpoint is untouched.
            CheckpointError: the checkpoint to resume from is damaged or of another model.
            SystemExit: the run was told to stop by a signal and has saved; the code is that of the signal.
        """
        resume = arguments.resume_of(peers, resume, self.options["resume"])
        train_dataloaders, datamodule = take_datamodule(train_dataloaders, datamodule)
        with Session(self, "fit", module, datamodule) as session:
            loop = session.prepare_fit(train_dataloaders, val_dataloaders, resume)
            if loop is not None:
                loop.run()
                session.finish_fit()

    def validate(
        self,
        module: TrainingModule | None = None,
        dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> list[dict[str, float]]:
        """Run `validation_step` over the loader(s); return the logged values, in a list as Lightning does.

        `module` is by default the one that was fitted; `ckpt_path` a path, or "best" or "last" of its run.
        """
        dataloaders, datamodule = take_datamodule(dataloaders, datamodule)
        with Session(self, "validate", module, datamodule) as session:
            return [session.evaluate("validation", dataloaders, ckpt_path)]

    def test(
        self,
        module: TrainingModule | None = None,
        dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> list[dict[str, float]]:
        """Run `test_step` over the loader(s); return the logged values, in a list as Lightning does."""
        dataloaders, datamodule = take_datamodule(dataloaders, datamodule)
        with Session(self, "test", module, datamodule) as session:
            return [session.evaluate("test", dataloaders, ckpt_path)]

    def predict(
        self,
        module: TrainingModule | None = None,
        dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> list[Any]:
        """Return what `predict_step` returned for every batch of this rank, in the order of the data."""
        dataloaders, datamodule = take_datamodule(dataloaders, datamodule)
        with Session(self, "predict", module, datamodule) as session:
            return session.predict(dataloaders, ckpt_path)

    def __repr__(self) -> str:
        strategy = self.strategy_asked if isinstance(self.strategy_asked, str) else self.strategy_asked.name
        size = f" x{self.world.size}" if self._accelerator is not None else ""
        limit = (
            self.max_steps if self.max_steps is not None else f"{self.max_epochs} epochs" if self.max_epochs is not None else "?"
        )
        precision = self.precision_asked.name if self.precision_asked else "fp32"
        return f"Trainer({strategy}{size}, {precision}, step {self.progress.global_step} of {limit})"
