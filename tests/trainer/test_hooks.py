"""Every hook of the module and of callbacks, in its order, with its arguments; and what is refused by name.

The order is Lightning's (traced on 2.6), with the differences that callbacks/base.py states: zero_grad comes before the forward,
and there are on_checkpoint_step, on_checkpoint_epoch and on_log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Callback, Trainer, TrainingModule
from drivetrain.callbacks.runner import CALLBACK_HOOKS
from drivetrain.strategies.errors import ConfigError, UnknownName
from drivetrain.trainer.module import LIGHTNING_ONLY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "seed": 0}
DATA = TensorDataset(torch.arange(6.0).reshape(6, 1))
OWN = ("configure_callbacks", "prepare_data", "configure_model", "configure_optimizers", "train_dataloader", "val_dataloader",
       "test_dataloader", "predict_dataloader", "configure_gradient_clipping", "lr_scheduler_step")  # fmt: skip
"""What the module is asked for, beside the hooks and the steps."""


class Plain(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self.layer(batch[0]).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self.layer(batch[0]).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]


def recording(told: list[str], who: str, base: type, names: tuple[str, ...]) -> Any:
    """Return an instance of a subclass of `base` which writes "who.name" for every call of one of `names`."""

    def wrap(name: str) -> Any:
        inner = getattr(base, name, None)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            told.append(f"{who}.{name}")
            return None if inner is None else inner(self, *args, **kwargs)

        return call

    return type(f"Recording{base.__name__}", (base,), {name: wrap(name) for name in names})()


def record(root: Path, stage: str = "fit", **options: Any) -> list[str]:
    """Run `stage` with two callbacks, A and B, and the module M; return what was called."""
    told: list[str] = []
    hooks = tuple(n for n in CALLBACK_HOOKS if hasattr(TrainingModule, n))
    steps = ("training_step", "validation_step", "test_step", "predict_step")
    module = recording(told, "M", Plain, (*hooks, *steps, *OWN))
    callbacks = [recording(told, who, Callback, CALLBACK_HOOKS) for who in "AB"]
    trainer = Trainer(**QUIET, root=root, callbacks=callbacks, **options)
    loader = DataLoader(DATA, batch_size=2)
    module.train_dataloader = module.val_dataloader = module.test_dataloader = module.predict_dataloader = None
    if stage == "fit":
        trainer.fit(module, loader, DataLoader(DATA, batch_size=6))
    else:
        getattr(trainer, stage)(module, DataLoader(DATA, batch_size=6))
    return told


def every(*names: str) -> list[str]:
    """A hook of the callbacks, in their order, and then of the module."""
    return [f"{who}.{name}" for name in names for who in "ABM"]


def callbacks_only(*names: str) -> list[str]:
    return [f"{who}.{name}" for name in names for who in "AB"]


def evaluation(stage: str) -> list[str]:
    step = "validation_step" if stage == "validation" else f"{stage}_step"
    around = every(f"on_{stage}_start", f"on_{stage}_epoch_start", f"on_{stage}_batch_start")
    return [*around, f"M.{step}", *every(f"on_{stage}_batch_end", f"on_{stage}_epoch_end", f"on_{stage}_end")]


def test_a_fit_calls_every_hook_in_lightnings_order(tmp_path: Path) -> None:
    """Sanity check, 3 micro-batches in windows of 2 (the last is cut short), a log point each step, a validation at the end."""
    told = record(tmp_path, max_epochs=1, accumulate_grad_batches=2, num_sanity_val_steps=1, log_every_n_steps=1)

    forward = ["M.training_step", *every("on_before_backward", "on_after_backward")]
    step = [*every("on_before_optimizer_step"), "M.configure_gradient_clipping", "M.lr_scheduler_step"]
    moment = callbacks_only("on_log", "on_checkpoint_step")
    first = [*every("on_train_batch_start", "on_before_zero_grad"), *forward]
    assert told == [
        "M.configure_callbacks",
        "M.prepare_data",
        *every("setup"),
        "M.configure_model",
        "M.configure_optimizers",
        *every("on_fit_start"),
        *callbacks_only("on_sanity_check_start"),
        *evaluation("validation"),
        *callbacks_only("on_sanity_check_end"),
        *every("on_train_start", "on_train_epoch_start"),
        *first,
        *every("on_train_batch_end"),
        *[*every("on_train_batch_start"), *forward, *step],
        *every("on_train_batch_end"),
        *moment,
        *[*first, *step],
        *every("on_train_batch_end"),
        *moment,
        *[name for name in evaluation("validation") if "_validation_end" not in name],
        *callbacks_only("on_log"),  # what the validation found
        *every("on_validation_end"),
        *every("on_train_epoch_end"),
        *callbacks_only("on_checkpoint_epoch"),
        *every("on_train_end", "on_fit_end", "teardown"),
    ]


@pytest.mark.parametrize(("method", "stage"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_an_evaluation_calls_every_hook_in_lightnings_order(method: str, stage: str, tmp_path: Path) -> None:
    told = record(tmp_path, method)
    before = ["M.configure_callbacks", "M.prepare_data", *every("setup"), "M.configure_model"]
    assert told == [*before, *evaluation(stage), *every("teardown")]


def test_the_data_come_from_the_module_when_none_are_passed(tmp_path: Path) -> None:
    """train_dataloader and val_dataloader are asked once; prepare_data and setup before them."""

    class Own(Plain):
        def setup(self, stage: str) -> None:
            self.stage = stage

        def train_dataloader(self) -> Any:
            assert self.stage == "fit"
            return DataLoader(DATA, batch_size=2)

    module = Own()
    Trainer(**QUIET, root=tmp_path, max_epochs=1).fit(module)
    assert module.stage == "fit"


def test_hooks_get_their_arguments(tmp_path: Path) -> None:
    """The trainer and the module first for a callback; outputs, batch and index; the loader's index only where several are."""
    seen: dict[str, tuple[Any, ...]] = {}

    class Watching(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen["train"] = (trainer, module, outputs.shape, batch[0].shape, batch_idx)

        def on_validation_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            seen["validation"] = (outputs, batch_idx, dataloader_idx)

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen["step"] = (isinstance(optimizer, torch.optim.Optimizer), module.layer.weight.grad is not None)

        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen["zero_grad"] = (isinstance(optimizer, torch.optim.Optimizer),)

        def on_log(self, trainer: Any, module: Any, metrics: dict[str, float], step: int) -> None:
            seen["log"] = (sorted(metrics), step)

    class Two(Plain):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return dataloader_idx

    module, trainer = Two(), Trainer(**QUIET, root=tmp_path, max_epochs=1, callbacks=Watching(), log_every_n_steps=3)
    trainer.fit(module, DataLoader(DATA, batch_size=2), [DataLoader(DATA, batch_size=3), DataLoader(DATA, batch_size=3)])
    assert seen["train"] == (trainer, module, torch.Size([]), torch.Size([2, 1]), 2)
    assert seen["validation"] == (1, 1, 1)
    assert seen["step"] == (True, True)
    assert seen["zero_grad"] == (True,)
    assert seen["log"] == (["grad_norm", "loss"], 3)


def test_a_hook_that_nobody_overrides_is_not_called(tmp_path: Path) -> None:
    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=1, callbacks=Callback())
    trainer.fit(Plain(), DataLoader(DATA, batch_size=2))
    assert all(getattr(trainer.hooks, name) == () for name in CALLBACK_HOOKS)


