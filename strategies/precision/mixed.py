"""16-bit and 64-bit precisions: mixed (weights in fp32, matmuls in 16 bits under autocast) and true (everything in one dtype).

    bf16-mixed   autocast to bfloat16; the weights, their gradients and the optimizer stay fp32
    fp16-mixed   autocast to float16, and the loss is scaled so that small gradients do not vanish (torch.amp.GradScaler)
    bf16-true    parameters and floating buffers are bfloat16, so are gradients and optimizer state: half the memory
    fp16-true    the same in float16, without loss scaling (it needs fp32 gradients); for models that were made for it
    fp64         everything in double precision: to compare runs exactly

A "true" precision meets inputs of another dtype in two places, and casts them in both: the arguments of the model's own forward
(a forward pre-hook), and the batch that a step gets (`convert_input`). Only floating tensors are cast: labels stay what they are.
Source: Micikevicius et al. 2018, arXiv:1710.03740; torch.amp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import NonFiniteError
from .base import Precision

__all__ = ["FP64", "BF16Mixed", "BF16True", "FP16Mixed", "FP16True"]

_SKIPS_AT_MOST = 40
"""Steps that fp16 may skip in a row: the scale has been halved from 65536 to 6e-8 then, and it is not the scale's fault."""


class Autocast(AbstractContextManager["Autocast", None]):
    """`torch.autocast` that is made once and may be entered again and again, also while it is entered.

    torch's own object remembers one previous state: nested in itself it would leave autocast switched on for good.
    """

    __slots__ = ("_contexts", "_depth", "cache_enabled", "device_type", "dtype")

    def __init__(self, device_type: str, dtype: torch.dtype, *, cache_enabled: bool | None = None) -> None:
        self.device_type = device_type
        self.dtype = dtype
        self.cache_enabled = cache_enabled
        self._contexts = [torch.autocast(device_type, dtype, cache_enabled=cache_enabled)]
        self._depth = 0

    def __enter__(self) -> Autocast:
        if self._depth == len(self._contexts):
            self._contexts.append(torch.autocast(self.device_type, self.dtype, cache_enabled=self.cache_enabled))
        self._contexts[self._depth].__enter__()
        self._depth += 1
        return self

    def __exit__(self, *exc: Any) -> None:
        self._depth -= 1
        self._contexts[self._depth].__exit__(None, None, None)


class _Mixed(Precision):
    """Autocast around the step; the parameters are left as they are.

    Args:
        cache_enabled: whether autocast keeps the weights that it cast until the step is over; None is torch's own default.
    """

    autocast_dtype: torch.dtype | None

    def __init__(self, *, cache_enabled: bool | None = None) -> None:
        self.cache_enabled = cache_enabled
        self._autocast: dict[str, Autocast] = {}

    def autocast(self, device: torch.device) -> Autocast:
        """Return the one context of this precision for `device`; it may be kept, and entered anew for each step."""
        context = self._autocast.get(device.type)
        if context is None:
            assert self.autocast_dtype is not None
            context = self._autocast[device.type] = Autocast(device.type, self.autocast_dtype, cache_enabled=self.cache_enabled)
        return context


class BF16Mixed(_Mixed):
    """bfloat16 where it is safe, fp32 weights. The range is that of fp32, so nothing is scaled."""

    name = "bf16-mixed"
    autocast_dtype = torch.bfloat16

    def available(self, device: torch.device) -> str | None:
        """Every CPU computes bf16 (those without instructions for it slowly); CUDA from compute capability 8.0."""
        return _bf16_reason(self.name, device)


