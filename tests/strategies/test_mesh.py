"""ParallelPlan and Mesh: degrees that fit the processes, axes with the right neighbours, refusals that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain.strategies.errors import ConfigError, UnknownName
from drivetrain.strategies.mesh import Mesh, ParallelPlan, mesh_of
from drivetrain.strategies.world import World


@pytest.mark.parametrize(
    ("plan", "size", "shard"),
    [
        (ParallelPlan(dp_shard=-1), 8, 8),
        (ParallelPlan(dp_replicate=2, dp_shard=-1), 8, 4),
        (ParallelPlan(dp_shard=-1, tp=2, pp=2), 8, 2),
        (ParallelPlan(dp_shard=-1), 1, 1),
        (ParallelPlan(dp_shard=4, ep=2), 4, 4),
    ],
)
def test_minus_one_takes_what_is_left(plan: ParallelPlan, size: int, shard: int) -> None:
    assert plan.resolve(size).dp_shard == shard


def test_a_wrong_product_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"1\*1\*2\*1\*2 = 4 on 8 processes\. Set dp_shard=-1 .*\(4\), or launch 4"):
        ParallelPlan(dp_shard=2, tp=2).resolve(8)
    with pytest.raises(ConfigError, match="Make the other degrees divide 4, or launch 6 processes"):
        ParallelPlan(dp_shard=2, tp=3).resolve(4)
    with pytest.raises(ConfigError, match=r"8 is no multiple of 3\. Launch 6 or 9 processes"):
        ParallelPlan(dp_shard=-1, tp=3).resolve(8)


@pytest.mark.parametrize(
    ("degrees", "says"),
    [
        ({"tp": 0}, r"ParallelPlan\(tp=0\)"),
        ({"dp_shard": 2.0}, r"dp_shard=2\.0"),
        ({"cp": True}, r"cp=True"),
        ({"dp_shard": -1, "tp": -1}, "dp_shard and tp are both -1"),
        ({"ep": -1}, "Say how many"),
    ],
)
def test_a_degree_that_is_none_is_refused(degrees: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ParallelPlan(**degrees)


def test_experts_take_ranks_that_are_there() -> None:
    with pytest.raises(ConfigError, match=r"dp_shard\*cp = 4, which 3 does not divide"):
        ParallelPlan(dp_shard=4, ep=3).resolve(4)


def test_one_process_without_a_group_is_told_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"World.start\(need_group=True\)"):
        mesh_of(World.single(), ParallelPlan())


def alone() -> tuple[Any, ...]:
    world = World.start("cpu", need_group=True)
    mesh = mesh_of(world, ParallelPlan(dp_shard=-1))
    found = mesh.axes, mesh.size("fsdp"), mesh.index("batch"), mesh.group("dp_shard")
    world.stop()
    return found


def test_one_process_with_a_group_has_a_mesh(ranks: Any) -> None:
    assert ranks(1, alone) == [(("dp_shard",), 1, 0, None)]


def places(plan: ParallelPlan) -> dict[str, Any]:
    """Who a rank shares each axis with, found out by summing ranks over its group."""
    world = World.start("cpu")
    mesh = mesh_of(world, plan)
    assert mesh_of(world, plan) is mesh
    found: dict[str, Any] = {}
    for axis in ("dp_replicate", "dp_shard", "tp", "batch", "fsdp"):
        group = mesh.group(axis)
        with_whom = [world.rank] if group is None else dist.get_process_group_ranks(group)
        if group is not None:
            total = torch.tensor([float(world.rank)])
            dist.all_reduce(total, group=group)
            assert total.item() == sum(with_whom)
        found[axis] = (mesh.index(axis), mesh.size(axis), with_whom)
    assert world.group("dp_shard") is mesh.group("dp_shard")
    with pytest.raises(UnknownName, match="dp_shard"):
        world.group("dp_shards")
    world.stop()
    return found


def test_inner_axes_are_neighbours(ranks: Any) -> None:
    found = ranks(4, places, ParallelPlan(dp_replicate=2, dp_shard=2))
    assert found[1]["dp_shard"] == (1, 2, [0, 1])
    assert found[2]["dp_replicate"] == (1, 2, [0, 2])
    assert [f["batch"] for f in found] == [(rank, 4, [0, 1, 2, 3]) for rank in range(4)]


def test_tensor_parallel_ranks_read_the_same_data(ranks: Any) -> None:
    found = ranks(4, places, ParallelPlan(dp_shard=2, tp=2))
    assert [f["batch"][:2] for f in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert found[3]["fsdp"] == (1, 2, [1, 3])
    assert found[3]["tp"] == (1, 2, [2, 3])


def test_a_thousand_ranks_are_laid_out_without_a_thousand_processes() -> None:
    """The fake backend of torch: one process that believes to be rank 700."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=700, world_size=1024, store=FakeStore())
    try:
        world = World.single()
        world.size, world.rank, world._group = 1024, 700, dist.group.WORLD
        mesh = Mesh(world, ParallelPlan(dp_replicate=2, dp_shard=-1, tp=8).resolve(1024))
        assert (mesh.size("batch"), mesh.index("batch"), mesh.index("tp")) == (128, 700 // 8, 700 % 8)
        group = mesh.group("batch")
        assert group is not None
        assert dist.get_process_group_ranks(group) == list(range(700 % 8, 1024, 8))
    finally:
        dist.destroy_process_group()
