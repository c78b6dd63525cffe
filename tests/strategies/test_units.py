"""Which modules become units: the repeated blocks, what is asked for, and nothing that is tied to the outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import ConfigError, UnknownName
from drivetrain.strategies.units import choose_units
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, *, tied: bool = False, vocabulary: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def names(model: nn.Module, units: Any = "auto") -> list[str]:
    return [name for name, _ in choose_units(model, units)]


def test_repeated_blocks_are_units_and_the_rest_is_the_roots() -> None:
    assert names(Model()) == ["blocks.0", "blocks.1", "blocks.2"]


def test_layers_that_are_too_small_for_a_collective_are_not() -> None:
    assert names(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == []


def test_blocks_without_a_forward_are_looked_into() -> None:
    """A ModuleList as a block is never called, so nobody could say when its parameters are needed."""
    model = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))
    assert names(model) == ["0.0", "0.1", "1.0", "1.1"]


def test_big_layers_beside_the_blocks_are_units_of_their_own() -> None:
    with torch.device("meta"):
        model = Model(vocabulary=1_000_000)
    assert names(model) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]


def test_a_tied_weight_stays_with_the_root() -> None:
    """Two units would each cut their own copy, and the tie would be lost."""
    with torch.device("meta"):
        model = Model(vocabulary=1_000_000, tied=True)
    assert names(model) == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_block_used_twice_is_one_unit() -> None:
    model = Model()
    model.blocks[2] = model.blocks[0]
    assert names(model) == ["blocks.0", "blocks.1"]


def test_what_transformers_models_say_of_themselves_is_used() -> None:
    model: Any = Model()
    model._no_split_modules = ["LayerNorm"]
    assert names(model) == ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm"]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (None, []),
        (["Block"], ["blocks.0", "blocks.1", "blocks.2"]),
        ([Block], ["blocks.0", "blocks.1", "blocks.2"]),
        ([Block, "Embedding"], ["embedding", "blocks.0", "blocks.1", "blocks.2"]),
        (200, ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
        (lambda name, module: name.endswith("1"), ["blocks.1"]),
    ],
)
def test_units_are_those_asked_for(units: Any, expected: list[str]) -> None:
    assert names(Model(), units) == expected


def test_what_cannot_be_a_unit_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"no module of Model is of a class 'Blok'\. Did you mean 'Block'\?"):
        names(Model(), ["Blok"])
    with pytest.raises(ConfigError, match="blocks is a ModuleList, which has no forward"):
        names(Model(), [nn.ModuleList])
    with pytest.raises(ConfigError, match="says nothing about modules"):
        names(Model(), "Block")
    with pytest.raises(ConfigError, match="at least 1 parameter"):
        names(Model(), 0)
    with pytest.raises(ConfigError, match="is no module class"):
        names(Model(), [int])
