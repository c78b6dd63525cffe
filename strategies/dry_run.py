"""A run on a thousand processes, tried on one: who holds how many bytes, and what a step sends over which axis of the mesh.

    with dry_world(1024) as world:
        with torch.device("meta"):
            model = Llama(...)                                          # no memory
        run = dry_run(model, "fsdp:128+tp:8", batch, world, lambda model, batch: model(batch).mean())
    run.explain()          rows: parameters, gradients, optimizer state, peak; bytes sent on each axis

The strategy is the real one, on a process group that sends nothing (torch's "fake"), and the tensors are torch's fake ones, that
have no memory: what is measured is what would be allocated and sent. Rank 0 is tried; ranks of other stages or with uneven pieces
hold a little less or more. Not in it: the allocator's fragments, buffers of the communication library, and time.
Source: torch.testing._internal.distributed.fake_pg, torch._subclasses.FakeTensorMode, torch.distributed._tools.fsdp2_mem_tracker,
all private: tests/strategies/test_dry_run.py says when they change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .base import Strategy, make_strategy
from .devices.base import DeviceChoice, choose_device
from .dtensors import local
from .environment import RankEnvironment
from .errors import ConfigError
from .world import World

if TYPE_CHECKING:
    from .mesh import Mesh

__all__ = ["DryRun", "DryWorld", "dry_run", "dry_world"]


class DryWorld(World):
    """Rank 0 of so many processes that are not there: what the others would send is taken to be what this one has."""

    def __init__(self, env: RankEnvironment, choice: DeviceChoice, group: dist.ProcessGroup | None) -> None:
        super().__init__(env, choice, group)
        self.parameter_device = torch.device("meta")

    def barrier(self) -> None: ...

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        return value

    def gather_json(self, value: Any) -> list[Any]:
        return [value] * self.size

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        return value

    def gather_object(self, value: Any) -> list[Any]:
        return [value] * self.size


@contextlib.contextmanager
def dry_world(size: int, *, local_size: int = 8) -> Iterator[DryWorld]:
    """A world of `size` processes, `local_size` on each node, whose groups send nothing.

    Raises:
        ConfigError: this process has a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError(
            "A dry run needs a process without a process group, and this one has one. Run it in a process of its own."
        )
    local_size = min(local_size, size)
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    env = RankEnvironment(rank=0, size=size, local_rank=0, local_size=local_size, launcher="dry run")
    world = DryWorld(env, choose_device("cpu"), dist.group.WORLD)
    try:
        yield world
    finally:
        world.stop()
        dist.destroy_process_group()


