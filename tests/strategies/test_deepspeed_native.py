"""DeepSpeed's own checkpoints: written, read back, read by DeepSpeed itself. The truth is the run that was not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, DeepSpeedStrategy
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.deepspeed_native import read_universal
from drivetrain.strategies.errors import CheckpointError
from torch import nn

library(torch.device("cpu"))

X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A frozen matrix and a buffer beside what is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.head = nn.Linear(7, 3)
        self.register_buffer("shift", torch.rand(3))

    def forward(self, x: Any) -> Any:
        return self.head(self.frozen(x).tanh()) + self.shift


def prepared(strategy: Any, *, new: bool) -> tuple[Accelerator, Any, Any]:
    """With `new`, other weights and another learning rate than those that are to be loaded."""
    accelerator = Accelerator(strategy=strategy)
    model = Net()
    if new:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5 if new else 1e-2)
    return accelerator, *accelerator.prepare(model, optimizer)


def steps(accelerator: Accelerator, model: Any, optimizer: Any, which: range) -> list[float]:
    losses = []
    for i in which:
        loss = model(X[i][accelerator.process_index :: accelerator.num_processes]).float().pow(2).mean()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def saved(stage: int, folder: Path) -> tuple[list[float], list[float]]:
    """Three steps, both formats, three steps more: those losses, and the weights at the save."""
    accelerator, model, optimizer = prepared(DeepSpeedStrategy(stage=stage), new=False)
    steps(accelerator, model, optimizer, range(3))
    weights = accelerator.get_state_dict(model)
    held: Any = accelerator.strategy
    held.save_native(model, folder / "native")
    if stage:
        held.save_universal(model, folder / "universal")
    losses = steps(accelerator, model, optimizer, range(3, 6))
    accelerator.end_training()
    return losses, [float(w) for t in weights.values() for w in t.flatten()]


def native(stage: int, folder: Path) -> list[float]:
    accelerator, model, optimizer = prepared(DeepSpeedStrategy(stage=stage), new=True)
    held: Any = accelerator.strategy
    with pytest.raises(CheckpointError, match="no file 'latest'"):
        held.load_native(model, folder)
    with pytest.raises(CheckpointError, match="holds step"):
        held.load_native(model, folder / "native", "stp")
    held.load_native(model, folder / "native")
    losses = steps(accelerator, model, optimizer, range(3, 6))
    accelerator.end_training()
    return losses


def universal(strategy: str, folder: Path) -> list[float]:
    accelerator, model, optimizer = prepared(strategy, new=True)
    if strategy.startswith("deepspeed"):
        held: Any = accelerator.strategy
        held.load_universal(model, folder / "universal")
    else:
        own, inner = accelerator.unwrap_model(model), optimizer.optimizer
        read = read_universal(folder / "universal", None, "model", own, inner)
        accelerator.strategy.load_state_tensors({"model": own}, {"optimizer": inner}, *read)
    losses = steps(accelerator, model, optimizer, range(3, 6))
    accelerator.end_training()
    return losses


def by_deepspeed_itself(stage: int, folder: Path) -> list[float]:
    """Its own loader reads the universal checkpoint that was written here: the trained weights that it has then."""
    strategy = DeepSpeedStrategy(stage=stage, config={"checkpoint": {"load_universal": True}})
    accelerator, model, _ = prepared(strategy, new=True)
    strategy.engine(model).load_checkpoint(str(folder / "universal"), tag="universal")
    found = accelerator.get_state_dict(model)
    accelerator.end_training()
    return [float(w) for n, t in found.items() if n.startswith("head") for w in t.flatten()]


def of_another_number(folder: Path) -> str:
    accelerator, model, _ = prepared(DeepSpeedStrategy(stage=2), new=True)
    held: Any = accelerator.strategy
    with pytest.raises(CheckpointError) as caught:
        held.load_native(model, folder / "native")
    accelerator.end_training()
    return str(caught.value)


def test_stage_2_goes_on_from_both_formats(ranks: Any, tmp_path: Path) -> None:
    """The native one with the same bits; the universal one on one process, in stage 3."""
    (losses, weights), _ = ranks(2, saved, 2, tmp_path)
    assert ranks(2, native, 2, tmp_path)[0] == losses
    (said,) = ranks(1, of_another_number, tmp_path)
    assert "was written by 2 processes, and this run has 1" in said
    assert ranks(1, universal, "deepspeed:3", tmp_path)[0] == pytest.approx(losses, rel=1e-5)
    whole = DeepSpeedStrategy.fp32_weights(tmp_path / "native")
    assert [
        float(w) for n in ("frozen.weight", "frozen.bias", "head.weight", "head.bias") for w in whole[n].flatten()
    ] == weights[3:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_other_stages_go_on_too(stage: int, ranks: Any, tmp_path: Path) -> None:
    (losses, weights), _ = ranks(2, saved, stage, tmp_path)
    assert ranks(2, native, stage, tmp_path)[0] == losses
    for strategy, size in (("deepspeed:2", 1), ("deepspeed:3", 2), ("ddp", 2), ("fsdp", 2)):
        assert ranks(size, universal, strategy, tmp_path)[0] == pytest.approx(losses, rel=1e-5), strategy
    assert ranks(2, by_deepspeed_itself, stage, tmp_path)[0] == weights[-24:]


@pytest.mark.slow
def test_stage_0_has_a_native_checkpoint(ranks: Any, tmp_path: Path) -> None:
    (losses, _), _ = ranks(2, saved, 0, tmp_path)
    assert ranks(2, native, 0, tmp_path)[0] == losses


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this code ran",)


def evil(folder: Path) -> str:
    accelerator, model, _ = prepared(DeepSpeedStrategy(stage=2), new=True)
    held: Any = accelerator.strategy
    with pytest.raises(CheckpointError) as caught:
        held.load_universal(model, folder, "u")
    accelerator.end_training()
    return str(caught.value)


def test_a_universal_checkpoint_that_would_run_code_is_not_read(
    ranks: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "u" / "zero").mkdir(parents=True)
    torch.save({"param_groups": Evil()}, tmp_path / "u" / "zero" / "optimizer_state.pt")
    (said,) = ranks(1, evil, tmp_path)
    assert "holds more than tensors and plain values, and is not read" in said
    assert "this code ran" not in capfd.readouterr().out
