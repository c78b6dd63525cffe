"""What a script that was written for Lightning does in its first hour: its data module, its questions, its None."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Checkpoint, Trainer, TrainingModule
from drivetrain.callbacks.early_stopping import EarlyStopping
from drivetrain.strategies.errors import ConfigError, UnknownName
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

DATA = TensorDataset(torch.arange(10.0).reshape(10, 1))


class Line(TrainingModule):
    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.learning_rate = learning_rate

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self.layer(batch[0]).pow(2).mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Numbers:
    """A data module: any object with these methods."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def prepare_data(self) -> None:
        self.told.append("prepare")

    def setup(self, stage: str) -> None:
        self.told.append(f"setup {stage}")

    def teardown(self, stage: str) -> None:
        self.told.append(f"teardown {stage}")

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=2)

    def val_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=5)

    test_dataloader = predict_dataloader = val_dataloader


def quiet(root: Path, **options: Any) -> Trainer:
    return Trainer(**({"root": root, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1} | options))


def test_a_data_module_may_stand_in_the_loaders_place(tmp_path: Path) -> None:
    data, trainer, module = Numbers(), quiet(tmp_path), Line()
    module.predict_step = lambda batch, batch_idx: module.layer(batch[0])  # type: ignore[method-assign]
    trainer.fit(module, data)
    assert (trainer.datamodule, trainer.global_step, trainer.num_val_batches) == (data, 5, [2])
    assert trainer.validate(module, data) == trainer.test(module, data) == trainer.validate(module, datamodule=data)
    assert [len(p) for p in trainer.predict(module, data)] == [5, 5]
    stages = ("fit", "validate", "test", "validate", "predict")
    assert data.told == [word for s in stages for word in ("prepare", f"setup {s}", f"teardown {s}")]


def test_an_evaluation_without_a_module_is_of_the_fitted_one(tmp_path: Path) -> None:
    trainer, module = quiet(tmp_path), Line()
    with pytest.raises(ConfigError, match="this trainer has fitted none yet"):
        trainer.validate(dataloaders=DataLoader(DATA))
    trainer.fit(module, Numbers())
    assert trainer.test(datamodule=Numbers()) == trainer.test(module, Numbers())


@pytest.mark.parametrize("which", ["last", "best"])
def test_last_and_best_are_those_of_the_trainers_own_run(which: str, tmp_path: Path) -> None:
    """Another run of the same name began later: its weights would be silently the wrong ones."""
    mine = quiet(tmp_path, callbacks=Checkpoint(monitor="value"))
    module = Line()
    mine.fit(module, Numbers())
    own = mine.validate(module, Numbers())
    quiet(tmp_path, callbacks=Checkpoint(monitor="value")).fit(Line(), Numbers())
    assert mine.validate(module, Numbers(), ckpt_path=which) == own


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 3}, 15),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 9),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "max_steps": 4}, 4),
        ({"max_epochs": None, "max_steps": 7}, 7),
        ({"max_epochs": 3, "fast_dev_run": 2}, 2),
    ],
)
def test_the_number_of_steps_is_known_when_the_optimizers_are_made(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    class Scheduled(Line):
        def configure_optimizers(self) -> Any:
            self.total = self.trainer.estimated_stepping_batches
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.total)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, trainer = Scheduled(), quiet(tmp_path, **options)
    trainer.fit(module, Numbers())
    assert module.total == steps == trainer.global_step == trainer.estimated_stepping_batches


def test_an_unknown_number_of_steps_is_an_error(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(DATA)

    class Asks(Line):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    for options, why in (({"max_epochs": 2}, "no length"), ({"max_epochs": None, "max_time": "1h"}, "neither max_epochs nor")):
        with pytest.raises(ConfigError, match=why):
            quiet(tmp_path, **options).fit(Asks(), DataLoader(Endless(), batch_size=2))


def test_the_trainer_answers_under_lightnings_names(tmp_path: Path) -> None:
    stopping, checkpoint = EarlyStopping("value"), Checkpoint(monitor="value")
    seen: list[bool] = []

    class Looks(Line):
        def on_validation_start(self) -> None:
            seen.append(self.trainer.sanity_checking)

    trainer = quiet(tmp_path, callbacks=[stopping, checkpoint])
    trainer.fit(Looks(), Numbers())
    assert seen == [True, False]
    assert (trainer.is_global_zero, trainer.global_rank, trainer.local_rank, trainer.node_rank) == (True, 0, 0, 0)
    assert (trainer.world_size, trainer.default_root_dir, trainer.log_dir) == (1, str(tmp_path), str(trainer.root))
    assert (trainer.checkpoint_callback, trainer.early_stopping_callback) == (checkpoint, stopping)
    assert trainer.callback_metrics["value"].item() == pytest.approx(trainer.metrics["value"])


def test_none_means_the_default_where_lightning_writes_it(tmp_path: Path) -> None:
    """enable_checkpointing=None, Lightning's default, must not switch checkpoints off."""
    names = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps", "log_every_n_steps",
             "gradient_clip_algorithm", "deterministic")  # fmt: skip
    options = Trainer(root=tmp_path, **dict.fromkeys(names)).options  # type: ignore[arg-type]
    assert [options[name] for name in names] == [True, True, True, 2, 50, "norm", False]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (Trainer, {"sync_batchnorm": True}, "DDPStrategy(sync_batchnorm=True)"),
        (Trainer, {"reload_dataloaders_every_n_epochs": 1}, "set_epoch"),
        (Accelerator, {"split_batches": True}, "dataloader_config=DataLoaderConfiguration(...)"),
    ],
)
def test_a_peers_argument_that_is_elsewhere_here_says_where(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownName, match=re.escape(words)):
        make(**options)
    make(**dict.fromkeys(options))  # their "not given"


@pytest.mark.parametrize("several", [True, False])
def test_an_evaluation_step_that_does_not_take_what_it_is_given_is_explained(several: bool, tmp_path: Path) -> None:
    class Short(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    class Long(Line):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]

    loaders = [DataLoader(DATA), DataLoader(DATA)] if several else DataLoader(DATA)
    trainer = quiet(tmp_path)
    trainer.validate(Long() if several else Short(), loaders)
    with pytest.raises(ConfigError, match=r"validation_step\(.*dataloader_idx.*Write validation_step\(self, batch, batch_idx"):
        trainer.validate(Short() if several else Long(), loaders)
