"""Wrong use is told in three parts: what was met, what was expected, what to do; by the right class, before any training.

Each row of the tables is an input that a user may give, and words that the message must have.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Callback, Trainer, TrainingModule
from drivetrain.strategies.errors import ConfigError, DataError, DrivetrainError, NonFiniteError, UnknownName
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "seed": 0,
}
DATA = TensorDataset(torch.arange(6.0).reshape(6, 1))


class Plain(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(size: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=size, **options)


def has_three_parts(error: BaseException, words: tuple[str, ...]) -> None:
    text = str(error)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    # What was met and what to do are two sentences or clauses at least; a wall of text is none.
    assert 40 < len(text) < 800, text
    assert re.search(r"[.?:] ", text), text


ARGUMENTS: list[tuple[dict[str, Any], type[DrivetrainError], tuple[str, ...]]] = [
    ({"max_step": 10}, UnknownName, ("'max_step'", "Did you mean 'max_steps'?", "Known: ")),
    ({"gradient_clip": 1.0}, UnknownName, ("'gradient_clip'", "Did you mean 'gradient_clip_val'?")),
    ({"strategy": "dpp"}, UnknownName, ("'dpp'", "Did you mean 'ddp'?", "Known: ")),
    ({"strategy": 3}, ConfigError, ("strategy must be a name or a Strategy object, got 3", "strategy='ddp'")),
    ({"precision": "bf61-mixed"}, UnknownName, ("'bf61-mixed'", "Did you mean 'bf16-mixed'?")),
    ({"precision": 17}, UnknownName, ("'17'", "Known: ")),
    ({"devices": 0}, ConfigError, ("devices must be 'auto' or a number of processes of at least 1, got 0", "devices=2")),
    ({"devices": -1}, ConfigError, ("at least 1, got -1",)),
    ({"devices": "two"}, ConfigError, ("got 'two'",)),
    ({"devices": [0, 1]}, ConfigError, ("got [0, 1]",)),
    ({"num_nodes": 0}, ConfigError, ("num_nodes must be a whole number of at least 1, got 0",)),
    ({"max_steps": -5}, ConfigError, ("max_steps must be a whole number of at least 0, got -5",)),
    ({"max_epochs": 1.5}, ConfigError, ("max_epochs must be a whole number of at least 0, got 1.5",)),
    ({"max_epochs": "3"}, ConfigError, ("max_epochs must be a whole number", "'3'")),
    ({"max_time": "soon"}, ConfigError, ("max_time must be seconds", "'10m'", "'soon'")),
    ({"max_time": -1}, ConfigError, ("max_time must be seconds", "-1")),
    ({"accumulate_grad_batches": 0}, ConfigError, ("accumulate_grad_batches must be a whole number of at least 1, got 0",)),
    ({"accumulate_grad_batches": True}, ConfigError, ("accumulate_grad_batches must be a whole number",)),
    ({"accumulate_grad_batches": {0: 2}}, ConfigError, ("accumulate_grad_batches must be a whole number",)),
    ({"global_batch_size": 0}, ConfigError, ("global_batch_size must be a whole number of at least 1",)),
    (
        {"global_batch_size": 8, "accumulate_grad_batches": 2},
        ConfigError,
        ("global_batch_size=8", "accumulate_grad_batches=2", "Give one of them"),
    ),
    ({"gradient_clip_val": -1}, ConfigError, ("gradient_clip_val must be a number above 0", "-1")),
    ({"gradient_clip_val": "1"}, ConfigError, ("gradient_clip_val must be a number above 0", "'1'")),
    ({"gradient_clip_val": math.nan}, ConfigError, ("gradient_clip_val must be a number above 0", "nan")),
    ({"gradient_clip_algorithm": "nrom"}, UnknownName, ("'nrom'", "Did you mean 'norm'?")),
    ({"nonfinite": "rise"}, UnknownName, ("'rise'", "Did you mean 'raise'?")),
    ({"num_sanity_val_steps": -2}, ConfigError, ("num_sanity_val_steps must be -1 (all)", "-2")),
    ({"num_sanity_val_steps": "all"}, ConfigError, ("num_sanity_val_steps", "'all'")),
    ({"check_val_every_n_epoch": 0}, ConfigError, ("check_val_every_n_epoch must be a whole number of at least 1, got 0",)),
    ({"log_every_n_steps": -1}, ConfigError, ("log_every_n_steps must be a whole number of at least 0",)),
    ({"overfit_batches": 0.5}, ConfigError, ("overfit_batches must be a whole number",)),
    ({"fast_dev_run": -1}, ConfigError, ("fast_dev_run", "-1")),
    ({"fast_dev_run": "yes"}, ConfigError, ("fast_dev_run", "'yes'")),
    ({"deterministic": "yes"}, ConfigError, ("deterministic must be True, False or 'warn'", "'yes'")),
    ({"seed": -1}, ConfigError, ("seed must be a whole number from 0", "-1")),
    ({"seed": "1"}, ConfigError, ("seed must be a whole number from 0", "'1'")),
    ({"callbacks": [Callback]}, ConfigError, ("callbacks[0]", "expected a Callback object", "not the class")),
    ({"callbacks": ["EarlyStopping"]}, ConfigError, ("callbacks[0]", "'EarlyStopping'", "expected a Callback object")),
    ({"callbacks": "EarlyStopping"}, ConfigError, ("callbacks", "'EarlyStopping'", "expected a Callback object")),
    ({"callbacks": 3}, ConfigError, ("callbacks", "3", "expected a Callback object")),
]


@pytest.mark.parametrize(("options", "kind", "words"), ARGUMENTS, ids=[str(row[0]) for row in ARGUMENTS])
def test_a_wrong_argument_of_the_trainer_is_explained(
    options: dict[str, Any], kind: type[DrivetrainError], words: tuple[str, ...], tmp_path: Path
) -> None:
    """When the Trainer is made, where that is possible: the line that the user wrote is in the traceback."""
    make: Any = Trainer  # whose types would refuse most of this
    with pytest.raises(kind) as raised:
        make(**(QUIET | {"root": tmp_path} | options)).accelerator  # noqa: B018
    has_three_parts(raised.value, words)
    assert raised.value.exit_code == 2


DURING: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"device": "cuda:7"}, ("cuda",)),
    ({"device": "tpuu"}, ("tpuu",)),
    ({"devices": 3}, ("devices=3", "a test", "launch(function, devices=3)")),
    ({"strategy": "ddp", "precision": "fp8-ao"}, ("fp8",)),
    ({"max_epochs": None},
     ("The training would never end", "max_epochs, max_steps and max_time are all None", "Trainer(max_epochs=3)")),
    ({"limit_train_batches": -1}, ("limit_train_batches must be a number of batches (int) or a fraction from 0.0 to 1.0", "-1")),
    ({"limit_val_batches": 1.5}, ("limit_val_batches must be a number of batches", "1.5")),
    ({"val_check_interval": 0}, ("val_check_interval must be a number of optimizer steps (int) or a part of the epoch", "0")),
    ({"val_check_interval": 1.5}, ("val_check_interval must be", "1.5")),
    ({"global_batch_size": 3}, ("global_batch_size=3 is not a multiple of 2", "Use 2 or 4")),
    ({"global_batch_size": 1}, ("global_batch_size=1 is not a multiple of 2", "Use 2, or another batch_size")),
    ({"name": "../elsewhere"}, ("A run's name", "../elsewhere")),
    ({"loggers": "wandbb"}, ("wandbb", "Did you mean 'wandb'?")),
    ({"loggers": 3}, ("3",)),
    ({"resume": "nowhere"}, ("nowhere",)),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), DURING, ids=[str(row[0]) for row in DURING])
def test_what_cannot_be_done_is_refused_before_the_first_step(
    options: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    class Watched(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("a step was made")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("a step was made")

    with pytest.raises(DrivetrainError) as raised:
        Trainer(**(QUIET | {"root": tmp_path, "max_epochs": 1} | options)).fit(Watched(), loader(), loader())
    has_three_parts(raised.value, words)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


def step_that_returns(value: Callable[[Any], Any]) -> type[TrainingModule]:
    class Digits(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return value(self.layer(batch[0]))

    return Digits


def optimizers_are(value: Callable[[Any], Any]) -> type[TrainingModule]:
    class Digits(Plain):
        def configure_optimizers(self) -> Any:
            return value(self)

    return Digits


def frozen(module: Any) -> Any:
    module.requires_grad_(False)
    return torch.optim.SGD(module.parameters(), lr=0.1)


def scheduled(module: Any, **config: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), **config}}


def plateau(module: Any, **config: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), **config},
    }


def twice(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [optimizer, optimizer]


def strange(module: Any) -> Any:
    return torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)


class NoStep(TrainingModule):
    def configure_optimizers(self) -> Any:
        return None


class NoOptimizer(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).mean()


class Manual(Plain):
    automatic_optimization = False


def with_meta() -> TrainingModule:
    module = Plain()
    module.layer = nn.Linear(1, 1, device="meta")
    return module


RUNS: list[tuple[str, Callable[[], Any], Any, type[DrivetrainError], tuple[str, ...]]] = [
    # the module
    ("a class", lambda: Plain, loader(), ConfigError, ("got the class Plain", "Call it: Plain()")),
    ("a plain module", lambda: nn.Linear(1, 1), loader(), ConfigError, ("got Linear", "Subclass drivetrain.TrainingModule")),
    ("None", lambda: None, loader(), ConfigError, ("got NoneType",)),
    ("no training_step", NoStep, loader(), ConfigError, ("NoStep defines no training_step(batch, batch_idx)", "Define it")),
    ("no configure_optimizers", NoOptimizer, loader(), ConfigError, ("NoOptimizer defines no configure_optimizers", "AdamW")),
    ("on the meta device", with_meta, loader(), ConfigError, ("meta", "layer.weight")),
    # configure_optimizers
    ("no optimizer", lambda: optimizers_are(lambda m: None)(), loader(), ConfigError, ("returned None", "Return an optimizer")),
    ("an empty list", lambda: optimizers_are(lambda m: [])(), loader(), ConfigError, ("returned no optimizer",)),
    ("a number", lambda: optimizers_are(lambda m: 3)(), loader(), ConfigError, ("int 3", "Return an optimizer, a list of them")),
    ("the same optimizer twice", lambda: optimizers_are(twice)(), loader(), ConfigError, ("the same optimizer twice",)),
    ("parameters of another model", lambda: optimizers_are(strange)(), loader(), ConfigError,
     ("belong to no prepared model", "(3,)")),
    ("a wrong key", lambda: optimizers_are(lambda m: {"optimizer": torch.optim.SGD(m.parameters()), "lr_schedular": None})(),
     loader(), UnknownName, ("'lr_schedular'", "Did you mean 'lr_scheduler'?")),
    ("a wrong option", lambda: optimizers_are(lambda m: scheduled(m, intervall="step"))(), loader(), UnknownName,
     ("'intervall'", "Did you mean 'interval'?")),
    ("a wrong interval", lambda: optimizers_are(lambda m: scheduled(m, interval="batch"))(), loader(), ConfigError,
     ("'step' or 'epoch', got 'batch'",)),
    ("frequency 0", lambda: optimizers_are(lambda m: scheduled(m, frequency=0))(), loader(), ConfigError, ("at least 1, got 0",)),
    ("a plateau of nothing", lambda: optimizers_are(plateau)(), loader(), ConfigError, ("ReduceLROnPlateau needs the name",)),
    ("a plateau of what is not logged", lambda: optimizers_are(lambda m: plateau(m, monitor="val_los"))(), loader(), ConfigError,
     ("monitors 'val_los'", "nothing of that name was logged")),
    # the step's result
    ("a vector", lambda: step_that_returns(lambda y: y.squeeze(1))(), loader(), DataError, ("(2,)", "scalar", ".mean()")),
    ("a float", lambda: step_that_returns(lambda y: 1.5)(), loader(), DataError, ("float 1.5", "scalar tensor with a gradient")),
    ("a detached loss", lambda: step_that_returns(lambda y: y.mean().detach())(), loader(), DataError,
     ("no gradient", "detached")),
    ("a frozen model", lambda: optimizers_are(frozen)(), loader(), DataError, ("no gradient", "frozen")),
    ("a dict without loss", lambda: step_that_returns(lambda y: {"los": y.mean()})(), loader(), DataError, ("['los']", "'loss'")),
    ("a list", lambda: step_that_returns(lambda y: [y.mean()])(), loader(), DataError, ("list", "scalar tensor")),
    ("a dict whose loss is none", lambda: step_that_returns(lambda y: {"loss": None})(), loader(), DataError,
     ("loss", "scalar tensor")),
    ("a complex loss", lambda: step_that_returns(lambda y: torch.complex(y.mean(), y.mean()))(), loader(), DataError,
     ("complex64", "real")),
    ("NaN", lambda: step_that_returns(lambda y: y.mean() * math.nan)(), loader(), NonFiniteError, ("nan", "weights are unchanged",
     "nonfinite='skip'")),
    ("Inf", lambda: step_that_returns(lambda y: y.mean() + math.inf)(), loader(), NonFiniteError,
     ("inf", "weights are unchanged")),
    ("a gradient that is NaN", lambda: step_that_returns(lambda y: ((y - y.detach()) ** 2).sqrt().sum())(), loader(),
     NonFiniteError,
     ("layer.weight", "weights are unchanged")),
    ("sums and means", lambda: step_that_returns(lambda y: y.mean() if len(y) == 1 else {"loss": y.sum(), "num_items": 2})(),
     DataLoader(TensorDataset(torch.ones(3, 1)), batch_size=2), DataError, ("mean", "num_items", "every micro-batch")),
    # the data
    ("no loader", Plain, None, DataError, ("train_dataloaders is None", "Pass a DataLoader")),
    ("an empty data set", Plain, DataLoader(TensorDataset(torch.zeros(0, 1)), batch_size=2), DataError,
     ("0 batches", "0 samples")),
    ("fewer samples than a batch", Plain, loader(8, drop_last=True), DataError, ("6 samples", "batch 8", "drop_last=True")),
    ("an iterable that is empty", Plain, DataLoader(Endless(), batch_size=2), DataError, ("0 batches", "at least one batch")),
    ("a number as loader", Plain, 3, ConfigError, ("int", "DataLoader")),
    ("a string as loader", Plain, "data", ConfigError, ("str", "DataLoader")),
    ("a data set as loader", Plain, DATA, ConfigError, ("TensorDataset", "DataLoader(")),
    ("several loaders", Plain, [loader(), loader()], DataError, ("one training loader", "ConcatDataset")),
    ("manual optimisation and accumulation", Manual, loader(), ConfigError, ("optimises manually", "accumulate_grad_batches")),
]  # fmt: skip


@pytest.mark.parametrize(("make", "data", "kind", "words"), [row[1:] for row in RUNS], ids=[row[0] for row in RUNS])
def test_a_run_that_cannot_be_is_explained(
    make: Callable[[], Any], data: Any, kind: type[DrivetrainError], words: tuple[str, ...], tmp_path: Path
) -> None:
    window = 2 if make is Manual or "num_items" in words else 1
    with pytest.raises(kind) as raised:
        Trainer(**QUIET, root=tmp_path, max_epochs=1, accumulate_grad_batches=window).fit(make(), data)
    has_three_parts(raised.value, words)


def test_no_limit_at_all_is_refused_for_endless_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would never end"):
        Trainer(**QUIET, root=tmp_path).fit(Plain(), DataLoader(Endless(), batch_size=2))


def test_an_empty_validation_set_is_a_warning_and_the_training_goes_on(tmp_path: Path) -> None:
    class Watched(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=1)
    empty = DataLoader(TensorDataset(torch.zeros(0, 1)), batch_size=2)
    with pytest.warns(UserWarning, match="0 batches"):
        trainer.fit(Watched(), loader(), empty)
    assert trainer.global_step == 3
    with pytest.warns(UserWarning, match="0 batches"), pytest.raises(DataError, match="gave no batch"):
        trainer.validate(Watched(), empty)


def test_validation_data_without_a_validation_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="defines no validation_step"):
        Trainer(**QUIET, root=tmp_path, max_epochs=1).fit(Plain(), loader(), loader())


def test_an_error_of_the_users_own_says_in_which_batch_it_was(tmp_path: Path) -> None:
    """A wrong shape in the last batch only: the user's error, with the place."""

    class Digits(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.layer(batch[0]) * torch.ones(2, 1)).mean() if len(batch[0]) == 2 else torch.ones(3) @ torch.ones(2)

    with pytest.raises(RuntimeError, match=r"inconsistent tensor size|size mismatch") as raised:
        Trainer(**QUIET, root=tmp_path, max_epochs=1).fit(Digits(), DataLoader(TensorDataset(torch.ones(5, 1)), batch_size=2))
    assert "epoch 0, batch 2, after 2 steps" in raised.value.__notes__[0]


