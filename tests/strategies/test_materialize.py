"""Models that were built without values: what is tied stays tied, and what has values keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain.strategies import materialize
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract_models import GPT
from drivetrain.strategies.world import World
from torch import Tensor, nn


class Tied(nn.Module):
    """An embedding and a head with one weight; the head has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 16)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed(x)))


def fill_all(model: nn.Module) -> None:
    materialize.walk(
        model, lambda name, module: _nothing(materialize.fill(model, name, module, torch.device("cpu"))), lambda *_: None
    )


def _nothing(_: object) -> None: ...


def test_tied_weights_stay_tied_and_have_the_values_of_the_first() -> None:
    """The bias of the second module is filled with it, which must not draw the weight anew."""
    with torch.device("meta"):
        model = Tied()
    torch.manual_seed(3)
    fill_all(model)
    assert not materialize.has_meta(model)
    assert model.lm_head.weight is model.embed.weight
    torch.manual_seed(3)
    assert torch.equal(model.embed.weight, nn.Embedding(16, 8).weight)
    assert torch.equal(model.body.weight, nn.Linear(8, 8).weight)


def test_a_buffer_that_has_values_keeps_them() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    model.running_mean = torch.full((3,), 7.0)
    fill_all(model)
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [7.0, 7.0, 7.0]
    assert model.weight.tolist() == [1.0, 1.0, 1.0]


def trained(words: str, meta: bool) -> tuple[bool, int, list[float]]:
    """Whether the weight is still one, how many parameters there are, and three losses; from rank 0's or given values."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words)
    strategy.start(world)
    if meta:
        with torch.device("meta"):
            model = GPT(0)
    else:
        model = GPT(0)
    values = {f"model/model/{key}": value.clone() for key, value in GPT(0).state_dict().items()}
    _, (optimizer,) = strategy.prepare({"model": model}, lambda: [torch.optim.SGD(model.parameters(), lr=0.1)])
    strategy.load_state_tensors({"model": model}, {}, list(values), values.__getitem__, {})
    tokens = torch.randint(0, 16, (4, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = strategy.bind(model, "step")({"x": tokens, "y": tokens}, False)
        strategy.backward(loss)
        strategy.step(optimizer)
        losses.append(float(loss.detach()))
    found = model.lm_head.weight is model.wte.weight, len(list(model.parameters())), losses
    strategy.stop()
    world.stop()
    return found


@pytest.mark.parametrize(("words", "n"), [("fsdp", 2), ("fsdp:2+tp:2", 4)])
def test_a_tied_model_without_values_trains_like_one_with(words: str, n: int, ranks: Any) -> None:
    """Where the weight fell in two, the losses would part after the first step."""
    (_, count, truth), *_ = ranks(1, trained, "single", False)
    for tied, parameters, losses in ranks(n, trained, words, True):
        assert tied
        assert parameters == count
        assert losses == pytest.approx(truth, rel=1e-5)