@dataclass
class DryRun:
    """What rank 0 would hold and send.

    Attributes:
        parameters, gradients, optimizer: bytes held between steps (gradients: at a step's end).
        peak: the most bytes at once in a step, activations and gathered parameters among them; by kind in `peak_kinds`.
        total: bytes of all parameters, wherever they are.
        sent: axis -> operation -> (calls, bytes of the larger side) of one step.
        rows: what the strategy says itself.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    peak: int = 0
    peak_kinds: dict[str, int] = field(default_factory=dict)
    total: int = 0
    sent: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    rows: list[tuple[str, str]] = field(default_factory=list)

    def explain(self) -> list[tuple[str, str]]:
        """Rows (what, how) for a table."""
        rows = [
            *self.rows,
            ("parameters of a rank", f"{self.parameters:,} of {self.total:,} bytes"),
            ("gradients of a rank", f"{self.gradients:,} bytes"),
            ("optimizer state of a rank", f"{self.optimizer:,} bytes"),
            ("peak of a step", f"{self.peak:,} bytes: " + ", ".join(f"{k} {v:,}" for k, v in self.peak_kinds.items())),
        ]
        for axis, operations in self.sent.items():
            said = ", ".join(f"{count} x {name} {size:,}" for name, (count, size) in sorted(operations.items()))
            rows.append((f"sent on {axis}", f"{sum(size for _, size in operations.values()):,} bytes a step: {said}"))
        return rows


def dry_run(
    model: nn.Module,
    strategy: str | Strategy,
    batch: Any,
    world: DryWorld,
    step: Callable[[nn.Module, Any], Tensor],
    *,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> DryRun:
    """Prepare `model` with `strategy`, take two steps, and return what the second held and sent.

    Args:
        model: built on the meta device.
        batch: of one process; tensors of any device, of which only shape and dtype count.
        step: (model, batch) -> the loss, 0-d.
        optimizer: parameters -> optimizer, which must not read values (AdamW(fused=True) does not); AdamW by default.
    Raises:
        ConfigError: the model holds values, or the strategy cuts nothing up (ddp: each rank holds all of it).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.fsdp import FSDPModule

    if held := [name for name, p in model.named_parameters() if not p.is_meta]:
        raise ConfigError(
            f"A dry run takes a model without values, and {held[0]} has some. Build it inside `with torch.device('meta'):`."
        )
    made = make_strategy(strategy)
    made.start(world)
    total = _bytes(model.parameters())
    prepared, _ = made.prepare({"model": model}, [])
    if not isinstance(model, FSDPModule):
        raise ConfigError(
            f"A dry run is for strategies that cut the model up, and {made.name!r} gives each rank all {total:,} bytes of it. "
            "Use 'fsdp', 'hsdp' or a plan."
        )
    assert made.precision is not None
    found = DryRun(total=total, rows=made.explain())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        chosen = torch.optim.AdamW(model.parameters(), fused=True) if optimizer is None else optimizer(model.parameters())
        tracker = FSDPMemTracker(model, chosen)
        batch = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), batch)
        for last in (False, True):
            sent = _Sent(made.mesh if hasattr(made, "mesh") else None)  # pyright: ignore[reportAttributeAccessIssue]
            with sent, tracker:
                with made.precision.autocast(torch.device("cpu")):
                    loss = step(prepared["model"], batch)
                made.backward(loss)
                del loss
                if last:
                    found.gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
                chosen.step()
                chosen.zero_grad()
                if not last:
                    tracker.reset_mod_stats()
        found.parameters = _bytes(model.parameters())
        found.optimizer = _bytes(t for state in chosen.state.values() for t in state.values() if isinstance(t, Tensor))
        for device, kinds in tracker.get_tracker_snapshot("peak").items():
            if device.type == "cpu":
                named = {str(getattr(kind, "value", kind)): int(size) for kind, size in kinds.items()}
                found.peak = named.pop("Total", sum(named.values()))
                found.peak_kinds = {kind: size for kind, size in named.items() if size}
        found.sent = {axis: dict(operations) for axis, operations in sent.by_axis.items()}
    made.stop()
    return found


class _Sent(TorchDispatchMode):
    """Counts the collectives of the step, and their bytes, by the axis whose group they go over."""

    def __init__(self, mesh: Mesh | None) -> None:
        super().__init__()
        self.by_axis: dict[str, dict[str, tuple[int, int]]] = {}
        self._axes: dict[str, str] = {}
        if mesh is not None:
            for axis in ("world", "loss", "batch", "fsdp", "dp_replicate", "dp_shard", "cp", "tp", "pp"):
                group = mesh.world.group() if axis == "world" else mesh.group(axis)
                if group is not None:
                    self._axes[group.group_name] = axis

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func._opname:
            size = max(
                (t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)), default=0
            )
            axis = self._axes.get(_group_name(args), "another group")
            name = func._opname.strip("_").removesuffix("_")
            operations = self.by_axis.setdefault(axis, {})
            count, before = operations.get(name, (0, 0))
            operations[name] = count + 1, before + size
        return out


def _group_name(args: Any) -> str:
    """The name of the group that a collective's arguments hold: as a string, or as a boxed ProcessGroup."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                return dist.ProcessGroup.unbox(arg).group_name
    names = [arg for arg in args if isinstance(arg, str)]
    return names[-1] if names else ""


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in map(local, tensors))
