"""rng.py: after `restore` every generator gives the numbers that it would have given."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from drivetrain.strategies.checkpoint import rng
from drivetrain.strategies.errors import CheckpointError


def draw() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.normal()),
        torch.rand(3).tolist(),
        torch.nn.functional.dropout(torch.ones(20)).tolist(),
        torch.randperm(9).tolist(),
    ]


def test_all_generators_go_on_where_they_stood() -> None:
    """An odd number of normal draws leaves a spare one in python's and numpy's generators: it is part of the state."""
    draw()
    tensors, values = rng.capture()
    values = json.loads(json.dumps(values, allow_nan=False))
    expected = [draw(), draw()]
    draw()
    assert rng.restore(tensors, values) == []
    assert [draw(), draw()] == expected


def test_capturing_draws_nothing() -> None:
    tensors, values = rng.capture()
    expected = draw()
    rng.restore(tensors, values)
    rng.capture()
    assert draw() == expected


def test_numpy_is_not_imported_for_its_state() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from drivetrain.strategies.checkpoint import rng\n"
        "del sys.modules['numpy']; t, v = rng.capture(); assert v['numpy'] is None, v; rng.restore(t, v)\n"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_a_state_that_is_missing_or_wrong_is_an_error(name: str) -> None:
    """Silently going on with other numbers would be a run that is not the same."""
    tensors, values = rng.capture()
    broken = [({}, values) if name == "torch" else (tensors, {k: v for k, v in values.items() if k != name})]
    broken += [({**tensors, "rng/torch": torch.zeros(3, dtype=torch.uint8)}, values)] if name == "torch" else []
    broken += [(tensors, {**values, name: [3, [1, 2], None]})] if name == "python" else []
    broken += [(tensors, {**values, name: {"bit_generator": "PCG64", "state": {}}})] if name == "numpy" else []
    for some_tensors, some_values in broken:
        with pytest.raises(CheckpointError, match=f"random state of {name}"):
            rng.restore(some_tensors, some_values)
    rng.restore(tensors, values)


def test_another_device_is_a_word_not_an_error() -> None:
    tensors, values = rng.capture()
    here = values["device"] or "cpu"
    notes = rng.restore({**tensors, "rng/device": torch.zeros(16, dtype=torch.uint8)}, {**values, "device": "npu"})
    assert notes == [f"The random state of npu was not restored: this process runs on {here}."]
