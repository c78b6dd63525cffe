"""EarlyStopping stops where Lightning's would, on every rank, also across a resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
from drivetrain.callbacks.early_stopping import EarlyStopping, monitored
from drivetrain.strategies.errors import ConfigError, UnknownName


def looks(view: Any, callback: EarlyStopping, values: list[float]) -> int:
    """Validate with these values until it stops; return after how many looks it did (0: never)."""
    for i, value in enumerate(values):
        view.validate(callback, {"val_loss": value})
        if view.stopped:
            return i + 1
    return 0


@pytest.mark.parametrize(
    ("options", "values", "stops_at"),
    [
        ({}, [3, 2, 1, 0], 0),
        ({}, [3, 2, 2, 2, 2], 5),
        ({"patience": 1}, [3, 2, 2.5], 3),
        ({"patience": 2}, [3, 4, 2, 3, 4], 5),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.4, 2.3, 2.2], 5),
        ({"patience": 1, "min_delta": -0.5}, [3, 2.6], 2),
        ({"patience": 1, "mode": "max"}, [1, 2, 2], 3),
        ({"mode": "max", "patience": 1}, [1, 2, 3], 0),
        ({}, [3, math.nan], 2),
        ({}, [3, math.inf], 2),
        ({"check_finite": False}, [3, math.nan, math.nan, math.nan], 4),
        ({"stopping_threshold": 1.5}, [3, 2, 1.4], 3),
        ({"stopping_threshold": 5, "mode": "max"}, [3, 6], 2),
        ({"divergence_threshold": 10}, [3, 11], 2),
        ({"divergence_threshold": 1, "mode": "max"}, [3, 0.5], 2),
    ],
)
def test_it_stops_when_it_should(view: Any, options: dict[str, Any], values: list[float], stops_at: int) -> None:
    assert looks(view, EarlyStopping("val_loss", **options), values) == stops_at


def test_the_reason_names_the_metric_and_its_value(view: Any) -> None:
    callback = EarlyStopping("val_loss", patience=2)
    looks(view, callback, [3.0, 3.25, 3.5])
    assert view.stopped == ["early stopping: val_loss did not improve on 3 in 2 looks in a row"]
    assert callback.stopping_reason is not None


def test_its_state_goes_on_after_a_resume(view: Any) -> None:
    values = [3.0, 2.0, 2.5, 2.25, 2.125, 2.1]
    assert looks(view, EarlyStopping("val_loss"), values) == 5
    for cut in range(5):
        view.stopped.clear()
        before, after = EarlyStopping("val_loss"), EarlyStopping("val_loss")
        assert looks(view, before, values[:cut]) == 0
        after.load_state_dict(before.state_dict())
        assert looks(view, after, values[cut:]) == 5 - cut


def test_an_unknown_metric_is_named_at_the_first_validation(view: Any) -> None:
    callback = EarlyStopping("val_los")
    view.metrics["train_loss"] = 1.0
    callback.on_train_epoch_end(view, view.module)  # no validation yet: it may come with it
    view.validate(callback, {"val_loss": 1.0})
    with pytest.raises(UnknownName, match=r"'val_los'.*EarlyStopping.*Did you mean 'val_loss'\?.*train_loss, val_loss"):
        callback.on_train_epoch_end(view, view.module)
    lenient = EarlyStopping("val_los", strict=False)
    assert looks(view, lenient, [3, 3, 3, 3, 3]) == 0


def test_a_metric_of_the_training_epoch_is_looked_at_when_the_epoch_ends(view: Any) -> None:
    callback = EarlyStopping("train_loss", patience=2)
    for epoch, loss in enumerate([2.0, 1.0, 1.5, 1.25]):
        view.validate(callback, {"val_loss": 1.0})  # the value of the epoch before is still there, and must not count twice
        view.metrics["train_loss_epoch"] = loss
        assert len(view.stopped) == 0, epoch
        callback.on_train_epoch_end(view, view.module)
    assert len(view.stopped) == 1


def test_the_sanity_check_and_a_validation_on_its_own_are_no_looks(view: Any) -> None:
    callback = EarlyStopping("val_loss", patience=1)
    for stage in ("sanity_check", "validate"):
        view.stage = stage
        assert looks(view, callback, [1.0, 2.0, 3.0]) == 0
    assert callback.wait_count == 0


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'max'"):
        EarlyStopping("x", mode="maxx")
    with pytest.raises(ConfigError, match="patience"):
        EarlyStopping("x", patience=0)


def test_two_of_them_have_states_of_their_own() -> None:
    assert EarlyStopping("a").state_key != EarlyStopping("b").state_key


def test_a_metric_logged_for_steps_and_epochs_is_found_under_its_plain_name() -> None:
    assert monitored({"x_step": 1.0, "x_epoch": 2.0}, "x") == 2.0
    assert monitored({"x_step": 1.0}, "x") == 1.0
    assert monitored({"x": 0.0, "x_epoch": 2.0}, "x") == 0.0
    assert monitored({}, "x") is None


def test_a_metric_that_no_validation_will_bring_is_refused_at_the_first_epochs_end(view: Any) -> None:
    """There are no validation data: the callback would wait for ever, and the training never stop early."""
    view.num_val_batches = []
    view.metrics = {"train_loss_epoch": 1.0}
    with pytest.raises(UnknownName, match="val_loss"):
        EarlyStopping("val_loss").on_train_epoch_end(view, None)  # pyright: ignore[reportArgumentType]
