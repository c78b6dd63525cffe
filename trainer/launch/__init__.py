"""Starting the ranks of one node: `launch(fn, devices=2)`, `ensure_ranks` for scripts, the agent behind both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .function import launch
    from .script import ensure_ranks

__all__ = ["ensure_ranks", "launch"]


def __getattr__(name: str) -> Any:
    # Lazy: the command line needs only the agent, and must start without multiprocessing.
    if name == "launch":
        from .function import launch

        return launch
    if name == "ensure_ranks":
        from .script import ensure_ranks

        return ensure_ranks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
