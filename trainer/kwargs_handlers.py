"""Accelerate's `kwargs_handlers`: its words for options, and the objects of ours that they stand for.

    Accelerator(mixed_precision="fp8", kwargs_handlers=[AORecipeKwargs(pad_inner_dim=True)])     -> precision=Float8AO(...)
    Accelerator(mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])   -> precision=FP16Mixed(...)
    Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])             -> strategy=DDPStrategy(...)

`apply` translates; each option is honoured, or refused with what to write instead. A handler that would change nothing in this
run (a loss scale without fp16) is refused too. Accelerate's own objects, of the same names, are taken as well.
Source: accelerate.utils.dataclasses (1.15).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from datetime import timedelta
from typing import Any

from ..strategies.base import Strategy, make_precision
from ..strategies.environment import read_environment
from ..strategies.errors import ConfigError, suggest
from ..strategies.precision.base import Precision

__all__ = [
    "AORecipeKwargs",
    "AutocastKwargs",
    "DistributedDataParallelKwargs",
    "FP8RecipeKwargs",
    "GradScalerKwargs",
    "Handled",
    "InitProcessGroupKwargs",
    "MSAMPRecipeKwargs",
    "ProfileKwargs",
    "TERecipeKwargs",
    "apply",
]


@dataclass(frozen=True)
class AutocastKwargs:
    """Of torch.autocast. `enabled=False` is refused for a whole run: that is precision="fp32"."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass(frozen=True)
class GradScalerKwargs:
    """Of the loss scale of "fp16": FP16Mixed(...)."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclass(frozen=True)
class DistributedDataParallelKwargs:
    """Of DDPStrategy(...). Where the strategy is "auto" and there is one process, there is nothing that they could say."""

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: float = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: Any = "no"
    comm_wrapper: Any = "no"
    comm_state_option: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InitProcessGroupKwargs:
    """Of the process group: `timeout` is World.start(timeout_s=...). The backend follows from the device."""

    backend: str | None = None
    init_method: str | None = None
    timeout: timedelta | None = None


@dataclass(frozen=True)
class ProfileKwargs:
    """What `Accelerator.profile()` records, where it is called without options of its own."""

    activities: Sequence[str] | None = None
    schedule_option: Mapping[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def options(self) -> dict[str, Any]:
        """Return them as `Accelerator.profile` and torch.profiler.profile take them.

        Raises:
            ConfigError: an activity that torch does not know.
        """
        import torch

        known = {a.name.lower(): a for a in torch.profiler.ProfilerActivity.__members__.values()}
        chosen = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) not in (None, False)}
        for name in chosen.get("activities", ()):
            if name not in known:
                raise ConfigError(f"ProfileKwargs: no activity {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
        if "activities" in chosen:
            chosen["activities"] = [known[name] for name in chosen["activities"]]
        if "schedule_option" in chosen:
            chosen["schedule"] = torch.profiler.schedule(
                **{"wait": 0, "warmup": 0, "active": 1} | dict(chosen.pop("schedule_option"))
            )
        return chosen


@dataclass(frozen=True)
class AORecipeKwargs:
    """float8 by torchao: Float8AO(Float8Recipe(...)).

    Accelerate gathers in float8 under FSDP2 unless told otherwise; here that is asked for, `enable_fsdp_float8_all_gather=True`.
    `pad_inner_dim` changes nothing: rows are always padded, and Linears whose sizes are no multiples of 16 are left in bf16.
    """

    config: Any = None
    module_filter_func: Callable[..., bool] | None = None
    pad_inner_dim: bool | None = None
    enable_fsdp_float8_all_gather: bool | None = None

    def precision(self) -> Precision:
        from ..strategies.precision.float8_ao import Float8AO, Float8Recipe

        options: dict[str, Any] = {"config": self.config, "fsdp_all_gather": bool(self.enable_fsdp_float8_all_gather)}
        if self.module_filter_func is not None:
            # A filter of one's own says it all, the first and the last too: it gets them to see.
            options |= {"filter": self.module_filter_func, "skip_first_and_last": False}
        return Float8AO(Float8Recipe(**options))


@dataclass(frozen=True)
class TERecipeKwargs:
    """float8 by TransformerEngine: Float8TE(TERecipe(...)), with delayed scaling, or MXFP8 where it is asked for."""

    use_autocast_during_eval: bool | None = None
    margin: int | None = None
    interval: int | None = None
    fp8_format: str | None = None
    amax_history_len: int | None = None
    amax_compute_algo: str | None = None
    override_linear_precision: tuple[bool, bool, bool] | None = None
    use_mxfp8_block_scaling: bool | None = None

    def precision(self) -> Precision:
        from ..strategies.precision.float8_te import Float8TE, TERecipe

        if self.interval not in (None, 1):
            raise ConfigError(f"TERecipeKwargs(interval={self.interval}): TransformerEngine 2 has none any more. Leave it out.")
        if any(self.override_linear_precision or ()):
            raise ConfigError(
                "TERecipeKwargs(override_linear_precision=...): TransformerEngine 2 has none any more. For a backward pass in "
                "high precision write precision=Float8TE(TERecipe(options={'backward_override': 'high_precision'}))."
            )
        options = {"margin": self.margin, "fp8_format": self.fp8_format and self.fp8_format.upper()}
        if not self.use_mxfp8_block_scaling:
            options |= {"amax_history_len": self.amax_history_len, "amax_compute_algo": self.amax_compute_algo}
        elif not (self.amax_history_len is None and self.amax_compute_algo is None):
            raise ConfigError("TERecipeKwargs: MXFP8 has no history of largest values. Leave amax_history_len and _algo out.")
        return Float8TE(
            TERecipe(
                scaling="mxfp8" if self.use_mxfp8_block_scaling else "delayed",
                options={name: value for name, value in options.items() if value is not None},
                evaluate_in_fp8=bool(self.use_autocast_during_eval),
            )
        )


@dataclass(frozen=True)
class MSAMPRecipeKwargs:
    """MS-AMP, which is refused with its successors when the run starts."""

    opt_level: str = "O2"

    def precision(self) -> Precision:
        from ..strategies.precision.msamp import Float8MSAMP, MSAMPRecipe

        return Float8MSAMP(MSAMPRecipe(self.opt_level))


@dataclass(frozen=True)
class FP8RecipeKwargs(TERecipeKwargs):
    """Accelerate's older word for either of two: `backend` "TE" (default) or "MSAMP"."""

    opt_level: str = "O2"
    backend: str | None = None

    def precision(self) -> Precision:
        backend = (self.backend or "TE").upper()
        if backend not in ("TE", "MSAMP", "AO"):
            raise ConfigError(
                f"FP8RecipeKwargs(backend={self.backend!r}): expected 'TE' or 'MSAMP'. For torchao: AORecipeKwargs()."
            )
        if backend == "AO":
            return AORecipeKwargs().precision()
        return MSAMPRecipeKwargs(self.opt_level).precision() if backend == "MSAMP" else super().precision()


