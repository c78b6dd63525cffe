"""Gradient compression: near the exact mean, equal on all ranks, and its state survives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain.strategies.comm_hooks import CommHook, load_state, make_hook, state_of
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.errors import CheckpointError, ConfigError, UnknownName
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks


def gradients_of(options: dict[str, Any], steps: int = 1) -> tuple[Tensor, Tensor]:
    """(the gradient of the last step, the exact mean of it over ranks)."""
    world = World.start("cpu")
    strategy = DDPStrategy(**options)
    strategy.start(world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    prepared = strategy.prepare_model("model", model)
    x = torch.empty(0)
    for step in range(steps):
        model.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + world.rank))
        strategy.backward(prepared(x).square().mean())
    sent = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(sent, world.broadcast(sent)), "gradients differ between the ranks"
    assert sent.dtype == torch.float32
    strategy.set_gradient_sync([prepared], False)
    model.zero_grad()
    strategy.backward(prepared(x).square().mean())
    local = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    exact = world.all_reduce(local, "mean")
    strategy.stop()
    world.stop()
    return sent, exact


def error_of(ranks: Any, options: dict[str, Any], steps: int = 1, size: int = 2) -> float:
    sent, exact = ranks(size, gradients_of, options, steps)[0]
    return float((sent - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"comm_hook": "fp16"}, 1e-6, 1e-3),
        ({"comm_hook": "bf16"}, 1e-4, 1e-2),
        ({"comm_hook": default_hooks.bf16_compress_hook}, 1e-4, 1e-2),
        ({"comm_hook": default_hooks.allreduce_hook, "comm_wrapper": "bf16"}, 1e-4, 2e-2),
        ({"comm_hook": default_hooks.allreduce_hook, "comm_wrapper": default_hooks.fp16_compress_wrapper}, 1e-6, 1e-3),
        ({"comm_hook": default_hooks.allreduce_hook}, -1, 1e-6),
        ({"comm_hook": "power_sgd"}, -1, 1e-6),  # nothing is compressed before start_powerSGD_iter
    ],
    ids=str,
)
def test_compressed_gradients_are_near_the_mean_and_not_equal_to_it(
    options: dict[str, Any], low: float, high: float, ranks: Any
) -> None:
    """An error of 0 would mean that nothing was compressed."""
    assert low <= error_of(ranks, options) <= high


@pytest.mark.parametrize("hook", ["power_sgd", "batched_power_sgd"])
def test_power_sgd_is_exact_at_full_rank_and_compresses_below(hook: str, ranks: Any) -> None:
    options = {"start_powerSGD_iter": 2, "min_compression_rate": 0.01, "use_error_feedback": False}
    full = error_of(ranks, {"comm_hook": hook, "comm_options": options | {"matrix_approximation_rank": 64}}, steps=4)
    low = error_of(ranks, {"comm_hook": hook, "comm_options": options | {"matrix_approximation_rank": 1}}, steps=4)
    assert full < 1e-4
    assert low > 0.1


def same_gradient_for(hook: str, steps: int) -> tuple[Tensor, Tensor]:
    """The sum of what was applied over `steps` equal gradients, and what should have been."""
    world = World.start("cpu")
    strategy = DDPStrategy(comm_hook=hook, comm_options={"start_powerSGD_iter": 2, "min_compression_rate": 0.01})
    strategy.start(world)
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False)
    prepared = strategy.prepare_model("model", model)
    g = torch.randn(16, 16, generator=torch.Generator().manual_seed(world.rank))
    applied = torch.zeros(16, 16)
    for _ in range(steps):
        model.zero_grad()
        strategy.backward((prepared(torch.eye(16)) * g).sum())
        assert model.weight.grad is not None
        applied += model.weight.grad
    wanted = world.all_reduce(g.t().contiguous(), "mean") * steps
    strategy.stop()
    world.stop()
    return applied, wanted


@pytest.mark.parametrize("hook", ["power_sgd", "batched_power_sgd"])
def test_error_feedback_sends_later_what_compression_left_out(hook: str, ranks: Any) -> None:
    """Over many steps the sum that was applied is the sum of the gradients, but for the last steps' rest."""
    applied, wanted = ranks(2, same_gradient_for, hook, 200)[0]
    assert float((applied - wanted).norm() / wanted.norm()) < 0.15


# -- state ----------------------------------------------------------------------------------------------------------------


def trained_hook(group: Any, steps: int, options: dict[str, Any]) -> tuple[CommHook, nn.Module]:
    hook = make_hook("power_sgd", group, options=options)
    torch.manual_seed(0)
    model = nn.Linear(12, 12, bias=False)
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(hook.state, hook.hook)
    for step in range(steps):
        model.zero_grad()
        torch.manual_seed(100 * step + dist.get_rank())
        ddp(torch.randn(3, 12)).square().sum().backward()
    return hook, model


