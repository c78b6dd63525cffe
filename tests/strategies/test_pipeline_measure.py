"""Splits by measured time: what takes long lies apart, whatever its parameters, and measuring leaves no trace."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.mesh import ParallelPlan
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.pipeline_measure import measure
from drivetrain.strategies.pipeline_options import Pipeline
from drivetrain.strategies.pipeline_split import find_chain
from drivetrain.strategies.world import World
from torch import Tensor, nn

LONG_S = 0.25


class Slow(nn.Module):
    """Takes its time with eight parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(LONG_S)
        return self.drop(self.norm(x))


def build() -> nn.Sequential:
    return nn.Sequential(Slow(), nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 4))


def test_measuring_sees_the_clock_and_leaves_nothing_behind() -> None:
    model = build()
    with torch.device("meta"):
        model[2] = nn.Linear(64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = list(model.parameters())
    state = torch.get_rng_state()
    seconds = measure(model, find_chain(model), (torch.ones(3, 4),), torch.device("cpu"))
    assert seconds[0] >= LONG_S
    assert all(one > 0 for one in seconds)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert model[2].weight.is_meta
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[name]), name


def test_backward_passes_are_measured_where_there_are_any() -> None:
    seen: list[bool] = []

    class Notes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            seen.append(True)
            return grads[0]

    class Part(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return Notes.apply(super().forward(input))  # pyright: ignore[reportReturnType]

    model = nn.Sequential(Part(2, 2), Part(2, 2))
    measure(model, find_chain(model), (torch.ones(1, 2),), torch.device("cpu"))
    assert seen
    seen.clear()
    measure(model.requires_grad_(False), find_chain(model), (torch.ones(1, 2),), torch.device("cpu"))
    assert not seen


def chosen(splits: Any, example: Any) -> tuple[list[int], list[tuple[str, str]]]:
    world = World.start("cpu", need_group=True)
    pipeline = Pipeline(splits=splits, example=example, batch_norm="chunk")
    strategy = ParallelStrategy(plan=ParallelPlan(pp=2), pipeline=pipeline)
    strategy.start(world)
    model = build()
    strategy.prepare({"model": model}, [])
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    world.stop()
    return pipe.starts, pipe.explain()


def test_what_takes_long_lies_apart_on_all_ranks(ranks: Any) -> None:
    """By parameters the first two parts would lie together with the third's neighbour; by the clock the first is alone."""
    batch = (torch.ones(8, 4), torch.zeros(8))
    for starts, rows in ranks(2, chosen, "measure", batch):
        assert starts == [0, 1]
        assert any(key == "splits" and "measured time" in value for key, value in rows)
    assert [starts for starts, _ in ranks(2, chosen, "auto", None)] == [[0, 2], [0, 2]]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"splits": "measure"}, "example=batch"),
        ({"example": torch.ones(2)}, "example=batch"),
        ({"splits": "measure", "example": torch.ones(2), "cost": lambda name, module: 1.0}, "both say"),
        ({"splits": "measured"}, "'measure'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Pipeline(**options)
