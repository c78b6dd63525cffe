"""What a checkpoint holds is listed here, and every entry comes back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import drivetrain
import numpy as np
import pytest
import torch
import yaml
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.strategies.checkpoint import Checkpoint as Reader
from drivetrain.strategies.errors import CheckpointError, ConfigError
from resume_jobs import Job, Ledger, Module, Recorder, loaders, train, trainer_for
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanSquaredError

VALUES = {
    *("optimizer/optimizer", "precision", "window", "scheduler/0", "scheduler/1", "scheduler/2"),
    *("progress", "loader/train", "registered/0", "callback/Checkpoint", "tracking"),
    *("hooks", "due", "metrics/last", "config"),
}
RANK_VALUES = {"rng", "metrics/train", "callback/Recorder"}
MODEL = {
    f"model/model/net.{name}"
    for name in (
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("4.weight", "4.bias"),
    )
}
PARAMETERS = [name for name in MODEL if "running" not in name and "tracked" not in name]


def newest(folder: str | Path) -> Path:
    return max((Path(folder) / "checkpoints").glob("step-*"))


def test_a_checkpoint_holds_exactly_this(tmp_path: Path) -> None:
    """A new kind of state belongs in this list, and in a test that loses it."""
    result = train(Job(epochs=1), tmp_path)
    with Reader(newest(result.folder)) as checkpoint:
        assert set(checkpoint.value_names()) == VALUES
        assert set(checkpoint.rank_value_names(0)) == RANK_VALUES
        optimizer = {f"optimizer/optimizer/{n[6:]}/{key}" for n in PARAMETERS for key in ("step", "exp_avg", "exp_avg_sq")}
        assert set(checkpoint.names()) == MODEL | optimizer
        assert set(checkpoint.rank_names(0)) == {"rng/torch"}
        assert set(checkpoint.rank_value("rng", 0)) == {"python", "numpy", "device"}
        assert checkpoint.meta["kind"] == "run"
        assert checkpoint.meta["progress"]["global_step"] == 11
        assert checkpoint.meta["plan"] == {"strategy": "single", "precision": "fp32", "data_shards": 1}
        written = yaml.safe_load((Path(result.folder) / "config.yaml").read_text())
        assert {**checkpoint.value("config"), "resume": None} == written
        assert written["resolved"]["seed"] == 3
        versions = checkpoint.manifest["torch"], checkpoint.manifest["drivetrain"]
        assert versions == (str(torch.__version__), drivetrain.__version__)


def test_every_random_generator_comes_back_last(tmp_path: Path) -> None:
    """Whatever a hook draws before the first step of a resumed run does not show."""

    class Draws(Callback):
        numbers: list[float]

        def on_train_start(self, trainer: Any, module: nn.Module) -> None:
            for _ in range(trainer.global_step):
                random.random(), np.random.rand(), torch.rand(())

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.progress.batches == 6:
                self.numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]

    whole, resumed = Draws(), Draws()
    train(Job(epochs=1), tmp_path / "whole", callbacks=[whole])
    train(Job(epochs=1), tmp_path / "cut", max_steps=4)
    train(Job(epochs=1), tmp_path / "cut", resume="auto", callbacks=[resumed])
    assert resumed.numbers == whole.numbers


def test_what_hooks_add_comes_back_to_hooks(tmp_path: Path) -> None:
    class Adds(Callback):
        got: Any = None

        def on_save_checkpoint(self, trainer: Any, module: nn.Module, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"tensor": torch.arange(3), "text": "Grüße", "tree": [1, 2.5, None]}

        def on_load_checkpoint(self, trainer: Any, module: nn.Module, checkpoint: dict[str, Any]) -> None:
            self.got = checkpoint["mine"]

    train(Job(epochs=1), tmp_path, callbacks=[Adds()], max_steps=2)
    adds = Adds()
    train(Job(epochs=1), tmp_path, callbacks=[adds], resume="auto")
    assert adds.got["tensor"].tolist() == [0, 1, 2]
    assert {k: v for k, v in adds.got.items() if k != "tensor"} == {"text": "Grüße", "tree": [1, 2.5, None]}


def test_state_that_cannot_be_saved_is_named_at_the_first_save(tmp_path: Path) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"fn": lambda: 0}

    with pytest.raises(ConfigError, match=r"callback/Odd.*fn.*function"):
        train(Job(epochs=1), tmp_path, callbacks=[Odd(), Checkpoint("1step")])


def test_nan_metrics_are_saved_and_come_back(tmp_path: Path) -> None:
    class Bad(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.log("bad", float("nan"))

    train(Job(epochs=1), tmp_path, callbacks=[Bad()], max_steps=3)
    result = train(Job(epochs=1), tmp_path, callbacks=[Bad()], resume="auto")
    assert result.progress["global_step"] == 11


def weights_untouched_by(module: nn.Module, root: Path, job: Job, checkpoint: Path, match: str) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = trainer_for(job, root)
    with pytest.raises(CheckpointError, match=match):
        trainer.fit(module, *loaders(job), resume=checkpoint)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_checkpoint_of_another_model_optimizer_or_scheduler_is_refused_and_the_weights_stay(tmp_path: Path) -> None:
    class Bigger(Module):
        def __init__(self, job: Job) -> None:
            super().__init__(job, Ledger(None))
            self.more = nn.Linear(2, 2)

    class OtherOptimizer(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.RAdam(self.parameters())

    job = Job(epochs=1, sgd=True)
    checkpoint = newest(train(job, tmp_path / "run").folder)
    weights_untouched_by(Bigger(job), tmp_path, job, checkpoint, r"another model: 2 missing.*more\.bias")
    weights_untouched_by(OtherOptimizer(job, Ledger(None)), tmp_path, job, checkpoint, "was SGD .* and is RAdam")
    other = Job(epochs=1)
    weights_untouched_by(Module(other, Ledger(None)), tmp_path, other, checkpoint, "0 scheduler.* the run has 3")


def test_a_registered_object_that_is_missing_is_named(tmp_path: Path) -> None:
    class NotRegistering(Recorder):
        def setup(self, trainer: Any, module: nn.Module, stage: str) -> None: ...

    trainer = trainer_for(Job(epochs=1), tmp_path, [NotRegistering()])
    trainer.fit(Module(Job(), Ledger(None)), *loaders(Job()))
    with pytest.raises(CheckpointError, match="no state for 'registered/0'"):
        train(Job(epochs=2), tmp_path, resume="auto")


class WithMetric(Module):
    """An object that computes its value over the epoch."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, Ledger(None))
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.error.update(batch[0][:, :1], batch[1])
        self.log("error", self.error, on_step=False, on_epoch=True)
        return loss


