"""What a DeepSpeedStrategy is told: its arguments and the JSON beside them, checked against each other; and what becomes of them.

`DeepSpeedOptions.__init__` reads both; `_filled` is the configuration that an engine is built with (deepspeed_config.fill).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import deepspeed_config, deepspeed_engine
from .activation import read_checkpointing
from .base import Strategy
from .errors import ConfigError

if TYPE_CHECKING:
    from .precision.base import Precision

__all__ = ["DeepSpeedOptions"]


class DeepSpeedOptions(Strategy):
    """The arguments of DeepSpeedStrategy, which documents them."""

    name = "deepspeed"

    def __init__(
        self,
        *,
        precision: str | Precision | None = None,
        inference: bool = False,
        stage: int | None = None,
        config: str | Path | Mapping[str, Any] | None = None,
        offload_optimizer: str | Mapping[str, Any] | None = None,
        offload_parameters: str | Mapping[str, Any] | None = None,
        nvme_path: str | Path | None = None,
        pin_memory: bool | None = None,
        weights_in_16_bits: bool | None = None,
        moe_leaf_modules: str | Sequence[Any] = (),
        shared_memory: bool = False,
        activation_checkpointing: Any = None,
        compile: Any = None,
        zero: Mapping[str, Any] | None = None,
        **peers: Any,
    ) -> None:
        own = [n for n in DeepSpeedOptions.__init__.__kwdefaults__ or {} if n != "zero"]
        given, keys = deepspeed_config.read_peers(peers, own)
        config = given.get("config", config)
        self.config = {} if config is None else deepspeed_config.read_config(config)
        self.zero: dict[str, Any] = {**(zero or {}), **keys}
        if precision is None:
            precision = deepspeed_config.precision_of(self.config)
        super().__init__(
            precision=precision, inference=inference, activation_checkpointing=activation_checkpointing, compile=compile
        )
        offload_optimizer = given.get("offload_optimizer", offload_optimizer)
        offload_parameters = given.get("offload_parameters", offload_parameters)
        self.nvme_path = given.get("nvme_path", nvme_path)
        self.pin_memory = pin_memory
        self.weights_in_16_bits = weights_in_16_bits
        leaves = given.get("moe_leaf_modules", moe_leaf_modules)
        self.moe_leaf_modules: list[Any] = leaves.split(",") if isinstance(leaves, str) else list(leaves)
        self.shared_memory = shared_memory
        self.run: dict[str, Any] = {}  # what is known of the run: see deepspeed_config.contradictions
        self.reduces_gradients = not inference
        self.stage = self._choose_stage(given.get("stage", stage))
        for key, where in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
            if where is not None:
                self.zero[key] = self._offload(key, where)
        self._check_options()

    def shape_blocks(self, name: str, model: nn.Module) -> nn.Module:
        """The same as in every strategy.

        Raises:
            ConfigError: "selective" activation checkpointing under stage 3.
        """
        if self.stage == 3 and not self.inference and self.activation_checkpointing:
            how = read_checkpointing(self.activation_checkpointing)
            if how is not None and how.mode == "selective":
                raise ConfigError(
                    "activation_checkpointing='selective' finds what it kept by the order of a block's operators, and under "
                    "ZeRO-3 a block gathers its parameters by others in the backward pass than in the forward. Use 'full', "
                    "stage 2, or fsdp."
                )
        return super().shape_blocks(name, model)

    # -- options ------------------------------------------------------------------------------------------------------
    def _choose_stage(self, asked: int | None) -> int:
        said = self.config.get("zero_optimization", {}).get("stage", deepspeed_config.AUTO)
        if said != deepspeed_config.AUTO and asked is not None and said != asked:
            raise ConfigError(
                f"DeepSpeedStrategy(stage={asked}) and the JSON's zero_optimization.stage={said} differ. Name it once."
            )
        if said == deepspeed_config.AUTO:
            said = asked if asked is not None else 0 if self.config and "zero_optimization" not in self.config else 2
        if said not in (0, 1, 2, 3) or isinstance(said, bool):
            raise ConfigError(f"ZeRO has the stages 0, 1, 2 and 3, got {said!r}. For example strategy='deepspeed:2'.")
        return said

    def _offload(self, key: str, where: str | Mapping[str, Any]) -> dict[str, Any]:
        section = {"device": where} if isinstance(where, str) else dict(where)
        if section.get("device") not in ("cpu", "nvme"):
            raise ConfigError(f"{key}={where!r}: expected 'cpu' or 'nvme', or None to keep it on the device.")
        if section["device"] == "nvme" and self.nvme_path is not None:
            section.setdefault("nvme_path", str(self.nvme_path))
        return section

    def _check_options(self) -> None:
        offload = self._section("offload_optimizer")
        if self._section("offload_param") and self.stage != 3:
            raise ConfigError(
                f"Offloading parameters needs ZeRO stage 3, got stage {self.stage}. Say strategy='deepspeed:3', or leave it out."
            )
        if offload and self.stage == 0:
            raise ConfigError(
                "Offloading the optimizer needs ZeRO stage 1, 2 or 3, got stage 0. Say strategy='deepspeed:2' for example."
            )
        if offload.get("device") == "nvme" and self.stage != 3:
            raise ConfigError(
                f"Offloading the optimizer to 'nvme' needs ZeRO stage 3, got {self.stage}. Offload to 'cpu', or take stage 3."
            )
        for key in ("offload_optimizer", "offload_param"):
            if self._section(key).get("device") == "nvme" and not self._section(key).get("nvme_path"):
                raise ConfigError(f"{key} to 'nvme' needs a folder: nvme_path='/local/scratch'.")
        said = self.config.get("zero_optimization", {})
        if both := [k for k, v in self.zero.items() if k in said and said[k] not in (deepspeed_config.AUTO, v)]:
            raise ConfigError(
                "DeepSpeedStrategy and its JSON differ about zero_optimization: "
                f"{', '.join(f'{k} is {self.zero[k]} and {said[k]}' for k in both)}. "
                "Name each once."
            )

    def _check_kernels(self, device: torch.device) -> None:
        """Refuse ZeRO++ in 8 bits on a CPU: it stands on kernels for accelerators, and DeepSpeed says so late or not at all."""
        zero = {**self.config.get("zero_optimization", {}), **self.zero}
        keys = [key for key in zero if key.startswith("zero_quantized_") and zero[key] is True]
        if keys and device.type == "cpu":
            raise ConfigError(
                f"{', '.join(keys)}: DeepSpeed has no kernels for it on {device.type}. Leave it out (zero_hpz_partition_size "
                "works there), or run on an accelerator."
            )

    def _section(self, key: str) -> dict[str, Any]:
        """Return an offload section, from the arguments or the JSON; empty where nothing is offloaded."""
        found = self.zero.get(key) or self.config.get("zero_optimization", {}).get(key) or {}
        return {} if found == deepspeed_config.AUTO or found.get("device", "none") in ("none", deepspeed_config.AUTO) else found

    @classmethod
    def from_words(cls, number: str | None, axes: Mapping[str, int]) -> dict[str, Any]:
        """Read "deepspeed:3": the stage."""
        if axes:
            said = ", ".join(axes)
            raise ConfigError(
                f"strategy='deepspeed' is not combined with {said}. It holds whole layers: say strategy='deepspeed'."
            )
        if number is None:
            return {}
        if number not in ("0", "1", "2", "3"):
            raise ConfigError(f"ZeRO has the stages 0, 1, 2 and 3, got deepspeed:{number}. For example strategy='deepspeed:2'.")
        return {"stage": int(number)}

    def take_run(self, **settings: Any) -> None:
        """Take what the run says: gradient_accumulation_steps, gradient_clipping, train_micro_batch_size_per_gpu.

        The JSON is held against it when the engine is built.
        """
        self.run |= {k: v for k, v in settings.items() if v is not None}

    def _choose_weights(self, model: nn.Module | None = None) -> tuple[str | None, str]:
        """Return ("bf16", "fp16", or None where the model computes with fp32 parameters; the reason).

        Raises:
            ConfigError: 16 bits were asked for and cannot be.
        """
        assert self.precision is not None
        dtype = self.precision.autocast_dtype
        if dtype is None or self.weights_in_16_bits is False or (self.stage == 0 and not self.inference):
            return None, "asked for" if self.weights_in_16_bits is False else f"chosen: precision {self.precision.name}"
        short = "bf16" if dtype == torch.bfloat16 else "fp16"
        why_not = ""
        if short == "fp16" and not deepspeed_engine.has_fp16(self.device):
            why_not = f"DeepSpeed has no fp16 on {self.device.type}"
            if self.device.type == "cpu":
                why_not += " whose oneDNN has none (torch.ops.mkldnn._is_mkldnn_fp16_supported() is False)"
        elif model is not None and (norms := [k for k, m in model.named_modules() if _has_statistics(m)]):
            why_not = f"{norms[0]} keeps fp32 statistics, which torch does not mix with {short} weights"
        if not why_not:
            return short, f"chosen: precision {self.precision.name}"
        if self.weights_in_16_bits:
            raise ConfigError(f"weights_in_16_bits=True: {why_not}. Leave it out, and the weights stay fp32 under autocast.")
        return None, f"chosen: {why_not}"

    def _weights_in(self, model: nn.Module | None = None) -> str | None:
        return self._choose_weights(model)[0]

    def _filled(self, numel: int, largest: int, model: nn.Module | None = None) -> dict[str, Any]:
        zero = dict(self.zero)
        for key in ("offload_optimizer", "offload_param"):
            if section := self._section(key):
                pin = self.pin_memory if self.pin_memory is not None else self.device.type != "cpu"
                zero[key] = {"pin_memory": pin} | section
                if self.device.type == "cpu":  # whose memory is nothing to pin; DeepSpeed would compile an extension for it
                    zero[key]["pin_memory"] = False
        return deepspeed_config.fill(
            self.config,
            stage=self.stage,
            zero=zero,
            weights_in=self._weights_in(model),
            numel=numel,
            largest=largest,
        )


def _has_statistics(module: nn.Module) -> bool:
    """Whether it is a norm with running statistics, such as BatchNorm: buffers, which DeepSpeed leaves in fp32."""
    return isinstance(getattr(module, "running_mean", None), torch.Tensor)
