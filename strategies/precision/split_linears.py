"""Low-precision Linears whose matrix is cut over the axis tp: each rank multiplies its part, by the scales of the whole.

    columns    input whole, weight cut by output features          -> this rank's output features
    rows       input and weight cut by input features              -> this rank's part of the sum
tp's styles hand a Linear DTensors and take one back; a low precision's product is told of neither. So it is given this rank's
own tensors here, and one number is agreed on for each scale: the largest value over the ranks of tp. With one scale for a whole
tensor that is the scale which one process would have, and the products differ by the order of a sum. What scales by rows
or blocks has no such product, and is refused (tensor_parallel.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from . import _torchao

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .linears import LowPrecisionLinear

__all__ = ["Split", "SplitFloat8"]


@dataclass(frozen=True)
class Split:
    """How a Linear is cut over `mesh`: by its columns (output features) or its rows (input features)."""

    mesh: DeviceMesh
    columns: bool

    def __call__(self, module: LowPrecisionLinear, input: DTensor) -> DTensor:
        """Multiply on this rank's own tensors. Gradients of what all ranks have whole are sums over the ranks."""
        weight, bias = _local(module.weight), None
        if self.columns:
            own = input.to_local(grad_placements=[Partial()])
            if module.bias is not None:
                bias = _local(module.bias)
        else:
            own = input.to_local()
            if module.bias is not None:  # each rank adds its share
                assert isinstance(module.bias, DTensor)
                bias = module.bias.to_local(grad_placements=[Partial()]) / self.mesh.size()
        output = module.through(own, weight, bias)
        return DTensor.from_local(output, self.mesh, [Shard(output.dim() - 1) if self.columns else Partial()], run_check=False)


def _local(parameter: Any) -> Tensor:
    return parameter.to_local()


class SplitFloat8:
    """`Float8Matmul` with one scale a tensor, over this rank's parts of them; `whole` is what is cut."""

    def __init__(self, whole: Any, mesh: DeviceMesh, *, wanted_by: str) -> None:
        scaling: Any = _torchao.load("float8.float8_scaling_utils", wanted_by=wanted_by)
        roles: Any = _torchao.load("float8.float8_training_tensor", wanted_by=wanted_by)
        self.whole, self.mesh, self.multiple, self.formats = whole, mesh, whole.multiple, whole.formats
        self.roles, self._cast = roles.GemmInputRole, scaling.hp_tensor_to_float8_dynamic

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        return _Product.apply(input, weight, self)  # pyright: ignore[reportReturnType]

    def cast(self, tensor: Tensor, config: Any, role: Any) -> Tensor:
        """Return `tensor` in float8, by the scale of what all ranks have of it. Collective."""
        return self._cast(
            tensor,
            config.target_dtype,
            self.whole.products,
            reduce_amax=True,
            gemm_input_role=role,
            device_mesh=self.mesh,
            round_scales_to_power_of_2=self.whole.config.round_scales_to_power_of_2,
        )

    def __repr__(self) -> str:
        return f"{self.whole!r}, scales over tp"


class _Product(torch.autograd.Function):
    """input (..., in) and weight (out, in) -> (..., out); each is cast once, and so is the gradient of the output."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, how: SplitFloat8) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.how = how
        config = how.whole.config
        rows = how.cast(input.reshape(-1, input.shape[-1]), config.cast_config_input, how.roles.INPUT)
        turned = how.cast(weight.t(), config.cast_config_weight, how.roles.WEIGHT)
        return torch.mm(rows, turned).reshape(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        input, weight = ctx.saved_tensors
        how, (grad,) = ctx.how, grads
        config = how.whole.config
        rows = how.cast(input.reshape(-1, input.shape[-1]), config.cast_config_input, how.roles.INPUT)
        turned = how.cast(weight.t(), config.cast_config_weight, how.roles.WEIGHT)
        flat = how.cast(grad.reshape(-1, grad.shape[-1]).contiguous(), config.cast_config_grad_output, how.roles.GRAD_OUTPUT)
        return torch.mm(flat, turned.t()).reshape(input.shape), torch.mm(flat.t(), rows), None
