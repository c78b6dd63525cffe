"""Manual optimisation in a pipeline: a step of one's own that says when, by `forward_backward(batch)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.errors import ConfigError, DataError
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Two(TrainingModule):
    """One optimizer for the body, one for the head, which steps each second batch; two backward passes for one step."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def compute_loss(self, output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        body, head = self.optimizers()
        loss = self.forward_backward(batch)
        if batch_idx % 2:
            self.clip_gradients(head, 0.05)
            head.step()
            head.zero_grad()
            self.forward_backward(batch)
        self.clip_gradients(body, 0.1)
        body.step()
        body.zero_grad()
        self.log("twice", 2 * loss, on_step=True)
        return loss

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net[:4].parameters(), lr=0.3, momentum=0.9),
            torch.optim.AdamW(self.net[4].parameters(), lr=0.02),
        ]


class Called(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.compute_loss(self(batch[0]), batch)
        self.manual_backward(loss)
        return loss


class Summed(Two):
    def compute_loss(self, output: Tensor, batch: Any) -> Any:
        return {"loss": F.cross_entropy(output, batch[1], reduction="sum"), "num_items": len(output)}


class Automatic(Two):
    automatic_optimization = True


def fit(root: Path, strategy: str, make: Any = Two) -> Any:
    """26 samples in batches of 8, two epochs: the last batch has two, and fewer than there are chunks."""
    world = World.start("cpu", need_group=True)
    try:
        generator = torch.Generator().manual_seed(7)
        data = TensorDataset(
            torch.randn(26, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (26,), generator=generator)
        )
        trainer = Trainer(
            max_epochs=2,
            seed=1,
            strategy=strategy,
            root=root,
            name="run",
            devices=1 if world.size == 1 else "auto",
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = make()
        trainer.fit(module, DataLoader(data, batch_size=8 // trainer.accelerator.strategy.data_shard[1]))
        whole = trainer.accelerator.strategy.full_state_dict(module)
        rows = read_metrics(trainer.root) if world.is_main else []
        return [row["metrics"]["twice"] for row in rows if "twice" in row["metrics"]], whole
    except (ConfigError, DataError) as error:
        return str(error)
    finally:
        world.stop()


@pytest.mark.parametrize(("strategy", "size"), [("pp:2", 2), pytest.param("fsdp:2+pp:2", 4, marks=pytest.mark.slow)])
def test_a_step_of_ones_own_gives_the_numbers_of_one_process(strategy: str, size: int, ranks: Any, tmp_path: Path) -> None:
    ((losses, weights),) = ranks(1, fit, tmp_path / "one", "single")
    found, state = ranks(size, fit, tmp_path / "many", strategy)[0]
    assert len(losses) == 8
    assert found == pytest.approx(losses, rel=1e-11)
    assert state.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("strategy", "size", "make", "why"),
    [
        ("pp:2", 2, Called, "no rank has all of it"),
        ("pp:2", 2, Summed, "each loss is a"),
        ("single", 1, Summed, "each loss is a"),
        ("single", 1, Automatic, "automatic_optimization = False"),
    ],
)
def test_what_a_step_of_ones_own_cannot_do_is_refused(
    strategy: str, size: int, make: Any, why: str, ranks: Any, tmp_path: Path
) -> None:
    for said in ranks(size, fit, tmp_path, strategy, make):
        assert isinstance(said, str)
        assert why in said
