"""fp8-msamp: Microsoft's MS-AMP. A contract only, and unmaintained upstream: nothing here ever ran.

Its package is on no index (only sources of version 0.4 of 2024, for CUDA with its own NCCL), so neither this adapter nor any
other of today could be tried. The name exists, with the peers' options, so that a script that asks for it is told what to do.
What the options meant: O1 keeps weight gradients in float8 and reduces them so; O2 keeps the optimizer's first moment in float8
as well. Successors: float8 products by torchao ("fp8-ao") or TransformerEngine ("fp8-te"), and 8-bit optimizer state by
torchao (`strategies.precision.low_bit_optimizers`).
Source: Peng et al. 2023, arXiv:2310.18313 (FP8-LM).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UnknownName, suggest
from .base import Precision

__all__ = ["Float8MSAMP", "MSAMPRecipe"]


@dataclass(frozen=True)
class MSAMPRecipe:
    """The peers' one knob: `opt_level`, "O1" or "O2"."""

    opt_level: str = "O2"

    def __post_init__(self) -> None:
        if self.opt_level not in ("O1", "O2"):
            raise UnknownName(f"opt_level={self.opt_level!r} is not known.{suggest(self.opt_level, ('O1', 'O2'))} Known: O1, O2.")


class Float8MSAMP(Precision):
    """MS-AMP, which is always refused, with its successor."""

    name = "fp8-msamp"

    def __init__(self, recipe: MSAMPRecipe | None = None) -> None:
        self.recipe = recipe if recipe is not None else MSAMPRecipe()

    def available(self, device: torch.device) -> str | None:
        """Never."""
        more = "" if self.recipe.opt_level == "O1" else ", with an 8-bit optimizer for what O2 saved"
        return (
            f"precision='fp8-msamp' ({self.recipe.opt_level}) was asked for. MS-AMP is unmaintained since 2024 and on no package "
            f"index, so it is not supported. Use its successors: precision='fp8-te' on CUDA, or 'fp8-ao'{more}."
        )
