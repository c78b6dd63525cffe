"""Every optimizer of torch on parameters in pieces: the weights of one process, or a refusal that says what to take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

EACH_ELEMENT = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
WHOLE_ONLY = ("Adafactor", "LBFGS", "Muon", "Rprop")
ELSEWHERE = {"SparseAdam", "Optimizer"}  # takes sparse gradients only; the base class


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def trained(name: str, strategy: str | None) -> list[Tensor]:
    net: Any = Net()
    optimizer: Any = getattr(torch.optim, name)(net.parameters(), lr=0.01)
    accelerator = None if strategy is None else Accelerator(strategy=strategy)
    if accelerator is not None:
        net, optimizer = accelerator.prepare(net, optimizer)
    for step in range(4):
        loss = net(torch.randn(4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)).pow(2).mean()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in net.parameters()]


def on_two(strategy: str) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
    refused: dict[str, str] = {}
    for name in WHOLE_ONLY:
        with pytest.raises(ConfigError) as found:
            trained(name, strategy)
        refused[name] = str(found.value)
    return {name: trained(name, strategy) for name in EACH_ELEMENT}, refused


@pytest.mark.parametrize("strategy", ["fsdp", "tp:2"])
def test_torchs_optimizers_step_pieces_as_the_whole_or_are_refused_by_name(strategy: str, ranks: Any) -> None:
    """Both ranks have the same batch, so that one process is the truth."""
    truth = {name: trained(name, None) for name in EACH_ELEMENT}
    for found, refused in ranks(2, on_two, strategy):
        for name, weights in truth.items():
            for weight, expected in zip(found[name], weights, strict=True):
                torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        for name, message in refused.items():
            assert message.startswith(f"{name} was given parameters in pieces")
        assert "drivetrain.MuonAdamW" in refused["Muon"]


def test_no_optimizer_of_torchs_is_left_out() -> None:
    kinds = {n: kind for n, kind in vars(torch.optim).items() if isinstance(kind, type)}
    known = {n for n, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    assert known == {*EACH_ELEMENT, *WHOLE_ONLY, *ELSEWHERE}
