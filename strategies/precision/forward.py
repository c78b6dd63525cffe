"""A model that is called bare computes in the run's precision too.

`Accelerator.forward_backward` and the Trainer run whole steps under the precision's context. In a loop of one's own the prepared
model is just called, so its forward enters the context by itself: `run_inside`. What leaves it is fp32 again (`widened`), so that
a loss that is computed outside is computed in fp32, as Accelerate does. Inside a context that was entered nothing is widened.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

__all__ = ["run_inside", "widened"]

_HALF = (torch.float16, torch.bfloat16)
_HANDLES = "_drivetrain_forward_hooks"


def widened(output: Any) -> Any:
    """Return `output`, a tensor or a nested structure, with 16-bit floating tensors as fp32."""
    return apply_to_collection(output, Tensor, lambda t: t.float() if t.dtype in _HALF else t)


def run_inside(model: nn.Module, context: AbstractContextManager[Any], device: torch.device) -> None:
    """Let `model(...)` enter `context`, which must allow to be entered anew while it is entered.

    By hooks; nothing is replaced. Called again for the same model, the new context takes the place of the old one.
    """
    for handle in vars(model).pop(_HANDLES, ()):
        handle.remove()
    hooks = _Inside(context, device.type)
    # The second also runs when the forward raises.
    vars(model)[_HANDLES] = (
        model.register_forward_pre_hook(hooks.before),
        model.register_forward_hook(hooks.after, always_call=True),
    )


class _Inside:
    """The two hooks of one model. A class, so that a model with them can still be copied and pickled."""

    def __init__(self, context: AbstractContextManager[Any], device_type: str) -> None:
        self.context, self.device_type = context, device_type
        self.outermost: list[bool] = []  # for each call under way

    def before(self, module: nn.Module, args: Any) -> None:
        self.outermost.append(not torch.is_autocast_enabled(self.device_type))
        self.context.__enter__()

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.context.__exit__(None, None, None)
        return widened(output) if self.outermost.pop() and output is not None else None
