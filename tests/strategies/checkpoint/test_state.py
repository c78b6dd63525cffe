"""state.py: trees of tensors and plain values are taken apart and put together; anything else is refused with its place."""

from __future__ import annotations

import enum
import json
import math
import re
from collections import Counter, OrderedDict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drivetrain.strategies.checkpoint.state import check_tree, join, split
from drivetrain.strategies.errors import CheckpointError, ConfigError
from torch import nn


def round_trip(value: Any) -> Any:
    tensors, plain = split(value, "key")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return join(json.loads(json.dumps(plain, allow_nan=False)), copies)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**200),
        1.5,
        -0.0,
        5e-324,
        0.1 + 0.2,
        math.inf,
        -math.inf,
        "",
        "ünï\ud800\x00",
        [],
        (),
        (1, [2, (3,)]),
        {},
        {"a": {"b": [1]}},
        {1: "a", "1": "b", -3: None},
        {"$tuple": [1]},
        {"a": 1, "$x": 2},
        OrderedDict([("b", 1), (2, (3,))]),
        Counter({30: 1, 80: 2}),
        deque([1, 2], maxlen=5),
        deque([(1,)]),
    ],
)
def test_plain_values_come_back_with_their_type(value: Any) -> None:
    back = round_trip(value)
    assert type(back) is type(value)
    assert back == value
    assert repr(back) == repr(value)  # the order of dicts, -0.0, maxlen


def test_nan_survives() -> None:
    assert math.isnan(round_trip({"best": float("nan")})["best"])


def test_tensors_leave_under_names_that_say_where_they_were() -> None:
    tree = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}, "list": [torch.zeros(1)]}
    tensors, plain = split(tree, "optimizer/0")
    assert list(tensors) == ["optimizer/0/state/0/exp_avg", "optimizer/0/state/0/step", "optimizer/0/list/0"]
    assert json.dumps(plain)
    back = join(plain, tensors.__getitem__)
    assert torch.equal(back["state"][0]["exp_avg"], torch.ones(2))
    assert back["state"][0]["step"] == 3


def test_two_keys_with_one_spelling_keep_their_tensors_apart() -> None:
    back = round_trip({3: torch.tensor(1), "3": torch.tensor(2), "a/b": torch.tensor(3), "a": {"b": torch.tensor(4)}})
    assert [int(back[3]), int(back["3"]), int(back["a/b"]), int(back["a"]["b"])] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(0.1), np.int64(7), np.bool_(True), np.complex128(1 + 2j)])
def test_numpy_numbers_come_back_as_themselves(value: Any) -> None:
    back = round_trip({"v": value})["v"]
    assert type(back) is type(value)
    assert back == value


def test_numpy_arrays_come_back_as_themselves() -> None:
    for array in (np.arange(6).reshape(2, 3).T, np.zeros((0, 2), np.float16), np.array(3.0)):
        back = round_trip([array])[0]
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


class Color(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"state": {"fn": lambda: 0}}, "EMA.state['fn']: function"),
        ({"a": [1, {"b": math}]}, "EMA.a[1]['b']: module"),
        ({"a": Color.RED}, "EMA.a: "),
        ({"a": Point(1, 2)}, "EMA.a: "),
        ({"a": {1, 2}}, "EMA.a: set"),
        ({"a": b"x"}, "EMA.a: bytes"),
        ({"a": Path("x")}, "EMA.a: pathlib."),
        ({"a": nn.Linear(1, 1)}, "EMA.a: torch.nn.modules.linear.Linear"),
        ({"a": torch.float32}, "EMA.a: torch.dtype"),
        ({"a": torch.ones(1, device="meta")}, "EMA.a: a tensor that is on the meta device"),
        ({"a": np.array(["x"])}, "EMA.a: numpy.ndarray of <U1"),
        ({"a": {(1, 2): 3}}, "EMA.a: the key (1, 2) is tuple"),
        ({"a": {True: 3}}, "EMA.a: the key True is bool"),
        (print, "EMA: function"),
        ({"a": 1 + 2j}, "EMA.a: complex"),
    ],
)
def test_what_needs_code_to_come_back_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_tree(value, "EMA")


def test_a_tree_that_contains_itself_is_refused() -> None:
    tree: dict[str, Any] = {}
    tree["self"] = tree
    with pytest.raises(ConfigError, match="Does it contain itself"):
        split(tree, "loop")


@pytest.mark.parametrize(
    "plain", [{"$code": "x"}, {"$tuple": 3}, {"$tensor": "gone"}, {"$float": "1"}, {"$tuple": [], "b": 1}, {"$deque": []}]
)
def test_what_split_does_not_make_is_refused(plain: Any) -> None:
    with pytest.raises(CheckpointError, match="not well formed"):
        join(plain, {})


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 4]),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
)
def test_torchs_schedulers_and_optimizers_go_on_after_a_round_trip(make: Any) -> None:
    """Truth: the learning rates of the scheduler that was never saved."""

    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.1, amsgrad=True)
        return optimizer, make(optimizer)

    def advance(optimizer: torch.optim.Optimizer, scheduler: Any) -> Any:
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        return [optimizer.param_groups[0]["lr"], *optimizer.param_groups[0]["params"][0].tolist()]

    one, other = build(), build()
    for _ in range(3):
        advance(*one)
    other[0].load_state_dict(round_trip(one[0].state_dict()))
    other[1].load_state_dict(round_trip(one[1].state_dict()))
    with torch.no_grad():
        other[0].param_groups[0]["params"][0].copy_(one[0].param_groups[0]["params"][0])
    for _ in range(4):
        assert advance(*other) == advance(*one)
