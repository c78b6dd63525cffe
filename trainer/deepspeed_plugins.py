"""DeepSpeed in Accelerate's words: a plugin for each model, one of them selected.

    accelerator = Accelerator(deepspeed_plugins={"student": zero2, "teacher": zero3})
    student, optimizer = accelerator.prepare(student, optimizer)       # by the selected plugin: the first, at the beginning
    accelerator.state.select_deepspeed_plugin("teacher")
    teacher = accelerator.prepare(teacher)
Each plugin becomes a DeepSpeedStrategy of this accelerator; `prepare` gives a model to the one selected then. A model that is
prepared without an optimizer is only evaluated: under stage 3 its parameters are cut up, else every process holds it.
A second `Accelerator()` of the process, made without plugins, finds those of the first, as in Accelerate: for disjoint models.
Source: https://huggingface.co/docs/accelerate/usage_guides/deepspeed_multiple_model
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..strategies.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.world import World

__all__ = ["DeepSpeedPlugin", "HasPlugins", "Plugins", "get_active_deepspeed_plugin", "read_plugins"]

_shared: list[weakref.ref[Plugins]] = []
"""The plugins that were given last: what Accelerate keeps in its global state."""


class DeepSpeedPlugin:
    """Accelerate's DeepSpeedPlugin: the same arguments.

    Args:
        hf_ds_config: the DeepSpeed JSON, as a path or a dict.
        zero_stage: 0 to 3; 2 where neither it nor the JSON says.
        gradient_accumulation_steps, gradient_clipping: the run's, where the JSON leaves them "auto".
        zero3_init_flag: True is refused: models are built in pieces inside `with accelerator.strategy.init_context():`.
        others: as in Accelerate; see DeepSpeedStrategy.
    """

    def __init__(
        self,
        hf_ds_config: Any = None,
        gradient_accumulation_steps: int | None = None,
        gradient_clipping: float | None = None,
        zero_stage: int | None = None,
        is_train_batch_min: bool = True,
        offload_optimizer_device: str | None = None,
        offload_param_device: str | None = None,
        offload_optimizer_nvme_path: str | None = None,
        offload_param_nvme_path: str | None = None,
        zero3_init_flag: bool | None = None,
        zero3_save_16bit_model: bool | None = None,
        transformer_moe_cls_names: str | None = None,
        enable_msamp: bool | None = None,
        msamp_opt_level: str | None = None,
    ) -> None:
        from ..strategies.deepspeed_config import read_config

        if enable_msamp or msamp_opt_level:
            raise ConfigError(
                "DeepSpeedPlugin(enable_msamp=True): MS-AMP is not maintained any more, and DeepSpeed has fp32, bf16 and fp16 "
                "here. Leave it out; precision='fp8-ao' goes with strategy='fsdp' or 'ddp'."
            )
        if hf_ds_config == "none":
            hf_ds_config = None

        if zero3_init_flag:
            raise ConfigError(
                "DeepSpeedPlugin(zero3_init_flag=True) would let every from_pretrained of the process build in pieces, and that "
                "is not switched from here. Leave it out, and build inside `with accelerator.strategy.init_context():`."
            )
        self.hf_ds_config = hf_ds_config
        self.deepspeed_config: dict[str, Any] = {} if hf_ds_config is None else read_config(hf_ds_config)
        zero = self.deepspeed_config.setdefault("zero_optimization", {})
        if zero_stage is not None and zero.get("stage", "auto") not in ("auto", zero_stage):
            raise ConfigError(
                f"DeepSpeedPlugin(zero_stage={zero_stage}) and its JSON's zero_optimization.stage={zero['stage']} differ. Name "
                "it once."
            )
        if zero_stage is not None:
            zero["stage"] = zero_stage
        elif zero.get("stage", "auto") == "auto":
            zero["stage"] = 2
        for key, device, path in (
            ("offload_optimizer", offload_optimizer_device, offload_optimizer_nvme_path),
            ("offload_param", offload_param_device, offload_param_nvme_path),
        ):
            if device not in (None, "none"):
                said: Any = zero.get(key) or {}
                if said != "auto" and said.get("device", "auto") not in ("auto", device):
                    raise ConfigError(
                        f"DeepSpeedPlugin({key}_device={device!r}) and its JSON's {key}.device={said['device']!r} differ. "
                        "Name it once, or write 'auto' there."
                    )
                rest = {} if said == "auto" else {k: v for k, v in said.items() if v != "auto"}
                zero[key] = rest | {"device": device} | ({"nvme_path": path} if path not in (None, "none") else {})
        if zero3_save_16bit_model is not None:
            zero["stage3_gather_16bit_weights_on_model_save"] = zero3_save_16bit_model
        if gradient_clipping is not None:
            self.deepspeed_config["gradient_clipping"] = gradient_clipping
        if gradient_accumulation_steps is not None:
            self.deepspeed_config["gradient_accumulation_steps"] = gradient_accumulation_steps
        self.is_train_batch_min = is_train_batch_min
        self.zero3_init_flag = zero3_init_flag
        self.transformer_moe_cls_names = transformer_moe_cls_names
        self.selected = False

    @property
    def zero_stage(self) -> int:
        return self.deepspeed_config["zero_optimization"]["stage"]

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """The number that the plugin fixes; None where it is "auto"."""
        said = self.deepspeed_config.get("gradient_accumulation_steps", "auto")
        return None if said == "auto" else int(said)

    @property
    def gradient_clipping(self) -> float | None:
        """The norm that the plugin clips to; None where it is "auto", or not said."""
        said = self.deepspeed_config.get("gradient_clipping", "auto")
        return None if said == "auto" else float(said)

    def is_auto(self, ds_key_long: str) -> bool:
        """Whether a value of the JSON, by its dotted key, is left to be filled."""
        return self.get_value(ds_key_long) == "auto"

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Return a value of the JSON by its dotted key."""
        found: Any = self.deepspeed_config
        for part in ds_key_long.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The JSON as deepspeed.zero.Init(config_dict_or_path=...) takes it: without what is still "auto"."""
        from ..strategies.deepspeed_config import without_auto

        return {"train_micro_batch_size_per_gpu": 1} | without_auto(self.deepspeed_config)

    def is_zero3_init_enabled(self) -> bool:
        return bool(self.zero3_init_flag)

    def strategy(self, *, inference: bool = False) -> Strategy:
        """Return a new strategy with this plugin's options."""
        from ..strategies.deepspeed import DeepSpeedStrategy

        config = dict(self.deepspeed_config)
        if inference and self.zero_stage in (1, 2):  # which cut up what a model that is only evaluated has not
            config["zero_optimization"] = config["zero_optimization"] | {"stage": 0}
        return DeepSpeedStrategy(config=config, inference=inference, moe_leaf_modules=self.transformer_moe_cls_names or ())

    def __repr__(self) -> str:
        return f"DeepSpeedPlugin(zero_stage={self.zero_stage}, selected={self.selected})"


