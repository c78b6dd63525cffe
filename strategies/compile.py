"""torch.compile of a model's blocks, and the proof that something was compiled.

    Trainer(compile=True)                          the repeated blocks, one graph for all of them; no blocks: the whole forward
    Trainer(compile="aot_eager")                   another backend
    Trainer(compile=Compile(units=None, mode="max-autotune"))    the whole forward

What is compiled is a forward, never the step: a step gets another batch_idx each time, and would be compiled anew. Where the step
calls no compiled forward (it calls children instead), nothing was compiled, and the first optimizer step says so: an error.
Blocks are compiled as one graph each (fullgraph): what breaks a graph is an error of torch that names the line.
Compiled after activation checkpointing and before sharding: gathering happens outside of the graphs.
Source: torch.compile; regional compilation is torch's word for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .blocks import choose_blocks, with_forward
from .errors import ConfigError, suggest
from .units import Units

__all__ = ["Compile", "Compiled", "compile_blocks", "read_compile"]


@dataclass(frozen=True)
class Compile:
    """What is compiled, and how.

    Attributes:
        backend: of torch.compile.
        mode, dynamic, options: torch.compile's.
        fullgraph: one graph or an error. None: True for blocks, False for a whole forward.
        units: which modules, as in units.py; "auto": the repeated blocks, or where there are none the forward of the model
            (of its children, if it has none of its own); None: the forward of the model.
    """

    backend: str = "inductor"
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None
    units: Units = "auto"


@dataclass
class Compiled:
    """What was compiled of one model: the functions, for `check` to ask whether they ever were."""

    name: str
    options: Compile
    paths: list[str]
    forwards: list[Callable[..., Any]]

    def check(self) -> None:
        """Refuse to go on when no compiled forward has run; called after an optimizer step.

        Raises:
            ConfigError: none was compiled.
        """
        if not any(_frames(forward) for forward in self.forwards):
            shown = ", ".join(path or "the model's forward" for path in self.paths[:3])
            raise ConfigError(
                f"compile={self.options.backend!r} has compiled nothing of model {self.name!r}: {shown} did not run in the "
                "first step, which calls other modules. Call the model's forward in the step, self(batch), or name the "
                "classes that the step calls: Compile(units=['Block'])."
            )

    def explain(self) -> tuple[str, str]:
        """A row for the start-up lines."""
        what = f"{len(self.paths)} blocks" if self.paths[1:] else self.paths[0] or "the whole forward"
        return f"compiled ({self.name})", f"{what}, {self.options.backend}"


def read_compile(given: Any) -> Compile | None:
    """Return what an argument stands for: None or False for none, True, a backend, a mapping of options, or the object itself.

    An object with Accelerate's names (TorchDynamoPlugin) will do as well.
    Raises:
        ConfigError: anything else, or options or a backend that do not exist.
    """
    if given is None or given is False or given == "no":
        return None
    if given is True:
        return Compile()
    if isinstance(given, Compile):
        return _checked(given)
    if isinstance(given, str):
        return _checked(Compile(backend=given.lower()))
    if hasattr(given, "use_regional_compilation"):
        named = {key: getattr(given, key, None) for key in ("backend", "mode", "dynamic", "options", "fullgraph")}
        named["backend"] = str(getattr(named["backend"], "value", named["backend"])).lower()
        return read_compile({**named, "units": "auto" if given.use_regional_compilation else None})
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"compile={given!r:.60} is nothing that it could be. Expected True, a backend of torch.compile such as 'inductor', a "
            "mapping of options, or a Compile(...)."
        )
    known = [f.name for f in fields(Compile)]
    if unknown := [key for key in given if key not in known]:
        raise ConfigError(f"compile has no option {unknown[0]!r}.{suggest(str(unknown[0]), known)} Known: {', '.join(known)}.")
    return read_compile(Compile(**given))


def _checked(options: Compile) -> Compile:
    if options.mode is not None and options.options is not None:
        raise ConfigError("Compile(mode=..., options=...): torch.compile takes one of the two. A mode is a set of options.")
    if options.backend not in ("inductor", "eager", "aot_eager", "cudagraphs"):
        known = torch.compiler.list_backends(exclude_tags=())
        if options.backend not in known:
            raise ConfigError(
                f"compile={options.backend!r}: torch.compile has no such backend.{suggest(options.backend, known)} "
                f"Known: {', '.join(sorted(known))}."
            )
    return options


def compile_blocks(name: str, model: nn.Module, options: Compile) -> Compiled:
    """Let the blocks of `model` (or its forward) be compiled at their first call; return what there is to check.

    Raises:
        ConfigError: there is nothing to compile.
    """
    chosen = choose_blocks(model, options.units)
    whole = not chosen
    if not chosen and options.units in (None, "auto"):
        chosen = _forwards(model)
    if not chosen:
        raise ConfigError(
            f"compile was asked for, and model {name!r} ({type(model).__name__}) has no module with a forward and parameters. "
            "Put what is to be compiled into the forward of a module."
        )
    fullgraph = not whole if options.fullgraph is None else options.fullgraph
    for path, module in chosen:
        with_forward(path, module, functools.partial(_compiled, options, fullgraph))
    return Compiled(name, options, [path for path, _ in chosen], [type(module).forward for _, module in chosen])


def _forwards(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model where it has a forward; else the outermost modules inside it that have one, and parameters."""
    found: list[tuple[str, nn.Module]] = []

    def visit(path: str, module: nn.Module) -> None:
        if type(module).forward is not nn.Module.forward and any(True for _ in module.parameters()):
            found.append((path, module))
            return
        for key, child in module.named_children():
            visit(f"{path}.{key}" if path else key, child)

    visit("", model)
    return found


def _compiled(options: Compile, fullgraph: bool, forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(
        forward,
        backend=options.backend,
        mode=options.mode,
        dynamic=options.dynamic,
        options=None if options.options is None else dict(options.options),
        fullgraph=fullgraph,
    )


def _frames(forward: Callable[..., Any]) -> int:
    """How many graphs torch holds for a compiled function. Private in name: tests/strategies/test_compile.py pins it."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, innermost_fn

    return len(_debug_get_cache_entry_list(innermost_fn(forward).__code__))
