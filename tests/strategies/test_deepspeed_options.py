"""What a DeepSpeedStrategy hands on to DeepSpeed gives the numbers of a plain PyTorch loop.

The JSON's optimizer, leaf modules for experts that not every rank uses, its own activation checkpointing, ZeRO++.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, DeepSpeedStrategy, DummyOptim
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn

deepspeed = library(torch.device("cpu"))

X = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(4))
CUT_UP = {"stage": 3, "stage3_param_persistence_threshold": 0}


class Routed(nn.Module):
    """A sample goes to the expert of its first number's sign: rows 0 and 2 to one, rows 1 and 3 to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():  # an expert that gets nothing is not called
                out = out.index_add(0, (chosen == i).nonzero()[:, 0], expert(x[chosen == i]))
        return out


class Net(nn.Module):
    """With `recompute`, the middle is run by DeepSpeed's own checkpoint function."""

    def __init__(self, *, routed: bool = False, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.middle = Routed() if routed else nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.last = nn.Linear(6, 2)
        self.routed, self.recompute = routed, recompute

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.routed:
            h = torch.cat([x[:, :1], h[:, 1:]], dim=1)
        h = deepspeed.checkpointing.checkpoint(self.middle, h) if self.recompute else self.middle(h)
        return self.last(h)


def batches(routed: bool) -> Tensor:
    """Where experts are chosen, so that with two ranks each step has ranks that choose differently."""
    x = X.clone()
    if routed:
        x[:, 0::2, 0], x[:, 1::2, 0] = 1.0, -1.0
    return x


def plain(net: Callable[[], nn.Module], optimizer: Callable[[Any], Any], routed: bool = False) -> dict[str, Tensor]:
    model = net()
    made = optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.5)
    for x in batches(routed):
        model(x).pow(2).mean().backward()
        made.step()
        made.zero_grad()
        scheduler.step()
    return model.state_dict()


def trained(net: Callable[[], nn.Module], optimizer: Callable[[Any], Any], routed: bool, options: dict[str, Any]) -> Any:
    accelerator = Accelerator(strategy=DeepSpeedStrategy(**options))
    model = net()
    made = optimizer(model.parameters())
    model, prepared, scheduler = accelerator.prepare(model, made, torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.5))
    for x in batches(routed):
        accelerator.backward(model(x[accelerator.process_index :: accelerator.num_processes]).pow(2).mean())
        prepared.step()
        prepared.zero_grad()
        scheduler.step()
    found = {n: t.flatten().tolist() for n, t in accelerator.get_state_dict(model).items()}
    accelerator.end_training()
    return found


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


def assert_same(found: dict[str, list[float]], truth: dict[str, Tensor]) -> None:
    for name, weight in truth.items():
        assert found[name] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-6), name


JSON = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-6, "torch_adam": True}}}


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_optimizer_of_the_json_is_filled_from_its_dummy(stage: int, ranks: Any) -> None:
    """And a scheduler over the dummy reaches it."""
    config = JSON | {"zero_optimization": {"stage": stage}}
    found = ranks(2, trained, Net, lambda p: DummyOptim(p, lr=1e-2, weight_decay=0.1), False, {"config": config})[0]
    assert_same(found, plain(Net, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-6)))


