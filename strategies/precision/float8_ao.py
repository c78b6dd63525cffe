"""float8 training by torchao: the Linears multiply 8-bit floats, in the forward pass and in the backward pass.

    fp8-ao                  one scale for a whole tensor: the fastest
    fp8-ao-rowwise          one scale for each row, powers of two: more exact
    fp8-ao-rowwise-gw-hp    the same, and the weight's gradient in high precision: the most exact

The weights stay in fp32 (so does the optimizer), activations in bf16 under autocast; each product casts both sides anew, with the
scale of that moment. Nothing is kept between steps, so nothing has to be saved, and a resumed run goes on bit for bit.
On several ranks each scales by its own part of the batch: losses agree with those of one rank within float8's error, not exactly.
Source: torchao.float8 (0.18); Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, UnknownName, suggest
from . import _torchao
from .base import Precision
from .formats import NumberFormat
from .linears import Choice, LinearPrecision, Matmul

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .float8_fsdp import Float8Gather
    from .split_linears import SplitFloat8

__all__ = ["Float8AO", "Float8Recipe", "rowwise", "rowwise_gw_hp"]

_SCALING = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


@dataclass(frozen=True)
class Float8Recipe(Choice):
    """The knobs of `Float8AO`.

    Args:
        scaling: "tensorwise", "rowwise" or "rowwise_with_gw_hp" (torchao's names).
        emulate: multiply in fp32 what was rounded to float8: to see the numerics on any device. None: only where the device
            cannot multiply float8.
        round_scales_to_power_of_2: None leaves it to the recipe (rowwise does).
        fsdp_all_gather: under fsdp, weights are cast before they are gathered: a quarter of fp32's bytes, and the same products
            bit for bit. Their scales come from one all-reduce after each optimizer step. Tensorwise only. See float8_fsdp.py.
        config: a Float8LinearConfig of torchao's instead of `scaling`, `emulate`, the rounding and `fsdp_all_gather`.
        skip, skip_first_and_last, min_features, filter: which Linears; see `linears.Choice`.
    """

    scaling: str = "tensorwise"
    emulate: bool | None = None
    round_scales_to_power_of_2: bool | None = None
    fsdp_all_gather: bool = False
    config: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling not in _SCALING:
            raise UnknownName(
                f"scaling={self.scaling!r} is no float8 recipe.{suggest(self.scaling, _SCALING)} Known: {', '.join(_SCALING)}."
            )
        if self.config is not None:
            self._read_config()
        if self.fsdp_all_gather and self.scaling != "tensorwise":
            raise ConfigError(
                f"fsdp_all_gather was asked for with scaling={self.scaling!r}: a row's scale for one product is not that for the "
                "other, so the weights are gathered as they are. Use scaling='tensorwise', or leave fsdp_all_gather out."
            )

    def _read_config(self) -> None:
        if self.scaling != "tensorwise" or self.emulate is not None or self.round_scales_to_power_of_2 is not None:
            raise ConfigError(
                "Float8Recipe was given a config, and scaling, emulate or rounding, which are in it. Give one of them."
            )
        if type(self.config).__name__ != "Float8LinearConfig":
            raise ConfigError(f"config must be a torchao.float8.Float8LinearConfig, got {self.config!r:.60}.")
        casts = (self.config.cast_config_input, self.config.cast_config_weight, self.config.cast_config_grad_output)
        rows = any("axiswise" in str(cast.scaling_granularity).lower() for cast in casts)
        high = "disabled" in str(self.config.cast_config_input_for_grad_weight.scaling_type).lower()
        object.__setattr__(self, "scaling", ("rowwise_with_gw_hp" if high else "rowwise") if rows else "tensorwise")
        object.__setattr__(self, "emulate", self.config.emulate or None)
        object.__setattr__(self, "fsdp_all_gather", self.fsdp_all_gather or self.config.enable_fsdp_float8_all_gather)


class Float8AO(LinearPrecision):
    """Linears in float8 by torchao.

    Args:
        recipe: a `Float8Recipe`, or the name of its scaling.
        base: the precision of everything else: "bf16-mixed", "bf16-true" or "fp32".
    """

    name = "fp8-ao"
    limits = (0.08, 0.15)

    def __init__(self, recipe: Float8Recipe | str = "tensorwise", *, base: str | Precision = "bf16-mixed") -> None:
        self.recipe = Float8Recipe(recipe) if isinstance(recipe, str) else recipe
        if self.recipe.scaling != "tensorwise":
            self.name = "fp8-ao-rowwise" if self.recipe.scaling == "rowwise" else "fp8-ao-rowwise-gw-hp"
        super().__init__(self.recipe, base)
        self._gather: Float8Gather | None = None
        self._gathered = 0

    def sharded(self, model: nn.Module) -> None:
        """Let fsdp gather the weights in float8, where the recipe says so."""
        if self.recipe.fsdp_all_gather:
            from .float8_fsdp import Float8Gather

            self._gather = self._gather or Float8Gather(wanted_by=f"precision={self.name!r}")
            self._gathered += self._gather.take(model)

    def step(self, optimizer: Optimizer) -> bool:
        """Step `optimizer`; the scales in which fsdp gathers are those of the new weights. Collective where it does."""
        stepped = super().step(optimizer)
        if self._gather is not None:
            self._gather.precompute()
        return stepped

    def device_reason(self, device: torch.device) -> str | None:
        """A CPU, or CUDA from compute capability 8.9 (rowwise: 9.0); with `emulate=True` any."""
        if reason := _torchao.missing(f"precision={self.name!r}"):
            return reason
        if self.recipe.emulate or device.type == "cpu":
            return None
        if device.type != "cuda":
            return (
                f"precision={self.name!r} was asked for on {device.type}, which torchao's float8 does not know. "
                "Use precision='bf16-mixed', or Float8AO(Float8Recipe(emulate=True)) to see its numerics."
            )
        least = (8, 9) if self.recipe.scaling == "tensorwise" else (9, 0)
        found = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and found < least:
            return (
                f"precision={self.name!r} needs CUDA compute capability {least[0]}.{least[1]} or newer; "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}. Use precision='bf16-mixed'."
            )
        return None

    def make_matmul(self, device: torch.device) -> Matmul:
        recipe = self.recipe
        emulate = recipe.emulate if recipe.emulate is not None else not _multiplies_float8(device)
        return Float8Matmul(
            recipe.scaling, emulate, recipe.round_scales_to_power_of_2, wanted_by=f"precision={self.name!r}", config=recipe.config
        )

    def explain(self) -> str:
        emulated = self.recipe.emulate or (self.recipe.emulate is None and not _multiplies_float8(self._device))
        gathered = f"; {self._gathered} weights gathered in float8" if self._gather is not None else ""
        return super().explain() + gathered + ("; emulated in fp32" if emulated else "")


class Float8Matmul:
    """input @ weight.T with both sides in float8, and the two products of the backward pass likewise."""

    multiple = 16

    def __init__(self, scaling: str, emulate: bool, power_of_2: bool | None, *, wanted_by: str, config: Any = None) -> None:
        float8 = _torchao.load("float8", wanted_by=wanted_by)
        linear = _torchao.load("float8.float8_linear", wanted_by=wanted_by)
        options: dict[str, Any] = {"emulate": emulate}
        if power_of_2 is not None:
            options["round_scales_to_power_of_2"] = power_of_2
        # What is gathered is decided elsewhere: to the module of torchao that is asked below, the weights are plain.
        options["enable_fsdp_float8_all_gather"] = False
        self.config = replace(config or float8.Float8LinearConfig.from_recipe_name(scaling), **options)
        # The way from a config to that of the three products is in the constructor of torchao's module only.
        self.products = linear.Float8Linear(16, 16, bias=False, config=self.config, device="meta").linear_mm_config
        self.function = linear.matmul_with_hp_or_float8_args
        self.scaling = scaling
        casts = {"input": "input", "weight": "weight", "grad": "grad_output"}
        rows, power = "tensor" if scaling == "tensorwise" else "row", self.config.round_scales_to_power_of_2
        self.formats = {
            kind: NumberFormat(getattr(self.config, f"cast_config_{name}").target_dtype, rows, power_of_2=power)
            for kind, name in casts.items()
        }

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return self.function.apply(input, weight.t(), self.products, self.config)

    def over(self, mesh: DeviceMesh) -> SplitFloat8 | str:
        """Return the product of matrices that are cut over `mesh`, or why there is none."""
        from .split_linears import SplitFloat8

        if self.scaling != "tensorwise":
            return f"{self.scaling} scales each row by itself, and tp cuts rows through, of the matrix or of its gradients"
        return SplitFloat8(self, mesh, wanted_by="float8 under tp")

    def __repr__(self) -> str:
        return f"float8 {self.scaling}{', emulated' if self.config.emulate else ''}"


def rowwise() -> Float8AO:
    """fp8-ao-rowwise."""
    return Float8AO("rowwise")


def rowwise_gw_hp() -> Float8AO:
    """fp8-ao-rowwise-gw-hp."""
    return Float8AO("rowwise_with_gw_hp")


def _multiplies_float8(device: torch.device) -> bool:
    """Whether torch multiplies float8 on `device`: tried, since the answer depends on the build and on the processor."""
    if device.type == "cuda":
        return True  # `available` looked at its compute capability
    a = torch.zeros(16, 16, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    try:
        torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True
