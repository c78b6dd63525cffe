"""Numerics: hand-computed numbers, stable names, nothing hooked between measured steps, the same on one and two ranks."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.callbacks.numerics import Numerics
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.precision.formats import MEASURED, NumberFormat, measure
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "strategies" / "precision"))
from tiny_gpt import TinyGPT, train  # pyright: ignore[reportMissingImports]

needs_ao = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")
E4M3 = torch.float8_e4m3fn  # largest 448, smallest normal 2^-6, smallest 2^-9


def found(values: list[float] | list[list[float]], form: NumberFormat) -> dict[str, float]:
    return dict(zip(MEASURED, measure(torch.tensor(values), form).tolist(), strict=True))


def test_float8_with_one_scale() -> None:
    """448/7 = 64. Times 64: 448, 0.0064 (below 2^-6: subnormal), 0.00064 (below half of 2^-9: becomes 0), and a real 0."""
    assert found([7.0, 1e-4, -1e-5, 0.0], NumberFormat(E4M3, "tensor")) == {
        "amax": 7.0,
        "scale": 64.0,
        "underflow": 0.25,
        "subnormal": 0.25,
        "overflow": 0.0,
    }


def test_a_scale_that_is_a_power_of_two_is_rounded_down() -> None:
    """448/5 = 89.6 -> 64."""
    assert found([5.0], NumberFormat(E4M3, "tensor", power_of_2=True))["scale"] == 64.0


def test_rows_and_blocks_have_scales_of_their_own() -> None:
    """The small row is lost beside the large one, and kept by a scale of its own."""
    values = [[448.0, 1.0], [2e-3, 2e-3]]
    assert found(values, NumberFormat(E4M3, "tensor"))["subnormal"] == 0.5  # rounded to 2^-9 or more
    assert found(values, NumberFormat(E4M3, "row"))["subnormal"] == 0.0
    assert found(values, NumberFormat(E4M3, "row"))["scale"] == 1.0  # that of the largest values
    row = [[448.0, 448.0, 1e-4, 1e-4]]
    assert found(row, NumberFormat(E4M3, "row"))["underflow"] == 0.5
    assert found(row, NumberFormat(E4M3, 2))["underflow"] == 0.0
    assert found([[448.0, 448.0, 1e-4]], NumberFormat(E4M3, 2))["underflow"] == 0.0  # a block that is filled up


def test_the_mx_standards_scale_follows_the_exponent_and_may_saturate() -> None:
    """500 has the exponent 8, as the largest of e4m3: scale 1, and 500 > 448."""
    assert found([500.0, 1.0], NumberFormat(E4M3, 2, power_of_2=True, by_exponent=True))["overflow"] == 0.5
    assert found([500.0, 1.0], NumberFormat(E4M3, 2, power_of_2=True))["scale"] == 0.5


def test_int8_loses_what_is_below_half_of_a_step() -> None:
    """127 steps for 12.7: steps of 0.1. 0.04 is rounded to 0, 0.06 to one step."""
    assert found([12.7, 0.04, 0.06, 0.0], NumberFormat(torch.int8, "row")) == pytest.approx(
        {"amax": 12.7, "scale": 10.0, "underflow": 0.25, "subnormal": 0.0, "overflow": 0.0}
    )


def test_unscaled_formats_overflow_and_underflow() -> None:
    """fp16 ends at 65504 and 6e-8, bf16 at neither."""
    values = [1e5, 1e-8, 1e-5, 1.0, float("inf")]
    assert found(values, NumberFormat(torch.float16)) == {
        "amax": float("inf"),
        "scale": 1.0,
        "underflow": 0.2,
        "subnormal": 0.2,
        "overflow": 0.4,
    }
    assert found(values, NumberFormat(torch.bfloat16))["overflow"] == 0.2
    assert found(values[:4], NumberFormat(torch.bfloat16))["underflow"] == 0.0


class Seen(Numerics):
    """Keeps what was logged, by step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logged: dict[int, dict[str, float]] = {}
        self.hooked: list[int] = []

    def log_point(self, trainer: Any, metrics: dict[str, float], step: int) -> None:
        super().log_point(trainer, metrics, step)
        self.logged[step] = {n: v for n, v in metrics.items() if n.startswith("numerics/")}

    def on_before_backward(self, trainer: Any, module: nn.Module, loss: Any) -> None:
        self.hooked.append(
            sum(len(m._forward_hooks) + len(m._backward_pre_hooks) for m in module.modules() if isinstance(m, nn.Linear))
        )


