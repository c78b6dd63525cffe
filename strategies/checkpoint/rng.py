"""The random states of one process: python, numpy (if something imported it), torch, and the accelerator.

    tensors, values = capture()        at an optimizer boundary
    restore(tensors, values)           last of all, just before the next batch: whatever runs in between may draw numbers

Plain tensors and integers: no pickle. The state of a torch generator is the byte tensor that torch itself hands out.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

_TORCH = "rng/torch"
_DEVICE = "rng/device"


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, values) from which `restore` sets the same states."""
    version, words, gauss = random.getstate()
    tensors: dict[str, Tensor] = {_TORCH: torch.get_rng_state()}
    values: dict[str, Any] = {"python": [version, list(words), gauss], "numpy": None, "device": None}
    if "numpy" in sys.modules:
        state: Any = sys.modules["numpy"].random.get_state(legacy=False)
        values["numpy"] = _plain(state)
    module = _device_module()
    if module is not None:
        tensors[_DEVICE] = module.get_rng_state()
        values["device"] = module.__name__.rpartition(".")[2]
    return tensors, values


def restore(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> list[str]:
    """Set the states that `capture` returned; return a sentence for each that has no place here (another device).

    Raises:
        CheckpointError: a state is missing or not valid; those before it in the list python, numpy, torch, device are set.
    """
    notes: list[str] = []
    name = "python"
    try:
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        name = "numpy"
        if values["numpy"] is not None:
            import numpy as np

            np.random.set_state(_arrays(values["numpy"]))
        name = "torch"
        torch.set_rng_state(tensors[_TORCH])
        name = "device"
        if values["device"] is not None:
            module = _device_module()
            here = module.__name__.rpartition(".")[2] if module is not None else "cpu"
            if module is not None and here == values["device"]:
                module.set_rng_state(tensors[_DEVICE])
            else:
                notes.append(f"The random state of {values['device']} was not restored: this process runs on {here}.")
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError, ImportError) as error:
        raise CheckpointError(f"The random state of {name} cannot be restored: {type(error).__name__}: {error}.") from error
    return notes


def _device_module() -> Any | None:
    """Return torch.cuda, torch.xpu, ... if this process uses one already; asking must not start it."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    module: Any = torch.get_device_module(device)
    started = getattr(module, "is_initialized", lambda: True)()
    return module if started and hasattr(module, "get_rng_state") else None


def _plain(value: Any) -> Any:
    """Turn numpy's dict of arrays and numbers into lists and integers."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _arrays(value: Any) -> Any:
    """Turn lists back into arrays, as numpy's generators want them."""
    import numpy as np

    if isinstance(value, dict):
        return {k: _arrays(v) for k, v in value.items()}
    return np.asarray(value, dtype=np.uint64) if isinstance(value, list) else value
