"""`Accelerator.prepare_pipeline`: a model over several processes or nodes for inference, in stages.

    model = accelerator.prepare_pipeline(model)                  # Accelerate: prepare_pippy
    output = model(batch)                                        # every process calls it with the same batch
Each process keeps its stage and frees the rest; of a model on the meta device it fills its own part only.
A model whose forward is a chain of modules, or that says its parts, is cut between them and takes batches of any shape. Any other
is traced by torch.export with the example arguments, as Accelerate traces all: for chunks of their shape, padded and cut to fit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..strategies.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..strategies.pipeline_parallel import PipelinedModel
    from ..strategies.pipeline_trace import Traced
    from ..strategies.world import World

__all__ = ["PipelinedInference", "Pipelines"]


class PipelinedInference(nn.Module):
    """A model in stages that is called as a whole.

    Attributes:
        module: the user's model, in which placeholders stand for what other processes hold.
        hf_split_points: the parts at which a stage after the first begins. The name is Accelerate's.
    """

    def __init__(
        self, model: nn.Module, pipe: PipelinedModel, traced: Traced | None, *, gather_output: bool, signature: Any
    ) -> None:
        super().__init__()
        self.module = model
        self._pipe, self._traced, self._gather, self._signature = pipe, traced, gather_output, signature
        self.hf_split_points = [names[0] for names in pipe.names[1:] if names] if traced is None else traced.splits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for a whole batch: on every process, or (gather_output=False) where the last stage is.

        Arguments are those of the model's forward; the first tensor's first dimension are the samples.
        """
        pipe = self._pipe
        if self._traced is not None:
            joined = self._run_traced(self._traced, args, kwargs)
        else:
            found = pipe.run(self._by_position(args, kwargs), _samples, backward=False)
            joined = _joined([output for output in found if output is not None]) if found else None
        return pipe.share_tree(joined) if self._gather else joined

    def _by_position(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments as the first stage takes them."""
        if not kwargs:
            return tuple(args)
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"{type(self.module).__name__}.forward: {error}. Call it as the model itself.") from None
        if bound.kwargs:
            raise ConfigError(
                f"A pipeline's first stage takes its input by position, got {', '.join(bound.kwargs)} by name, with others "
                "before it left out. Name all of them, or put them into pipeline_parts()."
            )
        return bound.args

    def _run_traced(self, traced: Traced, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run as many rounds as the batch takes, the last one padded; return the outputs of the real samples."""
        from ..strategies.pipeline_chunks import count_samples

        leaves = traced.inputs(args, kwargs)
        n = count_samples(tuple(value for value in leaves if isinstance(value, Tensor)))
        size = traced.samples * self._pipe.num_chunks
        outputs: list[Any] = []
        for start in range(0, n, size):
            part = tuple(_padded(value[start : start + size], size) if _has(value, n) else value for value in leaves)
            outputs += self._pipe.run(part, lambda output, chunk: traced.output(output), backward=False)
        return _cut(_joined(outputs), n, traced.samples * len(outputs)) if outputs else None

    def explain(self) -> list[tuple[str, str]]:
        """Return rows: which process has which parts."""
        rows = self._pipe.explain()
        if self._traced is not None:
            traced = self._traced
            begins = ", ".join(traced.splits)
            rows.append(("traced", f"by torch.export, for chunks of {traced.samples} sample(s); stages begin at {begins}"))
        return rows


def _samples(output: Any, chunk: Any) -> Any:
    return output if chunk.samples else None


def _has(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == n


def _padded(value: Tensor, size: int) -> Tensor:
    """The tensor with its last sample repeated."""
    return value if len(value) == size else torch.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])


