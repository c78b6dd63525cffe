"""What DDPStrategy refuses, and says by name where torch says a number, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.errors import ConfigError, DistributedError, UnknownName
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """A model whose step uses children and a parameter that it holds itself."""

    def __init__(self, seed: int = 0, *, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.full((3,), 1.5))
        if unused:
            self.spare = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.temperature

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def batches(n: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


def train_once(
    build: Callable[[int], nn.Module], options: dict[str, Any], change: Callable[[nn.Module], None] | None = None
) -> None:
    world = World.start("cpu")
    strategy = DDPStrategy(**options)
    strategy.start(world)
    user = build(world.rank)
    strategy.prepare_model("model", user)
    step = strategy.bind(user, "training_step")
    if change is not None:
        change(user)
    strategy.backward(step(batches(1)[0], 0))
    strategy.stop()
    world.stop()


def test_parameters_without_a_gradient_are_named_before_the_optimizer_steps(ranks: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"2 parameter\(s\).*'model'.*: spare\.bias, spare\.weight\. .*find_unused_parameters=True"
    ):
        ranks(2, train_once, lambda rank: Net(unused=True), {})


def test_unused_parameters_are_allowed_where_asked(ranks: Any) -> None:
    ranks(2, train_once, lambda rank: Net(unused=True), {"find_unused_parameters": True})


class Reentrant(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = self.stem(batch[0])
        twice = checkpoint(self.body, x, use_reentrant=True) + checkpoint(self.body, 2 * x, use_reentrant=True)
        return F.cross_entropy(self.head(twice) * self.temperature, batch[1])


def test_a_parameter_that_is_ready_twice_is_explained_and_static_graph_takes_it(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"body\..* got its gradient twice.*use_reentrant=False.*static_graph=True"):
        ranks(2, train_once, lambda rank: Reentrant(), {})
    ranks(2, train_once, lambda rank: Reentrant(), {"static_graph": True})


class Odd(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, width)


def test_other_shapes_on_another_rank_are_an_error_of_all(ranks: Any) -> None:
    with pytest.raises(DistributedError, match="model 'model' is not the same on all ranks"):
        ranks(2, train_once, lambda rank: Odd(3 + rank), {})


def unfreeze(model: nn.Module) -> None:
    assert isinstance(model, Net)
    model.temperature.requires_grad_(True)


def frozen_in_part(rank: int) -> Net:
    net = Net()
    net.temperature.requires_grad_(False)
    return net


def test_a_parameter_unfrozen_too_late_is_named(ranks: Any) -> None:
    """DDP would not average its gradient, and the ranks would drift apart without a word."""
    ranks(2, train_once, frozen_in_part, {})
    with pytest.raises(ConfigError, match="Parameter temperature of model 'model' was frozen when the model was prepared"):
        ranks(2, train_once, frozen_in_part, {}, unfreeze)


def freed_and_prepared_again() -> bool:
    world = World.start("cpu")
    user = frozen_in_part(0)
    strategy = first = DDPStrategy()
    for strategy in (first, DDPStrategy()):
        strategy.start(world)
        strategy.prepare_model("model", user)
        strategy.backward(strategy.bind(user, "training_step")(batches(1)[0], 0))
        user.temperature.requires_grad_(True)
    strategy.backward(user.training_step(batches(1)[0], 0))
    strategy.stop()
    user.training_step(batches(1)[0], 0).backward()
    world.stop()
    return user.temperature.grad is not None


def test_a_model_may_be_prepared_again(ranks: Any) -> None:
    assert ranks(2, freed_and_prepared_again) == [True, True]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"find_unused_parameter": True}, UnknownName, "Did you mean 'find_unused_parameters'"),
        ({"timeout": 5}, UnknownName, r"World\.start\(timeout_s"),
        ({"bucket_cap_mb": 0}, ConfigError, "more than 0 MiB"),
        ({"comm_wrapper": "fp16"}, ConfigError, "belong to a comm_hook"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        DDPStrategy(**options)


def test_the_peers_spellings_are_accepted() -> None:
    strategy = DDPStrategy(ddp_comm_hook="fp16", comm_state_option=None, ddp_comm_wrapper="no")
    assert (strategy.comm_hook, strategy.comm_wrapper) == ("fp16", None)
    assert isinstance(make_strategy("ddp", bucket_cap_mb=5), DDPStrategy)


def test_a_hook_needs_a_process_group_even_for_one_process() -> None:
    strategy = DDPStrategy(comm_hook="fp16")
    assert strategy.needs_group
    with pytest.raises(ConfigError, match="need_group=True"):
        strategy.start(World.single())


def lazy_model(rank: int) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def test_a_lazy_module_is_named(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"0\.(weight|bias) of model 'model' has no shape yet"):
        ranks(2, train_once, lazy_model, {})
