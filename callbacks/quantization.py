"""Quantization-aware training: from a given step on the Linears compute as if they were quantized; at the end they are.

    before `start`    the model trains as usual
    from `start` on   weights (and activations) are rounded to the target's grid in each forward pass, and the gradient passes as
                      if they were not; weights, optimizer and checkpoints stay what they were, under the same names
    at the end        the Linears are converted, and the model is written to `quantized.safetensors` in the run's folder

    Trainer(callbacks=[QuantizationAwareTraining("int8-int4", start="1ep")])
    load_quantized(model, "runs/.../quantized.safetensors")         # later, elsewhere: a fresh model of the same class

Source: torchao.quantization.qat (0.18); Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..strategies.errors import CheckpointError, ConfigError, unknown_name
from ..strategies.precision import _torchao
from ..strategies.precision.linears import Choice, LowPrecisionLinear, Report, choose, relative_error
from .base import Callback
from .interval import Every

if TYPE_CHECKING:
    from .base import TrainerView

__all__ = ["TARGETS", "QuantizationAwareTraining", "load_quantized"]

TARGETS = {
    "int8-int4": "activations int8 (one scale a token), weights int4 (one scale for each group)",
    "int8-int8": "activations int8 (one scale a token), weights int8 (one scale a row)",
    "int4": "weights int4 (one scale for each group), activations as they are",
}
_WANTED_BY = "QuantizationAwareTraining"


class QuantizationAwareTraining(Callback):
    """Train for a quantized model.

    Args:
        target: one of `TARGETS`, or a config of torchao's that its QATConfig takes.
        start: when it begins: a number of optimizer steps, or "500step", "2ep", ... It is where a resumed run finds it, too.
        group_size: how many weights share a scale, where the target has groups.
        convert: whether the model is converted and written when the training is over. False leaves that to you.
        skip, skip_first_and_last, min_features: which Linears; see `strategies.precision.linears.Choice`.
    Raises:
        MissingDependency: torchao is not installed.
    """

    def __init__(
        self,
        target: Any = "int8-int4",
        *,
        start: int | str = 0,
        group_size: int = 32,
        convert: bool = True,
        skip: Sequence[str] = (),
        skip_first_and_last: bool = False,
        min_features: int = 16,
    ) -> None:
        if isinstance(target, str) and target not in TARGETS:
            raise unknown_name("quantization target", target, TARGETS)
        self.start = Every.parse(start) if start != 0 else None
        if self.start is not None and self.start.is_time:
            raise ConfigError(f"start={start!r} is a time, which ranks measure differently. Use steps or epochs: start='1ep'.")
        self.group_size = group_size
        self.convert_at_end = convert
        self.choice = Choice(skip=skip, skip_first_and_last=skip_first_and_last, min_features=min_features)
        self.target = target
        self.config = _config(target, group_size)
        self.report: Report | None = None
        """What became of the Linears; None before `start`."""
        self.converted = False

    # A resumed run that was past `start` is prepared before anything runs in it; its weights have the same names either way.
    def on_fit_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._look(trainer, module)

    def on_train_batch_start(self, trainer: TrainerView, module: nn.Module, batch: Any, batch_idx: int) -> None:
        if self.report is None:
            self._look(trainer, module)

    def _look(self, trainer: TrainerView, module: nn.Module) -> None:
        start = self.start
        if self.report is None and (start is None or getattr(trainer.progress, start.counter) >= start.n):
            self.prepare(module)
            trainer.print(f"quantization-aware from step {trainer.progress.global_step}: {self.target}, {self.report}")

    def prepare(self, module: nn.Module) -> None:
        """Let the Linears of `module` compute as if they were quantized.

        Raises:
            ConfigError: there is none to prepare, a precision multiplies them in another format, or nothing changes.
        """
        if other := [n for n, m in module.named_modules() if isinstance(m, LowPrecisionLinear)]:
            raise ConfigError(
                f"{_WANTED_BY} was asked for, and {len(other)} Linears of {type(module).__name__} multiply in a low precision of "
                f"their own already ({other[0]}, ...). Train with precision='bf16-mixed' or 'fp32'."
            )
        report = choose(module, self.choice, self.group_size if _has_groups(self.target) else 1)
        if not report.converted:
            raise ConfigError(f"{_WANTED_BY} found no Linear to quantize in {report.model}: {report}. Change its arguments.")
        chosen = {id(module.get_submodule(n)) for n in report.converted}
        torchao: Any = _torchao.load("quantization", wanted_by=_WANTED_BY)
        qat: Any = _torchao.load("quantization.qat", wanted_by=_WANTED_BY)
        # Building a module draws random numbers, which are the run's.
        devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices):
            torchao.quantize_(module, qat.QATConfig(self.config, step="prepare"), filter_fn=lambda m, _: id(m) in chosen)
        self.report = report
        _check(module, report)

    def on_fit_end(self, trainer: TrainerView, module: nn.Module) -> None:
        """Convert and write, unless the process was told to leave in the middle."""
        if not self.convert_at_end or self.report is None or getattr(trainer, "leaving", 0):
            return
        self.convert(module)
        if trainer.world.is_main:
            path = save_quantized(module, trainer.root / "quantized.safetensors")
            trainer.print(f"quantized model: {path}")

    def convert(self, module: nn.Module) -> None:
        """Quantize the Linears that were prepared, in place. The model can be evaluated then, not trained."""
        if self.report is None or self.converted:
            raise ConfigError("convert comes once, after prepare. Check that the training reached `start`.")
        torchao: Any = _torchao.load("quantization", wanted_by=_WANTED_BY)
        qat: Any = _torchao.load("quantization.qat", wanted_by=_WANTED_BY)
        kind: Any = _torchao.load("quantization.qat.linear", wanted_by=_WANTED_BY).FakeQuantizedLinear
        with torch.random.fork_rng([]):
            torchao.quantize_(module, qat.QATConfig(self.config, step="convert"), filter_fn=lambda m, _: isinstance(m, kind))
        self.converted = True


def save_quantized(module: nn.Module, path: Path) -> Path:
    """Write a converted model: plain tensors in safetensors, what they mean in its metadata. Nothing is pickled."""
    from safetensors.torch import save_file

    support: Any = _torchao.load("prototype.safetensors.safetensors_support", wanted_by=_WANTED_BY)
    tensors, metadata = support.flatten_tensor_state_dict(module.state_dict())
    partial = path.with_name(f".{path.name}.partial")
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)
    return path


def load_quantized(model: nn.Module, path: str | Path) -> nn.Module:
    """Give `model`, fresh and not quantized, the quantized weights of a file; return it, ready to evaluate.

    Raises:
        CheckpointError: the file is of another model, or was not written by `QuantizationAwareTraining`.
    """
    from safetensors import safe_open

    support: Any = _torchao.load("prototype.safetensors.safetensors_support", wanted_by="load_quantized")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    if "tensor_names" not in metadata:
        raise CheckpointError(f"{path} says nothing of quantized tensors. Load it as any other safetensors file.")
    state, left = support.unflatten_tensor_state_dict(tensors, metadata)
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [n for n, t in state.items() if t.shape != own[n].shape]
    if wrong or left:
        raise CheckpointError(f"{path} is of another model: {', '.join([*wrong, *left][:10])}. Build the one that was trained.")
    model.load_state_dict(state, assign=True)
    return model


def _config(target: Any, group_size: int) -> Any:
    if not isinstance(target, str):
        return target
    torchao: Any = _torchao.load("quantization", wanted_by=_WANTED_BY)
    dtypes: Any = torch
    sizes: Any = _torchao.load("quantization.granularity", wanted_by=_WANTED_BY)
    if target == "int4":
        return torchao.IntxWeightOnlyConfig(weight_dtype=dtypes.int4, granularity=sizes.PerGroup(group_size))
    if target == "int8-int4":
        return torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtypes.int4, weight_granularity=sizes.PerGroup(group_size)
        )
    return torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=sizes.PerAxis(0))


def _has_groups(target: Any) -> bool:
    return not isinstance(target, str) or "int4" in target


def _check(module: nn.Module, report: Report) -> None:
    """Prove, on one prepared Linear of each shape, that its output is another; note by how much."""
    seen: set[torch.Size] = set()
    own = torch.Generator().manual_seed(0)
    for name in report.converted:
        linear: Any = module.get_submodule(name)
        if linear.weight.shape in seen or linear.weight.is_meta:
            continue
        seen.add(linear.weight.shape)
        x = torch.randn(8, linear.in_features, generator=own).to(linear.weight.device, linear.weight.dtype)
        with torch.no_grad():
            found, plain = linear(x), _plain(linear, x)
        report.errors[name] = relative_error(found, plain)
        if torch.equal(found, plain) and bool(linear.weight.any()):
            raise ConfigError(
                f"{_WANTED_BY}: {name} of {report.model} gives the same output as before, bit for bit, so nothing was prepared. "
                "That is a fault of this version of torchao, or of the config that it was given."
            )


def _plain(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)
