"""Styles of tensor parallel that torch has not: fused columns, heads that several ranks copy, and GPT-2's Conv1D.

    FusedColumns(3)                 three sections of one size: queries, keys and values; FusedColumns(2): gate and up
    FusedColumns((64, 16, 16))      their sizes, in output features
    copied heads                    fewer heads of keys and values than ranks: held whole, and each rank computes those that its
                                    queries attend to; their gradient is summed over tp, as Megatron's is
Each rank has its part of each section, one behind the other, as the whole module has the sections: a model that takes what it
gets (`qkv.chunk(3, dim=-1)`, `.view(batch, length, -1, head_dim)`) runs as it did.
Source: Shoeybi et al. 2019, arXiv:1909.08053; Conv1D is transformers', (in, out) features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle
from torch.utils._pytree import tree_map_only

from .blocks import with_forward
from .errors import ConfigError
from .tensor_order import Order, set_order

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Conv1DColumns",
    "Conv1DRows",
    "CopiedHeads",
    "FusedColumns",
    "FusedColwise",
    "features_of",
    "is_conv1d",
    "mark",
    "wait_for_inputs",
]


@dataclass(frozen=True)
class FusedColumns:
    """A style for a matrix that is several: its output features are sections, each of which is cut over tp.

    Args:
        sections: how many of one size, or their sizes.
    """

    sections: int | tuple[int, ...]

    def sizes(self, path: str, features: int) -> tuple[int, ...]:
        """Return the sizes of the sections of a matrix with so many output features.

        Raises:
            ConfigError: they do not make up the matrix.
        """
        given = self.sections
        sizes = (features // given,) * given if isinstance(given, int) and given > 0 else given
        if isinstance(sizes, int) or sum(sizes) != features or min(sizes, default=0) < 1:
            raise ConfigError(
                f"{self} for {path}: it has {features} output features, which these sections are not. Give their sizes, such as "
                "FusedColumns((queries, keys, values)), or how many of one size they are."
            )
        return tuple(sizes)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, or written like it: a Linear whose weight is (in, out)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.removeprefix("FSDP") == "Conv1D" and isinstance(weight, nn.Parameter) and weight.dim() == 2


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (input, output features) of a Linear or a Conv1D; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        inputs, outputs = module.get_parameter("weight").shape
        return inputs, outputs
    return None


class FusedColwise(ColwiseParallel):
    """A Linear of several sections: its rows in another order, then cut by torch's ColwiseParallel."""

    def __init__(self, sizes: tuple[int, ...], *, input_layouts: Placement | None = None) -> None:
        super().__init__(input_layouts=input_layouts)
        self.sizes = sizes

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        order = Order.of_sections(0, self.sizes, device_mesh.size())
        for _, parameter in module.named_parameters(recurse=False):
            parameter.data = order.apply(parameter.data)
        return super()._apply(module, device_mesh)

    def orders(self, module: nn.Module, ranks: int) -> dict[str, Order]:
        """Return the order of each parameter of the module."""
        order = Order.of_sections(0, self.sizes, ranks)
        return {key: order for key, _ in module.named_parameters(recurse=False)}


