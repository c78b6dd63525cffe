"""Objects that compute themselves (torchmetrics, torcheval's kind) give the number of all samples, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import ConfigError, DistributedError
from drivetrain.strategies.world import World
from drivetrain.trainer.metric_objects import load_objects_state, merge_objects_states, objects_state
from drivetrain.trainer.metrics import Metrics
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision


def alone() -> Metrics:
    return Metrics(World.single(), stage="train")


def scores(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def test_a_torchmetrics_object_is_computed_over_the_epoch_and_reset() -> None:
    metrics, f1, reference = alone(), MulticlassF1Score(3), MulticlassF1Score(3)
    for epoch in range(2):
        batch = scores(0, 0)
        for i in range(3):
            batch = scores(8, 10 * epoch + i)
            f1(*batch)
            reference.update(*batch)
            metrics.window = i
            metrics.log("f1", f1, on_step=True, on_epoch=True)
        assert metrics.flush_step() == {"f1_step": pytest.approx(MulticlassF1Score(3)(*batch).item())}
        assert metrics.flush_epoch() == {"f1_epoch": reference.compute().item()}
        reference.reset()
    assert metrics.flush_epoch() == {}


def test_a_collection_is_logged_by_log_dict() -> None:
    metrics = alone()
    collection = MetricCollection([MulticlassAccuracy(3), MulticlassPrecision(3)], prefix="val_")
    reference = collection.clone()
    for i in range(2):
        collection.update(*scores(8, i))
        reference.update(*scores(8, i))
        metrics.log_dict(collection, on_step=False, on_epoch=True)
    assert metrics.flush_epoch() == {name: value.item() for name, value in reference.compute().items()}
    metrics.log("all", collection, on_step=False, on_epoch=True)
    with pytest.raises(ConfigError, match=r"'all'.*log_dict"):
        metrics.flush_epoch()


@pytest.mark.parametrize("size", [2, 4])
def test_torchmetrics_over_ranks_is_the_metric_of_all_samples(on_ranks: Any, size: int) -> None:
    """The last rank has no sample at all: it only logs the object."""

    def one_rank(world: World) -> dict[str, float]:
        metrics = Metrics(world, stage="validate")
        f1, auroc = MulticlassF1Score(3), BinaryAUROC()
        for i in range(2):
            metrics.batch_samples = 0 if world.is_last else 5
            if not world.is_last:
                logits, target = scores(5 + world.rank, 10 * world.rank + i)
                f1.update(logits, target)
                auroc.update(logits[:, 0], (target == 0).long())
            metrics.log("f1", f1, on_step=False, on_epoch=True)
            metrics.log("auroc", auroc, on_step=False, on_epoch=True)
        return metrics.flush_epoch()

    every = [scores(5 + rank, 10 * rank + i) for rank in range(size - 1) for i in range(2)]
    logits, target = torch.cat([x for x, _ in every]), torch.cat([y for _, y in every])
    expected = {
        "f1": MulticlassF1Score(3)(logits, target).item(),
        "auroc": BinaryAUROC()(logits[:, 0], (target == 0).long()).item(),
    }
    assert on_ranks(size, one_rank) == [pytest.approx(expected)] * size


class Count:
    """The smallest object of torcheval's kind."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def update(self, value: int) -> None:
        self.seen.add(value)

    def compute(self) -> float:
        return float(len(self.seen))

    def reset(self) -> None:
        self.seen = set()


class MergingCount(Count):
    def merge_state(self, others: list[MergingCount]) -> MergingCount:
        for other in others:
            self.seen |= other.seen
        return self


def test_an_object_with_merge_state_is_merged_over_the_ranks(on_ranks: Any) -> None:
    def one_rank(world: World) -> Any:
        metrics, count = Metrics(world, stage="validate"), MergingCount()
        for value in (world.rank, 7):
            count.update(value)
            metrics.log("distinct", count, on_step=False, on_epoch=True)
        return metrics.flush_epoch(), count.seen

    assert on_ranks(3, one_rank) == [({"distinct": 4.0}, set())] * 3


def test_an_object_that_cannot_be_synchronised_is_refused_on_two_ranks_and_fine_on_one(on_ranks: Any) -> None:
    def one_rank(world: World) -> Any:
        metrics, count = Metrics(world, stage="validate"), Count()
        count.update(3)
        metrics.log("own", count, on_step=False, on_epoch=True, sync=False)
        found = metrics.flush_epoch()
        metrics.log("distinct", count, on_step=False, on_epoch=True)
        if world.size > 1:
            with pytest.raises(ConfigError, match=r"'distinct'.*merge_state"):
                metrics.flush_epoch()
        return found

    assert on_ranks(2, one_rank) == [{"own": 1.0}] * 2
    assert on_ranks(1, one_rank) == [{"own": 1.0}]


def test_an_object_that_one_rank_never_logged_is_an_error_on_all_and_no_hang(on_ranks: Any) -> None:
    def one_rank(world: World) -> str:
        metrics = Metrics(world, stage="validate")
        mean = MeanMetric()
        mean.update(1.0)
        if world.rank == 0:
            metrics.log("mean", mean, on_step=False, on_epoch=True)
        with pytest.raises(DistributedError) as error:
            metrics.flush_epoch()
        return str(error.value)

    assert all("'mean'" in message and "1 of 2 ranks" in message for message in on_ranks(2, one_rank))


def test_objects_and_values_do_not_share_a_name() -> None:
    metrics, mean = alone(), MeanMetric()
    mean.update(1.0)
    metrics.log("x", mean, on_step=False, on_epoch=True)
    with pytest.raises(ConfigError, match="'x'"):
        metrics.log("x", torch.tensor(1.0), on_step=False, on_epoch=True)
    with pytest.raises(ConfigError, match="second MeanMetric"):
        metrics.log("x", MeanMetric(), on_step=False, on_epoch=True)
    metrics.log("y", 1.0, on_step=False, on_epoch=True)
    with pytest.raises(ConfigError, match="'y'"):
        metrics.log("y", mean, on_step=False, on_epoch=True)
    with pytest.raises(ConfigError, match=r"'z'.*forward"):
        metrics.log("z", mean, on_step=True, on_epoch=True)


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f1 = MulticlassF1Score(3)
        self.auroc = BinaryAUROC()
        self.total = SumMetric()

    def see(self, seed: int) -> None:
        logits, target = scores(6, seed)
        self.f1.update(logits, target)
        self.auroc.update(logits[:, 0], (target == 0).long())
        self.total.update(logits.sum())

    def values(self) -> list[float]:
        return [float(self.f1.compute()), float(self.auroc.compute()), float(self.total.compute())]


def test_objects_go_on_after_a_resume_in_mid_epoch() -> None:
    whole, before, after = Scored(), Scored(), Scored()
    for seed in range(4):
        whole.see(seed)
    before.see(0)
    before.see(1)
    before.values()
    load_objects_state(after, objects_state(before))
    before.see(9)  # the state is a copy
    after.see(2)
    after.see(3)
    assert after.values() == whole.values()


def test_states_of_objects_on_two_ranks_are_merged_for_one() -> None:
    whole, parts, one = Scored(), [Scored(), Scored(), Scored()], Scored()
    for seed in range(4):
        whole.see(seed)
        parts[1 + seed % 2].see(seed)
    merge_objects_states(one, [objects_state(part) for part in parts])
    assert one.values() == pytest.approx(whole.values())
    assert one.f1._update_count == 4
