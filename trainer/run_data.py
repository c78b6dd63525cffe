"""From what the user gave to prepared loaders: arguments, a data module or the module's own methods; limits and their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..strategies.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

    from .accelerator import Accelerator
    from .data.loader import Loader

__all__ = ["evaluation_loaders", "limit_of", "take_datamodule", "train_loader"]

_METHODS = {"fit": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}


def take_datamodule(given: Any, datamodule: Any) -> tuple[Any, Any]:
    """Return (loaders, data module): the data module may stand in the loaders' place, as in `fit(module, data)`."""
    if datamodule is None and not hasattr(given, "__iter__") and any(hasattr(given, name) for name in _METHODS.values()):
        return None, given
    return given, datamodule


def find_source(given: Any, stage: str, datamodule: Any, module: nn.Module) -> Any:
    """Return the loader(s) for `stage`: the argument, the data module's, or the module's own; None when there are none."""
    if given is not None:
        return given
    for owner in (datamodule, module):
        method = getattr(owner, _METHODS[stage], None)
        if method is not None and (found := method()) is not None:
            return found
    return None


def train_loader(accelerator: Accelerator, given: Any, limit: float | None, *, shuffle: bool | None = None) -> Loader:
    """Prepare the training loader.

    Raises:
        DataError: there is none, or several.
    """
    if given is None:
        raise DataError(
            "fit has no training data: train_dataloaders is None and the module's train_dataloader returns None. "
            "Pass a DataLoader: trainer.fit(module, DataLoader(dataset, batch_size=32, shuffle=True))."
        )
    if isinstance(given, Mapping | tuple) or (isinstance(given, list) and given and hasattr(given[0], "dataset")):
        raise DataError(
            f"fit takes one training loader, got a {type(given).__name__} of {len(given)}. Combine the data sets into one "
            "(torch.utils.data.ConcatDataset or StackDataset)."
        )
    loader = accelerator.prepare_data_loader(given, training=True)
    loader.limit = limit_of("limit_train_batches", limit, loader)
    return loader


def evaluation_loaders(accelerator: Accelerator, given: Any, argument: str, limit: float | None) -> dict[str, Loader]:
    """Prepare one or several evaluation loaders, by name: a dict's keys, or dataloader_idx_0, ... for a list."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, list | tuple) and given and all(hasattr(g, "__iter__") and hasattr(g, "dataset") for g in given):
        named = {f"dataloader_idx_{i}": g for i, g in enumerate(given)}
    else:
        named = {"dataloader_idx_0": given}
    loaders = {str(name): accelerator.prepare_data_loader(g, training=False) for name, g in named.items()}
    for loader in loaders.values():
        loader.limit = limit_of(argument, limit, loader)
    return loaders


def limit_of(argument: str, limit: float | None, loader: Any) -> int | None:
    """Return how many batches of `loader` a limit means: an int counts batches, a float from 0.0 to 1.0 is a fraction.

    Raises:
        ConfigError: another number, or a fraction of a loader without a length.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0 or (isinstance(limit, float) and limit > 1.0):
        raise ConfigError(
            f"{argument} must be a number of batches (int) or a fraction from 0.0 to 1.0 (float), got {limit!r}. "
            f"Write {argument}=10 for ten batches, 0.1 for a tenth."
        )
    if isinstance(limit, int):
        return limit
    try:
        length = len(loader)
    except TypeError:
        raise ConfigError(f"{argument}={limit} is a fraction, and the loader has no length. Give a number of batches.") from None
    return max(1, int(length * limit)) if limit > 0 else 0


def method_of(stage: str) -> str:
    """Return the name of the module's method that gives the data of `stage`."""
    return _METHODS[stage]


def in_order(source: Any) -> Any:
    """Return a DataLoader like `source` that reads its data set in order: overfitting wants the same first batches each epoch."""
    from torch.utils.data import DataLoader

    if not isinstance(source, DataLoader) or source.batch_size is None:
        raise ConfigError("overfit_batches needs a DataLoader with a batch_size, to read its first batches in order.")
    return DataLoader(
        source.dataset,
        batch_size=source.batch_size,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        drop_last=source.drop_last,
        pin_memory=source.pin_memory,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        multiprocessing_context=source.multiprocessing_context,
        prefetch_factor=source.prefetch_factor,
        persistent_workers=source.persistent_workers,
    )


def length_of(loader: Loader) -> int | None:
    """Return how many batches an epoch of `loader` has; None where that is not known."""
    try:
        return len(loader)
    except TypeError:
        return None


def accumulation(options: Mapping[str, Any], loader: Loader) -> int:
    """Return the micro-batches of a window: as asked for, or what makes `global_batch_size` of the loader's batches.

    Raises:
        ConfigError: the global batch is not a multiple of what all ranks take at once, or that is not known.
    """
    wanted = options["global_batch_size"]
    if wanted is None:
        return options["accumulate_grad_batches"]
    once = loader.batch_samples
    if once is None:
        raise ConfigError("global_batch_size needs a loader with a fixed batch_size. Give accumulate_grad_batches instead.")
    if wanted % once:
        raise ConfigError(
            f"global_batch_size={wanted} is not a multiple of {once}, which all ranks take at once (batch_size times ranks). "
            f"Use {f'{wanted // once * once} or ' if wanted > once else ''}{(wanted // once + 1) * once}, or another batch_size."
            f"{_who_can(wanted, once, loader._shard[1])}"
        )
    return wanted // once


def _who_can(wanted: int, once: int, ranks: int) -> str:
    """Say which numbers of ranks keep a global batch that this one cannot, for whoever resumes on another number."""
    own, rest = divmod(once, ranks)
    if rest or wanted % own:
        return ""
    can = [str(n) for n in range(1, wanted // own + 1) if wanted // own % n == 0]
    return f" With batch_size={own} these numbers of ranks keep it: {', '.join(can)}."


def steps_between_validations(interval: float | None, batches: int | None, window: int) -> int:
    """Return after how many optimizer steps a validation is due within an epoch; 0: at its end only.

    Args:
        interval: int: optimizer steps; float: a part of the epoch.
    """
    if interval is None or (isinstance(interval, float) and interval == 1.0):
        return 0
    if (
        isinstance(interval, bool)
        or not isinstance(interval, int | float)
        or interval <= 0
        or (isinstance(interval, float) and interval > 1)
    ):
        raise ConfigError(
            f"val_check_interval must be a number of optimizer steps (int) or a part of the epoch (float), got {interval!r}. "
            "Write 100 for every hundred steps, 0.5 for twice an epoch, or leave it out."
        )
    if isinstance(interval, int):
        return interval
    if batches is None:
        raise ConfigError(
            f"val_check_interval={interval} is a part of the epoch, and the training loader has no length. "
            "Give a number of steps."
        )
    return max(1, int(-(-batches // window) * interval))
