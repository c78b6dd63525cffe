"""The recipes of torchao's backends: their knobs, what they refuse, and what they leave alone."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import Strategy, make_precision
from drivetrain.strategies.errors import ConfigError, MissingDependency, UnknownName
from drivetrain.strategies.precision import _torchao
from drivetrain.strategies.precision.float8_ao import Float8AO, Float8Recipe
from drivetrain.strategies.precision.linears import LowPrecisionLinear
from drivetrain.strategies.precision.mx_ao import MXFP8AO, MXFP8Recipe
from drivetrain.strategies.precision.quantized import Int8AO, Int8Recipe, Int8WeightsAO, Int8WeightsRecipe
from drivetrain.strategies.world import World
from torch import nn

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")
CPU = torch.device("cpu")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32))


def prepared(precision: Any, model: nn.Module | None = None) -> Any:
    strategy = Strategy(precision=precision)
    strategy.start(World.single())
    return strategy.prepare_model("model", model or net())


def test_the_names_stand_for_the_recipes() -> None:
    found = {n: make_precision(n) for n in ("fp8", "fp8-ao", "fp8-ao-rowwise", "fp8-ao-rowwise-gw-hp")}
    assert {n: (p.name, p.recipe.scaling) for n, p in found.items() if isinstance(p, Float8AO)} == {
        "fp8": ("fp8-ao", "tensorwise"),
        "fp8-ao": ("fp8-ao", "tensorwise"),
        "fp8-ao-rowwise": ("fp8-ao-rowwise", "rowwise"),
        "fp8-ao-rowwise-gw-hp": ("fp8-ao-rowwise-gw-hp", "rowwise_with_gw_hp"),
    }


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Float8Recipe("rowise"), "Did you mean 'rowwise'"),
        (lambda: MXFP8Recipe(scale_rounding="flor"), "Did you mean 'floor'"),
        (lambda: MXFP8Recipe(weight_gradient="fp8"), "Known: mxfp8, high"),
    ],
)
def test_a_misspelt_recipe_is_refused(make: Any, told: str) -> None:
    with pytest.raises(UnknownName, match=told):
        make()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Float8Recipe().scaling = "rowwise"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_emulated_float8_agrees_with_that_of_the_processor(scaling: str) -> None:
    """Both round to the same 256 numbers; sums are taken in another order, and their results rounded to bf16."""
    x = torch.randn(48, 64, dtype=torch.bfloat16)
    outputs = [
        prepared(Float8AO(Float8Recipe(scaling, emulate=emulate, skip_first_and_last=False)))(x) for emulate in (False, True)
    ]
    assert torch.allclose(outputs[0].float(), outputs[1].float(), rtol=0.05, atol=0.02)


def test_a_base_of_bf16_true_holds_the_weights_in_bf16() -> None:
    model = prepared(Float8AO(base="bf16-true"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(4, 64)).dtype == torch.bfloat16


def test_a_base_of_fp32_leaves_the_rest_in_fp32() -> None:
    precision = Float8AO(base="fp32")
    assert (precision.autocast_dtype, precision.param_dtype) == (None, None)
    assert prepared(precision)(torch.randn(4, 64)).dtype == torch.float32


def test_the_weight_gradient_in_high_precision_is_that_of_bf16() -> None:
    """rowwise_with_gw_hp: only the last of the three products is not rounded."""
    model = prepared(Float8AO(Float8Recipe("rowwise_with_gw_hp", skip_first_and_last=False)), nn.Sequential(nn.Linear(32, 32)))
    x, grad = torch.randn(16, 32, dtype=torch.bfloat16), torch.randn(16, 32, dtype=torch.bfloat16)
    model(x).backward(grad)
    assert torch.equal(model[0].weight.grad, (grad.T @ x).float())


@pytest.mark.parametrize("product", ["output", "grad_input", "grad_weight"])
def test_each_of_the_three_int8_products_can_be_had_alone(product: str) -> None:
    """The other two are bf16's, bit for bit."""
    recipe = Int8Recipe(output=product == "output", grad_input=product == "grad_input", grad_weight=product == "grad_weight")
    model = prepared(Int8AO(recipe))
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(16, 64, dtype=torch.bfloat16)
    output = model[1](x)
    output.backward(grad)
    weight = model[1].weight.detach().bfloat16()
    bf16 = {
        "output": F.linear(x, weight) + model[1].bias.bfloat16(),
        "grad_input": grad @ weight,
        "grad_weight": (grad.T @ x).float(),
    }
    found = {"output": output, "grad_input": x.grad, "grad_weight": model[1].weight.grad}
    assert {n for n in found if not torch.equal(found[n], bf16[n])} == {product}


def test_no_int8_product_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves all three products in high precision"):
        Int8AO(Int8Recipe(output=False, grad_input=False, grad_weight=False))


def test_mx_needs_multiples_of_32() -> None:
    precision = MXFP8AO(MXFP8Recipe(skip_first_and_last=False))
    prepared(precision, nn.Sequential(nn.Linear(64, 48), nn.Linear(32, 64)))
    assert precision.reports[0].skipped == {"0": "64x48, not multiples of 32"}
    assert precision.explain().endswith("emulated, no faster than bf16")