class FP16Mixed(_Mixed):
    """float16 where it is safe, fp32 weights, and a loss scale that is kept in the checkpoint.

    The scale is the run's, not an optimizer's: it is updated once per window, before the first loss that is scaled after the
    optimizers stepped. Unscaling an optimizer twice before it steps does nothing the second time, so clipping is always safe.

    Args:
        init_scale, growth_factor, backoff_factor, growth_interval: as torch.amp.GradScaler takes them.
        cache_enabled: as torch.autocast takes it.
    """

    name = "fp16-mixed"
    autocast_dtype = torch.float16
    scales_loss = True

    def __init__(
        self,
        *,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        cache_enabled: bool | None = None,
    ) -> None:
        super().__init__(cache_enabled=cache_enabled)
        self._options: dict[str, Any] = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
        }
        self._scaler: torch.amp.GradScaler | None = None  # made at the first loss, on the loss's device
        self._loaded: dict[str, Any] | None = None
        self._unscaled: dict[int, Optimizer] = {}  # since the last update: unscaled and not yet stepped
        self._to_update = False  # some optimizer stepped, or skipped its step, since the last update
        # Set by a strategy whose ranks hold different pieces of the gradients: makes a flag the maximum over ranks, in place.
        self.agree: Callable[[Tensor], None] | None = None
        self._skips: dict[int, int] = {}  # by optimizer: how many steps in a row were skipped

    def available(self, device: torch.device) -> str | None:
        """Works on CPU and on every accelerator that autocasts to float16.

        Tried on a CPU under torch 2.13: linear, convolutions, norms, attention, GRU and all common losses; matmuls were 15 times
        slower than in fp32, and nn.LSTM fails there with torch's own error (oneDNN has no fp16 LSTM).
        """
        return _autocast_reason(self.name, device, torch.float16, "bf16-mixed")

    @property
    def scale_value(self) -> float:
        """The scale that the next loss is multiplied by. Reads the device."""
        self._finish_window()
        return float(self.state_dict()["scale"])

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale; the first call after a step updates the scale before."""
        if self._to_update or self._unscaled:
            self._finish_window()
        return self._made(loss.device).scale(loss)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of `optimizer` by the scale and look for overflow; once until it steps."""
        if id(optimizer) not in self._unscaled:
            device = optimizer.param_groups[0]["params"][0].device
            scaler = self._made(device)
            scaler.unscale_(optimizer)
            self._unscaled[id(optimizer)] = optimizer
            if self.agree is not None:
                flags: dict[Any, Tensor] = scaler._found_inf_per_device(optimizer)  # pyright: ignore
                if not flags:  # this rank has no gradient of it, as in a stage of a pipeline that is frozen
                    assert scaler._scale is not None  # as `scaler.unscale_` asserts itself
                    flags[scaler._scale.device] = torch.zeros_like(scaler._scale)
                for flag in flags.values():
                    self.agree(flag)

    def step(self, optimizer: Optimizer) -> bool:
        """Step `optimizer` unless its gradients overflowed; return whether it stepped. Reads one number, as torch's own does.

        Raises:
            NonFiniteError: 40 steps in a row were skipped, which no scale explains.
        """
        self.unscale_(optimizer)
        del self._unscaled[id(optimizer)]
        scaler = self._made(None)
        # Private in name, and what torch's own ShardedGradScaler is written with. GradScaler.step would read the same number
        # and not tell whether the optimizer stepped, which the scheduler must know.
        found = scaler._found_inf_per_device(optimizer).values()  # pyright: ignore[reportPrivateUsage]
        self._to_update = self._to_update or bool(found)
        if any(flag.item() for flag in found):
            self._count_skip(optimizer)
            return False
        self._skips.pop(id(optimizer), None)
        optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and how far its growth is, as JSON values."""
        if self._scaler is None:
            return dict(self._loaded) if self._loaded is not None else self._new_scaler("cpu").state_dict()
        self._finish_window()
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. The options in it win over those of the constructor, as in torch."""
        self._loaded = dict(state)
        self._scaler, self._to_update = None, False
        self._unscaled.clear()
        self._skips.clear()

    def _made(self, device: torch.device | None) -> torch.amp.GradScaler:
        if self._scaler is None:
            self._scaler = self._new_scaler("cpu" if device is None else device.type)
            if self._loaded is not None:
                self._scaler.load_state_dict(self._loaded)
        return self._scaler

    def _new_scaler(self, device_type: str) -> torch.amp.GradScaler:
        return _Scaler(device_type, **self._options)

    def _finish_window(self) -> None:
        """Update the scale if the optimizers of the window have stepped."""
        for key, optimizer in list(self._unscaled.items()):
            # Unscaled and never stepped: an abandoned step, if its gradients are cleared; otherwise one that is still to come.
            if all(p.grad is None or not p.grad.any() for group in optimizer.param_groups for p in group["params"]):
                del self._unscaled[key]
                self._to_update = True
        if self._to_update and not self._unscaled and self._scaler is not None:
            self._to_update = False
            if any(s["found_inf_per_device"] for s in self._scaler._per_optimizer_states.values()):  # pyright: ignore[reportPrivateUsage]
                self._scaler.update()

    def _count_skip(self, optimizer: Optimizer) -> None:
        skips = self._skips[id(optimizer)] = self._skips.get(id(optimizer), 0) + 1
        if skips > _SKIPS_AT_MOST:
            raise NonFiniteError(
                f"fp16-mixed skipped {skips} steps of {type(optimizer).__name__} in a row: its gradients are NaN or Inf at "
                "every loss scale, so the scale is not the reason. The weights are those of the last good step. Look at the "
                "loss, or use precision='bf16-mixed', which has the range of fp32."
            )


