"""What Health does is compared with the run that never saw the data in question, bit for bit: losses, weights, values, files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.health import Health
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.control import REQUEUE, SAVE, STOP
from drivetrain.strategies.errors import ConfigError, LossSpikeError, NonFiniteError
from drivetrain.trainer.module import TrainingModule
from drivetrain.trainer.trainer import Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset, TensorDataset

BATCH = 4
HIGH = 1e4
"""The target of a poisoned sample."""


class Net(TrainingModule):
    """Dropout shows a random state that is not taken back, AdamW and the schedulers a state that is not."""

    def __init__(self, *, dropout: float = 0.2, items: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.items = items
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        error = (self.net(x) - y) ** 2
        self.log("train", error.mean(), on_step=True, on_epoch=True)
        return {"loss": error.sum(), "num_items": len(x)} if self.items else error.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        by_step = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}
        return [optimizer], [by_step, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Losses(Callback):
    """By step, the last one counts: what a run that was rolled back has to show for itself."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[float, float]] = {}
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        step = trainer.progress.global_step
        self.seen.append(step)
        rate = next(iter(trainer.optimizers.values())).param_groups[0]["lr"]
        self.found[step] = (loss.item() if loss is not None else math.nan, rate)

    def on_load_checkpoint(self, trainer: Any, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        self.found = {step: value for step, value in self.found.items() if step <= trainer.progress.global_step}


def data(batches: int, poisoned: Sequence[int] = (), *, value: float = HIGH, size: int = BATCH) -> TensorDataset:
    """So many batches of regression; the last sample of each of the poisoned ones is far off."""
    made = torch.Generator().manual_seed(7)
    x = torch.randn(batches * size, 3, generator=made)
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(batches * size, 1, generator=made)
    for batch in poisoned:
        y[(batch + 1) * size - 1] = value
    return TensorDataset(x, y)


def without(given: TensorDataset, batches: Sequence[int], *, size: int = BATCH) -> Subset[Any]:
    gone = {batch * size + i for batch in batches for i in range(size)}
    return Subset(given, [i for i in range(len(given)) if i not in gone])


def fit(
    given: Any, root: Path, health: Health | None = None, *, module: Net | None = None, resume: Any = None, **options: Any
) -> dict[str, Any]:
    """Train on the data in order, with a checkpoint at every fourth step and a log point at every fifth; return all of it."""
    losses, module = Losses(), module or Net()
    options = {"max_epochs": 1, "log_every_n_steps": 5, "seed": 2, "name": "run", "num_sanity_val_steps": 0} | options
    trainer = Trainer(
        **options,
        root=root,
        callbacks=[losses, *([health] if health else []), Checkpoint("4step")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(given, batch_size=BATCH), DataLoader(data(2), batch_size=BATCH), resume=resume)
    progress = trainer.progress.state_dict()
    for name in ("seconds", "batch_in_epoch", "skipped"):
        del progress[name]
    return {
        "losses": losses.found,
        "seen": losses.seen,
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "metrics": dict(trainer.metrics),
        "progress": progress,
        "logged": [(line["step"], line["metrics"]) for line in read_metrics(trainer.root)] if trainer.world.is_main else [],
        "kept": [info.step for info in CheckpointStore(trainer.root / "checkpoints").list()] if trainer.world.is_main else [],
    }


def same(result: dict[str, Any], expected: dict[str, Any], but: Sequence[str] = ("seen",)) -> None:
    for name, value in expected.items():
        if name not in but:
            assert result[name] == value, name


class Leaving(Health):
    """Is preempted after step 24."""

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if trainer.progress.global_step == 24:
            trainer.world.control.request(STOP | SAVE | REQUEUE, "preempted")


def healing(**options: Any) -> Health:
    return Health(**{"on_spike": "rollback", "threshold": 50, "warmup": 8, "window": 20} | options)


# -- rollback ---------------------------------------------------------------------------------------------------------
def test_a_rollback_gives_the_run_that_never_saw_those_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 23 is seen at the log point of step 25; step 20 is the last checkpoint before it; batches 20 to 24 are left out."""
    given, health = data(40, [22]), healing()
    result = fit(given, tmp_path / "healed", health)
    same(result, fit(without(given, range(20, 25)), tmp_path / "never"))
    assert result["seen"][18:28] == [19, 20, 21, 22, 23, 24, 25, 21, 22, 23]
    assert [(entry["step"], entry["to"], entry["epoch"]) for entry in health.rollbacks] == [(23, 20, 0)]
    assert "back to step 20: the loss of step 23 is" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_rolled_back_at_once_on_a_cpu(tmp_path: Path) -> None:
    """The step is left out, so it is known before the next log point: batch 20 and the bad 21 and 22 are forgotten."""
    given, health = data(40, [22], value=math.nan), healing(on_spike=None, on_nonfinite="rollback")
    result = fit(given, tmp_path / "healed", health)
    same(result, fit(without(given, range(20, 23)), tmp_path / "never"))
    assert [(entry["step"], entry["to"], entry["loss"]) for entry in health.rollbacks] == [(23, 20, "nan")]


def test_whole_windows_are_forgotten_where_gradients_accumulate(tmp_path: Path) -> None:
    """Batch 22 is in step 12, seen at step 15; back to step 8 and on behind step 15: batches 16 to 29."""
    given, health = data(40, [22]), healing()
    result = fit(given, tmp_path / "healed", health, accumulate_grad_batches=2)
    same(result, fit(without(given, range(16, 30)), tmp_path / "never", accumulate_grad_batches=2))
    assert [(entry["step"], entry["to"]) for entry in health.rollbacks] == [(12, 8)]


def test_a_rollback_over_the_end_of_an_epoch_ends_it_again_without_those_data(tmp_path: Path) -> None:
    """Step 12 is the last of epoch 0; the log point of step 15 is in epoch 1. The truth is made of two runs, one an epoch."""
    given = data(12, [11])
    result = fit(given, tmp_path / "healed", healing(max_rollbacks=1), max_epochs=2, max_steps=16)
    fit(without(given, range(8, 12)), tmp_path / "never", max_epochs=1)
    rest = without(given, range(3))
    expected = fit(rest, tmp_path / "never", max_epochs=2, max_steps=16, resume="auto")
    assert {s: v for s, v in result["losses"].items() if s > 8} == expected["losses"]
    same(result, expected, but=("seen", "losses", "kept"))


def test_a_rollback_at_the_last_batch_of_an_epoch_goes_on_with_the_next(tmp_path: Path) -> None:
    given = data(15, [14])
    result = fit(given, tmp_path / "healed", healing(max_rollbacks=1), max_epochs=2, max_steps=20)
    fit(without(given, range(12, 15)), tmp_path / "never", max_epochs=1)
    expected = fit(given, tmp_path / "never", max_epochs=2, max_steps=20, resume="auto")
    assert {s: v for s, v in result["losses"].items() if s > 12} == expected["losses"]
    same(result, expected, but=("seen", "losses", "kept"))


def test_a_run_that_was_stopped_and_resumed_rolls_back_as_the_one_that_was_not(tmp_path: Path) -> None:
    """It stops between two log points: the losses that were not judged yet are in the checkpoint, and so are the estimate's."""
    given = data(40, [22])
    expected = fit(given, tmp_path / "whole", healing())
    with pytest.raises(SystemExit, match="75"):
        fit(given, tmp_path / "cut", Leaving("rollback", threshold=50, warmup=8, window=20))
    again = healing()
    result = fit(given, tmp_path / "cut", again, resume="auto")
    assert [(entry["step"], entry["to"]) for entry in again.rollbacks] == [(23, 20)]
    assert result["weights"] == expected["weights"]
    assert result["logged"] == expected["logged"]
    # What was resumed from stays, as always.
    assert set(expected["kept"]) <= set(result["kept"])


def both_runs(root: Path, size: int, options: dict[str, Any], poison: float) -> tuple[bool, list[Any]]:
    """On two ranks, where only rank 1 gets a poisoned sample: the healed run and the truth. Same on this rank?"""
    given, health = data(40, [22], size=size, value=poison), Health(**options)
    result = fit(given, root / "healed", health, module=Net(dropout=0.0))
    entries = [(entry["step"], entry["to"]) for entry in health.rollbacks]
    expected = fit(without(given, range(20, 25) if entries else [22], size=size), root / "never", module=Net(dropout=0.0))
    if entries:
        same(result, expected)
    assert result["weights"] == expected["weights"]
    assert result["progress"]["global_step"] == expected["progress"]["global_step"]
    return True, [entries, health.left_out]


@pytest.mark.parametrize(
    ("options", "poison", "expected"),
    [
        ({"on_spike": "rollback", "threshold": 50, "warmup": 8, "window": 20}, HIGH, [[(23, 20)], 0]),
        ({"on_spike": "skip", "threshold": 50, "warmup": 16, "window": 40}, HIGH, [[], 1]),
        ({"on_spike": None, "on_nonfinite": "skip"}, math.inf, [[], 1]),
    ],
)
def test_all_ranks_decide_alike_when_one_has_the_bad_sample(
    options: dict[str, Any], poison: float, expected: Any, ranks: Any, tmp_path: Path
) -> None:
    assert ranks(2, both_runs, tmp_path, 2 * BATCH, options, poison) == [(True, expected)] * 2


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    health = healing(max_rollbacks=2)
    with pytest.raises(LossSpikeError, match="Rolled back 2 times, and the loss of step"):
        fit(data(60, range(22, 60)), tmp_path, health)
    assert len(health.rollbacks) == 2


def test_checkpoints_too_close_to_the_spike_are_not_trusted(tmp_path: Path) -> None:
    given, health = data(40, [22]), healing(margin=5)
    result = fit(given, tmp_path / "healed", health)
    same(result, fit(without(given, range(16, 25)), tmp_path / "never"))


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path: Path) -> None:
    class Damage(Health):
        def on_log(self, trainer: Any, module: nn.Module, metrics: dict[str, float], step: int) -> None:
            if step == 25 and not self.rollbacks:
                trainer.store.join()
                file = next(trainer.store.path_of(20).glob("*.safetensors"))
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)
            super().on_log(trainer, module, metrics, step)

    given, health = data(40, [22]), Damage("rollback", threshold=50, warmup=8, window=20, margin=1)
    result = fit(given, tmp_path / "healed", health)
    assert [entry["to"] for entry in health.rollbacks] == [16]
    same(result, fit(without(given, range(16, 25)), tmp_path / "never"))


