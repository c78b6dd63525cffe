"""What lies where: a device map over accelerators, "cpu" and "disk", for a model that may be larger than any of them.

    infer_auto_device_map(model, max_memory={0: "20GB", "cpu": "60GB"})    -> {"embed": 0, "layers.0": 0, ..., "layers.9": "disk"}
The names are modules (or single parameters), the longest that fits a tensor counts; "" is the whole model. What lies where the
model computes is resident; the rest passes through two buffers there (offload/), for which room is kept, as for activations.
On one device the blocks that stay are spread evenly between those that pass: while one stays, the next can be read.
Names and arguments are Accelerate's.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .checkpoint.weights import parse_size
from .errors import ConfigError, suggest
from .offload.blocks import choose_blocks
from .offload.sizes import tensor_bytes, tensors_of

__all__ = [
    "check_device_map",
    "free_host_memory",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "main_place",
    "make_device_map",
    "place_of",
]

Place = int | str
"""The number of an accelerator, "cpu" or "disk"; a device's name such as "cuda:1" is the same as its number."""
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_SHARE = 0.9
"""Of the memory that is free: the rest is for what the system and the allocator need."""
_DISK = 1 << 62


# -- limits ------------------------------------------------------------------------------------------------------------
def get_max_memory(max_memory: Mapping[Place, int | str] | None = None) -> dict[Place, int]:
    """Return place -> bytes: the given ones ("10GB"), or nine tenths of what is free now on each device and in host memory.

    Raises:
        ConfigError: a place that does not exist here, or no size.
    """
    if max_memory:
        if not isinstance(max_memory, Mapping):
            raise ConfigError(f"max_memory={max_memory!r}: expected a mapping of places to sizes, such as {{'cpu': '10GB'}}.")
        limits = {_place(p): _size(f"max_memory[{p!r}]", size) for p, size in max_memory.items()}
    else:
        limits = {}
        if torch.accelerator.is_available():
            for index in range(torch.accelerator.device_count()):
                limits[index] = int(torch.accelerator.get_memory_info(index)[0] * _SHARE)
        limits["cpu"] = int(free_host_memory() * _SHARE)
    numbers = sorted(p for p in limits if isinstance(p, int))
    ordered: dict[Place, int] = {n: limits[n] for n in numbers}
    return ordered | {p: limits[p] for p in ("cpu", "disk") if p in limits}


def _size(what: str, size: Any) -> int:
    """Return the bytes of an option, which may be 0."""
    if not isinstance(size, bool) and size == 0:
        return 0
    try:
        return parse_size(size)
    except ConfigError:
        raise ConfigError(f"{what} is {size!r}: expected a size such as '10GB', '200MB', '1GiB' or a number of bytes.") from None


def _place(place: Any) -> Place:
    """Return the one spelling of a place."""
    if isinstance(place, torch.device):
        place = str(place)
    if isinstance(place, bool) or not isinstance(place, str | int):
        raise ConfigError(f"{place!r} is no place. Expected 'cpu', 'disk', an accelerator's number or a device's name.")
    if isinstance(place, str):
        if place in ("cpu", "disk"):
            return place
        if place.isdigit():
            place = int(place)
        else:
            kind, _, index = place.partition(":")
            here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            if here is None or kind not in (here.type, "gpu"):
                known = ("cpu", "disk", *((here.type,) if here is not None else ()))
                expected = f"{', '.join(known)} or an accelerator's number.{suggest(kind.lower(), known)}"
                raise ConfigError(f"There is no device {place!r} here. Expected {expected}")
            place = int(index or 0)
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not 0 <= place < count:
        raise ConfigError(f"There is no accelerator {place}: this machine has {count}. Use 'cpu' and 'disk', or other numbers.")
    return place


