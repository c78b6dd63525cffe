"""Fully sharded data parallel on a Mesh (FSDP version 2, and HSDP): every rank holds a piece of each parameter.

The model is cut into units (units.py). Each unit's parameters, and with them gradients and optimizer state, are cut along dim 0
over `dp_shard` and gathered just before use:
    forward   all-gather -> compute -> free        backward  all-gather -> compute -> reduce-scatter
With `dp_replicate > 1` the reduced piece is also all-reduced over the replicas (HSDP). The root is what lies in no unit; it stays
gathered between forward and backward. The module stays the user's own, with its names; its parameters become DTensors.
What it adds to torch's fully_shard:
  * Any step runs as the forward (`bind`); one that fails, or that is not followed by a backward pass, leaves nothing gathered.
  * Parameters that cannot be cut (0-d) or shall not be (`ignored_parameters`) are held whole, and their gradients averaged.
  * All ranks start from rank 0's values, unit by unit: models may be built on the meta device (materialize.py).
  * State has full names and is saved in pieces, so that any strategy on any number of ranks reads it (dtensors.py).
Read `FSDPStrategy.prepare_model` first.   Source: torch.distributed.fsdp.fully_shard; Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.optim import Optimizer

from . import dtensors, gradients, named_state
from .errors import ConfigError
from .fsdp_options import read_peers
from .held_pieces import HoldsPieces
from .mesh import Mesh, ParallelPlan, mesh_of
from .precision.base import Precision
from .registry import parse_degree
from .sharded import CUT_UP, Shape, Sharded, check_model, persistent_buffers
from .sharded_optimizers import check_sharded_optimizer
from .units import Units, choose_units

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .world import World

__all__ = ["FSDPStrategy", "HSDPStrategy"]

_MAX = dist.AllreduceOptions()  # pyright: ignore[reportPrivateImportUsage]
_MAX.reduceOp = dist.ReduceOp.MAX  # pyright: ignore[reportAttributeAccessIssue]
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDPStrategy(HoldsPieces):
    """The model in pieces, one on each process; each process reads its slice of the batch.

    Args:
        plan: dp_shard and dp_replicate; by default all processes shard.
        units: what is gathered together: "auto" (the repeated blocks, and layers that are big beside them), class names or
            classes, a number of parameters, a function (name, module) -> bool, or None: the whole model at once.
        reshard_after_forward: free a unit's parameters after its forward, and gather them again in the backward pass; False
            saves that for memory; a number gathers from as many neighbours only.
        offload: "cpu" keeps parameters, gradients and optimizer state in host memory.
        ignored_parameters: parameters (or names, or modules that hold them) to be held whole on every rank.
        gather_in_16_bits: under bf16-mixed and fp16-mixed, gather parameters in those 16 bits: half the bytes. Otherwise they are
            gathered as they are and autocast casts what it multiplies, with the numbers of ddp; in 16 bits the weights of norms
            are rounded as well, and BatchNorm refuses them. Gradients are reduced in float32 in both cases.
        mixed_precision: torch's MixedPrecisionPolicy instead of the one that follows from the precision.
        sync_each_batch: reduce gradients after every micro-batch of a window: slower, and no whole gradient is kept.
        forward_prefetch, backward_prefetch: how many units ahead are gathered, said explicitly; torch's own way by default.
        broadcast_buffers: buffers (BatchNorm's statistics) are rank 0's at each forward, as under ddp.
        sync_batchnorm: BatchNorm over the batch of all ranks; see batch_norm.py.
        sync_module_states: start from rank 0's parameters. False trusts that all ranks built the same.
        forward_methods: further methods that run as the model's forward, such as "generate".
        peers: FSDP's options of Accelerate and Lightning; see fsdp_options.py.
    """

    name = "fsdp"
    axes: tuple[str, ...] = ("dp_replicate", "dp_shard")  # that its plan may have
    reduces_gradients = True
    needs_group = True

    def __init__(
        self,
        *,
        precision: str | Precision | None = None,
        inference: bool = False,
        activation_checkpointing: Any = None,
        compile: Any = None,
        plan: ParallelPlan | None = None,
        units: Units = "auto",
        reshard_after_forward: bool | int = True,
        offload: str | None = None,
        ignored_parameters: Iterable[str | nn.Parameter | nn.Module] = (),
        gather_in_16_bits: bool = False,
        mixed_precision: MixedPrecisionPolicy | None = None,
        sync_each_batch: bool = False,
        forward_prefetch: int = 0,
        backward_prefetch: Any = None,
        broadcast_buffers: bool = True,
        sync_batchnorm: bool = False,
        sync_module_states: bool = True,
        forward_methods: Sequence[str] = (),
        **peers: Any,
    ) -> None:
        super().__init__(precision=precision, inference=inference, compile=compile)
        own = [n for n in FSDPStrategy.__init__.__kwdefaults__ or {} if n != "backward_prefetch"]
        if backward_prefetch is not None and not isinstance(backward_prefetch, int):
            peers["backward_prefetch"] = backward_prefetch
            backward_prefetch = None
        given = read_peers(peers, own, hybrid=self.name == "hsdp")
        self.plan: ParallelPlan | None = given.get("plan", plan)
        self.plan_reason = "asked for"
        self.activation_checkpointing = given.get("activation_checkpointing", activation_checkpointing)
        self.units: Units = given.get("units", units)
        self.reshard_after_forward: bool | int = given.get("reshard_after_forward", reshard_after_forward)
        self.offload: str | None = given.get("offload", offload)
        self.ignored_parameters = list(given.get("ignored_parameters", ignored_parameters))
        self.gather_in_16_bits = gather_in_16_bits
        self.mixed_precision: MixedPrecisionPolicy | None = given.get("mixed_precision", mixed_precision)
        self.sync_each_batch = sync_each_batch
        self.forward_prefetch = int(forward_prefetch)
        self.backward_prefetch: int | None = backward_prefetch
        self.broadcast_buffers = broadcast_buffers
        self.sync_batchnorm = sync_batchnorm
        self.sync_module_states = sync_module_states
        self.forward_methods = tuple(forward_methods)
        self.reduces_gradients = not inference
        self._check_options()
        self._mesh: Mesh | None = None
        self._everyone: tuple[torch.device, dist.ProcessGroup | None] = torch.device("cpu"), None
        self._any_whole = False  # whether a model holds parameters whole
        self._runs_plain = True  # no further axis has anything to do around a backward pass, or after it
        self._steps_plain = False  # whether the precision steps optimizers as they are
        self._all_sync = True  # whether all models reduce gradients; asked at every step
        self._optimizers = []
        self._sharded: dict[int, Sharded] = {}  # by id of the user's module
        self._all_sharded: list[Sharded] = []
        # Parameters that the sharded ones took the place of: id -> (old, new). The old ones are kept, without memory, so that no
        # other object gets their id, and an optimizer that was built before can be given the new ones.
        self._replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def _check_options(self) -> None:
        if self.offload not in (None, "cpu"):
            raise ConfigError(
                f"FSDPStrategy(offload={self.offload!r}): expected 'cpu' or None. Say offload='cpu' for host memory."
            )
        if self.gather_in_16_bits and self.mixed_precision is not None:
            raise ConfigError("gather_in_16_bits and mixed_precision both say in which dtype parameters are gathered. Give one.")
        if self.mixed_precision is not None and not isinstance(self.mixed_precision, MixedPrecisionPolicy):
            raise ConfigError(
                f"mixed_precision={self.mixed_precision!r} is of FSDP version 1. Give a MixedPrecisionPolicy(param_dtype=..., "
                "reduce_dtype=...) of torch.distributed.fsdp, or leave it out: it follows from the run's precision."
            )
        if self.plan is not None:
            for axis in ("cp", "tp", "pp", "ep"):
                if getattr(self.plan, axis) != 1 and axis not in self.axes:
                    raise ConfigError(
                        f"{self.name} has the axes dp_replicate and dp_shard, got {axis} in {self.plan}. Leave {axis} out, or "
                        "leave the strategy out, which then follows the plan (ParallelStrategy)."
                    )

    # -- life ---------------------------------------------------------------------------------------------------------
    def start(self, world: World) -> None:
        """Lay the processes out on the mesh. Collective."""
        super().start(world)
        plan, self.plan_reason = self.choose_plan(world)
        self.plan = plan.resolve(world.size)
        self._mesh = mesh_of(world, self.plan)
        self._everyone = world.device, world.group() if world.size > 1 else None
        if self.plan.dp_shard == 1 and self.plan.dp_replicate > 1 and "tp" not in self.axes:
            raise ConfigError(
                f"{self.name} with {self.plan} shards nothing: each process would hold the whole model. Use strategy='ddp', or "
                "give dp_shard a part of the processes."
            )
        assert self.precision is not None
        self._steps_plain = type(self.precision).step is Precision.step
        if self.precision.scales_loss:  # overflow in one rank's pieces is overflow
            self.precision.agree = self._agree  # pyright: ignore[reportAttributeAccessIssue]

    def check_world(self, world: World) -> None:
        """Any number of processes will do, if there is a process group."""
        if world.group() is None:
            raise ConfigError(
                f"strategy={self.name!r} needs a process group also on one process, and this World has none. Start it with "
                "World.start(need_group=True), which Trainer and Accelerator do by themselves."
            )

    @classmethod
    def from_words(cls, number: str | None, axes: Mapping[str, int]) -> dict[str, Any]:
        """Read "fsdp", "fsdp:2" (so many pieces) and "hsdp:2" (so many replicas). With further axes it is ParallelStrategy."""
        if axes:
            return super().from_words(number, axes)
        if number is None:
            return {}
        degree = parse_degree(cls.name, number)
        return {"plan": ParallelPlan(dp_replicate=degree, dp_shard=-1) if cls.name == "hsdp" else ParallelPlan(dp_shard=degree)}

    def take_plan(self, plan: ParallelPlan, world_size: int) -> None:
        """Take the run's plan, where this strategy was not given one of its own."""
        if self.plan is not None and self.plan.resolve(world_size) != plan.resolve(world_size):
            raise ConfigError(f"The run's plan is {plan}, and its strategy was given {self.plan}. Name it once.")
        self.plan = plan
        self._check_options()

    def choose_plan(self, world: World) -> tuple[ParallelPlan, str]:
        """Return the plan and the reason for it."""
        return (self.plan, "asked for") if self.plan is not None else (ParallelPlan(dp_shard=-1), "chosen: all processes shard")

    def stop(self) -> None:
        """Forget the models. They stay cut up: putting them together again would need every rank, and their whole memory."""
        self._sharded.clear()
        self._all_sharded = []
        self._replaced.clear()
        self._optimizers.clear()
        if self.precision is not None and getattr(self.precision, "agree", None) is not None:
            self.precision.agree = None  # pyright: ignore[reportAttributeAccessIssue]
        self._mesh = None
        super().stop()

    @property
    def mesh(self) -> Mesh:
        if self._mesh is None:
            raise ConfigError(f"Strategy {self.name!r} was not started. Pass it to a Trainer or an Accelerator, which starts it.")
        return self._mesh

    @property
    def data_shard(self) -> tuple[int, int]:
        """Each rank of dp_replicate x dp_shard reads its own slice."""
        return self.mesh.index("batch"), self.mesh.size("batch")

    @property
    def loss_ranks(self) -> int:
        """Each rank of dp_replicate x dp_shard x cp has its own part of the loss."""
        return self.mesh.size("loss")

    # -- building -----------------------------------------------------------------------------------------------------
    def prepare_model(self, name: str, model: nn.Module) -> nn.Module:
        """Convert `model`, cut it up in place, and return it. A model that this strategy cut up already is taken as it is.

        Raises:
            ConfigError: parameters without shape or values, a model that another strategy cut up, or names that it lacks.
        """
        assert self.precision is not None
        if id(model) in self._sharded:
            return model
        check_model(name, model)
        if self.inference:
            model.requires_grad_(False)
            model.eval()
        model = self.shape_blocks(name, self.precision.convert(model))
        group = self.mesh.group("stage")
        if self.sync_batchnorm and not self.inference and group is not None:
            from .batch_norm import convert_sync_batchnorm

            model = convert_sync_batchnorm(model, None if group is dist.group.WORLD else group, self.device)
        sharded = Sharded(name, model, ignored=self.ignored_parameters, device=self.world.parameter_device, group=group)
        self.cut_up(sharded, {id(module): path for path, module in choose_units(model, self.units)})
        sharded.prefetch(self.forward_prefetch, self.backward_prefetch or 0)
        sharded.sends_buffers = (
            self.broadcast_buffers and sharded.group is not None and any(True for _ in persistent_buffers(model))
        )
        for method in dict.fromkeys((*(m for m in _STEPS if _is_own(model, m)), *self.forward_methods)):
            sharded.run_as_forward(method)
        sharded.hook_forward(None if self.precision.autocast_dtype is None else self.precision.autocast(self.device))
        self._sharded[id(model)] = sharded
        self._all_sharded = list(self._sharded.values())
        self.precision.sharded(model)
        return model

    def cut_up(self, sharded: Sharded, units: Mapping[int, str], *, shape: Shape | None = None) -> None:
        """Cut a model up into `units`, id(module) -> name, and remember which parameters took the places of which."""
        self._any_whole |= bool(sharded.whole)
        replaced = sharded.cut_up(
            units,
            policy=self._policy,
            reshard=self.reshard_after_forward,
            synced=self.sync_module_states,
            mesh=self.mesh_of,
            shape=shape,
            offload_policy=self._offload_policy(),
        )
        self._replaced.update((id(old), (old, new)) for old, new in replaced)

    def mesh_of(self, path: str, module: nn.Module) -> DeviceMesh:
        """Return the mesh that a unit is sharded over."""
        mesh = self.mesh
        return mesh.sub("dp_replicate", "fsdp") if mesh.size("dp_replicate") > 1 else mesh.sub("fsdp")

    def _policy(self, root: bool) -> MixedPrecisionPolicy:
        """The dtypes that parameters are gathered and gradients reduced in.

        The root's inputs, targets too, are never cast: autocast does what is needed. Those of units in 16 bits are: their norms
        take no others.
        """
        if self.mixed_precision is not None:
            return self.mixed_precision if not root else replace(self.mixed_precision, cast_forward_inputs=False)
        assert self.precision is not None
        dtype = self.precision.autocast_dtype if self.gather_in_16_bits else None
        return MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32 if dtype is not None else None,
            output_dtype=torch.float32 if root and dtype is not None else None,
            cast_forward_inputs=dtype is not None and not root,
        )

    def _offload_policy(self) -> OffloadPolicy:
        # Pinned memory needs an accelerator: torch's default raises on a machine without one.
        return CPUOffloadPolicy(pin_memory=self.device.type != "cpu") if self.offload == "cpu" else OffloadPolicy()

    def adopt(self, optimizer: Optimizer) -> None:
        """Give an optimizer that was built before its model was cut up the parameters that took the places of its own.

        State that it has already is cut like them.
        """
        for group in optimizer.param_groups:
            parameters = group["params"]
            parameters[:] = [self._replaced[id(p)][1] if id(p) in self._replaced else p for p in parameters]
        for old in list(optimizer.state):
            if id(old) in self._replaced:
                new, state = self._replaced[id(old)][1], optimizer.state.pop(old)
                optimizer.state[new] = {k: self._cut(new, v) if isinstance(v, Tensor) else v for k, v in state.items()}

    def _cut(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Return this rank's part of an optimizer's whole tensor."""
        return self.place(parameter, "", named_state.Source(lambda _: value)) if value.dim() else value

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Take an optimizer of prepared models, built before or after they were cut up.

        Raises:
            ConfigError: an optimizer that needs whole matrices; fused or foreach where some parameters are held whole.
        """
        self.adopt(optimizer)
        check_sharded_optimizer(optimizer, [pair for s in self._sharded.values() for pair in s.whole.items()])
        self._optimizers.append(optimizer)
        return super().prepare_optimizer(optimizer)

    def bind(self, model: nn.Module, method: str) -> Callable[..., Any]:
        """Return `model.<method>`, which runs as the model's forward from now on, however it is called."""
        sharded = self._sharded.get(id(model))
        if sharded is None:
            return super().bind(model, method)
        sharded.run_as_forward(method)
        return getattr(model, method)

    # -- one micro-batch ----------------------------------------------------------------------------------------------
    def set_gradient_sync(self, models: Iterable[nn.Module], enabled: bool) -> None:
        """Say whether the backward pass to come reduces gradients; else each rank keeps whole ones of its own."""
        if self.sync_each_batch or (enabled and self._all_sync):
            return
        self._all_sync = False
        for sharded in [self._sharded[id(m)] for m in self._stages(models) if id(m) in self._sharded] or self._all_sharded:
            sharded.set_sync(enabled)
        if enabled:
            self._all_sync = all(sharded.syncing for sharded in self._sharded.values())

    def _stages(self, models: Iterable[nn.Module]) -> Iterable[nn.Module]:
        """The modules that were prepared for the user's `models`: of a pipeline, its stages."""
        return models

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass of `loss`; on return each rank has its piece of the mean gradient, unless sync is off."""
        try:
            if self._runs_plain:
                loss.backward(**kwargs)
            else:
                self._backward_in_parts(loss, **kwargs)
        except Exception:
            self.break_backward()
            raise
        if self._any_whole:
            self.end_backward()
        if not self._runs_plain:
            self._after_parts()

    def _backward_in_parts(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass of `loss` in what further axes of the mesh want around it."""
        loss.backward(**kwargs)

    def _after_parts(self) -> None:
        """What further axes of the mesh do when gradients are there."""

    def break_backward(self) -> None:
        """Let the units forget a backward pass that failed."""
        for sharded in self._sharded.values():
            if not sharded.depth:
                sharded.forget()

    def end_backward(self) -> None:
        """Average the gradients of what is held whole, which no hook of a unit's does."""
        for sharded in self._sharded.values():
            if sharded.whole and sharded.syncing and (group := self.mesh.group("loss")) is not None:
                sharded.average_whole(group, self.mesh.size("loss"))

    def manual_backward(self, loss: Tensor, **kwargs: Any) -> None:
        """The same inside of a step, which may go on to use the root's parameters: they are gathered again."""
        running = [sharded for sharded in self._sharded.values() if sharded.depth]
        for sharded in running:
            sharded.reduce_behind(loss)
        self.backward(loss, **kwargs)
        for sharded in running:
            sharded.root.unshard()

    def requires_grad_changed(self) -> None:
        for sharded in self._sharded.values():
            sharded.follow_requires_grad()

    # -- one optimizer step -------------------------------------------------------------------------------------------
    def grad_norm(self, parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Return the norm over all pieces on all ranks, replicas counted once. Collective."""
        return dtensors.norm(gradients.gradients(parameters), norm_type)

    def gradients_finite(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether the gradients' pieces are finite on all ranks. Collective: one number."""
        device, group = self._everyone
        pieces: list[Tensor] = []
        try:
            for parameter in parameters:  # without a call for each
                if (grad := parameter.grad) is not None:
                    pieces += (grad._local_tensor,)  # pyright: ignore[reportAttributeAccessIssue]
        except AttributeError:  # some are held whole
            pieces = [dtensors.local(p.grad) for p in parameters if p.grad is not None]
        found = gradients.nonfinite(pieces, device)
        if group is not None:  # its own all-reduce: torch's function around it is a dozen calls at each step
            group.allreduce([found], _MAX).wait()
        if found.item():
            found.zero_()
            return False
        return True

    def scale_gradients(self, parameters: Sequence[nn.Parameter], factor: Tensor | float) -> None:
        gradients.scale_(dtensors.locals_of(parameters), factor)

    def clip_values(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        gradients.clip_values_(dtensors.locals_of(parameters), limit)

    def _agree(self, flag: Tensor) -> None:
        if self.world.size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.group())

    def step(self, optimizer: Optimizer) -> bool:
        """Step `optimizer`; what a forward without a backward pass left gathered is stale then, and freed."""
        assert self.precision is not None
        if self._unchecked:
            self._check_compiled()
        stepped = True
        if self._steps_plain:  # what Precision.step does, without a call
            optimizer.step()
        else:
            stepped = self.precision.step(optimizer)
        for sharded in self._all_sharded:
            for group in sharded.root_groups:  # asked here, for it is asked at every step, and hardly ever so
                if sharded.depth or group._sharded_state is not CUT_UP:
                    sharded.renew()
                    break
        return stepped


class HSDPStrategy(FSDPStrategy):
    """Sharded within groups of processes, replicated over the groups: by default within a node and over the nodes.

    Args: those of FSDPStrategy; `plan` has both dp_replicate and dp_shard.
    """

    name = "hsdp"

    def choose_plan(self, world: World) -> tuple[ParallelPlan, str]:
        """Return the plan and the reason for it.

        Raises:
            ConfigError: no replicas in the plan that was given, or too few processes for both axes.
        """
        if self.plan is not None:
            if self.plan.resolve(world.size).dp_replicate == 1:
                raise ConfigError(f"hsdp with {self.plan} replicates nothing. Use strategy='fsdp', or set dp_replicate.")
            return self.plan, "asked for"
        nodes = world.size // world.local_size
        if nodes > 1 and world.local_size > 1:
            return ParallelPlan(dp_replicate=nodes, dp_shard=-1), f"chosen: sharded within a node, replicated over {nodes}"
        if world.size < 4 or world.size % 2:
            raise ConfigError(
                f"strategy='hsdp' was asked for on {world.size} process(es), which cannot be both sharded and replicated. Use "
                "strategy='fsdp', or start an even number of at least 4."
            )
        return ParallelPlan(dp_replicate=2, dp_shard=-1), "chosen: two replicas, since there is one node"


def _is_own(model: nn.Module, method: str) -> bool:
    """Whether the model has a step of that name: its own, not the one of TrainingModule that says that there is none."""
    found = getattr(type(model), method, None)
    return found is not None and not getattr(found, "__qualname__", "").startswith("TrainingModule.")
