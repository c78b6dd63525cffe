"""A model as a chain of modules, and the chain cut into stages for a pipeline.

    find_chain(model)      the links in the order in which the data pass them: [Link(("embed",)), Link(("layers.0",)), ...]
    cut(chain, costs, n)   where each of n stages begins, so that the costliest one costs least
    free(model, elsewhere) the parameters of other ranks' stages become placeholders without memory (the meta device)
How the chain is found, by the first of these that there is:
    1. `pipeline_parts()` of the model, or of a module that its forward passes through: names of modules in order, lists of blocks
       by their own name, and (name, function) or ((name, name), function) where a module is not simply called with what the one
       before it returned:
           def pipeline_parts(self):
               layers = [(f"layers.{i}", partial(self.run_layer, i)) for i in range(len(self.layers))]
               return [(("tokens", "positions"), self.embed), *layers, "norm", "head"]
    2. an nn.Sequential is its children.
    3. The forward is run once with a stand-in for the data and one for every module: a chain is a forward that hands each
       module just what the one before returned, and returns the last one's. Stand-ins can do nothing else: a residual, a
       reshape or a second argument shows, and the message says between which modules. Nothing is computed.
Names stay those of the user's model: placeholders keep them, their shapes and their dtypes, on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, suggest
from .units import choose_units

__all__ = ["Link", "cost_of", "cut", "find_chain", "free", "mark_elsewhere", "split_at", "split_between"]

_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Link:
    """One link of the chain.

    Attributes:
        names: the paths of the modules whose parameters it uses; none for a function that has no parameters.
        call: what is called with the output of the link before; None: the module itself.
        packs: several tensors that the link before returned are one argument, a tuple, as in nn.Sequential; else one each.
    """

    names: tuple[str, ...]
    call: Callable[..., Any] | None = None
    packs: bool = False

    def arguments(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what the link is called with, of what the one before returned."""
        return (tensors,) if self.packs and len(tensors) > 1 else tensors


# -- the chain --------------------------------------------------------------------------------------------------------
def find_chain(model: nn.Module) -> list[Link]:
    """Return the links of `model`.

    Raises:
        ConfigError: its forward is no chain and it says nothing of its parts; or parts that it has not; or parameters in no part.
    """
    units = {id(module) for _, module in choose_units(model, "auto")}
    chain = _expand("", model, units)
    if isinstance(chain, str):
        raise ConfigError(
            f"{type(model).__name__} cannot be cut into stages: {chain} Give it a method pipeline_parts() that returns the names "
            "of its modules in the order in which the data pass them; where a module is not simply called with what the one "
            "before returned, (name, function)."
        )
    _check_parameters(model, chain)
    return chain


def _expand(path: str, module: nn.Module, units: set[int]) -> list[Link] | str:
    """The links of the module at `path`, or why it is none or only one."""
    declared: Any = getattr(module, "pipeline_parts", None)
    if callable(declared):
        return list(_declared(path, module, declared()))  # pyright: ignore[reportArgumentType]
    if type(module).forward is nn.Sequential.forward:
        names: list[str] | str = [name for name, _ in _children(module)]
    elif type(module).forward is nn.Module.forward:
        names = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
        if len(names) != 1:
            return f"{_word(path, module)} defines no forward, and {len(names)} of its children have parameters."
    else:
        names = _trace(path, module)
    if isinstance(names, str):
        return names
    found: list[Link] = []
    for name in names:
        where = f"{path}.{name}" if path else name
        child = module.get_submodule(name)
        # A module that is handled as one unit must be called itself. One that holds units is opened, and so is a wrapper.
        opens = id(child) not in units and (len(names) == 1 or any(id(m) in units for m in child.modules()))
        links = _expand(where, child, units) if opens and not _has_hooks(child) else ""
        if isinstance(links, str) and len(names) == 1 and links:
            return links
        found += [Link((where,), packs=True)] if isinstance(links, str) else links
    return found


def _word(path: str, module: nn.Module) -> str:
    return f"{type(module).__name__}{f' ({path})' if path else ''}"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _declared(path: str, module: nn.Module, parts: Iterable[Any]) -> Iterable[Link]:
    """Read what `pipeline_parts` returned; names are relative to the module that said them."""
    known = dict(module.named_modules())
    paths = {id(m): n for n, m in known.items()}
    for part in parts:
        call: Callable[..., Any] | None = None
        name: Any = part
        if isinstance(part, tuple) and len(part) == 2:
            name, call = part
        elif isinstance(part, nn.Module):
            name = paths.get(id(part))
        elif not isinstance(part, str) and callable(part):
            yield Link((), part)
            continue
        names = (name,) if isinstance(name, str) else tuple(name) if isinstance(name, tuple | list) else ("",)
        bad: list[Any] = [n for n in names if not isinstance(n, str) or not n or n not in known]
        if bad or len(names) == 0 or not (callable(call) if len(names) > 1 else call is None or callable(call)):
            raise ConfigError(
                f"{_word(path, module)}.pipeline_parts() named {part!r:.80}, which is no module of it."
                f"{suggest(str(bad[0]), known) if bad and bad[0] else ''} Return names of modules, or (name, function)."
            )
        where = tuple(f"{path}.{n}" if path else n for n in names)
        if call is None and isinstance(known[names[0]], _LISTS):
            yield from (Link((f"{where[0]}.{key}",)) for key, _ in _children(known[names[0]]))
        else:
            yield Link(where, call)


