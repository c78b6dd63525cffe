"""What DeepSpeed saves is read by every other strategy, and the other way round, on other numbers of ranks and in other stages.

A run of four steps is cut in two; the second half is trained by another strategy from what the first saved, and gives the losses
and weights of the plain loop. Optimizers with momentum and with counters: what were lost would be seen.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.checkpoint.store import CheckpointStore
from drivetrain.strategies.contract import CASES, Case, _build, _one_step, plain_loop, windows
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.deepspeed_state import boxes
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.strategies.world import World
from drivetrain.trainer.state import source_of
from torch import nn

library(torch.device("cpu"))

CASE: Case = replace(next(c for c in CASES if c.name == "fp32 adamw window 3, clipped"), steps=4)


def half(strategy_name: str, options: dict[str, Any], which: int, folder: Path) -> tuple[list[float], dict[str, list[float]]]:
    """Train the first (0) or second (1) half of the case; the first saves into `folder`, the second begins with what is there."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(strategy_name, **options)
    strategy.start(world)
    models, make_optimizers = _build(CASE)
    prepared, optimizers = strategy.prepare(models, lambda: make_optimizers(models))
    named = {"optimizer": optimizers[0]}
    store = CheckpointStore(folder, world)
    if which:
        with store.open(2) as checkpoint:
            values = {n: checkpoint.value(n) for n in checkpoint.value_names()}
            strategy.load_state_tensors(models, named, checkpoint.names(), source_of(checkpoint), values)
    steps = [strategy.bind(model, "step") for model in models.values()]
    part = list(windows(CASE))[2 * which : 2 * which + 2]
    losses = [_one_step(strategy, world, CASE, w, models, prepared, optimizers, steps) for w in part]
    if not which:
        tensors, values = strategy.state_tensors(models, named)
        store.save(2, tensors, values)
    weights = {n: t.flatten().tolist() for n, t in strategy.full_state_dict(models["model"]).items()}
    strategy.stop()
    world.stop()
    return losses, weights


WAYS = [(("deepspeed:2", 2), ("ddp", 1)), (("fsdp", 2), ("deepspeed:3", 2))]
MORE_WAYS = [
    (("deepspeed:3", 2), ("fsdp", 2)),
    (("ddp", 2), ("deepspeed:3", 2)),
    (("fsdp", 2), ("deepspeed:1", 1)),
    (("deepspeed:3", 2), ("deepspeed:2", 1)),
    (("single", 1), ("deepspeed:2", 2)),
]


@pytest.mark.parametrize(
    ("first", "second"),
    [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in MORE_WAYS)],
    ids=lambda v: f"{v[0]} on {v[1]}",
)
def test_the_second_half_goes_on_under_another_strategy(
    first: tuple[str, int], second: tuple[str, int], ranks: Any, tmp_path: Path
) -> None:
    truth = plain_loop(CASE)
    losses: list[float] = []
    weights: dict[str, list[float]] = {}
    for which, (name, size) in enumerate((first, second)):
        found = ranks(size, half, name, {}, which, tmp_path)
        losses += found[0][0]
        weights = found[0][1]
    assert losses == pytest.approx(truth.losses, rel=1e-6)
    for name, weight in truth.weights.items():
        assert weights[name.removeprefix("model/")] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_then_one_then_two_are_two_throughout(stage: int, ranks: Any, tmp_path: Path) -> None:
    """The state that came through one rank is the state: the same bits go in and out."""
    straight = ranks(2, half, f"deepspeed:{stage}", {}, 0, tmp_path / "a")
    direct = ranks(2, half, f"deepspeed:{stage}", {}, 1, tmp_path / "a")
    ranks(1, through, f"deepspeed:{stage}", tmp_path / "a", tmp_path / "b")
    around = ranks(2, half, f"deepspeed:{stage}", {}, 1, tmp_path / "b")
    assert straight[0][0]
    assert around == direct


def through(strategy_name: str, source: Path, target: Path) -> None:
    """Load, and save again what was loaded."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(strategy_name)
    strategy.start(world)
    models, make_optimizers = _build(CASE)
    _, optimizers = strategy.prepare(models, lambda: make_optimizers(models))
    with CheckpointStore(source, world).open(2) as checkpoint:
        values = {n: checkpoint.value(n) for n in checkpoint.value_names()}
        strategy.load_state_tensors(models, {"optimizer": optimizers[0]}, checkpoint.names(), source_of(checkpoint), values)
    CheckpointStore(target, world).save(2, *strategy.state_tensors(models, {"optimizer": optimizers[0]}))
    strategy.stop()
    world.stop()


def refused(tmp: Path) -> tuple[str, bool, str]:
    """Load the state of another model: it is told, and nothing is changed."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy("deepspeed:3")
    strategy.start(world)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"model": nn.Linear(3, 2)}
    strategy.prepare(models, lambda: [torch.optim.SGD(models["model"].parameters(), lr=0.1)])
    before = strategy.full_state_dict(models["model"])
    other = {"model/model/weight": torch.zeros(2, 4), "model/model/bias": torch.zeros(2)}
    with pytest.raises(CheckpointError) as caught:
        strategy.load_state_tensors(models, {}, list(other), other.__getitem__, {})
    after = strategy.full_state_dict(models["model"])
    with pytest.raises(ConfigError, match="has an optimizer already") as second:
        strategy.prepare({}, [torch.optim.SGD(models["model"].parameters(), lr=0.1)])
    strategy.stop()
    world.stop()
    return str(caught.value), all(torch.equal(before[k], after[k]) for k in before), str(second.value)


def test_the_state_of_another_model_is_refused_and_nothing_changes(ranks: Any, tmp_path: Path) -> None:
    ((said, same, _),) = ranks(1, refused, tmp_path)
    assert "model/model/weight (2, 4) for (2, 3)" in said
    assert same


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 3), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_make_up_any_stretch_of_a_flattened_tensor_in_its_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = list(boxes(start, stop, shape))
        parts = [whole[tuple(slice(c, c + n) for c, n in zip(*box, strict=True))].reshape(-1) for box in found]
        assert [int(i) for part in parts for i in part] == list(range(start, stop))
        assert len(found) <= max(1, 2 * len(shape) - 1)
