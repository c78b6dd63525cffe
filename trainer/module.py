"""TrainingModule: your model, its loss and its optimizers, in one nn.Module.

    class Digits(TrainingModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 10)
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())
            return loss
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

Everything else is optional. The hooks have Lightning's names and arguments (the list stands in callbacks/base.py; the module's
have no `trainer` and `module` arguments). Parameters may lie anywhere in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from ..strategies.errors import ConfigError
from . import hparams
from .config import resolve_peers

if TYPE_CHECKING:
    from .metrics import Metrics, Reduction
    from .trainer import Trainer

__all__ = ["LIGHTNING_ONLY", "TrainingModule"]

_STEP = "Set automatic_optimization = False and write the step in training_step, or use a callback's hook of that moment."
_TRANSFER = "Do it at the top of the step, or in the data set's collate_fn; batches come on the device."
_MODES = "Use on_{0}_start and on_{0}_end; the mode of every sub-module is put back after an evaluation."
LIGHTNING_ONLY: Mapping[str, str] = {
    "optimizer_step": _STEP,
    "optimizer_zero_grad": _STEP,
    "backward": _STEP,
    "transfer_batch_to_device": _TRANSFER,
    "on_before_batch_transfer": _TRANSFER,
    "on_after_batch_transfer": _TRANSFER,
    "configure_sharded_model": "Name it configure_model.",
    "on_validation_model_zero_grad": "Use on_validation_start.",
    **{f"on_{s}_model_{m}": _MODES.format(s) for s in ("validation", "test", "predict") for m in ("eval", "train")},
    **{f"{s}_epoch_end": f"Name it on_{s}_epoch_end, and keep what the steps returned yourself." for s in ("validation", "test")},
    "training_epoch_end": "Name it on_train_epoch_end, and keep what the steps returned yourself.",
}
"""Hooks that a LightningModule may define and that are not called here: refused by name, with what to use instead."""


class TrainingModule(nn.Module):
    """A model with its training step. Subclass it; `Trainer.fit` does the rest.

    Attributes:
        automatic_optimization: True: the trainer runs backward and steps. False: your `training_step` does, with
            `self.optimizers()` and `self.manual_backward(loss)`.
    """

    automatic_optimization: bool = True

    # Set by the trainer for the time of a run. Class attributes, so that an unattached module says what is missing.
    _trainer: Trainer | None = None
    _metrics: Metrics | None = None
    _defaults: tuple[bool, bool] = (True, False)  # (on_step, on_epoch) of `log` in the hook that runs
    _untoggled: list[tuple[nn.Parameter, bool]] | None = None  # while toggle_optimizer holds: what needed a gradient before
    _log_suffix: str = ""  # behind every logged name: which of several loaders is evaluated

    # -- what you write -----------------------------------------------------------------------------------------------
    def configure_model(self) -> None:
        """Build the big parts here: called once, on the device (or the meta device) that the strategy wants."""

    def configure_optimizers(self) -> Any:
        """Return an optimizer, several, (optimizers, schedulers), or Lightning's dict; called when the models are prepared."""
        raise ConfigError(
            f"{type(self).__name__} defines no configure_optimizers. Define it and return an optimizer, "
            "such as torch.optim.AdamW(self.parameters())."
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of one batch: a scalar tensor, {"loss": tensor, ...}, or {"loss": sum, "num_items": count}.

        By default, and always under a pipeline: compute_loss of what forward makes of `pipeline_input(batch)`.
        """
        if type(self).compute_loss is TrainingModule.compute_loss:
            raise ConfigError(f"{type(self).__name__} defines no training_step(batch, batch_idx). Define it and return the loss.")
        inputs = self.pipeline_input(batch)
        return self.compute_loss(self(*inputs) if isinstance(inputs, tuple) else self(inputs), batch)

    # The next three take (batch, batch_idx, dataloader_idx=0). They are written as they are so that a type checker takes yours
    # without dataloader_idx too, which is passed only where there are several loaders.
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, and `self.log` what you want to know: means count each sample of all ranks exactly once."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The same for `Trainer.test`."""

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the prediction for one batch; by default `self(batch)`."""
        return self(args[0])

    def pipeline_input(self, batch: Any) -> Any:
        """Return what of a batch forward is called with: a tensor whose first dimension are the samples, or a tuple.

        By default a tensor itself, the first of a tuple or list, or the item "input_ids", "x", "inputs", ... of a dict.
        """
        from ..strategies.pipeline_chunks import first_input

        return first_input(batch)

    def compute_loss(self, output: Any, batch: Any) -> Any:
        """Return the loss of a model output, in the forms that training_step may return.

        Under a pipeline the last stage calls it for each chunk of a batch, and training_step is not called: the loss is their
        mean by samples, or with "num_items" their sum. `self.log` works here, and counts each chunk by its samples.
        """
        raise ConfigError(f"{type(self).__name__} defines no compute_loss(output, batch), which a pipeline's last stage needs.")

    def models(self) -> dict[str, nn.Module]:
        """Return what is prepared, by name: by default the module itself, as one model whose forward is the step.

        Name several children (a generator and a discriminator, a teacher and a student) to have each prepared on its own.
        """
        return {"model": self}

    # -- hooks, in the order of a run (see callbacks/base.py) ---------------------------------------------------------
    def prepare_data(self) -> None: ...
    def setup(self, stage: str) -> None: ...
    def teardown(self, stage: str) -> None: ...
    def train_dataloader(self) -> Any: ...
    def val_dataloader(self) -> Any: ...
    def test_dataloader(self) -> Any: ...
    def predict_dataloader(self) -> Any: ...
    def configure_callbacks(self) -> Sequence[Any]:
        return ()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Override to clip in your own way; gradients are complete and in the unit of the loss here."""

    def lr_scheduler_step(self, scheduler: Any, metric: float | None) -> None:
        """Step one scheduler, given the value of what it monitors."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None: ...
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    # -- what you call ------------------------------------------------------------------------------------------------
    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this module.

        Raises:
            ConfigError: no run is going on.
        """
        if self._trainer is None:
            raise ConfigError(
                f"{type(self).__name__} is not attached to a Trainer: this works only inside fit, validate, test or predict."
            )
        return self._trainer

    @property
    def device(self) -> Any:
        return self.trainer.accelerator.device

    @property
    def global_step(self) -> int:
        return self.trainer.progress.global_step

    @property
    def current_epoch(self) -> int:
        return self.trainer.progress.epoch

    @property
    def global_rank(self) -> int:
        return self.trainer.world.rank

    @property
    def local_rank(self) -> int:
        return self.trainer.world.local_rank

    @property
    def logger(self) -> Any:
        return self.trainer.logger

    @property
    def loggers(self) -> Sequence[Any]:
        return self.trainer.loggers

    def log(
        self,
        name: str,
        value: Any,
        *,
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce: Reduction = "mean",
        sync: bool = True,
        batch_size: float | None = None,
        **peers: Any,
    ) -> None:
        """Log a value under `name`; tensors are kept as they are and read, once for all, at the next log point.

        Args:
            on_step: show its value at every log point. Default: in a training batch and its hooks.
            on_epoch: show its mean over the epoch. Default: in evaluation, and in the hooks around epochs.
            reduce: "mean" (weighted by the batch's samples), "sum", "max" or "min", over micro-batches and ranks.
            batch_size: the weight, where it is not the number of samples that the loader handed out.
            sync: False logs each rank's own value; the files and the bar show rank 0's.
        Lightning's `reduce_fx` and `sync_dist` mean `reduce` and `sync`.
        """
        if peers:
            given = resolve_peers(type(self).log, "log", peers)
            reduce, sync = given.get("reduce", reduce), given.get("sync", sync)
        metrics = self._metrics
        if metrics is None:
            raise ConfigError(
                f"{type(self).__name__}.log({name!r}) was called where nothing is written: outside of fit, validate and test, "
                "or after the training's last epoch. Log inside a step, or a hook before on_train_end."
            )
        defaults = self._defaults
        metrics.log(
            name + self._log_suffix,
            value,
            on_step=defaults[0] if on_step is None else on_step,
            on_epoch=defaults[1] if on_epoch is None else on_epoch,
            prog_bar=prog_bar,
            reduce=reduce,
            sync=sync,
            weight=batch_size,
        )

    def save_hyperparameters(self, *names: Any, ignore: str | Sequence[str] = (), **peers: Any) -> None:
        """Keep the arguments of `__init__` as `self.hparams`, in checkpoints, in config.yaml and for the loggers.

        Args:
            names: which of them, all by default; or one dict (or namespace) that is kept instead.
            ignore: which not: what is no plain value, such as a module.
        `logger` and `frame`, which Lightning has, change nothing.
        """
        for name in peers:
            if name not in ("logger", "frame"):
                raise ConfigError(f"save_hyperparameters has no argument {name!r}. Known: names, ignore.")
        if len(names) == 1 and not isinstance(names[0], str):
            found, names = (names[0] if isinstance(names[0], Mapping) else vars(names[0])), ()
        else:
            frame = inspect.currentframe()
            found = hparams.init_arguments(self, frame and frame.f_back)
        self.hparams.update(hparams.chosen(found, names, [ignore] if isinstance(ignore, str) else ignore))

    @property
    def hparams(self) -> hparams.Hyperparameters:
        """What `save_hyperparameters` kept; items are attributes too."""
        return self.__dict__.setdefault("_hparams", hparams.Hyperparameters())

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *, strict: bool = True, **arguments: Any) -> Self:
        """Make this module again from a checkpoint (or a run's newest), with its saved hyperparameters and its weights.

        Args:
            arguments: of `__init__`, in place of the saved ones or where none was saved.
        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model.
            ConfigError: an argument without a value.
        """
        with hparams.open_checkpoint(checkpoint_path) as checkpoint:
            return hparams.rebuild(cls, checkpoint, arguments, strict=strict)

    def log_dict(self, values: Mapping[str, Any], **options: Any) -> None:
        """`log` each of `values` with the same options."""
        for name, value in values.items():
            self.log(name, value, **options)

    def optimizers(self) -> Any:
        """Return the prepared optimizer, or the list of them in the order of `configure_optimizers`."""
        optimizers = list(self.trainer.accelerator.optimizers.values())
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Let only the parameters of `optimizer` take gradients, until `untoggle_optimizer`: a GAN's other half stays out."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._untoggled is not None:
            raise ConfigError("toggle_optimizer was called twice. Call untoggle_optimizer(optimizer) before the next one.")
        held = {p for o in self.trainer.accelerator.optimizers.values() for p in o.parameters}
        self._untoggled = [(p, p.requires_grad) for p in held]
        for p in held:
            p.requires_grad_(p.requires_grad and id(p) in own)
        self._tell_strategies()

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Undo `toggle_optimizer`."""
        for p, required in self._untoggled or ():
            p.requires_grad_(required)
        self._untoggled = None
        self._tell_strategies()

    def _tell_strategies(self) -> None:
        accelerator = self.trainer.accelerator
        for strategy in {accelerator.strategy, *accelerator.strategies.values()}:
            strategy.requires_grad_changed()

    def lr_schedulers(self) -> Any:
        """Return the scheduler, the list of them, or None."""
        schedulers = [c.scheduler for c in self.trainer.scheduler_configs]
        return schedulers[0] if len(schedulers) == 1 else (schedulers or None)

    def manual_backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass of `loss` under manual optimisation: gradients of all ranks are averaged."""
        self.trainer.accelerator.manual_backward(loss, **kwargs)

    def forward_backward(self, batch: Any) -> Tensor:
        """Run forward, compute_loss and the backward pass of a batch under manual optimisation; return the loss, a mean.

        It works in a pipeline too, where a step that optimises manually cannot call the model: the schedule runs here.
        Raises:
            DataError: compute_loss returned no loss, or a sum with its num_items, which manual optimisation does not take.
        """
        from .pipelining import manual_batch

        return manual_batch(self, batch)

    def clip_gradients(self, optimizer: Any, gradient_clip_val: float, gradient_clip_algorithm: str = "norm") -> None:
        """Clip the gradients of one prepared optimizer, by "norm" or "value"."""
        accelerator = self.trainer.accelerator
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "norm":
            accelerator.clip_grad_norm_(parameters, gradient_clip_val)
        elif gradient_clip_algorithm == "value":
            accelerator.clip_grad_value_(parameters, gradient_clip_val)
        else:
            raise ConfigError(f"gradient_clip_algorithm is 'norm' or 'value', got {gradient_clip_algorithm!r}.")

    def all_gather(self, data: Any) -> Any:
        """Concatenate tensors over all ranks along dim 0."""
        return self.trainer.accelerator.gather(data)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process only."""
        self.trainer.accelerator.print(*args, **kwargs)
