"""ParallelPlan (how many ways on each axis) and Mesh (the processes of a World, laid out on those axes).

    plan = ParallelPlan(dp_replicate=2, dp_shard=-1)      # -1: what is left of the processes
    mesh = mesh_of(world, plan)                           # one DeviceMesh with named axes; the same object for the same plan
    mesh.group("dp_shard"), mesh.size("tp"), mesh.index("batch")

Axes from the outermost to the innermost, so that the ranks of an inner axis are neighbours, on one node where that is possible:
    axis          what is cut over it                            who talks over it, and when
    pp            layers into stages                             activations between stages, each micro-batch
    dp_replicate  the batch; the model is held again             gradients are all-reduced, each step
    dp_shard      the batch; parameters, gradients, state        parameters gathered, gradients reduce-scattered, each unit
    cp            the sequence; parameters as over dp_shard      keys and values, each attention
    tp            matrices by columns or rows                    activations, each matrix pair
Derived, for those who ask what a rank is part of:
    batch = dp_replicate x dp_shard          who reads which slice of the data: `data_shard`
    loss  = batch x cp                       over whom a loss or a metric is averaged
    fsdp  = dp_shard x cp                    over whom parameters are sharded
    stage = loss x tp                        who holds pieces of the same layers: all processes, without pp
Cut from fsdp for the experts, which are spread over ep and each sharded over what is left (fsdp = expert_fsdp x ep):
    ep            experts                                        tokens, each expert layer
    expert_fsdp   parameters of the experts of one ep rank       as over fsdp
The product of pp, dp_replicate, dp_shard, cp and tp is the number of processes; ep divides dp_shard * cp.
Source: torch.distributed.device_mesh; the axes are those of torchtitan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from .errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .world import World

__all__ = ["AXES", "DERIVED", "EXPERTS", "Mesh", "ParallelPlan", "mesh_of"]

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes whose product is the number of processes, outermost first."""
DERIVED = {
    "batch": ("dp_replicate", "dp_shard"),
    "loss": ("dp_replicate", "dp_shard", "cp"),
    "fsdp": ("dp_shard", "cp"),
    "stage": ("dp_replicate", "dp_shard", "cp", "tp"),
}
"""Names for several axes taken together."""
EXPERTS = ("expert_fsdp", "ep")
"""The two axes that fsdp is cut into where there are experts, outermost first."""


