"""Part: one way to spread a model beside its data, as ParallelStrategy (parallel.py) takes it: tp, cp or ep.

Each part has a file: tensor_parallel.py, context_parallel.py, expert_parallel.py. What a part may do, in the order of the calls:
    start(strategy)              the mesh is there: refuse what does not work in this plan
    whole(name, model)           a model is about to be split into the stages of a pipeline, each of which is prepared on its own
    prepare_model(name, model)   the model is whole, maybe without values: check it, replace or patch modules
    wants(name, model, path, module)
    cut(name, model, path, module)
                                 in the walk of Sharded.cut_up: every module inside `module` is done, and its own parameters have
                                 their values, rank 0's, on the device. Here they become DTensors on the part's own axis, before
                                 their unit is sharded over "fsdp". So no rank ever holds more than one module whole.
    unit(path, module)           a unit is about to be sharded
    mesh_of(path, module)        another mesh than "fsdp" for the parameters of a unit; experts have one
    units(name, model)           further units: modules that must be sharded on their own
    sharded(name, model)         all is cut up: what is set on its units
    enter(model, method, step, args, kwargs)
                                 a step begins: the arguments as this rank is to see them
    inside(method)               a context in which a step runs, and (method None) a backward pass; or None
    sharing_buffers(tensors, dims, kept)
                                 the same for a loop of one's own
    finish(output)               what a step returned, made plain again
    after_backward()             gradients are there, reduced; called once at least
    advice(error)                a sentence to be said beside an error of a step
    explain()                    rows for the table
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .mesh import Mesh
    from .parallel import ParallelStrategy

__all__ = ["Part"]


class Part:
    """Does nothing: override what differs.

    Attributes:
        axis: the axis of the mesh that it is about.
        strategy: whose part it is, from `start` on.
        finishes: whether `finish` is to be called.
    """

    axis = ""
    finishes = False
    strategy: ParallelStrategy

    def start(self, strategy: ParallelStrategy) -> None:
        self.strategy = strategy

    @property
    def mesh(self) -> Mesh:
        return self.strategy.mesh

    def whole(self, name: str, model: nn.Module) -> None:
        """Check what no stage of `model` can tell."""

    def prepare_model(self, name: str, model: nn.Module) -> None:
        """Check and patch `model`, in place."""

    def wants(self, name: str, model: nn.Module, path: str, module: nn.Module) -> bool:
        """Whether `cut` is to be called for this module; asked before its parameters are sent from rank 0."""
        return False

    def cut(self, name: str, model: nn.Module, path: str, module: nn.Module) -> None:
        """Spread the module's parameters over the axis."""

    def unit(self, path: str, module: nn.Module) -> None:
        """Called when all inside a unit is cut, before it is sharded."""

    def mesh_of(self, path: str, module: nn.Module) -> DeviceMesh | None:
        """The mesh that the parameters of a unit are sharded over; None for that of the strategy."""
        return None

    def units(self, name: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Modules that have to be units of their own."""
        return []

    def sharded(self, name: str, model: nn.Module) -> None:
        """Called when `model` is cut up."""

    def enter(
        self, model: nn.Module, method: str, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `model.<method>`, which `step` is, as this rank is to see them; before `inside`."""
        return args, kwargs

    def inside(self, method: str | None) -> AbstractContextManager[Any] | None:
        """A context around a step, or (method None) around a backward pass: a new one at each call."""
        return None

    def sharing_buffers(
        self, tensors: Sequence[Tensor], dims: Sequence[int], kept: Sequence[Tensor] = ()
    ) -> AbstractContextManager[None] | None:
        """What `Strategy.sharing` is to return, if it is this part's."""
        return None

    def finish(self, output: Any) -> Any:
        """What a step returned, such that code that knows nothing of this axis can go on with it."""
        return output

    def after_backward(self) -> None:
        """Called after the first backward pass that reduced gradients; after each one, where the part has an `inside`."""

    def advice(self, error: Exception) -> str | None:
        """A sentence that may help with an `error` of a step."""
        return None

    def explain(self) -> list[tuple[str, str]]:
        return []