# -- int8 weights ---------------------------------------------------------------------------------------------------------


def test_int8_weights_are_a_quarter_and_the_parameters_stay_the_same_objects() -> None:
    model = net()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared("int8-weights-ao", model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    state = model.state_dict()
    assert state["1.weight.int8"].dtype == torch.int8
    assert state["1.weight.scale"].shape == (64,)
    assert state["0.weight"].dtype == torch.float32  # the first: left alone
    before = state["1.weight.int8"].clone()
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(state["1.weight.int8"], before)


def test_weight_decay_multiplies_the_scales_exactly() -> None:
    model = prepared("int8-weights-ao")
    weight: Any = model[1].weight
    values, scale = weight.int_data.clone(), weight.scale.clone()
    with torch.no_grad():
        weight.mul_(0.5)
    assert torch.equal(weight.int_data, values)
    assert torch.equal(weight.scale, scale * 0.5)


def test_small_updates_of_int8_weights_are_right_on_average() -> None:
    """Rounded to the nearest, a step of a tenth of the grid would change nothing, ever."""
    model = prepared("int8-weights-ao", nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)]))
    weight: Any = model[1].weight
    start, step = weight.dequantize().clone(), 0.1 * weight.scale.mean().item()
    moves = []
    for seed in range(40):
        torch.manual_seed(seed)
        with torch.no_grad():
            weight.copy_(start)
            weight.add_(torch.full((64, 64), step))
        moves.append((weight.dequantize() - start).mean().item())
    assert sum(moves) / 40 == pytest.approx(step, rel=0.05)


def test_an_optimizer_that_cannot_step_int8_weights_is_refused_by_name() -> None:
    precision = Int8WeightsAO()
    model = prepared(precision)
    model(torch.randn(4, 64)).sum().backward()
    with pytest.raises(ConfigError, match=r"AdamW does with its weights what int8 ones cannot.*without fused=True"):
        precision.step(torch.optim.AdamW(model.parameters(), fused=True))


def test_a_tied_weight_cannot_become_int8() -> None:
    model = net()
    model.add_module("tokens", nn.Embedding(64, 64))
    model[2].weight = model.tokens.weight  # pyright: ignore
    with pytest.raises(ConfigError, match=r"the weight of 2 is also that of tokens.*skip=\('2',\)"):
        prepared("int8-weights-ao", model)
    tied = Int8WeightsAO(Int8WeightsRecipe(skip=("2",)))
    model = net()
    model.add_module("tokens", nn.Embedding(64, 64))
    model[2].weight = model.tokens.weight  # pyright: ignore
    prepared(tied, model)
    assert isinstance(model[1], LowPrecisionLinear)


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_without_torchao_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torchao.importlib.util, "find_spec", lambda name: None)
    for name in ("fp8-ao", "mxfp8-ao", "int8-ao", "int8-weights-ao", "bitnet-ao"):
        reason = make_precision(name).available(CPU)
        assert reason == f"precision={name!r} needs torchao, which is not installed: pip install 'drivetrain[ao]'."


def test_a_torchao_without_what_is_needed_is_told_by_its_version() -> None:
    with pytest.raises(MissingDependency, match=r"fp8 needs torchao.no_such_part, which the installed torchao 0\.\d+"):
        _torchao.load("no_such_part", wanted_by="fp8")


def test_other_devices_are_refused_with_the_nearest_that_works() -> None:
    mps = torch.device("mps")
    assert "Use precision='bf16-mixed'" in (Float8AO().available(mps) or "")
    assert "torchao has it for CPU and CUDA" in (Int8AO().available(mps) or "")
    assert "needs CUDA compute capability 10.0" not in (MXFP8AO().available(CPU) or "")
    assert "compute capability 10.0" in (MXFP8AO(MXFP8Recipe(emulate=False)).available(CPU) or "")


def test_nvfp4_is_refused_with_what_is_nearest() -> None:
    with pytest.raises(ConfigError, match=r"nvfp4-ao.*Use precision='mxfp8-ao'"):
        Strategy(precision="nvfp4-ao").start(World.single())


@pytest.mark.parametrize(
    ("found", "scaling", "works"),
    [((8, 0), "tensorwise", False), ((8, 9), "tensorwise", True), ((8, 9), "rowwise", False), ((9, 0), "rowwise", True)],
)
def test_older_gpus_are_refused_by_their_compute_capability(
    found: tuple[int, int], scaling: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    reason = Float8AO(scaling).available(torch.device("cuda"))
    assert (reason is None) == works
    if reason:
        assert f"a GPU has {found[0]}.{found[1]}. Use precision='bf16-mixed'" in reason


def test_importing_torchao_says_nothing_and_leaves_logging_as_it_was() -> None:
    code = (
        "import logging, warnings; warnings.simplefilter('error')\n"
        "from drivetrain.strategies.precision import _torchao\n"
        "_torchao.load('float8', wanted_by='x'); _torchao.load('prototype.moe_training.mxfp8_linear', wanted_by='x')\n"
        "assert logging.root.manager.disable == logging.NOTSET"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert logging.root.manager.disable == logging.NOTSET
