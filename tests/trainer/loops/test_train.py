"""The training loop's limits, its validations, and the options of the Trainer that change how it runs."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Callback, Trainer, TrainingModule
from drivetrain.strategies.errors import ConfigError
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
DATA = TensorDataset(torch.arange(10.0).reshape(10, 1))


class Told(TrainingModule):
    """Tells what it was given: `seen` holds (kind, epoch, what)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.constant_(self.layer.bias, 0.1)
        self.seen: list[tuple[str, int, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(("train", self.current_epoch, batch[0].flatten().tolist()))
        return self.layer(batch[0]).pow(2).mean() * 1e-3

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("val", self.current_epoch, self.global_step))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def of(self, kind: str) -> list[Any]:
        return [what for k, _, what in self.seen if k == kind]


def fit(root: Path, *, module: Told | None = None, val: bool = False, batch: int = 2, **options: Any) -> tuple[Told, Trainer]:
    module = module or Told()
    trainer = Trainer(**(QUIET | {"root": root, "num_sanity_val_steps": 0, "seed": 1} | options))
    trainer.fit(module, DataLoader(DATA, batch_size=batch), DataLoader(DATA, batch_size=10) if val else None)
    return module, trainer


@pytest.mark.parametrize(
    "options", [{}, {"prog_bar": True}, {"on_step": True, "on_epoch": True}, {"on_step": False, "on_epoch": True}]
)
def test_a_step_may_log_its_loss_by_that_name_in_its_own_way(options: dict[str, Any], tmp_path: Path) -> None:
    """The trainer logs what the step returns as "loss", unless the step does."""

    class Logging(Told):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss * 2, **options)
            return loss

    _, trainer = fit(tmp_path, module=Logging(), max_epochs=2, log_every_n_steps=2)
    _, plain = fit(tmp_path, max_epochs=2, log_every_n_steps=2)
    name = "loss_step" if options.get("on_step") else "loss"
    if options.get("on_step", True):
        assert trainer.metrics[name] == pytest.approx(2 * plain.metrics["loss"])
    assert trainer.metrics["grad_norm"] == plain.metrics["grad_norm"]


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"max_epochs": 2}, 10, 2),
        ({"max_steps": 7}, 7, 1),
        ({"max_steps": 10}, 10, 2),
        ({"max_steps": 7, "max_epochs": 1}, 5, 1),
        ({"max_epochs": 0}, 0, 0),
        ({"max_steps": 0, "max_epochs": 5}, 0, 0),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.6}, 6, 2),
        ({"max_epochs": 1, "limit_train_batches": 99}, 5, 1),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, 3, 1),
        ({"max_epochs": 1, "accumulate_grad_batches": 99}, 1, 1),
        ({"max_steps": 4, "accumulate_grad_batches": 2}, 4, 1),
        ({"max_steps": -1, "max_epochs": 1}, 5, 1),
    ],
)
def test_a_run_is_as_long_as_it_was_asked_to_be(options: dict[str, Any], steps: int, epochs: int, tmp_path: Path) -> None:
    """10 samples in batches of 2: 5 micro-batches an epoch."""
    module, trainer = fit(tmp_path, **options)
    assert (trainer.global_step, trainer.current_epoch) == (steps, epochs)
    window = options.get("accumulate_grad_batches", 1)
    if window == 1:
        assert len(module.of("train")) == steps
    assert trainer.progress.samples == sum(len(batch) for batch in module.of("train"))


def test_a_limit_of_zero_calls_the_hooks_of_the_ends_only(tmp_path: Path) -> None:
    told: list[str] = []

    class Watching(Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            told.append("start")

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            told.append("epoch")

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            told.append("end")

    fit(tmp_path, max_epochs=0, callbacks=Watching())
    assert told == ["start", "end"]


def test_max_time_stops_after_the_step_in_which_it_is_reached(tmp_path: Path) -> None:
    class Slow(Told):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.05)
            return super().training_step(batch, batch_idx)

    module, trainer = fit(tmp_path, module=Slow(), max_time=0.2)
    assert 3 <= trainer.global_step <= 5
    assert "max_time of 0.2 s is reached" in trainer.stop_reason
    assert len(module.of("train")) == trainer.global_step


