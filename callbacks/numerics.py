"""What the numbers of each layer are like in their format: how large, how scaled, which vanish, which saturate.

    Trainer(callbacks=[Numerics()])                     every Linear in low precision (or every Linear, where none is)
    Numerics(every_n_steps=500, layers=("blocks.0.*",))

Logged, at every n-th step:  numerics/<layer>/<input|weight|grad>/<amax|scale|underflow|subnormal|overflow>
    input   what goes into the layer      weight   its weight      grad   the gradient of its output
in the format that the layer's products take them in: float8 or int8 with the scale of that backend, else that of autocast (or of
the tensor itself), unscaled. What each number means is in strategies/precision/formats.py. Over several ranks: amax is the
largest, scale the smallest, shares are means. A layer that is called several times in a step is measured at its first call.

Between two such steps nothing is hooked: an ordinary step pays one comparison. A measured step copies each tensor in fp32. Layers
inside a compiled graph are seen too, at the price of one more compilation, since hooks are part of what is compiled.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..strategies.errors import ConfigError
from ..strategies.precision.formats import MEASURED, NumberFormat, measure
from ..strategies.precision.linears import LowPrecisionLinear
from .log_points import LogPointCallback

if TYPE_CHECKING:
    from .base import TrainerView

__all__ = ["Numerics"]

_KINDS = ("input", "weight", "grad")


class Numerics(LogPointCallback):
    """Log the numerics of layers.

    Args:
        every_n_steps: optimizer steps; a multiple of `log_every_n_steps`, which is the default.
        layers: names, with `*` and `?` as in file names. Default: every Linear that multiplies in low precision, else every one.
        format: measure in this format instead of the layer's own: NumberFormat(torch.float8_e4m3fn, "tensor") in a run in bf16
            says what float8 would lose.
    """

    def __init__(
        self, every_n_steps: int | None = None, *, layers: Sequence[str] = (), format: NumberFormat | None = None
    ) -> None:
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise ConfigError(f"Numerics(every_n_steps={every_n_steps!r}): expected a whole number of at least 1, such as 100.")
        self.every_n_steps = every_n_steps
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.format = format
        self.measured: dict[str, Tensor] = {}
        """"<layer>/<kind>" -> five numbers on the device, of the last measured step."""
        self._every = 0
        self._names: list[str] = []
        self._handles: list[Any] = []
        self._step = -1  # the step that is, or was last, measured

    def on_fit_start(self, trainer: TrainerView, module: nn.Module) -> None:
        """Choose the layers.

        Raises:
            ConfigError: `every_n_steps` meets no log points, or a pattern no layer.
        """
        every = trainer.log_every_n_steps
        self._every = self.every_n_steps if self.every_n_steps is not None else every
        if every < 1 or self._every % every:
            raise ConfigError(
                f"Numerics(every_n_steps={self._every}) logs at log points, and those come every {every} steps. "
                f"Use a multiple of log_every_n_steps={every}" + (", which must be at least 1." if every < 1 else ".")
            )
        self._names = self._choose(module)

    def _choose(self, module: nn.Module) -> list[str]:
        has_weight = {n: m for n, m in module.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
        if self.layers:
            for pattern in self.layers:
                if not fnmatch.filter(has_weight, pattern):
                    raise ConfigError(
                        f"Numerics(layers={pattern!r}) meets no layer with a weight. "
                        f"There are: {', '.join(list(has_weight)[:20])}."
                    )
            return [n for n in has_weight if any(fnmatch.fnmatchcase(n, p) for p in self.layers)]
        linears = {n: m for n, m in has_weight.items() if isinstance(m, nn.Linear) or hasattr(m, "fp8_meta")}
        low = [n for n, m in linears.items() if isinstance(m, LowPrecisionLinear) or hasattr(m, "fp8_meta")]
        return low or list(linears)

    # -- a measured step ----------------------------------------------------------------------------------------------
    def on_train_batch_start(self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int) -> None:
        step = trainer.progress.global_step + 1
        if step % self._every == 0 and step != self._step:
            self._step = step
            self._hook(trainer, module)

    def on_train_batch_end(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._handles:
            self._unhook()

    def on_exception(self, trainer: TrainerView, module: nn.Module, exception: BaseException) -> None:
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, trainer: TrainerView, module: nn.Module) -> None:
        self.measured.clear()
        precision = trainer.strategy.precision
        for name in self._names:
            layer = module.get_submodule(name)
            formats = self._formats(layer, precision)

            def forward(layer: nn.Module, args: Any, output: Any, name: str = name, formats: Any = formats) -> None:
                if torch.is_grad_enabled() and f"{name}/weight" not in self.measured:
                    self._take(f"{name}/input", next((a for a in args if isinstance(a, Tensor)), None), formats, "input")
                    self._take(f"{name}/weight", _plain(layer.weight), formats, "weight")

            def backward(layer: nn.Module, grads: Any, name: str = name, formats: Any = formats) -> None:
                if f"{name}/grad" not in self.measured:
                    self._take(f"{name}/grad", next((g for g in grads if g is not None), None), formats, "grad")

            self._handles += [layer.register_forward_hook(forward), layer.register_full_backward_pre_hook(backward)]

    def _take(self, key: str, tensor: Any, formats: Mapping[str, NumberFormat], kind: str) -> None:
        if tensor is not None and tensor.is_floating_point() and tensor.numel():
            with torch.no_grad():
                self.measured[key] = measure(tensor, formats.get(kind) or NumberFormat(tensor.dtype))

    def _formats(self, layer: Any, precision: Any) -> Mapping[str, NumberFormat]:
        """Return the format of each kind; what is not in it is measured in its own dtype."""
        if self.format is not None:
            return dict.fromkeys(_KINDS, self.format)
        if isinstance(layer, LowPrecisionLinear):
            return layer.matmul.formats
        if hasattr(layer, "fp8_meta"):  # TransformerEngine's
            return precision.formats
        dtype = getattr(precision, "autocast_dtype", None)
        return {} if dtype is None else dict.fromkeys(_KINDS, NumberFormat(dtype))

    # -- what is logged -----------------------------------------------------------------------------------------------
    def log_point(self, trainer: TrainerView, metrics: dict[str, float], step: int) -> None:
        if step != self._step or not self.measured:
            return
        names = [f"{name}/{kind}" for name in self._names for kind in _KINDS]
        # A rank may have called other layers than the others: what it did not see counts as nothing.
        nothing = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
        device = next(iter(self.measured.values())).device
        held = [self.measured.get(n) for n in names]
        values = torch.stack([nothing.to(device) if v is None else torch.cat([v[:1], -v[1:2], v[2:]]) for v in held])
        seen = torch.tensor([[0.0 if v is None else 1.0] for v in held], dtype=torch.float64, device=device)
        if trainer.world.size > 1:
            values[:, :2] = trainer.world.all_reduce(values[:, :2].contiguous(), "max")
            summed = trainer.world.all_reduce(torch.cat([values[:, 2:], seen], 1))
            values[:, 2:], seen = summed[:, :3] / summed[:, 3:].clamp(min=1), summed[:, 3:]
        values[:, 1].neg_()
        for name, row, count in zip(names, values.tolist(), seen[:, 0].tolist(), strict=True):
            if count:
                metrics.update({f"numerics/{name}/{what}": value for what, value in zip(MEASURED, row, strict=True)})


def _plain(weight: Any) -> Tensor:
    """Return a weight as numbers: what fsdp gathered in float8, or what is int8 with its scales, is multiplied out."""
    for method in ("to_original_precision", "dequantize"):
        if hasattr(type(weight), method) and type(weight) not in (Tensor, nn.Parameter):
            return getattr(weight, method)()
    return weight
