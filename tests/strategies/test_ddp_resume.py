"""A resumed run under ddp is the run that was never stopped, bit for bit, on four ranks, where the order of sums shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A model whose step uses children and a parameter that it holds itself."""

    def __init__(self, seed: int = 0, *, dropout: float = 0.0, norm: bool = False, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Dropout(dropout), nn.Linear(24, 8), nn.Tanh())
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.full((3,), 1.5))
        if unused:
            self.spare = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x))) * self.temperature

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def batches(n: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


def slice_of(batch: tuple[Tensor, Tensor], index: int, count: int) -> tuple[Tensor, Tensor]:
    return batch[0].tensor_split(count)[index], batch[1].tensor_split(count)[index]


def resumable_run(options: dict[str, Any], start: int, stop: int, saved: Any, model_options: dict[str, Any]) -> Any:
    """Train steps [start, stop); return the losses, the weights' bytes, and the state as it was after step 10."""
    world = World.start("cpu")
    strategy = DDPStrategy(**options)
    strategy.start(world)
    user = Net(seed=7, dropout=0.2, **model_options)
    _, (opt,) = strategy.prepare({"model": user}, [torch.optim.AdamW(user.parameters(), lr=3e-3)])
    assert all(p.grad is None for p in user.parameters()), "priming left gradients"
    step_fn = strategy.bind(user, "training_step")
    torch.manual_seed(world.rank)
    if saved is not None:
        tensors, values, rng = saved[world.rank]
        strategy.load_state_tensors({"model": user}, {"o": opt}, tensors, lambda n: tensors[n], values)
        torch.set_rng_state(rng)
    losses, state = [], None
    data = batches(stop)
    for i in range(start, stop):
        opt.zero_grad()
        loss = step_fn(slice_of(data[i], *strategy.data_shard), i)
        strategy.backward(loss)
        strategy.step(opt)
        losses.append(loss.item())
        if i == 9:
            tensors, values = strategy.state_tensors({"model": user}, {"o": opt})
            state = (full(tensors, world), copy.deepcopy(values), torch.get_rng_state())
    weights = {k: v.clone() for k, v in user.state_dict().items()}
    strategy.stop()
    world.stop()
    return losses, weights, state


def full(tensors: dict[str, Any], world: World) -> dict[str, Tensor]:
    """What a checkpoint would hold: pieces put together in order of rank, and what only one rank has, that rank's."""
    found: dict[str, Tensor] = {}
    own = {n: t.detach() if isinstance(t, Tensor) else (t.tensor, t.shape) for n, t in tensors.items()}
    for others in reversed(world.gather_object(own)):
        for name, value in others.items():
            if isinstance(value, Tensor):
                found[name] = value
            else:
                piece, shape = value
                found[name] = torch.cat([piece, found[name]]) if name in found else piece
                assert len(found[name]) <= shape[0]
    return found


@pytest.mark.parametrize(
    ("options", "model_options"),
    [
        ({}, {}),
        ({"bucket_cap_mb": 0.0005}, {"norm": True}),
        ({"static_graph": True}, {"unused": True}),
        ({"find_unused_parameters": True}, {"unused": True}),
        ({"broadcast_buffers": False}, {"norm": True}),
        ({"comm_hook": "bf16"}, {}),
        ({"comm_hook": "power_sgd", "comm_options": {"start_powerSGD_iter": 3, "min_compression_rate": 0.5}}, {}),
        ({"comm_hook": "batched_power_sgd", "comm_options": {"start_powerSGD_iter": 3}}, {}),
        ({"comm_hook": "power_sgd", "comm_options": {"start_powerSGD_iter": 3, "warm_start": False}}, {}),
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_equal(options: dict[str, Any], model_options: dict[str, Any], ranks: Any) -> None:
    """4 ranks, 20 steps, against 10 steps, a fresh start from the state and 10 more: torch's DDP alone does not do this."""
    whole = ranks(4, resumable_run, options, 0, 20, None, model_options)
    saved = [state for _, _, state in whole]
    resumed = ranks(4, resumable_run, options, 10, 20, saved, model_options)
    for (losses, weights, _), (losses_after, weights_after, _) in zip(whole, resumed, strict=True):
        assert losses[10:] == losses_after
        for name, value in weights.items():
            assert torch.equal(value, weights_after[name]), name


def draws_and_buffers() -> tuple[bool, bool, list[float]]:
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net(norm=True)
    fired: list[int] = []
    user.head.weight.register_hook(lambda g: fired.append(1))
    user.head.weight.register_post_accumulate_grad_hook(lambda p: fired.append(2))
    buffers = [b.clone() for b in user.buffers()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    strategy.prepare_model("model", user)
    same = all(torch.equal(a, b) for a, b in zip(buffers, user.buffers(), strict=True))
    drawn = not torch.equal(before, torch.get_rng_state())
    strategy.stop()
    world.stop()
    return same, drawn, [float(f) for f in fired]


def test_priming_touches_no_buffer_no_random_state_and_fires_no_hook(ranks: Any) -> None:
    assert ranks(2, draws_and_buffers) == [(True, False, [])] * 2
