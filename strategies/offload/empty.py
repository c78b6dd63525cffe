"""Models without values: built in no time and no memory, to be loaded or placed afterwards.

    with init_empty_weights():
        model = Transformer(config)             # parameters on the meta device, buffers with their values
Unlike Accelerate's, the context holds for the thread that entered it, and a parameter that two modules share stays shared.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["init_empty_weights", "init_on_device"]

_here = threading.local()
_turn = threading.Lock()
_entered = 0
_register = nn.Module.register_parameter


def _register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    _register(module, name, param)
    device: torch.device | None = getattr(_here, "device", None)
    if param is not None and device is not None and param.device != device:
        marks = {k: v for k, v in param.__dict__.items() if k != "_is_param"}
        moved = nn.Parameter(param.detach().to(device), requires_grad=param.requires_grad)
        for key, value in marks.items():
            setattr(moved, key, value)
        module._parameters[name] = moved


_RANDOM = {
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "random_", "log_normal_", "exponential_", "cauchy_", "geometric_", "bernoulli_")
}


class _NoDraws(TorchFunctionMode):
    """Drawing random numbers into tensors without values does nothing; torch would import its compiler for it (100 MB)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RANDOM or getattr(func, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def _parameters_on(device: torch.device) -> Iterator[None]:
    global _entered
    with _turn:
        _entered += 1
        nn.Module.register_parameter = _register_parameter  # pyright: ignore[reportAttributeAccessIssue]
    before = getattr(_here, "device", None)
    _here.device = device
    try:
        yield
    finally:
        _here.device = before
        with _turn:
            _entered -= 1
            if not _entered:
                nn.Module.register_parameter = _register


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool = False) -> Iterator[None]:
    """Build the models inside on `device`: their parameters, and with `include_buffers` all tensors that are made."""
    target = torch.device(device)
    with ExitStack() as stack:
        if include_buffers:
            stack.enter_context(torch.device(target))
        if target.type == "meta":
            stack.enter_context(_NoDraws())
        stack.enter_context(_parameters_on(target))
        yield


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Build the models inside without values: parameters on the meta device. Buffers, which are small, keep their values."""
    with init_on_device("meta", include_buffers):
        yield
