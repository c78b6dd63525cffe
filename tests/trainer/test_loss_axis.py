"""On a mesh, a loss and a logged value count once: ranks of tp and pp hold the same ones, ranks of cp have parts of a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.mesh import ParallelPlan, mesh_of
from drivetrain.strategies.world import World
from drivetrain.trainer.accumulation import Window
from drivetrain.trainer.metrics import Metrics
from torch.utils.data import DataLoader, TensorDataset


def on_a_mesh(degrees: dict[str, int]) -> dict[str, Any]:
    """What each rank makes of a loss over `1 + loss_index` items, and of values that depend on its place alone."""
    world = World.start("cpu")
    mesh = mesh_of(world, ParallelPlan(**degrees))
    place = world.loss_index
    window = Window(1, mesh.size("batch"), mesh.size("loss"))
    window.begin(None)
    scaled = window.weigh_sum(torch.tensor(8.0), 1 + place, world)
    factor = window.settle(world)
    metrics = Metrics(world, stage="train")
    metrics.batch_samples = 1 + place
    for reduce in ("mean", "sum", "max", "min"):
        metrics.log(reduce, torch.tensor(float(place)), on_step=False, on_epoch=True, reduce=reduce)
    found = {"duplicate": world.is_duplicate, "place": place, "total": window.total, **metrics.flush_epoch()}
    assert isinstance(factor, float)
    # The backward pass averages over the ranks of the loss: their sum, over their number, times the factor.
    found["gradient"] = scaled.item() / mesh.size("loss") * factor
    world.stop()
    return found


@pytest.mark.parametrize(
    "degrees", [{"dp_shard": 2, "tp": 2}, {"dp_shard": 2, "pp": 2}, {"dp_shard": 2, "cp": 2}, {"cp": 2, "tp": 2}]
)
def test_items_and_logged_values_count_once(degrees: dict[str, int], ranks: Any) -> None:
    found = ranks(4, on_a_mesh, degrees)
    parts = 4 if degrees == {"dp_shard": 2, "cp": 2} else 2
    total = sum(range(1, parts + 1))
    assert sorted(r["place"] for r in found if not r["duplicate"]) == list(range(parts))
    for rank in found:
        assert rank["total"] == total
        assert rank["gradient"] == pytest.approx(8.0 / total, rel=1e-12)
        assert rank["mean"] == pytest.approx(sum(p * (p + 1) for p in range(parts)) / total, rel=1e-12)
        assert (rank["sum"], rank["max"], rank["min"]) == (sum(range(parts)), parts - 1, 0)


def gathered(degrees: dict[str, int]) -> list[int] | str:
    accelerator = Accelerator()
    mesh = mesh_of(accelerator.world, ParallelPlan(**degrees))
    loader = accelerator.prepare_data_loader(DataLoader(TensorDataset(torch.arange(4)), batch_size=2))
    found: list[int] = []
    try:
        for (batch,) in loader:
            mine = torch.tensor([mesh.index("batch")]) if mesh.size("cp") == 1 else batch
            found += accelerator.gather_for_metrics(mine).tolist()
    except ConfigError as refusal:
        return str(refusal)
    finally:
        accelerator.end_training()
    return found


def test_what_tensor_parallel_ranks_share_is_gathered_once(ranks: Any) -> None:
    assert ranks(2, gathered, {"tp": 2}) == [[0], [0]]


def test_gathering_parts_of_a_sequence_is_refused_by_name(ranks: Any) -> None:
    assert all("cp=2" in text for text in ranks(2, gathered, {"cp": 2}))
