"""A model spread over several axes of one mesh: tensor, context, pipeline and expert parallel beside sharded data parallel.

    ParallelStrategy(plan=ParallelPlan(dp_shard=2, tp=2))      strategy="fsdp:2+tp:2"
Data parallel always goes through fully_shard, on a mesh of one where nothing is sharded: parameters are DTensors, and norms,
clipping, state and checkpoints are those of fsdp.py. Each further axis is a `Part` (parts.py) in a file of its own; a model is
    split into stages (pp) -> converted to the precision -> prepared by each part (ep, tp, cp) ->
    walked: values, rank 0's values, cut by ep and tp module by module, fully_shard unit by unit
Read `prepare_model` first.   Source: torch.distributed.tensor, torch.distributed.fsdp; the composition is that of torchtitan.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import ConfigError
from .mesh import ParallelPlan
from .parts import Part
from .pipeline_strategy import PipelineStrategy
from .registry import AXIS_WORDS, load

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .sharded import Sharded
    from .world import World

__all__ = ["ParallelStrategy"]

PARTS: Mapping[str, tuple[str, str]] = {
    "ep": ("expert_parallel", ".expert_parallel:make_part"),
    "tp": ("tensor_parallel", ".tensor_parallel:make_part"),
    "cp": ("context_parallel", ".context_parallel:make_part"),
}
"""Axis -> (the option of ParallelStrategy about it, what makes its `Part` of that option), in the order of preparing a model."""


class ParallelStrategy(PipelineStrategy):
    """The model spread over the axes of a plan.

    Args:
        plan: the degrees; see mesh.py.
        tensor_parallel: "auto", a TensorPlan, or a mapping of module patterns to styles; see tensor_parallel.py.
        context_parallel: "auto" or a ContextParallel; see context_parallel.py.
        pipeline: "auto" or a Pipeline; see pipeline_parallel.py.
        expert_parallel: "auto" or an ExpertParallel; see expert_parallel.py.
        fsdp: further arguments are those of FSDPStrategy.
    """

    name = "parallel"
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")

    def __init__(
        self,
        *,
        plan: ParallelPlan | None = None,
        tensor_parallel: Any = "auto",
        context_parallel: Any = "auto",
        pipeline: Any = "auto",
        expert_parallel: Any = "auto",
        **fsdp: Any,
    ) -> None:
        super().__init__(plan=plan, pipeline=pipeline, **fsdp)
        self.tensor_parallel = tensor_parallel
        self.context_parallel = context_parallel
        self.expert_parallel = expert_parallel
        self.parts: list[Part] = []

    @classmethod
    def from_words(cls, number: str | None, axes: Mapping[str, int]) -> dict[str, Any]:
        """Read the words of a string: axes with their degrees, "fsdp", "hsdp" and "ddp" among them; -1 where none was said.

        "fsdp:2+tp:2", "hsdp:2+tp:2" (replicas), "ddp:2+pp:2", "tp" (all processes), "tp:2+sp" (sequence parallel), "ep:2"
        (experts over pairs of all processes).
        Raises:
            ConfigError: words that do not go together.
        """
        degrees = {axis: n for axis, n in axes.items() if axis in AXIS_WORDS and axis != "sp"}
        if "hsdp" in axes:
            if axes["hsdp"] == -1:
                raise ConfigError("hsdp beside other axes needs the number of its replicas. Say 'hsdp:2+tp:2', for two.")
            degrees |= {"dp_replicate": axes["hsdp"], "dp_shard": -1}
        elif "fsdp" in axes:
            degrees["dp_shard"] = axes["fsdp"]
        elif "ddp" in axes:
            degrees["dp_replicate"] = axes["ddp"]
        elif "ep" in axes and -1 not in degrees.values():
            degrees["dp_shard"] = -1  # its ranks are taken from these
        options: dict[str, Any] = {"plan": ParallelPlan(**degrees)} if degrees else {}
        if "sp" in axes:
            if "tp" not in axes:
                raise ConfigError(
                    "'sp' cuts what lies between the matrices of tensor parallel along the sequence, and needs tp beside it. "
                    "Say 'tp:2+sp', or 'cp:2' to cut the whole model along the sequence."
                )
            options["tensor_parallel"] = "sequence"
        return options

    def choose_plan(self, world: World) -> tuple[ParallelPlan, str]:
        if self.plan is None:
            raise ConfigError(
                "strategy='parallel' needs a plan. Give ParallelStrategy(plan=ParallelPlan(dp_shard=-1, tp=2)), the run's "
                "plan=..., or say the axes: strategy='fsdp+tp:2'."
            )
        return self.plan, "asked for"

    # -- life ---------------------------------------------------------------------------------------------------------
    def start(self, world: World) -> None:
        """Lay the processes out on the mesh, and make a part for each axis in use. Collective."""
        super().start(world)
        assert self.plan is not None
        for axis in ("pp", *PARTS):
            if getattr(self.plan, axis) > 1 and not _exists(axis):
                raise ConfigError(
                    f"{AXIS_WORDS[axis].capitalize()} ({axis}={getattr(self.plan, axis)}) is not there yet. Leave {axis} out."
                )
        self.parts = [load(maker)(getattr(self, option)) for axis, (option, maker) in PARTS.items() if self.mesh.size(axis) > 1]
        for part in self.parts:
            part.start(self)

    def stop(self) -> None:
        super().stop()
        self.parts = []

    # -- building -----------------------------------------------------------------------------------------------------
    def cut_up(self, sharded: Sharded, units: Mapping[int, str], *, shape: Any = None) -> None:
        """Let each part prepare the model, then cut it up."""
        name, model = sharded.name, sharded.model
        more: dict[int, str] = {}
        for part in self.parts:
            part.prepare_model(name, model)
            more |= {id(module): path for path, module in part.units(name, model)}
        super().cut_up(sharded, {**units, **more}, shape=_Shape(name, model, self.parts) if self.parts else None)
        for part in self.parts:
            part.sharded(name, model)
        self._runs_plain = False
        if self.parts:
            sharded.around = functools.partial(self._around, sharded)

    def _around(self, sharded: Sharded, method: str, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs in the place of a step: each part has its say about what goes in, around it, and what comes out."""
        parts = self.parts

        @functools.wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            if sharded.depth > 1:  # called by another step, which is in all of this already
                return step(*args, **kwargs)
            with ExitStack() as stack:
                for part in parts:
                    args, kwargs = part.enter(sharded.model, method, step, args, kwargs)
                    if (context := part.inside(method)) is not None:
                        stack.enter_context(context)
                try:
                    output = step(*args, **kwargs)
                except Exception as error:
                    for advice in filter(None, (part.advice(error) for part in parts)):
                        error.add_note(advice)
                    raise
                for part in parts:
                    if part.finishes:
                        output = part.finish(output)
            return output

        return run

    def sharing(
        self, tensors: Sequence[Tensor], dims: Sequence[int], kept: Sequence[Tensor] = ()
    ) -> AbstractContextManager[None]:
        contexts = (part.sharing_buffers(tensors, dims, kept) for part in self.parts)
        if (found := next((c for c in contexts if c is not None), None)) is None:
            return super().sharing(tensors, dims, kept)
        if not tensors:
            raise ConfigError(
                "A loop that shares its sequences over cp has to say which tensors are as long as they are: "
                "maybe_context_parallel(buffers=[tokens, labels], buffer_seq_dims=[1, 1])."
            )
        return found

    def _backward_in_parts(self, loss: Tensor, **kwargs: Any) -> None:
        """As without further axes, in the contexts that the parts want: what is recomputed is a forward pass."""
        with ExitStack() as stack:
            for part in self.parts:
                if (context := part.inside(None)) is not None:
                    stack.enter_context(context)
            loss.backward(**kwargs)

    def _after_parts(self) -> None:
        if self._all_sync:
            for part in self.parts:
                part.after_backward()
            self._runs_plain = all(type(part).inside is Part.inside or part.inside(None) is None for part in self.parts)

    def mesh_of(self, path: str, module: nn.Module) -> DeviceMesh:
        for part in self.parts:
            if (mesh := part.mesh_of(path, module)) is not None:
                return mesh
        return super().mesh_of(path, module)

    # -- words --------------------------------------------------------------------------------------------------------
    def explain(self) -> list[tuple[str, str]]:
        return [*super().explain(), *(row for part in self.parts for row in part.explain())]


class _Shape:
    """The parts of a strategy, for one model, as the walk takes them."""

    def __init__(self, name: str, model: nn.Module, parts: Sequence[Part]) -> None:
        self._name, self._model, self._parts = name, model, parts

    def wants(self, path: str, module: nn.Module) -> bool:
        return any(part.wants(self._name, self._model, path, module) for part in self._parts)

    def cut(self, path: str, module: nn.Module) -> None:
        for part in self._parts:
            if part.wants(self._name, self._model, path, module):
                part.cut(self._name, self._model, path, module)

    def unit(self, path: str, module: nn.Module) -> None:
        for part in self._parts:
            part.unit(path, module)


def _exists(axis: str) -> bool:
    module = PARTS[axis][1].partition(":")[0] if axis in PARTS else ".pipeline_parallel"
    return importlib.util.find_spec(module, __package__) is not None