_KINDS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(AutocastKwargs, GradScalerKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs, ProfileKwargs),
        *(AORecipeKwargs, TERecipeKwargs, MSAMPRecipeKwargs, FP8RecipeKwargs),
    )
}
_RECIPES = ("AORecipeKwargs", "TERecipeKwargs", "MSAMPRecipeKwargs", "FP8RecipeKwargs")


@dataclass(frozen=True)
class Handled:
    """What the handlers of a run stand for."""

    strategy: str | Strategy
    precision: str | Precision | None
    timeout_s: float | None = None
    backend: str | None = None
    profile: ProfileKwargs | None = None

    def world_options(self) -> dict[str, Any]:
        """Return what `World.start` is given beside the device."""
        return {} if self.timeout_s is None else {"timeout_s": self.timeout_s}

    def check_backend(self, found: str | None) -> None:
        """Refuse a backend that was asked for and is not the one that the device brought."""
        if self.backend is not None and found not in (None, "none") and self.backend not in str(found):
            raise ConfigError(
                f"InitProcessGroupKwargs(backend={self.backend!r}) was asked for, and the device has {found!r}: the backend "
                "follows from it. Leave backend out, or choose the device."
            )


def apply(handlers: Sequence[Any], strategy: str | Strategy, precision: str | Precision | None) -> Handled:
    """Return the strategy and the precision with the handlers' options, and what they say of the world and the profiler.

    Raises:
        ConfigError: no handler, one kind twice, an option that we have not, or a handler that this run has no use for.
    """
    given: dict[str, Any] = {}
    for handler in handlers:
        name, own = _own(handler)
        if name in given:
            raise ConfigError(f"kwargs_handlers holds two {name}. Give one with all options.")
        given[name] = own
    recipes = [name for name in _RECIPES if name in given]
    if len(recipes) > 1:
        raise ConfigError(f"kwargs_handlers holds {' and '.join(recipes)}, and a run has one precision. Give one of them.")
    if recipes:
        precision = _with_recipe(recipes[0], given[recipes[0]], precision)
    if "GradScalerKwargs" in given:
        precision = _with_scaler(given["GradScalerKwargs"], precision)
    if "AutocastKwargs" in given:
        precision = _with_autocast(given["AutocastKwargs"], precision)
    if "DistributedDataParallelKwargs" in given:
        strategy = _with_ddp(given["DistributedDataParallelKwargs"], strategy)
    group = given.get("InitProcessGroupKwargs", InitProcessGroupKwargs())
    if group.init_method not in (None, "env://"):
        raise ConfigError(
            f"InitProcessGroupKwargs(init_method={group.init_method!r}): ranks meet as the launcher says. Leave it out."
        )
    timeout = None if group.timeout is None else group.timeout.total_seconds()
    return Handled(strategy, precision, timeout, group.backend, given.get("ProfileKwargs"))


