"""float8 and float4 training by NVIDIA's TransformerEngine, on CUDA.

    fp8-te             one scale a tensor, from the largest values of past steps (delayed scaling); reduced over all ranks
    fp8-te-current     one scale a tensor, from its own values
    fp8-te-block       one scale a block of 128 (Hopper)
    mxfp8-te           MXFP8, one power of two a block of 32 (Blackwell)
    nvfp4-te           4-bit floats, one scale a block of 16 (Blackwell)

Linears and norms become TransformerEngine's, with the same parameters under the same names; steps run under its autocast and
bf16's. Where `fuse` says so, a norm and the Linear behind it become one LayerNormLinear. A LayerNormMLP or its attention cannot
be put into a forward that somebody else wrote: build your model with them, and they are taken as they are.
What was run where: it has no CPU path, and no machine with a GPU and TransformerEngine was at hand. Which calls we make is held
against the real package's signatures, its recipes are built for real, and the swap runs with a stand-in. What is said about
numbers is in the tests that are marked `gpu`, which have never run.
Its modules keep their state in a pickle ("_extra_state"); that is left out of ours, and the scales are saved as plain tensors.
Source: transformer_engine.pytorch (2.20); Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, MissingDependency, UnknownName, suggest, unknown_name
from .base import Precision
from .formats import NumberFormat
from .linears import Choice, Chooser, Report, relative_error
from .mixed import BF16Mixed

__all__ = ["NEEDED", "RECIPES", "Float8TE", "TERecipe", "block", "current", "missing", "mxfp8", "nvfp4"]

RECIPES: Mapping[str, tuple[str, str, str]] = {
    "delayed": ("DelayedScaling", "is_fp8_available", "fp8-te"),
    "current": ("Float8CurrentScaling", "is_fp8_available", "fp8-te-current"),
    "block": ("Float8BlockScaling", "is_fp8_block_scaling_available", "fp8-te-block"),
    "mxfp8": ("MXFP8BlockScaling", "is_mxfp8_available", "mxfp8-te"),
    "nvfp4": ("NVFP4BlockScaling", "is_nvfp4_available", "nvfp4-te"),
}
"""scaling -> (TransformerEngine's class, its question whether the device can do it, our name)"""
NEEDED = "pip install 'drivetrain[te]' on a machine with CUDA, where it is built"
_NEAREST = "Use precision='fp8-ao', which also runs on a CPU, or 'bf16-mixed'."


@dataclass(frozen=True)
class TERecipe(Choice):
    """The knobs of `Float8TE`.

    Args:
        scaling: one of `RECIPES`.
        options: what TransformerEngine's recipe takes, by its names: {"amax_history_len": 16, "fp8_format": "HYBRID"}.
            TransformerEngine accepts names that it does not know; here they are refused.
        norms: whether LayerNorms (and RMSNorms) become TransformerEngine's too. They compute in high precision either way.
        evaluate_in_fp8: False evaluates in bf16.
        fuse: pairs (norm, Linear) by name, `*` as in file names: {"blocks.*.norm_1": "blocks.*.qkv"}. Each pair becomes a
            LayerNormLinear; whoever calls the norm gets its input back. Only where nothing else uses the norm's output.
        amax_reduction_group: over which ranks delayed scaling takes its largest value. None: those of the mesh that the model is
            cut up over, else all.
        primary_weights: refused: weights that are float8 only (quantized_model_init) are no plain tensors, which optimizers and
            checkpoints of ours need.
        skip, skip_first_and_last, min_features: which Linears; see `linears.Choice`.
    """

    scaling: str = "delayed"
    options: Mapping[str, Any] = field(default_factory=dict)
    norms: bool = True
    evaluate_in_fp8: bool = True
    fuse: Mapping[str, str] = field(default_factory=dict)
    amax_reduction_group: Any = None
    primary_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.primary_weights:
            raise ConfigError(
                "TERecipe(primary_weights=True): weights that exist in float8 only are tensors of TransformerEngine's own, which "
                "could be saved by pickle alone, and its optimizer would have to hold the others. Leave it out; for less memory "
                "use precision='int8-weights-ao', or fsdp with Float8Recipe(fsdp_all_gather=True)."
            )
        if self.scaling not in RECIPES:
            raise unknown_name("recipe of TransformerEngine", self.scaling, RECIPES)

    def build(self) -> Any:
        """Return TransformerEngine's own recipe object. Needs the package, no GPU.

        Raises:
            UnknownName: an option that the recipe does not have.
        """
        recipes: Any = _load("transformer_engine.common.recipe")
        cls = getattr(recipes, RECIPES[self.scaling][0])
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        options = dict(self.options)
        for name, value in options.items():
            if name not in known:
                raise UnknownName(f"{cls.__name__} has no option {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
            if name.endswith("_format") and isinstance(value, str):
                options[name] = recipes.Format[value]
        return cls(**options)


class Float8TE(Precision):
    """Linears and LayerNorms of TransformerEngine, under its autocast and bf16's.

    Args:
        recipe: a `TERecipe`, or the name of its scaling.
    """

    name = "fp8-te"
    autocast_dtype = torch.bfloat16
    _device = torch.device("cuda")

    def __init__(self, recipe: TERecipe | str = "delayed") -> None:
        self.recipe = TERecipe(scaling=recipe) if isinstance(recipe, str) else recipe
        self.name = RECIPES[self.recipe.scaling][2]
        self.reports: list[Report] = []
        self._chooser = Chooser(self.recipe)
        self._bf16 = BF16Mixed()
        self._context: _Autocast | None = None
        self._modules: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    def available(self, device: torch.device) -> str | None:
        """CUDA only, where TransformerEngine is built, and what it says itself about the device and the recipe."""
        self._device = device
        if device.type != "cuda":
            return (
                f"precision={self.name!r} was asked for on {device.type}, and TransformerEngine needs CUDA (float8 from compute "
                f"capability 8.9, MXFP8 and NVFP4 from 10.0). {_NEAREST}"
            )
        if reason := missing(self.name):
            return reason
        te: Any = _load("transformer_engine.pytorch")
        works, reason = getattr(te, RECIPES[self.recipe.scaling][1])(return_reason=True)
        return None if works else f"precision={self.name!r}: TransformerEngine says: {reason} {_NEAREST}"

    @property
    def formats(self) -> Mapping[str, NumberFormat]:
        """In which format the products take "input", "weight" and "grad". Delayed scaling's own scales are those of past steps.

        Raises:
            ConfigError: nvfp4, whose blocks have scales of scales.
        """
        if self.recipe.scaling == "nvfp4":
            raise ConfigError("Numerics does not know NVFP4, whose blocks have scales of scales. Give it a format=.")
        how = {"block": (128, True), "mxfp8": (32, True)}.get(self.recipe.scaling, ("tensor", False))
        hybrid = how[0] == "tensor" and str(self.recipe.options.get("fp8_format", "HYBRID")).endswith("HYBRID")
        forward = NumberFormat(torch.float8_e4m3fn, how[0], power_of_2=how[1])
        grad = NumberFormat(torch.float8_e5m2, how[0]) if hybrid else forward
        return {"input": forward, "weight": forward, "grad": grad}

    @property
    def _multiple(self) -> int:
        return 32 if self.recipe.scaling in ("mxfp8", "nvfp4") else 16

    def look_at(self, model: nn.Module) -> None:
        """Choose among all Linears of `model`."""
        self._chooser.look_at(model, self._multiple)

    def convert(self, model: nn.Module) -> nn.Module:
        """Swap modules of `model` for TransformerEngine's, in place. Parameters stay the same objects under the same names.

        Raises:
            ConfigError: none can be swapped.
        """
        report, is_part = self._chooser.choose(model, self._multiple)
        own = {name: module for name, module in model.named_modules() if hasattr(module, "fp8_meta")}
        if not report.converted and not own and not is_part:
            raise ConfigError(f"precision={self.name!r} found no Linear to convert: {report}. Use precision='bf16-mixed'.")
        te: Any = _load("transformer_engine.pytorch")
        for name, module in own.items():
            module.register_state_dict_post_hook(_without_extra_state)
            self._modules[f"{len(self.reports)}/{name}"] = module
        for norm, linear in _pairs(model, self.recipe.fuse, report, is_part=is_part).items():
            self._fuse(model, norm, linear, te)
            report.converted.remove(linear)
            report.fused.append(linear)
        self._context = _Autocast(te, self.recipe)
        self._verify(model, report, te)
        for name in report.converted:
            self._swap(model, name, te.Linear, "in_features", "out_features", bias=True)
        if self.recipe.norms:
            kinds: list[tuple[type[nn.Module], Any]] = [(nn.LayerNorm, te.LayerNorm), (nn.RMSNorm, te.RMSNorm)]
            for kind, theirs in kinds:
                for name in [n for n, m in model.named_modules() if type(m) is kind and _plain_norm(m)]:
                    self._swap(model, name, theirs, "normalized_shape", eps=True)
        report.converted += report.fused
        self.reports.append(report)
        return model

    @torch.no_grad()  # TransformerEngine then reduces nothing, and keeps no note of the module
    def _verify(self, model: nn.Module, report: Report, te: Any) -> None:
        """Multiply by TransformerEngine with one Linear of each shape, and compare with bf16 and with the truth.

        A module of its own is asked, so that no scale of the model's is touched. In the place of delayed scaling it multiplies by
        current scaling: TransformerEngine notes each module that ever ran with delayed scales, and reduces theirs for good.
        Raises:
            ConfigError: the output equals bf16's bit for bit (nothing was converted), or is too far off.
        """
        recipe = TERecipe(scaling="current").build() if self.recipe.scaling == "delayed" else self.recipe.build()
        own = torch.Generator().manual_seed(0)
        limit = 0.25 if self.recipe.scaling == "nvfp4" else 0.08
        for name in report.converted:
            linear: Any = model.get_submodule(name)
            where = f"precision={self.name!r}: {name} of {report.model}, {linear.in_features}x{linear.out_features},"
            if any(model.get_submodule(n).weight.shape == linear.weight.shape for n in report.errors):
                continue
            weight = linear.weight.detach()
            if weight.is_meta or not weight.any():
                weight = torch.randn(weight.shape, generator=own)
            weight = weight.to(self._device, torch.bfloat16)
            x = torch.randn(32, linear.in_features, generator=own).to(self._device, torch.bfloat16)
            probe = te.Linear(
                linear.in_features, linear.out_features, bias=False, params_dtype=torch.bfloat16, device=self._device
            ).eval()
            probe.weight.copy_(weight)
            with te.autocast(enabled=True, recipe=recipe):
                found = probe(x)
            report.errors[name] = relative_error(found, x.double() @ weight.double().T)
            if torch.equal(found, F.linear(x, weight)):
                raise ConfigError(
                    f"{where} gives the output of bf16 bit for bit: TransformerEngine does nothing here. That is a fault of its "
                    f"version, or of its recipe. {_NEAREST}"
                )
            if not report.errors[name] <= limit:
                raise ConfigError(
                    f"{where} has a relative error of {report.errors[name]:.3g} in its output where at most {limit:g} was "
                    f"expected. {_NEAREST}"
                )

    def _fuse(self, model: nn.Module, norm_name: str, name: str, te: Any) -> None:
        """Put a LayerNormLinear in the place of a Linear, with the parameters of the norm, which lets everything pass then."""
        norm: Any = model.get_submodule(norm_name)  # of either kind
        linear: Any = model.get_submodule(name)
        kind = "LayerNorm" if isinstance(norm, nn.LayerNorm) else "RMSNorm"
        eps = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
        new = te.LayerNormLinear(
            linear.in_features,
            linear.out_features,
            eps=eps,
            bias=linear.bias is not None,
            normalization=kind,
            params_dtype=linear.weight.dtype,
            device="meta",
        )
        new.layer_norm_weight = norm.weight
        if getattr(norm, "bias", None) is not None:
            new.layer_norm_bias = norm.bias
        for key, parameter in linear.named_parameters(recurse=False):
            setattr(new, key, parameter)
        new.train(linear.training)
        if left := sorted(key for key, parameter in new.named_parameters() if parameter.is_meta):
            raise ConfigError(
                f"precision={self.name!r}: TransformerEngine's LayerNormLinear has parameters that {norm_name} and {name} have "
                f"not: {', '.join(left)}. Leave the pair out of `fuse`."
            )
        norm.__class__ = _Passing  # pyright: ignore[reportAttributeAccessIssue]
        new.register_state_dict_post_hook(_without_extra_state)
        new.register_state_dict_post_hook(_without_norm)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        self._modules[f"{len(self.reports)}/{name}"] = new

    def sharded(self, model: nn.Module) -> None:
        """Take the ranks that the model is cut up over: delayed scaling reduces its largest values over them."""
        from torch.distributed.tensor import DTensor

        meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
        if meshes and self._context is not None:
            mesh = max(meshes, key=lambda m: m.ndim)
            self._context.group = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()

    def _swap(self, model: nn.Module, name: str, theirs: Any, *sizes: str, bias: bool = False, eps: bool = False) -> None:
        module: Any = model.get_submodule(name)
        options: dict[str, Any] = {"params_dtype": module.weight.dtype, "device": "meta"}
        if bias:
            options["bias"] = module.bias is not None
        if eps and module.eps is not None:
            options["eps"] = module.eps
        new = theirs(*[getattr(module, size) for size in sizes], **options)
        for key, parameter in module.named_parameters(recurse=False):
            setattr(new, key, parameter)
        new.train(module.training)
        left = sorted({k for k, _ in new.named_parameters()} ^ {k for k, _ in module.named_parameters()})
        if left:
            raise ConfigError(
                f"precision={self.name!r}: TransformerEngine's {type(new).__name__} has other parameters than {name}: "
                f"{', '.join(left)}. This adapter was written for 2.20; leave the module out with skip=({name!r},)."
            )
        new.register_state_dict_post_hook(_without_extra_state)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        if hasattr(new, "fp8_meta"):
            self._modules[f"{len(self.reports)}/{name}"] = new

    def restore(self, model: nn.Module) -> int:
        """Make TransformerEngine's Linears and norms of `model` torch's again; return how many there were."""
        te: Any = _load("transformer_engine.pytorch")
        count = 0
        for name, module in list(model.named_modules()):
            if type(module) not in (te.Linear, te.LayerNorm, te.RMSNorm):
                continue
            theirs: Any = module
            new: Any
            if type(module) is te.Linear:
                has_bias = "bias" in dict(module.named_parameters(recurse=False))
                new = nn.Linear(theirs.in_features, theirs.out_features, bias=has_bias, device="meta")
            else:
                kind = nn.LayerNorm if type(module) is te.LayerNorm else nn.RMSNorm
                new = kind(list(theirs.weight.shape), eps=theirs.eps, device="meta")
            for key, parameter in module.named_parameters(recurse=False):
                setattr(new, key, parameter)
            new.train(module.training)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
            count += 1
        self._modules.clear()
        return count

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return one context, to be entered for each step: bf16's, and TransformerEngine's within it."""
        if self._context is None:
            self._context = _Autocast(_load("transformer_engine.pytorch"), self.recipe)
        self._context.outer = self._bf16.autocast(device)
        return self._context

    def state_dict(self) -> dict[str, Any]:
        """Return delayed scaling's scales and histories as plain tensors; the other recipes have none."""
        found: dict[str, Any] = dict(self._loaded)
        for name, module in self._modules.items():
            for part in ("scaling_fwd", "scaling_bwd"):
                state = module.fp8_meta.get(part)
                if state is not None and hasattr(state, "amax_history"):
                    found[f"{name}/{part}"] = {"scale": state.scale.clone(), "amax_history": state.amax_history.clone()}
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ConfigError: the state is of another model.
        """
        for key, values in state.items():
            name, _, part = key.rpartition("/")
            module = self._modules.get(name)
            if module is None:
                raise ConfigError(
                    f"precision={self.name!r}: the state is of {name}, which was not converted. Build the same model."
                )
            if not module.fp8_meta_tensors_initialized:
                module.init_fp8_meta_tensors(self.recipe.build())
            held = module.fp8_meta[part]
            with torch.no_grad():
                held.scale.copy_(values["scale"])
                held.amax_history.resize_(values["amax_history"].shape).copy_(values["amax_history"])

    def explain(self) -> str:
        return " | ".join(map(str, self.reports))


class _Autocast(AbstractContextManager["_Autocast", None]):
    """bf16's autocast and TransformerEngine's, entered together, anew for each step."""

    def __init__(self, te: Any, recipe: TERecipe) -> None:
        self.te = te
        self.recipe = recipe
        self.built = recipe.build()
        self.outer: AbstractContextManager[Any] | None = None
        self.group: Any = None  # of the mesh that the model is cut up over; None: all ranks
        self._open: list[Any] = []

    def __enter__(self) -> _Autocast:
        assert self.outer is not None
        enabled = self.recipe.evaluate_in_fp8 or torch.is_grad_enabled()
        group = self.recipe.amax_reduction_group
        group = group if group is not None else self.group
        inner = self.te.autocast(enabled=enabled, recipe=self.built, amax_reduction_group=group)
        self.outer.__enter__()
        inner.__enter__()
        self._open.append(inner)
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self.outer is not None
        self._open.pop().__exit__(*exc)
        self.outer.__exit__(*exc)


def current() -> Float8TE:
    """fp8-te-current."""
    return Float8TE("current")


def block() -> Float8TE:
    """fp8-te-block."""
    return Float8TE("block")


def mxfp8() -> Float8TE:
    """mxfp8-te."""
    return Float8TE("mxfp8")


def nvfp4() -> Float8TE:
    """nvfp4-te."""
    return Float8TE("nvfp4")


def _plain_norm(module: Any) -> bool:
    """Whether TransformerEngine's norm can hold the parameters of `module`."""
    has_bias = getattr(module, "bias", None) is not None or type(module) is nn.RMSNorm
    return module.weight is not None and has_bias


class _Passing(nn.Module):
    """A norm whose work is done by the LayerNormLinear behind it. It keeps its parameters, under their names."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


def _pairs(model: nn.Module, fuse: Mapping[str, str], report: Report, *, is_part: bool) -> dict[str, str]:
    """Return the names (norm -> Linear) that `fuse` stands for; the `*` of both sides are filled alike.

    Raises:
        ConfigError: a pattern that meets no norm, or whose Linear is not converted.
    """
    found: dict[str, str] = {}
    norms = {n: m for n, m in model.named_modules() if type(m) in (nn.LayerNorm, nn.RMSNorm) and _plain_norm(m)}
    for norm, linear in fuse.items():
        pattern = re.compile(re.escape(norm).replace(r"\*", "(.*)"))
        matches = {name: match for name in norms if (match := pattern.fullmatch(name))}
        if not matches and not is_part:
            raise ConfigError(f"TERecipe(fuse): {norm!r} meets no norm with parameters. There are: {', '.join(norms) or 'none'}.")
        for name, match in matches.items():
            second = linear
            for part in match.groups():
                second = second.replace("*", part, 1)
            if second not in report.converted:
                why = report.skipped.get(second, "there is no such Linear")
                raise ConfigError(f"TERecipe(fuse): {name} and {second} cannot become one: {second} is not converted ({why}).")
            found[name] = second
    return found


def _without_norm(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leave out of a state dict what the norm, which still is there, has under its own names."""
    for name in ("layer_norm_weight", "layer_norm_bias"):
        state.pop(f"{prefix}{name}", None)


def _without_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leave out of a state dict what TransformerEngine pickles; `Float8TE.state_dict` has it as tensors."""
    state.pop(f"{prefix}_extra_state", None)


def missing(name: str) -> str | None:
    """Return why TransformerEngine cannot be used, or None."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"precision={name!r} needs transformer-engine, which is not installed: {NEEDED}."
    if importlib.util.find_spec("transformer_engine_torch") is None:
        return (
            f"precision={name!r} needs transformer-engine with its part for torch; only its Python sources are installed. "
            f"Install it: {NEEDED}."
        )
    return None


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependency(f"TransformerEngine cannot be used here ({error}). Install it: {NEEDED}.") from error
