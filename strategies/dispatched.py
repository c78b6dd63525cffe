"""Whether a model's weights were put in several places: dispatched, by offload/ or by Accelerate, which notes it the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .errors import ConfigError

if TYPE_CHECKING:
    from .base import Strategy

__all__ = ["check_dispatched"]


def check_dispatched(name: str, model: nn.Module, strategy: Strategy) -> None:
    """Refuse a dispatched `model` under a strategy that would move it.

    Raises:
        ConfigError: with the strategy to use.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not device_map or len({str(place) for place in device_map.values()} - {"cpu"}) == 0:
        return
    if not getattr(strategy, "takes_dispatched", False):
        places = ", ".join(sorted({str(place) for place in device_map.values()}))
        raise ConfigError(
            f"The model {name!r} ({type(model).__name__}) is dispatched over {places}, and strategy={strategy.name!r} would "
            "move it to one device. Use strategy='offload' (one process), or prepare the model as it was before that."
        )
