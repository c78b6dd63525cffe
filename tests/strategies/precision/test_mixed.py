"""The 16-bit and 64-bit precisions on CPU, against torch's own autocast and GradScaler, and against hand-computed scales."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import Strategy, make_precision
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.errors import ConfigError, NonFiniteError
from drivetrain.strategies.precision.base import Precision
from drivetrain.strategies.precision.mixed import FP64, BF16Mixed, BF16True, FP16Mixed, FP16True
from drivetrain.strategies.world import World
from torch import Tensor, nn

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def inputs(steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, generator=g) for _ in range(steps)]


# -- autocast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [BF16Mixed, FP16Mixed])
def test_mixed_computes_in_16_bits_and_keeps_fp32_weights(make: Callable[[], Precision]) -> None:
    precision = make()
    model = precision.convert(net())
    with precision.autocast(CPU):
        output = model(inputs(1)[0])
    output.float().sum().backward()
    assert output.dtype == precision.autocast_dtype
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_autocast_context_may_be_kept_nested_and_left_by_an_error() -> None:
    """torch's own object, entered in itself, would leave autocast on for the rest of the process."""
    context = BF16Mixed().autocast(CPU)
    for _ in range(2):
        with context:
            with context:
                assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_enabled("cpu")
            with pytest.raises(ValueError, match="out"), context:
                raise ValueError("out")
            assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")
    precision = BF16Mixed()
    assert precision.autocast(CPU) is precision.autocast(CPU)


def calls(body: Callable[[], None]) -> int:
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    body()
    sys.setprofile(profile)
    body()
    sys.setprofile(None)
    return count


def test_entering_costs_no_more_calls_than_torchs_own() -> None:
    context = BF16Mixed().autocast(CPU)

    def ours() -> None:
        with context:
            pass

    def raw() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            pass

    assert calls(ours) <= calls(raw)


# -- fp16 and its scale ---------------------------------------------------------------------------------------------------


