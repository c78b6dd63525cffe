"""`Accelerator.prepare_pipeline`: a model over several processes or nodes for inference, in stages.

    model = accelerator.prepare_pipeline(model)                  # Accelerate: prepare_pippy
    output = model(batch)                                        # every process calls it with the same batch
Each process keeps its stage and frees the rest; of a model on the meta device it fills its own part only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..strategies.errors import ConfigError

if TYPE_CHECKING:
    from ..strategies.pipeline_parallel import PipelinedModel
    from ..strategies.world import World

__all__ = ["PipelinedInference", "Pipelines"]


class PipelinedInference(nn.Module):
    """A model in stages that is called as a whole.

    Attributes:
        module: the user's model, in which placeholders stand for what other processes hold.
        hf_split_points: the parts at which a stage after the first begins. The name is Accelerate's.
    """

    def __init__(self, pipe: PipelinedModel, *, gather_output: bool, autocast: Any) -> None:
        super().__init__()
        self.module = pipe.model
        self._pipe, self._gather, self._autocast = pipe, gather_output, autocast
        self.hf_split_points = [names[0] for names in pipe.names[1:] if names]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for a whole batch: on every process, or (gather_output=False) where the last stage is.

        Arguments are those of the model's forward; the first is a tensor whose first dimension are the samples.
        """
        if kwargs:
            raise ConfigError(
                f"A pipeline's first stage takes its input by position, got {', '.join(kwargs)} by name. Call model(x)."
            )
        pipe = self._pipe
        found = pipe.run(args, _samples, backward=False)
        joined = _joined([output for output in found if output is not None]) if found else None
        return pipe.share_tree(joined) if self._gather else joined

    def explain(self) -> list[tuple[str, str]]:
        """Return rows: which process has which parts."""
        return self._pipe.explain()


def _samples(output: Any, chunk: Any) -> Any:
    return output if chunk.samples else None


def _joined(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if first.dim() else torch.stack(list(outputs))
    if isinstance(first, Mapping):  # a ModelOutput of transformers becomes one again
        joined = {key: _joined([o[key] for o in outputs]) for key in first}
        return dict(joined) if type(first) is dict else type(first)(**joined)
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(some)) for some in zip(*outputs, strict=True))
    return first


class Pipelines:
    """The part of `Accelerator` that runs a model in stages for inference."""

    world: World

    def prepare_pipeline(
        self,
        model: nn.Module,
        split_points: str | Sequence[str] = "auto",
        *,
        num_chunks: int | None = None,
        gather_output: bool = True,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        no_split_module_classes: Sequence[str] = (),
    ) -> PipelinedInference:
        """Cut `model` into as many stages as there are processes, for inference; every process calls it. Collective.

        Args:
            split_points: names of the modules at which a new stage begins, or "auto": by parameters.
            num_chunks: how many chunks go through the stages one after the other; by default one for each process.
            gather_output: every process gets the output; otherwise only the last one, and the others None.
            example_args, example_kwargs: what Accelerate traces the model with. Nothing is traced here: they are taken, to be
                run once, so that errors show at once.
            no_split_module_classes: accepted: parts are cut between modules that the forward calls, never inside a block.
        Raises:
            ConfigError: one process only, a model whose forward is no chain, or splits that do not fit the processes.
        """
        from ..strategies.mesh import Mesh, ParallelPlan
        from ..strategies.pipeline_answers import stand_in
        from ..strategies.pipeline_options import Pipeline
        from ..strategies.pipeline_parallel import PipelinedModel
        from ..strategies.pipeline_split import mark_elsewhere

        del no_split_module_classes
        world = self.world
        if world.size == 1:
            raise ConfigError(
                "prepare_pipeline cuts a model over several processes, and there is one. Launch more, or call the model itself."
            )
        if example_kwargs:
            raise ConfigError("example_kwargs: a pipeline's first stage takes its input by position. Use example_args.")
        # Not the run's own mesh: its losses and data know nothing of these stages.
        mesh = Mesh(world, ParallelPlan(pp=world.size))
        chunks: int = world.size if num_chunks is None else num_chunks
        splits = split_points if split_points == "auto" or not isinstance(split_points, str) else [split_points]
        model.requires_grad_(False)
        model.eval()
        pipe = PipelinedModel(
            "model", model, Pipeline(splits=splits, schedule="gpipe", microbatches=chunks), mesh, world.device, own_inputs=False
        )
        pipe.hold(world.device)
        precision = self.precision  # pyright: ignore[reportAttributeAccessIssue]
        autocast = None if precision.autocast_dtype is None else lambda: precision.autocast(world.device)
        pipe.attach([], autocast=autocast)
        stand_in(pipe.owners)
        mark_elsewhere(model)
        prepared = PipelinedInference(pipe, gather_output=gather_output, autocast=autocast)
        if example_args:
            prepared(*example_args)
        return prepared

    prepare_pippy = prepare_pipeline
