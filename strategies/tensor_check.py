"""Whether a cut block computes what the whole one does: one block of a stack is tried on both, before its first forward.

What the sections of a fused matrix are, and whether a model's code takes the heads that it gets, cannot be read from names. A
wrong guess need not fail: it may train something else. So the first block of a stack is run twice more, without gradients and in
eval mode (no dropout): as it is cut, and on weights that are put together, by a copy from before the cut.
For the time of that one forward each rank holds one block whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils._pytree import tree_map

from .errors import ConfigError
from .precision.linears import LowPrecisionLinear
from .tensor_order import Order
from .tensor_styles import FusedColumns
from .units import repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Trial", "trials_of"]


def trials_of(
    name: str,
    model: nn.Module,
    styles: Mapping[str, Any],
    uncommon: Sequence[str],
    mesh: DeviceMesh,
    dim: int | None,
    *,
    ep: bool,
) -> list[Trial]:
    """Return a trial for the first block of each stack that is cut; for what is cut in no block, of the module that holds it.

    Args:
        styles: path -> style, of the modules that are cut.
        uncommon: those of them with sections or copied heads: tried wherever they are, be it the whole model.
        dim: the sequence's, where blocks are given a part of it (sequence parallel).
        ep: experts are spread; then what holds the matrices is tried, and no block, in which experts may be.
    """
    blocks = [] if ep else repeated_blocks(model)
    chosen: dict[str, nn.Module] = {}
    stacks: set[tuple[str, type]] = set()
    for path, style in styles.items():
        if not isinstance(style, FusedColumns) and style not in ("colwise", "copied_heads"):
            continue
        around = next(((p, b) for p, b in blocks if path.startswith(f"{p}.")), None)
        if around is None:
            owner = path.rpartition(".")[0]
            if (not owner and path not in uncommon) or (dim is not None and not owner):
                continue
            around = (owner, model.get_submodule(owner))
        stack = (re.sub(r"\d+", "*", around[0]), type(around[1]))
        if stack not in stacks:
            stacks.add(stack)
            chosen[around[0]] = around[1]
    return [
        Trial(name, path, block, mesh, dim)
        for path, block in chosen.items()
        if type(block).forward is not nn.Module.forward and not isinstance(styles.get(path), ParallelStyle)
    ]


class Trial:
    """One block, and the copy of it that has no values of its own. Made before the block is cut.

    Attributes:
        orders: `<parameter>` of the block -> in which order it is held; filled in when it is cut.
    """

    def __init__(self, name: str, path: str, block: nn.Module, mesh: DeviceMesh, dim: int | None) -> None:
        self.name, self.path, self.mesh, self.dim = name, path, mesh, dim
        self.orders: dict[str, Order] = {}
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in block.parameters()
        }
        self.twin = copy.deepcopy(block, memo)
        for module in self.twin.modules():
            module.__class__ = getattr(type(module), "_drivetrain_class", type(module))  # what compiles, or computes again
        self.twin.eval()
        self.advice: Callable[[Exception], str | None] = lambda _: None
        self._handle = block.register_forward_pre_hook(self._try, with_kwargs=True)

    def take_orders(self, name: str, path: str, orders: Mapping[str, Order]) -> None:
        """Learn in which order the parameters of the module at `path` are held, if it is in the block."""
        inside = path[len(self.path) + 1 :] if self.path else path
        if name == self.name and (not self.path or path.startswith(f"{self.path}.")):
            self.orders |= {f"{inside}.{key}": order for key, order in orders.items()}

    def _try(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Run both on what the block is about to be given. Collective over tp.

        Raises:
            ConfigError: other outputs.
        """
        self._handle.remove()
        hidden = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if self.dim is not None and (not hidden or hidden[0].dim() <= self.dim or hidden[0].shape[self.dim] % self.mesh.size()):
            return  # which the block itself is about to refuse
        # Without modes: who watches what a step calls (context parallel) would see this too.
        with torch._C.DisableTorchFunction(), torch.no_grad(), _as_before(block), torch.random.fork_rng(devices=[]):
            try:
                found = self._first(self._cut(block, *_own(args, kwargs)))
            except Exception as error:
                error.add_note(f"Tensor parallel was trying {self.path} of model {self.name!r} on a rank's part of its heads.")
                if advice := self.advice(error):
                    error.add_note(advice)
                raise
            tensors = {key: self._whole(key, p) for key, p in block.named_parameters()}
            tensors |= dict(block.named_buffers())
            wanted = self._first(torch.func.functional_call(self.twin, tensors, *_own(args, kwargs)))
        low = any(isinstance(module, LowPrecisionLinear) for module in self.twin.modules())
        del self.twin
        if found is None or wanted is None:
            return
        limit = {torch.float64: 1e-9, torch.float32: 1e-3}.get(found.dtype, 5e-2)
        if low or torch.is_autocast_enabled(found.device.type):
            limit = max(limit, 0.1 if low else 5e-2)
        far = float((found.double() - wanted.double()).abs().max()) if found.shape == wanted.shape else float("inf")
        scale = float(wanted.double().abs().max())
        worst = torch.tensor(far / max(scale, 1e-30), device=found.device)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX, group=self.mesh.get_group())
        if not float(worst) <= limit:
            raise ConfigError(
                f"Tensor parallel cuts {self.path or 'the whole'} of model {self.name!r} so that it computes something else than "
                f"it does whole (outputs {float(worst):.2g} apart, beside their largest). Either its forward counts heads or "
                "groups by itself, in the place of taking those that it gets: write .view(batch, length, -1, self.head_dim). Or "
                "a fused matrix has other sections than the plan says: one that lies head by head, as GPT-NeoX's, is 'colwise'; "
                "sizes can be said by FusedColumns((queries, keys, values)). TensorPlan(verify=False) goes on without trying."
            )

    def _cut(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """The block's own forward, past what is around it: gathering, and what is compiled or computed again."""
        forward = getattr(type(block), "_drivetrain_class", type(block)).forward
        if self.dim is None:
            return forward(block, *args, **kwargs)
        from .sequence_styles import on_hidden

        part = [Shard(self.dim)]

        def split(hidden: Tensor) -> Tensor:
            whole = DTensor.from_local(hidden, self.mesh, [Replicate()], run_check=False)
            return whole.redistribute(placements=part).to_local()

        args, kwargs = on_hidden(block, args, kwargs, split)
        output = self._first(forward(block, *args, **kwargs))
        if output is None:
            return None
        return DTensor.from_local(output, self.mesh, part, run_check=False).redistribute(placements=[Replicate()]).to_local()

    def _whole(self, key: str, parameter: nn.Parameter) -> Tensor:
        held = parameter.detach()
        if not isinstance(held, DTensor):
            return held
        order = self.orders.get(key)
        return held.full_tensor() if order is None else order.undo(held.full_tensor())

    @staticmethod
    def _first(output: Any) -> Tensor | None:
        """What goes on to the next block."""
        found = output[0] if isinstance(output, tuple | list) and output else output
        return found if isinstance(found, Tensor) else None


@contextmanager
def _as_before(block: nn.Module) -> Iterator[None]:
    """In eval mode inside; afterwards all is as it was, buffers too."""
    modes = [module for module in block.modules() if module.training]
    buffers = [(b, b.detach().clone()) for b in block.buffers()]
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module in modes:
            module.training = True
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.clear_autocast_cache()  # or weights that were cast here would get no gradients


def _own(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The same arguments; objects that a forward may change (a cache of keys) are copies."""

    def own(value: Any) -> Any:
        return value if isinstance(value, Tensor) or callable(value) else copy.deepcopy(value)

    return tree_map(own, (tuple(args), dict(kwargs)))
