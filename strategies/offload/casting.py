"""Layer-wise casting: weights are kept in a small type, and each layer's are converted for the time of its forward.

    attach_layerwise_casting_hooks(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
A model in float8 takes half of the memory that it takes in bfloat16, and one layer more. For inference, and for adapters on a
frozen base: the converted weights are what a backward pass keeps. Source: Accelerate's function of the same name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .away import is_away
from .blocks import map_tensors

__all__ = ["attach_layerwise_casting_hooks", "detach_casting"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding)
"""The layers that are converted, as in Accelerate; norms stay as they are."""


class _Cast:
    """One layer: `stored` outside of its forward, `computed` within."""

    def __init__(self, module: nn.Module, storage: torch.dtype, compute: torch.dtype, non_blocking: bool) -> None:
        self.module, self.compute, self.non_blocking = module, compute, non_blocking
        self.dtypes = {k: p.dtype for k, p in module._parameters.items() if p is not None}
        with torch.no_grad():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(storage)
        self.own_forward = module.forward
        self.had_forward = "forward" in module.__dict__

        def forward(*args: Any, **kwargs: Any) -> Any:
            stored = dict(module._parameters)
            change = lambda t: t.to(compute) if t.is_floating_point() else t  # noqa: E731
            try:
                for key, parameter in stored.items():
                    if parameter is not None and parameter.is_floating_point():
                        if parameter.requires_grad and torch.is_grad_enabled() and module.training:
                            raise ConfigError(
                                f"{type(module).__name__}.{key} is to be trained, and is kept in {parameter.dtype}, in which an "
                                "update is lost. Freeze it (requires_grad_(False)) and train adapters, or call model.eval()."
                            )
                        value = parameter.detach().to(compute, non_blocking=self.non_blocking)
                        module._parameters[key] = value  # type: ignore[assignment]
                return self.own_forward(*map_tensors(args, change), **map_tensors(kwargs, change))
            finally:
                module._parameters.update(stored)

        forward.__doc__ = self.own_forward.__doc__
        forward.__signature__ = inspect.signature(self.own_forward)  # type: ignore[attr-defined]
        forward.cast = self  # type: ignore[attr-defined]
        module.forward = forward

    def remove(self) -> None:
        if self.had_forward:
            self.module.forward = self.own_forward
        else:
            del self.module.forward
        with torch.no_grad():
            for key, dtype in self.dtypes.items():
                self.module._parameters[key].data = self.module._parameters[key].data.to(dtype)  # type: ignore[union-attr]


def attach_layerwise_casting_hooks(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | Sequence[str] | None = None,
    skip_modules_classes: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    non_blocking: bool = False,
) -> None:
    """Keep the weights of Linear, Conv and Embedding layers in `storage_dtype`, and compute with them in `compute_dtype`.

    Args:
        skip_modules_pattern: regular expressions; a layer whose name one of them finds stays as it is.
        skip_modules_classes: as do modules of these classes, and what is inside them.
    Raises:
        ConfigError: nothing was converted, a layer is converted already, or its weights are offloaded.
    """
    patterns = [skip_modules_pattern] if isinstance(skip_modules_pattern, str) else list(skip_modules_pattern or ())
    classes = skip_modules_classes if isinstance(skip_modules_classes, type) else tuple(skip_modules_classes or ())
    chosen: list[tuple[str, nn.Module]] = []

    def visit(name: str, part: nn.Module) -> None:
        if (classes and isinstance(part, classes)) or any(name and re.search(p, name) for p in patterns):
            return
        if isinstance(part, _LAYERS):
            chosen.append((name, part))
            return
        for key, child in part.named_children():
            visit(f"{name}.{key}" if name else key, child)

    visit("", module)
    if not chosen:
        raise ConfigError(f"{type(module).__name__} has no Linear, Conv or Embedding layer left to convert. Skip fewer.")
    for name, part in chosen:
        if hasattr(part.__dict__.get("forward"), "cast"):
            raise ConfigError(f"{name} is converted already. Call remove_hook_from_submodules first.")
        for key, parameter in part._parameters.items():
            if parameter is not None and (is_away(parameter) or parameter.is_meta):
                raise ConfigError(
                    f"{name}.{key} is offloaded. Give dispatch_model a checkpoint in {storage_dtype}, or cast what is resident."
                )
    for _, part in chosen:
        _Cast(part, storage_dtype, compute_dtype, non_blocking)


def detach_casting(module: nn.Module) -> None:
    """Give the layers inside `module` their types and forwards back."""
    for part in module.modules():
        cast = getattr(part.__dict__.get("forward"), "cast", None)
        if isinstance(cast, _Cast):
            cast.remove()
