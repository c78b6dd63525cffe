"""Which modules pass through the buffers as one piece, and the forward that is put around each.

    enter   wait for the block, give its parameters the values in the buffer
    the module's own forward, which may be compiled: no hook of ours runs inside it
    leave   put the stand-ins back, give the buffer back
Under autograd what an operation keeps of the weights is a note of where they lie, not the memory, which will hold another block
by then; the backward pass reads the block again (saved_tensors_hooks). So adapters train on a frozen base of any size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..composite import Composite, is_composite, parts_of
from ..errors import ConfigError
from ..units import Units, choose_units
from .stream import Slot, Stream

__all__ = ["Binding", "StreamedModule", "choose_blocks", "map_tensors"]

_CONTAINERS = (nn.MultiheadAttention, nn.RNNBase)
"""Modules that read their children's or their own parameters in ways of their own: they pass as a whole."""


class Binding:
    """One parameter of a block: where it stands in the module, and the stand-in that is there while it is away."""

    __slots__ = ("composite", "key", "module", "name", "stand_in")

    def __init__(
        self, module: nn.Module, key: str, name: str, stand_in: nn.Parameter, composite: Composite | None = None
    ) -> None:
        self.module, self.key, self.name, self.stand_in, self.composite = module, key, name, stand_in, composite

    def values(self, get: Callable[[str], Tensor]) -> Tensor:
        """Return the parameter's values, from the tensors that `get` has by their stored names."""
        return get(self.name) if self.composite is None else self.composite.build(get)

    def put(self, parameter: nn.Parameter) -> None:
        if isinstance(self.module, nn.RNNBase):
            setattr(self.module, self.key, parameter)  # keeps a list of its own
        else:
            self.module._parameters[self.key] = parameter


def choose_blocks(model: nn.Module, no_split_module_classes: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return name -> module of what is never split: the repeated blocks, or the modules of the classes that are named.

    Raises:
        UnknownName: a class that no module has.
    """
    units: Units = list(no_split_module_classes) if no_split_module_classes else "auto"
    chosen = dict(choose_units(model, units))
    chosen |= {n: m for n, m in model.named_modules() if n and isinstance(m, _CONTAINERS)}
    outermost: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name in chosen and not any(name.startswith(outer + ".") for outer in outermost):
            outermost[name] = module
    return outermost


def map_tensors(value: Any, change: Callable[[Tensor], Tensor], skip: Iterable[str] = ()) -> Any:
    """Return `value` with its tensors changed, in tuples, lists, mappings and dataclasses; keys in `skip` stay as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        changed = [map_tensors(v, change, skip) for v in value]
        if all(a is b for a, b in zip(changed, value, strict=True)):
            return value
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, Mapping):
        pairs = {k: v if k in skip else map_tensors(v, change, skip) for k, v in value.items()}
        if all(pairs[k] is v for k, v in value.items()):
            return value
        if isinstance(value, dict):  # transformers' ModelOutput keeps attributes beside its keys
            copy = value.copy() if type(value) is dict else type(value)(**pairs)
            copy.update(pairs)
            return copy
        return type(value)(pairs)  # type: ignore[call-arg]
    return value


@dataclass(frozen=True)
class _Kept:
    """A note of weights that a backward pass will need: where they lie in whichever buffer holds the block then."""

    streamed: StreamedModule
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _KeptComposite:
    """The same of a weight that is made of several tensors."""

    composite: Composite
    parts: Mapping[str, Any]
    """name -> what was kept of it"""


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _lies_in(tensor: Tensor, memory: int) -> bool:
    """Whether a tensor, or a part of it, lies in the storage that begins at `memory`."""
    if is_composite(tensor):
        return any(_lies_in(part, memory) for part in parts_of("", tensor).values())
    return _plain(tensor) and tensor.untyped_storage().data_ptr() == memory


