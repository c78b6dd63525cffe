"""The World of a run: which rank this process is, its device, and how it talks to the others.

    World.start()  reads the environment -> chooses the device -> meets the others -> makes two process groups:
                   the default group for compute (gloo on CPU, nccl on CUDA), and a gloo group for control
Alone (no launcher) there is no group at all, and every collective is the identity.
On one node everything listens on loopback only: torch's TCPStore and gloo would bind to every interface, and neither knows
whom it talks to. With several nodes gloo is told the interface that leads to the others (interfaces.py), and a machine that does
not answer any more ends the run (node_watch.py). Read `World.start` first.   Source: torch.distributed, https://pytorch.org/docs/stable/distributed.html
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from . import collectives
from .control import Control
from .devices.base import DeviceChoice, choose_device, select_device
from .environment import RankEnvironment, gloo_interface, node_timeout_s, read_environment
from .errors import DistributedError, unknown_name
from .interfaces import check_named, choose_interface
from .meeting import meet
from .node_watch import NodeWatch

if TYPE_CHECKING:
    from .mesh import Mesh, ParallelPlan

# Waiting longer than this for a rank to appear is pointless: it was never started, or died on the way.
_START_TIMEOUT_S = 300.0

# Worlds with groups, stopped at the end of the process.
_running: weakref.WeakSet[World] = weakref.WeakSet()


class World:
    """Ranks, groups and collectives of one run, shared by its strategies. Built by `World.start` or `World.single`.

    Attributes:
        parameter_device: where models are put: `device`, but in a dry run, where they stay without values (dry_run.py).
    """

    def __init__(self, env: RankEnvironment, choice: DeviceChoice, group: dist.ProcessGroup | None) -> None:
        """Not for users: `World.start` finds the arguments."""
        self.rank = env.rank
        self.size = env.size
        self.local_rank = env.local_rank
        self.local_size = env.local_size
        self.node_rank = env.node_rank
        self.device = self.parameter_device = choice.device
        self.device_reason = choice.reason
        self.backend = choice.backend if group is not None else "none"
        self.launcher = env.launcher
        self.one_node = env.one_node
        self.is_main = env.rank == 0
        self.is_local_main = env.local_rank == 0
        self.is_last = env.rank == env.size - 1
        self.control = Control()
        self.meshes: dict[ParallelPlan, Mesh] = {}  # filled by mesh.mesh_of
        self.last_stage = -1  # the place on pp of the rank that has the losses; schedules of a V shape have them on the first
        self._group = group
        self._control_group: dist.ProcessGroup | None = None
        self._owns_default_group = False
        self._at_stop: list[Callable[[], None]] = []
        self._node_watch: NodeWatch | None = None
        self._started = True

    @classmethod
    def start(cls, device: str = "auto", *, timeout_s: float = 1800.0, need_group: bool = False) -> World:
        """Join the other ranks, as the launcher's variables say, and return the World; alone, a World of one.

        A default process group that already exists is joined and left alive by `stop`.

        Args:
            device: see `choose_device`.
            timeout_s: of each collective. Ranks that do not appear within min(timeout_s, 300) are named.
            need_group: make a process group also for one rank without a launcher.
        Raises:
            ConfigError: junk in the launcher's variables, or no such device.
            DistributedError: the port is taken, the address unknown, or ranks are missing.
        """
        env = read_environment()
        joined = dist.is_initialized()
        if joined:
            env = _environment_of_default_group(env)
        choice = choose_device(device, local_rank=env.local_rank, local_size=env.local_size)
        select_device(choice.device)
        if env.size == 1 and not (joined or need_group):
            return cls(env, choice, None)
        timeout = timedelta(seconds=timeout_s)
        node_watch = None
        with listening_on_loopback(env.one_node):
            if not joined:
                node_watch = _start_default_group(env, choice, timeout)
            world = cls(env, choice, dist.group.WORLD)
            world._node_watch = node_watch
            world._owns_default_group = not joined
            world.backend = dist.get_backend()
            if choice.device.type != "cpu" and not joined:
                world.backend = choice.backend
            control_group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(control_group, dist.ProcessGroup)  # an int stands for "not a member": every rank is one
            world._control_group = control_group
        world.control = Control(world._control_group if env.size > 1 else None)
        _running.add(world)
        atexit.unregister(_stop_all)
        atexit.register(_stop_all)
        return world

    @classmethod
    def single(cls, device: str = "cpu") -> World:
        """Return a World of one that reads no environment and makes no group: for tests and tools."""
        choice = choose_device(device)
        select_device(choice.device)
        return cls(RankEnvironment(), choice, None)

    def __repr__(self) -> str:
        return f"World(rank {self.rank}/{self.size}, {self.device}, {self.backend})"

    def group(self, axis: str = "world") -> dist.ProcessGroup | None:
        """Return the process group of an axis (mesh.py names them); None when this process is alone on it."""
        if axis == "world":
            return self._group
        if self.mesh is None:
            raise unknown_name("axis", axis, ["world"])
        return self.mesh.group(axis)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the run's own strategy, which starts first; None where there is none."""
        return next(iter(self.meshes.values()), None)

    @property
    def is_duplicate(self) -> bool:
        """Whether another rank speaks for this one's losses and logged values: on tp and pp all ranks have the same ones.

        The first rank of tp and the rank of pp with the last stage speak.
        """
        mesh = self.mesh
        return mesh is not None and (mesh.index("tp") > 0 or mesh.index("pp") != self.last_stage % mesh.size("pp"))

    @property
    def loss_index(self) -> int:
        """This rank's place among those that hold parts of the loss: its rank, but that ranks of tp and pp hold the same."""
        mesh = self.mesh
        return self.rank if mesh is None else mesh.index("loss")

    @property
    def random_index(self) -> int:
        """Which random stream this rank draws from: that of its part of the loss, and of its stage.

        Ranks of tp compute the same activations, and must drop the same of them; stages of a pipeline compute different ones.
        """
        mesh = self.mesh
        return self.rank if mesh is None else mesh.index("loss") + mesh.size("loss") * mesh.index("pp")

    def new_group(self, ranks: list[int] | None = None, *, backend: str | None = None) -> dist.ProcessGroup | None:
        """Make another process group as `dist.new_group`, on loopback when there is one node; None on ranks not in it."""
        if self._group is None:
            return None
        with listening_on_loopback(self.one_node):
            group = dist.new_group(ranks, backend=backend)
        return group if isinstance(group, dist.ProcessGroup) else None

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Return the "sum", "mean", "max" or "min" over ranks, out of place; with one rank, the tensor itself."""
        return tensor if self.size == 1 else collectives.all_reduce(tensor, op, self._compute())

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return all ranks' tensors along dim 0 in order of rank; dim 0 may differ between ranks; 0-d counts as one row."""
        if self.size == 1:
            return tensor.reshape(1) if tensor.ndim == 0 else tensor
        return collectives.all_gather(tensor, self._compute())

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Return rank `src`'s tensor, out of place; every rank passes one of that shape and dtype."""
        return tensor if self.size == 1 else collectives.broadcast(tensor, src, self._compute())

    def barrier(self) -> None:
        """Wait until every rank is here. On the control group: no accelerator is waited for."""
        if self.size > 1:
            dist.barrier(group=self._control())

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        """Return rank `src`'s JSON value on every rank."""
        return value if self.size == 1 else collectives.broadcast_json(value, src, self._control())

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's JSON value, in order of rank, on every rank."""
        return [value] if self.size == 1 else collectives.gather_json(value, self._control())

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Return rank `src`'s object on every rank. Pickled: only for what users pass between ranks of their own run."""
        if self.size == 1:
            return value
        box = [value if self.rank == src else None]
        dist.broadcast_object_list(box, group_src=src, group=self._control())
        return box[0]

    def gather_object(self, value: Any) -> list[Any]:
        """Return every rank's object, in order of rank, on every rank. Pickled, as `broadcast_object`."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self._control())
        return every

    def at_stop(self, action: Callable[[], None]) -> None:
        """Let `action` run when the world stops, before its groups go."""
        self._at_stop.append(action)

    def when_lost(self, action: Callable[[DistributedError], Any]) -> None:
        """Let `action`, called in another thread, end this process when a node is lost; by default it is said, and exit 1."""
        if self._node_watch is not None:
            self._node_watch.on_lost = action

    def stop(self) -> None:
        """Destroy the groups that `start` made; waits for no other rank, but for a save under way. A second call does nothing."""
        if not self._started:
            return
        self._started = False
        _running.discard(self)
        for action in self._at_stop:
            action()
        self._at_stop.clear()
        self.control.stop()
        if self._node_watch is not None:
            self._node_watch.stop()
        if self._owns_default_group and dist.is_initialized():
            dist.destroy_process_group()
        elif self._control_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._control_group)
        self._group = self._control_group = None
        self.meshes.clear()

    def _compute(self) -> dist.ProcessGroup:
        if self._group is None:
            raise DistributedError("This World was stopped: its groups are gone. Start a new one with World.start().")
        return self._group

    def _control(self) -> dist.ProcessGroup:
        if self._control_group is None:
            raise DistributedError("This World was stopped: its groups are gone. Start a new one with World.start().")
        return self._control_group


def _stop_all() -> None:
    """Stop what a script left running when it ended.

    gloo's threads drop their last tensors with the GIL. One that does so while the interpreter shuts down aborts the process
    ("terminate called without an active exception"; seen in one process of ten on a busy machine, torch 2.13).
    """
    running = list(_running)
    for world in running:
        world.stop()
    if running:
        time.sleep(0.01)  # releases the GIL, for groups that somebody else (DDP) still holds


def _leave_groups_to_the_parent() -> None:
    """In a fork: never destroy a group. Its threads stayed in the parent, and who waits for them here hangs, or crashes."""
    _running.clear()
    for group in dist.distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # the interpreter's end would destroy it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_groups_to_the_parent)


@contextlib.contextmanager
def listening_on_loopback(active: bool = True) -> Iterator[None]:
    """Make gloo groups that are created inside listen on loopback only. A GLOO_SOCKET_IFNAME set by the user is kept."""
    name = _loopback_interface()
    if not active or name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)


def _loopback_interface() -> str | None:
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def _environment_of_default_group(env: RankEnvironment) -> RankEnvironment:
    """Describe this process by the group that somebody initialised; the variables only say what is local."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if (env.rank, env.size) == (rank, size):
        return env
    return RankEnvironment(rank=rank, size=size, local_rank=rank, local_size=size, launcher="process group")


def _start_default_group(env: RankEnvironment, choice: DeviceChoice, timeout: timedelta) -> NodeWatch | None:
    wait_s = min(timeout.total_seconds(), _START_TIMEOUT_S)
    named = gloo_interface()
    if env.one_node and named is not None:
        check_named(named, env.address)
    address = "" if env.one_node else _use_interface(env, named)
    store, places = meet(env, wait_s)
    if not env.one_node and not address:  # the name of the first node was not known yet
        address = _use_interface(env, named)
    watch = None
    if not env.one_node and address and node_timeout_s():
        watch = NodeWatch.start(env.rank, places, store, address, node_timeout_s(), wait_s)
    # CPU tensors must travel also where the device's own backend takes none.
    backend = "gloo" if choice.backend == "gloo" else f"cpu:gloo,{choice.device.type}:{choice.backend}"
    dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.size, timeout=timeout)
    return watch


def _use_interface(env: RankEnvironment, named: str | None) -> str:
    """Name the interface towards the other nodes to gloo, for all groups from now on; return this machine's address there."""
    found = choose_interface(env.address, env.port, named)
    if found.name and named is None:
        # Left there: groups that somebody makes later need it too.
        os.environ["GLOO_SOCKET_IFNAME"] = found.name
    return found.address
