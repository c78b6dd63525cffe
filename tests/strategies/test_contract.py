"""Every strategy gives the numbers of one plain PyTorch loop; and the suite that says so can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import Strategy, make_precision, make_strategy
from drivetrain.strategies.contract import CASES, Case, ContractError, check_precision, check_strategy
from drivetrain.strategies.world import World
from torch import Tensor, nn

QUICK = [replace(c, steps=6) for c in CASES if c.dtype == torch.float64]


def outcomes(strategy: str, cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start()
    results = check_strategy(lambda: make_strategy(strategy), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


def test_single_gives_the_numbers_of_a_plain_loop() -> None:
    results = check_strategy(Strategy, World.single())
    assert [r.outcome for r in results] == ["pass"] * len(CASES)


@pytest.mark.parametrize("size", [2, 4])
def test_ddp_gives_the_numbers_of_a_plain_loop(ranks: Any, size: int) -> None:
    for found in ranks(size, outcomes, "ddp", QUICK):
        assert [o for _, o, _ in found] == ["pass"] * len(QUICK), found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ddp_gives_the_numbers_of_a_plain_loop_over_fifty_steps(ranks: Any, size: int) -> None:
    for found in ranks(size, outcomes, "ddp", CASES, timeout=300):
        assert [o for _, o, _ in found] == ["pass"] * len(CASES), found


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "fp16-mixed"])
def test_a_low_precision_is_near_fp32_and_not_equal_to_it(precision: str) -> None:
    check_precision(make_precision(precision), World.single())


class ForgetsTheNorm(Strategy):
    """Counts one parameter less in the norm, as a sharded strategy with a hole would."""

    def grad_norm(self, parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        return super().grad_norm(parameters[1:], norm_type)


class ForgetsState(Strategy):
    """Saves models without their optimizers' state."""

    def state_tensors(self, models: Any, optimizers: Any) -> Any:
        tensors, values = super().state_tensors(models, optimizers)
        return {n: t for n, t in tensors.items() if n.startswith("model/")}, values


@pytest.mark.parametrize("wrong", [ForgetsTheNorm, ForgetsState])
def test_the_suite_fails_for_a_strategy_that_is_wrong(wrong: type[Strategy]) -> None:
    with pytest.raises(ContractError, match="fail"):
        check_strategy(wrong, World.single(), cases=QUICK)


def test_a_precision_that_does_nothing_is_found_out() -> None:
    idle = make_precision("fp32")
    idle.name = "idle"
    with pytest.raises(ContractError, match="does nothing"):
        check_precision(idle, World.single())
