"""The Trainer under DeepSpeed: it trains, validates, resumes, builds under zero.Init, and reads the JSON beside the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import DeepSpeedStrategy, Trainer, TrainingModule
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

library(torch.device("cpu"))

QUIET: dict[str, Any] = {"enable_progress_bar": False, "num_sanity_val_steps": 0, "seed": 3}


def data(batch_size: int) -> DataLoader[Any]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=batch_size, shuffle=True)


class Net(TrainingModule):
    """A parameter of its own, used in the step and in forward; built where configure_model says, or at once."""

    def __init__(self, late: bool = False, losses: list[float] | None = None) -> None:
        super().__init__()
        self.late = late
        self.losses = [] if losses is None else losses
        self.was_cut_up = False
        self.gain = nn.Parameter(torch.ones(1))
        if not late:
            self.build()

    def build(self) -> None:
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 1)

    def configure_model(self) -> None:
        if self.late and not hasattr(self, "head"):
            self.build()
            self.was_cut_up = hasattr(self.head.weight, "ds_id")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.gain

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self(x) * self.gain - y).pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", (self(x) * self.gain - y).pow(2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def fitted(strategy: Any, root: Path, *, epochs: int = 2, late: bool = False, **options: Any) -> tuple[Any, ...]:
    """Train; return what is to be compared, the mean of the losses over ranks among it."""
    module = Net(late)
    strategy = DeepSpeedStrategy(**strategy) if isinstance(strategy, dict) else strategy
    trainer = Trainer(**QUIET, strategy=strategy, root=root, max_epochs=epochs, gradient_clip_val=0.5, **options)
    size = trainer.world.size
    trainer.fit(module, data(4 // size), data(8 // size))
    means = [float(trainer.world.all_reduce(torch.tensor(loss, dtype=torch.float64))) / size for loss in module.losses]
    weights = {n: t.tolist() for n, t in trainer.accelerator.get_state_dict(module).items()}
    rows = dict(trainer.strategy.explain())
    trainer.accelerator.end_training()
    return means, weights, float(trainer.metrics["val_loss"]), rows, module.was_cut_up


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_it_trains_and_validates_as_one_process_does(stage: int, ranks: Any, tmp_path: Path) -> None:
    """A scheduler, clipping, accumulation; the module's own parameter in the step; stage 3 with nothing kept gathered."""
    options = {"accumulate_grad_batches": 2}
    truth = ranks(1, fitted, "single", tmp_path / "one", **options)[0]
    strategy = {"stage": stage, "stage3_param_persistence_threshold": 0}
    losses, weights, val_loss, rows, _ = ranks(2, fitted, strategy, tmp_path / "two", **options)[0]
    assert losses == pytest.approx(truth[0], rel=1e-4)
    assert val_loss == pytest.approx(truth[2], rel=1e-4)
    assert rows["ZeRO stage"].startswith(f"{stage} ")
    for name, weight in truth[1].items():
        torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(weight), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_model_is_built_in_pieces_under_stage_3(ranks: Any, tmp_path: Path) -> None:
    """configure_model runs under deepspeed.zero.Init, and the numbers are those of the model that was built whole."""
    strategy = {"stage": 3, "stage3_param_persistence_threshold": 0}
    whole = ranks(2, fitted, strategy, tmp_path / "whole")[0]
    pieces = ranks(2, fitted, strategy, tmp_path / "pieces", late=True)[0]
    assert pieces[-1] is True
    assert whole[-1] is False
    assert pieces[:3] == whole[:3]


def resumed(root: Path) -> tuple[Any, ...]:
    """The second epoch of a run whose first another process trained."""
    return fitted("deepspeed:3", root, resume="auto")


@pytest.mark.slow
def test_resumed_in_a_fresh_process_it_goes_on_bit_for_bit(ranks: Any, tmp_path: Path) -> None:
    straight = ranks(2, fitted, "deepspeed:3", tmp_path / "straight")[0]
    ranks(2, fitted, "deepspeed:3", tmp_path / "cut", epochs=1)
    rest = ranks(2, resumed, tmp_path / "cut")[0]
    assert rest[0] == straight[0][len(straight[0]) // 2 :]
    assert rest[1] == straight[1]


def contradicting(root: Path) -> str:
    config = {
        "train_micro_batch_size_per_gpu": 7,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 9.0,
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 1},
    }
    with pytest.raises(ConfigError) as caught:
        fitted(DeepSpeedStrategy(config=config), root)
    return str(caught.value)


def test_what_the_json_and_the_run_say_differently_is_listed_in_one_error(ranks: Any, tmp_path: Path) -> None:
    (said,) = ranks(1, contradicting, tmp_path)
    assert "train_micro_batch_size_per_gpu is 7 in the JSON, and the loader's batch_size is 4" in said
    assert "gradient_accumulation_steps is 5 in the JSON, and the run's accumulation is 1" in said
    assert "gradient_clipping is 9.0 in the JSON, and the run clips at 0.5" in said
    assert "the JSON has an optimizer section (AdamW), and the run brings its own optimizer" in said


def filled(root: Path) -> tuple[Any, ...]:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    return fitted({"config": config}, root)


def test_auto_values_are_filled_from_the_run(ranks: Any, tmp_path: Path) -> None:
    assert ranks(1, filled, tmp_path / "json")[0][:3] == ranks(1, fitted, "deepspeed:2", tmp_path / "plain")[0][:3]


def counted(root: Path) -> None:
    """The model is built in pieces, so that its own shapes are empty when it is summed up."""
    trainer = Trainer(**QUIET, strategy=DeepSpeedStrategy(stage=3, stage3_param_persistence_threshold=0), root=root, max_epochs=1)
    trainer.fit(Net(late=True), data(4))
    trainer.accelerator.end_training()


def test_the_summary_counts_what_stage_3_holds_in_pieces(ranks: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    total = sum(p.numel() for p in Net().parameters())
    ranks(1, counted, tmp_path)
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["parameters", str(total)] in lines
    assert any(line[:2] == ["total", "Net"] and line[2] == str(total) for line in lines)