def _own(handler: Any) -> tuple[str, Any]:
    """Return the handler's name, and itself as one of the classes above: Accelerate's own is read field by field."""
    name = type(handler).__name__
    kind = _KINDS.get(name)
    if kind is None or isinstance(handler, type):
        word = handler.__name__ if isinstance(handler, type) else name
        raise ConfigError(
            f"kwargs_handlers holds {handler!r:.60}, which is no handler.{suggest(word, _KINDS)} Known: {', '.join(_KINDS)}."
        )
    if isinstance(handler, kind):
        return name, handler
    own: Mapping[str, Field[Any]] = {f.name: f for f in fields(kind)}
    options: dict[str, Any] = {}
    for key, value in vars(handler).items():
        value = getattr(value, "value", value)
        theirs = getattr(type(handler), key, MISSING)
        # "nccl", or a timeout that follows from it, is what Accelerate writes where nothing was asked for.
        if name == "InitProcessGroupKwargs" and (value == theirs or (key == "timeout" and value.total_seconds() in (600, 1800))):
            continue
        if key not in own:
            raise ConfigError(f"{name} has no option {key!r} here. Known: {', '.join(own)}.")
        options[key] = value
    if name == "AORecipeKwargs" and options.get("config") is not None and options.get("pad_inner_dim") is not None:
        # Without a config of the user's Accelerate makes one of its own defaults: only what was asked for is taken.
        options["enable_fsdp_float8_all_gather"] = options["config"].enable_fsdp_float8_all_gather
        options["config"] = None
    return name, kind(**options)


def _name(precision: str | Precision | None) -> str:
    return "fp32" if precision is None else make_precision(precision).name


def _with_recipe(name: str, recipe: Any, precision: str | Precision | None) -> Precision:
    if isinstance(precision, Precision) or str(precision) != "fp8":
        said = precision.name if isinstance(precision, Precision) else precision
        raise ConfigError(
            f"kwargs_handlers holds {name}, which says what 'fp8' is, and the run's precision is {said!r}. "
            f"Say mixed_precision='fp8', or leave {name} out."
        )
    return recipe.precision()


def _with_scaler(scaler: GradScalerKwargs, precision: str | Precision | None) -> Precision:
    from ..strategies.precision.mixed import FP16Mixed

    if isinstance(precision, Precision) or _name(precision) != "fp16-mixed":
        raise ConfigError(
            f"kwargs_handlers holds GradScalerKwargs, and the run's precision {_name(precision)!r} scales no loss (or is an "
            "object that says it itself). Say mixed_precision='fp16', or leave GradScalerKwargs out."
        )
    if not scaler.enabled:
        raise ConfigError(
            "GradScalerKwargs(enabled=False): fp16 without a scaled loss loses small gradients. Say mixed_precision='bf16', "
            "which needs none, or precision='fp16-true'."
        )
    return FP16Mixed(**{f.name: getattr(scaler, f.name) for f in fields(scaler) if f.name != "enabled"})


def _with_autocast(autocast: AutocastKwargs, precision: str | Precision | None) -> str | Precision | None:
    if not autocast.enabled:
        raise ConfigError(
            "AutocastKwargs(enabled=False) for a whole run is precision='fp32'. For one block write "
            "torch.autocast(device.type, enabled=False) there."
        )
    if autocast.cache_enabled is None:
        return precision
    made = Precision() if precision is None else make_precision(precision)
    mixed: Any = made if hasattr(made, "cache_enabled") else getattr(made, "base", getattr(made, "_bf16", None))
    if mixed is None or not hasattr(mixed, "cache_enabled"):
        raise ConfigError(
            f"kwargs_handlers holds AutocastKwargs, and precision {made.name!r} has no autocast. Say mixed_precision='bf16' or "
            "'fp16', or leave AutocastKwargs out."
        )
    mixed.cache_enabled = autocast.cache_enabled
    return made


def _with_ddp(options: DistributedDataParallelKwargs, strategy: str | Strategy) -> str | Strategy:
    for name, why in (("dim", "batches are cut by the loader"), ("check_reduction", "torch ignores it")):
        if getattr(options, name):
            raise ConfigError(f"DistributedDataParallelKwargs({name}={getattr(options, name)!r}): {why}. Leave it out.")
    if strategy not in ("auto", "ddp"):
        what = strategy if isinstance(strategy, str) else strategy.name
        raise ConfigError(
            f"kwargs_handlers holds DistributedDataParallelKwargs, and the run's strategy is {what!r}. Say strategy='ddp', "
            "give the options to the object (DDPStrategy(...)), or leave them out."
        )
    options = replace(options, comm_hook=_word(options.comm_hook), comm_wrapper=_word(options.comm_wrapper))
    if strategy == "auto" and read_environment().size == 1 and options.comm_hook == "no":
        return strategy
    from ..strategies.ddp import DDPStrategy

    words = {f.name: getattr(options, f.name) for f in fields(options)}
    chosen = {f.name: words[f.name] for f in fields(options) if f.default is MISSING or words[f.name] != f.default}
    return DDPStrategy(**{name: value for name, value in chosen.items() if value != {}})


def _word(value: Any) -> Any:
    return getattr(value, "value", value)
