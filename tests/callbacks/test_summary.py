"""The table and the start-up lines say what is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drivetrain.callbacks.summary import ModelSummary, startup_lines, summarize, table
from drivetrain.strategies.errors import ConfigError
from torch import nn
from torch.distributed.fsdp import FSDPModule


def model() -> nn.Module:
    whole = nn.Sequential()
    whole.body = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20, dtype=torch.bfloat16))
    whole.head = nn.Linear(20, 5, bias=False)
    whole.head.requires_grad_(False)
    whole.activation = nn.ReLU()
    return whole


def test_parameters_trainable_ones_and_bytes_are_counted() -> None:
    rows = {row.name: row for row in summarize(model())}
    assert list(rows) == ["body", "head", ""]  # what has no parameters is left out
    assert (rows["body"].parameters, rows["body"].trainable) == (220 + 420, 640)
    assert rows["body"].num_bytes == 220 * 4 + 420 * 2
    assert rows["body"].dtypes == ("bfloat16", "float32")
    assert (rows["head"].parameters, rows["head"].trainable) == (100, 0)
    assert (rows[""].parameters, rows[""].trainable) == (740, 640)


@pytest.mark.parametrize(("depth", "count"), [(0, 1), (1, 3), (2, 5), (-1, 5)])
def test_depth(depth: int, count: int) -> None:
    assert len(summarize(model(), max_depth=depth)) == count


def test_shared_and_lazy_parameters() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    tied["b"].weight = tied["a"].weight
    assert [row.parameters for row in summarize(tied)] == [16, 16, 16]
    rows = summarize(nn.ModuleDict({"lazy": nn.LazyLinear(3), "norm": nn.LayerNorm(3)}))
    assert [(row.parameters, row.lazy) for row in rows] == [(0, True), (6, False), (6, True)]
    assert "0 + lazy" in table(rows)


def test_a_module_in_pieces_has_the_name_of_its_class() -> None:
    in_pieces: Any = type("FSDPLinear", (FSDPModule, nn.Linear), {})  # what fully_shard makes of a Linear
    whole = nn.Sequential(nn.Linear(1, 1))
    whole[0].__class__ = in_pieces
    assert [row.type for row in summarize(whole)] == ["Linear", "Sequential"]


def test_the_table() -> None:
    assert table(summarize(model())) == (
        "module  type        parameters  trainable    size  precision\n"
        "body    Sequential         640        all  1.7 kB  bfloat16 float32\n"
        "head    Linear             100          0   400 B  float32\n"
        "total   Sequential         740        640  2.1 kB  bfloat16 float32"
    )


def test_only_rank_0_prints_it(view: Any) -> None:
    ModelSummary().on_fit_start(view, model())
    assert len(view.printed) == 1
    view.world = SimpleNamespace(is_main=False)
    ModelSummary().on_fit_start(view, model())
    assert len(view.printed) == 1
    with pytest.raises(ConfigError, match="max_depth=-2"):
        ModelSummary(-2)


def test_start_up_lines_are_columns_that_a_long_path_does_not_tear_apart() -> None:
    path = "runs/a/very/long/path/to/a/run/20261122-0001"
    assert startup_lines([("device", "cpu", "2 processes"), ("precision", "bf16-mixed", ""), ("run", path, "new run")]) == (
        f"device     cpu         2 processes\nprecision  bf16-mixed\nrun        {path}  new run"
    )
    assert startup_lines([]) == ""
