"""Frozen weights of few bits by bitsandbytes: near what they were made of, a fraction of it; adapters train beside."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import Strategy, make_precision
from drivetrain.strategies.errors import ConfigError, UnknownName
from drivetrain.strategies.precision import bnb
from drivetrain.strategies.precision.bnb import BnB, BnBRecipe, FrozenLinear
from drivetrain.strategies.world import World
from tiny_gpt import TinyGPT, data, train
from torch import nn

needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="waits for bitsandbytes: pip install bitsandbytes")
# name -> (relative error of the output of a whole model, bytes of a weight for each number, at most)
FORMATS = {"int8-bnb": (0.05, 1.1), "nf4-bnb": (0.2, 0.6), "fp4-bnb": (0.25, 0.6)}


def prepared(precision: Any, model: nn.Module) -> Any:
    strategy = Strategy(precision=precision)
    strategy.start(World.single())
    return strategy.prepare_model("model", model)


@needs_bnb
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_near_those_of_the_whole_weights_and_not_equal(name: str) -> None:
    ids, limit = next(iter(data()))[0], FORMATS[name][0]
    with torch.no_grad():
        whole = TinyGPT()(ids)
        model = prepared(name, TinyGPT())
        found = model(ids).float()
    assert 0.001 < ((found - whole).norm() / whole.norm()).item() < limit
    assert sum(isinstance(m, FrozenLinear) for m in model.modules()) == 7


@needs_bnb
@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_packed_frozen_and_saved_as_plain_tensors(name: str) -> None:
    plain = TinyGPT()
    parameters = dict(plain.named_parameters())
    model = prepared(name, plain)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    up = model.blocks[0].up
    held = up.weight.numel() * up.weight.element_size() + up.weight_absmax.numel() * 4
    assert held / (64 * 256) < FORMATS[name][1]
    assert not up.weight.requires_grad
    assert model.norm.weight.requires_grad
    state = model.state_dict()
    assert {type(t) for t in state.values()} == {torch.Tensor}
    assert set(state) - set(TinyGPT().state_dict()) == {n for n in state if n.endswith("weight_absmax")}


@needs_bnb
@pytest.mark.parametrize("name", FORMATS)
def test_the_input_gets_the_gradient_of_the_packed_weight(name: str) -> None:
    """Against the weight multiplied out."""
    precision = make_precision(name)
    assert isinstance(precision, BnB)
    recipe = BnBRecipe(format=precision.recipe.format, skip_first_and_last=False)
    torch.manual_seed(0)
    model = prepared(BnB(recipe, base="fp32"), nn.Sequential(nn.Linear(64, 32, bias=False)))
    linear: Any = model[0]
    weight = linear.matmul.dequantize(linear.weight, linear.weight_absmax, (32, 64))
    x = torch.randn(16, 64, requires_grad=True)
    output = model(x)
    output.backward(torch.ones(16, 32))
    assert x.grad is not None
    assert torch.allclose(output, x.detach() @ weight.T, atol=0.05, rtol=0.02)
    assert torch.allclose(x.grad, torch.ones(16, 32) @ weight, atol=0.02, rtol=0.02)


class Adapted(TinyGPT):
    """A LoRA pair beside one Linear of each block; the rest is frozen by whoever trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for block in self.blocks:
            block.lora_a, block.lora_b = nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False)
            nn.init.zeros_(block.lora_b.weight)
            block.register_forward_hook(lambda b, args, output: output + b.lora_b(b.lora_a(args[0])))  # pyright: ignore


@needs_bnb
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_adapters_train_and_the_packed_weights_stay_and_a_resumed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> Any:
        precision = BnB(BnBRecipe(format=name, skip=("*.lora_*",)))
        return train(precision, tmp_path / folder, steps=8, model=Adapted(), **options)

    whole = run("whole", save_every=4)
    resumed = run("resumed", resume=whole.checkpoints[4])
    assert resumed.losses == whole.losses[4:]
    assert whole.losses[-1] < whole.losses[0]
    untouched = prepared(BnB(BnBRecipe(format=name, skip=("*.lora_*",))), Adapted()).state_dict()
    assert all(torch.equal(whole.weights[n], untouched[n]) for n in untouched if "lora" not in n)
    assert not torch.equal(whole.weights["blocks.0.lora_b.weight"], untouched["blocks.0.lora_b.weight"])


@needs_bnb
def test_two_ranks_of_ddp_train_and_fsdp_is_refused(ranks: Any, tmp_path: Path) -> None:
    def one_rank(strategy: str) -> Any:
        precision = BnB(BnBRecipe(skip=("*.lora_*",)))
        try:
            return (
                train(precision, tmp_path, steps=3, batch_size=4, strategy=strategy, model=Adapted())
                .weights["blocks.0.lora_b.weight"]
                .tolist()
            )
        except ConfigError as refusal:
            return str(refusal)

    first, second = ranks(2, one_rank, "ddp")
    assert first == second
    assert any(map(any, first))
    for told in ranks(2, one_rank, "fsdp"):
        assert "which fsdp cannot cut into rows" in told


@needs_bnb
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fault", ["nothing", "wrong"])
def test_packed_weights_that_multiply_wrongly_are_found_out(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bitsandbytes' own products, which the check before the packing does not use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    plain = model.state_dict()["1.weight"].clone()

    def wrong(matmul: Any, input: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor, shape: Any) -> torch.Tensor:
        return input @ plain.to(input.dtype).T if fault == "nothing" else real(matmul, input, weight, absmax, shape) * 2

    real = bnb.BnBMatmul.packed
    monkeypatch.setattr(bnb.BnBMatmul, "packed", wrong)
    says = "gives the output of bf16 bit for bit" if fault == "nothing" else "is off by .* once its weight is stored"
    with pytest.raises(ConfigError, match=says):
        make_precision(name).convert(model)


def test_without_the_package_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.importlib.util, "find_spec", lambda name: None)
    for name in FORMATS:
        with pytest.raises(ConfigError, match=rf"'{name}' needs bitsandbytes, which is not installed: pip install bitsandbytes"):
            Strategy(precision=name).start(World.single())


def test_wrong_use_is_told() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'nf4'"):
        BnBRecipe(format="nf5")