def raw_fp16(steps: int) -> tuple[list[float], list[float]]:
    """torch's documented loop with several micro-batches, clipping and two optimizers under one scaler."""
    model = net()
    optimizers = two_optimizers(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    losses, scales = [], []
    data = inputs(2 * steps)
    for step in range(steps):
        for o in optimizers:
            o.zero_grad()
        for x in data[2 * step : 2 * step + 2]:
            with torch.autocast("cpu", torch.float16):
                loss = model(x).float().square().mean() / 2 * overflowing(step)
            scaler.scale(loss).backward()
            losses.append(loss.item())
        for o in optimizers:
            scaler.unscale_(o)
        for o in optimizers:
            nn.utils.clip_grad_norm_([p for g in o.param_groups for p in g["params"]], 0.5)
            scaler.step(o)
        scaler.update()
        scales.append(scaler.get_scale())
    return losses + flat(model), scales


def overflowing(step: int) -> float:
    """Step 4 has gradients that are too big for the scale."""
    return 1e38 if step == 4 else 1.0


def two_optimizers(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(model[2].parameters(), lr=1e-2)]


def flat(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def our_fp16(steps: int, *, resume_at: int | None = None) -> tuple[list[float], list[float], list[tuple[bool, ...]]]:
    def start() -> tuple[Strategy, FP16Mixed]:
        precision = FP16Mixed(init_scale=2.0**10, growth_interval=3)
        strategy = Strategy(precision=precision)
        strategy.start(World.single())
        return strategy, precision

    strategy, precision = start()
    model = net()
    _, optimizers = strategy.prepare({"model": model}, two_optimizers(model))
    losses, scales, stepped = [], [], []
    data = inputs(2 * steps)
    for step in range(steps):
        if step == resume_at:
            state = copy.deepcopy(precision.state_dict())
            strategy, precision = start()
            precision.load_state_dict(state)
        for o in optimizers:
            o.zero_grad()
        for x in data[2 * step : 2 * step + 2]:
            with precision.autocast(CPU):
                loss = model(x).float().square().mean() / 2 * overflowing(step)
            strategy.backward(precision.scale(loss))
            losses.append(loss.item())
        done = []
        for o in optimizers:
            parameters = [p for g in o.param_groups for p in g["params"]]
            strategy.unscale_(o)
            strategy.unscale_(o)  # the user clips, then the trainer does
            norm = strategy.grad_norm(parameters)
            strategy.scale_gradients(parameters, (0.5 / (norm + 1e-6)).clamp(max=1.0))
            done.append(strategy.step(o))
        stepped.append(tuple(done))
        scales.append(precision.scale_value)
    return losses + flat(model), scales, stepped


@pytest.mark.parametrize("resume_at", [None, 2, 5, 7])
def test_fp16_is_torchs_documented_loop(resume_at: int | None) -> None:
    """Losses, weights and scales bit for bit: unscaled once, updated once a window, the overflow skipped; resumed as well."""
    truth, scales = raw_fp16(10)
    ours, our_scales, stepped = our_fp16(10, resume_at=resume_at)
    assert ours == truth
    assert our_scales == scales
    # 2^10 doubles after 3 good steps, and is halved by the overflow of step 4; growth is counted anew.
    assert scales[:8] == [2.0**10, 2.0**10, 2.0**11, 2.0**11, 2.0**10, 2.0**10, 2.0**10, 2.0**11]
    assert stepped == [(step != 4, step != 4) for step in range(10)]


def test_a_fused_optimizer_that_was_skipped_says_so() -> None:
    precision = FP16Mixed()
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    precision.scale((weight * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
    assert precision.step(optimizer) is False
    assert torch.equal(weight.data, torch.ones(3))
    assert precision.scale_value == 32768.0


def test_an_optimizer_without_gradients_steps_and_the_scale_stays() -> None:
    precision = FP16Mixed()
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    precision.scale(used.sum()).backward()
    assert precision.step(torch.optim.SGD([unused], lr=0.1)) is True
    assert precision.scale_value == 65536.0


def test_an_unscaled_step_that_was_given_up_does_not_disturb_the_next() -> None:
    """A window that held no items is unscaled, and then not stepped."""
    precision = FP16Mixed(init_scale=4.0)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.scale((0 * weight).sum()).backward()
    precision.unscale_(optimizer)
    optimizer.zero_grad()
    precision.scale((weight / 4).sum()).backward()
    assert precision.step(optimizer)
    assert weight.item() == 0.75


def test_two_losses_may_be_scaled_before_either_steps() -> None:
    """A is clipped before B's loss is scaled: A must not be unscaled twice, nor the scale change between."""
    precision = FP16Mixed(init_scale=4.0, growth_interval=1)
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    opt_a, opt_b = torch.optim.SGD([a], lr=1.0), torch.optim.SGD([b], lr=1.0)
    for expected in (0.5, 0.0):
        opt_a.zero_grad()
        opt_b.zero_grad()
        precision.scale((a / 2).sum()).backward()
        precision.unscale_(opt_a)
        precision.scale((b / 2).sum()).backward()
        assert precision.step(opt_a)
        assert precision.step(opt_b)
        assert (a.item(), b.item()) == (expected, expected)
    assert precision.scale_value == 16.0


def test_gradients_that_no_scale_can_save_end_the_run() -> None:
    precision = FP16Mixed()
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def steps() -> None:
        for _ in range(50):
            optimizer.zero_grad()
            precision.scale((weight * float("nan")).sum()).backward()
            precision.step(optimizer)

    with pytest.raises(NonFiniteError, match=r"skipped 41 steps of SGD in a row.*bf16-mixed"):
        steps()
    assert weight.item() == 1.0


def test_the_state_of_a_scale_that_was_never_used_is_its_options() -> None:
    precision = FP16Mixed(init_scale=8.0)
    assert precision.state_dict()["scale"] == 8.0
    other = FP16Mixed()
    other.load_state_dict(precision.state_dict())
    assert other.scale_value == 8.0


def ddp_overflow() -> tuple[bool, float, bool]:
    world = World.start("cpu")
    precision = FP16Mixed()
    strategy = DDPStrategy(precision=precision)
    strategy.start(world)
    model = nn.Linear(4, 1)
    prepared, (optimizer,) = strategy.prepare({"model": model}, [torch.optim.SGD(model.parameters(), lr=0.1)])
    before = flat(model)
    with precision.autocast(world.device):
        loss = prepared["model"](torch.ones(2, 4)).sum().float()
    if world.rank == 1:
        loss = loss * float("inf")
    strategy.backward(precision.scale(loss))
    result = strategy.step(optimizer), precision.scale_value, before == flat(model)
    strategy.stop()
    world.stop()
    return result


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: Any) -> None:
    assert ranks(2, ddp_overflow) == [(False, 32768.0, True)] * 2


# -- everything in one dtype ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(BF16True, torch.bfloat16), (FP16True, torch.float16), (FP64, torch.float64)],
    ids=["bf16", "fp16", "fp64"],
)
def test_true_precisions_cast_parameters_buffers_and_inputs(make: Callable[[], Precision], dtype: torch.dtype) -> None:
    precision = make()
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = list(model.parameters())
    converted = precision.convert(model)
    assert converted is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "the optimizer would hold other parameters"
    assert {t.dtype for t in model.state_dict().values()} == {dtype, torch.int64}  # num_batches_tracked counts
    output = model(torch.randn(3, 2, 8))
    assert output.dtype == dtype
    output.sum().backward()
    optimizer.step()
    assert optimizer.state[parameters[0]]["exp_avg"].dtype == dtype


def test_only_floating_tensors_of_a_batch_are_cast_wherever_they_lie() -> None:
    pair = namedtuple("pair", "x y")
    batch = {"a": [torch.ones(2), torch.ones(2, dtype=torch.long)], "b": (torch.ones(1), "text"), "c": pair(torch.ones(1), None)}
    cast = BF16True().convert_input(OrderedDict(batch))
    assert type(cast) is OrderedDict
    assert [t.dtype for t in cast["a"]] == [torch.bfloat16, torch.long]
    assert cast["b"][0].dtype == torch.bfloat16
    assert cast["b"][1] == "text"
    assert type(cast["c"]) is pair
    assert cast["c"].x.dtype == torch.bfloat16
    assert batch["a"][0].dtype == torch.float32
    assert Precision().convert_input(batch) is batch


def test_a_converted_model_can_be_copied_and_copies_cast_too() -> None:
    model = copy.deepcopy(FP64().convert(net()))
    assert model(torch.randn(2, 8)).dtype == torch.float64


def test_complex_parameters_stay_complex() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64)), nn.Parameter(torch.ones(2))])
    BF16True().convert(model)
    assert [p.dtype for p in model] == [torch.complex64, torch.bfloat16]