def test_on_exception_is_told_once_and_teardown_still_comes(tmp_path: Path) -> None:
    told: list[str] = []

    class Watching(Callback):
        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            told.append(f"{type(exception).__name__}: {exception}")

        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            told.append(f"teardown {stage}")

    class Failing(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise IndexError("the last batch is odd")
            return super().training_step(batch, batch_idx)

    with pytest.raises(IndexError, match="odd") as raised:
        Trainer(**QUIET, root=tmp_path, max_epochs=1, callbacks=Watching()).fit(Failing(), DataLoader(DATA, batch_size=2))
    assert told == ["IndexError: the last batch is odd", "teardown fit"]
    assert "epoch 0, batch 2, after 2 steps" in raised.value.__notes__[0]


def test_the_modules_callbacks_take_the_place_of_those_of_their_class(tmp_path: Path) -> None:
    """As in Lightning; in every stage."""

    class Watching(Callback):
        pass

    mine = Watching()

    class Own(Plain):
        def configure_callbacks(self) -> Any:
            return [mine]

    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=1, callbacks=[Watching()])
    trainer.fit(Own(), DataLoader(DATA, batch_size=2))
    assert trainer.callbacks == [mine]
    trainer = Trainer(**QUIET, root=tmp_path, callbacks=[Watching()])
    trainer.validate(Own(), DataLoader(DATA, batch_size=2))
    assert trainer.callbacks == [mine]


