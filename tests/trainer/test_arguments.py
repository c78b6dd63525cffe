"""Intervals may be typed, and mean what the numbers mean."""

from __future__ import annotations

import pytest
from drivetrain import Trainer
from drivetrain.strategies.errors import ConfigError


def test_a_typed_interval_is_the_number_that_it_names() -> None:
    trainer = Trainer(max_steps="500step", max_epochs="3ep", log_every_n_steps="20step", val_check_interval="100step")
    assert (trainer.max_steps, trainer.max_epochs, trainer.log_every_n_steps) == (500, 3, 20)
    assert trainer.options["val_check_interval"] == 100


def test_a_validation_every_second_epoch() -> None:
    options = Trainer(max_epochs=4, val_check_interval="2ep").options
    assert (options["val_check_interval"], options["check_val_every_n_epoch"]) == (None, 2)


@pytest.mark.parametrize(
    "wrong", [{"max_steps": "3ep"}, {"max_epochs": "500step"}, {"val_check_interval": "10m"}, {"log_every_n_steps": "1e9tok"}]
)
def test_another_unit_is_refused_with_an_example(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="Give a number, or"):
        Trainer(**wrong)  # pyright: ignore[reportArgumentType]
