"""Gradients that DeepSpeed keeps in buffers of its own are those of this window, also where a parameter takes no part in it.

Under stage 3, and with an offloaded optimizer, its buffers keep what came last: a layer that rests would be stepped with that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain import Accelerator, DeepSpeedStrategy
from drivetrain.strategies.deepspeed_engine import library
from torch import Tensor, nn

library(torch.device("cpu"))

X = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1))
WINDOWS = {"of one": (1, (1, 0, 0, 1, 0, 1, 1, 0)), "of two": (2, (1, 1, 0, 1, 0, 0, 1, 0))}
"""Micro-batches a step, and in which of them the layer `seldom` takes part."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.seldom = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, both: int) -> Tensor:
        h = self.always(x).tanh()
        return h + self.seldom(x) if both else h


def plain(window: int, both: tuple[int, ...]) -> dict[str, Tensor]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i, (x, wanted) in enumerate(zip(X, both, strict=True)):
        (model(x, wanted).pow(2).mean() / window).backward()
        if (i + 1) % window == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            for parameter in model.parameters():  # a piece is stepped as a whole: zeros where nothing came, not None
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def trained(options: dict[str, Any], window: int, both: tuple[int, ...]) -> dict[str, Tensor]:
    accelerator = Accelerator(strategy=DeepSpeedStrategy(**options), gradient_accumulation_steps=window)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for x, wanted in zip(X, both, strict=True):
        with accelerator.accumulate(model):
            mine = x[accelerator.process_index :: accelerator.num_processes]
            accelerator.backward(model(mine, wanted).pow(2).mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    found = accelerator.get_state_dict(model)
    accelerator.end_training()
    return found


CPU = {"offload_optimizer": "cpu"}
ALL = [{"stage": s} for s in (0, 1, 2)] + [{"stage": s} | CPU for s in (1, 2, 3)]
ALL += [{"stage": 3, "stage3_param_persistence_threshold": 0}]


@pytest.mark.parametrize("window", list(WINDOWS))
@pytest.mark.parametrize("options", [{"stage": 3}, *(pytest.param(o, marks=pytest.mark.slow) for o in ALL)], ids=str)
def test_a_layer_that_rests_keeps_no_gradient_of_an_earlier_window(options: dict[str, Any], window: str, ranks: Any) -> None:
    truth = plain(*WINDOWS[window])
    for name, weight in ranks(2, trained, options, *WINDOWS[window])[0].items():
        torch.testing.assert_close(weight, truth[name], rtol=1e-5, atol=1e-6, msg=name)
