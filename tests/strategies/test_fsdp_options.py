"""FSDPStrategy's arguments: the peers' spellings, strings with degrees, and refusals that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.fsdp import FSDPStrategy, HSDPStrategy
from drivetrain.strategies.mesh import ParallelPlan
from drivetrain.strategies.world import World
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.tensor(0.7))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "Use strategy='ddp'"),
        ({"sharding_strategy": "HYBRID_SHARD"}, "Use strategy='hsdp'"),
        ({"sharding_strategy": "FULL"}, "reshard_after_forward=True"),
        ({"state_dict_type": "sharded"}, "Checkpoints have one format"),
        ({"use_orig_params": False}, "always keeps the model's own parameters"),
        ({"backward_prefetch": "BACKWARD_POST"}, r"backward_prefetch=2"),
        ({"fsdp_version": 1}, "version 2"),
        ({"offload": "disk"}, "offload='cpu'"),
        ({"mixed_precision": "bf16"}, "it follows from the run's precision"),
        ({"plan": ParallelPlan(dp_shard=2, tp=2)}, "Leave tp out"),
        ({"unit": None}, r"takes no argument 'unit'\. Did you mean 'units'\?"),
    ],
)
def test_what_cannot_be_had_says_what_takes_its_place(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FSDPStrategy(**options)


def test_the_peers_options_are_ours() -> None:
    strategy = FSDPStrategy(
        sharding_strategy="SHARD_GRAD_OP",
        auto_wrap_policy={Block},
        cpu_offload=True,
        use_orig_params=True,
        limit_all_gathers=True,
        backward_prefetch="BACKWARD_PRE",
        fsdp_version=2,
    )
    assert strategy.reshard_after_forward is False
    assert strategy.units == {Block}
    assert strategy.offload == "cpu"
    assert HSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 4)).plan == ParallelPlan(dp_replicate=2, dp_shard=4)
    assert FSDPStrategy(transformer_cls_names_to_wrap="A, B").units == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("fsdp", None),
        ("fsdp2", None),
        ("fsdp:2", ParallelPlan(dp_shard=2)),
        ("hsdp:2", ParallelPlan(dp_replicate=2, dp_shard=-1)),
    ],
)
def test_a_string_says_the_strategy_and_its_degree(text: str, plan: ParallelPlan | None) -> None:
    strategy = make_strategy(text)
    assert isinstance(strategy, FSDPStrategy)
    assert strategy.plan == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fsdp:2+tp:x", "tp:x has no degree"),
        ("tp:2+pp:2+tp:4", "names the axis tp twice"),
        ("sp", "needs tp beside it"),
        ("tp:2+sp:2", "sp runs over the ranks of tp"),
        ("hsdp+tp:2", "the number of its replicas"),
        ("fsdp+tp", "only one axis can take what is left"),
        ("single+tp:2", "'single' takes no degrees"),
        ("fsdp:x", "fsdp:x has no degree"),
        ("ddp:2", "strategy='ddp' takes no degrees"),
        ("fsdp+ddp", "names two strategies"),
        ("fsdp:2+tq:2", "There is no strategy 'tq'"),
        ("fdsp", "Did you mean 'fsdp'"),
    ],
)
def test_a_string_that_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_strategy(text)


def test_one_process_without_a_group_is_told_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"World\.start\(need_group=True\)"):
        FSDPStrategy().start(World.single())


def refusals() -> list[str]:
    world = World.start("cpu")
    found = []

    def expect(action: Any) -> None:
        with pytest.raises(ConfigError) as told:
            action()
        found.append(str(told.value))

    strategy = FSDPStrategy()
    strategy.start(world)
    net = Net()
    strategy.prepare({"model": net}, [])
    expect(lambda: FSDPStrategy(plan=ParallelPlan(dp_shard=3)).start(world))
    expect(lambda: FSDPStrategy(plan=ParallelPlan(dp_replicate=2)).start(world))
    expect(lambda: HSDPStrategy().start(world))
    another = FSDPStrategy(ignored_parameters=["blocks.0.nrom"])
    another.start(world)
    expect(lambda: another.prepare_model("model", Net()))
    expect(lambda: another.prepare_model("model", net))
    expect(lambda: another.prepare_model("model", nn.LazyLinear(3)))
    expect(lambda: strategy.bind(net, "trainin_step"))
    expect(lambda: strategy.prepare_optimizer(torch.optim.AdamW(net.parameters(), foreach=True)))
    world.stop()
    return found


def test_what_does_not_fit_is_refused_by_name(ranks: Any) -> None:
    says = [
        "Set dp_shard=-1",
        "Use strategy='ddp'",
        "which cannot be both sharded and replicated",
        "no parameter or module 'blocks.0.nrom'. Did you mean 'blocks.0.norm",
        "is cut up already",
        "has no shape yet",
        "Net has no method 'trainin_step'",
        "gain are held whole while the others are cut up",
    ]
    for part, text in zip(says, ranks(2, refusals)[0], strict=True):
        assert part in text


def test_lightnings_activation_checkpointing_policy_is_a_set_of_classes() -> None:
    strategy = FSDPStrategy(activation_checkpointing_policy={nn.TransformerEncoderLayer})
    assert strategy.activation_checkpointing.units == (nn.TransformerEncoderLayer,)
    assert FSDPStrategy(activation_checkpointing=True).activation_checkpointing is True
    with pytest.raises(ConfigError, match="set of module classes"):
        FSDPStrategy(activation_checkpointing_policy=lambda module: True)