class Plugins:
    """The plugins of an accelerator, one of them selected: `accelerator.state` hands its methods on."""

    def __init__(self, by_name: Mapping[str, DeepSpeedPlugin]) -> None:
        self.by_name = dict(by_name)
        self.select(next(iter(self.by_name)))

    def select(self, name: str) -> None:
        """Make the plugin `name` the one that `prepare` uses.

        Raises:
            UnknownName: with the nearest.
        """
        self.get(name)
        for key, plugin in self.by_name.items():
            plugin.selected = key == name
        self.selected = name

    def get(self, name: str) -> DeepSpeedPlugin:
        if name not in self.by_name:
            raise unknown_name("DeepSpeed plugin", name, self.by_name, where="of this Accelerator")
        return self.by_name[name]

    @property
    def active(self) -> DeepSpeedPlugin:
        return self.by_name[self.selected]


class HasPlugins:
    """The part of `Accelerator` that knows its plugins. `accelerator.state` is the accelerator itself."""

    world: World
    strategy: Strategy
    strategies: dict[str, Strategy]
    plugins: Plugins | None = None
    _main_plugin: DeepSpeedPlugin | None = None  # the one that `strategy` was made from

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The plugin that is selected; None without any."""
        return None if self.plugins is None else self.plugins.active

    @property
    def deepspeed_plugins(self) -> dict[str, DeepSpeedPlugin] | None:
        return None if self.plugins is None else self.plugins.by_name

    def select_deepspeed_plugin(self, name: str) -> None:
        """Let `prepare` give the models that come now to the plugin `name`."""
        self._plugins().select(name)

    enable_deepspeed_plugin = select_deepspeed_plugin

    def get_deepspeed_plugin(self, name: str) -> DeepSpeedPlugin:
        """Return the plugin `name`."""
        return self._plugins().get(name)

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """The JSON of the plugin that is selected, `auto` where nothing is filled yet."""
        return self._plugins().active.deepspeed_config

    def _plugins(self) -> Plugins:
        if self.plugins is None:
            raise ConfigError("This Accelerator has no DeepSpeed plugins. Give it deepspeed_plugins={name: DeepSpeedPlugin()}.")
        return self.plugins

    def _give_to_plugin(self, names: Iterable[str], *, trained: bool, precision: Any, **run: Any) -> None:
        """Let models of these names be held by the selected plugin's own strategy, before they are prepared."""
        plugin = self._plugins().active
        for name in names:
            if trained and plugin is self._main_plugin:  # the strategy that is there anyway
                continue
            strategy = plugin.strategy(inference=not trained)
            if strategy.precision is None:
                strategy.precision = precision
            strategy.start(self.world)
            strategy.take_run(**run)
            self.strategies[name] = strategy


def get_active_deepspeed_plugin(state: HasPlugins) -> DeepSpeedPlugin:
    """Return the selected plugin of `accelerator.state`."""
    return state._plugins().active


def read_plugins(given: Any) -> Plugins | None:
    """Return the plugins of an Accelerator that was given one, or a dict of them; given None those of the first, or None.

    Raises:
        ConfigError: none in the dict, or something that is no plugin.
    """
    if given is None:
        return _shared[0]() if _shared else None
    by_name = dict(given) if isinstance(given, Mapping) else {"default": given}
    if not by_name:
        raise ConfigError("deepspeed_plugins is empty. Give a dict of DeepSpeedPlugin by name, or leave it out.")
    for name, one in by_name.items():
        if not isinstance(one, DeepSpeedPlugin):
            raise ConfigError(f"deepspeed_plugins[{name!r}] must be a DeepSpeedPlugin, got {type(one).__name__} {one!r:.60}.")
    made = Plugins(by_name)
    _shared[:] = [weakref.ref(made)]
    return made
