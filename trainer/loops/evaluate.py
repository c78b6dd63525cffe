"""Evaluation: validate and test, each sample exactly once over all ranks; and predict, which returns what the steps return.

The module's own step runs, not a wrapper of it: no buffer is broadcast, so ranks may have different numbers of batches.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ...strategies.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..accelerator import Accelerator
    from ..data.loader import Loader
    from ..metrics import Metrics
    from ..trainer import Trainer

__all__ = ["evaluate", "predict"]


def evaluate(
    trainer: Trainer, stage: str, loaders: Mapping[str, Loader], metrics: Metrics, *, limit: int | None, inference: bool
) -> dict[str, float]:
    """Run the `stage` ("validation" or "test") steps over all loaders; return the reduced values of what was logged.

    Told by a signal to end, it is broken off after the batch, on all ranks at the same one (`Leave`).

    Args:
        limit: at most so many batches of each loader, for the sanity check.
        inference: under inference_mode, faster; otherwise under no_grad, whose tensors may be trained on afterwards.
    """
    module, hooks, accelerator = trainer.module, trainer.hooks, trainer.accelerator
    step: Callable[..., Any] = getattr(module, f"{stage}_step")
    _check_arguments(step, type(module).__name__, len(loaders) > 1)
    batch_start, batch_end = getattr(hooks, f"on_{stage}_batch_start"), getattr(hooks, f"on_{stage}_batch_end")
    step = _in_stages(accelerator, step, metrics, returns=bool(batch_end))
    for strategy in (accelerator.strategy, *accelerator.strategies.values()):
        strategy.sync_buffers(accelerator.prepared_models.values())
    with _Evaluating(trainer, metrics, inference):
        hooks.call(f"on_{stage}_start")
        hooks.call(f"on_{stage}_epoch_start")
        several = len(loaders) > 1
        control, several_ranks = accelerator.world.control, accelerator.world.size > 1
        seen = 0
        for index, (name, loader) in enumerate(loaders.items()):
            trainer.log_suffix = f"/{name}" if several else ""
            extra = (index,) if several else ()
            loader.set_epoch(0)
            for batch_idx, batch in enumerate(loader):
                seen += 1
                for hook in batch_start:
                    hook(batch, batch_idx, *extra)
                metrics.batch_samples = loader.num_samples
                metrics.window = batch_idx
                with _autocast(accelerator):
                    output = step(accelerator.precision.convert_input(batch), batch_idx, *extra)
                for hook in batch_end:
                    hook(output, batch, batch_idx, *extra)
                if several_ranks or control.requested:
                    trainer.look_up(seen)
                if limit is not None and batch_idx + 1 >= limit:
                    break
        trainer.log_suffix = ""
        if not seen:
            text = (
                f"The {stage} loader gave no batch. Expected at least one. "
                "Is the data set empty, or smaller than one batch with drop_last=True?"
            )
            if trainer.stage == stage_of(stage):
                raise DataError(text)
            warnings.warn(text, stacklevel=2)  # within fit: the training goes on
        hooks.call(f"on_{stage}_epoch_end")
        values = metrics.flush_step() | metrics.flush_epoch()
        if values:
            trainer.publish(values)
        hooks.call(f"on_{stage}_end")
    return values


def stage_of(step: str) -> str:
    """Return the Trainer method whose own stage it is to run `step`: "validate" for "validation"."""
    return "validate" if step == "validation" else step


def predict(trainer: Trainer, loaders: Mapping[str, Loader]) -> list[Any]:
    """Return what `predict_step` returned for every batch of this rank: a list, or a list of lists for several loaders.

    Batches that are only padding on this rank are left out.
    """
    module, hooks, accelerator = trainer.module, trainer.hooks, trainer.accelerator
    _check_arguments(module.predict_step, type(module).__name__, len(loaders) > 1)
    step = _in_stages(accelerator, module.predict_step, None, returns=True)
    results: list[list[Any]] = []
    seen = 0
    with _Evaluating(trainer, None, True):
        hooks.call("on_predict_start")
        hooks.call("on_predict_epoch_start")
        for index, loader in enumerate(loaders.values()):
            extra = (index,) if len(loaders) > 1 else ()
            results.append([])
            loader.set_epoch(0)
            for batch_idx, batch in enumerate(loader):
                for hook in hooks.on_predict_batch_start:
                    hook(batch, batch_idx, *extra)
                with _autocast(accelerator):
                    output = step(accelerator.precision.convert_input(batch), batch_idx, *extra)
                for hook in hooks.on_predict_batch_end:
                    hook(output, batch, batch_idx, *extra)
                if loader.num_samples:
                    results[-1].append(output)
                seen += 1
                if accelerator.world.size > 1 or accelerator.world.control.requested:
                    trainer.look_up(seen)
        hooks.call("on_predict_epoch_end")
        hooks.call("on_predict_end")
    return results[0] if len(results) == 1 else list(results)


class _Evaluating:
    """The module in eval mode, without gradients, its `log` going to `metrics`; everything as it was afterwards."""

    def __init__(self, trainer: Trainer, metrics: Metrics | None, inference: bool) -> None:
        self.trainer, self.metrics = trainer, metrics
        self.gradients = torch.inference_mode() if inference else torch.no_grad()
        self.modes: Sequence[tuple[torch.nn.Module, bool]] = ()

    def __enter__(self) -> None:
        module = self.trainer.module
        # Each sub-module's own mode: a backbone that the user keeps in eval mode stays there when training goes on.
        self.modes = [(m, m.training) for m in module.modules()]
        module.eval()
        self.before = self.trainer.log_into(self.metrics, on_step=False, on_epoch=True)
        self.gradients.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.gradients.__exit__(*error)
        for module, training in self.modes:
            module.training = training
        self.trainer.log_into(*self.before)
        self.trainer.log_suffix = ""


def _in_stages(
    accelerator: Accelerator, step: Callable[..., Any], metrics: Metrics | None, *, returns: bool
) -> Callable[..., Any]:
    """Return what runs in the place of `step`: the step, but where its model is run as a pipeline."""
    pipe = accelerator._pipeline_of(step)
    if pipe is None:
        return step
    from ..pipelining import evaluation_step

    return evaluation_step(pipe, step, metrics, returns=returns)


def _check_arguments(step: Callable[..., Any], owner: str, several: bool) -> None:
    """Refuse a step that does not take what it will be given: dataloader_idx is passed where there are several loaders.

    Raises:
        ConfigError: naming the step.
    """
    try:
        inspect.signature(step).bind(None, 0, *((0,) if several else ()))
    except TypeError:
        name = getattr(step, "__name__", "step")
        why = (
            "there are several loaders, and it is given dataloader_idx"
            if several
            else "with one loader no dataloader_idx is given"
        )
        raise ConfigError(
            f"{owner}.{name}{inspect.signature(step)} cannot be called: {why}. "
            f"Write {name}(self, batch, batch_idx{', dataloader_idx=0' if several else ''})."
        ) from None


def _autocast(accelerator: Any) -> Any:
    return accelerator.autocast() if accelerator.precision.autocast_dtype is not None else nullcontext()
