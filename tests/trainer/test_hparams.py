"""A module's hyperparameters: kept, written beside the weights as plain values, and enough to make the module again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from drivetrain import Trainer, TrainingModule
from drivetrain.strategies.errors import CheckpointError, ConfigError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

DATA = TensorDataset(torch.arange(8.0).reshape(8, 1))


class Wide(TrainingModule):
    def __init__(self, width: int, *, learning_rate: Any = 0.01, loss: nn.Module | None = None, **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="loss")
        self.layer = nn.Linear(1, width)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


def train(module: TrainingModule, root: Path) -> Trainer:
    trainer = Trainer(root=root, max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(DATA, batch_size=4))
    return trainer


def test_the_arguments_of_init_are_kept() -> None:
    module = Wide(3, loss=nn.MSELoss(), depth=2)
    assert module.hparams == {"width": 3, "learning_rate": 0.01, "depth": 2}
    assert module.hparams.width == 3
    with pytest.raises(AttributeError, match="Did you mean 'width'"):
        _ = module.hparams.widht


def test_a_subclass_keeps_its_own_and_its_bases_arguments() -> None:
    class Wider(Wide):
        def __init__(self, extra: int) -> None:
            super().__init__(2 * extra)

    assert Wider(3).hparams == {"extra": 3, "width": 6, "learning_rate": 0.01}


@pytest.mark.parametrize("whole_run", [False, True])
def test_a_checkpoint_makes_the_module_again(whole_run: bool, tmp_path: Path) -> None:
    module = Wide(3, learning_rate=np.float64(0.02), sizes=(1, 2))
    trainer = train(module, tmp_path)
    path = trainer.root if whole_run else trainer.root / "checkpoints" / "step-00000002"
    again = Wide.load_from_checkpoint(path)
    assert again.hparams == {"width": 3, "learning_rate": 0.02, "sizes": [1, 2]}
    assert torch.equal(again.layer.weight, module.layer.weight)
    assert Wide.load_from_checkpoint(path, learning_rate=1.0).hparams.learning_rate == 1.0
    written = yaml.safe_load((trainer.root / "config.yaml").read_text())
    assert written["hparams"] == {"width": 3, "learning_rate": 0.02, "sizes": [1, 2]}


def test_an_argument_that_nobody_kept_is_asked_for(tmp_path: Path) -> None:
    class Silent(Wide):
        def save_hyperparameters(self, *names: Any, **options: Any) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = train(Silent(3), tmp_path)
    with pytest.raises(ConfigError, match="Silent needs the argument 'width'"):
        Silent.load_from_checkpoint(trainer.root)
    assert Silent.load_from_checkpoint(trainer.root, width=3).layer.out_features == 3
    with pytest.raises(CheckpointError, match="shape"):
        Silent.load_from_checkpoint(trainer.root, width=4)


def test_what_no_file_can_hold_is_said_at_once() -> None:
    class Careless(TrainingModule):
        def __init__(self, backbone: nn.Module, width: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.warns(UserWarning, match=r"backbone \(Linear\).*ignore=\['backbone'\]"):
        Careless(nn.Linear(1, 1))


def test_a_namespace_or_single_names_are_kept_as_asked() -> None:
    class Asks(TrainingModule):
        def __init__(self, what: Any, depth: int = 2, width: int = 3) -> None:
            super().__init__()
            if what == "names":
                self.save_hyperparameters("depth", "width")
            elif what == "typo":
                self.save_hyperparameters("dept")
            else:
                self.save_hyperparameters(what)

    assert Asks("names").hparams == {"depth": 2, "width": 3}
    assert Asks(argparse.Namespace(rate=1)).hparams == {"rate": 1}
    with pytest.raises(ConfigError, match="Did you mean 'depth'"):
        Asks("typo")
    with pytest.raises(ConfigError, match="was called outside of it"):
        Asks({}).save_hyperparameters()
