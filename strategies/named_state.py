"""The state of models and optimizers under names that do not depend on how they are held.

    model/<model>/<parameter or buffer>                 a tensor
    optimizer/<optimizer>/<model>/<parameter>/<key>     a tensor of the optimizer's state for that parameter
    optimizer/<optimizer>/<model>/<parameter>/<key>#<i> item i of a list of tensors (LBFGS has such)
    optimizer/<optimizer>                               JSON: the groups' options with their parameters' names, scalar state

Names are those of the module that the user wrote, without a wrapper's prefix, so that every strategy can read what any other
wrote. Loading checks names and shapes of everything first, and reads last, straight to its place: a checkpoint of another model
leaves the weights untouched, and no second copy of the state is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import CheckpointError, ConfigError

_SHOWN = 10  # how many names of one kind an error lists


def model_tensors(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer as `model/<model>/<name>`."""
    return {
        f"model/{name}/{key}": value
        for name, model in models.items()
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


class Source:
    """Where tensors are read from: whole, or the piece of them that a rank holds.

    source(name)                          the full tensor, on the CPU
    source(name, offset=..., shape=...)   the part of it of `shape` at `offset`
    source.shape(name), .dtype(name)      its full shape and type, read from the manifest where there is one
    source.fill(pairs)                    each tensor of the pairs (name, tensor) gets the whole of that name: straight, one pass

    Wherever `read` is taken, a plain function of a name will do too: then pieces are cut from what it returns.

    Args:
        read: returns the full tensor of a name; with `sliced`, it takes `offset` and `shape` as well.
        shape, dtype: return the full shape and the type of a name; by default the tensor is read for it.
        fill: fills many tensors; by default they are read one after the other, and copied.
    """

    def __init__(
        self,
        read: Callable[..., Tensor],
        *,
        shape: Callable[[str], Sequence[int]] | None = None,
        dtype: Callable[[str], torch.dtype] | None = None,
        fill: Callable[[Iterable[tuple[str, Tensor]]], None] | None = None,
        sliced: bool = False,
    ) -> None:
        self._read, self._shape, self._dtype, self._fill, self._sliced = read, shape, dtype, fill, sliced

    @classmethod
    def of(cls, read: Callable[[str], Tensor]) -> Source:
        return read if isinstance(read, Source) else cls(read)

    def __call__(self, name: str, *, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        if offset is None or shape is None:
            return self._read(name)
        if self._sliced:
            return self._read(name, offset=offset, shape=shape)
        return self._read(name)[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._read(name).shape if self._shape is None else self._shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._read(name).dtype if self._dtype is None else self._dtype(name)

    def fill(self, pairs: Sequence[tuple[str, Tensor]]) -> None:
        """Fill tensors in place. Where two are the same memory (tied weights), the later one's values are what is left."""
        by_memory = {(t.device, t.data_ptr(), t.numel(), i if not t.numel() else None): (n, t) for i, (n, t) in enumerate(pairs)}
        if self._fill is not None:
            self._fill(by_memory.values())
            return
        for name, tensor in by_memory.values():
            tensor.detach().copy_(self._read(name))


Place = Callable[[Tensor, str, Source], Tensor]
"""(the tensor that is to be filled, or the parameter whose state is read; its name; where from) -> what it is filled with."""


def whole(own: Tensor, name: str, source: Source) -> Tensor:
    """The `Place` of strategies that hold tensors whole."""
    return source(name)


def load_model_tensors(
    models: Mapping[str, nn.Module],
    names: Iterable[str],
    read: Callable[[str], Tensor],
    *,
    strict: bool = True,
    before: Callable[[], None] = lambda: None,
    place: Place = whole,
) -> list[str]:
    """Copy `model/...` tensors into `models`; return the names that were skipped (only with `strict=False`).

    Args:
        names: all tensor names that the checkpoint holds; those that do not start with `model/` are none of ours.
        read: returns the full tensor of a name, on the CPU; or a `Source`.
        place: reads what one of ours is filled with; strategies that cut tensors up read pieces.
        before: called when the names and shapes were found to fit, before anything is copied. What it raises keeps the weights.
    Raises:
        CheckpointError: names missing or in excess, or other shapes; nothing was copied then. Or damage is met while the tensors
            are read, one after the other, straight into the model: what was read before it is loaded. Callers for whom
            that matters check the files before (`Checkpoint.require_whole`).
    """
    own = model_tensors(models)
    source = Source.of(read)
    theirs = {n for n in names if n.startswith("model/")}
    missing, excess = sorted(own.keys() - theirs), sorted(theirs - own.keys())
    common = sorted(own.keys() & theirs)
    held = {n: source.shape(n) for n in common}
    shapes = [n for n in common if held[n] != tuple(own[n].shape)]
    if strict and (missing or excess or shapes):
        parts = [
            _listing("missing in the checkpoint", missing),
            _listing("in the checkpoint but not in the model", excess),
            _listing("of another shape", [f"{n} {held[n]} for {tuple(own[n].shape)}" for n in shapes]),
        ]
        raise CheckpointError(
            f"The checkpoint is of another model: {'; '.join(p for p in parts if p)}. Nothing was loaded. "
            "Build the same model, or load with strict=False to take what fits."
        )
    before()
    fits = [n for n in common if n not in set(shapes)]
    with torch.no_grad():
        source.fill([(n, own[n]) for n in fits if _is_plain(own[n])])
        for name in fits:
            if not _is_plain(own[name]):
                own[name].copy_(place(own[name], name, source))
    return [*missing, *excess, *shapes]


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its values itself: nothing but the whole of what was saved can be what it is filled with."""
    return cast(Any, type(tensor)).__torch_dispatch__ is cast(Any, Tensor).__torch_dispatch__


def full_numel(parameter: Tensor) -> int:
    """Return how many elements a parameter has, also one that ZeRO-3 cut up, whose own shape is empty between its uses."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_names(models: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return id(parameter) -> `<model>/<parameter>`; a tied parameter has its first name."""
    names: dict[int, str] = {}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), f"{model_name}/{name}")
    return names


def optimizer_state(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, JSON values) of all `optimizers` under the names of the module docstring.

    Raises:
        ConfigError: an optimizer holds a parameter that none of `models` has.
    """
    names = parameter_names(models)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for optimizer_name, optimizer in optimizers.items():
        scalars: dict[str, dict[str, Any]] = {}
        for parameter, state in optimizer.state.items():
            prefix = _name_of(parameter, names, optimizer_name)
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{optimizer_name}/{prefix}/{key}"] = value
                elif isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
                    items = {i: item for i, item in enumerate(value) if isinstance(item, Tensor)}
                    tensors |= {f"optimizer/{optimizer_name}/{prefix}/{key}#{i}": item for i, item in items.items()}
                    scalars.setdefault(prefix, {})[key] = [None if i in items else item for i, item in enumerate(value)]
                else:
                    scalars.setdefault(prefix, {})[key] = value
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            | {"params": [_name_of(p, names, optimizer_name) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        values[f"optimizer/{optimizer_name}"] = {
            "class": type(optimizer).__name__,
            "param_groups": groups,
            "scalars": scalars,
        }
    return tensors, values


def load_optimizer_state(
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    names: Iterable[str],
    read: Callable[[str], Tensor],
    values: Mapping[str, Any],
    *,
    place: Place = whole,
) -> None:
    """Give every optimizer its groups' options and its state back. `read` and `place` as in `load_model_tensors`.

    Raises:
        CheckpointError: another optimizer class, other groups or other parameters; nothing was loaded then. Damage: see there.
    """
    parameters = dict(_named(models))
    by_optimizer: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("optimizer/"):
            by_optimizer.setdefault(name.split("/", 2)[1], []).append(name)
    source = Source.of(read)
    loads: list[tuple[Optimizer, dict[str, Any], list[_Slot]]] = []
    for optimizer_name, optimizer in optimizers.items():
        saved = values.get(f"optimizer/{optimizer_name}")
        if saved is None:
            held = sorted(v.split("/", 1)[1] for v in values if v.startswith("optimizer/"))
            raise CheckpointError(
                f"The checkpoint holds no optimizer {optimizer_name!r}; it holds {held or 'none'}. "
                "Return the same optimizers from configure_optimizers, or load the models only."
            )
        own_names = by_optimizer.get(optimizer_name, [])
        loads.append((optimizer, *_state_for(optimizer_name, optimizer, saved, own_names, parameters)))
    for optimizer, state, slots in loads:
        with torch.no_grad():
            _read_state(slots, source, place)
        optimizer.load_state_dict(state)


class _Slot(NamedTuple):
    """Where one tensor of an optimizer's state goes: `holder[at]`. `live`: what stands there now."""

    name: str
    parameter: nn.Parameter
    key: str
    holder: Any
    at: str | int
    live: Any


def _read_state(slots: Sequence[_Slot], source: Source, place: Place) -> None:
    """Read the tensors of an optimizer's state: into those that it has, where they are alike, else into new ones."""
    straight: list[tuple[str, Tensor]] = []
    for slot in slots:
        live, parameter = slot.live, slot.parameter
        shape = source.shape(slot.name)
        usable = isinstance(live, Tensor) and tuple(live.shape) == shape
        if _is_plain(parameter) and (not usable or _is_plain(live)):
            if not usable:
                # Where Optimizer.load_state_dict will want it, so that nothing is held twice. Counters stay on the CPU.
                device = "cpu" if slot.key == "step" else parameter.device
                live = torch.empty(shape, dtype=source.dtype(slot.name), device=device)
            straight.append((slot.name, live))
        else:
            read = place(parameter, slot.name, source)
            if usable and type(read) is type(live) and (read.dtype, read.shape) == (live.dtype, live.shape):
                live.copy_(read)
            else:
                live = read
        slot.holder[slot.at] = live
    source.fill(straight)


def _state_for(
    optimizer_name: str,
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    names: list[str],
    parameters: Mapping[str, nn.Parameter],
) -> tuple[dict[str, Any], list[_Slot]]:
    """Build what `Optimizer.load_state_dict` takes (parameters by number), and where in it which tensors are to be read."""
    groups = saved["param_groups"]
    if saved["class"] != type(optimizer).__name__ or len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"Optimizer {optimizer_name!r} was {saved['class']} with {len(groups)} parameter group(s) when it was saved and is "
            f"{type(optimizer).__name__} with {len(optimizer.param_groups)} now. Build the same one, or load the models only."
        )
    number = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    slots: list[_Slot] = []

    def slot(parameter_name: str) -> dict[str, Any]:
        parameter = parameters.get(parameter_name)
        if parameter is None or id(parameter) not in number:
            raise CheckpointError(
                f"Optimizer {optimizer_name!r} had state for parameter {parameter_name!r}, which is not among its parameters "
                "now. Build the same parameter groups, or load the models only."
            )
        return state.setdefault(number[id(parameter)], {})

    for parameter_name, scalars in saved["scalars"].items():
        slot(parameter_name).update({k: list(v) if isinstance(v, list) else v for k, v in scalars.items()})
    for name in names:
        parameter_name, _, key = name.removeprefix(f"optimizer/{optimizer_name}/").rpartition("/")
        key, _, item = key.partition("#")
        target, parameter = slot(parameter_name), parameters[parameter_name]
        live = optimizer.state.get(parameter, {}).get(key)
        if item:
            live = live[int(item)] if isinstance(live, list) and len(live) > int(item) else None
            slots.append(_Slot(name, parameter, key, target[key], int(item), live))
        else:
            slots.append(_Slot(name, parameter, key, target, key, live))
    packed = []
    for group, current in zip(groups, optimizer.param_groups, strict=True):
        wanted = [number[id(parameters[n])] for n in group["params"] if n in parameters and id(parameters[n]) in number]
        if sorted(wanted) != sorted(number[id(p)] for p in current["params"]):
            raise CheckpointError(
                f"A parameter group of optimizer {optimizer_name!r} held {len(group['params'])} parameters that are not those of "
                f"the {len(current['params'])} it holds now. Build the same parameter groups, or load the models only."
            )
        # A tuple such as AdamW's betas is a list in JSON; torch keeps whatever it is given.
        options = {k: tuple(v) if isinstance(v, list) and isinstance(current.get(k), tuple) else v for k, v in group.items()}
        packed.append(options | {"params": [number[id(p)] for p in current["params"]]})
    return {"state": state, "param_groups": packed}, slots


def _named(models: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    for model_name, model in models.items():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            yield f"{model_name}/{name}", parameter


def _name_of(parameter: Tensor, names: Mapping[int, str], optimizer: str) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise ConfigError(
            f"Optimizer {optimizer!r} holds a parameter of shape {tuple(parameter.shape)} that belongs to no prepared model, so "
            "its state has no name to be saved under. Prepare the module that owns it as well."
        )
    return name


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"
