"""Weights that come from outside reach ZeRO's fp32 masters: by load_state_dict, load_model, and under `gathered`.

DeepSpeed's own engine keeps the old masters, so that the first step brings the old weights back. The truth is a plain SGD step
from the new weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.errors import CheckpointError, ConfigError
from torch import Tensor, nn

library(torch.device("cpu"))


class Tied(nn.Module):
    """A head that shares its matrix with the first layer, a frozen parameter, and a buffer."""

    running: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.rand(5), requires_grad=False)
        self.register_buffer("running", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()) * self.scale


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))


def stepped(seed: int) -> dict[str, list[float]]:
    """One plain SGD step from the weights of `seed`."""
    model = Tied(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).pow(2).sum().backward()
    optimizer.step()
    return {n: t.flatten().tolist() for n, t in model.state_dict().items()}


def by_load_state_dict(accelerator: Accelerator, model: Any, folder: Path) -> None:
    model.load_state_dict(Tied(1).state_dict())


def by_a_part_at_a_time(accelerator: Accelerator, model: Any, folder: Path) -> None:
    """Not the model but its children are loaded; what lies beside them in the model itself after them, not strictly."""
    new = Tied(1)
    model.first.load_state_dict(new.first.state_dict())
    model.second.load_state_dict(new.second.state_dict())
    model.load_state_dict({"scale": new.scale, "running": new.running}, strict=False)


def by_load_model(accelerator: Accelerator, model: Any, folder: Path) -> None:
    from drivetrain.strategies.checkpoint.weights import save_weights, untied

    if accelerator.is_main_process:
        kept, tied = untied(Tied(1).state_dict())
        save_weights(folder, {n: t.nbytes for n, t in kept.items()}, lambda names: {n: kept[n] for n in names}, metadata=tied)
    accelerator.wait_for_everyone()
    before = accelerator.get_state_dict(model)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        accelerator.load_model(model, folder / "nowhere")
    after = accelerator.get_state_dict(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert accelerator.load_model(model, folder) == []


def by_writing(accelerator: Accelerator, model: Any, folder: Path) -> None:
    """Rank 0 alone writes; the buffer is no parameter, and is given to all."""
    with accelerator.strategy.gathered(model.parameters(), modifier_rank=0), torch.no_grad():  # pyright: ignore[reportAttributeAccessIssue]
        new = Tied(1)
        model.running.copy_(new.running)
        if accelerator.is_main_process:
            for own, given in zip(model.parameters(), new.parameters(), strict=True):
                assert own.shape == given.shape
                own.copy_(given)


WAYS = [by_load_state_dict, by_a_part_at_a_time, by_load_model, by_writing]


def weights_after_a_step(way: Callable[..., None], stage: int, options: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    from drivetrain import DeepSpeedStrategy

    accelerator = Accelerator(strategy=DeepSpeedStrategy(stage=stage, **options))
    model = Tied(0)
    made = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, made)
    way(accelerator, model, folder)
    rows = X[accelerator.process_index :: accelerator.num_processes]
    accelerator.backward(model(rows).float().pow(2).sum() * accelerator.num_processes)
    optimizer.step()
    found = {n: t.flatten().tolist() for n, t in accelerator.get_state_dict(model).items()}
    if stage:
        with pytest.raises(ConfigError, match=r"SGD.state_dict\(\) and load_state_dict\(\) would see none of it"):
            made.state_dict()
        with pytest.raises(ConfigError, match="assign=True"):
            model.load_state_dict(Tied(0).state_dict(), assign=True)
    if stage == 3 and options:
        with pytest.raises(RuntimeError, match=r"first.bias is given empty: .* accelerator.get_state_dict"):
            model.load_state_dict(model.state_dict())
    accelerator.end_training()
    return found


CUT_UP = {"stage3_param_persistence_threshold": 0}


def each_way(stage: int, options: dict[str, Any], folder: Path) -> list[dict[str, list[float]]]:
    return [weights_after_a_step(way, stage, options, folder) for way in WAYS]


@pytest.mark.parametrize(
    ("stage", "options"), [(1, {}), (2, {}), (3, CUT_UP)], ids=lambda v: str(v) if isinstance(v, int) else ""
)
def test_the_first_step_starts_from_the_weights_that_were_written(
    stage: int, options: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    """By load_state_dict of the model, and of its parts; by load_model; under `gathered`."""
    for way, found in zip(WAYS, ranks(2, each_way, stage, options, tmp_path)[0], strict=True):
        for name, weight in stepped(1).items():
            assert found[name] == pytest.approx(weight, rel=1e-5, abs=1e-6), (way, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {}),
        (3, {}),
        (1, {"precision": "bf16-mixed"}),
        (2, {"precision": "bf16-mixed", "offload_optimizer": "cpu"}),
        (3, {"precision": "bf16-mixed", "offload_optimizer": "cpu", "offload_parameters": "cpu"} | CUT_UP),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else "+".join(v),
)
def test_the_same_in_16_bits_and_offloaded(stage: int, options: dict[str, Any], ranks: Any, tmp_path: Path) -> None:
    loose = 0.03 if "precision" in options else 1e-5
    for way, found in zip(WAYS, ranks(2, each_way, stage, options, tmp_path)[0], strict=True):
        for name, weight in stepped(1).items():
            assert found[name] == pytest.approx(weight, rel=loose, abs=loose), (way, name)
