"""How many bytes: of a module's weights in whatever type, and of what a forward makes beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..composite import is_composite, num_bytes
from ..errors import ConfigError
from .blocks import choose_blocks

__all__ = ["compute_module_sizes", "find_tied_parameters", "measure_activations", "read_dtype", "tensor_bytes", "tensors_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def tensor_bytes(
    name: str, tensor: Tensor, dtype: torch.dtype | str | None = None, special_dtypes: Mapping[str, torch.dtype] | None = None
) -> int:
    """Return the bytes that a tensor takes once it has the type `dtype`, which only floating-point ones take, and none that is
    made of others (a quantised one)."""
    if is_composite(tensor):
        return num_bytes(tensor)
    chosen = (special_dtypes or {}).get(name) or read_dtype(dtype)
    if chosen is None or not tensor.is_floating_point():
        return tensor.numel() * tensor.element_size()
    return tensor.numel() * chosen.itemsize


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ConfigError(f"dtype={dtype!r} is no type of torch. For example 'bfloat16'.")
        return found
    return dtype


def compute_module_sizes(
    model: nn.Module,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Return name -> bytes of each module, parameter and buffer; "" is the whole. A tied tensor counts once in each module."""
    sizes: dict[str, int] = {}
    seen: dict[str, set[int]] = {}
    found = dict(model.named_buffers(remove_duplicate=False)) if buffers_only else tensors_of(model)
    for name, tensor in found.items():
        num_bytes = tensor_bytes(name, tensor, dtype, special_dtypes)
        parts = name.split(".")
        for i in range(len(parts) + 1):
            key = ".".join(parts[:i])
            if id(tensor) not in seen.setdefault(key, set()):
                seen[key].add(id(tensor))
                sizes[key] = sizes.get(key, 0) + num_bytes
    return sizes


def find_tied_parameters(model: nn.Module) -> list[list[str]]:
    """Return the groups of names that stand for one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [sorted(names) for names in groups.values() if len(names) > 1]


def measure_activations(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Return the bytes that one forward of `model` needs beside its weights: what the largest block makes, and what passes.

    Nothing is computed: the arguments and the model are taken as shapes (the meta device). An upper bound: what a block makes
    and drops before its end is counted as if it were kept to its end.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    blocks = {id(m) for m in choose_blocks(model).values()}
    made = {"now": 0, "block": 0, "outside": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor) and not func.is_view:
                    made["now"] += tensor.numel() * tensor.element_size()
            return result

    def begin(module: nn.Module, _: Any) -> None:
        if id(module) in blocks:
            made["outside"] += made["now"]
            made["now"] = 0

    def end(module: nn.Module, _: Any, output: Any) -> None:
        if id(module) in blocks:
            made["block"] = max(made["block"], made["now"])
            made["now"] = 0

    shapes = {n: t.to("meta") for n, t in tensors_of(model).items()}
    to_meta: Callable[[Any], Any] = lambda v: v.to("meta") if isinstance(v, Tensor) else v  # noqa: E731
    hooks = [nn.modules.module.register_module_forward_pre_hook(begin), nn.modules.module.register_module_forward_hook(end)]
    try:
        with torch.no_grad(), Count():
            given = {k: to_meta(v) for k, v in kwargs.items()}
            torch.func.functional_call(model, shapes, tuple(to_meta(a) for a in args), given, tie_weights=False)
    finally:
        for hook in hooks:
            hook.remove()
    return made["block"] + made["outside"] + made["now"]
