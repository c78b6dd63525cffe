"""Put a model where a device map says: what is resident, what passes through buffers from host memory or from files.

    with init_empty_weights():
        model = LlamaForCausalLM(config)
    model = load_checkpoint_and_dispatch(model, "folder", device_map="auto", max_memory={"cpu": "1GB"})
    model.generate(...)                           # never more than 1 GB of weights in memory
    weights_of(model).explain()                   # what lies where, and how many bytes pass for each forward
Names and arguments are Accelerate's. What differs: weights on the disk are read from the safetensors files that hold them (no
second copy in another format), the next block is read while one computes, and a weight that is not in the file is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import materialize
from ..checkpoint.weights import save_weights
from ..composite import Composite, is_composite, num_bytes, parts_of, parts_of_all
from ..errors import CheckpointError, ConfigError
from ..placement import main_place, make_device_map, place_of
from .away import away_like, is_away
from .blocks import Binding, StreamedModule, choose_blocks, map_tensors
from .checks import check_buffers, check_plain
from .handle import Weights, guard, weights_of
from .sizes import read_dtype, tensors_of
from .sources import MemorySource, Source, open_source
from .stream import Block, Stream, host_buffer

__all__ = ["dispatch_model", "load_checkpoint_and_dispatch", "load_checkpoint_in_model"]


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    *,
    prefetch: bool = True,
    io: str = "cached",
    activations: int | str = 0,
    model_name: str | None = None,
) -> nn.Module:
    """Fill `model`, built without values, from `checkpoint`, and place it; return it.

    Args:
        checkpoint: a safetensors file, a folder with one or with shards and an index, or a checkpoint folder of ours.
        device_map: "auto", "balanced", "balanced_low_0", "sequential", or module -> accelerator, "cpu" or "disk". None: the CPU.
        max_memory: place -> bytes ("1GB"), for the words. What passes through buffers is within the limit too.
        dtype: what floating-point weights become. Quantised ones (of a model that was quantised before) stay what they are.
        skip_keys: keyword arguments that are not moved between devices, such as "past_key_values".
        preload_module_classes: modules of these classes are read as a whole: they, too, are never split.
        strict: refuse names in the file that the model has not. Names that the file has not are always refused.
        prefetch: read the next block while one computes, for which there are two buffers.
        io: how files are read: "cached", "drop" or "direct" (sources.py).
        activations: bytes to leave free where the model computes.
        model_name: which model of a checkpoint of ours.
        offload_folder, offload_state_dict, force_hooks: accepted, and not needed: nothing is copied.
        offload_buffers: refused where it would matter: a buffer of ours is where its module computes, for modules write to them.
    Raises:
        CheckpointError: the weights of another model. ConfigError: a map that fits neither the model nor the machine.
    """
    wanted = read_dtype(dtype)
    together = [*(no_split_module_classes or ()), *(preload_module_classes or ())] or None
    number = 2 if prefetch else 1
    options: dict[str, Any] = {"dtype": wanted, "activations": activations, "num_buffers": number}
    places = make_device_map(model, "cpu" if device_map is None else device_map, max_memory, together, **options)
    if offload_buffers:
        check_buffers(model, places)
    source = open_source(checkpoint, io=io, model=model_name)
    return _place(model, places, source, wanted, together, strict=strict, num_buffers=number, skip_keys=skip_keys)


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    strict: bool = False,
    *,
    model_name: str | None = None,
) -> list[str]:
    """Read `checkpoint` into the parameters and buffers of `model`, one at a time; return the names that the model has not.

    Args:
        device_map: where each tensor that has no values yet gets its memory: devices only ("disk" needs the hooks of
            `load_checkpoint_and_dispatch`). None: where it is, and on the CPU what has no values.
        keep_in_fp32_modules: tensors with one of these words in their name stay in float32 whatever `dtype` says.
    Raises:
        CheckpointError: names missing, other shapes, or, with `strict`, names in excess. Nothing was loaded then.
    """
    places = None if device_map is None else make_device_map(model, device_map)
    if places is not None and "disk" in places.values():
        raise ConfigError("load_checkpoint_in_model reads everything now; a map with 'disk' is for load_checkpoint_and_dispatch.")
    wanted = read_dtype(dtype)
    source = open_source(checkpoint, model=model_name)
    try:
        named = _match(model, source, strict)
        for names, tensor in _groups(model, named):
            name = names[0]
            keep = any(word in part for n in names for part in n.split(".") for word in keep_in_fp32_modules or ())
            target = torch.float32 if keep and tensor.is_floating_point() else _target(tensor, wanted)
            place = tensor.device if places is None else torch.device(_device(place_of(name, places)))
            device = torch.device("cpu") if place.type == "meta" else place
            _give(model, names, tensor, source, named, target, device)
        _fill_rest(model, set(named))
        have = set(named.values())
        return sorted(n for n in source.names() if n not in have)
    finally:
        source.close()


def dispatch_model(
    model: nn.Module,
    device_map: str | Mapping[str, Any],
    main_device: Any = None,
    state_dict: Mapping[str, Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Iterable[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    *,
    max_memory: Mapping[Any, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    prefetch: bool = True,
    io: str = "cached",
    activations: int | str = 0,
) -> nn.Module:
    """Place a model that has its values; return it.

    Args:
        device_map: as for `load_checkpoint_and_dispatch`.
        main_device: where what is offloaded computes; by default the first accelerator of the map, else the CPU.
        state_dict: values to take instead of the model's own.
        offload_dir: the folder that gets what the map puts on the "disk", as safetensors, or has it already.
        offload_index: not needed: the files of `offload_dir` say themselves what is in them.
        offload_buffers: as for `load_checkpoint_and_dispatch`.
    Raises:
        ConfigError: "disk" without `offload_dir`, a model that is dispatched already, values missing.
    """
    before = weights_of(model, None)
    if before is not None and before.streamed:
        raise ConfigError("The model is dispatched already. Call remove_hook_from_submodules(model) first.")
    if before is not None:
        before.remove()
    together = [*(no_split_module_classes or ()), *(preload_module_classes or ())] or None
    number = 2 if prefetch else 1
    places = make_device_map(model, device_map, max_memory, together, activations=activations, num_buffers=number)
    if offload_buffers:
        check_buffers(model, places)
    own: dict[str, Tensor] = {n: t for n, t in tensors_of(model).items() if not t.is_meta}
    if state_dict is not None:
        own |= dict(state_dict)
    memory = MemorySource(parts_of_all(own))
    on_disk = [n for n, p in model.named_parameters(remove_duplicate=False) if place_of(n, places) == "disk"]
    source: Source = memory
    check_plain({n: own[n] for n in on_disk if n in own})
    if on_disk:
        if offload_dir is None:
            raise ConfigError("The device map puts weights on the disk. Say in which folder: offload_dir='...'.")
        source = _Both(memory, write_offload(model, on_disk, own, Path(offload_dir), io))
    main = None if main_device is None else torch.device(main_device)
    return _place(model, places, source, None, together, strict=False, num_buffers=number, skip_keys=skip_keys, main_device=main)


def write_offload(model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor], folder: Path, io: str) -> Source:
    """Write what is to lie on the disk to `folder` as safetensors, tied weights once; open it.

    What has no values must be there already.
    """
    groups: dict[int, str] = {}
    for name in names:
        tensor = tensors.get(name)
        if tensor is not None:
            groups.setdefault(id(tensor), name)
    kept = parts_of_all({name: tensors[name] for name in groups.values()})
    if kept:
        sizes = {name: num_bytes(t) for name, t in kept.items()}
        save_weights(folder, sizes, lambda some: {n: kept[n].detach().cpu().contiguous() for n in some})
    return open_source(folder, io=io)


class _Both(Source):
    """Files first, memory for what is not in them."""

    def __init__(self, memory: MemorySource, files: Source) -> None:
        self._memory, self.files = memory, files
        self._there = set(files.names())

    def names(self) -> Iterable[str]:
        return [*self._there, *(n for n in self._memory.names() if n not in self._there)]

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return (self.files if name in self._there else self._memory).info(name)

    def read_into(self, name: str, out: Tensor) -> None:
        (self.files if name in self._there else self._memory).read_into(name, out)

    def layout(self, wanted: Mapping[str, torch.dtype]) -> Any:
        return (self.files if all(n in self._there for n in wanted) else super()).layout(wanted)

    def parts(self, layout: Any, buffer: Tensor) -> Any:
        return (self.files if all(n in self._there for n in layout.places) else super()).parts(layout, buffer)

    def holds(self, name: str, tensor: Tensor) -> bool:
        return self._memory.holds(name, tensor)

    def forget(self, keep: Iterable[str]) -> None:
        self._memory.forget(keep)

    def close(self) -> None:
        self.files.close()


# -- placing -------------------------------------------------------------------------------------------------------------
def _device(place: Any) -> torch.device:
    if isinstance(place, int):
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, place)
    return torch.device("cpu" if place == "disk" else place)


def _match(model: nn.Module, source: Source, strict: bool) -> dict[str, str]:
    """Return name in the model -> name in the source, tied ones by whichever of their names is there; check shapes.

    Of a weight that is made of others, the names are those of its parts.
    Raises:
        CheckpointError: with what is missing, in excess or of another shape.
    """
    there = set(source.names())
    wholes = tensors_of(model)
    tensors = parts_of_all(wholes)
    saved = set(model.state_dict(keep_vars=True))
    persistent = {part for name in wholes if name in saved for part in parts_of(name, wholes[name])}
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    named: dict[str, str] = {}
    missing: list[str] = []
    for name, tensor in tensors.items():
        found = name if name in there else next((n for n in groups[id(tensor)] if n in there), None)
        if found is not None:
            named[name] = found
        elif name in persistent:
            missing.append(name)
    shapes = [
        f"{n} {list(source.info(f)[1])} for {list(tensors[n].shape)}"
        for n, f in named.items()
        if source.info(f)[1] != tensors[n].shape
    ]
    excess = sorted(there - set(named.values())) if strict else []
    if missing or shapes or excess:
        parts = [("missing", missing), ("of another shape", shapes), ("not in the model", excess)]
        told = "; ".join(f"{len(n)} {what} ({', '.join(n[:5])}{' ...' if n[5:] else ''})" for what, n in parts if n)
        tie = " If the model ties weights, call model.tie_weights() before." if missing and hasattr(model, "tie_weights") else ""
        raise CheckpointError(f"The checkpoint holds the weights of another model: {told}.{tie} Nothing was loaded.")
    return named


def _groups(model: nn.Module, named: Mapping[str, str]) -> list[tuple[list[str], Tensor]]:
    """The model's tensors that `named` knows (all parts of them), each once with all of its names."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in tensors_of(model).items():
        if all(part in named for part in parts_of(name, tensor)):
            groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _target(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type that a tensor gets: as asked if it is a floating-point one, else the model's own, as load_state_dict does it."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _give(
    model: nn.Module,
    names: Sequence[str],
    old: Tensor,
    source: Source,
    named: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read one tensor to where it lives and set it under all its names. One that has memory of that kind keeps it."""
    parts = parts_of(names[0], old)
    in_place = not old.is_meta and old.device == device and (old.dtype == dtype or is_composite(old)) and not is_away(old)
    if in_place and not isinstance(source, MemorySource | _Both):
        for name, part in parts.items():
            source.read_into(named[name], part.detach())
        return

    def read(name: str) -> Tensor:
        part = parts[name]
        read = torch.empty(part.shape, dtype=dtype if part is old else part.dtype, device=device)
        source.read_into(named[name], read)
        return read

    values = Composite.of(names[0], old).build(read) if is_composite(old) else read(names[0])
    parameter = nn.Parameter(values, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else None
    for name in names:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if parameter is None:
            module._buffers[key] = values
        else:
            module._parameters[key] = parameter


def _fill_rest(model: nn.Module, loaded: set[str]) -> None:
    """Give values to what no file holds and the meta device left without: buffers that are computed, not saved.

    Raises:
        ConfigError: a module does not say how.
    """
    for name, module in model.named_modules():
        own = [k for k, b in module._buffers.items() if b is not None and b.is_meta]
        if not own:
            continue
        if any(True for p in module._parameters.values() if p is not None):
            where = f"{name}.{own[0]}" if name else own[0]
            raise ConfigError(
                f"The buffer {where} has no values and is not in the file. Build the model under "
                "init_empty_weights(include_buffers=False), which leaves buffers their values."
            )
        materialize.fill(model, name, module, torch.device("cpu"))


def _place(
    model: nn.Module,
    places: Mapping[str, Any],
    source: Source,
    dtype: torch.dtype | None,
    no_split: Sequence[str] | None,
    *,
    strict: bool,
    num_buffers: int,
    skip_keys: str | Iterable[str] | None,
    main_device: torch.device | None = None,
) -> nn.Module:
    """Read what is resident, put stand-ins and buffers for the rest."""
    main = main_device if main_device is not None else _device(main_place(places.values()))
    named = _match(model, source, strict)
    tensors = tensors_of(model)
    blocks = choose_blocks(model, no_split)
    passing = _passing(model, places, blocks, main)
    streamed_names = {n for group in passing.values() for n in group}
    check_plain({n: tensors[n] for n in streamed_names})
    on_disk = {n for n in streamed_names if place_of(n, places) == "disk"}
    skip = frozenset([skip_keys] if isinstance(skip_keys, str) else skip_keys or ())
    for names, tensor in _groups(model, named):
        staying = [n for n in names if n not in streamed_names]
        if staying:
            place = place_of(staying[0], places)
            # Beside accelerators a place in host memory is for what passes; what cannot pass lives where it computes.
            device = main if place == "disk" or (place == "cpu" and main.type != "cpu") else _device(place)
            kind = _target(tensor, dtype)
            here = tensor.device == device and (tensor.dtype == kind or is_composite(tensor))
            if here and all(source.holds(named[part], t) for part, t in parts_of(names[0], tensor).items()):
                continue  # it is where it belongs
            _give(model, staying, tensor, source, named, kind, device)
    _fill_rest(model, set(named))
    for buffer_name, buffer in list(model.named_buffers(remove_duplicate=False)):
        place = place_of(buffer_name, places)
        device = main if place in ("disk", "cpu") else _device(place)
        if buffer.device != device:
            owner, _, key = buffer_name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = buffer.to(device)
    modules = dict(model.named_modules(remove_duplicate=False))
    stand_ins: dict[tuple[int, torch.dtype], nn.Parameter] = {}  # what is tied stays one parameter
    made: list[Block] = []
    prepared: list[tuple[str, nn.Module, list[Binding]]] = []
    for name, group in passing.items():
        kinds: dict[str, torch.dtype] = {}
        for n in group:
            for part, t in parts_of(n, tensors[n]).items():
                kinds[named[part]] = t.dtype if is_composite(tensors[n]) else _target(t, dtype)
        # Only a group whose names are all in files is read from them as a whole.
        layout = source.layout(kinds)
        block = Block(name, layout, source)
        if not any(n in on_disk for n in group):
            block.flat = host_buffer(layout.num_bytes, pinned=main.type != "cpu")[: layout.num_bytes]
            source.fill(layout, block.flat)
        bindings = []
        for n in group:
            owner, _, key = n.rpartition(".")
            composite = Composite.of(n, tensors[n], named) if is_composite(tensors[n]) else None
            kind = tensors[n].dtype if composite is not None else kinds[named[n]]
            if (id(tensors[n]), kind) not in stand_ins:
                stand_ins[id(tensors[n]), kind] = away_like(n, tensors[n], main, kind)
            stand_in = stand_ins[id(tensors[n]), kind]
            bindings.append(Binding(modules[owner], key, n if composite is not None else named[n], stand_in, composite))
        made.append(block)
        prepared.append((name, modules[name], bindings))
    stream = Stream(made, main, num_buffers=num_buffers)
    streamed = [StreamedModule(n, m, i, stream, b) for i, (n, m, b) in enumerate(prepared)]
    for one in streamed:
        one.skip_keys = skip
    handle = Weights(model, dict(places), main, source, named, streamed, stream)
    _align(model, places, main, {id(s.module) for s in streamed}, skip, handle)
    guard(model, handle)
    if isinstance(source, MemorySource | _Both):  # what is resident or laid out lives elsewhere now
        source.forget(n for b in made if b.flat is None for n in b.layout.places)
    if not streamed:
        source.close()
    return model


def _passing(
    model: nn.Module, places: Mapping[str, Any], blocks: Mapping[str, nn.Module], main: torch.device
) -> dict[str, list[str]]:
    """Return module -> names of its parameters, for what passes through buffers, in the order of the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    away = {"disk"} | ({"cpu"} if main.type != "cpu" else set())
    passing: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if place_of(name, places) not in away:
            continue
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        owner = name.rpartition(".")[0]
        if block is not None:
            inside = [n for n, _ in blocks[block].named_parameters(prefix=block, remove_duplicate=False)]
            if all(place_of(n, places) in away for n in inside):
                passing.setdefault(block, []).append(name)
                continue
        computes = type(modules[owner]).forward is not nn.Module.forward
        if owner and computes and not any(True for _ in modules[owner].children()):
            passing.setdefault(owner, []).append(name)
        # What a module with children holds itself is small, and used beside them: it stays.
    order = {n: i for i, n in enumerate(modules)}
    return dict(sorted(passing.items(), key=lambda entry: order[entry[0]]))


def _align(
    model: nn.Module, places: Mapping[str, Any], main: torch.device, streamed: set[int], skip: frozenset[str], handle: Weights
) -> None:
    """Where accelerators are used: bring the arguments of each part to its device, and the result to where the input was."""
    devices = {_device(p) for p in places.values() if p != "disk"} | {main}
    if all(d.type == "cpu" for d in devices):
        return

    def around(module: nn.Module, device: torch.device, back: bool) -> None:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            first = next(_tensors((args, kwargs)), None)
            move = lambda t: t if t.device == device else t.to(device, non_blocking=True)  # noqa: E731
            output = own(*map_tensors(args, move), **map_tensors(kwargs, move, skip))
            if back and first is not None and first.device != device:
                return map_tensors(output, lambda t: t.to(first.device), skip)
            return output

        forward.__doc__ = own.__doc__
        import inspect

        forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        had = "forward" in module.__dict__
        module.forward = forward
        handle.undo.append(lambda: setattr(module, "forward", own) if had else module.__dict__.pop("forward", None))

    for name, place in places.items():
        module = dict(model.named_modules(remove_duplicate=False)).get(name)
        if module is None or not name or id(module) in streamed or type(module).forward is nn.Module.forward:
            continue
        around(module, main if place in ("disk", "cpu") else _device(place), back=False)
    around(model, main, back=True)


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