class _Scaler(torch.amp.GradScaler):
    """torch's GradScaler, which also takes gradients that are cut up (DTensors) beside whole ones: it sees this rank's pieces."""

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(hasattr(g, "_local_tensor") for g in grads):
            holders: list[Tensor] = []
            for grad in grads:
                piece = getattr(grad, "_local_tensor", grad)
                holders.append(piece.detach())  # another object of the same memory, that can hold it as its gradient
                holders[-1].grad = piece
            optimizer = SimpleNamespace(param_groups=[{"params": holders}])
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)


class _True(Precision):
    """Parameters and floating buffers in one dtype; so are gradients, optimizer state and what the model computes."""

    param_dtype: torch.dtype | None

    def convert(self, model: nn.Module) -> nn.Module:
        """Cast the floating parameters and buffers of `model` in place, and from now on the floating inputs of its forward.

        Complex and integer tensors stay what they are. The parameters stay the same objects: optimizers keep working.
        """
        dtype = self.param_dtype
        assert dtype is not None
        _TO[dtype](model)
        model.register_forward_pre_hook(functools.partial(_cast_forward_inputs, dtype), with_kwargs=True)
        return model

    def convert_input(self, data: Any) -> Any:
        """Return `data` (a batch: tensors in lists, tuples and dictionaries) with its floating tensors cast."""
        assert self.param_dtype is not None
        return _cast(data, self.param_dtype)


class BF16True(_True):
    """Everything in bfloat16: half the memory of fp32. Eight bits of mantissa: small updates to big weights are lost."""

    name = "bf16-true"
    param_dtype = torch.bfloat16

    def available(self, device: torch.device) -> str | None:
        return _bf16_reason(self.name, device)


class FP16True(_True):
    """Everything in float16, the loss not scaled: gradients under 6e-8 vanish and above 65504 overflow.

    Adam and its kin need eps=1e-4 or so: their default of 1e-8 is 0 in float16, and 0/0 is NaN.
    """

    name = "fp16-true"
    param_dtype = torch.float16


class FP64(_True):
    """Everything in double precision."""

    name = "fp64"
    param_dtype = torch.float64

    def available(self, device: torch.device) -> str | None:
        if device.type in ("mps", "hpu", "tpu", "xla"):
            return f"precision='fp64' was asked for on {device.type}, which has no float64. Use device='cpu', or 'fp32'."
        return None


_TO = {torch.bfloat16: nn.Module.bfloat16, torch.float16: nn.Module.half, torch.float64: nn.Module.double}


def _cast_forward_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _cast(args, dtype), _cast(kwargs, dtype)


def _cast(data: Any, dtype: torch.dtype) -> Any:
    """Cast floating tensors in nested lists, tuples (named ones too) and mappings; anything else is returned as it is."""
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, Mapping):
        cast = {key: _cast(value, dtype) for key, value in data.items()}
        return cast if type(data) is dict else _rebuilt(data, cast)
    if isinstance(data, tuple):
        items = [_cast(item, dtype) for item in data]
        return type(data)(*items) if hasattr(data, "_fields") else tuple(items)
    if isinstance(data, list):
        return [_cast(item, dtype) for item in data]
    return data


def _rebuilt(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Another kind of mapping (OrderedDict, transformers' BatchEncoding) with new values, of its class if that can be made."""
    try:
        return type(original)(items)  # pyright: ignore[reportCallIssue]
    except TypeError:
        return items


def _bf16_reason(name: str, device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability(device)
        nearest = "fp16-mixed" if name.endswith("mixed") else "fp16-true"
        return (
            f"precision={name!r} needs CUDA compute capability 8.0 or newer; {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}. Use precision={nearest!r}."
        )
    return _autocast_reason(name, device, torch.bfloat16, "fp32") if name.endswith("mixed") else None


def _autocast_reason(name: str, device: torch.device, dtype: torch.dtype, nearest: str) -> str | None:
    if not torch.amp.is_autocast_available(device.type):
        return f"precision={name!r} was asked for on {device.type}, where torch has no autocast. Use precision='fp32'."
    supported = {"cpu": (torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16)}.get(device.type)
    if supported is None and device.type != "mps":
        backend = getattr(torch, device.type, None)
        listing = getattr(backend, "get_amp_supported_dtype", None)
        supported = tuple(listing()) if listing is not None else None
    if supported is not None and dtype not in supported:
        known = ", ".join(str(d).removeprefix("torch.") for d in supported)
        return f"precision={name!r} was asked for on {device.type}, whose autocast knows only {known}. Use precision={nearest!r}."
    return None
