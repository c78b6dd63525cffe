"""A prepared model that is called in a loop of one's own computes in the precision that was asked for, never silently in fp32."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Accelerator
from torch import Tensor, nn


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def losses(precision: str, strategy: str = "auto", *, by_hand: bool = False) -> list[float]:
    """Train by calling the prepared model; with `by_hand`, plain PyTorch under torch.autocast."""
    accelerator = Accelerator(precision="fp32" if by_hand else precision, strategy=strategy)
    net: Any = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    if not by_hand:
        net, optimizer = accelerator.prepare(net, optimizer)
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        optimizer.zero_grad()
        if by_hand:
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), y)
            loss.backward()
        else:
            loss = F.cross_entropy(net(x), y)
            accelerator.backward(loss)
        optimizer.step()
        found.append(loss.item())
    accelerator.end_training()
    return found


def test_a_bare_call_is_bf16_and_its_output_fp32() -> None:
    """Failed before: the model ran in fp32, without a word."""
    truth = losses("bf16-mixed", by_hand=True)
    assert losses("bf16-mixed") == truth
    assert losses("fp32") != truth


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_so_it_is_on_two_ranks(ranks: Any, strategy: str) -> None:
    truth = losses("bf16-mixed", by_hand=True)
    for found in ranks(2, losses, "bf16-mixed", strategy):
        assert found == pytest.approx(truth, rel=2e-3)
        assert found != losses("fp32")


def test_inside_a_step_nothing_is_widened() -> None:
    accelerator = Accelerator(precision="bf16-mixed")
    net = accelerator.prepare(model())
    seen: list[torch.dtype] = []

    def step(x: Tensor) -> Tensor:
        out = net(x)
        seen.append(out.dtype)
        return out.float().mean()

    accelerator.forward_backward(step, torch.randn(2, 8))
    assert seen == [torch.bfloat16]
    assert net(torch.randn(2, 8)).dtype == torch.float32
    accelerator.end_training()


def test_an_error_in_the_forward_leaves_autocast_as_it_was() -> None:
    accelerator = Accelerator(precision="bf16-mixed")
    net = accelerator.prepare(model())
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 3))
    assert not torch.is_autocast_enabled("cpu")
    assert net(torch.randn(2, 8)).dtype == torch.float32
    accelerator.end_training()


def test_a_prepared_model_can_be_copied_and_pickled() -> None:
    accelerator = Accelerator(precision="bf16-mixed")
    net = accelerator.prepare(model())
    x = torch.randn(2, 8)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
    accelerator.end_training()
