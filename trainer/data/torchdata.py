"""torchdata's StatefulDataLoader, for `DataLoaderConfiguration(use_stateful_dataloader=True)`."""

from __future__ import annotations

import warnings
from typing import Any

from torch.utils.data import DataLoader

from ...strategies.errors import MissingDependency


def stateful(loader: DataLoader[Any], arguments: dict[str, Any]) -> Any:
    """Return a StatefulDataLoader with `arguments`; a loader that is one already keeps its snapshot interval.

    Raises:
        MissingDependency: torchdata is not installed.
    """
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise MissingDependency(
            f"use_stateful_dataloader=True needs torchdata, which could not be imported ({error}). Run pip install "
            "'drivetrain[data]', "
            "or leave it out: a data set without a state of its own is then read and dropped up to the position."
        ) from error
    every = getattr(loader, "snapshot_every_n_steps", 1)
    with warnings.catch_warnings():
        # torchdata 0.11 calls something that torch 2.13 has deprecated; there is nothing a user could do about it.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(**arguments, snapshot_every_n_steps=every)
