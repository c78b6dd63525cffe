"""Weights that fsdp gathers in float8: each rank casts its piece, and the pieces are put together already cast.

    after a step    one all-reduce of the largest value of every weight -> the scales         (`precompute`)
    at each gather  this rank's piece is cast by its weight's scale; 1 byte a number is sent instead of 4
    the product     finds a weight that is float8 already, and takes it as it is
The scale is that of the whole weight, so the products are those of a run without it, bit for bit. torchao has the same as a
tensor class that stands in the parameters; here the parameters stay plain, and the two methods that fully_shard looks for
(`fsdp_pre_all_gather`, `fsdp_post_all_gather`) stand on the pieces themselves: optimizers and checkpoints see nothing of it.
It stands on these names of torch, which a test pins: FSDPModule._get_fsdp_state, FSDPState._fsdp_param_groups,
FSDPParamGroup.fsdp_params, FSDPParam._sharded_local_tensor, ._module_info, ._init_extensions; and on torchao's float8 casts.
Source: torchao.float8.fsdp_utils (0.18); torch.distributed.fsdp, "FSDP2 all-gather extensions".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError
from . import _torchao
from .linears import LowPrecisionLinear

__all__ = ["Float8Gather"]


class Float8Gather:
    """The float8 weights of one precision, under fsdp."""

    def __init__(self, *, wanted_by: str) -> None:
        self.wanted_by = wanted_by
        self.pieces: list[_Piece] = []

    def take(self, model: nn.Module) -> int:
        """Let the weights of the converted Linears of `model`, which was cut up, be gathered in float8; return how many.

        A weight that something else uses too (the embedding that is tied to it) is gathered as it is.
        Raises:
            ConfigError: a Linear is gathered in 16 bits, or no unit of the model could be found.
        """
        uses: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        taken = 0
        for parameter in _fsdp_parameters(model):
            linear = parameter._module_info.module
            is_weight = parameter._module_info.param_name == "weight" and not parameter._module_info.shared_modules
            if not (is_weight and isinstance(linear, LowPrecisionLinear)) or uses[id(parameter.sharded_param)] > 1:
                continue
            if linear.split is not None:
                raise ConfigError(
                    f"{self.wanted_by}: fsdp_all_gather was asked for with tp, which cuts the weights first, so that the scale "
                    "of what fsdp cuts is not the whole weight's. Leave fsdp_all_gather out, or tp."
                )
            if parameter.mp_policy.param_dtype is not None:
                raise ConfigError(
                    f"{self.wanted_by}: fsdp_all_gather and a param_dtype of {parameter.mp_policy.param_dtype} "
                    "(gather_in_16_bits, or mixed_precision) both say what weights are gathered in. Give one of them."
                )
            piece = _Piece(parameter, linear.matmul, self.wanted_by)
            local = parameter._sharded_local_tensor
            local.fsdp_pre_all_gather, local.fsdp_post_all_gather = piece.before, piece.after
            parameter._init_extensions()
            self.pieces.append(piece)
            taken += 1
        return taken

    @torch.no_grad()
    def precompute(self) -> None:
        """Compute the scales of all weights, with one all-reduce for each way in which they are cut. Collective."""
        by_mesh: dict[Any, list[_Piece]] = {}
        for piece in self.pieces:
            by_mesh.setdefault(piece.group, []).append(piece)
        for group, pieces in by_mesh.items():
            amax = torch.stack([p.local_amax() for p in pieces])
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
            for piece, value in zip(pieces, amax, strict=True):
                piece.set_scale(value)


class _Piece:
    """This rank's piece of one weight: what fully_shard calls before and after a gather."""

    def __init__(self, parameter: Any, matmul: Any, wanted_by: str) -> None:
        self.parameter = parameter
        # Over the replicas of HSDP all have the same pieces: the maximum over one of them is that of all.
        self.group = parameter.mesh_info.shard_process_group
        config = matmul.config
        self.products, self.target = matmul.products, config.cast_config_weight.target_dtype
        self.power_of_2 = config.round_scales_to_power_of_2
        tensors: Any = _torchao.load("float8.float8_training_tensor", wanted_by=wanted_by)
        utils: Any = _torchao.load("float8.float8_utils", wanted_by=wanted_by)
        self.cast, self.tensor = tensors.hp_tensor_and_scale_to_float8, tensors.Float8TrainingTensor
        self.role = tensors.GemmInputRole
        self.to_scale = utils.amax_to_scale
        self.scale: Tensor | None = None
        self.version = -1  # of the piece, when its scale was computed

    @property
    def local(self) -> Tensor:
        return self.parameter._sharded_local_tensor

    def local_amax(self) -> Tensor:
        return self.local.abs().amax().float() if self.local.numel() else torch.zeros((), device=self.local.device)

    def set_scale(self, amax: Tensor) -> None:
        self.scale = self.to_scale(amax, self.target, self.power_of_2)
        self.version = self.local._version

    def before(self, mesh: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Cast the piece. Whatever wrote into it since its scale was computed (a checkpoint) makes that anew. Collective then."""
        with torch.no_grad():
            if self.version != self.local._version:
                amax = self.local_amax()
                dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
                self.set_scale(amax)
            # The memory with the rows that fully_shard adds so that all pieces are as long.
            padded = self.parameter._sharded_param_data.view(self.parameter.padded_sharded_param_size)
            made = self.cast(padded, self.scale, self.target, self.products, self.role.WEIGHT)
        return (made._data.view(torch.uint8),), (made._scale,)  # gloo knows no float8

    def after(self, outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Any = None) -> Any:
        (data,), (scale,) = outputs, metadata
        if out is not None:
            out._scale = scale
            return None
        return self.tensor(data.view(self.target), scale, dtype, self.products, self.role.WEIGHT), (data,)


def _fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state: Any = module._get_fsdp_state()  # pyright: ignore[reportCallIssue]
            for group in state._fsdp_param_groups:
                yield from group.fsdp_params