def _cut(value: Any, n: int, padded: int) -> Any:
    from ..strategies.pipeline_chunks import each_tensor

    return each_tensor(value, lambda t: t[:n] if _has(t, padded) else t)


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
        no_split_module_classes: str | Sequence[str] = (),
    ) -> PipelinedInference:
        """Cut `model` into as many stages as there are processes, for inference; every process calls it. Collective.

        Args:
            split_points: names of the modules at which a new stage begins, or "auto": by parameters; "measure": by the time that
                each part takes with the example.
            num_chunks: how many chunks go through the stages one after the other; by default one for each process.
            gather_output: every process gets the output; otherwise only the last one, and the others None.
            example_args, example_kwargs: arguments of one call. A model that is no chain is traced with the first chunk of them;
                any other is run once, so that errors show at once.
            no_split_module_classes: names of classes inside of which no stage begins.
        Raises:
            ConfigError: one process only, a model that is no chain and cannot be traced, or splits that do not fit the processes.
        """
        from ..strategies.mesh import Mesh, ParallelPlan
        from ..strategies.pipeline_answers import stand_in
        from ..strategies.pipeline_options import Pipeline
        from ..strategies.pipeline_parallel import PipelinedModel
        from ..strategies.pipeline_split import mark_elsewhere

        world = self.world
        if world.size == 1:
            raise ConfigError(
                "prepare_pipeline cuts a model over several processes, and there is one. Launch more, or call the model itself."
            )
        no_split = [no_split_module_classes] if isinstance(no_split_module_classes, str) else list(no_split_module_classes or ())
        kwargs = dict(example_kwargs or {})
        example = tuple(example_args)
        chunks: int = world.size if num_chunks is None else num_chunks
        known = split_points if split_points in ("auto", "measure") else None
        named = (
            [split_points] if isinstance(split_points, str) and known is None else list(split_points) if known is None else None
        )
        signature = inspect.signature(model.forward)
        # Not the run's own mesh: its losses and data know nothing of these stages.
        mesh = Mesh(world, ParallelPlan(pp=world.size))
        model.requires_grad_(False)
        model.eval()
        traced: Traced | None = None
        staged = model
        if _is_chain(model, traceable=bool(example or kwargs)):
            options = _of_chain(model, named, known, no_split, chunks, world.size, example, kwargs, signature)
        else:
            if known == "measure":
                raise ConfigError(
                    f"split_points='measure' times the parts of a model, and {type(model).__name__} is no chain of them. Give it "
                    "pipeline_parts(), or split_points='auto'."
                )
            traced = _traced(model, named, no_split, chunks, world, example, kwargs)
            staged = traced.stages
            options = Pipeline(splits=[f"stage_{i}" for i in range(1, world.size)], schedule="gpipe", microbatches=chunks)
        pipe = PipelinedModel("model", staged, options, mesh, world.device, own_inputs=False)
        if traced is not None:
            _replace(model, pipe)
        pipe.hold(world.device)
        precision = self.precision  # pyright: ignore[reportAttributeAccessIssue]
        autocast = None if precision.autocast_dtype is None else lambda: precision.autocast(world.device)
        pipe.attach([], autocast=autocast)
        stand_in(pipe.owners if traced is None else [model])
        mark_elsewhere(model)
        prepared = PipelinedInference(model, pipe, traced, gather_output=gather_output, signature=signature)
        if traced is None and (example or kwargs):
            prepared(*example, **kwargs)
        return prepared

    def prepare_pippy(
        self,
        model: nn.Module,
        split_points: str | Sequence[str] = "auto",
        no_split_module_classes: str | Sequence[str] | None = None,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        num_chunks: int | None = None,
        gather_output: bool = False,
    ) -> PipelinedInference:
        """The same as `prepare_pipeline`, with the arguments, their order and the defaults of `accelerate.inference`'s function.

        Without `gather_output` the last process alone has the output.
        """
        return self.prepare_pipeline(
            model,
            split_points,
            num_chunks=num_chunks,
            gather_output=gather_output,
            example_args=example_args,
            example_kwargs=example_kwargs,
            no_split_module_classes=no_split_module_classes or (),
        )


def _is_chain(model: nn.Module, *, traceable: bool) -> bool:
    """Whether the model can be cut by its modules; one that has no examples to be traced with must be."""
    from ..strategies.pipeline_split import find_chain

    try:
        find_chain(model)
    except ConfigError as why:
        if traceable:
            return False
        raise ConfigError(f"{why} Or give example_args (and example_kwargs), with which torch.export traces it.") from None
    return True


def _of_chain(
    model: nn.Module,
    named: list[str] | None,
    known: str | None,
    no_split: Sequence[str],
    chunks: int,
    stages: int,
    example: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    signature: inspect.Signature,
) -> Any:
    """The Pipeline of a model that is cut by its modules."""
    from ..strategies.pipeline_options import Pipeline
    from ..strategies.pipeline_split import cost_of, find_chain, split_between

    if known == "measure":
        if not example and not kwargs:
            raise ConfigError("split_points='measure' times each part with a real input. Give example_args.")
        bound = signature.bind(*example, **kwargs)
        return Pipeline(splits="measure", schedule="gpipe", microbatches=chunks, example=bound.args)
    if named is None and no_split:
        chain = find_chain(model)
        named = split_between(model, chain, [cost_of(model, link) for link in chain], stages, no_split)
    return Pipeline(splits="auto" if named is None else named, schedule="gpipe", microbatches=chunks)


def _traced(
    model: nn.Module,
    named: list[str] | None,
    no_split: Sequence[str],
    chunks: int,
    world: World,
    example: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Traced:
    """The graph of a model in stages, for one chunk of the example."""
    from torch.utils import _pytree as pytree

    from ..strategies.pipeline_chunks import count_samples
    from ..strategies.pipeline_trace import trace

    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} is no chain of modules, and on the meta device, where its graph could not be filled. Give "
            "it pipeline_parts(), or its values before."
        )
    tensors = tuple(v for v in pytree.tree_leaves((example, dict(kwargs))) if isinstance(v, Tensor))
    if not tensors:
        raise DataError("example_args and example_kwargs hold no tensor. Give what the model is called with.")
    n = count_samples(tensors)
    size = math.ceil(n / chunks)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))

    def one_chunk(value: Any) -> Any:
        return value[:size].to(place) if _has(value, n) else value.to(place) if isinstance(value, Tensor) else value

    args, named_args = pytree.tree_map(one_chunk, (example, dict(kwargs)))
    before = world.size if named is None else named
    if named is not None and len(named) != world.size - 1:
        raise ConfigError(
            f"split_points names {len(named)} place(s), which makes {len(named) + 1} stages, and there are {world.size} ranks. "
            f"Name {world.size - 1}, or say 'auto'."
        )
    return trace(model, args, named_args, before=before, no_split=no_split, device=world.device)


def _replace(model: nn.Module, pipe: PipelinedModel) -> None:
    """Let the user's model have the placeholders of what other processes hold of its graph."""
    new = {id(old): placeholder for old, placeholder in pipe.replaced}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in new:
                module._parameters[key] = new[id(parameter)]
