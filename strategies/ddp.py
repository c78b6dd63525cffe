"""Distributed data parallel: every rank holds the whole model and reads its slice of the batch; gradients are averaged.

    prepare_model   Replica(model): torch's DistributedDataParallel which runs any method as "the forward"
    bind            model.training_step run inside DDP's forward: parameters used anywhere in the step are averaged
    backward        buckets of gradients are all-reduced while the backward pass still computes the next ones
What it adds to torch's class:
  * The buckets have their final order before the first step (`Replica.prime`). torch reorders them after it, so a resumed run
    would sum its first step in another order than the run that was not interrupted: on 3 and more ranks, other bits.
  * A backward pass whose forward did not go through DDP (manual optimisation, a second loss of the same forward, a method called
    on the bare module) is announced to the reducer, and so averaged; torch's would leave such gradients as they are, silently.
  * After each backward pass the reducer says whether it is done. torch notices parameters without gradients one step too late,
    after an optimizer step with gradients that were not averaged.
  * Evaluation calls the bare module: no buffer is sent, so ranks may have different numbers of batches.
The private names of torch that this stands on are listed in replica.py, and pinned by tests.
Read `DDPStrategy.prepare_model` first.   Source: torch.nn.parallel.DistributedDataParallel; Li et al. 2020, arXiv:2006.15704.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .base import Strategy
from .composite import is_composite
from .errors import ConfigError, DistributedError, UnknownName, suggest
from .precision.base import Precision
from .replica import Replica, broadcast_, broadcast_buffers_, guard_frozen, release_frozen

if TYPE_CHECKING:
    from .comm_hooks import CommHook
    from .world import World

__all__ = ["DDPStrategy"]

_EVALUATION = ("validation_step", "test_step", "predict_step")
_MANUAL = "automatic_optimization=False: each backward pass may reach only a part of the model"
# The peers' spellings, and what they take that lies elsewhere here.
_ALIASES = {
    "ddp_comm_hook": "comm_hook",
    "ddp_comm_wrapper": "comm_wrapper",
    "ddp_comm_state": "comm_state",
    "comm_state_option": "comm_options",
    "forward_sync_buffers": "broadcast_buffers",
}
_ELSEWHERE = {
    "timeout": "The time that a collective may take is the world's: World.start(timeout_s=...).",
    "process_group_backend": "The backend follows from the device.",
    "process_group": "The processes are the world's; one that you initialised yourself is joined.",
    "start_method": "How processes are started is the launcher's to say, not the strategy's.",
    "check_reduction": "torch ignores it; leave it out.",
    "dim": "Batches are cut by the loader; leave it out.",
}


class DDPStrategy(Strategy):
    """One copy of the model on each process; the gradient is the mean over all of them.

    Args:
        find_unused_parameters: let parameters stay without a gradient in a step. None: only under manual optimisation.
        static_graph: promise that each step uses the same parameters in the same way; some may be unused then, or be used twice
            (reentrant checkpointing).
        bucket_cap_mb: size of the pieces in which gradients are sent, in MiB.
        gradient_as_bucket_view: gradients lie in the buckets themselves: saves their size in memory.
        broadcast_buffers: buffers (BatchNorm's statistics) are rank 0's at each forward. False: each rank has its own.
        sync_batchnorm: BatchNorm over the batch of all ranks; see batch_norm.py.
        comm_hook: "fp16", "bf16", "power_sgd", "batched_power_sgd" or a function; with `comm_wrapper`, `comm_options`
            (PowerSGD's) and `comm_state` (a function's): see comm_hooks.py.
        peers: other spellings of the same: ddp_comm_hook, ddp_comm_state, ddp_comm_wrapper, comm_state_option.
    """

    name = "ddp"
    reduces_gradients = True

    def __init__(
        self,
        *,
        precision: str | Precision | None = None,
        inference: bool = False,
        activation_checkpointing: Any = None,
        compile: Any = None,
        find_unused_parameters: bool | None = None,
        static_graph: bool = False,
        bucket_cap_mb: float | None = None,
        gradient_as_bucket_view: bool = False,
        broadcast_buffers: bool = True,
        sync_batchnorm: bool = False,
        comm_hook: str | Callable[..., Any] | None = None,
        comm_wrapper: str | Callable[..., Any] | None = None,
        comm_options: Mapping[str, Any] | None = None,
        comm_state: Any = None,
        **peers: Any,
    ) -> None:
        super().__init__(
            precision=precision, inference=inference, activation_checkpointing=activation_checkpointing, compile=compile
        )
        given = _read_peers(peers)
        self.find_unused_parameters = find_unused_parameters
        self.static_graph = static_graph
        self.bucket_cap_mb = bucket_cap_mb
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.broadcast_buffers: bool = given.get("broadcast_buffers", broadcast_buffers)
        self.sync_batchnorm = sync_batchnorm
        self.comm_hook = _none_of(given.get("comm_hook", comm_hook))
        self.comm_wrapper = _none_of(given.get("comm_wrapper", comm_wrapper))
        self.comm_options: Mapping[str, Any] | None = given.get("comm_options", comm_options)
        self.comm_state = given.get("comm_state", comm_state)
        if bucket_cap_mb is not None and not bucket_cap_mb > 0:
            raise ConfigError(f"bucket_cap_mb must be more than 0 MiB, got {bucket_cap_mb}. Leave it out for torch's 25.")
        if self.comm_hook is None and not (self.comm_wrapper is None and self.comm_state is None and not self.comm_options):
            raise ConfigError(
                "comm_wrapper, comm_options and comm_state belong to a comm_hook, and none was given. Add comm_hook=...."
            )
        self.reduces_gradients = not inference
        # One process has nothing to send, but compression changes its numbers too: then it goes the same way.
        self.needs_group = self.comm_hook is not None
        self._replicas: dict[int, Replica] = {}  # by id of the user's module
        self._hooks: dict[int, CommHook] = {}
        self._manual = False

    # -- life ---------------------------------------------------------------------------------------------------------
    def check_world(self, world: World) -> None:
        """Any number of processes will do; what needs a process group says so."""
        if self.needs_group and world.group() is None:
            raise ConfigError(
                f"comm_hook={self.comm_hook!r} was asked for on one process without a process group. Start the world with "
                "World.start(need_group=True), or leave comm_hook out: one process sends nothing."
            )

    def stop(self) -> None:
        """Forget the replicas: their reducers take their hooks off the parameters when they are freed."""
        for replica in self._replicas.values():
            release_frozen(replica.module)
        self._replicas.clear()
        self._hooks.clear()
        super().stop()

    @property
    def data_shard(self) -> tuple[int, int]:
        """Each rank reads its own slice."""
        return self.world.rank, self.world.size

    # -- building -----------------------------------------------------------------------------------------------------
    def prepare_model(self, name: str, model: nn.Module) -> nn.Module:
        """Convert and move `model`, give it rank 0's weights, and return its `Replica`.

        On one process, for inference, and when no parameter needs a gradient, nothing is reduced: `model` itself is returned.
        Raises:
            ConfigError: parameters without values yet, or static_graph under manual optimisation.
            DistributedError: the ranks built different models.
        """
        model = super().prepare_model(name, model)
        group = self.world.group()
        if group is None or (self.world.size == 1 and not self.needs_group):
            return model
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if nn.parameter.is_lazy(tensor):
                raise ConfigError(
                    f"{key} of model {name!r} has no shape yet (a lazy module), so it cannot be the same on all ranks. Run one "
                    "batch through the model before it is prepared."
                )
        if self.sync_batchnorm and not self.inference:
            from .batch_norm import convert_sync_batchnorm

            model = convert_sync_batchnorm(model, None if group is dist.group.WORLD else group, self.device)
        if not any(p.requires_grad for p in model.parameters()):
            broadcast_(model, group)
            return model
        manual = not getattr(model, "automatic_optimization", True)
        if manual and self.static_graph:
            raise ConfigError(
                f"static_graph=True promises that every step uses the parameters of model {name!r} in one and the same way, "
                f"and {_MANUAL}. Leave static_graph out."
            )
        self._manual = self._manual or manual
        unused = manual if self.find_unused_parameters is None else self.find_unused_parameters
        replica = self._replicate(name, model, group, find_unused=unused and not self.static_graph)
        if unused and self.find_unused_parameters is None:
            replica.hush()
        replica.prime(static_graph=self.static_graph)
        release_frozen(model)
        guard_frozen(model, name)
        self._replicas[id(model)] = replica
        return replica

    def _replicate(self, name: str, model: nn.Module, group: dist.ProcessGroup, *, find_unused: bool) -> Replica:
        composite = any(is_composite(p) for p in model.parameters())
        if composite:
            broadcast_(model, group)  # torch's own, at DDP's construction, knows plain tensors only
        try:
            replica = Replica(
                model,
                name,
                process_group=group,
                find_unused_parameters=find_unused,
                bucket_cap_mb=self.bucket_cap_mb,
                gradient_as_bucket_view=self.gradient_as_bucket_view,
                forward_sync_buffers=self.broadcast_buffers,
                init_sync=not composite,
            )
        except RuntimeError as error:
            if "DDP expects same model" not in str(error) and "appears not to match" not in str(error):
                raise
            raise DistributedError(
                f"[rank {self.world.rank}/{self.world.size}] model {name!r} is not the same on all ranks: "
                f"{str(error).splitlines()[0]}. Build the same parameters, of the same shapes, in the same order, on every rank."
            ) from error
        if self.comm_hook is not None:
            from .comm_hooks import make_hook

            hook = make_hook(self.comm_hook, group, wrapper=self.comm_wrapper, options=self.comm_options, state=self.comm_state)
            replica.register_comm_hook(hook.state, hook.hook)
            self._hooks[id(model)] = hook
        return replica

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the user's module of a replica."""
        return model.module if isinstance(model, Replica) else model

    def bind(self, model: nn.Module, method: str) -> Callable[..., Any]:
        """Return `model.<method>` as DDP's forward; bare for evaluation, and under manual optimisation (see `backward`)."""
        step = getattr(model, method)
        replica = self._replicas.get(id(model))
        if replica is None or method in _EVALUATION:
            return step
        if getattr(model, "automatic_optimization", True):
            # Not replica(...): its own __call__ has nothing to add to a step.
            return functools.partial(DistributedDataParallel.forward, replica, step)
        if not (self.broadcast_buffers and any(True for _ in model.buffers())):
            return step

        def manual_step(*args: Any, **kwargs: Any) -> Any:
            broadcast_buffers_(model, replica.process_group)
            return step(*args, **kwargs)

        return manual_step

    # -- one micro-batch ----------------------------------------------------------------------------------------------
    def set_gradient_sync(self, models: Iterable[nn.Module], enabled: bool) -> None:
        """Say whether the forward and backward to come average gradients; must be said before the forward."""
        for model in models or self._replicas.values():
            replica = model if isinstance(model, Replica) else self._replicas.get(id(model))
            if replica is not None:
                replica.set_sync(enabled)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass of `loss`; on return the gradients are the mean over ranks, unless sync is off.

        Raises:
            ConfigError: parameters that took no part in the loss (named), or took part in a way that DDP cannot count.
        """
        self.begin_backward(loss)
        try:
            loss.backward(**kwargs)
            for replica in self._replicas.values():
                replica.reducer._check_reducer_finalized()
        except RuntimeError as error:
            if (told := self._explained(error)) is not None:
                raise told from error
            raise

    def begin_backward(self, loss: Tensor) -> None:
        """Tell the reducers of a backward pass, whoever runs it."""
        for replica in self._replicas.values():
            if replica.forward_ran:
                # DDP's forward has told the reducer. Past nn.Module.__setattr__, which costs a dozen calls.
                replica.__dict__["forward_ran"] = False  # pyright: ignore[reportIndexIssue]
            elif replica.require_backward_grad_sync:
                replica.reducer.prepare_for_backward([loss])
            if replica.rehearses:
                replica.rehearse(loss)

    def end_backward(self) -> None:
        """Let the reducers say whether they are done, after a backward pass that another strategy ran."""
        try:
            for replica in self._replicas.values():
                replica.reducer._check_reducer_finalized()
        except RuntimeError as error:
            if (told := self._explained(error)) is not None:
                raise told from error
            raise

    def _explained(self, error: RuntimeError) -> ConfigError | None:
        """Turn what torch says about parameters by number into an error that names them."""
        text = str(error)
        where = f"[rank {self.world.rank}/{self.world.size}] "
        for replica in self._replicas.values():
            if "Expected to have finished reduction" in text and (names := replica.missing(text)):
                shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
                return ConfigError(
                    f"{where}{len(names)} parameter(s) of model {replica.prepared_name!r} took no part in this loss: {shown}. "
                    "DDP waits for the gradient of every parameter. Use them in the loss, freeze them (requires_grad_(False)) "
                    "before the model is prepared, or say strategy=DDPStrategy(find_unused_parameters=True)."
                )
        if "Expected to mark a variable ready only once" in text:
            found = re.search(r"Parameter at index (\d+)", text)
            replica = next(iter(self._replicas.values()))
            name = replica.numbered_names[int(found[1])] if found and len(self._replicas) == 1 else "a parameter"
            return ConfigError(
                f"{where}{name} got its gradient twice in one backward pass, which DDP cannot count. This is what "
                "reentrant activation checkpointing does: use checkpoint(..., use_reentrant=False), or say "
                "strategy=DDPStrategy(static_graph=True)."
            )
        return None

    # -- state --------------------------------------------------------------------------------------------------------
    def sync_buffers(self, models: Iterable[nn.Module]) -> None:
        """Give rank 0's buffers to all ranks, as the next forward would: before an evaluation. Collective."""
        if self.broadcast_buffers:
            for model in models:
                replica = self._replicas.get(id(self.unwrap(model)))
                if replica is not None:
                    broadcast_buffers_(replica.module, replica.process_group)

    def state_tensors(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same names and values as on one device; and under `strategy/ddp/` what differs by rank (see comm_hooks.py).

        Buffers are rank 0's: the others leave them out.
        """
        tensors, values = super().state_tensors(models, optimizers)
        rank, size = self.world.rank, self.world.size
        for name, model in models.items():
            for key, buffer in model.named_buffers() if id(model) in self._replicas else ():
                if f"model/{name}/{key}" not in tensors:
                    continue
                if rank > 0:
                    del tensors[f"model/{name}/{key}"]
                if not self.broadcast_buffers:
                    from .checkpoint.layout import Shard

                    row = buffer.detach()[None].clone()
                    tensors[f"strategy/ddp/{name}/buffer/{key}"] = Shard(row, (rank, *[0] * buffer.dim()), (size, *buffer.shape))
            if hook := self._hooks.get(id(model)):
                from .comm_hooks import state_of

                more_tensors, more_values = state_of(hook, f"strategy/ddp/{name}/comm", rank, size)
                tensors |= more_tensors
                values |= more_values
        return tensors, values

    def load_state_tensors(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        names: Iterable[str],
        read: Callable[[str], Tensor],
        values: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> list[str]:
        """Load what any strategy saved. What differs by rank comes back to its rank if the number of ranks is the same."""
        names = list(names)
        skipped = super().load_state_tensors(models, optimizers, names, read, values, strict=strict)
        rank, size = self.world.rank, self.world.size
        known = set(names)
        for name, model in models.items():
            if id(model) in self._replicas and not self.broadcast_buffers:
                for key, buffer in model.named_buffers():
                    if (row := f"strategy/ddp/{name}/buffer/{key}") in known and len(rows := read(row)) == size:
                        buffer.copy_(rows[rank])
            if hook := self._hooks.get(id(model)):
                from .comm_hooks import load_state

                load_state(hook, f"strategy/ddp/{name}/comm", rank, size, names, read, values, self.device)
        return skipped

    def explain(self) -> list[tuple[str, str]]:
        rows = super().explain()
        if self.find_unused_parameters is None and self._manual:
            rows.append(("find_unused_parameters", f"True   chosen: {_MANUAL}"))
        if self.comm_hook is not None:
            named = self.comm_hook if isinstance(self.comm_hook, str) else getattr(self.comm_hook, "__qualname__", "a function")
            rows.append(("gradient compression", named))
        return rows


def _none_of(value: Any) -> Any:
    return None if isinstance(value, str) and value in ("no", "none") else value


def _read_peers(peers: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the peers' spellings; raise for what is none, with the place where it lies here."""
    given: dict[str, Any] = {}
    for key, value in peers.items():
        if key in _ELSEWHERE:
            raise UnknownName(f"DDPStrategy takes no {key!r}. {_ELSEWHERE[key]}")
        if key not in _ALIASES:
            own = [*(DDPStrategy.__init__.__kwdefaults__ or {}), *_ALIASES]
            raise UnknownName(f"DDPStrategy takes no argument {key!r}.{suggest(key, own)} It takes: {', '.join(sorted(own))}.")
        given[_ALIASES[key]] = value
    return given