@needs_ao
def test_names_are_stable_and_only_measured_steps_are_hooked(tmp_path: Path) -> None:
    seen = Seen()
    train("fp8-ao", tmp_path, steps=4, log_every=2, callbacks=[seen])
    assert [bool(n) for n in seen.hooked] == [False, True, False, True]
    assert seen.hooked[1] == 2 * 7
    assert sorted(step for step, values in seen.logged.items() if values) == [2, 4]
    names = {f"blocks.{i}.{n}" for i in (0, 1) for n in ("qkv", "out", "up", "down")} - {"blocks.0.qkv"}
    kinds = ("input", "weight", "grad")
    assert set(seen.logged[2]) == {f"numerics/{n}/{k}/{w}" for n in names for k in kinds for w in MEASURED}
    values = seen.logged[4]
    for name in names:
        amax, scale = (values[f"numerics/{name}/weight/{w}"] for w in ("amax", "scale"))
        assert scale == pytest.approx(448 / amax, rel=1e-6)
        amax, scale = (values[f"numerics/{name}/grad/{w}"] for w in ("amax", "scale"))
        assert scale == pytest.approx(57344 / amax, rel=1e-6)  # e5m2
        assert values[f"numerics/{name}/input/overflow"] == 0.0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16), ("fp32", None)])
def test_the_numbers_are_those_of_the_tensors_of_the_step(precision: str, dtype: Any, tmp_path: Path) -> None:
    """Weights before the step, in the format of autocast, or their own."""
    seen, before = Seen(1, layers=("head",)), TinyGPT()
    train(precision, tmp_path, steps=1, log_every=1, callbacks=[seen])
    expected = measure(before.head.weight, NumberFormat(dtype or torch.float32)).tolist()
    assert [seen.logged[1][f"numerics/head/weight/{w}"] for w in MEASURED] == expected
    assert seen.logged[1]["numerics/head/grad/amax"] > 0


@needs_ao
@pytest.mark.parametrize("precision", ["fp8-ao-rowwise", "mxfp8-ao", "int8-ao", "int8-weights-ao", "bitnet-ao"])
def test_every_backend_has_numbers(precision: str, tmp_path: Path) -> None:
    seen = Seen(1)
    train(precision, tmp_path, steps=1, log_every=1, callbacks=[seen])
    values = seen.logged[1]
    assert len(values) == 7 * 3 * len(MEASURED)
    assert all(0 <= v <= 1 for n, v in values.items() if n.rsplit("/", 1)[1] in ("underflow", "subnormal", "overflow"))
    # Weights that are int8 already lose nothing any more, and bf16 next to nothing.
    assert any(v > 0 for n, v in values.items() if n.endswith(("underflow", "subnormal"))) == (precision != "int8-weights-ao")


def test_float8_can_be_tried_on_a_run_in_bf16(tmp_path: Path) -> None:
    seen = Seen(1, layers=("blocks.1.*",), format=NumberFormat(E4M3, "tensor"))
    train("bf16-mixed", tmp_path, steps=1, log_every=1, callbacks=[seen])
    values = seen.logged[1]
    assert values["numerics/blocks.1.up/input/scale"] == pytest.approx(448 / values["numerics/blocks.1.up/input/amax"], rel=1e-3)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch's own, of any module whose step returns a view
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_agree_and_take_the_largest(strategy: str, ranks: Any, tmp_path: Path) -> None:
    """The weights' numbers are those of one process: the whole weight, also under fsdp. Inputs: the largest of both halves."""
    one = Seen(1, layers=("blocks.*.up",))
    train("bf16-mixed", tmp_path / "one", steps=1, log_every=1, callbacks=[one])

    def one_rank() -> tuple[dict[str, float], float]:
        seen = Seen(1, layers=("blocks.*.up",))
        train("bf16-mixed", tmp_path / "two", steps=1, batch_size=4, strategy=strategy, log_every=1, callbacks=[seen])
        return seen.logged[1], float(seen.measured["blocks.0.up/input"][0])

    (first, mine), (second, other) = ranks(2, one_rank)
    assert first == second
    assert first["numerics/blocks.0.up/input/amax"] == max(mine, other) == one.logged[1]["numerics/blocks.0.up/input/amax"]
    weights = [n for n in first if "/weight/" in n]
    assert [first[n] for n in weights] == [one.logged[1][n] for n in weights]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Numerics(0), "expected a whole number of at least 1"),
        (lambda: Numerics(7), "Use a multiple of log_every_n_steps=5"),
        (lambda: Numerics(layers=("heads",)), "meets no layer with a weight"),
    ],
)
def test_wrong_use_is_told(make: Any, told: str, view: Any) -> None:
    view.log_every_n_steps = 5
    with pytest.raises(ConfigError, match=told):
        make().on_fit_start(view, TinyGPT())