def test_a_training_that_has_reached_its_end_goes_on_when_the_limit_grows(tmp_path: Path) -> None:
    """A second fit of the same Trainer continues its counters, in the same order of data."""
    module, trainer = fit(tmp_path, max_epochs=1)
    loader = DataLoader(DATA, batch_size=2)
    trainer.fit(module, loader)
    assert trainer.global_step == 5
    trainer.max_epochs = 2
    trainer.fit(module, loader)
    assert (trainer.global_step, trainer.current_epoch) == (10, 2)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [5, 10]),
        ({"check_val_every_n_epoch": 2}, [10]),
        ({"val_check_interval": 2}, [2, 4, 6, 8, 10]),
        ({"val_check_interval": 3}, [3, 6, 9]),
        ({"val_check_interval": 0.4}, [2, 4, 6, 8, 10]),
        ({"val_check_interval": 1.0}, [5, 10]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": 2}, [6, 8, 10]),
        ({"limit_val_batches": 0}, []),
        ({"max_steps": 7}, [5]),
        ({"accumulate_grad_batches": 2, "val_check_interval": 2}, [2, 4, 6]),
    ],
)
def test_validations_come_when_they_are_due(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    options = {"max_epochs": 2} | options
    module, _ = fit(tmp_path, val=True, **options)
    assert module.of("val") == steps


def test_a_validation_in_the_middle_of_an_epoch_changes_nothing_in_the_training(tmp_path: Path) -> None:
    """Windows of 2 over 5 micro-batches, the last cut short: 3 steps, with a validation after each; the mode is put back."""

    class Modes(Told):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.training
            assert self.layer.training is False  # a part that the user keeps in eval mode stays there
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert not self.training
            assert not torch.is_grad_enabled()
            super().validation_step(batch, batch_idx)
            torch.rand(1)

        def on_train_start(self) -> None:
            self.layer.eval()

    with_val, trainer = fit(tmp_path, module=Modes(), val=True, max_epochs=1, accumulate_grad_batches=2, val_check_interval=1)
    assert (trainer.global_step, with_val.of("val")) == (3, [1, 2, 3])
    without, _ = fit(tmp_path, module=Modes(), max_epochs=1, accumulate_grad_batches=2)
    assert with_val.of("train") == without.of("train")
    assert torch.equal(with_val.layer.weight, without.layer.weight)


class Random(Told):
    """Draws from every stream of random numbers while it trains and while it is validated."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        import numpy as np

        self.seen.append(("drawn", 0, (torch.rand(1).item(), random.random(), float(np.random.rand()))))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        import numpy as np

        torch.rand(3)
        random.random()
        np.random.rand(2)
        super().validation_step(batch, batch_idx)


def test_the_sanity_check_does_not_change_the_trainings_random_numbers(tmp_path: Path) -> None:
    """Of torch, python and numpy."""
    drawn = []
    for count in (0, 1, 2, -1):
        module, _ = fit(tmp_path, module=Random(), val=True, num_sanity_val_steps=count, max_steps=3)
        drawn.append(module.of("drawn"))
        assert len(module.of("val")) == (1 if count else 0)
    assert all(d == drawn[0] for d in drawn)


def test_the_sanity_check_runs_as_many_batches_as_asked_and_keeps_no_values(tmp_path: Path) -> None:
    class Logging(Told):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("val_loss", 1.0)

        def on_train_start(self) -> None:
            assert self.trainer.metrics == {}

    for count, expected in ((0, 0), (2, 2), (4, 4), (-1, 5), (99, 5)):
        module = Logging()
        trainer = Trainer(**QUIET, root=tmp_path, max_epochs=0, num_sanity_val_steps=count)
        trainer.fit(module, DataLoader(DATA, batch_size=2), DataLoader(DATA, batch_size=2))
        assert len(module.of("val")) == expected


@pytest.mark.parametrize("run", [True, 3])
def test_a_fast_dev_run_runs_few_batches_of_everything_and_writes_nothing(run: bool | int, tmp_path: Path) -> None:
    """Without any limit given, and whatever the other options say."""
    module = Told()
    options: dict[str, Any] = {"max_steps": 1000, "check_val_every_n_epoch": 7, "val_check_interval": 100} if run == 3 else {}
    trainer = Trainer(
        enable_progress_bar=False, enable_model_summary=False, root=tmp_path / "runs", fast_dev_run=run, seed=1, **options
    )
    trainer.fit(module, DataLoader(DATA, batch_size=2), DataLoader(DATA, batch_size=2))
    assert (len(module.of("train")), len(module.of("val"))) == (int(run), int(run))
    assert trainer.global_step == int(run)
    assert not (tmp_path / "runs").exists()


def test_overfitting_reads_the_first_batches_again_and_again(tmp_path: Path) -> None:
    module = Told()
    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=3, overfit_batches=2, seed=1)
    trainer.fit(module, DataLoader(DATA, batch_size=2, shuffle=True))
    assert module.of("train") == [[0, 1], [2, 3]] * 3


def test_a_batch_start_that_returns_minus_1_ends_the_epoch(tmp_path: Path) -> None:
    """Also in the middle of a window, whose gradients are then dropped."""

    class Skipping(Told):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    module, trainer = fit(tmp_path, module=Skipping(), val=True, max_epochs=2)
    assert len(module.of("train")) == 6
    assert (trainer.global_step, trainer.current_epoch, module.of("val")) == (6, 2, [3, 6])

    class Windows(Skipping):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(("grad", 0, self.layer.weight.grad.item()))  # pyright: ignore[reportOptionalMemberAccess]

    module, trainer = fit(tmp_path, module=Windows(), max_epochs=2, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    grads = module.of("grad")
    assert len(grads) == 6
    single, _ = fit(tmp_path, module=Windows(), max_epochs=1, accumulate_grad_batches=2)
    assert grads[:3] == single.of("grad")


def test_a_step_that_returns_none_is_left_out(tmp_path: Path) -> None:
    class Leaving(Told):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 4) else loss

    module, trainer = fit(tmp_path, module=Leaving(), max_epochs=1)
    assert (trainer.global_step, trainer.progress.skipped, len(module.of("train"))) == (3, 2, 5)


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path: Path) -> None:
    def run(seed: int | None) -> tuple[list[Any], float]:
        torch.manual_seed(5)
        module = Random()
        trainer = Trainer(**QUIET, root=tmp_path, max_epochs=2, seed=seed)
        trainer.fit(module, DataLoader(DATA, batch_size=2, shuffle=True))
        return [what for _, _, what in module.seen], module.layer.weight.item()

    assert run(3) == run(3)
    assert run(3) != run(4)
    first, second = run(None), run(None)  # torch's own seed, which the test set, decides
    assert [b for b in first[0] if isinstance(b, list)] == [b for b in second[0] if isinstance(b, list)]


@pytest.mark.parametrize(("given", "enabled", "warns"), [(True, True, False), ("warn", True, True), (False, False, False)])
def test_deterministic_switches_torchs_algorithms(given: Any, enabled: bool, warns: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        Trainer(**QUIET, deterministic=given)
        assert torch.are_deterministic_algorithms_enabled() is enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warns
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_an_iterable_without_a_length_trains_epoch_after_epoch(tmp_path: Path) -> None:
    """The last window of each is cut short where the data end, and averaged over what it held."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.arange(5.0).reshape(5, 1))

    class Watching(Told):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(("train", 0, batch.flatten().tolist()))
            return self.layer(batch).mean()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.seen.append(("grad", 0, self.layer.weight.grad.item()))  # pyright: ignore[reportOptionalMemberAccess]

    module = Watching()
    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(Stream(), batch_size=2))
    assert module.of("train") == [[0, 1], [2, 3], [4]] * 2
    assert module.of("grad") == pytest.approx([1.5, 4.0] * 2)
    assert trainer.num_training_batches is None


