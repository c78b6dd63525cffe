"""Replica: torch's DistributedDataParallel with what `ddp.py` needs of it, and the helpers that keep copies of a model equal.

Any method runs as DDP's forward; the buckets have their final order at once; parameters, buffers, state and attributes are those
of the module, under the module's own names.   Source: torch.nn.parallel.DistributedDataParallel.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .composite import parts_of
from .errors import ConfigError

__all__ = ["Replica", "broadcast_", "broadcast_buffers_", "guard_frozen", "release_frozen"]

_GUARD = "_drivetrain_frozen"


class Replica(DistributedDataParallel):
    """What `prepare` returns for a model: called like the model, with the model's attributes, names and state.

    `replica.module` is the user's module. It stands on these private names of torch, pinned by tests/strategies/test_ddp.py:
    DistributedDataParallel._run_ddp_forward, ._build_params_for_reducer, ._set_static_graph, ._active_ddp_module;
    Reducer.prepare_for_backward, ._push_all_rebuilt_params, ._rebuild_buckets, ._check_reducer_finalized.
    """

    module: nn.Module
    process_group: dist.ProcessGroup
    prepared_name: str
    forward_ran: bool  # whether DDP's forward ran since the last backward
    rehearses: bool  # whether the next backward pass is the first of a static graph, and not to be averaged
    numbered_names: list[str]  # the parameters' names, in the order of the reducer's numbers

    def __init__(self, model: nn.Module, name: str, **options: Any) -> None:
        # Past nn.Module's own __setattr__, which is not ready yet, and costs a dozen calls when it is.
        vars(self)["prepared_name"] = name
        vars(self)["forward_ran"] = False
        vars(self)["rehearses"] = False
        vars(self)["numbered_names"] = []
        super().__init__(model, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, inside DDP's; without gradients, the bare model: nothing is sent then."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        return DistributedDataParallel.forward(self, self.module, *args, **kwargs)

    def _run_ddp_forward(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `step`, whatever it is, where torch would call the module. This frame is the only one of ours on the way to it."""
        self.__dict__["forward_ran"] = True  # pyright: ignore[reportIndexIssue]
        # What torch does here with a generator context, at ten calls: it tells torch.compile where to cut its graphs.
        outer = DistributedDataParallel._active_ddp_module
        DistributedDataParallel._active_ddp_module = self
        try:
            return step(*args, **kwargs)
        finally:
            DistributedDataParallel._active_ddp_module = outer

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        """Number the parameters backwards, as their gradients come. `prime` makes this the order of the buckets."""
        parameters, sparse = super()._build_params_for_reducer()
        names = {id(p): name for name, p in self.module.named_parameters()}
        if not self.find_unused_parameters:  # whose buckets are never rebuilt, and are cut from the end of the list
            parameters, sparse = parameters[::-1], sparse[::-1]
        vars(self)["numbered_names"] = [names[id(p)] for p in parameters]
        return parameters, sparse

    def prime(self, *, static_graph: bool) -> None:
        """Bring the buckets into their final order now, as if one backward pass had been seen; nothing else is touched.

        Collective (the ranks take rank 0's order). With find_unused_parameters torch never rebuilds them.
        """
        if not self.find_unused_parameters:
            self.reducer._push_all_rebuilt_params()
            self.reducer._rebuild_buckets()
        if static_graph:
            # After the rebuilding, which a static graph would do only after its second step.
            self._set_static_graph()

    def set_sync(self, enabled: bool) -> None:
        """Say whether the forward and backward to come average gradients."""
        if self.static_graph and not enabled and not self._static_graph_delay_allreduce_enqueued:
            self.rehearses = True
        else:
            # Past nn.Module.__setattr__, which costs a dozen calls.
            self.__dict__["require_backward_grad_sync"] = enabled  # pyright: ignore[reportIndexIssue]

    def rehearse(self, loss: Tensor) -> None:
        """Run the backward pass of `loss` for a static graph to be seen, and leave the gradients as they were.

        torch learns the graph in the first backward pass, which must be one that averages; here it was to be one that does not.
        """
        self.rehearses = False
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        loss.backward(retain_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.set_sync(False)

    def hush(self) -> None:
        """Use up torch's advice against find_unused_parameters, given once a process: here it was not the user who asked."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.reducer.prepare_for_backward([p.view_as(p) for p in self.module.parameters() if p.requires_grad])

    def missing(self, text: str) -> list[str]:
        """Return the names of the parameters that torch's message numbers; none if it cannot be about this model."""
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
        numbers = [int(n) for n in found[1].split()] if found else []
        if not numbers or max(numbers) >= len(self.numbered_names):
            return []
        return sorted(self.numbered_names[n] for n in numbers)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet
                raise
            return getattr(self.module, name)

    # Under the names that the module gives them, without a prefix.
    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)


def broadcast_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give rank 0's parameters and buffers to all ranks, in place."""
    _broadcast([*model.parameters(), *model.buffers()], group)


def broadcast_buffers_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give rank 0's buffers to all ranks, in place."""
    _broadcast(list(model.buffers()), group)


@torch.no_grad()
def _broadcast(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """One collective for each dtype and device; each tensor is written once, whatever its strides."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in (part for whole in tensors for part in parts_of("", whole).values()):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for some in kinds.values():
        flat = torch.cat([t.reshape(-1) for t in some])
        dist.broadcast(flat, group=group, group_src=0)
        for tensor, piece in zip(some, flat.split([t.numel() for t in some]), strict=True):
            tensor.copy_(piece.view(tensor.shape))


def guard_frozen(model: nn.Module, name: str) -> None:
    """Let a parameter that is frozen now raise when it ever gets a gradient: DDP would not average it, and the ranks would part.

    Costs nothing until then. `release_frozen` takes the guards away.
    """
    for key, parameter in model.named_parameters():
        if parameter.requires_grad or not (parameter.is_floating_point() or parameter.is_complex()):
            continue
        parameter.requires_grad_(True)  # a hook can be put on only then
        handle = parameter.register_post_accumulate_grad_hook(functools.partial(_unfrozen, key, name))
        parameter.requires_grad_(False)
        setattr(parameter, _GUARD, handle)


def release_frozen(model: nn.Module) -> None:
    """Take the guards of an earlier strategy off."""
    for parameter in model.parameters():
        if (handle := vars(parameter).pop(_GUARD, None)) is not None:
            handle.remove()


def _unfrozen(key: str, name: str, parameter: Tensor) -> None:
    raise ConfigError(
        f"Parameter {key} of model {name!r} was frozen when the model was prepared and has a gradient now, which DDP does not "
        "average: every rank would train its own copy. Let it need a gradient until the model is prepared, and freeze it "
        "afterwards (with find_unused_parameters=True); or prepare the model again."
    )
