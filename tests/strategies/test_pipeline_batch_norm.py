"""BatchNorm in a pipeline: the numbers of a plain loop over the chunks, if that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain.strategies.contract_models import ConvNet
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.mesh import ParallelPlan
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.pipeline_chunks import Chunk
from drivetrain.strategies.pipeline_options import Pipeline
from drivetrain.strategies.world import World
from torch import Tensor, nn

SAMPLES = (8, 5, 3, 8)
"""Of each batch; four chunks, so one of the third is run for nothing."""


def batch(i: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    n = SAMPLES[i]
    x = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(0, 5, (n, 4), generator=generator)}


def build() -> ConvNet:
    return ConvNet(3, batch_norm=True).double()


def plain() -> tuple[list[float], dict[str, Tensor]]:
    """A plain loop over the chunks of each batch, their losses weighted by their samples."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses: list[float] = []
    for i, n in enumerate(SAMPLES):
        whole = batch(i)
        chunks = [part for part in zip(*(whole[key].tensor_split(4) for key in ("x", "y")), strict=True) if len(part[0])]
        optimizer.zero_grad()
        total = 0.0
        for x, y in chunks:
            loss = model.loss(model(x), {"y": y}, False) * (len(x) / n)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    model.eval()
    losses.append(model.loss(model(batch(0)["x"]), batch(0), False).item())
    return losses, model.state_dict()


def in_stages(schedule: str, **options: Any) -> Any:
    world = World.start("cpu", need_group=True)
    pipeline = Pipeline(schedule=schedule, microbatches=4, batch_norm="chunk")
    strategy = ParallelStrategy(plan=ParallelPlan(pp=2), pipeline=pipeline, **options)
    strategy.start(world)
    model = build()
    _, (optimizer,) = strategy.prepare({"model": model}, lambda: [torch.optim.SGD(model.parameters(), lr=0.1)])
    pipe = strategy.pipeline_of(model)
    assert pipe is not None

    def loss_of(output: Tensor, chunk: Chunk) -> Tensor:
        return model.loss(output, chunk.batch, False) * chunk.share

    losses: list[float] = []
    for i in range(len(SAMPLES)):
        optimizer.zero_grad()
        found = pipe.run(batch(i), loss_of, backward=True)
        losses.append(float(sum(found)))
        strategy.step(optimizer)
    for stage in pipe.modules:
        stage.eval()
    found = pipe.run(batch(0), loss_of, backward=False)
    losses.append(float(sum(found)))
    whole = strategy.full_state_dict(model)
    rows = strategy.explain()
    world.stop()
    return losses, whole, rows


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zbv", marks=pytest.mark.slow)])
def test_losses_weights_and_running_statistics_are_those_of_a_plain_loop_over_the_chunks(schedule: str, ranks: Any) -> None:
    """A chunk that only fills the schedule leaves no trace in the statistics."""
    losses, state = plain()
    first, second = ranks(2, in_stages, schedule)
    last = first if schedule == "zbv" else second
    assert last[0] == pytest.approx(losses, rel=1e-12)
    assert first[1].keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-11, atol=1e-13)
    assert state["first_norm.num_batches_tracked"] == 15
    assert ("batch norm", "by the statistics of each chunk, 4 of a batch, as asked for") in first[2]


def refused(model: nn.Module, **options: Any) -> str:
    world = World.start("cpu", need_group=True)
    strategy = ParallelStrategy(plan=ParallelPlan(pp=2), **options)
    try:
        strategy.start(world)
        strategy.prepare({"model": model}, [])
    except ConfigError as error:
        return str(error)
    finally:
        world.stop()
    return ""


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), {}, "Pipeline(batch_norm='chunk')"),
        (nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, track_running_stats=True)), {}, "InstanceNorm1d"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"sync_batchnorm": True}, "sync_batchnorm=True"),
    ],
)
def test_what_depends_on_the_chunks_is_refused_unless_asked_for(
    model: nn.Module, options: dict[str, Any], why: str, ranks: Any
) -> None:
    for message in ranks(2, refused, model, **options):
        assert why in message


def test_an_unknown_word_for_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'chunk'"):
        Pipeline(batch_norm="batch")
