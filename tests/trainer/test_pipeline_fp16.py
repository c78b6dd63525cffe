"""fp16 in a pipeline: one loss scale for all stages, and a step is left out by all of them or by none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.precision.mixed import FP16Mixed
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DIM = 8


class Net(TrainingModule):
    """Six layers. `frozen`: the first three, all of the first stage. `bad`: the step whose loss is not finite."""

    def __init__(self, *, frozen: bool, bad: int, cut: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(6)))
        self.bad, self.cut = bad, cut
        if frozen:
            self.net[:3].requires_grad_(False)
        self.scales: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def compute_loss(self, output: Tensor, batch: Any) -> Tensor:
        factor = math.nan if self.trainer.progress.batches // self.cut == self.bad else 1.0
        return F.mse_loss(output, batch[1]) * factor

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        precision = self.trainer.accelerator.precision
        assert isinstance(precision, FP16Mixed)
        if self.trainer.progress.batches % self.cut == 0:
            self.scales.append(precision.scale_value)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


def fit(
    root: Path, strategy: str, *, frozen: bool = False, bad: int = -1, cut: int = 1, resume: Any = None, **options: Any
) -> Any:
    """Train 12 batches from a scale that overflows at first; return losses, scales, steps, and this rank's weights.

    Args:
        cut: each batch is given to the trainer as a window of so many.
    """
    world = World.start("cpu", need_group=True)
    data = torch.randn(96, DIM, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        **{"max_epochs": 1, "accumulate_grad_batches": cut, **options},
        strategy=strategy,
        precision=FP16Mixed(init_scale=2.0**24, growth_interval=3),
        root=root,
        name="run",
        seed=1,
        devices=1 if world.size == 1 else "auto",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net(frozen=frozen, bad=bad, cut=cut)
    shards = trainer.accelerator.strategy.data_shard[1]
    trainer.fit(module, DataLoader(TensorDataset(data, data.flip(0).tanh()), batch_size=8 // shards // cut), resume=resume)
    losses = [row["metrics"]["loss"] for row in read_metrics(trainer.root) if "loss" in row["metrics"]] if world.is_main else []
    weights = {name: p.detach() for name, p in module.named_parameters() if not p.is_meta}
    weights = {name: getattr(p, "_local_tensor", p).clone() for name, p in weights.items()}
    found = losses, module.scales, trainer.global_step, weights
    world.stop()
    return found


@pytest.mark.parametrize(
    ("strategy", "size", "chunks", "options"),
    [
        ("pp:2", 2, 4, {"frozen": True, "bad": 6}),
        pytest.param("pp:2", 2, 4, {}, marks=pytest.mark.slow),
        pytest.param("pp:4", 4, 8, {"frozen": True}, marks=pytest.mark.slow),
    ],
)
def test_the_scale_and_the_steps_left_out_are_those_of_one_process(
    strategy: str, size: int, chunks: int, options: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    """The first scales overflow, in some stages only; a stage that is frozen has no gradients to find it by.

    The truth runs the chunks as a window: 16 bits overflow at another scale where a product sums over more samples.
    """
    ((_, scales, steps, weights),) = ranks(1, fit, tmp_path / "one", "single", cut=chunks, **options)
    found = ranks(size, fit, tmp_path / "many", strategy, **options)
    assert scales[0] < 2.0**24
    assert len(set(scales)) > 2
    for _, own_scales, own_steps, _ in found:
        assert own_scales == scales
        assert own_steps == steps
    held = {name: weight for rank in found for name, weight in rank[3].items()}
    assert held.keys() == weights.keys()
    for name, weight in held.items():
        torch.testing.assert_close(weight, weights[name], rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp:2+pp:2", "ddp:2+pp:2"])
def test_all_ranks_of_all_axes_have_one_scale(strategy: str, ranks: Any, tmp_path: Path) -> None:
    found = ranks(4, fit, tmp_path, strategy)
    assert found[0][1][0] < 2.0**24
    assert all((scales, steps) == found[0][1:3] for _, scales, steps, _ in found)


def cut_and_resumed(root: Path) -> Any:
    whole = fit(root / "whole", "pp:2", max_epochs=2)
    fit(root / "cut", "pp:2", max_epochs=2, max_steps=5, callbacks=[Checkpoint(save_last=True)])
    return whole, fit(root / "cut", "pp:2", max_epochs=2, resume="auto")


@pytest.mark.slow
def test_a_resumed_run_has_the_scale_and_the_bits_of_one_that_was_not_stopped(ranks: Any, tmp_path: Path) -> None:
    for (losses, scales, steps, weights), resumed in ranks(2, cut_and_resumed, tmp_path, timeout=120):
        assert resumed[0] == losses
        assert resumed[1] == scales[-len(resumed[1]) :]
        assert resumed[2] == steps
        assert all(torch.equal(resumed[3][name], weight) for name, weight in weights.items())
