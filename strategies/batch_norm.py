"""BatchNorm whose statistics are those of the whole batch over all ranks, on CPU too (torch's SyncBatchNorm needs a GPU).

    forward    each rank: count, mean, squared deviations of its part -> one all-gather -> the same mean and variance everywhere
    backward   each rank: sum(dy) and sum(dy * x_hat) of its part     -> one all-reduce -> the gradient of its own input

A run on several ranks then gives what one process gives on the concatenated batch: outputs, gradients and running statistics,
also when ranks hold different numbers of samples. The parts' deviations are combined as Chan et al. do, and not as
E[x^2] - E[x]^2, which loses all digits when the mean is large. Gradients of weight and bias stay local sums: data parallelism
averages them anyway.
Read `convert_sync_batchnorm` first.   Source: torch.nn.SyncBatchNorm; Chan, Golub, LeVeque 1979 (pairwise variances).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from .errors import DataError

__all__ = ["SynchronizedBatchNorm", "convert_sync_batchnorm"]


def convert_sync_batchnorm(model: nn.Module, group: dist.ProcessGroup | None, device: torch.device) -> nn.Module:
    """Replace every BatchNorm in `model` by one that is synchronised over `group`; return the model.

    Parameters, buffers and their names stay the same objects, so optimizers that were built before keep working.
    On the CPU it becomes `SynchronizedBatchNorm`, elsewhere torch.nn.SyncBatchNorm.
    """
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    if isinstance(model, _BatchNorm) and not isinstance(model, SynchronizedBatchNorm):
        return SynchronizedBatchNorm.replacing(model, group)
    for name, child in model.named_children():
        replaced = convert_sync_batchnorm(child, group, device)
        if replaced is not child:
            setattr(model, name, replaced)
    return model


class SynchronizedBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d and 3d in one, over all ranks of a process group while training; plain BatchNorm in evaluation."""

    _group: _Shared

    @classmethod
    def replacing(cls, norm: _BatchNorm, group: dist.ProcessGroup | None) -> SynchronizedBatchNorm:
        """Return a synchronised layer with the very parameters and buffers of `norm`; None is the default group."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        for name, parameter in norm._parameters.items():
            new.register_parameter(name, parameter)
        for name, buffer in norm._buffers.items():
            new.register_buffer(name, buffer, persistent=name not in norm._non_persistent_buffers_set)
        new.train(norm.training)
        new._group = _Shared(group)
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise DataError(
                f"BatchNorm over {self.num_features} features got a tensor of shape {tuple(input.shape)}. "
                f"It takes (batch, {self.num_features}, ...)."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` of shape (batch, features, ...) over the batch of all ranks.

        Raises:
            DataError: another shape, or one value per feature over all ranks, which has no variance.
        """
        self._check_input_dim(input)
        if not self.training:
            # Without running statistics, evaluation uses those of this rank's batch, as torch.nn.SyncBatchNorm does.
            local = self.running_mean is None or self.running_var is None
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, local, 0.0, self.eps)
        output, mean, var, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self._group.group)
        if self.track_running_stats:
            self._track(mean, var, count)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))
        # lerp_ would round otherwise than torch's own update.
        self.running_mean.mul_(1 - rate).add_(mean.to(self.running_mean.dtype), alpha=rate)
        self.running_var.mul_(1 - rate).add_(unbiased.to(self.running_var.dtype), alpha=rate)


class _Shared:
    """Holds a process group, which can be neither copied nor pickled: a deep copy of the layer (an EMA) shares it."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self

    def __reduce__(self) -> tuple[type[_Shared], tuple[()]]:
        return _Shared, ()


class _Normalize(torch.autograd.Function):
    """(input, weight, bias) -> (output, mean, variance, count), the last three over all ranks and without gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _statistics(input, group)
        inverse_std = (var + eps).rsqrt()
        wide_input = input.to(mean.dtype)
        normalized = (wide_input - _along(mean, input)) * _along(inverse_std, input)
        output = normalized
        if weight is not None:
            output = output * _along(weight.to(mean.dtype), input)
        if bias is not None:
            output = output + _along(bias.to(mean.dtype), input)
        ctx.save_for_backward(input, weight, mean, inverse_std, count)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        return output.to(input.dtype), mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        input, weight, mean, inverse_std, count = ctx.saved_tensors
        dims = _batch_dims(input)
        grad = grads[0].to(mean.dtype)
        normalized = (input.to(mean.dtype) - _along(mean, input)) * _along(inverse_std, input)
        sum_grad, sum_grad_normalized = grad.sum(dims), (grad * normalized).sum(dims)
        grad_weight = None if weight is None else sum_grad_normalized.to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else sum_grad.to(ctx.bias_dtype)
        grad_input = None
        if ctx.needs_input_grad[0]:
            # All ranks get here or none: they run the same graph. The batch's statistics depend on every rank's input.
            sums = torch.cat([sum_grad, sum_grad_normalized])
            dist.all_reduce(sums, group=ctx.group)
            mean_grad, mean_grad_normalized = (sums / count).chunk(2)
            centred = grad - _along(mean_grad, input) - normalized * _along(mean_grad_normalized, input)
            scale = inverse_std if weight is None else inverse_std * weight.to(mean.dtype)
            grad_input = (centred * _along(scale, input)).to(input.dtype)
        return grad_input, grad_weight, grad_bias, None, None


def _statistics(input: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mean, biased variance, count) per feature over all ranks, in at least fp32; a rank may have no samples."""
    dims = _batch_dims(input)
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    num_local = input.numel() // input.shape[1]
    local_mean = wide.sum(dims) / max(num_local, 1)
    deviations = (wide - _along(local_mean, input)).square().sum(dims)
    packed = torch.cat([local_mean, deviations, local_mean.new_tensor([float(num_local)])])
    rows = packed.new_empty(dist.get_world_size(group), packed.numel())
    # Gathered and summed here, in one order: the result has the same bits on every rank.
    dist.all_gather(list(rows.unbind()), packed, group=group)
    features = input.shape[1]
    means, all_deviations, counts = rows[:, :features], rows[:, features:-1], rows[:, -1:]
    count = counts.sum()
    if count <= 1:
        raise DataError(
            f"BatchNorm got {int(count)} value(s) per feature over all ranks, of which no variance can be taken. "
            "Use a bigger batch, or drop_last=True in the DataLoader."
        )
    mean = (means * counts).sum(0) / count
    var = (all_deviations.sum(0) + (counts * (means - mean).square()).sum(0)) / count
    return mean, var, count


def _batch_dims(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _along(values: Tensor, input: Tensor) -> Tensor:
    """View per-feature `values` so that they broadcast along dim 1 of `input`."""
    return values.view(1, -1, *[1] * (input.dim() - 2))
