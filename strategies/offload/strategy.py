"""OffloadStrategy: one process, a model larger than the memory it may take, as a Trainer's or an Accelerator's strategy.

    trainer = Trainer(strategy=OffloadStrategy("folder with safetensors", max_memory={"cpu": "1GB"}))
    trainer.predict(module, loader)
A model without values (init_empty_weights) is filled from the checkpoint; one that has them is placed.
What passes through buffers is not trained: freeze it, and train what is resident, such as PEFT's adapters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import named_state
from ..base import Strategy
from ..errors import ConfigError
from .away import is_away
from .dispatch import dispatch_model, load_checkpoint_and_dispatch
from .handle import weights_of

if TYPE_CHECKING:
    from ..precision.base import Precision
    from ..world import World

__all__ = ["OffloadStrategy"]


class OffloadStrategy(Strategy):
    """Blocks of weights pass through buffers; everything else is the single device.

    Args:
        checkpoint: safetensors or a checkpoint of ours, for models without values.
        device_map, max_memory, no_split_module_classes, prefetch, io: as for `load_checkpoint_and_dispatch`.
        offload_dir: for models that have values: the folder that gets what is to lie on the disk.
    """

    name = "offload"
    takes_dispatched = True

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        device_map: str | Mapping[str, Any] = "auto",
        max_memory: Mapping[Any, int | str] | None = None,
        no_split_module_classes: Sequence[str] | None = None,
        offload_dir: str | os.PathLike[str] | None = None,
        prefetch: bool = True,
        io: str = "cached",
        precision: str | Precision | None = None,
        inference: bool = False,
    ) -> None:
        super().__init__(precision=precision, inference=inference)
        self.checkpoint, self.offload_dir, self.device_map = checkpoint, offload_dir, device_map
        self._options: dict[str, Any] = {
            "max_memory": max_memory,
            "no_split_module_classes": no_split_module_classes,
            "prefetch": prefetch,
            "io": io,
        }
        self._models: list[nn.Module] = []

    def check_world(self, world: World) -> None:
        if world.size > 1:
            raise ConfigError(
                f"strategy='offload' was asked for on {world.size} processes, each of which would hold the buffers of the whole "
                "model. Use one process, or strategy='fsdp', which divides the model."
            )

    def prepare_model(self, name: str, model: nn.Module) -> nn.Module:
        """Place `model`, in place. The precision's conversion happens where a weight is read."""
        precision = self.precision
        assert precision is not None
        if precision.name not in ("fp32", "bf16-true", "fp16-true", "bf16-mixed", "fp16-mixed"):
            # bitsandbytes' products keep views of the weights for the backward pass where nobody sees them.
            away = weights_of(model, None) is not None or any(p.is_meta for p in model.parameters())
            if away or not precision.name.startswith(("fp8-ao", "mxfp8-ao", "int8-ao", "int8-weights-ao")):
                raise ConfigError(
                    f"precision={precision.name!r} converts the modules of a model"
                    + (", and here their weights are not there" if away else ", and its products cannot pass through buffers")
                    + ". Use bf16-true or bf16-mixed, or quantise the model by torchao's quantize_ before it is dispatched."
                )
        if self.inference:
            model.requires_grad_(False)
            model.eval()
        if weights_of(model, None) is None:
            if any(p.is_meta for p in model.parameters()):
                if self.checkpoint is None:
                    raise ConfigError(
                        f"Model {name!r} has no values (it is on the meta device). Say where they are: "
                        "OffloadStrategy('folder with safetensors')."
                    )
                kind = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16}.get(precision.name)
                load_checkpoint_and_dispatch(model, self.checkpoint, self.device_map, dtype=kind, **self._options)
            else:
                model = precision.convert(model)
                dispatch_model(model, self.device_map, offload_dir=self.offload_dir, **self._options)
        if precision.autocast_dtype is not None:
            from ..precision.forward import run_inside

            run_inside(model, precision.autocast(self.device), self.device)
        self._models.append(model)
        return model

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Take an optimizer over what is resident.

        Raises:
            ConfigError: it holds weights that pass through buffers, which an update would not reach.
        """
        away = sum(is_away(p) for group in optimizer.param_groups for p in group["params"])
        if away:
            raise ConfigError(
                f"The optimizer holds {away} weights that are offloaded, which it cannot update. Give it those that are trained: "
                "[p for p in model.parameters() if p.requires_grad], with the base frozen."
            )
        return super().prepare_optimizer(optimizer)

    def state_tensors(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state of what is resident: what is offloaded does not change, and lies in its files."""
        tensors, values = named_state.optimizer_state(models, optimizers)
        own = {n: t for n, t in named_state.model_tensors(models).items() if not is_away(t)}
        return own | tensors, values

    def explain(self) -> list[tuple[str, str]]:
        rows = [("strategy", self.name), ("processes", "1")]
        for model in self._models:
            rows += weights_of(model).explain()
        return rows

    def stop(self) -> None:
        self._models.clear()
        super().stop()
