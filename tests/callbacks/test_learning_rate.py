"""LearningRateMonitor adds the rates of every group to what a log point logs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain.callbacks.learning_rate import LearningRateMonitor
from drivetrain.strategies.errors import UnknownName
from torch import nn


def groups(*options: dict[str, Any], kind: Any = torch.optim.SGD) -> Any:
    return kind([{"params": [nn.Parameter(torch.zeros(2))], **o} for o in options], lr=0.5)


def test_the_rate_is_logged_at_each_log_point_as_the_scheduler_left_it(view: Any) -> None:
    optimizer = groups({})
    view.optimizers = {"main": optimizer}
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    logged = view.train(LearningRateMonitor(), steps=10)
    scheduler.step()
    logged |= view.train(LearningRateMonitor(), steps=10)
    assert logged == {10: {"loss": 0.1, "lr": 0.5}, 20: {"loss": 0.05, "lr": 0.25}}


def test_groups_and_optimizers_have_names(view: Any) -> None:
    view.optimizers = {"generator": groups({"name": "body"}, {"lr": 0.25}), "critic": groups({"lr": 0.125})}
    logged = view.train(LearningRateMonitor(), steps=10, log=lambda step: {})
    assert logged == {10: {"lr-generator/body": 0.5, "lr-generator/1": 0.25, "lr-critic": 0.125}}


def test_momentum_and_weight_decay_on_request(view: Any) -> None:
    view.optimizers = {
        "a": groups({"momentum": 0.9, "weight_decay": 0.01}),
        "b": groups({"betas": (0.8, 0.9)}, kind=torch.optim.Adam),
    }
    logged = view.train(LearningRateMonitor(log_momentum=True, log_weight_decay=True), steps=10, log=lambda step: {})[10]
    assert logged == {"lr-a": 0.5, "lr-b": 0.5, "momentum-a": 0.9, "momentum-b": 0.8, "weight_decay-a": 0.01, "weight_decay-b": 0}


def test_a_rate_that_is_a_tensor_is_a_number_in_the_log(view: Any) -> None:
    view.optimizers = {"main": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.25))}
    (values,) = view.train(LearningRateMonitor(), steps=10, log=lambda step: {}).values()
    assert values == {"lr": 0.25}
    assert type(values["lr"]) is float


def test_validations_and_epoch_ends_get_no_rate(view: Any) -> None:
    view.optimizers = {"main": groups({})}
    callback = LearningRateMonitor()
    view.train(callback, steps=10)
    for step in (10, 13):  # right after the log point of that step, and at a step that has none
        values: dict[str, float] = {"val_loss": 1.0}
        callback.on_log(view, view.module, values, step)
        assert values == {"val_loss": 1.0}


def test_once_an_epoch(view: Any) -> None:
    view.optimizers = {"main": groups({})}
    callback = LearningRateMonitor("epoch")
    first = view.train(callback, steps=20)
    view.progress.epoch = 1
    second = view.train(callback, steps=20)
    assert ["lr" in values for values in (first | second).values()] == [True, False, True, False]
    with pytest.raises(UnknownName, match="Did you mean 'step'"):
        LearningRateMonitor("steps")
