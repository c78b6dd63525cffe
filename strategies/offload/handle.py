"""What a dispatched model carries: which weights are where, how they pass, and the way back.

weights = weights_of(model)
weights.explain()                       rows for a table
weights.tensor("layers.0.weight")       the values of any weight, wherever it lies
weights.compile(backend="inductor")     each block's forward, as a region of its own
weights.remove()                        the model as it was, without what lies on the disk
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..composite import num_bytes, parts_of
from ..errors import ConfigError, suggest
from .away import is_away
from .blocks import Binding, StreamedModule
from .sources import Source
from .stream import Block, Stream

__all__ = ["Weights", "guard", "remove_hook_from_submodules", "weights_of"]

D = TypeVar("D")
_RECOMPILE_LIMIT = 8
"""torch's default, for one block."""
_GUARDED = ("to", "cuda", "xpu", "half", "float", "double", "bfloat16")


class Weights:
    """The weights of one dispatched model."""

    def __init__(
        self,
        model: nn.Module,
        device_map: Mapping[str, Any],
        device: torch.device,
        source: Source,
        stored_names: Mapping[str, str],
        streamed: Sequence[StreamedModule],
        stream: Stream,
    ) -> None:
        self._model = weakref.ref(model)
        self.device_map = dict(device_map)
        self.device = device
        self.source = source
        self.stored_names = dict(stored_names)
        self.streamed = list(streamed)
        self.stream = stream
        self.undo: list[Callable[[], Any]] = []

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None
        return model

    @property
    def streamed_bytes(self) -> int:
        """Bytes that pass for one forward of the whole model."""
        return sum(b.layout.num_bytes for b in self.stream.blocks)

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters and buffers that are always in memory."""
        found = {id(t): t for t in (*self.model.parameters(), *self.model.buffers()) if not is_away(t)}
        return sum(num_bytes(t) for t in found.values())

    @property
    def held_bytes(self) -> int:
        """The most that is in memory where the model computes: what is resident, and the buffers."""
        return self.resident_bytes + self.stream.num_bytes

    def tensor(self, name: str) -> Tensor:
        """Return the values of a parameter or buffer; of one that is away a copy, which is yours.

        Raises:
            ConfigError: no such name.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers(remove_duplicate=False))
        if name not in own:
            raise ConfigError(f"The model has no parameter or buffer {name!r}.{suggest(name, own)}")
        if not is_away(own[name]):
            return own[name].detach()
        return self._read(name, own[name])

    def shapes(self, name: str) -> dict[str, Tensor]:
        """Return the plain tensors that the parameter `name`, which is away, is made of, without their values."""
        binding, block = self._find(name, dict(self.model.named_parameters(remove_duplicate=False))[name])

        def empty(part: str) -> Tensor:
            return torch.empty(block.layout.places[part].shape, dtype=block.layout.places[part].dtype, device="meta")

        return parts_of(name, binding.values(empty))

    def _read(self, name: str, stand_in: Tensor) -> Tensor:
        binding, block = self._find(name, stand_in)
        flat, layout = block.flat, block.layout
        if flat is not None:
            return binding.values(lambda name: layout.view(flat, name).clone())
        return binding.values(lambda name: self.source.tensor(name, layout.places[name].dtype))

    def _find(self, name: str, stand_in: Tensor) -> tuple[Binding, Block]:
        for one in self.streamed:
            for binding in one.bindings:
                if binding.stand_in is stand_in:
                    return binding, self.stream.blocks[one.index]
        raise ConfigError(f"{name!r} is away, and nobody knows where: its module was replaced after the model was dispatched.")

    def explain(self) -> list[tuple[str, str]]:
        """Return (what, how) rows."""
        gb = 1e9
        rows = [
            ("computes on", str(self.device)),
            ("resident", f"{self.resident_bytes / gb:.3f} GB"),
            ("passes", f"{self.streamed_bytes / gb:.3f} GB in {len(self.streamed)} blocks for each forward"),
            ("buffers", f"{self.stream.num_bytes / gb:.3f} GB: {len(self.stream.slots)} of the largest block"),
        ]
        if self.stream.stats.reads:
            stats = self.stream.stats
            rows.append(
                (
                    "so far",
                    f"{stats.num_bytes / gb:.1f} GB read in {stats.read_s:.2f} s, waited {stats.waited_s:.2f} s, "
                    f"{stats.missed} of {stats.reads} reads not foreseen",
                )
            )
        return rows

    def compile(self, **options: Any) -> None:
        """Compile the forward of each block that passes (torch.compile's options); the rest of the model is left to you.

        Blocks of one class share what is compiled. Where each knows its number, as transformers' layers with a KV cache do, it is
        compiled for each block, and again when the cache is first filled and when it grows; so the limit on recompilations,
        after which torch goes on uncompiled, counts for each block and not for all of them together.
        """
        options.setdefault("recompile_limit", _RECOMPILE_LIMIT * max(1, len(self.streamed)))
        for one in self.streamed:
            one.compile(**options)

    def remove(self) -> None:
        """Take everything off the model and let go of buffers and files.

        Raises:
            ConfigError: weights lie in files: they would be gone. What was in host memory is put back.
        """
        model = self.model
        for one in self.streamed:
            one.remove()
            block = self.stream.blocks[one.index]
            flat, layout = block.flat, block.layout
            if flat is not None:
                for binding in one.bindings:
                    values = binding.values(partial(layout.view, flat))
                    binding.put(nn.Parameter(values, requires_grad=binding.stand_in.requires_grad))
        for action in reversed(self.undo):
            action()
        self.stream.close()
        self.source.close()
        for key in ("hf_device_map", "_offloaded_weights", *_GUARDED):
            model.__dict__.pop(key, None)