OPTIONS = {"start_powerSGD_iter": 2, "min_compression_rate": 0.01}


def saved_on_two() -> tuple[dict[str, Tensor], dict[str, Any]]:
    world = World.start("cpu")
    hook, _ = trained_hook(world.group(), 5, OPTIONS)
    tensors, values = state_of(hook, "strategy/ddp/model/comm", world.rank, world.size)
    full = {n: t if isinstance(t, Tensor) else world.all_gather(t.tensor) for n, t in tensors.items()}
    world.stop()
    return full, values


def loaded(saved: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[Tensor, int]:
    world = World.start("cpu")
    group = world.group()
    assert group is not None
    hook = make_hook("power_sgd", group, options=OPTIONS)
    tensors, values = saved
    load_state(hook, "strategy/ddp/model/comm", world.rank, world.size, tensors, lambda n: tensors[n], values, world.device)
    world.stop()
    return hook.state.error_dict[0], hook.state.iter


def test_on_another_number_of_ranks_the_mean_error_is_kept(ranks: Any) -> None:
    """The gradient that is applied is the mean over ranks of gradient and error: so the mean of the errors must not change."""
    saved = ranks(2, saved_on_two)[0]
    errors = saved[0]["strategy/ddp/model/comm/error/0"]
    assert errors.shape == (2, 144)
    assert errors.abs().max() > 0
    for rank, (error, count) in enumerate(ranks(2, loaded, saved)):
        assert torch.equal(error, errors[rank])
        assert count == 5
    for error, _ in ranks(3, loaded, saved):
        torch.testing.assert_close(error, errors.mean(0))


def test_the_state_of_another_hook_is_refused() -> None:
    hook = CommHook("batched_power_sgd", lambda s, b: torch.futures.Future(), None)
    with pytest.raises(CheckpointError, match="saved under comm_hook 'power_sgd', and this run has 'batched_power_sgd'"):
        load_state(hook, "p", 0, 1, [], lambda n: torch.empty(0), {"p": {"hook": "power_sgd", "state": {}}}, torch.device("cpu"))


class Counting:
    """A hook's state of the user's own."""

    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def own_hook(state: Counting, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Annotated with strings (the future import above), which torch by itself refuses."""
    state.calls += 1
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    assert work is not None
    return work.get_future().then(lambda f: f.value()[0])


def run_own_hook() -> tuple[int, dict[str, Any], int]:
    world = World.start("cpu")
    strategy = DDPStrategy(comm_hook=own_hook, comm_state=Counting())
    strategy.start(world)
    model = nn.Linear(4, 2)
    prepared = strategy.prepare_model("model", model)
    after_prepare = strategy.comm_state.calls
    strategy.backward(prepared(torch.randn(3, 4)).sum())
    _, values = strategy.state_tensors({"model": model}, {})
    strategy.comm_state.calls = 0
    tensors = {f"model/model/{k}": v for k, v in model.state_dict().items()}
    strategy.load_state_tensors({"model": model}, {}, tensors, lambda n: tensors[n], values)
    calls = strategy.comm_state.calls
    strategy.stop()
    world.stop()
    return after_prepare, values["strategy/ddp/model/comm"], calls


def test_a_function_of_the_users_is_called_with_its_state_which_is_saved(ranks: Any) -> None:
    for after_prepare, value, calls in ranks(2, run_own_hook):
        assert after_prepare == 0, "preparing is no gradient"
        assert value == {"hook": "own_hook", "state": {"calls": 1}}
        assert calls == 1


# -- refusals -------------------------------------------------------------------------------------------------------------


class Group:
    """Enough of a process group for making a hook."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda g: make_hook("fp_16", g), UnknownName, "Did you mean 'fp16'"),
        (lambda g: make_hook("fp16", g, wrapper="fp8"), UnknownName, "communication wrapper 'fp8'"),
        (lambda g: make_hook("power_sgd", g, options={"matrix_rank": 2}), UnknownName, "matrix_approximation_rank"),
        (lambda g: make_hook("power_sgd", g, options={"start_powerSGD_iter": 1}), ConfigError, "were refused"),
        (lambda g: make_hook("fp16", g, options={"a": 1}), ConfigError, "has no options"),
        (lambda g: make_hook("fp16", g, state=1), ConfigError, "makes its own state"),
        (lambda g: make_hook(own_hook, g, options={"a": 1}), ConfigError, "comm_options are PowerSGD's"),
    ],
)
def test_what_a_hook_cannot_take_is_told(make: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(Group())