class Bare(TrainingModule):
    """Only what a subclass of a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


MODULE_SLIPS = [
    ("validaton_step", "validation_step"),
    ("trainning_step", "training_step"),
    ("on_train_batch_ends", "on_train_batch_end"),
    ("on_after_backwards", "on_after_backward"),
    ("configure_optimiser", "configure_optimizers"),
    ("val_dataloaders", "val_dataloader"),
    ("configure_gradient_cliping", "configure_gradient_clipping"),
]


@pytest.mark.parametrize(("slip", "meant"), MODULE_SLIPS)
def test_a_misspelt_hook_of_a_module_is_named(slip: str, meant: str, tmp_path: Path) -> None:
    module = type("Digits", (Bare,), {slip: lambda self, *args: None})()
    with pytest.raises(UnknownName, match=rf"Digits\.{slip} is no hook.*Did you mean '{meant}'") as raised:
        Trainer(**QUIET, root=tmp_path, max_epochs=1).fit(module, DataLoader(DATA, batch_size=2))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("on_train_batch_ends", "on_train_batch_end"),
        ("on_validation_ended", "on_validation_end"),
        ("on_train_step_end", "on_train_epoch_end"),
        ("state_dictionary", None),
    ],
)
def test_a_misspelt_hook_of_a_callback_is_named(slip: str, meant: str | None) -> None:
    """When the Trainer is made; a method that is unlike any hook is the callback's own."""
    callback = type("Watching", (Callback,), {slip: lambda self, *args: None})()
    if meant is None:
        Trainer(**QUIET, callbacks=[callback])
        return
    with pytest.raises(UnknownName, match=rf"Watching\.{slip} is no hook.*Did you mean '{meant}'"):
        Trainer(**QUIET, callbacks=[callback])


@pytest.mark.parametrize("name", sorted(LIGHTNING_ONLY))
def test_a_hook_of_lightning_that_is_not_called_is_refused(name: str, tmp_path: Path) -> None:
    module = type("Digits", (Plain,), {name: lambda self, *args: None})()
    with pytest.raises(UnknownName, match=rf"Digits\.{name} is a hook of Lightning that is not called here"):
        Trainer(**QUIET, root=tmp_path, max_epochs=1).fit(module, DataLoader(DATA, batch_size=2))


def test_a_helper_of_the_users_own_is_no_misspelt_hook(tmp_path: Path) -> None:
    class Digits(Plain):
        def shared_step(self, batch: Any) -> Any:
            return batch

        def training_loss(self) -> None: ...

        def validation_steps(self) -> None:
            """Near a hook that the module defines too: nothing is missing."""

    Trainer(**QUIET, root=tmp_path, max_epochs=1).fit(Digits(), DataLoader(DATA, batch_size=2))


def test_two_callbacks_with_one_state_key_are_refused(tmp_path: Path) -> None:
    class Counting(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=1, callbacks=[Counting(), Counting()])
    with pytest.raises(ConfigError, match=r"under the key 'Counting'.*Override state_key"):
        trainer.fit(Plain(), DataLoader(DATA, batch_size=2))