def stop_on_one(root: Path) -> tuple[int, str, bool]:
    class Stopping(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.world.rank == 1 and trainer.progress.global_step == 3:
                trainer.stop("enough")

    trainer = Trainer(**QUIET, root=root, max_epochs=500, callbacks=Stopping())
    trainer.fit(Told(), DataLoader(DATA, batch_size=1))
    trainer.accelerator.end_training()
    return trainer.global_step, trainer.stop_reason, trainer.should_stop


def test_a_stop_of_one_rank_ends_all_at_the_same_step(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2, stop_on_one, tmp_path)
    assert first == second
    assert first[1:] == ("rank 1: enough", True)
    assert 3 <= first[0] < 2500


def fit_twice(root: Path) -> list[float]:
    """The same module in two fits: the second one prepares it anew."""
    module = Told()
    for epochs in (1, 2):
        trainer = Trainer(**QUIET, root=root, max_epochs=epochs, seed=1)
        trainer.fit(module, DataLoader(DATA, batch_size=2))
        trainer.max_epochs = epochs + 1
        trainer.fit(module, DataLoader(DATA, batch_size=2))
        trainer.accelerator.end_training()
    return [p.item() for p in module.parameters()]


def test_a_module_can_be_fitted_again(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2, fit_twice, tmp_path)
    assert first == second


def devices_of_one(root: Path) -> int:
    trainer = Trainer(**QUIET, root=root, max_epochs=1, devices=2)
    trainer.fit(Told(), DataLoader(DATA, batch_size=1))
    size = trainer.world.size
    trainer.accelerator.end_training()
    return size


def test_two_devices_are_two_processes(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, devices_of_one, tmp_path) == [2, 2]


def test_an_epoch_that_is_broken_off_has_no_end(tmp_path: Path) -> None:
    """The run that is resumed there has it: its hooks and values are those of the whole epoch."""
    told: list[int] = []

    class Watching(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            told.append(trainer.progress.epoch)

    fit(tmp_path, max_steps=7, callbacks=Watching())
    assert told == [0]
    fit(tmp_path, max_steps=10, callbacks=Watching())
    assert told == [0, 0, 1]


def test_what_hooks_around_epochs_log_is_published_with_the_epoch(tmp_path: Path) -> None:
    """Their defaults are on_epoch, as in Lightning: with on_step the values waited for a log point that may never come."""

    class Logs(Told):
        def on_train_start(self) -> None:
            self.log("at_start", 1.0)

        def on_train_epoch_start(self) -> None:
            self.log("begun", float(self.current_epoch))

        def on_train_epoch_end(self) -> None:
            self.log("ended", float(self.current_epoch))

    _, trainer = fit(tmp_path, module=Logs(), max_epochs=2)
    assert {n: trainer.metrics.get(n) for n in ("at_start", "begun", "ended")} == {"at_start": 1.0, "begun": 1.0, "ended": 1.0}


def test_a_value_that_nobody_would_see_is_refused(tmp_path: Path) -> None:
    class Late(Told):
        def on_train_end(self) -> None:
            self.log("late", 1.0)

    with pytest.raises(ConfigError, match="nothing is written"):
        fit(tmp_path, module=Late(), max_epochs=1)


def test_a_fit_that_has_nothing_to_do_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, trainer = fit(tmp_path, max_epochs=1)
    assert "nothing to train" not in capsys.readouterr().out
    trainer.fit(module, DataLoader(DATA, batch_size=2))
    assert "nothing to train: epoch 1 and step 5 are at the limit already" in capsys.readouterr().out