def with_a_dummy(options: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        trained(Net, lambda p: DummyOptim(p), False, options)
    return str(caught.value)


def test_a_dummy_without_a_section_or_a_stage_is_refused(ranks: Any) -> None:
    assert "has no section 'optimizer'" in ranks(1, with_a_dummy, {"stage": 2})[0]
    assert "DummyOptim and ZeRO stage 0" in ranks(1, with_a_dummy, {"stage": 0, "config": JSON})[0]


@pytest.mark.slow
def test_experts_that_not_every_rank_uses_are_gathered_as_a_whole(ranks: Any) -> None:
    """Each rank uses one of two: without moe_leaf_modules they would wait for each other's pieces for good."""
    options = CUT_UP | {"moe_leaf_modules": "Routed"}
    found = ranks(2, trained, lambda: Net(routed=True), sgd, True, options)[0]
    assert_same(found, plain(lambda: Net(routed=True), sgd, routed=True))


def misnamed() -> str:
    with pytest.raises(ConfigError) as caught:
        trained(Net, sgd, False, CUT_UP | {"moe_leaf_modules": "Experts"})
    return str(caught.value)


def test_a_leaf_module_that_the_model_has_not_is_named(ranks: Any) -> None:
    assert "the model has no 'Experts'. It has: Linear, Net, Sequential, Tanh" in ranks(1, misnamed)[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_its_own_activation_checkpointing_gives_the_same_gradients(stage: int, ranks: Any) -> None:
    options = {"stage": stage, "config": {"activation_checkpointing": {"partition_activations": False}}}
    found = ranks(2, trained, lambda: Net(recompute=True), sgd, False, options)[0]
    assert_same(found, plain(Net, sgd))


@pytest.mark.slow
def test_zero_plus_plus_keeps_a_second_copy_within_the_node(ranks: Any) -> None:
    found = ranks(2, trained, Net, sgd, False, CUT_UP | {"zero_hpz_partition_size": 2})[0]
    assert_same(found, plain(Net, sgd))


def quantized(key: str) -> str:
    with pytest.raises(ConfigError) as caught:
        trained(Net, sgd, False, CUT_UP | {key: True})
    return str(caught.value)


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_zero_plus_plus_in_8_bits_is_refused_where_its_kernels_cannot_be(key: str, ranks: Any) -> None:
    said = ranks(1, quantized, key)[0]
    assert f"{key}: DeepSpeed has no kernels for it on cpu" in said


@pytest.mark.slow
def test_zero_plus_plus_in_pairs_of_four_processes(ranks: Any) -> None:
    """The primary pieces are quarters, the second copies halves, gathered within a pair."""
    found = ranks(4, trained, Net, sgd, False, CUT_UP | {"zero_hpz_partition_size": 2}, timeout=120)[0]
    assert_same(found, plain(Net, sgd))


def halves(stage: int) -> tuple[dict[str, list[float]], str]:
    accelerator = Accelerator(strategy=DeepSpeedStrategy(stage=stage), precision="fp16-mixed")
    model = Net()
    model, optimizer = accelerator.prepare(model, sgd(model.parameters()))
    for x in batches(False):
        accelerator.backward(model(x[accelerator.process_index :: accelerator.num_processes]).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(accelerator.strategy.explain()).get("weights", "")
    found = {n: t.flatten().tolist() for n, t in accelerator.get_state_dict(model).items()}
    accelerator.end_training()
    return found, weights


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_fp16_on_a_cpu_is_autocast_over_fp32_weights_and_says_so(stage: int, ranks: Any) -> None:
    """DeepSpeed has fp16 weights on a CPU only where oneDNN has (AVX512-FP16); the loss scale is ours either way."""
    found, weights = ranks(2, halves, stage)[0]
    model = Net()
    optimizer = sgd(model.parameters())
    for x in batches(False):
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.state_dict().items():
        assert found[name] == pytest.approx(weight.flatten().tolist(), abs=2e-3), name
    assert found != {n: t.flatten().tolist() for n, t in model.state_dict().items()}
    supported = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    words = "fp16, with fp32 masters" if supported else "fp32, under autocast   chosen: DeepSpeed has no fp16 on cpu"
    assert weights.startswith(words)


MISSPELT: dict[str, tuple[dict[str, Any], str]] = {
    "a section": ({"zero_optimisation": {"stage": 3}}, "Did you mean 'zero_optimization'"),
    "a key of ZeRO": ({"zero_optimization": {"stage": 3, "reduce_bucket_sise": 5}}, "Did you mean 'reduce_bucket_size'"),
    "a key of offload": ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "Did you mean 'device'"),
    "a precision that would be off": ({"bf16": {}, "fp16": {"enable": True}}, "fp16 of the DeepSpeed JSON has no 'enabled'"),
    "a place without a section": ({"zero_optimization": {"offload_optimizer": "cpu"}}, "write {'device': 'cpu'}"),
    "a section that is a word": ({"optimizer": "AdamW"}, "optimizer of the DeepSpeed JSON is 'AdamW', and must be an object"),
}


@pytest.mark.parametrize("case", list(MISSPELT))
def test_a_key_that_deepspeed_would_ignore_is_refused(case: str) -> None:
    """It would run as stage 0 without a word; keys that begin with "_" are notes."""
    config, words = MISSPELT[case]
    with pytest.raises(ConfigError, match=words):
        DeepSpeedStrategy(config=config)
    assert DeepSpeedStrategy(config={"_note": "ours", "zero_optimization": {"stage": 1, "offload_param": "auto"}}).stage == 1


def test_a_section_that_would_shard_in_its_own_way_is_refused(ranks: Any) -> None:
    def said() -> str:
        with pytest.raises(ConfigError) as caught:
            trained(Net, sgd, False, {"config": {"tensor_parallel": {"autotp_size": 2}}})
        return str(caught.value)

    assert "the section 'tensor_parallel', which is not DeepSpeed's to do here (Say strategy='fsdp:2+tp:2'" in ranks(1, said)[0]


def refusals() -> list[str]:
    found = []
    for options, optimizer in (
        ({"stage": 3, "activation_checkpointing": "selective"}, sgd),
        ({"stage": 1}, lambda parameters: torch.optim.Adagrad(parameters, lr=0.1)),
    ):
        with pytest.raises(ConfigError) as caught:
            trained(Net, optimizer, False, options)
        found.append(str(caught.value))
    return found


def test_what_would_fail_deep_inside_is_refused_before(ranks: Any) -> None:
    """A resumed run met the first in its first backward pass, from inside torch; the second could never be prepared."""
    selective, adagrad = ranks(1, refusals)[0]
    assert selective.startswith("activation_checkpointing='selective' finds what it kept by the order of a block's operators")
    assert adagrad.startswith("Adagrad makes its state when it is built")


def grouped(model: nn.Module) -> Any:
    frozen = list(model.get_submodule("middle").requires_grad_(False).parameters())
    first, last = model.get_submodule("first").parameters(), model.get_submodule("last").parameters()
    groups: list[dict[str, Any]] = [
        {"params": [*first], "lr": 0.05},
        {"params": frozen},
        {"params": [*last], "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def in_groups(stage: int) -> dict[str, list[float]]:
    accelerator = Accelerator(strategy=DeepSpeedStrategy(stage=stage))
    model = Net()
    model, optimizer = accelerator.prepare(model, grouped(model))
    for x in batches(False):
        accelerator.backward(model(x[accelerator.process_index :: accelerator.num_processes]).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    found = {n: t.flatten().tolist() for n, t in accelerator.get_state_dict(model).items()}
    accelerator.end_training()
    return found


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 3))])
def test_a_group_that_is_frozen_as_a_whole_stands_between_others(stage: int, ranks: Any) -> None:
    model = Net()
    optimizer = grouped(model)
    for x in batches(False):
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(ranks(2, in_groups, stage)[0], model.state_dict())
