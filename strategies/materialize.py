"""Values for modules that were built on the meta device, one module at a time, so that a model never needs to be whole anywhere.

    with torch.device("meta"):
        model = Transformer(config)          # no memory, no random numbers
    walk(model, visit, leave)                # the strategy: give a module its values, cut it up when its unit is complete

Modules are visited in the order of `model.modules()`: the random numbers are the same whatever the strategy, for the same seed.
A module fills itself by its `reset_parameters()`, as all of torch.nn do; transformers' models by their `_init_weights(module)`.
A parameter that several modules share (tied weights) is filled by the first of them, and stays shared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn

from .errors import ConfigError

__all__ = ["fill", "has_meta", "walk"]

_Places = dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]]
_shared: weakref.WeakKeyDictionary[nn.Module, _Places] = weakref.WeakKeyDictionary()
"""Model that is being filled -> id of a shared parameter without values -> (it, which must live for its id's sake; its places).

Looked for once for each model: in every module's turn it would be a search of all modules."""


def has_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer has no values yet."""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def walk(model: nn.Module, visit: Callable[[str, nn.Module], None], leave: Callable[[str, nn.Module], None]) -> None:
    """Call `visit(name, module)` before and `leave(name, module)` after the modules inside it; each module once."""
    seen: set[int] = set()

    def down(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        visit(name, module)
        for key, child in list(module.named_children()):
            down(f"{name}.{key}" if name else key, child)
        leave(name, module)

    down("", model)


@torch.no_grad()
def fill(root: nn.Module, name: str, module: nn.Module, device: torch.device) -> bool:
    """Give the parameters and buffers that `module` itself holds memory on `device`, and their initial values.

    Returns: whether there was anything to do; then the module's parameters are new objects.
    Raises:
        ConfigError: some are on the meta device, and the module does not say how it is initialised.
    """
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    missing = [key for key, tensor in own.items() if tensor.is_meta]
    if not missing:
        return False
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    of_root = getattr(root, "_init_weights", None)
    if not callable(reset) and not callable(of_root):
        where = f"{name}.{missing[0]}" if name else missing[0]
        more = f" (and {len(missing) - 1} more of it)" if missing[1:] else ""
        raise ConfigError(
            f"{where}{more} is on the meta device, where it has no values, and {type(module).__name__} does not say how it "
            f"is initialised. Give {type(module).__name__} a method reset_parameters() that fills its own parameters and "
            "buffers, or build the model outside of torch.device('meta')."
        )
    places = _places(root)
    without = {key: id(parameter) for key, parameter in module._parameters.items() if parameter is not None and parameter.is_meta}
    # Those that have values, such as a weight that a module before this one has filled, keep them.
    kept = {key: tensor.detach().clone() for key, tensor in own.items() if not tensor.is_meta}
    module.to_empty(device=device, recurse=False)
    if callable(reset):
        reset()
    elif callable(of_root):
        of_root(module)
    for key, values in kept.items():
        module.get_parameter(key).copy_(values) if key in module._parameters else module.get_buffer(key).copy_(values)
    for key, before in without.items():
        for other, name_there in places.pop(before, (None, []))[1]:
            other._parameters[name_there] = module._parameters[key]
    return True


def _places(root: nn.Module) -> _Places:
    """Where the parameters of `root` are that have no values and several places."""
    found = _shared.get(root)
    if found is None:
        every: _Places = {}
        for module in root.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    every.setdefault(id(parameter), (parameter, []))[1].append((module, key))
        found = _shared[root] = {key: held for key, held in every.items() if held[1][1:]}
    return found
