"""FSDPStrategy and HSDPStrategy against a plain PyTorch loop, by the conformance suite and by cases of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import Strategy, make_strategy
from drivetrain.strategies.contract import CASES, Case, check_strategy
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

DOUBLE = {c.name.removeprefix("float64 "): c for c in CASES if c.dtype == torch.float64}
QUICK = [
    replace(DOUBLE[name], steps=6)
    for name in ("sgd window 3, clipped", "adamw window 3, cut short", "adamw num_items, clipped", "sgd two models")
]


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


FAST = [
    pytest.param("fsdp", 2, {}, id="fsdp"),
    pytest.param("hsdp", 4, {}, id="hsdp"),
]


@pytest.mark.parametrize(("strategy", "size", "options"), FAST)
def test_it_gives_the_numbers_of_a_plain_loop(strategy: str, size: int, options: dict[str, Any], ranks: Any) -> None:
    for found in ranks(size, outcomes, strategy, options, QUICK):
        assert [o for _, o, _ in found] == ["pass"] * len(QUICK), found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 7)
        self.back = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    """Blocks, parameters that the module itself holds (one 0-d), steps that use children, forward, or both."""

    def __init__(self, *, norm: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.batch_norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.scale = nn.Parameter(torch.full((3,), 1.5))
        self.opt: Any = None
        self.strategy: Any = None
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.batch_norm(x)) * self.gain

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        if index == 77:
            raise ValueError("the step fails here")
        return F.cross_entropy(self(x) * self.scale, y)

    def direct_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.batch_norm(x)) * self.gain * self.scale, y)

    def manual_step(self, batch: Any, index: int) -> Tensor:
        """Two optimizer steps in one training step, as an adversarial training has them."""
        loss = torch.zeros(())
        for _ in range(2):
            loss = self.direct_loss(batch)
            self.opt.zero_grad()
            self.strategy.manual_backward(loss)
            self.strategy.step(self.opt)
        return loss

    def direct_loss(self, batch: Any) -> Tensor:
        return Net.direct_step(self, batch, 0)


def batches(count: int = 6, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=g, dtype=torch.float64).to(dtype), torch.randint(0, 3, (8,), generator=g))
        for _ in range(count)
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.state_dict().items()}


def train(
    strategy: Any,
    *,
    step: str = "training_step",
    before: bool = False,
    evaluate: str | None = None,
    steps: int = 6,
    name: str = "adamw",
    **options: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Train a Net under `strategy` (a name with options, or "plain"); return the losses over all ranks and the weights."""
    net = Net(**options)
    dtype = net.head.weight.dtype
    make: Any = {"adamw": lambda p: torch.optim.AdamW(p, lr=0.02), "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}[
        name
    ]
    if strategy == "plain":
        strategy, world = Strategy(), World.single()
    else:
        strategy, world = make_strategy(strategy[0], **strategy[1]), World.start("cpu", need_group=True)
    strategy.start(world)
    optimizer = make(net.parameters()) if before else None
    _, (optimizer,) = strategy.prepare({"model": net}, [optimizer] if before else lambda: [make(net.parameters())])
    net.opt, net.strategy = optimizer, strategy
    run = strategy.bind(net, step)
    rank, count = strategy.data_shard
    losses: list[float] = []
    for index, batch in enumerate(batches(steps, dtype)):
        mine = tuple(t.tensor_split(count)[rank] for t in batch)
        if evaluate:
            with getattr(torch, evaluate)():
                run(mine, 0) if index % 2 else net(mine[0])
        loss = run(mine, index)
        if step != "manual_step":
            optimizer.zero_grad()
            strategy.backward(loss)
            strategy.step(optimizer)
        losses.append(world.all_reduce(loss.detach().clone(), "mean").item())
    found = losses, weights_of(net)
    strategy.stop()
    world.stop()
    return found