ACCELERATOR: list[tuple[dict[str, Any], type[DrivetrainError], tuple[str, ...]]] = [
    ({"gradient_accumulation_step": 2}, UnknownName, ("Did you mean 'gradient_accumulation_steps'?",)),
    ({"gradient_accumulation_steps": 0}, ConfigError, ("at least 1, got 0",)),
    ({"mixed_precision": "bf61"}, UnknownName, ("'bf61'", "Known: bf16-mixed")),
    ({"strategy": "single "}, UnknownName, ("Did you mean 'single'?",)),
    ({"nonfinite": "no"}, UnknownName, ("nonfinite='no' is not known", "raise, skip, ignore")),
    ({"device": "gpuu"}, ConfigError, ("gpuu",)),
]


@pytest.mark.parametrize(("options", "kind", "words"), ACCELERATOR, ids=[str(row[0]) for row in ACCELERATOR])
def test_a_wrong_argument_of_the_accelerator_is_explained(
    options: dict[str, Any], kind: type[DrivetrainError], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as raised:
        Accelerator(**options)
    has_three_parts(raised.value, words)


def test_what_prepare_does_not_take_is_explained() -> None:
    accelerator = Accelerator()
    model, optimizer_of = nn.Linear(1, 1), lambda m: torch.optim.SGD(m.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="prepare takes models, optimizers, schedulers and data loaders, got int 3"):
        accelerator.prepare(3)
    with pytest.raises(ConfigError, match="got str"):
        accelerator.prepare("model")
    with pytest.raises(ConfigError, match=r"belong to no prepared model.*Prepare the model before its optimizer"):
        accelerator.prepare(optimizer_of(model))
    prepared = accelerator.prepare(model)
    with pytest.raises(ConfigError, match="prepared already"):
        accelerator.prepare(prepared)
    optimizer = accelerator.prepare(optimizer_of(model))
    with pytest.raises(ConfigError, match="prepared already"):
        accelerator.prepare(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer_of(model), 1)
    with pytest.raises(ConfigError, match="StepLR schedules an optimizer that was not prepared"):
        accelerator.prepare(scheduler)
    batches = accelerator.prepare(loader())
    with pytest.raises(ConfigError, match="prepared already"):
        accelerator.prepare(batches)
    with pytest.raises(
        ConfigError, match="register_for_checkpointing takes objects with state_dict and load_state_dict, got int"
    ):
        accelerator.register_for_checkpointing(3)
    with pytest.raises(ConfigError, match=r"Where to\?"):
        accelerator.save_state()


# -- several ranks -----------------------------------------------------------------------------------------------------
def met(run: Callable[[], Any]) -> str:
    try:
        run()
    except DrivetrainError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def wrong_on_both(root: Path) -> list[str]:
    """What every rank meets by itself, each in its own run over one group."""
    from drivetrain.strategies.world import World

    world = World.start()
    options: dict[str, Any] = QUIET | {"root": root, "max_epochs": 1}
    none_on_one = step_that_returns(lambda y: None)
    found = [
        met(lambda: Trainer(**options, strategy="single").fit(Plain(), loader())),
        met(lambda: Trainer(**options, devices=3).fit(Plain(), loader())),
        met(lambda: Trainer(**options).fit(Plain(), loader(4, drop_last=True))),
        met(lambda: Trainer(**options).fit(none_on_one(), loader())),
        met(lambda: Trainer(**options).fit(step_that_returns(lambda y: y)(), loader())),
        met(lambda: Trainer(**options).fit(Plain(), loader(1 + world.rank))),
        met(lambda: Trainer(**options, global_batch_size=6).fit(Plain(), loader())),
        met(lambda: Trainer(**options).fit(optimizers_are(strange)(), loader())),
        met(lambda: Trainer(**options, resume="nowhere").fit(Plain(), loader())),
    ]
    world.stop()
    return found


def test_wrong_use_is_told_on_every_rank_and_nobody_hangs(ranks: Any, tmp_path: Path) -> None:
    words = [
        "ConfigError: strategy='single' was asked for on 2 processes",
        "devices=3 and num_nodes=1 ask for 3 processes",
        "DataError: 0 batches on rank",
        "returned None on rank",
        "DataError: The loss must be a scalar, got shape (2, 1)",
        "DataError: Ranks 0 and 1 have different loaders",
        "ConfigError: global_batch_size=6 is not a multiple of 4",
        "belong to no prepared model",
        "CheckpointError: There is no checkpoint",
    ]
    for found in ranks(2, wrong_on_both, tmp_path, timeout=40):
        assert len(found) == len(words)
        for text, word in zip(found, words, strict=True):
            assert word in text


def one_rank_fails(kind: str, root: Path) -> None:
    from drivetrain.strategies.world import World

    world = World.start()
    rank = world.rank

    class Digits(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if rank == 1 and batch_idx == 1:
                return {"nan": loss * math.nan, "none": None, "vector": loss.expand(3)}[kind]
            return loss

    Trainer(**QUIET, root=root, max_epochs=2).fit(Digits(), loader(1))


@pytest.mark.parametrize(("kind", "words"), [("nan", "on rank 1"), ("none", "on rank 1"), ("vector", r"got shape \(3,\)")])
def test_an_error_of_one_rank_ends_all(kind: str, words: str, ranks: Any, tmp_path: Path) -> None:
    """Rank 0 waits in its all-reduce for a rank that has gone: the launcher ends it, and the cause is what the user sees."""
    start = time.monotonic()
    with pytest.raises(DrivetrainError, match=words):
        ranks(2, one_rank_fails, kind, tmp_path, timeout=30)
    assert time.monotonic() - start < 20


# -- a plain script ----------------------------------------------------------------------------------------------------
SCRIPT = """
import sys
from drivetrain import Trainer, TrainingModule
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
class Digits(TrainingModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def validaton_step(self, batch, batch_idx):
        pass
if sys.argv[1] == "argument":
    Trainer(max_step=3)
Trainer(max_epochs=1).fit(Digits(), DataLoader(TensorDataset(torch.ones(4, 1))))
"""


@pytest.mark.parametrize(
    ("what", "words"), [("argument", "Did you mean 'max_steps'?"), ("hook", "Did you mean 'validation_step'?")]
)
def test_a_script_with_wrong_use_ends_with_code_2_and_one_paragraph(what: str, words: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, what], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "train.py" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