def true_losses(name: str) -> list[float]:
    world = World.start("cpu")
    strategy = DDPStrategy(precision=name)
    strategy.start(world)
    model = net()
    prepared, (optimizer,) = strategy.prepare({"model": model}, lambda: [torch.optim.SGD(model.parameters(), lr=0.1)])
    losses = []
    for x in inputs(20):
        optimizer.zero_grad()
        loss = prepared["model"](x.tensor_split(world.size)[world.rank]).square().mean()
        strategy.backward(loss)
        strategy.step(optimizer)
        losses.append(world.all_reduce(loss.detach().double(), "mean").item())
    strategy.stop()
    world.stop()
    return losses


@pytest.mark.parametrize(("name", "low", "high"), [("bf16-true", 1e-4, 3e-2), ("fp16-true", 1e-6, 3e-3), ("fp64", 1e-10, 1e-6)])
def test_true_precisions_train_under_ddp_near_fp32_and_not_equal_to_it(name: str, low: float, high: float, ranks: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = []
    for x in inputs(20):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        truth.append(loss.item())
    for losses in ranks(2, true_losses, name):
        worst = max(abs(a - b) / b for a, b in zip(losses, truth, strict=True))
        assert low < worst < high


# -- availability ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true", "fp64"])
def test_every_precision_runs_on_the_cpu(name: str) -> None:
    precision = make_precision(name)
    assert precision.name == name
    assert precision.available(CPU) is None


def test_what_a_device_cannot_do_is_refused_with_the_nearest_that_works() -> None:
    assert "no float64" in str(FP64().available(torch.device("mps")))
    assert "has no autocast" in str(BF16Mixed().available(torch.device("meta")))


def test_a_precision_that_is_not_available_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FP64, "available", lambda self, device: "fp64 needs another device.")
    with pytest.raises(ConfigError, match="needs another device"):
        Strategy(precision="fp64").start(World.single())