def assert_equal(found: Any, truth: Any) -> None:
    assert found[0] == pytest.approx(truth[0], rel=1e-12)
    for key, weight in truth[1].items():
        torch.testing.assert_close(found[1][key], weight, rtol=1e-10, atol=1e-11)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a step that uses children only": ({}, {"step": "direct_step"}),
    "units kept gathered": ({"reshard_after_forward": False}, {"evaluate": "no_grad"}),
    "one unit": ({"units": None}, {}),
    "small units, prefetched": ({"units": 20, "forward_prefetch": 1, "backward_prefetch": 2}, {}),
    "offloaded": ({"offload": "cpu"}, {}),
    "parameters held whole": ({"ignored_parameters": ["blocks.0.norm", "scale"]}, {}),
    "an optimizer built before": ({}, {"before": True, "name": "sgd"}),
    "forwards without a backward pass": ({}, {"evaluate": "no_grad"}),
    "evaluated in inference mode": ({}, {"evaluate": "inference_mode", "step": "direct_step"}),
    "manual optimisation": ({}, {"step": "manual_step"}),
}


def all_variants() -> dict[str, Any]:
    return {name: train(("fsdp", options), **how) for name, (options, how) in VARIANTS.items()}


def test_every_option_gives_the_same_numbers(ranks: Any) -> None:
    """Two ranks against one plain process."""
    truth = {name: train("plain", **how) for name, (_, how) in VARIANTS.items()}
    for found in ranks(2, all_variants):
        for name in VARIANTS:
            assert_equal(found[name], truth[name])


def test_one_process_trains_like_none_of_this_was_there(ranks: Any) -> None:
    assert_equal(ranks(1, train, ("fsdp", {}))[0], train("plain"))


def other_weights_on_each_rank() -> Any:
    rank = int(os.environ["RANK"])
    return train(("fsdp", {}), seed=rank)


def test_all_ranks_start_from_rank_0(ranks: Any) -> None:
    for found in ranks(2, other_weights_on_each_rank):
        assert_equal(found, train("plain", seed=0))


def sync_batch_norm() -> Any:
    return train(("fsdp", {"sync_batchnorm": True}), norm=True)


def test_synchronised_batch_norm_is_that_of_the_whole_batch(ranks: Any) -> None:
    found, truth = ranks(2, sync_batch_norm)[0], train("plain", norm=True)
    assert found[0] == pytest.approx(truth[0], rel=1e-10)


def broken_off() -> list[float]:
    """A step that fails half-way, a forward that is never followed by a backward pass, and then a training."""
    world = World.start("cpu")
    strategy = make_strategy("fsdp")
    strategy.start(world)
    net = Net()
    _, (optimizer,) = strategy.prepare({"model": net}, lambda: [torch.optim.SGD(net.parameters(), lr=0.1)])
    rank, count = strategy.data_shard
    losses, hooks = [], []
    for index, batch in enumerate(batches()):
        mine = tuple(t.tensor_split(count)[rank] for t in batch)
        with pytest.raises(ValueError, match="fails here"):
            net.training_step(mine, 77)
        for _ in range(2):
            with torch.no_grad(), pytest.raises(TypeError):
                net(None)
        net.training_step(mine, 0)  # its graph is thrown away
        with pytest.raises(TypeError):
            net(None)
        strategy.backward(F.cross_entropy(net(mine[0]), mine[1]))
        loss = net.training_step(mine, index)
        optimizer.zero_grad()
        strategy.backward(loss)
        strategy.step(optimizer)
        hooks.append(len(net._forward_hooks))
        losses.append(world.all_reduce(loss.detach(), "mean").item())
    assert all(isinstance(p, DTensor) for n, p in net.named_parameters() if n != "gain"), "nothing is left gathered"
    assert len(set(hooks)) == 1, "hooks behind forwards that failed are gone"
    strategy.stop()
    world.stop()
    return losses


def test_a_step_that_fails_or_leads_nowhere_leaves_no_trace(ranks: Any) -> None:
    net, losses = Net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for index, batch in enumerate(batches()):
        loss = net.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert ranks(2, broken_off)[0] == pytest.approx(losses, rel=1e-12)


