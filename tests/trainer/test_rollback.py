"""A rollback under everything that a training may be: sharded, with loader workers, with a loss scale, at its very end.

The truth is the run that never saw those data (tests/callbacks/test_health.py has the functions, and the plain cases).
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.health import Health
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.callbacks.loggers.wandb import WandbLogger
from drivetrain.strategies.errors import LossSpikeError
from drivetrain.strategies.precision.mixed import FP16Mixed
from drivetrain.trainer.trainer import Trainer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "callbacks"))

from test_health import BATCH, HIGH, Losses, Net, data, fit, healing, same, without


def run(given: Any, root: Path, health: Health | None = None, *, workers: int = 0, **options: Any) -> dict[str, Any]:
    """As `fit` there, for any strategy and loader; the last checkpoint has the state, whatever holds it."""
    losses = Losses()
    options = {"max_epochs": 1, "log_every_n_steps": 5, "seed": 2, "name": "run"} | options
    callbacks = [losses, *([health] if health else []), Checkpoint("4step")]
    trainer = Trainer(**options, root=root, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Net(dropout=0.0 if options.get("strategy") else 0.2), DataLoader(given, batch_size=BATCH, num_workers=workers))
    path = trainer.store.path_of(trainer.progress.global_step)
    assert path is not None
    with trainer.store.open(path) as checkpoint:
        names = [name for name in checkpoint.names() if name.startswith(("model/", "optimizer/"))]
        state = {name: checkpoint.tensor(name).tolist() for name in names}
        values = {name: checkpoint.value(name) for name in checkpoint.value_names() if "scaler" in name or "precision" in name}
    lines = read_metrics(trainer.root) if trainer.world.is_main else []
    return {
        "losses": losses.found,
        "state": state,
        "values": values,
        "logged": [(line["step"], line["metrics"]) for line in lines],
    }


def on_ranks(root: Path, size: int, options: dict[str, Any], poison: float) -> list[Any]:
    given, health = data(40, [22], size=size, value=poison), healing(on_nonfinite="rollback")
    result = run(given, root / "healed", health, **options)
    entries = [(entry["step"], entry["to"]) for entry in health.rollbacks]
    first = 20
    last = 25 if math.isfinite(poison) else 23
    same(result, run(without(given, range(first, last), size=size), root / "never", **options))
    return entries


@pytest.mark.parametrize("poison", [HIGH, math.nan])
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_sharded_and_replicated_models_go_back_alike(strategy: str, poison: float, ranks: Any, tmp_path: Path) -> None:
    """Only rank 1 gets the poisoned sample. The shards are read back from the checkpoint, and the run never saw those data."""
    assert ranks(2, on_ranks, tmp_path, 2 * BATCH, {"strategy": strategy}, poison) == [[(23, 20)]] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_had_read_ahead_are_started_again(workers: int, tmp_path: Path) -> None:
    given, health = data(40, [22]), healing()
    result = run(given, tmp_path / "healed", health, workers=workers)
    assert [(entry["step"], entry["to"]) for entry in health.rollbacks] == [(23, 20)]
    same(result, run(without(given, range(20, 25)), tmp_path / "never"))


class Noting(Health):
    """Notes between which batches the data are that were left out."""

    def _roll_back(self, trainer: Any, kind: str, step: int, value: float | None, reason: str) -> None:
        self.last = trainer.progress.batches
        super()._roll_back(trainer, kind, step, value, reason)

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.first = trainer.progress.batches
        super().on_load_checkpoint(trainer, module, checkpoint)


def test_the_loss_scale_goes_back_too(tmp_path: Path) -> None:
    """It grows every third step; what overflows then is left out by the scale, which is no rollback."""

    def precision() -> FP16Mixed:
        return FP16Mixed(init_scale=2.0**18, growth_interval=3)

    given, health = data(40, [22]), Noting("rollback", threshold=50, warmup=8, window=20)
    result = run(given, tmp_path / "healed", health, precision=precision())
    assert len(health.rollbacks) == 1
    assert health.first <= 22 < health.last
    assert result["values"], "the scale is in the checkpoint"
    assert len(result["losses"]) < 40 - (health.last - health.first), "some steps were left out by the scale"
    same(result, run(without(given, range(health.first, health.last)), tmp_path / "never", precision=precision()))


# -- the end --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"max_steps": 23}])
def test_the_steps_after_the_last_log_point_are_judged_too(options: dict[str, Any], tmp_path: Path) -> None:
    """Step 22 of 23 spikes, the last log point is step 20: found at the end, by epochs or by steps."""
    given = data(30 if options else 23, [21])
    with pytest.raises(LossSpikeError, match="The loss of step 22 is"):
        fit(given, tmp_path / "raise", Health(warmup=8), **options)


def test_at_the_end_of_the_last_epoch_a_rollback_ends_it_without_those_data(tmp_path: Path) -> None:
    given, health = data(23, [21]), healing()
    result = fit(given, tmp_path / "healed", health)
    assert [(entry["step"], entry["to"]) for entry in health.rollbacks] == [(22, 20)]
    same(result, fit(without(given, range(20, 23)), tmp_path / "never"))


def test_at_the_last_of_max_steps_a_rollback_goes_on_with_the_next_data(tmp_path: Path) -> None:
    given, health = data(40, [21]), healing()
    result = fit(given, tmp_path / "healed", health, max_steps=23)
    assert [(entry["step"], entry["to"]) for entry in health.rollbacks] == [(22, 20)]
    same(result, fit(without(given, range(20, 23)), tmp_path / "never", max_steps=23))


# -- loggers --------------------------------------------------------------------------------------------------------------
def test_csv_and_tensorboard_show_the_one_curve_that_counts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = data(40, [22])
    fit(given, tmp_path / "healed", healing(), loggers=["csv", "tensorboard"])
    folder = next((tmp_path / "healed" / "run").iterdir())
    expected = [(line["step"], line["metrics"]["train_step"]) for line in read_metrics(folder) if "train_step" in line["metrics"]]
    assert [step for step, _ in expected] == [5, 10, 15, 20, 25, 30, 35]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row["train_step"])) for row in csv.DictReader(file) if row["train_step"]]
    assert rows == expected
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("train_step")] == expected


def test_wandb_which_forgets_nothing_is_never_given_a_smaller_step() -> None:
    class Run:
        def __init__(self) -> None:
            self.told: list[tuple[int, dict[str, float]]] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.told.append((step, values))

    logger = WandbLogger()
    logger.run = told = Run()
    logger.log({"loss": 1.0}, 20)
    logger.log({"loss": 9.0}, 25)
    logger.roll_back({}, 20)
    logger.log({"loss": 0.9}, 25)
    again = WandbLogger()
    again.load_state_dict(logger.state_dict())
    again.run = told
    again.log({"loss": 0.8}, 30)
    assert told.told == [
        (20, {"loss": 1.0}),
        (25, {"loss": 9.0}),
        (25, {"rolled_back_to": 20}),
        (30, {"loss": 0.9, "global_step": 25}),
        (35, {"loss": 0.8, "global_step": 30}),
    ]
