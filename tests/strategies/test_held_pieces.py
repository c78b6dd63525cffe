"""Who holds what is said before the first step as it is found after it."""

from __future__ import annotations

from typing import Any

import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.world import World
from torch import nn

KINDS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adadelta": lambda parameters: torch.optim.Adadelta(parameters),
}


def said(kind: str) -> tuple[str, str]:
    world = World.start("cpu")
    strategy = make_strategy("fsdp")
    strategy.start(world)
    model = nn.Linear(8, 8)
    _, (optimizer,) = strategy.prepare({"model": model}, lambda: [KINDS[kind](model.parameters())])
    before = dict(strategy.explain())["optimizer state held"]
    strategy.backward(model(torch.ones(2, 8)).sum())
    strategy.step(optimizer)
    after = dict(strategy.explain())["optimizer state held"]
    strategy.stop()
    world.stop()
    return before, after


def test_the_state_of_an_optimizer_is_known_before_it_is_there(ranks: Any) -> None:
    """72 parameters of 4 bytes, half of them on each of two ranks."""
    expected = {
        "AdamW": ("288 of 576 bytes on this rank after the first step (AdamW)", "288 of 576 bytes on this rank (AdamW)"),
        "SGD with momentum": ("144 of 288 bytes on this rank after the first step (SGD)", "144 of 288 bytes on this rank (SGD)"),
        "SGD": ("0 of 0 bytes on this rank after the first step (SGD)", "0 of 0 bytes on this rank after the first step (SGD)"),
        "Adadelta": ("known after the first step (Adadelta)", "288 of 576 bytes on this rank (Adadelta)"),
    }
    for kind, lines in expected.items():
        assert ranks(2, said, kind)[0] == lines
