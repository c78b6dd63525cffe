"""Precision: in which number formats a model computes. The base class is fp32 (or whatever the parameters are).

A strategy carries one `Precision` and asks it, in this order: `available` (before anything is built), `convert` (the model,
before it is sharded), `sharded` (once it is), `convert_input` (a batch), `autocast` (around the step), `scale` (the loss),
`unscale_` (before clipping), `step` (the optimizer).
The base class does nothing at each of these points, and the accelerator does not even call what is not overridden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer


class Precision:
    """fp32: the model computes in the dtype of its own parameters, float64 included."""

    name: str = "fp32"
    param_dtype: torch.dtype | None = None  # what parameters are cast to by `convert`; None leaves them
    autocast_dtype: torch.dtype | None = None  # what `autocast` computes matmuls in; None means no autocast
    scales_loss: bool = False  # True where `scale`, `unscale_` and `step` do something (fp16)
    reason: str = ""  # why this one, where the name that was asked for left it open; for the start-up lines

    def available(self, device: torch.device) -> str | None:
        """Return None where `device` can do this precision, else a sentence with the reason and the nearest that works."""
        return None

    def look_at(self, model: nn.Module) -> None:
        """Take note of a whole model that a strategy is about to take apart; `convert` is then called for each of its parts."""

    def convert(self, model: nn.Module) -> nn.Module:
        """Cast or swap modules before the model is moved and sharded; return the model."""
        return model

    def sharded(self, model: nn.Module) -> None:
        """Take note that a strategy cut `model` up by fully_shard, after `convert`; collective if it needs to be."""

    def convert_input(self, data: Any) -> Any:
        """Return a batch with its floating tensors in the dtype of the parameters. Called only where `param_dtype` is set."""
        return data

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which a step runs. Called only where `autocast_dtype` is set."""
        return nullcontext()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss whose backward is run. Called only where `scales_loss`."""
        return loss

    def unscale_(self, optimizer: Optimizer) -> None:
        """Bring the gradients of `optimizer` back to the unit of the unscaled loss, once per step."""

    def step(self, optimizer: Optimizer) -> bool:
        """Step `optimizer`; return whether it stepped (False when fp16 found an overflow)."""
        optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and JSON values. fp32 has nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def explain(self) -> str:
        """Return what became of the models, for the start-up lines; empty where there is nothing to say. After `convert`."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