def error_of_an_epoch(root: Path, **options: Any) -> float:
    job = Job(epochs=1, validate=False, dropout=0.0, batch_norm=False, batch_size=2, options={"global_batch_size": 4})
    trainer = trainer_for(job, root, **options)
    trainer.fit(WithMetric(job), *loaders(job), resume=options.get("resume"))
    return trainer.metrics.get("error", 0.0)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_metric_objects_and_epoch_means_cross_a_resume_on_any_number_of_ranks(
    before: int, after: int, ranks: Any, tmp_path: Path
) -> None:
    expected = error_of_an_epoch(tmp_path / "whole")
    ranks(before, error_of_an_epoch, tmp_path / "cut", max_steps=5)
    assert ranks(after, error_of_an_epoch, tmp_path / "cut", resume="auto") == pytest.approx([expected] * after, rel=1e-6)


class Lines(IterableDataset[Any]):
    """Each rank's own stream."""

    def __iter__(self) -> Any:
        import os

        rank = int(os.environ.get("RANK", "0"))
        for i in range(20):
            yield torch.full((6,), i / 20 + rank), torch.zeros(1), 100 * rank + i


def numbers_trained_on(root: Path, **options: Any) -> list[list[int]]:
    from drivetrain.trainer.data.config import DataLoaderConfiguration

    job = Job(epochs=1, validate=False, batch_norm=False)
    seen: list[list[int]] = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[2].tolist())

    config = DataLoaderConfiguration(already_sharded=True)
    trainer = trainer_for(job, root, [Notes()], dataloader_config=config, **options)
    trainer.fit(Module(job, Ledger(None)), DataLoader(Lines(), batch_size=4), resume=options.get("resume"))
    return seen


def test_a_stream_that_each_rank_reads_by_itself_goes_on_on_each(ranks: Any, tmp_path: Path) -> None:
    """Its position is each rank's own state, not rank 0's."""
    whole = ranks(2, numbers_trained_on, tmp_path / "whole")
    first = ranks(2, numbers_trained_on, tmp_path / "cut", max_steps=2)
    second = ranks(2, numbers_trained_on, tmp_path / "cut", resume="auto")
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert whole[1][0] == [100, 101, 102, 103]
