"""Which optimizers may be given parameters in pieces (DTensors): those of torch that step each element by itself.

The others either fail in their first step, deep in torch, or train something else without a word: torch.optim.Muon orthogonalises
each piece for itself, LBFGS takes a line search for every rank's own pieces. tests/strategies/test_sharded_optimizers.py runs all
of torch's against one process. An optimizer of another library is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["check_sharded_optimizer"]

_WHOLE_ONLY: Mapping[type[Optimizer], str] = {
    torch.optim.Muon: "orthogonalises whole matrices, and would take each process's piece for one. Use drivetrain.MuonAdamW",
    torch.optim.Adafactor: "keeps means of whole rows and columns. Use AdamW",
    torch.optim.LBFGS: "puts all parameters into one vector. Use AdamW",
    torch.optim.Rprop: "writes to elements by index, which torch's DTensor cannot. Use AdamW",
}
"""Class -> why it cannot, and what can."""


def check_sharded_optimizer(optimizer: Optimizer, whole: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse an optimizer that would fail on the pieces of parameters, or would step otherwise than on the whole.

    Args:
        whole: the parameters that are held whole on every rank, with their names.
    Raises:
        ConfigError: an optimizer that needs whole matrices; fused or foreach over pieces and whole parameters together.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    in_pieces = any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in parameters)
    for kind, reason in _WHOLE_ONLY.items() if in_pieces else ():
        if isinstance(optimizer, kind):
            raise ConfigError(
                f"{type(optimizer).__name__} was given parameters in pieces (DTensors), and {reason}, or a strategy that leaves "
                "them whole, such as 'ddp'."
            )
    for group in optimizer.param_groups:
        kinds = {p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]}
        asked = [key for key in ("fused", "foreach") if group.get(key)]
        if len(kinds) > 1 and asked:
            names = [n for n, p in whole if any(p is q for q in group["params"])]
            met = f"{', '.join(names[:5])} are held whole while the others are cut up"
            raise ConfigError(
                f"{type(optimizer).__name__}({asked[0]}=True) takes all parameters of a group at once, and "
                f"{met if names else 'some of them are cut over other axes than the others'}. Give them a parameter "
                f"group of their own, give 0-d parameters shape (1,), or leave {asked[0]} out."
            )
