"""What a running trainer is asked for under Lightning's names: read-only, and worked out when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.errors import ConfigError

if TYPE_CHECKING:
    from ..callbacks.base import Callback
    from ..strategies.world import World
    from .accelerator import Accelerator
    from .data.loader import Loader
    from .run_folder import RunFolder

__all__ = ["Facts"]


class Facts:
    """The part of the trainer that a module or callback written for Lightning reads. Our own names stand in runtime.py."""

    stage: str
    metrics: dict[str, float]
    callbacks: list[Callback]
    options: dict[str, Any]
    max_epochs: int | None
    max_steps: int | None
    num_training_batches: int | None
    val_loaders: dict[str, Loader]
    run_folder: RunFolder | None
    datamodule: Any = None
    _find_data: Callable[[], None] | None = None  # prepares the loaders of a fit, once

    if TYPE_CHECKING:

        @property
        def accelerator(self) -> Accelerator: ...
        @property
        def world(self) -> World: ...
        @property
        def loggers(self) -> Sequence[Any]: ...

    @property
    def is_global_zero(self) -> bool:
        return self.world.is_main

    @property
    def global_rank(self) -> int:
        return self.world.rank

    @property
    def local_rank(self) -> int:
        return self.world.local_rank

    @property
    def node_rank(self) -> int:
        return self.world.node_rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def sanity_checking(self) -> bool:
        return self.stage == "sanity_check"

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The last reduced value of every logged name, as 0-d CPU tensors; `metrics` has them as plain numbers."""
        return {name: torch.tensor(value) for name, value in self.metrics.items()}

    @property
    def checkpoint_callback(self) -> Callback | None:
        """The first Checkpoint callback: `checkpoint_callback.best_model_path`."""
        from ..callbacks.checkpoint import Checkpoint

        return next((c for c in self.callbacks if isinstance(c, Checkpoint)), None)

    @property
    def early_stopping_callback(self) -> Callback | None:
        from ..callbacks.early_stopping import EarlyStopping

        return next((c for c in self.callbacks if isinstance(c, EarlyStopping)), None)

    @property
    def logger(self) -> Any:
        """The first logger that was asked for; metrics.jsonl's when there is none."""
        from ..callbacks.loggers.jsonl import JSONLLogger

        loggers = self.loggers
        return next((one for one in loggers if not isinstance(one, JSONLLogger)), loggers[0] if loggers else None)

    @property
    def default_root_dir(self) -> str:
        return str(self.options["root"])

    @property
    def log_dir(self) -> str | None:
        """The run's folder; None before there is one."""
        return None if self.run_folder is None else str(self.run_folder.path)

    @property
    def num_val_batches(self) -> list[int | float]:
        """Batches of each validation loader; inf where that is not known."""
        from .run_data import length_of

        lengths = [length_of(loader) for loader in self.val_loaders.values()]
        return [float("inf") if length is None else length for length in lengths]

    @property
    def estimated_stepping_batches(self) -> int:
        """Optimizer steps of the whole training, for schedulers that want to know; first needed in `configure_optimizers`.

        Raises:
            ConfigError: the loader has no length, or only max_time limits the training.
        """
        self.find_data()
        steps, epochs, batches = self.max_steps, self.max_epochs, self.num_training_batches
        if epochs is not None and batches is not None:
            by_epochs = -(-batches // self.accelerator.window.size) * epochs
            return by_epochs if steps is None else min(steps, by_epochs)
        if steps is not None:
            return steps
        why = "the training loader has no length" if epochs is not None else "neither max_epochs nor max_steps is given"
        raise ConfigError(f"How many steps the training will take is not known: {why}. Say it: Trainer(max_steps=1000).")

    def find_data(self) -> None:
        """Prepare the loaders of this fit, if they are not there yet."""
        find, self._find_data = self._find_data, None
        if find is not None:
            find()