class _Own(ParallelStyle):
    """A style whose module computes on this rank's own tensors: its class is given another forward."""

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or Replicate(),)

    def whole_input(self, x: Tensor, mesh: DeviceMesh) -> Tensor:
        """Return the whole input, plain; its gradient is summed over tp."""
        given = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        return given.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __deepcopy__(self, memo: Any) -> _Own:
        return self  # a copy of the module is on the same mesh

    def _take(self, module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> nn.Module:
        for key, parameter in list(module.named_parameters(recurse=False)):
            cut = distribute_tensor(parameter.data, mesh, [placements[key]], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(cut, requires_grad=parameter.requires_grad))
        self.mesh = mesh
        vars(module)["_drivetrain_style"] = self
        with_forward("", module, _by_style)
        return module


def _by_style(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: Any, x: Tensor) -> Tensor:
        return self._drivetrain_style.run(self, x)

    return run


class CopiedHeads(_Own):
    """A Linear of fewer heads than ranks, held whole: `ranks / heads` ranks compute each of them."""

    def __init__(self, heads: int, *, input_layouts: Placement | None = None) -> None:
        super().__init__(input_layouts=input_layouts)
        self.heads = heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._take(module, device_mesh, {"weight": Replicate(), "bias": Replicate()})

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        mesh = self.mesh
        own = self.whole_input(x, mesh)
        weight, bias = (_partial(p) for p in (module.weight, module.bias))
        assert weight is not None
        rows = weight.shape[0] // self.heads
        start = mesh.get_local_rank() * self.heads // mesh.size() * rows
        mine = None if bias is None else bias.narrow(0, start, rows)
        return torch.nn.functional.linear(own, weight.narrow(0, start, rows), mine)


class Conv1DColumns(_Own):
    """GPT-2's Conv1D by its output features; `sizes` of its sections, where it is several matrices."""

    def __init__(self, sizes: tuple[int, ...], *, input_layouts: Placement | None = None, gather: bool = False) -> None:
        super().__init__(input_layouts=input_layouts)
        self.sizes, self.gather = sizes, gather

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for key, order in self.orders(module, device_mesh.size()).items():
            parameter = module.get_parameter(key)
            parameter.data = order.apply(parameter.data)
        return self._take(module, device_mesh, {"weight": Shard(1), "bias": Shard(0)})

    def orders(self, module: nn.Module, ranks: int) -> dict[str, Order]:
        """Return the order of each parameter of the module; none where it is one section."""
        if len(self.sizes) == 1:
            return {}
        return {key: Order.of_sections(p.dim() - 1, self.sizes, ranks) for key, p in module.named_parameters(recurse=False)}

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        own = self.whole_input(x, self.mesh)
        weight, bias = _local(module.weight), _local(module.bias)
        assert weight is not None
        out = own @ weight if bias is None else own @ weight + bias
        if self.gather:
            cut = DTensor.from_local(out, self.mesh, [Shard(out.dim() - 1)], run_check=False)
            return cut.redistribute(placements=[Replicate()]).to_local()
        return out


class Conv1DRows(_Own):
    """GPT-2's Conv1D by its input features; the sum over tp is whole, or this rank's part of the sequence.

    Args:
        input_layouts: Replicate() for an input that each rank has whole; by default it has its own features.
    """

    def __init__(self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None) -> None:
        super().__init__(input_layouts=input_layouts or Shard(-1))
        self.output_layouts = output_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._take(module, device_mesh, {"weight": Shard(0), "bias": Replicate()})

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        mesh, cut = self.mesh, [Shard(x.dim() - 1)]
        layouts = cut if isinstance(self.input_layouts[0], Shard) else self.input_layouts
        given = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, layouts, run_check=False)
        weight = _local(module.weight)
        assert weight is not None
        part = given.redistribute(placements=cut).to_local() @ weight
        total = DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[self.output_layouts])
        # Of a part of the sequence the bias gets a part of its gradient.
        bias = _local(module.bias) if isinstance(self.output_layouts, Replicate) else _partial(module.bias)
        return total.to_local() if bias is None else total.to_local() + bias


class _Waited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        return x.trigger_wait()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def wait_for_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A forward pre-hook of compiled blocks: what a collective has not delivered yet is waited for outside of the graph.

    torch's styles return such tensors, and a graph that is given one gives no gradient back for it (torch 2.13).
    """
    return tree_map_only(AsyncCollectiveTensor, _Waited.apply, (args, kwargs))


def mark(module: nn.Module, orders: dict[str, Order]) -> None:
    """Say of the parameters that a module has now in which order they are held."""
    for key, order in orders.items():
        set_order(module.get_parameter(key), order)


def _local(parameter: Any) -> Tensor | None:
    return None if parameter is None else parameter.to_local()


def _partial(parameter: Any) -> Tensor | None:
    """The whole of a parameter; its gradient is summed over tp."""
    return None if parameter is None else parameter.to_local(grad_placements=[Partial()])
