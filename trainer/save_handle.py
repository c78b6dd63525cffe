"""What `Trainer.save_checkpoint` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..strategies.errors import ConfigError

if TYPE_CHECKING:
    from ..strategies.checkpoint.background import SaveHandle

__all__ = ["Saving"]


class Saving:
    """A save that was asked for. What it holds is the state at that moment; it is written beside the training."""

    def __init__(self, folder: Path | None, meta: Mapping[str, Any], remove: Iterable[int], required: bool) -> None:
        self.folder, self.meta, self.remove, self.required = folder, meta, tuple(remove), required
        self.handle: SaveHandle | None = None

    @property
    def path(self) -> Path | None:
        """Where the checkpoint lies; None until it is committed."""
        return self.handle.path if self.handle is not None else None

    @property
    def done(self) -> bool:
        return self.handle is not None and self.handle.done

    @property
    def failed(self) -> bool:
        return self.handle is not None and self.handle.failed

    def wait(self) -> Path:
        """Return the path of the committed checkpoint, when it is.

        Raises:
            ConfigError: it was asked for before all that belongs to the step was done; it is written when it is.
            CheckpointError: it could not be written.
        """
        if self.handle is None:
            raise ConfigError(
                "This checkpoint was asked for while a step or an epoch's end was under way; it is written when that is done. "
                "Ask for it in on_checkpoint_step or on_checkpoint_epoch to have it at once."
            )
        return self.handle.wait().path
