"""Replica: torch's DistributedDataParallel that looks like the module in it, and costs no more than torch's own."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import torch.distributed as dist
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.replica import Replica
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Module):
    """A model whose step uses children and a parameter that it holds itself."""

    def __init__(self, seed: int = 0, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh())
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.full((3,), 1.5))
        self.model = nn.Identity()  # a name that a wrapper must not hide

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x))) * self.temperature

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def batches(n: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


def describe_replica() -> dict[str, Any]:
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net(norm=True)
    model = strategy.prepare_model("model", user)
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("wrapper"))
    user.register_forward_hook(lambda *_: seen.append("model"))
    model(batches(1)[0][0])
    with torch.no_grad():
        model(batches(1)[0][0])
    model.eval()
    result = {
        "isinstance": isinstance(model, nn.Module),
        "unwrap": strategy.unwrap(model) is user and strategy.unwrap(user) is user,
        "module": model.module is user,
        "attribute": model.temperature is user.temperature and model.model is user.model,
        "keys": list(model.state_dict()) == list(user.state_dict()),
        "names": [n for n, _ in model.named_parameters()] == [n for n, _ in user.named_parameters()],
        "buffers": [n for n, _ in model.named_buffers()] == [n for n, _ in user.named_buffers()],
        "load": str(model.load_state_dict(user.state_dict())),
        "eval": user.training,
        "hooks": seen,
        "missing": hasattr(model, "no_such_thing"),
        "class": type(user).__name__,
    }
    strategy.stop()
    world.stop()
    return result


def test_a_replica_has_the_names_state_and_attributes_of_its_module(ranks: Any) -> None:
    assert ranks(2, describe_replica)[1] == {
        "isinstance": True,
        "unwrap": True,
        "module": True,
        "attribute": True,
        "keys": True,
        "names": True,
        "buffers": True,
        "load": "<All keys matched successfully>",
        "eval": False,
        "hooks": ["model", "wrapper"] * 2,
        "missing": False,
        "class": "Net",
    }


def frames_to_the_step() -> tuple[list[str], list[str]]:
    """File names of the frames between a bound step's caller and the step; and the calls of torch's own wrapper."""
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net()
    found: list[str] = []

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not caller:
            found.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
            frame = frame.f_back
        return user(batch[0]).sum()

    user.training_step = training_step  # type: ignore[method-assign]
    strategy.prepare_model("model", user)
    caller = sys._getframe().f_code
    step = strategy.bind(user, "training_step")
    step(batches(1)[0], 0)
    strategy.stop()
    world.stop()
    ours = [f for f in found[1:] if "strategies/" in f and "site-packages" not in f]
    return ours, found


def test_one_frame_of_ours_lies_between_the_caller_and_the_step(ranks: Any) -> None:
    ours, every = ranks(2, frames_to_the_step)[0]
    assert [name.rpartition(":")[2] for name in ours] == ["_run_ddp_forward"]
    assert len(every) == 3, every  # the step, ours, DistributedDataParallel.forward


def test_the_private_names_of_torch_that_this_stands_on_exist() -> None:
    """A new torch without one of them fails here, with its name, and not somewhere in a run."""
    for name in ("_run_ddp_forward", "_build_params_for_reducer", "_set_static_graph", "_active_ddp_module"):
        assert hasattr(DistributedDataParallel, name), name
    for name in ("prepare_for_backward", "_push_all_rebuilt_params", "_rebuild_buckets", "_check_reducer_finalized"):
        assert hasattr(dist.Reducer, name), name
    assert "self._run_ddp_forward(*inputs, **kwargs)" in inspect.getsource(DistributedDataParallel.forward)


def calls_of_a_step(kind: str, steps: int = 20) -> float:
    """Python and C calls of one step, as sys.setprofile counts them."""
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net()
    if kind == "ours":
        model = strategy.prepare_model("model", user)
        forward, backward = model, strategy.backward
    else:
        forward, backward = DistributedDataParallel(user), Tensor.backward
    x, y = batches(1)[0]

    def step() -> None:
        backward(F.cross_entropy(forward(x), y))

    for _ in range(12):  # torch logs its statistics in the first ten
        step()
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    for _ in range(steps):
        step()
    sys.setprofile(None)
    strategy.stop()
    world.stop()
    return count / steps


def test_a_step_costs_no_more_calls_than_torch_ddp(ranks: Any) -> None:
    ours, torchs = ranks(2, calls_of_a_step, "ours")[0], ranks(2, calls_of_a_step, "torch")[0]
    assert ours <= torchs + 2, (ours, torchs)


def test_replica_is_torchs_ddp() -> None:
    """So that what asks for DistributedDataParallel (torch.compile, state_dict helpers) knows it."""
    assert issubclass(Replica, DistributedDataParallel)
