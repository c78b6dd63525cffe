"""float8 under tensor parallel: matrices that are cut have the scales of the whole, and the losses of one process in float8."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_precision, make_strategy
from drivetrain.strategies.contract_models import Llama
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.precision.float8_ao import Float8AO, Float8Recipe
from drivetrain.strategies.precision.linears import LowPrecisionLinear
from drivetrain.strategies.world import World
from torch import nn

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")


class Wide(Llama):
    """Of multiples of 16 on each of two ranks; the projections of attention have biases."""

    def __init__(self) -> None:
        super().__init__(vocabulary=64, dim=64, layers=2, kv_heads=4, hidden=96)
        for layer in self.layers:
            for name in ("wq", "wo"):
                linear = nn.Linear(64, 64)
                with torch.no_grad():
                    linear.weight.copy_(getattr(layer.attention, name).weight)
                    linear.bias.copy_(torch.linspace(-0.1, 0.1, 64))
                setattr(layer.attention, name, linear)


def losses(words: str, precision: Any, steps: int = 5, **options: Any) -> tuple[list[float], int]:
    """The losses of some steps of AdamW, and how many Linears are cut and in float8."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words, **options)
    strategy.precision = make_precision(precision)
    strategy.start(world)
    model: Any = Wide()
    _, (optimizer,) = strategy.prepare({"model": model}, lambda: [torch.optim.AdamW(model.parameters(), lr=1e-3)])
    step = strategy.bind(model, "step")
    found: list[float] = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(0, 64, (4, 8), generator=generator)
        optimizer.zero_grad()
        with strategy.precision.autocast(strategy.device):
            loss = step({"x": tokens, "y": (tokens * 3 + 1) % 64}, False)
        strategy.backward(loss)
        strategy.step(optimizer)
        found.append(float(loss.detach()))
    cut = sum(isinstance(m, LowPrecisionLinear) and m.split is not None for m in model.modules())
    strategy.stop()
    world.stop()
    return found, cut


@pytest.mark.parametrize(("words", "n"), [("tp:2", 2), ("tp:2+sp", 2), ("fsdp:2+tp:2", 4)])
def test_scales_are_those_of_the_whole_matrix(words: str, n: int, ranks: Any) -> None:
    """Beside float8 everything is fp32, so that the first loss, and the gradients that the next ones come from, differ by
    rounding alone. Scales of a rank's own half would be off by a factor, and the loss in its third digit."""
    truth, _ = ranks(1, losses, "single", Float8AO(base="fp32"))[0]
    for found, cut in ranks(n, losses, words, Float8AO(base="fp32")):
        assert cut == 13  # of 15 the first Linear and the last are left in fp32
        assert found[0] == pytest.approx(truth[0], rel=1e-5)
        assert found == pytest.approx(truth, rel=2e-4)


def test_it_is_not_bf16(ranks: Any) -> None:
    truth, _ = ranks(1, losses, "single", "fp8-ao")[0]
    (found, _), *_ = ranks(2, losses, "tp:2", "fp8-ao")
    (high, _), *_ = ranks(2, losses, "tp:2", "bf16-mixed")
    assert found == pytest.approx(truth, rel=1e-2)
    assert all(a != b for a, b in zip(found, high, strict=True))


REFUSED = [
    pytest.param("fp8-ao-rowwise", r"layers\.0\..*float8 rowwise.*scales each row by itself.*precision='fp8-ao'", id="rowwise"),
    pytest.param(Float8AO(Float8Recipe(fsdp_all_gather=True)), "fsdp_all_gather was asked for with tp", id="gathered in float8"),
]


@pytest.mark.parametrize(("precision", "says"), REFUSED)
def test_what_does_not_go_with_tp_is_refused_by_name(precision: Any, says: str, ranks: Any) -> None:
    with pytest.raises(ConfigError, match=says):
        ranks(2, losses, "tp:2", precision)
