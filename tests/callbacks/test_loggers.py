"""What the loggers write can be read back, goes on after a resume, and holds no secret."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.loggers import LOGGERS, make_logger, make_loggers
from drivetrain.callbacks.loggers.base import Logger, RunInfo, redacted
from drivetrain.callbacks.loggers.csv import CSVLogger
from drivetrain.callbacks.loggers.jsonl import JSONLLogger, cut_back, read_metrics
from drivetrain.callbacks.loggers.tensorboard import TensorBoardLogger
from drivetrain.callbacks.loggers.wandb import WandbLogger
from drivetrain.strategies.errors import ConfigError, MissingDependency, UnknownName
from drivetrain.trainer.tracking import Tracking


def info(root: Path, **more: Any) -> RunInfo:
    return RunInfo(name="demo", id="1", root=root, **more)


def log_steps(logger: Logger, steps: range) -> None:
    for step in steps:
        logger.log({"epoch": step // 3, "loss": 1 / step}, step)


# -- names ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(LOGGERS))
def test_a_string_is_one_logger_of_that_name(name: str) -> None:
    loggers = make_loggers(name)
    assert [logger.name for logger in loggers] == [name]
    assert [logger.name for logger in make_loggers([name])] == [name]


def test_nothing_true_and_false_add_no_logger() -> None:
    assert make_loggers(None) == make_loggers(True) == make_loggers(False) == make_loggers(()) == []


def test_a_misspelt_logger_is_named() -> None:
    with pytest.raises(UnknownName, match=r"'wandbb'.*Did you mean 'wandb'\?.*csv, jsonl, tensorboard, wandb"):
        make_logger("wandbb")
    with pytest.raises(UnknownName, match="Did you mean 'tensorboard'"):
        make_loggers(["csv", "tensorbord"])


@pytest.mark.parametrize("given", [42, [42], [None], CSVLogger, [CSVLogger], {"wandb": 1}, object()])
def test_what_is_no_logger_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="logger"):
        make_loggers(given)


def test_a_logger_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'csv' twice"):
        make_loggers(["csv", CSVLogger()])


# -- jsonl ----------------------------------------------------------------------------------------------------------------
def test_each_line_is_valid_json_with_step_epoch_time_and_metrics(tmp_path: Path) -> None:
    logger = JSONLLogger()
    logger.start(info(tmp_path))
    logger.log({"epoch": 2.0, "loss": 0.1, "nan": math.nan, "up": math.inf, "down": -math.inf}, 50)
    # Read while the logger is open: each line is flushed at its log point.
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(line, parse_constant=refuse)
    assert list(found) == ["step", "epoch", "time", "metrics"]
    assert (found["step"], found["epoch"]) == (50, 2)
    assert found["metrics"] == {"loss": 0.1, "nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["metrics"]["nan"])
    assert (read["metrics"]["up"], read["metrics"]["down"]) == (math.inf, -math.inf)
    logger.close("finished")


def test_cutting_back_removes_later_lines_and_a_torn_one_and_leaves_no_other_file(tmp_path: Path) -> None:
    logger = JSONLLogger()
    logger.start(info(tmp_path))
    log_steps(logger, range(1, 8))
    logger.close("failed")
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "epo')
    assert cut_back(path, 4) == 4
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert cut_back(path, 4) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_has_each_line_once_also_those_of_the_committed_step_itself(tmp_path: Path) -> None:
    """The checkpoint came between two lines of the same step: the second one is written again after the resume."""
    first = JSONLLogger()
    first.start(info(tmp_path))
    log_steps(first, range(1, 4))
    state = json.loads(json.dumps(first.state_dict()))
    first.log({"val_loss": 0.5}, 3)
    log_steps(first, range(4, 6))
    second = JSONLLogger()
    second.load_state_dict(state)
    second.start(info(tmp_path, resumed=True, step=3))
    second.log({"val_loss": 0.5}, 3)
    log_steps(second, range(4, 7))
    second.close("finished")
    lines = read_metrics(tmp_path)
    assert [(line["step"], *line["metrics"]) for line in lines] == [
        *((step, "loss") for step in (1, 2, 3)),
        (3, "val_loss"),
        *((step, "loss") for step in (4, 5, 6)),
    ]
    first.close("failed")


@pytest.mark.parametrize("num_bytes", [None, 10**9, 7])
def test_a_length_that_does_not_fit_the_file_falls_back_on_the_step(tmp_path: Path, num_bytes: int | None) -> None:
    logger = JSONLLogger()
    logger.start(info(tmp_path))
    log_steps(logger, range(1, 8))
    logger.close("failed")
    again = JSONLLogger()
    again.load_state_dict({"bytes": num_bytes})
    again.start(info(tmp_path, resumed=True, step=5))
    again.close("finished")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


# -- csv ------------------------------------------------------------------------------------------------------------------
def test_csv_gets_a_column_for_a_name_that_comes_later(tmp_path: Path) -> None:
    logger = CSVLogger()
    logger.start(info(tmp_path))
    logger.log({"epoch": 0, "loss": 0.5}, 1)
    logger.log({"epoch": 0, "val, loss": math.nan}, 1)
    logger.log({"epoch": 1, "loss": 0.25}, 2)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "epoch", "time", "loss", "val, loss"]
    assert [(row["step"], row["loss"], row["val, loss"]) for row in rows] == [
        ("1", "0.5", ""),
        ("1", "", "nan"),
        ("2", "0.25", ""),
    ]
    logger.close("finished")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = CSVLogger()
    first.start(info(tmp_path))
    log_steps(first, range(1, 6))
    first.close("failed")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,")  # torn
    second = CSVLogger()
    second.start(info(tmp_path, resumed=True, step=3))
    second.log({"other": 1.0}, 4)
    second.close("finished")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [(row["step"], row["loss"] != "", row["other"]) for row in csv.DictReader(file)] == [
            *((str(step), True, "") for step in (1, 2, 3)),
            ("4", False, "1.0"),
        ]


# -- tensorboard ----------------------------------------------------------------------------------------------------------
def scalars(root: Path, tag: str) -> list[tuple[int, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        values = [(event.step, event.value) for event in found.Scalars(tag)]
        del found
        gc.collect()  # it leaves folders open, which warns when they are collected
        return values


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path: Path) -> None:
    first = TensorBoardLogger()
    first.start(info(tmp_path, config={"lr": 0.1}))
    for step in range(1, 8):
        first.log({"loss": float(step), "odd": math.nan}, step)
    second = TensorBoardLogger()
    second.start(info(tmp_path, resumed=True, step=5))
    for step in range(6, 10):
        second.log({"loss": 10.0 * step}, step)
    second.close("finished")
    assert scalars(tmp_path, "loss") == [(s, float(s)) for s in range(1, 6)] + [(s, 10.0 * s) for s in range(6, 10)]
    first.close("failed")


def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependency, match=r"pip install 'drivetrain\[tensorboard\]'"):
        TensorBoardLogger().start(info(tmp_path))
    with pytest.raises(MissingDependency, match=r"pip install 'drivetrain\[wandb\]'"):
        WandbLogger().start(info(tmp_path))


# -- wandb (each in a process of its own: the package keeps state) ------------------------------------------------------------
def offline_runs(root: Path) -> list[str]:
    return sorted(path.name.split("-")[3] for path in (root / "wandb").glob("offline-run-*"))


def test_wandb_records_offline_and_goes_on_under_the_same_id(ranks: Any, tmp_path: Path) -> None:
    def run(state: dict[str, Any] | None, step: int) -> dict[str, Any]:
        tracking = Tracking("wandb")
        if state:
            tracking.load_state_dict(state)
        tracking.start(info(tmp_path, resumed=state is not None, step=step))
        early = tracking.state_dict()["wandb"]  # known from the start, before wandb has started
        tracking.log({"loss": 0.5}, step + 1, epoch=0)
        saved = tracking.state_dict()
        tracking.close("finished")
        assert saved["wandb"] == early
        return saved

    (state,) = ranks(1, run, None, 0)
    (again,) = ranks(1, run, state, 5)
    assert state["wandb"]["id"] == again["wandb"]["id"]
    assert offline_runs(tmp_path) == [state["wandb"]["id"]] * 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 6]


def test_wandb_without_a_key_records_offline_after_one_warning(ranks: Any, tmp_path: Path) -> None:
    def run() -> list[str]:
        os.environ.pop("WANDB_MODE")
        os.environ.pop("WANDB_API_KEY", None)
        os.environ.update(HOME=str(tmp_path / "home"), NETRC=str(tmp_path / "none"), WANDB_CONFIG_DIR=str(tmp_path / "none"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracking = Tracking("wandb")
            tracking.start(info(tmp_path))
            for step in range(3):
                tracking.log({"loss": 0.5}, step)
            tracking.close("finished")
        return [str(w.message) for w in caught]

    ((message,),) = ranks(1, run)
    assert "no API key" in message
    assert "wandb sync" in message
    assert len(offline_runs(tmp_path)) == 1


@pytest.mark.slow
def test_wandb_without_a_server_ends_no_training(ranks: Any, tmp_path: Path) -> None:
    """Nothing listens on the port: wandb.init gives up after its timeout, and the run is recorded offline."""

    def run() -> list[str]:
        os.environ.pop("WANDB_MODE")
        os.environ.update(WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracking = Tracking(WandbLogger(init_timeout_s=2, close_timeout_s=20))
            tracking.start(info(tmp_path))
            tracking.log({"loss": 0.5}, 1)
            tracking.close("finished")
        return [str(w.message) for w in caught]

    ((message,),) = ranks(1, run)
    assert "could not be used" in message
    assert len(offline_runs(tmp_path)) == 1


# -- secrets --------------------------------------------------------------------------------------------------------------
CANARY = "c4n4ry-9f1e"


def test_no_logger_writes_the_environment_the_command_line_or_a_secret_option(ranks: Any, tmp_path: Path) -> None:
    config = {"api_key": CANARY, "nested": [{"hf_token": CANARY}], "db": f"postgres://me:{CANARY}@host/x", "object": _Telling()}

    def run() -> None:
        os.environ["MY_TOKEN"] = os.environ["WANDB_NOTHING"] = CANARY
        sys.argv = ["train.py", f"--token={CANARY}"]
        warnings.simplefilter("ignore")  # tensorboard imports what warns
        tracking = Tracking(["wandb", "tensorboard", "csv"])
        tracking.start(info(tmp_path, config={**config, "shown": "sh0wn-77"}))
        tracking.log({"loss": 0.5}, 1)
        tracking.close("finished")

    ranks(1, run)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path for path, data in written.items() if CANARY.encode() in data] == []
    assert any(b"sh0wn-77" in data for path, data in written.items() if path.suffix == ".wandb")
    assert any(b"sh0wn-77" in data for path, data in written.items() if "tfevents" in path.name)


class _Telling:
    def __repr__(self) -> str:
        return CANARY


def test_redaction_knows_secrets_from_tokens_of_text() -> None:
    config = {
        "token": "x",
        "HF_TOKEN": "x",
        "apiKey": "x",
        "api-key": "x",
        "wandb_api_key": 7,
        "password": "x",
        "client_secret": ["x"],
        "max_tokens": 5,
        "tokenizer": "bpe",
        "num_tokens": 3,
        "key": "C minor",
        "api_key_required": None,
        "lr": 0.1,
        "path": Path("a/b"),
        "url": "http://u:p@h/",
    }
    assert redacted(config) == {
        **dict.fromkeys(list(config)[:7], "<redacted>"),
        "max_tokens": 5,
        "tokenizer": "bpe",
        "num_tokens": 3,
        "key": "C minor",
        "api_key_required": None,
        "lr": 0.1,
        "path": "a/b",
        "url": "http://<redacted>@h/",
    }
