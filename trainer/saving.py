"""save_state, load_state, save_model: the part of `Accelerator` that writes and reads checkpoints.

A folder that is given to `save_state` holds one committed checkpoint a save (step-00000012/, ...); nothing in it is overwritten.
`load_state` takes such a folder (and its newest whole checkpoint) or one checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from ..strategies.errors import CheckpointError, ConfigError
from . import state as run_state

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.checkpoint.background import SaveHandle
    from ..strategies.world import World
    from .accumulation import Window
    from .data.loader import Loader
    from .optimizers import PreparedOptimizer

__all__ = ["Saving"]


class Saving:
    """The state of everything prepared and registered, to a folder and back."""

    world: World
    strategy: Strategy
    strategies: dict[str, Strategy]
    models: dict[str, nn.Module]
    project_dir: Path | None
    registered: list[Any]
    loaders: list[Loader]
    optimizers: dict[str, PreparedOptimizer]
    window: Window

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load the state of `objects` too: anything with state_dict and load_state_dict, in this order.

        Raises:
            ConfigError: an object without them.
        """
        for o in objects:
            if not isinstance(o, run_state.Provider):
                raise ConfigError(
                    f"register_for_checkpointing takes objects with state_dict and load_state_dict, got {type(o).__name__}. "
                    "Give it these two methods."
                )
        self.registered.extend(objects)

    @overload
    def save_state(
        self, output_dir: str | Path | None = None, *, step: int | None = None, wait: Literal[True] = True
    ) -> Path: ...
    @overload
    def save_state(
        self, output_dir: str | Path | None = None, *, step: int | None = None, wait: Literal[False]
    ) -> SaveHandle: ...
    def save_state(
        self, output_dir: str | Path | None = None, *, step: int | None = None, wait: bool = True
    ) -> Path | SaveHandle:
        """Save models, optimizers, schedulers, scaler, loaders' positions, registered objects and random states. Collective.

        Args:
            output_dir: the folder that holds the checkpoints, or a URL (memory://, s3://, ...: checkpoint/url_store.py); by
                default `project_dir`/checkpoints.
            step: the number in the checkpoint's name; by default one more than the newest there.
            wait: False returns when the state is copied; a thread writes it while you train on. The next save, `load_state` and
                `end_training` wait for it, and raise its error.
        Returns: the folder of the committed checkpoint; without `wait` a handle, whose `wait()` returns when it is committed.
        Raises:
            CheckpointError: it could not be written, or the save before could not.
            ConfigError: an accumulation window is open, whose gradients no checkpoint holds.
        """
        from ..strategies.checkpoint.store import CheckpointStore

        window = self.window
        if window.index and not window.sync:
            raise ConfigError(
                f"save_state was called after micro-batch {window.index} of {window.size}: the gradients so far would "
                "be lost. Call it when accelerator.sync_gradients is True, after the step."
            )
        store = CheckpointStore(self._folder(output_dir), self.world)
        self.settle_saves()
        if step is None:
            infos = store.list()
            step = int(self.world.broadcast_json(infos[-1].step + 1 if infos else 1))
        found = run_state.collect(self, self._providers())  # pyright: ignore[reportArgumentType]
        own: dict[str, Any] = {"rank_values": found.rank_values, "rank_tensors": found.rank_tensors}
        if wait:
            return store.save(step, found.tensors, found.values, **own, meta={"kind": "state"}).path
        return store.save(step, found.tensors, found.values, **own, meta={"kind": "state"}, wait=False)

    def settle_saves(self) -> None:
        """Wait until no save is under way.

        Raises:
            CheckpointError: the last one failed, and nobody was told yet.
        """
        from ..strategies.checkpoint.background import Background

        Background.of(self.world).settle()

    def load_state(self, input_dir: str | Path | None = None, *, strict: bool = True) -> Path:
        """Load what `save_state` saved, into the same objects prepared in the same order. Return the checkpoint's folder.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of other objects; the models are untouched then.
        """
        from ..strategies.checkpoint.reader import Checkpoint
        from ..strategies.checkpoint.store import CheckpointStore

        folder = self._folder(input_dir)
        self.settle_saves()
        if not (folder / "manifest.json").exists():
            info = CheckpointStore(folder, self.world).latest()
            if info is None:
                raise CheckpointError(
                    f"There is no checkpoint in {folder.absolute()}. Give the folder that save_state was given."
                )
            folder = info.path
        with Checkpoint(folder) as checkpoint:
            run_state.restore(self, checkpoint, self._providers(), strict=strict)  # pyright: ignore[reportArgumentType]
            run_state.restore_random(checkpoint, self.world.rank)
        return folder

    def _providers(self) -> dict[str, Any]:
        providers: dict[str, Any] = {f"loader/{i}": loader for i, loader in enumerate(self.loaders)}
        return providers | {f"registered/{i}": o for i, o in enumerate(self.registered)}

    def _folder(self, given: str | Path | None) -> Path:
        from ..strategies.checkpoint.urls import path_of

        if given is not None:
            return path_of(given)
        if self.project_dir is None:
            raise ConfigError("Where to? Give save_state and load_state a folder, or the Accelerator a project_dir.")
        return self.project_dir / "checkpoints"

    def get_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the full state dict of a prepared model, under the names that the user's module has. All processes call it.

        Under a strategy that holds the model in pieces it is whole on the main process, in its host memory, of which it takes the
        model's full size (a warning says so where that is not free), and empty on the others. `save_model` does not need that.
        """
        module: nn.Module = self.unwrap_model(model)  # pyright: ignore[reportAttributeAccessIssue]
        return self._strategy_of(module).full_state_dict(module)

    def _strategy_of(self, module: nn.Module) -> Strategy:
        return self.strategies.get(next((n for n, m in self.models.items() if m is module), ""), self.strategy)

    def save_model(self, model: nn.Module, save_directory: str | Path, max_shard_size: int | str = "5GB") -> Path:
        """Write the bare weights of a model as Hugging Face has them (checkpoint/weights.py); return the first file.

        To a folder or a URL. One `model.safetensors`, or, above `max_shard_size`, several files and
        `model.safetensors.index.json`. Tied weights are written once, under their first name; their other names stand in the
        file's metadata. Collective; the main process writes. Where ranks hold pieces, tensor by tensor is put together, written
        and dropped: no rank ever holds the model.

        Raises:
            CheckpointError: the files could not be written; on all processes.
        """
        from ..strategies.checkpoint.urls import path_of
        from ..strategies.checkpoint.weights import parse_size, save_weights

        folder, limit = path_of(save_directory).expanduser(), parse_size(max_shard_size)
        module: nn.Module = self.unwrap_model(model)  # pyright: ignore[reportAttributeAccessIssue]
        whole = self._strategy_of(module).whole_tensors(module)

        def write(read: Any) -> str:
            return save_weights(folder, whole.sizes, read, max_shard_size=limit, metadata=whole.tied)[0].name

        return folder / whole.on_main("Writing the weights", folder, write)

    def load_model(self, model: nn.Module, directory: str | Path, *, strict: bool = True) -> list[str]:
        """Load what `save_model` (or transformers' `save_pretrained`) wrote into a prepared model; return what was skipped.

        Raises:
            CheckpointError: the weights of another model: what is missing, in excess or of another shape is listed, and nothing
                was loaded. `strict=False` takes what fits.
        """
        from ..strategies.checkpoint.urls import path_of

        folder = path_of(directory).expanduser()
        module: nn.Module = self.unwrap_model(model)  # pyright: ignore[reportAttributeAccessIssue]
        skipped = self._strategy_of(module).load_weights(module, folder, strict=strict)
        self.world.barrier()
        return skipped
