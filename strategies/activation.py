"""Activation checkpointing: a block forgets what it computed in the forward pass, and computes it again in the backward pass.

    FSDPStrategy(activation_checkpointing="full")                any strategy; Trainer and Accelerator have the argument too
    ActivationCheckpointing("selective", every=2, units=["Block"])

    full        only a block's inputs are kept
    selective   besides, the results of matrix products, attention and collectives: what is dear to compute; see KEPT
    offload     as full, and what is kept waits in host memory (for accelerators)
The numbers do not change: random states are put back before a block is computed again, so dropout drops the same.
A block gets a class of its own, of its old name, whose forward does this: names of parameters, copies and hooks stay as they are.
Sources: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198; torch.utils.checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .blocks import choose_blocks, with_forward
from .errors import ConfigError, suggest
from .units import Units

__all__ = ["KEPT", "ActivationCheckpointing", "checkpoint_blocks", "read_checkpointing"]

MODES = ("full", "selective", "offload")
KEPT: tuple[str, ...] = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten.baddbmm.default",
    "aten._scaled_mm.default",
    "aten._grouped_mm.default",
    "aten.convolution.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "_c10d_functional.all_gather_into_tensor.default",
    "_c10d_functional.reduce_scatter_tensor.default",
    "_c10d_functional.all_reduce.default",
    "_c10d_functional.all_to_all_single.default",
)
"""The operators whose results "selective" keeps. A name that this torch does not have is left out."""


@dataclass(frozen=True)
class ActivationCheckpointing:
    """How and where activations are computed again.

    Attributes:
        mode: "full", "selective" or "offload".
        every: of every so many blocks one is computed again: 2 is half the saving for half the cost.
        units: which modules, as in units.py; "auto": the repeated blocks.
        kept: operators whose results "selective" keeps, named as in KEPT.
        preserve_rng_state: put random states back. False saves a little where nothing is random.
    Raises:
        ConfigError: an unknown mode or operator, or every < 1.
    """

    mode: str = "full"
    every: int = 1
    units: Units = "auto"
    kept: Sequence[str] = KEPT
    preserve_rng_state: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"activation_checkpointing={self.mode!r} is not known.{suggest(str(self.mode), MODES)} Known: {', '.join(MODES)}."
            )
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ConfigError(f"ActivationCheckpointing(every={self.every!r}): expected a whole number of at least 1. 1 is all.")
        if unknown := [name for name in self.kept if name not in KEPT and _operator(name) is None]:
            raise ConfigError(
                f"ActivationCheckpointing(kept=...): torch has no operator {unknown[0]!r}.{suggest(unknown[0], KEPT)} "
                "Name one such as 'aten.mm.default'."
            )


def read_checkpointing(given: Any) -> ActivationCheckpointing | None:
    """Return what an argument stands for: None or False for none, True, a mode, or the object itself.

    Raises:
        ConfigError: anything else.
    """
    if given is None or given is False:
        return None
    if given is True:
        return ActivationCheckpointing()
    if isinstance(given, str):
        return ActivationCheckpointing(given)
    if not isinstance(given, ActivationCheckpointing):
        raise ConfigError(
            f"activation_checkpointing={given!r:.60} is nothing that it could be. Expected True, one of {', '.join(MODES)}, "
            "or an ActivationCheckpointing(...)."
        )
    return given


def checkpoint_blocks(name: str, model: nn.Module, options: ActivationCheckpointing, device: torch.device) -> list[str]:
    """Let the blocks of `model` be computed again; return their names.

    Raises:
        ConfigError: no block was found, or offload where there is no device to make room on.
    """
    if options.mode == "offload" and device.type == "cpu":
        raise ConfigError(
            "activation_checkpointing='offload' moves activations from an accelerator to host memory, and the device is the CPU: "
            "they are there. Use 'full'."
        )
    blocks = choose_blocks(model, options.units)
    if not blocks:
        raise ConfigError(
            f"activation_checkpointing={options.mode!r} found no repeated blocks in model {name!r} ({type(model).__name__}). "
            "Name the classes of what is to be computed again: ActivationCheckpointing(units=['Block'])."
        )
    chosen = blocks[options.every - 1 :: options.every] or blocks[:1]
    for path, module in chosen:
        with_forward(path, module, functools.partial(_again, options))
    return [path for path, _ in chosen]


def _again(options: ActivationCheckpointing, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that keeps only what `options` say of what `forward` computes."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    preserve, offload = options.preserve_rng_state, options.mode == "offload"
    if options.mode == "selective":
        kept = [operator for name in options.kept if (operator := _operator(name)) is not None]

        @functools.wraps(forward)
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(self, *args, **kwargs)
            # Made here: torch.compile takes only a partial that it has seen being made.
            contexts = functools.partial(create_selective_checkpoint_contexts, kept)
            return checkpoint(
                forward, self, *args, use_reentrant=False, preserve_rng_state=preserve, context_fn=contexts, **kwargs
            )
    else:

        @functools.wraps(forward)
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(self, *args, **kwargs)
            with torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext():
                return checkpoint(forward, self, *args, use_reentrant=False, preserve_rng_state=preserve, **kwargs)

    # Code of its own: what torch.compile knows of a forward, it knows by its code.
    made: Any = run
    made.__code__ = made.__code__.replace(co_name=f"{made.__code__.co_name}_{id(made)}")
    return made


def _operator(name: str) -> Any:
    """The operator of a name such as "aten.mm.default", or None."""
    found: Any = torch.ops
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):
            return None
    return found if isinstance(found, torch._ops.OpOverload) else None
