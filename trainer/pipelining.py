"""Steps of a model that is run as a pipeline (strategies/pipeline_parallel.py): what replaces calling the module's own step.

    training      forward and backward of the batch's chunks by the schedule; the last stage calls compute_loss for each
    evaluation    forward only; where the last stage is, the module's own step runs for each chunk, and its model answers
                  with what the stages made of the chunk
What only the last stage knows (the loss, its count, what predict_step returned) is sent to the other ranks of the pipeline, so
that all agree. What it logged needs no sending: the rank of the last stage speaks for its pipeline (World.is_duplicate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.errors import ConfigError, DataError, NonFiniteError
from ..strategies.gradients import mean_loss
from ..strategies.pipeline_chunks import each_tensor
from .accumulation import MEAN, SUM, mixed_window

if TYPE_CHECKING:
    from torch import nn

    from ..strategies.pipeline_chunks import Chunk
    from ..strategies.pipeline_parallel import PipelinedModel
    from .metrics import Metrics
    from .stepping import Stepping

__all__ = ["check_module", "evaluation_step", "manual_batch", "train_batch"]


def check_module(module: nn.Module) -> None:
    """Refuse a module that cannot train under a pipeline.

    Raises:
        ConfigError: it defines no compute_loss; or it optimises manually, and defines no training_step.
    """
    name = type(module).__name__
    own = getattr(type(module), "compute_loss", None)
    if own is None or getattr(own, "__qualname__", "").startswith("TrainingModule."):
        raise ConfigError(
            f"{name} defines no compute_loss(output, batch), which a pipeline's last stage calls: no rank could run the whole "
            "training_step. Define it (and forward); training_step may then be left out."
        )
    own = getattr(type(module), "training_step", None)
    if not getattr(module, "automatic_optimization", True) and getattr(own, "__qualname__", "").startswith("TrainingModule."):
        raise ConfigError(
            f"{name} optimises manually (automatic_optimization=False) and defines no training_step. Define it: it runs on every "
            "stage, where self.forward_backward(batch) takes the place of calling the model and of manual_backward."
        )


class _Sums:
    """What the last stage collects over the chunks of a batch."""

    def __init__(self) -> None:
        self.kind = 0
        self.losses: list[Tensor] = []
        self.items: Any = 0
        self.beside: list[tuple[int, dict[str, Any]]] = []  # (samples, what else compute_loss returned)


def train_batch(stepping: Stepping, pipe: PipelinedModel, batch: Any) -> Any:
    """Forward and backward of one micro-batch of the window; return its loss as a training_step would, on every rank.

    Raises:
        DataError: compute_loss returned no loss, or a mean in a window of sums.
        NonFiniteError: the loss is NaN or Inf (see `nonfinite`); the weights are unchanged.
    """
    window, module = stepping.window, pipe.model
    metrics: Metrics | None = getattr(module, "_metrics", None)
    weight = 1 if metrics is None else metrics.batch_samples
    empty = window.samples == 0  # this rank only got padding
    loader = stepping.active_loader
    if not window.index:  # outside of `accumulate`
        stepped = any(o.window == window.number for o in stepping.optimizers.values())
        window.alone(loader, fresh=stepped or not window.number)
    divisor = window.divisor_of(pipe.num_samples(batch), stepping.world)
    # Every rank takes part in the loss scale, also those that never see a loss: their gradients have it.
    scale = stepping.precision.scale(torch.ones((), device=stepping.world.device)) if stepping._scales_loss else None
    leaves_out = stepping.nonfinite == "skip" or stepping._scales_loss  # steps whose loss is not finite
    sums = _Sums()

    def loss_of(output: Any, chunk: Chunk) -> Tensor:
        if metrics is not None:
            metrics.batch_samples = 0 if not weight else chunk.samples
        loss, items, beside = _read(module, pipe.plain(module.compute_loss(output, chunk.batch)))  # pyright: ignore[reportCallIssue]
        if beside and chunk.samples:
            sums.beside.append((chunk.samples, each_tensor(beside, Tensor.detach)))
        kind = MEAN if items is None else SUM
        if sums.kind not in (0, kind) or window.kind not in (0, kind):
            raise mixed_window()
        sums.kind = kind
        if stepping._reads_loss and leaves_out and not math.isfinite(loss.item()):
            loss = loss * math.nan  # so that every rank sees it in the gradient
        if items is None:
            sums.losses.append(loss.detach() * chunk.share)
            loss = loss * (chunk.share * window.scale)
        else:
            counts = 0.0 if empty or not chunk.samples else 1.0
            sums.losses.append(loss.detach() * (1.0 if chunk.samples else 0.0))
            sums.items = sums.items + items * counts
            loss = loss * (counts / divisor)
        return loss if scale is None else loss * scale

    try:
        pipe.run(batch, loss_of, backward=True)
    finally:
        if metrics is not None:
            metrics.batch_samples = weight
    loss, items, kind = _shared(stepping, pipe, sums)
    for hook in stepping.before_backward:  # nobody has the loss before the first backward pass begins
        hook(loss)
    if kind == SUM:
        window.count_sum(items * 0 if empty else items)
    else:
        window.kind = MEAN
    window.backwards += 1
    _check(stepping, pipe, loss, items if kind == SUM else None)
    for hook in stepping.after_backward:
        hook()
    result = {"loss": loss} if kind == MEAN else {"loss": loss, "num_items": items}
    if pipe.has_beside:
        joined = _joined([one for _, one in sums.beside], [n for n, _ in sums.beside]) if sums.beside else {}
        return {**pipe.share_tree(joined), **result}
    return loss if kind == MEAN else result


def manual_batch(module: Any, batch: Any) -> Tensor:
    """`TrainingModule.forward_backward`."""
    accelerator = module.trainer.accelerator
    if module.automatic_optimization:
        raise ConfigError(
            "forward_backward(batch) is for manual optimisation, and the trainer runs the backward pass of what training_step "
            "returns. Set automatic_optimization = False, or return the loss."
        )
    if (pipe := accelerator._pipeline_of(module.compute_loss)) is not None:
        output = train_batch(accelerator, pipe, batch)
        if isinstance(output, Mapping) and "num_items" in output:
            raise _no_sums(module)
        return output["loss"] if isinstance(output, Mapping) else output
    inputs = module.pipeline_input(batch)
    loss: Any = module.compute_loss(module(*inputs) if isinstance(inputs, tuple) else module(inputs), batch)
    if isinstance(loss, Mapping):
        if loss.get("num_items") is not None:
            raise _no_sums(module)
        loss = loss.get("loss")
    module.manual_backward(loss)
    return loss.detach()


def _no_sums(module: Any) -> DataError:
    return DataError(
        f"{type(module).__name__}.compute_loss returned a sum with its num_items, and under manual optimisation each loss is a "
        "mean. Divide it by its count, or leave the optimizer to the trainer."
    )


def _read(module: nn.Module, output: Any) -> tuple[Tensor, Any, dict[str, Any]]:
    """The loss and its count of what compute_loss returned, and what is beside them."""
    loss, items = (output.get("loss"), output.get("num_items")) if isinstance(output, Mapping) else (output, None)
    beside = {k: v for k, v in output.items() if k not in ("loss", "num_items")} if isinstance(output, Mapping) else {}
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(output).__name__} {output!r:.60}"
        raise DataError(
            f"{type(module).__name__}.compute_loss returned {what}. Expected the loss as a scalar tensor with a gradient, or "
            "{'loss': tensor, ...}, with 'num_items' beside it when the loss is a sum. Under a pipeline no batch can be left out."
        )
    return loss.reshape(()), items, beside


def _shared(stepping: Stepping, pipe: PipelinedModel, sums: _Sums) -> tuple[Tensor, Tensor, int]:
    """The loss, the items and the kind of the rank that has the last stage."""
    device = stepping.world.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    row = torch.zeros(4, dtype=wide, device=device)
    if sums.losses:
        row[0] = torch.stack(sums.losses).sum()
        row[1] = sums.items
        row[2] = sums.kind
        row[3] = float(bool(sums.beside))
    pipe.share(row)
    # On an accelerator the kind is read from it once: a run's losses are all of one kind, which the last stage sees to.
    known = bool(stepping.pipeline_kind) and device.type != "cpu"
    kind = stepping.pipeline_kind if known else int(row[2].item())
    pipe.has_beside = pipe.has_beside if known else bool(row[3].item())
    stepping.pipeline_kind = kind
    return row[0], row[1], kind


def _check(stepping: Stepping, pipe: PipelinedModel, loss: Tensor, items: Tensor | None) -> None:
    """Do about a loss that is not finite, or above the limit, what `Stepping.backward` does before the backward pass."""
    if stepping.loss_limit is not None:
        over = (mean_loss(loss, items) > stepping.loss_limit).to(loss.dtype)
        stepping.pipeline_over = over if stepping.pipeline_over is None else stepping.pipeline_over + over
        if stepping.window.sync:  # until now some gradients are on their way
            factor = torch.where(stepping.pipeline_over > 0, math.nan, 1.0)
            stepping.strategy.scale_gradients([p for p in pipe.model.parameters() if p.grad is not None], factor)
            stepping.pipeline_over = None
    raises = stepping._reads_loss and stepping.nonfinite == "raise" and not stepping._scales_loss
    if raises and not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"The loss is {loss.item()} on rank {stepping.world.rank}. The weights are unchanged since the last step. "
            "Look at the batch and the learning rate, or pass nonfinite='skip' to leave such steps out."
        )


# -- evaluation -------------------------------------------------------------------------------------------------------
def evaluation_step(
    pipe: PipelinedModel, step: Callable[..., Any], metrics: Metrics | None, *, returns: bool
) -> Callable[..., Any]:
    """Return what runs in the place of the module's own validation_step, test_step or predict_step.

    Args:
        returns: whether anyone asks for what it returns: the chunks' results put together, on every rank of the pipeline.
    """

    def run(batch: Any, batch_idx: int, *extra: int) -> Any:
        weight = 0 if metrics is None else metrics.batch_samples

        def judge(output: Any, chunk: Chunk) -> Any:
            if not chunk.samples:
                return None
            if metrics is not None:
                metrics.batch_samples = chunk.samples if weight else 0
            with pipe.answering(chunk, output):
                return chunk.samples, pipe.plain(step(chunk.batch, batch_idx, *extra))

        try:
            found = [result for result in pipe.run(batch, judge, backward=False) if result is not None]
        finally:
            if metrics is not None:
                metrics.batch_samples = weight
        if not returns:
            return None
        return pipe.share_tree(_joined([r for _, r in found], [n for n, _ in found]) if found else None)

    return run


def _joined(results: Sequence[Any], samples: Sequence[int]) -> Any:
    """Put the results of a batch's chunks together: tensors along their first dimension, single values to their mean."""
    first = results[0]
    if isinstance(first, Tensor):
        if first.dim():
            return torch.cat(list(results))
        shares = torch.tensor(samples, dtype=torch.float64, device=first.device) / sum(samples)
        return (torch.stack(list(results)).to(torch.float64) * shares).sum().to(first.dtype)
    if isinstance(first, Mapping):
        return {key: _joined([r[key] for r in results], samples) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined(list(some), samples) for some in zip(*results, strict=True))
    if isinstance(first, list):
        return [item for r in results for item in r]
    return first if all(r == first for r in results) else list(results)
