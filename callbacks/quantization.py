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

from collections.abc import Mapping, Sequence
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
        for name in report.converted:
            _become(module.get_submodule(name), _prepared(module.get_submodule(name), self.config))
        self.report = report
        _check(module, report)

    def on_fit_end(self, trainer: TrainerView, module: nn.Module) -> None:
        """Convert and write, unless the process was told to leave in the middle."""
        if not self.convert_at_end or self.report is None or getattr(trainer, "leaving", 0):
            return
        if self._sharded(module):
            # Each rank holds pieces, which cannot be quantized where they lie: the file is made of the whole, the model stays.
            state = trainer.strategy.full_state_dict(module)
            for name in self.report.converted if trainer.world.is_main else ():
                state[f"{name}.weight"] = self._quantized(module.get_submodule(name), state[f"{name}.weight"])
        else:
            self.convert(module)
            state = module.state_dict()
        if trainer.world.is_main:
            path = save_quantized(state, trainer.root / "quantized.safetensors")
            trainer.print(f"quantized model: {path}")

    def convert(self, module: nn.Module) -> None:
        """Quantize the Linears that were prepared, in place. The model can be evaluated then, not trained."""
        if self.report is None or self.converted:
            raise ConfigError("convert comes once, after prepare. Check that the training reached `start`.")
        if self._sharded(module):
            raise ConfigError(
                f"{_WANTED_BY} cannot convert a sharded model in place: each rank holds pieces of its weights. Leave "
                "convert=True: the file of the quantized model is written at the end, for load_quantized."
            )
        torchao: Any = _torchao.load("quantization", wanted_by=_WANTED_BY)
        qat: Any = _torchao.load("quantization.qat", wanted_by=_WANTED_BY)
        kind: Any = _torchao.load("quantization.qat.linear", wanted_by=_WANTED_BY).FakeQuantizedLinear
        with torch.random.fork_rng([]):
            torchao.quantize_(module, qat.QATConfig(self.config, step="convert"), filter_fn=lambda m, _: isinstance(m, kind))
        self.converted = True

    def _sharded(self, module: nn.Module) -> bool:
        assert self.report is not None
        return any(hasattr(module.get_submodule(n).weight, "full_tensor") for n in self.report.converted)

    def _quantized(self, linear: nn.Module, weight: Tensor) -> Tensor:
        """Return the whole `weight` of a prepared Linear as `convert` would make it."""
        torchao: Any = _torchao.load("quantization", wanted_by=_WANTED_BY)
        qat: Any = _torchao.load("quantization.qat", wanted_by=_WANTED_BY)
        whole = _probe(linear, weight)
        holder = nn.Sequential(whole)
        with torch.random.fork_rng([]):
            torchao.quantize_(holder, qat.QATConfig(self.config, step="convert"), filter_fn=lambda m, _: m is whole)
        made: Any = holder[0]
        return made.weight.detach()


def _prepared(linear: Any, config: Any) -> nn.Module:
    """Return torchao's module for a Linear of that size, without values."""
    torchao: Any = _torchao.load("quantization", wanted_by=_WANTED_BY)
    qat: Any = _torchao.load("quantization.qat", wanted_by=_WANTED_BY)
    options = {"device": "meta", "dtype": linear.weight.dtype}
    holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, **options))
    torchao.quantize_(holder, qat.QATConfig(config, step="prepare"), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    return holder[0]


def _become(linear: Any, made: nn.Module) -> None:
    """Let `linear` compute as `made` does. It stays the same object with the same parameters, for what points to it: fsdp gives
    the weights that it gathered to the module that it cut up, not to one that took its place."""
    for name, child in made.named_children():
        linear.add_module(name, child.to(linear.weight.device))
    for name, value in vars(made).items():
        if name not in vars(linear):
            setattr(linear, name, value)
    kind = type(linear)
    if kind is not nn.Linear:  # fsdp's, of a Linear that is a unit of its own
        kind = type(f"FSDP{type(made).__name__}", (kind.__bases__[0], type(made)), {"__deepcopy__": kind.__deepcopy__})
    else:
        kind = type(made)
    linear.__class__ = kind


def _probe(linear: nn.Module, weight: Tensor) -> Any:
    """Return a Linear that computes as `linear` does, with `weight` and no bias, and without the hooks."""
    kind = type(linear)
    probe: Any = object.__new__(kind.__bases__[1] if kind.__name__.startswith("FSDP") else kind)
    probe.__dict__.update(vars(linear))
    probe.__dict__.update({name: type(value)() for name, value in vars(linear).items() if name.endswith("_hooks")})
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight.detach(), requires_grad=False), "bias": None}
    return probe


def save_quantized(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write the state of a converted model: plain tensors in safetensors, what they mean in its metadata. Nothing is pickled."""
    from safetensors.torch import save_file

    support: Any = _torchao.load("prototype.safetensors.safetensors_support", wanted_by=_WANTED_BY)
    tensors, metadata = support.flatten_tensor_state_dict(dict(state))
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
    """Prove, on one prepared Linear of each shape, that its output is another; note by how much. Collective if it is sharded."""
    seen: set[torch.Size] = set()
    own = torch.Generator().manual_seed(0)
    for name in report.converted:
        linear: Any = module.get_submodule(name)
        if linear.weight.shape in seen or linear.weight.is_meta:
            continue
        seen.add(linear.weight.shape)
        weight = linear.weight.detach()
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        x = torch.randn(8, linear.in_features, generator=own).to(weight.device, weight.dtype)
        with torch.no_grad():
            found, plain = _probe(linear, weight).forward(x), F.linear(x, weight)
        report.errors[name] = relative_error(found, plain)
        if torch.equal(found, plain) and bool(weight.any()):
            raise ConfigError(
                f"{_WANTED_BY}: {name} of {report.model} gives the same output as before, bit for bit, so nothing was prepared. "
                "That is a fault of this version of torchao, or of the config that it was given."
            )
