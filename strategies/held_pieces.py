"""The state of models that are cut up, and who holds what: the part of FSDPStrategy that checkpoints and start-up lines ask.

State has the names of named_state.py, whatever is cut how: a rank gives its own pieces, and reads its own pieces. Buffers are not
cut up; the first rank's are saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from . import dtensors, named_state, tensor_order
from .base import Strategy
from .whole_tensors import WholeTensors

if TYPE_CHECKING:
    from .mesh import Mesh, ParallelPlan
    from .sharded import Sharded

__all__ = ["HoldsPieces"]

_NUMBERS: Mapping[str, int] = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adagrad": 1, "RMSprop": 1, "Muon": 1}
"""Numbers of state that torch's optimizers keep for each parameter, before the first step shows it."""


class HoldsPieces(Strategy):
    """State in pieces, and the table of who holds what."""

    plan: ParallelPlan | None
    plan_reason: str
    _sharded: dict[int, Sharded]
    _optimizers: list[Optimizer]
    _orders: Mapping[str, tensor_order.Order] = {}  # of the models whose state is loaded now

    if TYPE_CHECKING:

        @property
        def mesh(self) -> Mesh: ...

    # -- state --------------------------------------------------------------------------------------------------------
    def sync_buffers(self, models: Iterable[nn.Module]) -> None:
        """Give rank 0's buffers to all ranks, as the next forward would. Collective."""
        for model in models:
            sharded = self._sharded.get(id(model))
            if sharded is not None and sharded.sends_buffers:
                sharded.send_buffers()

    def state_tensors(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same names as on one device; each rank has its `Shard` of what is cut up. Buffers are the first rank's."""
        self._free()
        tensors, values = super().state_tensors(models, optimizers)
        for name, model in models.items() if self.mesh.index("stage") else ():
            for key, _ in model.named_buffers():
                tensors.pop(f"model/{name}/{key}", None)
        held = {name: dtensors.piece(name, tensor) for name, tensor in tensors.items()}
        if orders := tensor_order.orders_of(models):
            found = {name: tensor_order.state_order(orders, name) for name in held}
            held |= {name: order.pieces(held[name]) for name, order in found.items() if order is not None}
        return held, values

    def load_state_tensors(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        names: Iterable[str],
        read: Callable[[str], Tensor],
        values: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> list[str]:
        """Load what any strategy saved; of what is cut up here each rank reads its own piece only."""
        self._free()
        self._orders = tensor_order.orders_of(models)
        return super().load_state_tensors(models, optimizers, names, read, values, strict=strict)

    def place(self, own: Tensor, name: str, source: named_state.Source) -> Tensor:
        """Read `name` in the pieces in which `own` is held."""
        order = tensor_order.order_of(own) or tensor_order.state_order(self._orders, name)
        return tensor_order.read_like(own, order, source.shape(name), functools.partial(source, name))

    def _free(self) -> None:
        for sharded in self._sharded.values():
            sharded.free()

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all tensors, whole, in host memory on rank 0; nothing on the others. Collective: all ranks call it.

        It takes the whole model's bytes there: `whole_tensors` gives them one by one. Tied tensors are one tensor.
        """
        return self.whole_tensors(model).all()

    def whole_tensors(self, model: nn.Module) -> WholeTensors:
        """Return the tensors of `model`, each put together when it is read. Collective."""
        self._free()
        own = model.state_dict(keep_vars=True)  # the parameters themselves: tied ones are known by that
        return WholeTensors(self.world, own, gather=functools.partial(self._whole, model))

    def _whole(self, model: nn.Module, name: str, own: Tensor) -> Tensor:
        """Put one tensor of `model` together, at least on rank 0. Collective."""
        return tensor_order.whole(own)

    # -- words --------------------------------------------------------------------------------------------------------
    def explain(self) -> list[tuple[str, str]]:
        """Return who holds what: the mesh, the units, and the bytes of each kind on this rank and in all."""
        rows = [*super().explain(), ("plan", f"{self.plan}   {self.plan_reason}")]
        for sharded in self._sharded.values():
            prefix = f"{sharded.name}: " if len(self._sharded) > 1 else ""
            kinds: dict[str, int] = {}
            for module, name in zip(sharded.modules, sharded.units, strict=True):
                kind = type(module).__name__.removeprefix("FSDP") if name else "root"
                kinds[kind] = kinds.get(kind, 0) + 1
            rows.append((f"{prefix}units", ", ".join(k if n == 1 else f"{n} x {k}" for k, n in kinds.items())))
            if sharded.whole:
                rows.append((f"{prefix}held whole", ", ".join(sharded.whole)))
        whole = self._whole_models()
        for name, model in whole:
            prefix = f"{name}: " if len(whole) > 1 else ""
            parameters = list(model.parameters())
            trained = [p for p in parameters if p.requires_grad]
            for what, some in (("parameters", parameters), ("gradients", trained)):
                here = _bytes([dtensors.local(p) for p in some if self._is_here(p)])
                rows.append((f"{prefix}{what} held", f"{here:,} of {_bytes(some):,} bytes on this rank"))
        for optimizer in self._optimizers:
            rows.append(("optimizer state held", _state_of(optimizer, self._is_here)))
        return rows

    def _whole_models(self) -> list[tuple[str, nn.Module]]:
        """The user's models and their names; of a pipeline, what all its stages are of."""
        return [(sharded.name, sharded.model) for sharded in self._sharded.values()]

    def _is_here(self, parameter: Tensor) -> bool:
        """Whether this rank holds anything of a parameter: it does not of one in another stage of a pipeline."""
        return True


def _state_of(optimizer: Optimizer, is_here: Callable[[Tensor], bool]) -> str:
    """What an optimizer's state takes on this rank, or will take after its first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    kind = type(optimizer).__name__
    if held:
        return f"{_bytes(map(dtensors.local, held)):,} of {_bytes(held):,} bytes on this rank ({kind})"
    momentum = any(group.get("momentum") for group in optimizer.param_groups)
    numbers = _NUMBERS.get(kind, int(momentum) if kind == "SGD" else None)
    if numbers is None:
        return f"known after the first step ({kind})"
    here, total = numbers * _bytes([dtensors.local(p) for p in parameters if is_here(p)]), numbers * _bytes(parameters)
    return f"{here:,} of {total:,} bytes on this rank after the first step ({kind})"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
