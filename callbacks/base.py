"""What happens beside the training: every hook, in its order, with its arguments.

A callback overrides the moments that it wants; the others cost nothing (the runner calls only what is overridden). Names,
arguments and order are those of PyTorch Lightning 2.x; callbacks are called before the module's hook of the same name.

    setup(stage)
    on_fit_start
      on_sanity_check_start ... on_sanity_check_end         a few validation batches before training
      on_train_start
        on_train_epoch_start
          on_train_batch_start                              per micro-batch
            on_before_zero_grad                             first micro-batch of a window, before the forward
            on_before_backward / on_after_backward
            on_before_optimizer_step                        last micro-batch of a window, before clipping
          on_train_batch_end
          on_validation_start ... on_validation_end         when a validation is due
          on_checkpoint_step                                after an optimizer step and its validation
          on_log                                            at every log point, with the reduced values
        on_train_epoch_end
        on_checkpoint_epoch                                 after the epoch's validation and its end hooks
      on_train_end
    on_fit_end
    teardown(stage)

What differs from Lightning: zero_grad comes before the forward (no second copy of the gradients is alive during it);
`on_before_optimizer_step` sees gradients in the unit of the loss, before clipping; an epoch that `max_steps`, a stop or a signal
breaks off has no `on_train_epoch_end` (the resumed run has it, at the epoch's end); and `on_checkpoint_step`,
`on_checkpoint_epoch` and `on_log` are moments of their own, so that a callback that saves needs no special place in the list.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from ..strategies.base import Strategy
    from ..strategies.checkpoint.store import CheckpointStore
    from ..strategies.world import World

__all__ = ["Callback", "ProgressView", "SaveHandle", "TrainerView"]


class ProgressView(Protocol):
    """Where the run is. Counts are over all ranks; the same on every rank.

    `global_step` counts optimizer steps, however many optimizers there are; `skipped` windows that ended without one. `batches`
    are micro-batches (per rank).
    """

    epoch: int
    global_step: int
    batches: int
    batch_in_epoch: int
    samples: int
    tokens: int
    seconds: float
    skipped: int


class SaveHandle(Protocol):
    """What `save_checkpoint` returns: a save that may be under way. `path` is where it lies once it is committed, else None."""

    @property
    def path(self) -> Path | None: ...
    @property
    def done(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
    def wait(self) -> Path: ...


class TrainerView(Protocol):
    """All that a callback may use of the trainer."""

    progress: ProgressView
    metrics: dict[str, float]  # the last reduced value of every logged name, the same on all ranks
    module: nn.Module
    world: World
    strategy: Strategy
    stage: str  # "fit", "validate", "test" or "predict"
    root: Path  # the run folder
    store: CheckpointStore
    optimizers: Mapping[str, Optimizer]
    schedulers: Sequence[Any]
    loggers: Sequence[Any]
    max_steps: int | None
    max_epochs: int | None
    num_training_batches: int | None
    should_stop: bool
    is_resumed: bool
    log_every_n_steps: int

    nonfinite: str  # what happens when a loss or gradient is NaN or Inf: "raise", "skip" or "ignore"; may be set
    signals: Any  # signals.means("SIGTERM", flag): what a signal asks for while this call runs
    stop_reason: str
    leaving: int  # flags of strategies/control.py: why the run leaves; 0 while it does not

    @property
    def num_val_batches(self) -> Sequence[float]: ...  # of each validation loader; none: nothing is validated in this run
    @property
    def nonfinite_steps(self) -> int: ...  # steps left out because a gradient was NaN or Inf
    def leave_out_above(self, limit: float | None) -> None: ...  # steps with a micro-batch whose mean loss is above it
    def abort(self, error: BaseException) -> NoReturn: ...  # now, from any thread
    def roll_back(self, to: int, reason: str) -> None: ...  # to a checkpoint, and on with the data that come now
    def stop(self, reason: str) -> None: ...
    def save_checkpoint(
        self, path: str | Path | None = None, *, wait: bool = False, remove: Iterable[int] = (), required: bool = True
    ) -> SaveHandle: ...
    def print(self, text: str) -> None: ...
    def log(self, name: str, value: float | Tensor) -> None: ...


class Callback:
    """Something that happens beside the training. Override the moments that you want.

    `state_key` names the callback's state in a checkpoint: by default its class name; give instances of one class their own
    key when there are several. `state_version` is stored with it and handed back in `load_state_dict(state)` as
    `state["version"]` if the state has no such key of its own.
    """

    state_version: int = 1

    @property
    def state_key(self) -> str:
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return a tree of tensors and JSON values; saved in every checkpoint under `state_key`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, before `on_fit_start`'s successor hooks run in a resumed run."""

    # -- the frame of a run -------------------------------------------------------------------------------------------
    def setup(self, trainer: TrainerView, module: nn.Module, stage: str) -> None: ...
    def teardown(self, trainer: TrainerView, module: nn.Module, stage: str) -> None: ...
    def on_fit_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_fit_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_exception(self, trainer: TrainerView, module: nn.Module, exception: BaseException) -> None: ...
    def on_sanity_check_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_sanity_check_end(self, trainer: TrainerView, module: nn.Module) -> None: ...

    # -- training -----------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_train_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_train_epoch_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_train_epoch_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_train_batch_start(self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int) -> None: ...
    def on_train_batch_end(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_zero_grad(self, trainer: TrainerView, module: nn.Module, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, trainer: TrainerView, module: nn.Module, loss: Tensor) -> None: ...
    def on_after_backward(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_before_optimizer_step(self, trainer: TrainerView, module: nn.Module, optimizer: Optimizer) -> None: ...
    def on_checkpoint_step(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_checkpoint_epoch(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_log(self, trainer: TrainerView, module: nn.Module, metrics: dict[str, float], step: int) -> None: ...

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def on_validation_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_validation_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_validation_epoch_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_validation_epoch_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_validation_batch_start(
        self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_validation_batch_end(
        self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_test_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_test_epoch_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_test_epoch_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_test_batch_start(
        self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_batch_end(
        self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_predict_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_predict_epoch_start(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_predict_epoch_end(self, trainer: TrainerView, module: nn.Module) -> None: ...
    def on_predict_batch_start(
        self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_batch_end(
        self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Add to `checkpoint`, a tree of tensors and JSON values, just before it is written (every rank)."""

    def on_load_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """See what `on_save_checkpoint` left, after the models and optimizers took theirs."""