class _Token:
    """Stands for the data: it can be handed on, and nothing else."""

    __slots__ = ()


class _NoChain(Exception):
    """Why a forward is no chain."""


class _Probe(nn.Module):
    """Stands for a module: takes the newest token and returns a newer one."""

    def __init__(self, name: str, trace: list[tuple[str, _Token]]) -> None:
        super().__init__()
        self._name, self._trace = name, trace

    def forward(self, *args: Any, **kwargs: Any) -> _Token:
        before, newest = self._trace[-1]
        if len(args) != 1 or kwargs:
            raise _NoChain(f"{self._name} takes {len(args) + len(kwargs)} arguments, not just what {before} returned.")
        if args[0] is not newest:
            raise _NoChain(f"{self._name} does not take just what {before} returned.")
        if any(name == self._name for name, _ in self._trace):
            raise _NoChain(f"{self._name} is called twice.")
        token = _Token()
        self._trace.append((self._name, token))
        return token


def _trace(path: str, module: nn.Module) -> list[str] | str:
    """The children of `module` (those of its lists in their place) in the order in which its forward calls them, or why not."""
    trace: list[tuple[str, Any]] = [("the input", _Token())]

    def stand_in(name: str, child: nn.Module) -> nn.Module:
        if isinstance(child, _LISTS):
            return _shallow(child, {key: stand_in(f"{name}.{key}", inner) for key, inner in _children(child)})
        return _Probe(name, trace)

    clone = _shallow(module, {name: stand_in(name, child) for name, child in _children(module)})
    try:
        result = type(module).forward(clone, trace[0][1])
    except _NoChain as why:
        return f"in the forward of {_word(path, module)}, {why}"
    except Exception as error:
        return (
            f"the forward of {_word(path, module)} does more with what {trace[-1][0]} "
            f"{'is' if len(trace) == 1 else 'returned'} than to hand it on "
            f"({type(error).__name__}: {str(error).rstrip('.'):.120})."
        )
    if result is not trace[-1][1] or len(trace) == 1:
        return f"the forward of {_word(path, module)} does not return what its last module returned."
    return [name for name, _ in trace[1:]]


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All children under all their names: `named_children` leaves out one that is called twice, such as an activation."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _shallow(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """The module with other children; all else is shared with it."""
    clone = copy.copy(module)
    clone.__dict__["_modules"] = dict(children)
    return clone


def _check_parameters(model: nn.Module, chain: Sequence[Link]) -> None:
    """Refuse parameters that belong to no link, and such as belong to several."""
    owners: dict[int, list[str]] = {}
    for link in chain:
        for part in link.names:
            for parameter in model.get_submodule(part).parameters():
                owners.setdefault(id(parameter), []).append(part)
    for name, parameter in model.named_parameters():
        if id(parameter) not in owners:
            raise ConfigError(
                f"{name} of {type(model).__name__} lies in no part of its pipeline "
                f"({', '.join(n for k in chain for n in k.names)}), so no stage would hold it. "
                "Put it into a module that is one of the parts, or name it in pipeline_parts()."
            )


# -- the cut ----------------------------------------------------------------------------------------------------------
def cost_of(model: nn.Module, link: Link) -> float:
    """What a link costs: the parameters that its input is multiplied by. A table of embeddings is only looked up in."""
    modules = [model.get_submodule(name) for name in link.names]
    inner = [m for module in modules for m in module.modules()]
    looked_up = {id(p) for m in inner if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    return float(sum(p.numel() for module in modules for p in module.parameters() if id(p) not in looked_up))


def cut(costs: Sequence[float], stages: int) -> list[int]:
    """Return where each stage begins, so that the costliest stage costs least; among such, stages are even in links.

    Raises:
        ConfigError: there are fewer links than stages.
    """
    n = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][i]: (the costliest stage, the sum of squares) of the first i links in k stages; the squares even out the others.
    worst = (float("inf"), float("inf"))
    best = [[worst] * (n + 1) for _ in range(stages + 1)]
    came = [[0] * (n + 1) for _ in range(stages + 1)]
    best[0][0] = (0.0, 0.0)
    for k in range(1, stages + 1):
        for i in range(k, n + 1):
            for j in range(k - 1, i):
                cost = total[i] - total[j]
                found = (max(best[k - 1][j][0], cost), best[k - 1][j][1] + cost * cost + (i - j) ** 2 * 1e-9)
                if found < best[k][i]:
                    best[k][i], came[k][i] = found, j
    if best[stages][n] == worst:
        raise ConfigError(
            f"The model has {n} part(s) in a row, and the pipeline {stages} stages. Use fewer ranks or stages per rank, or name "
            "finer parts in pipeline_parts()."
        )
    starts, i = [], n
    for k in range(stages, 0, -1):
        i = came[k][i]
        starts.append(i)
    return starts[::-1]


def split_between(
    model: nn.Module, chain: Sequence[Link], costs: Sequence[float], stages: int, no_split: Sequence[str]
) -> list[str]:
    """Return the names of the links at which stages begin, by `costs`, and none of them inside a module of a class in `no_split`.

    Raises:
        ConfigError: no module is of such a class, or too few places are left.
    """
    classes = {type(module).__name__ for module in model.modules()}
    for name in no_split:
        if name not in classes:
            raise ConfigError(
                f"no_split_module_classes: no module of {type(model).__name__} is of a class {name!r}.{suggest(name, classes)} "
                f"Its classes: {', '.join(sorted(classes))}."
            )
    inside = {f"{path}.": path for path, module in model.named_modules() if path and type(module).__name__ in no_split}
    groups: list[tuple[str, float, str]] = []  # where it begins, what it costs, in which module that stays whole
    for link, cost in zip(chain, costs, strict=True):
        name = link.names[0] if link.names else ""
        whole = next((path for prefix, path in inside.items() if name.startswith(prefix)), "")
        if groups and ((whole and whole == groups[-1][2]) or not name):  # a function goes with what is before it
            begin, before, held = groups[-1]
            groups[-1] = begin, before + cost, held
        else:
            groups.append((name, cost, whole))
    return [groups[i][0] for i in cut([cost for _, cost, _ in groups], stages)[1:]]


def split_at(chain: Sequence[Link], splits: Sequence[str], stages: int) -> list[int]:
    """Return where each stage begins, by the names of the links at which a new one does.

    Raises:
        ConfigError: names that are no links, out of order, or another number of them.
    """
    names = [link.names[0] if link.names else "" for link in chain]
    starts = [0]
    for split in splits:
        # A name may leave out what wraps the chain: "layers.2" for "net.layers.2".
        found = [i for i, name in enumerate(names) if name == split or name.endswith(f".{split}")]
        if len(found) != 1:
            raise ConfigError(
                f"Pipeline(splits=...): a stage shall begin at {split!r}, which "
                f"{'no part' if not found else 'more than one part'} is called.{suggest(split, names)} "
                f"Parts: {', '.join(filter(None, names))}."
            )
        if found[0] <= starts[-1]:
            raise ConfigError(f"Pipeline(splits=...): {split!r} comes before or at the split before it. Give them in order.")
        starts.append(found[0])
    if len(starts) != stages:
        raise ConfigError(
            f"Pipeline(splits=...) names {len(splits)} split(s), which makes {len(starts)} stages, and there are to be {stages}: "
            f"the ranks of pp times the stages per rank. Name {stages - 1}, or leave it to splits='auto'."
        )
    return starts


@torch.no_grad()
def free(model: nn.Module, names: Iterable[str], *, keep: Iterable[str] = ()) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Put placeholders in the place of all parameters and buffers of the modules called `names`; return (old, new) pairs.

    The old parameters lose their memory. What the modules called `keep` hold stays, wherever else it is.
    """
    here = [module for name in keep for module in model.get_submodule(name).modules()]
    kept = {id(tensor) for module in here for held in (module._parameters, module._buffers) for tensor in held.values()}
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for name in names:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is None or id(parameter) in kept:
                    continue
                if id(parameter) not in made:
                    shape = torch.empty_like(parameter, device="meta")
                    made[id(parameter)] = parameter, nn.Parameter(shape, requires_grad=parameter.requires_grad)
                module._parameters[key] = made[id(parameter)][1]
            for key, buffer in list(module._buffers.items()):
                if buffer is not None and id(buffer) not in kept:
                    module._buffers[key] = torch.empty_like(buffer, device="meta")
    for old, _ in made.values():
        old.data = old.data.new_empty(0)
    return list(made.values())


# -- what other ranks hold --------------------------------------------------------------------------------------------
class Elsewhere(Tensor):
    """In a state_dict, the place of a tensor that another stage holds: it has a name, a shape and a dtype, and no values.

    Whatever saves by pickling (torch.save) is refused here; what asks for values, safetensors too, is refused by torch.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            f"A tensor of shape {tuple(self.shape)} was to be saved that another stage of the pipeline holds: the state_dict of "
            "a model in stages has values for this rank's own only. Call accelerator.get_state_dict(model) on all ranks, which "
            "is whole on the main process, or save a checkpoint."
        )


def mark_elsewhere(model: nn.Module) -> None:
    """Let the state_dict of `model`, and of any module in it, have an `Elsewhere` for each tensor that other ranks hold."""
    for module in model.modules():
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            module.register_state_dict_post_hook(_mark)


def _mark(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, value in state.items():
        if type(value) is Tensor and value.is_meta and key.startswith(prefix):
            state[key] = value.as_subclass(Elsewhere)
