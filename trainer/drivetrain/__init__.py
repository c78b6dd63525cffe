"""What `import drivetrain` gives: the names that a training script needs, each imported when it is first used (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.callbacks.base import Callback
    from drivetrain.strategies.base import Strategy
    from drivetrain.trainer.accelerator import Accelerator
    from drivetrain.trainer.module import TrainingModule
    from drivetrain.trainer.trainer import Trainer

__version__ = "0.1.0"

# name -> the module that holds it. The layers are drivetrain.strategies < drivetrain.callbacks < drivetrain.trainer.
_HOMES = {
    "Accelerator": "drivetrain.trainer.accelerator",
    "Callback": "drivetrain.callbacks.base",
    "Strategy": "drivetrain.strategies.base",
    "Trainer": "drivetrain.trainer.trainer",
    "TrainingModule": "drivetrain.trainer.module",
}

__all__ = ["Accelerator", "Callback", "Strategy", "Trainer", "TrainingModule"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    import difflib

    near = difflib.get_close_matches(name, _HOMES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module 'drivetrain' has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