def free_host_memory() -> int:
    """Bytes that this process may still take: what is available, within the container's limit."""
    free = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, open("/sys/fs/cgroup/memory.current") as used:
            text = limit.read().strip()
            if text != "max":
                free = min(free, int(text) - int(used.read()))
    except (OSError, StopIteration, ValueError):
        pass
    return free or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main_place(places: Iterable[Place]) -> Place:
    """Where what is offloaded computes: the first accelerator that is used, else the CPU."""
    return min((p for p in places if isinstance(p, int)), default="cpu")


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[Place, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype] | None = None,
    low_zero: bool = False,
) -> dict[Place, int]:
    """Return limits by which the accelerators share the model evenly; the last keeps its own, for what does not divide.

    Args:
        low_zero: leave the first one as empty as the others allow, for what generate() keeps there.
    """
    limits = get_max_memory(max_memory)
    devices = [p for p in limits if isinstance(p, int) and limits[p] > 0]
    if len(devices) < 2:
        return limits
    items = _items(model, no_split_module_classes, dtype, special_dtypes)
    total = _total(items)
    sharing = devices[1:] if low_zero else devices
    room = sum(limits[d] for d in sharing)
    first = max(0, total - room) if low_zero else 0
    # The smallest share with which the blocks, which are not split, find room in their order.
    for percent in range(100, 400, 2):
        share = -(-(total - first) * percent // (100 * len(sharing)))
        tried: dict[Place, int] = {d: min(limits[d], share) for d in sharing}
        if low_zero:
            tried[devices[0]] = min(limits[devices[0]], first)
        if _fill_in_order(items, devices, tried, {}):
            # The last keeps its own limit: another type or a buffer more must not send a block to the host.
            return limits | tried | {devices[-1]: limits[devices[-1]]}
    return limits


# -- the map -----------------------------------------------------------------------------------------------------------
def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[Place, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    *,
    activations: int | str = 0,
    num_buffers: int = 2,
) -> dict[str, Place]:
    """Return a device map: places are filled in the order accelerators, "cpu", "disk".

    Args:
        max_memory: bytes for each place; by default what is free. "disk" is without limit unless it is named.
        no_split_module_classes: modules of these classes stay in one piece; by default the repeated blocks.
        dtype: what the weights will be in.
        verbose: print each decision.
        clean_result: one entry for a module whose parts all lie in one place.
        activations: bytes to leave free where the model computes (`measure_activations` counts them).
        num_buffers: how many of the largest blocks the buffers for what is offloaded hold.
    Raises:
        ConfigError: the model does not fit, or what computes outside of the blocks does not fit beside the buffers.
    """
    limits = get_max_memory(max_memory)
    limits.setdefault("disk", _DISK)
    items = _items(model, no_split_module_classes, dtype, special_dtypes)
    main = main_place(p for p, size in limits.items() if size > 0)
    computing = [p for p in limits if isinstance(p, int)] or ["cpu"]
    room = _size("activations", activations)
    limits[main] = limits.get(main, 0) - room
    total = _total(items)
    placed: dict[str, Place] = {}
    if total > sum(max(0, limits.get(p, 0)) for p in computing) or not _fill_in_order(items, computing, limits, placed):
        placed = _with_offload(items, computing, limits, main, num_buffers)
    if verbose:
        for name, _, tensors, _ in items:
            print(f"{name}: {sum(tensors.values()):,} bytes on {placed[name]}")
    return _clean(model, placed) if clean_result else placed


infer_device_map = infer_auto_device_map

_Item = tuple[str, bool, dict[int, int], bool]
"""(name, whether it is a block, {id of a tensor: bytes}, whether its module computes by itself, and so may pass)."""


def _items(
    model: nn.Module,
    no_split: Sequence[str] | None,
    dtype: torch.dtype | str | None,
    special: Mapping[str, torch.dtype] | None,
) -> list[_Item]:
    """The pieces that are placed: blocks as a whole, and what other modules hold themselves, in the order of the model."""
    blocks = choose_blocks(model, no_split)
    modules = dict(model.named_modules(remove_duplicate=False))
    grouped: dict[str, tuple[bool, dict[int, int], bool]] = {}
    for name, tensor in tensors_of(model).items():
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        owner = name.rpartition(".")[0]
        leaf = bool(owner) and not any(True for _ in modules[owner].children())
        key = block or (owner if leaf else name)
        entry = grouped.setdefault(key, (block is not None, {}, block is not None or leaf))
        entry[1][id(tensor)] = tensor_bytes(name, tensor, dtype, special)
    order = {name: i for i, name in enumerate(_in_order(model))}
    return [(n, b, t, c) for n, (b, t, c) in sorted(grouped.items(), key=lambda e: order[e[0]])]


def _in_order(model: nn.Module) -> list[str]:
    names: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        names.append(prefix)
        own = (*module._parameters, *module._buffers)
        names.extend(f"{prefix}.{key}" if prefix else key for key in own)
        for key, child in module.named_children():
            visit(f"{prefix}.{key}" if prefix else key, child)

    visit("", model)
    for name, _ in model.named_modules(remove_duplicate=False):
        if name not in names:
            names.append(name)
    return names


def _total(items: Sequence[_Item]) -> int:
    tensors: dict[int, int] = {}
    for _, _, found, _ in items:
        tensors |= found
    return sum(tensors.values())


def _fill_in_order(
    items: Sequence[_Item], places: Sequence[Place], limits: Mapping[Place, int], placed: dict[str, Place]
) -> bool:
    """Put item after item into place after place; what is tied follows the first. Return whether all found room."""
    left = {p: max(0, limits.get(p, 0)) for p in places}
    home: dict[int, Place] = {}
    current = 0
    for name, _, tensors, _ in items:
        tied = next((home[t] for t in tensors if t in home), None)
        if tied is not None:
            place = tied
        else:
            while current < len(places) and sum(tensors.values()) > left[places[current]]:
                current += 1
            if current == len(places):
                placed.clear()
                return False
            place = places[current]
        left[place] -= sum(size for t, size in tensors.items() if t not in home)
        home |= dict.fromkeys(tensors, place)
        placed[name] = place
    return all(size >= 0 for size in left.values())


def _with_offload(
    items: Sequence[_Item],
    computing: Sequence[Place],
    limits: Mapping[Place, int],
    main: Place,
    num_buffers: int,
    reserved: int = 0,
) -> dict[str, Place]:
    """Place a model that does not fit where it computes: what is outside of the blocks first, then as many blocks as fit.

    Args:
        reserved: bytes that the buffers take at least.
    """
    offload = [p for p in ("cpu", "disk") if p in limits and p not in computing]
    left = {p: max(0, limits.get(p, 0)) for p in (*computing, *offload)}
    placed: dict[str, Place] = {}
    home: dict[int, Place] = {}

    def put(item: _Item, place: Place) -> None:
        left[place] -= sum(size for t, size in item[2].items() if t not in home)
        home.update(dict.fromkeys(item[2], place))
        placed[item[0]] = place

    def size(item: _Item) -> int:
        return sum(n for t, n in item[2].items() if t not in home)

    blocks = [i for i in items if i[1]]
    usual = statistics.median([sum(i[2].values()) for i in blocks]) if blocks else 0
    # One that is much larger than the others, such as a table of words, would make all buffers as large: it stays if it can.
    blocks = [i for i in blocks if sum(i[2].values()) <= 2 * usual]
    passing = {i[0] for i in blocks}
    # Padding to cache lines and pages: a fraction of a percent of a block of real size.
    buffers = begun = max(reserved, num_buffers * (max((sum(i[2].values()) for i in blocks), default=0) + 2**14))
    if left[main] < buffers:
        raise _no_room(main, left[main], buffers, num_buffers)
    others = sorted((i for i in items if i[0] not in passing), key=lambda i: (i[3], sum(i[2].values())))
    for item in others:
        tied = next((home[t] for t in item[2] if t in home), None)
        if tied in computing:
            put(item, tied)  # pyright: ignore[reportArgumentType]
        elif size(item) <= left[main] - buffers:
            put(item, main)
        elif item[3]:
            buffers = max(buffers, num_buffers * (sum(item[2].values()) + 2**14))
            put(item, next((p for p in offload if size(item) <= left[p]), "disk"))
        else:
            raise ConfigError(
                f"{item[0]} ({size(item):,} bytes) does not fit on {main} beside buffers of {buffers:,} bytes "
                f"({max(0, left[main]):,} bytes are left), and it cannot pass through them: its module computes with others. "
                f"Give {main!r} more in max_memory, or lower activations."
            )
    left[main] -= buffers
    if left[main] < 0 and buffers > begun:
        # What stays took the room of buffers that only what came after it needs: once more, with room for them from the start.
        return _with_offload(items, computing, limits, main, num_buffers, buffers)
    if left[main] < 0:
        raise _no_room(main, left[main] + buffers, buffers, num_buffers)
    if len(computing) == 1:
        keep = _spread(blocks, left[main], size)
        for item in blocks:
            put(item, main if item[0] in keep else next((p for p in offload if size(item) <= left[p]), "disk"))
    else:
        order = [*computing, *offload]
        position = 0
        for item in blocks:
            while position < len(order) - 1 and size(item) > left[order[position]]:
                position += 1
            put(item, order[position])
    if left.get("disk", 0) < 0:
        raise ConfigError(
            f"The model does not fit: {-left['disk']:,} bytes more than max_memory gives, the disk included. Raise a limit."
        )
    return placed


def _no_room(main: Place, given: int, buffers: int, num_buffers: int) -> ConfigError:
    return ConfigError(
        f"max_memory gives {main!r} {given:,} bytes for the weights, and the buffers alone take {buffers:,}: {num_buffers} of "
        f"the largest part that passes through them. Give {main!r} more, name smaller classes in no_split_module_classes, or "
        "read without looking ahead (prefetch=False)."
    )


def _spread(blocks: Sequence[_Item], room: int, size: Callable[[_Item], int]) -> set[str]:
    """Choose the blocks that stay: as many as fit into `room`, at even distances."""
    fitting, used = 0, 0
    for item in sorted(blocks, key=size):
        used += size(item)
        if used > room:
            break
        fitting += 1
    kept: set[str] = set()
    for i, item in enumerate(blocks):
        take = (i + 1) * fitting // len(blocks) > i * fitting // len(blocks)
        if take and size(item) <= room:
            kept.add(item[0])
            room -= size(item)
    return kept


def _clean(model: nn.Module, placed: Mapping[str, Place]) -> dict[str, Place]:
    """Join the entries of a module whose parts all lie in one place."""
    result: dict[str, Place] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        mine = {p for n, p in placed.items() if not prefix or n == prefix or n.startswith(prefix + ".")}
        if prefix in placed or len(mine) == 1:
            result[prefix] = placed.get(prefix) if prefix in placed else mine.pop()  # pyright: ignore[reportArgumentType]
            return
        for key in (*module._parameters, *module._buffers):
            name = f"{prefix}.{key}" if prefix else key
            if name in placed:
                result[name] = placed[name]
        for key, child in module.named_children():
            name = f"{prefix}.{key}" if prefix else key
            if any(n == name or n.startswith(name + ".") for n in placed):
                visit(name, child)

    visit("", model)
    return result


def make_device_map(
    model: nn.Module,
    device_map: str | Mapping[str, Any],
    max_memory: Mapping[Place, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Place]:
    """Return a device map from a word ("auto", "balanced", "balanced_low_0", "sequential"), or check the one that is given."""
    if isinstance(device_map, str):
        if device_map not in AUTOMATIC:
            if re.fullmatch(r"cpu|disk|\w+:\d+", device_map):
                return {"": _place(device_map)}
            near = suggest(device_map, AUTOMATIC)
            raise ConfigError(f"device_map={device_map!r}: expected {', '.join(AUTOMATIC)}, a device, or a mapping.{near}")
        limits: Mapping[Place, int | str] | None = max_memory
        if device_map != "sequential":
            sized = {k: options[k] for k in ("dtype", "special_dtypes") if k in options}
            balanced = get_balanced_memory(
                model, max_memory, no_split_module_classes, low_zero=device_map == "balanced_low_0", **sized
            )
            limits = dict(balanced.items())
        return infer_auto_device_map(model, limits, no_split_module_classes, **options)
    if not isinstance(device_map, Mapping):
        raise ConfigError(f"device_map={device_map!r}: expected {', '.join(AUTOMATIC)}, a device, or a mapping of modules.")
    chosen = {name: _place(place) for name, place in device_map.items()}
    check_device_map(model, chosen)
    return chosen


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Refuse a map that leaves tensors out, or names what the model has not.

    Raises:
        ConfigError: with the names.
    """
    names = list(tensors_of(model))
    missing = [n for n in names if place_of(n, device_map) is None]
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if missing[5:] else "")
        raise ConfigError(f"device_map says nothing of {some}. Add them, or '' for all the rest.")
    known = {name for name, _ in model.named_modules(remove_duplicate=False)} | set(names)
    if unknown := [n for n in device_map if n not in known]:
        raise ConfigError(f"device_map names {unknown[0]!r}, which {type(model).__name__} has not.{suggest(unknown[0], known)}")


def place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """Return the place of a tensor or module: that of the longest entry that holds it, None if there is none."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]
