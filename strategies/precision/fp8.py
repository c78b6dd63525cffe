"""fp8: 8-bit floats by whichever package is installed. The choice and its reason are printed.

torchao comes first: it runs on every device that multiplies float8, CPUs too, keeps plain weights, and is what Accelerate takes
first. TransformerEngine, which needs CUDA, is taken where torchao is not installed. "fp8-ao" and "fp8-te" say it exactly.
"""

from __future__ import annotations

from ..errors import MissingDependency
from . import _torchao, float8_te
from .base import Precision
from .float8_ao import Float8AO

__all__ = ["chosen"]


def chosen() -> Precision:
    """Return the precision that "fp8" means here, with the reason.

    Raises:
        MissingDependency: neither package is installed.
    """
    no_ao, no_te = _torchao.missing("precision='fp8'"), float8_te.missing("fp8")
    if no_ao is None:
        made: Precision = Float8AO()
        made.reason = "chosen for fp8: torchao is installed, and runs on CPU and CUDA"
    elif no_te is None:
        made = float8_te.Float8TE()
        made.reason = "chosen for fp8: TransformerEngine is installed, torchao is not"
    else:
        raise MissingDependency(
            "precision='fp8' needs torchao or TransformerEngine, and neither is installed. Install one: "
            f"{_torchao.NEEDED} (CPU and CUDA), or {float8_te.NEEDED}."
        )
    return made