_parse_to: Callable[..., Any] = torch._C._nn._parse_to  # pyright: ignore[reportAttributeAccessIssue]


def guard(model: nn.Module, handle: Weights) -> None:
    """Note `handle` on the model; refuse what would move or convert weights that are not there."""
    object.__setattr__(model, "_offloaded_weights", handle)
    model.__dict__["hf_device_map"] = dict(handle.device_map)
    if not handle.streamed:
        return

    def refuse(method: str) -> Callable[..., Any]:
        own = getattr(type(model), method, None)

        def refused(*args: Any, **kwargs: Any) -> Any:
            device, dtype, *_ = _parse_to(*args, **kwargs) if method == "to" else (None, None)
            if method == "to" and dtype is None and (device is None or device == handle.device):
                return model
            raise ConfigError(
                f"model.{method}(...): weights of this model are offloaded, and stay where device_map put them. Say dtype= and "
                "device_map= when it is dispatched, or take the hooks off: remove_hook_from_submodules(model)."
            )

        refused.__doc__ = getattr(own, "__doc__", None)
        return refused

    for method in _GUARDED:
        if hasattr(model, method):
            model.__dict__[method] = refuse(method)


def weights_of(model: nn.Module, default: D | type[ConfigError] = ConfigError) -> Weights | D:
    """Return the weights of a dispatched model, or of the one inside a wrapper such as PEFT's.

    Raises:
        ConfigError: it is not dispatched, and no `default` is given.
    """
    for module in (model, *model.modules()):
        found = module.__dict__.get("_offloaded_weights")
        if isinstance(found, Weights):
            return found
    if default is ConfigError:
        raise ConfigError(f"{type(model).__name__} is not dispatched. dispatch_model or load_checkpoint_and_dispatch does it.")
    return default  # type: ignore[return-value]


def remove_hook_from_submodules(module: nn.Module) -> nn.Module:
    """Take everything that dispatching and casting put on `module` off again; return it.

    Weights that lie in host memory come back; those in files stay away, and computing with them says so.
    """
    from .casting import detach_casting

    found = weights_of(module, None)
    if found is not None:
        found.remove()
    detach_casting(module)
    return module