@dataclass(frozen=True)
class ParallelPlan:
    """Degrees by axis. One may be -1: what is left of the processes.

    Raises:
        ConfigError: a degree that is neither -1 nor at least 1, or two that are -1.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis, degree in self.degrees().items():
            if not isinstance(degree, int) or isinstance(degree, bool) or (degree < 1 and degree != -1):
                raise ConfigError(
                    f"ParallelPlan({axis}={degree!r}): a degree is a whole number of at least 1, or -1 for what is left of the "
                    f"processes. Leave {axis} out for 1."
                )
        if self.ep == -1:
            raise ConfigError(
                "ParallelPlan(ep=-1): the ranks of ep are taken from dp_shard, so nothing is left for it. Say how many."
            )
        if len(free := self._free()) > 1:
            raise ConfigError(
                f"ParallelPlan: {' and '.join(free)} are both -1, and only one axis can take what is left. Set one."
            )

    def degrees(self) -> dict[str, int]:
        """Return axis -> degree, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def resolve(self, world_size: int) -> ParallelPlan:
        """Return the plan on `world_size` processes, without a -1.

        Raises:
            ConfigError: the product of the degrees is another number; the message says what to change.
        """
        known = math.prod(d for axis, d in self.degrees().items() if axis in AXES and d != -1)
        free = self._free()
        plan = self
        if free and world_size % known == 0:
            plan = replace(self, **{free[0]: world_size // known})
        elif free:
            raise ConfigError(
                f"{self}: the other axes take {known} processes together, and {world_size} is no multiple of {known}. "
                f"Launch {_near(known, world_size)} processes, or change a degree."
            )
        elif known != world_size:
            raise ConfigError(
                f"ParallelPlan needs {'*'.join(AXES)} == number of processes, got "
                f"{'*'.join(str(getattr(self, a)) for a in AXES)} = {known} on {world_size} processes. {self._advice(world_size)}"
            )
        inside = plan.dp_shard * plan.cp
        if inside % plan.ep:
            raise ConfigError(
                f"ParallelPlan(ep={plan.ep}): the experts' ranks are taken from dp_shard*cp = {inside}, which {plan.ep} does "
                "not divide. Choose a divisor, or a larger dp_shard."
            )
        return plan

    def _free(self) -> list[str]:
        return [axis for axis, degree in self.degrees().items() if degree == -1]

    def _advice(self, world_size: int) -> str:
        """What to change in a plan whose product is not the number of processes."""
        rest = math.prod(getattr(self, a) for a in AXES if a != "dp_shard")
        launch = f"launch {math.prod(getattr(self, a) for a in AXES)} processes."
        if world_size % rest == 0:
            return f"Set dp_shard=-1 to use what is left ({world_size // rest}), or {launch}"
        return f"Make the other degrees divide {world_size}, or {launch}"

    def __str__(self) -> str:
        """The axes that are more than 1, such as "dp_replicate=2 dp_shard=4"; "1 process" for none."""
        return " ".join(f"{a}={d}" for a, d in self.degrees().items() if d != 1) or "1 process"


class Mesh:
    """The processes of `world` on the axes of a resolved `plan`. Use `mesh_of`, which makes one for each plan.

    Axes of one rank are left out of the DeviceMesh (each costs process groups), but for `dp_shard`, which fully_shard is given
    whatever its size. All groups are made here, by all ranks together: later on, stages of a pipeline do not run the same code.
    """

    def __init__(self, world: World, plan: ParallelPlan) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        from .world import listening_on_loopback

        self.world = world
        self.plan = plan
        degrees = {axis: getattr(plan, axis) for axis in AXES}
        self.axes: tuple[str, ...] = tuple(a for a, d in degrees.items() if d > 1 or a == "dp_shard")
        if world.group() is None:
            raise ConfigError(
                f"The plan {plan} needs a process group also on one process, and this World has none. "
                "Start it with World.start(need_group=True), which Trainer and Accelerator do by themselves."
            )
        self._used = tuple(a for a in self.axes if degrees[a] > 1)
        self._parts: dict[tuple[str, ...], DeviceMesh] = {}
        with listening_on_loopback(world.one_node):
            self.device_mesh: DeviceMesh = init_device_mesh(
                world.device.type, tuple(degrees[a] for a in self.axes), mesh_dim_names=self.axes
            )
            for name, axes in DERIVED.items():
                used = tuple(a for a in axes if a in self._used)
                if len(used) > 1 and (used != self._used or name == "fsdp"):
                    self._parts.setdefault(used, self.device_mesh[used]._flatten(name))
            if plan.ep > 1:
                cut = self.sub("fsdp")._unflatten(0, (self.size("expert_fsdp"), plan.ep), EXPERTS)
                self._parts |= {EXPERTS: cut, **{(a,): cut[a] for a in EXPERTS}}

    def size(self, axis: str) -> int:
        """Return how many ranks an axis (or a derived one) has; 1 for one that is not used."""
        if axis == "ep":
            return self.plan.ep
        if axis == "expert_fsdp":
            return self.size("fsdp") // self.plan.ep
        return math.prod(getattr(self.plan, a) for a in self._named(axis))

    def index(self, axis: str) -> int:
        """Return this rank's place on an axis; on a derived one, the first of its axes counts most."""
        if axis in EXPERTS:
            outer, inner = divmod(self.index("fsdp"), self.plan.ep)
            return inner if axis == "ep" else outer
        place = 0
        for a in self._named(axis):
            held = self.device_mesh.get_local_rank(a) if a in self.axes else 0
            place = place * getattr(self.plan, a) + held
        return place

    def sub(self, *axes: str) -> DeviceMesh:
        """Return the DeviceMesh of some axes, one dimension each: what fully_shard or a parallel style takes.

        A derived axis is one dimension, such as sub("dp_replicate", "fsdp") for HSDP.
        Raises:
            ConfigError: an axis that has no ranks of its own in this plan.
        """
        if axes == self.axes:
            return self.device_mesh
        parts = [self._part(axis) for axis in axes]
        if len(parts) == 1:
            return parts[0]
        if axes not in self._parts:
            from torch.distributed.device_mesh import DeviceMesh

            # Private, and the only way to put a flattened axis beside another; fully_shard joins its mesh with tp's by it.
            self._parts[axes] = DeviceMesh._concatenate(parts)
        return self._parts[axes]

    def _part(self, axis: str) -> DeviceMesh:
        if axis in EXPERTS and self.plan.ep > 1:
            return self._parts[(axis,)]
        named = ("dp_shard",) if axis == "expert_fsdp" else self._named(axis)
        used = tuple(a for a in named if a in self._used) or tuple(a for a in named if a in self.axes)
        if not used:
            raise ConfigError(f"The plan {self.plan} has no ranks on axis {axis!r}. Give it a degree above 1, or leave it out.")
        if used not in self._parts:  # one object for all DTensors on it: torch compares the meshes of two at every operation
            # Flattened it is all processes, on which no other code asks for a mesh of one dimension.
            self._parts[used] = self.device_mesh[used[0]] if len(used) == 1 else self.device_mesh[used]._flatten(axis)
        return self._parts[used]

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Return the process group of an axis, or of a derived one; None where it has one rank only."""
        if self.size(axis) == 1:
            return None
        if axis not in EXPERTS and tuple(a for a in self._named(axis) if a in self._used) == self._used:
            return self.world.group()
        return self._part(axis).get_group()

    def _named(self, axis: str) -> Sequence[str]:
        if axis in DERIVED:
            return DERIVED[axis]
        if axis not in AXES:
            raise unknown_name("axis", axis, [*AXES, *DERIVED, *EXPERTS, "world"])
        return (axis,)

    def __repr__(self) -> str:
        return f"Mesh({self.plan}, rank {self.world.rank})"


def mesh_of(world: World, plan: ParallelPlan) -> Mesh:
    """Return the mesh of `plan` in `world`: the same object for the same plan, so that strategies share its groups. Collective.

    Raises:
        ConfigError: the plan does not fit the number of processes, or the world has no process group.
    """
    plan = plan.resolve(world.size)
    if plan not in world.meshes:
        world.meshes[plan] = Mesh(world, plan)
    return world.meshes[plan]


def _near(step: int, world_size: int) -> str:
    """The multiples of `step` around `world_size`, in words."""
    below, above = world_size // step * step, -(-world_size // step) * step
    return f"{below} or {above}" if below else str(above)