class Nested(nn.Module):
    """A forward that calls a method which runs as a forward itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(6))
        self.double()

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.encode(self.first(x))) * self.scale


def nested(plain: bool) -> list[float]:
    net, losses = Nested(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    strategy = Strategy() if plain else make_strategy("fsdp", forward_methods=("encode",))
    world = World.single() if plain else World.start("cpu", need_group=True)
    strategy.start(world)
    _, (optimizer,) = strategy.prepare({"model": net}, [optimizer])
    for x, _ in batches(3):
        with torch.no_grad():
            net(x)
        loss = net(x).pow(2).mean()
        optimizer.zero_grad()
        strategy.backward(loss)
        strategy.step(optimizer)
        losses.append(loss.item())
    strategy.stop()
    world.stop()
    return losses


def test_a_forward_may_call_a_method_that_runs_as_one(ranks: Any) -> None:
    assert ranks(2, nested, False)[0] == pytest.approx(nested(True), rel=1e-12)


def low_precision(precision: str, **options: Any) -> list[float]:
    """Losses of a run with fp32 weights; a bare call of the model runs under the precision, too."""
    world = World.start("cpu")
    strategy = make_strategy(
        "fsdp" if "gather_in_16_bits" in options else options.pop("strategy"), precision=precision, **options
    )
    strategy.start(world)
    assert strategy.precision is not None
    net = Net(dtype=torch.float32)
    _, (optimizer,) = strategy.prepare({"model": net}, lambda: [torch.optim.SGD(net.parameters(), lr=0.1)])
    step = strategy.bind(net, "training_step")
    rank, count = strategy.data_shard
    losses = []
    for index, batch in enumerate(batches(dtype=torch.float32)):
        mine = tuple(t.tensor_split(count)[rank] for t in batch)
        with strategy.precision.autocast(world.device):
            loss = step(mine, index)
        optimizer.zero_grad()
        strategy.backward(strategy.precision.scale(loss))
        if strategy.precision.scales_loss:
            strategy.unscale_(optimizer)
        strategy.step(optimizer)
        losses.append(world.all_reduce(loss.detach().float(), "mean").item())
    strategy.stop()
    world.stop()
    return losses


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_mixed_precision_gives_the_numbers_of_ddp(precision: str, ranks: Any) -> None:
    """And nearly those where the gathered parameters have 16 bits, which are not equal: then it would do nothing."""
    truth = ranks(2, low_precision, precision, strategy="ddp")[0]
    assert ranks(2, low_precision, precision, strategy="fsdp")[0] == pytest.approx(truth, rel=1e-5)
    low = ranks(2, low_precision, precision, gather_in_16_bits=True)[0]
    assert low == pytest.approx(truth, rel=2e-2)
    assert low != truth


def overflow_on_one_rank() -> tuple[list[bool], float, bool]:
    world = World.start("cpu")
    strategy = make_strategy("fsdp", precision="fp16-mixed")
    strategy.start(world)
    precision: Any = strategy.precision
    net = Net(dtype=torch.float32)
    _, (optimizer,) = strategy.prepare({"model": net}, lambda: [torch.optim.SGD(net.parameters(), lr=0.1)])
    step = strategy.bind(net, "training_step")
    stepped = []
    for index, batch in enumerate(batches(3, torch.float32)):
        mine = tuple(t.tensor_split(2)[world.rank] for t in batch)
        with precision.autocast(world.device):
            loss = step(mine, index)
        optimizer.zero_grad()
        strategy.backward(precision.scale(loss))
        if index == 1 and world.rank == 0:  # in this rank's piece only
            net.head.weight.grad._local_tensor[0] = float("inf")  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        strategy.unscale_(optimizer)
        stepped.append(strategy.step(optimizer))
    scale = precision.scale_value
    finite = strategy.gradients_finite(list(net.parameters()))
    strategy.stop()
    world.stop()
    return stepped, scale, finite


def test_an_overflow_in_one_ranks_piece_is_an_overflow_on_all(ranks: Any) -> None:
    assert ranks(2, overflow_on_one_rank) == [([True, False, True], 32768.0, True)] * 2


def not_finite_on_one_rank() -> tuple[bool, float]:
    world = World.start("cpu")
    strategy = make_strategy("fsdp")
    strategy.start(world)
    net = Net()
    strategy.prepare({"model": net}, [])
    strategy.backward(strategy.bind(net, "training_step")(batches(1)[0], 0))
    if world.rank == 1:
        net.head.weight.grad._local_tensor[0] = float("nan")  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    found = strategy.gradients_finite(list(net.parameters())), float(strategy.grad_norm(list(net.parameters()), float("inf")))
    strategy.stop()
    world.stop()
    return found


def test_a_nan_in_one_ranks_piece_is_seen_by_all(ranks: Any) -> None:
    for finite, norm in ranks(2, not_finite_on_one_rank):
        assert not finite
        assert not norm < float("inf")


SLOW = [
    ("fsdp", 2, {}),
    ("fsdp", 4, {}),
    ("hsdp", 4, {}),
    ("fsdp", 4, {"reshard_after_forward": 2, "units": lambda name, _: name == "norm"}),
    ("fsdp", 1, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "size", "options"), SLOW)
def test_it_gives_the_numbers_of_a_plain_loop_over_fifty_steps(strategy: str, size: int, options: Any, ranks: Any) -> None:
    for found in ranks(size, outcomes, strategy, options, CASES, timeout=300):
        assert [o for _, o, _ in found] == ["pass"] * len(CASES), found


# -- models that are never whole --------------------------------------------------------------------------------------
class Wide(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(blocks))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def built_on_meta() -> tuple[dict[str, Tensor], list[tuple[str, str]], int]:
    world = World.start("cpu")
    strategy = make_strategy("fsdp")
    strategy.start(world)
    with torch.device("meta"):
        model = Wide()
    torch.manual_seed(5 + world.rank)  # rank 0's numbers count
    strategy.prepare({"model": model}, lambda: [torch.optim.SGD(model.parameters(), lr=0.1)])
    held = sum(p._local_tensor.untyped_storage().nbytes() for p in model.parameters() if isinstance(p, DTensor))
    found = weights_of(model), strategy.explain(), held
    strategy.stop()
    world.stop()
    return found


def test_a_model_on_the_meta_device_gets_the_values_that_it_would_have_had(ranks: Any) -> None:
    torch.manual_seed(5)
    truth = Wide().state_dict()
    found = ranks(4, built_on_meta)
    total = sum(t.numel() * 4 for t in truth.values())
    for weights, rows, held in found:
        for key, value in truth.items():
            assert torch.equal(weights[key], value)
        explained = dict(rows)
        assert explained["units"] == "4 x Sequential, root"
        assert explained["parameters held"].endswith(f"of {total:,} bytes on this rank")
        assert held <= 1.1 * total / 4


class Unsaid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.offset = nn.Parameter(torch.zeros(2))


def built_of_what_does_not_say() -> None:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy("fsdp")
    strategy.start(world)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Unsaid())
    strategy.prepare_model("model", model)


def test_a_module_that_does_not_say_how_it_is_filled_is_named(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"1\.offset is on the meta device.* Give Unsaid a method reset_parameters"):
        ranks(1, built_of_what_does_not_say)


def test_an_optimizer_that_has_state_already_keeps_it(ranks: Any) -> None:
    def run() -> dict[str, Tensor]:
        world = World.start("cpu")
        strategy = make_strategy("fsdp")
        strategy.start(world)
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
        net.training_step(batches(1)[0], 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        _, (optimizer,) = strategy.prepare({"model": net}, [optimizer])
        strategy.backward(strategy.bind(net, "training_step")(batches(1)[0], 1))
        strategy.step(optimizer)
        found = weights_of(net)
        world.stop()
        return found

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        net.training_step(batches(1)[0], 0).backward()
        optimizer.step()
    found = ranks(2, run)[1]
    for key, weight in net.state_dict().items():
        torch.testing.assert_close(found[key], weight, rtol=1e-12, atol=1e-12)