class StreamedModule:
    """A module whose parameters are there only while its forward runs."""

    def __init__(self, name: str, module: nn.Module, index: int, stream: Stream, bindings: Sequence[Binding]) -> None:
        self.name, self.module, self.index, self.stream = name, module, index, stream
        self.bindings = list(bindings)
        self.skip_keys: frozenset[str] = frozenset()
        self.own_forward: Callable[..., Any] = module.forward
        self.had_forward = "forward" in module.__dict__
        module.forward = self._around()
        for binding in self.bindings:
            binding.put(binding.stand_in)

    # -- the forward --------------------------------------------------------------------------------------------------
    def _around(self) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            enter, saving, leave, restore = _steps(forward)
            slot = enter(self, args, kwargs)
            try:
                with saving(self, slot):
                    if moves:
                        args, kwargs = self._moved(args, kwargs)
                    output = self.own_forward(*args, **kwargs)
            except BaseException:
                restore(self, slot)
                raise
            return leave(self, slot, output)

        moves = self.stream.device.type != "cpu"
        forward.__name__ = forward.__qualname__ = "forward"
        forward.__doc__ = self.own_forward.__doc__
        forward.__signature__ = inspect.signature(self.own_forward)  # type: ignore[attr-defined]
        forward.streamed = self  # type: ignore[attr-defined]
        forward._torchdynamo_disable = True  # type: ignore[attr-defined]
        forward._torchdynamo_disable_msg = "its weights pass through a buffer: what it calls is compiled"  # type: ignore[attr-defined]
        return forward

    def _enter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Slot:
        if torch.is_grad_enabled() and self.module.training:
            trained = next((b.name for b in self.bindings if b.stand_in.requires_grad), None)
            if trained is not None:
                raise ConfigError(
                    f"{trained} is to be trained, and its values pass through a buffer: they cannot be. Freeze it "
                    "(requires_grad_(False)) and train adapters, keep its module resident, or call model.eval()."
                )
        slot = self.stream.acquire(self.index)
        values = slot.views.get(self.index)
        if values is None:
            values = slot.views[self.index] = self._views(slot)
        for binding, parameter in zip(self.bindings, values, strict=True):
            binding.put(parameter)
        return slot

    def _views(self, slot: Slot) -> list[nn.Parameter]:
        layout = self.stream.blocks[self.index].layout
        made: dict[str, nn.Parameter] = {}
        with torch.inference_mode(False), torch.no_grad():
            for binding in self.bindings:
                if binding.name not in made:
                    values = binding.values(partial(layout.view, slot.device))
                    made[binding.name] = nn.Parameter(values, requires_grad=False)
        return [made[b.name] for b in self.bindings]

    def _saving(self, slot: Slot) -> Any:
        if not torch.is_grad_enabled():
            return nullcontext()
        memory = slot.device.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Any:
            if not _lies_in(tensor, memory):
                return tensor
            if is_composite(tensor):
                parts = {name: pack(part) for name, part in parts_of("", tensor).items()}
                return _KeptComposite(Composite.of("", tensor), parts)
            if tensor.is_conj() or tensor.is_neg():
                return tensor.clone()
            return _Kept(self, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride())

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)

    def _leave(self, slot: Slot, output: Any) -> Any:
        memory = slot.device.untyped_storage().data_ptr()

        def own(tensor: Tensor) -> Tensor:
            # What is a view of the weights, such as a table of positions, would change with the next block.
            return tensor.clone() if _lies_in(tensor, memory) else tensor

        output = map_tensors(output, own)
        self._restore(slot)
        return output

    def _restore(self, slot: Slot) -> None:
        for binding in self.bindings:
            binding.put(binding.stand_in)
        self.stream.release(slot)

    def _moved(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        device = self.stream.device

        def move(tensor: Tensor) -> Tensor:
            return tensor if tensor.device == device else tensor.to(device, non_blocking=True)

        return map_tensors(args, move), map_tensors(kwargs, move, self.skip_keys)

    # -- beside the forward -------------------------------------------------------------------------------------------
    def compile(self, **options: Any) -> None:
        """Compile the module's own forward: one region, shared by the blocks of one class."""
        self.own_forward = torch.compile(self.own_forward, **options)

    def remove(self) -> None:
        """Give the module its own forward back; the stand-ins stay."""
        if self.had_forward:
            self.module.forward = self.own_forward
        else:
            del self.module.forward


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _KeptComposite):
        with torch.no_grad():
            return kept.composite.build(lambda name: _unpack(kept.parts[name]))
    if not isinstance(kept, _Kept):
        return kept
    streamed = kept.streamed
    slot = streamed.stream.acquire_backward(streamed.index)
    with torch.inference_mode(False), torch.no_grad():
        base = slot.device.view(kept.dtype)
        # Buffers all begin at a page, so an offset in elements is the same in each.
        return base.as_strided(kept.size, kept.stride, kept.offset)


_PLAIN: tuple[Callable[..., Any], ...] = (
    StreamedModule._enter,
    StreamedModule._saving,
    StreamedModule._leave,
    StreamedModule._restore,
)
_hidden: list[tuple[Callable[..., Any], ...]] = []


def _steps(around: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Enter, saving, leave, restore. Once Dynamo is there they and the frame of `around` are hidden from it.

    It goes on with what `around` calls between them: a block's own forward, in which nothing of ours runs.
    """
    if "torch._dynamo" not in sys.modules:
        return _PLAIN
    if not _hidden:
        from torch._dynamo.decorators import skip_code

        skip_code(around.__code__)  # type: ignore[attr-defined]  # one code object for all blocks
        _hidden.append(tuple(torch.compiler.disable(step) for step in _PLAIN))
    return _hidden[0]


def is_streamed(module: nn.Module) -> bool:
    """Whether this very module's parameters pass through a buffer."""
    return isinstance(getattr(module.__dict__.get("forward"), "streamed", None), StreamedModule)
