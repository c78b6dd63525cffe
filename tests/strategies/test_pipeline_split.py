"""How a model becomes a chain of modules, and how the chain is cut: found without running it, refused where it is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import TrainingModule
from drivetrain.strategies.contract_models import GPT, ConvNet, Llama
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.pipeline_options import SCHEDULES, Pipeline, make_pipeline
from drivetrain.strategies.pipeline_split import cost_of, cut, find_chain, free, split_at
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Chain(nn.Module):
    """Registered in another order than they are called in, with a loss and a metric beside."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.loss = nn.CrossEntropyLoss()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def names(model: nn.Module) -> list[str]:
    return [name for link in find_chain(model) for name in link.names]


def test_the_chain_is_in_the_order_of_the_calls() -> None:
    assert names(Chain()) == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]


def test_a_wrapper_is_opened_whether_it_has_a_forward_or_not() -> None:
    class WithForward(TrainingModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    class Without(TrainingModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Chain()

    assert names(WithForward()) == names(Without()) == [f"net.{name}" for name in names(Chain())]


def test_a_sequential_is_its_children_and_a_part_that_holds_blocks_is_opened() -> None:
    body = nn.Sequential(*(Block() for _ in range(3)))
    model = nn.Sequential(nn.Linear(4, 4), body, nn.Tanh(), nn.Linear(4, 2))
    assert names(model) == ["0", "1.0", "1.1", "1.2", "2", "3"]


def test_models_say_themselves_what_their_parts_are() -> None:
    assert names(Llama()) == ["tok_embeddings", *(f"layers.{i}" for i in range(4)), "norm", "output"]
    assert names(GPT(tied=False))[:3] == ["wte", "wpe", "h.0"]
    assert names(ConvNet()) == ["first", "first_norm", "second", "second_norm", "head"]


TOKENS = torch.arange(16).reshape(2, 8)


@pytest.mark.parametrize(
    ("model", "x"),
    [(Llama(), TOKENS), (GPT(tied=False), TOKENS), (ConvNet(), torch.ones(2, 3, 8, 8)), (Chain(), TOKENS % 7)],
)
def test_the_links_one_after_the_other_are_the_forward(model: nn.Module, x: Tensor) -> None:
    found: Any = x
    for link in find_chain(model):
        found = found if isinstance(found, tuple) else (found,)
        found = (model.get_submodule(link.names[0]) if link.call is None else link.call)(*found)
    torch.testing.assert_close(found, model(x), rtol=0, atol=0)


class Residual(Chain):
    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        x = embedded
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x) + embedded)


class Skipped(Chain):
    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        self.blocks[0](embedded)
        return self.head(self.norm(embedded))


class Masked(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x))


class Functional(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.embed(x))))


class Twice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks[0](self.blocks[0](self.embed(x)))))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Residual, "what norm returned"),
        (Skipped, "norm does not take just what blocks.0 returned"),
        (Masked, "blocks.0 takes 2 arguments"),
        (Functional, "what norm returned than to hand it on"),
        (Twice, "blocks.0 is called twice"),
    ],
)
def test_a_forward_that_is_no_chain_is_refused_and_says_where(model: type[Chain], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        find_chain(model())
    assert "pipeline_parts" in str(error.value)


def test_parameters_in_no_part_and_names_that_are_none_are_refused() -> None:
    class Loose(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    class Misspelt(Chain):
        def pipeline_parts(self) -> list[str]:
            return ["embed", "bloks", "norm", "head"]

    with pytest.raises(ConfigError, match="scale of Loose lies in no part"):
        find_chain(Loose())
    with pytest.raises(ConfigError, match=r"'bloks', which is no module of it\. Did you mean 'blocks'"):
        find_chain(Misspelt())


@pytest.mark.parametrize(
    ("costs", "stages", "starts"),
    [
        ([1, 1, 1, 1], 2, [0, 2]),
        ([0, 5, 5, 5, 5, 0, 9], 3, [0, 3, 5]),
        ([9, 1, 1, 1], 2, [0, 1]),
        ([0, 0, 0, 0], 4, [0, 1, 2, 3]),
        ([3, 3, 3], 1, [0]),
    ],
)
def test_the_cut_makes_the_costliest_stage_as_cheap_as_can_be(costs: list[float], stages: int, starts: list[int]) -> None:
    assert cut(costs, stages) == starts


def test_fewer_parts_than_stages_and_wrong_splits_are_refused() -> None:
    chain = find_chain(Chain())
    with pytest.raises(ConfigError, match="6 part"):
        cut([cost_of(Chain(), link) for link in chain], 7)
    assert split_at(chain, ["blocks.1", "norm"], 3) == [0, 2, 4]
    with pytest.raises(ConfigError, match=r"Did you mean 'blocks\.2'"):
        split_at(chain, ["block.2"], 2)
    with pytest.raises(ConfigError, match="in order"):
        split_at(chain, ["norm", "blocks.1"], 3)
    with pytest.raises(ConfigError, match="makes 2 stages, and there are to be 4"):
        split_at(chain, ["norm"], 4)


def test_what_is_freed_keeps_names_shapes_and_ties_and_no_memory() -> None:
    model = GPT(tied=True)
    before = {key: (p.shape, p.dtype) for key, p in model.named_parameters()}
    pairs = free(model, ["wte", "lm_head", "h.0"])
    assert {key: (p.shape, p.dtype) for key, p in model.named_parameters()} == before
    assert model.lm_head.weight is model.wte.weight
    assert all(old.untyped_storage().nbytes() == 0 for old, _ in pairs)
    assert {key.split(".")[0] for key, p in model.named_parameters() if p.is_meta} == {"wte", "h"}
    assert not any(p.is_meta for p in model.h[1].parameters())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_go_by_our_names_and_by_torchs(schedule: str) -> None:
    import torch.distributed.pipelining.schedules as torchs

    name = SCHEDULES[schedule].torch_name
    assert hasattr(torchs, name)
    assert make_pipeline(name.removeprefix("Schedule")).schedule == schedule


def test_numbers_that_a_schedule_cannot_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4"):
        Pipeline(microbatches=2).chunks(4)
    with pytest.raises(ConfigError, match="rounds"):
        Pipeline(schedule="interleaved", microbatches=5).chunks(2)
    with pytest.raises(ConfigError, match="expected a function"):
        Pipeline(cost="time")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="2 stage"):
        Pipeline(schedule="zbv", stages_per_rank=3)
    with pytest.raises(ConfigError, match="Did you mean 'interleaved'"):
        Pipeline(schedule="interleave")


def test_a_module_that_is_called_twice_is_in_the_chain_twice() -> None:
    """One activation between all layers, or one layer at both ends: `named_children` has each once."""
    act, same = nn.ReLU(), nn.Linear(4, 4)
    model = nn.Sequential(same, act, nn.Linear(4, 4), act, same)
    assert [link.names for link in find_chain(model)] == [("0",), ("1",), ("2",), ("3",), ("4",)]

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers = nn.Linear(4, 4), nn.ModuleList([same, act, same])
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            return self.again(x)

    assert [link.names[0] for link in find_chain(Listed())] == ["first", "layers.0", "layers.1", "layers.2", "again"]


def test_what_lies_here_too_is_not_freed() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    free(model, ["1", "2"], keep=["0"])
    assert not any(t.is_meta for t in (*norm.parameters(), *norm.buffers()))
    assert model[1].weight.is_meta