def test_without_a_checkpoint_from_before_it_a_spike_ends_the_run_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(LossSpikeError, match=r"The loss of step 23 is .* there is no checkpoint to go back to.*Save more often"):
        Trainer(
            max_epochs=1,
            log_every_n_steps=5,
            root=tmp_path,
            callbacks=healing(),
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Net(), DataLoader(data(40, [22]), batch_size=BATCH))


# -- skip and raise ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("items", [False, True])
def test_a_step_that_spikes_is_left_out(items: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run without that batch is the truth; the epoch's mean of the logged loss has it, since it was computed."""
    given, health = data(40, [22]), Health("skip", warmup=8, threshold=50)
    result = fit(given, tmp_path / "left", health, module=Net(dropout=0.0, items=items))
    expected = fit(without(given, [22]), tmp_path / "never", module=Net(dropout=0.0, items=items))
    assert result["weights"] == expected["weights"]
    assert result["progress"]["global_step"] == 39
    assert health.left_out == 1
    assert "left out: the loss of step 23 is" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nonfinite"), (HIGH, "spike")])
def test_too_many_steps_left_out_in_a_row_end_the_run(value: float, kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"on_spike": "skip", "warmup": 8} if kind == "spike" else {"on_nonfinite": "skip"}
    with pytest.raises(LossSpikeError if kind == "spike" else NonFiniteError, match="4 steps in a row were left out"):
        fit(data(40, range(22, 40), value=value), tmp_path, Health(**options, max_left_out=3))


def test_a_spike_ends_the_run_at_the_next_log_point(tmp_path: Path) -> None:
    with pytest.raises(LossSpikeError, match=r"The loss of step 23 is .*, above ") as caught:
        fit(data(40, [22]), tmp_path, Health(warmup=8))
    assert "after 25 steps" in str(caught.value.__notes__)


@pytest.mark.parametrize("on_spike", ["raise", "skip", "rollback"])
def test_what_is_not_finite_still_ends_the_run_unless_asked_otherwise(on_spike: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        fit(data(40, [22], value=math.nan), tmp_path, Health(on_spike, warmup=8))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_seen(tmp_path: Path) -> None:
    class Root(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (
                super().training_step(batch, batch_idx)
                + (self.net(batch[0]).sum() * (0.0 if batch_idx == 6 else 1e-9)).abs().sqrt()
            )

    with pytest.raises(NonFiniteError, match="gradient of step 7 is not finite"):
        fit(data(20), tmp_path, Health("skip", warmup=8), module=Root(dropout=0.0))


def test_a_run_without_spikes_is_not_changed(tmp_path: Path) -> None:
    given = data(40)
    expected = fit(given, tmp_path / "plain")
    for policy in ("raise", "skip", "rollback"):
        same(fit(given, tmp_path / policy, Health(policy, "skip", warmup=8, threshold=50)), expected, but=("kept",))


# -- the estimate -----------------------------------------------------------------------------------------------------
def test_the_limit_is_that_of_median_and_median_deviation() -> None:
    health = Health(threshold=5, warmup=3, window=5)
    values = [1.0, 1.2, 0.9, 1.4, 1.1, 1.0]
    found = []
    for value in values:
        found.append(health._judge([value])[0])
    kept = values[-5:]
    middle = statistics.median(kept)
    deviation = 1.4826 * statistics.median(abs(v - middle) for v in kept)
    assert found == [""] * 6
    assert health._estimate() == pytest.approx(middle + 5 * deviation)
    assert health._judge([middle + 5.01 * deviation])[0] == "spike"
    assert health._judge([middle + 4.99 * deviation])[0] == ""


def test_a_constant_loss_has_a_limit_one_percent_deviation_wide() -> None:
    health = Health(threshold=8, warmup=2, window=4)
    for _ in range(4):
        health._judge([2.0])
    assert health._estimate() == pytest.approx(2.0 + 8 * 0.02)


def test_nothing_is_a_spike_during_the_warm_up() -> None:
    health = Health(warmup=10)
    assert [health._judge([value])[0] for value in [1.0] * 9 + [100.0]] == [""] * 10
    assert health._judge([100.0])[0] == "spike"


# -- cost and wrong use -----------------------------------------------------------------------------------------------
class Reads(TorchDispatchMode):
    """The steps at which the value of a tensor was read."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: set[int] = set()
        self.step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.steps.add(self.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
def test_no_value_is_read_between_log_points(policy: str, tmp_path: Path) -> None:
    """The finite check of the CPU reads the loss and is switched off here; an accelerator reads nothing."""
    reads = Reads()

    class Watched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            reads.step = batch_idx + 1
            self.trainer.accelerator._reads_loss = self.trainer.accelerator._checks_gradients = False
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)  # AdamW reads its own step count on a CPU

    with reads:
        Trainer(
            max_epochs=1,
            log_every_n_steps=10,
            root=tmp_path,
            callbacks=Health(policy, warmup=8),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ).fit(Watched(), DataLoader(data(40), batch_size=BATCH))
    assert reads.steps - {0} <= {1, 10, 20, 30, 40}, reads.steps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_spike": "skipp"}, "on_spike='skipp'"),
        ({"on_nonfinite": "warn"}, "on_nonfinite='warn'"),
        ({"threshold": 0}, "threshold=0"),
        ({"window": 1}, "window=1"),
        ({"warmup": 300}, "warm-up must fit"),
        ({"max_rollbacks": -1}, "max_rollbacks=-1"),
        ({"margin": 1.5}, "margin=1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Health(**options)


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).sum())
            optimizer.step()

    with pytest.raises(ConfigError, match="log_every_n_steps=0 has none"):
        fit(data(4), tmp_path, Health(), log_every_n_steps=0)
    with pytest.raises(ConfigError, match="nonfinite='ignore'"):
        fit(data(4), tmp_path, Health("skip"), nonfinite="ignore")
    with pytest.raises(ConfigError, match="optimises manually"):
        fit(data(4), tmp_path, Health("skip"), module=Manual())
    with pytest.raises(ConfigError, match="training_step returned NoneType"):
        fit(data(4), tmp_path, Health("raise"), module=Manual())
