"""Offloaded models under the Trainer, the Accelerator, hooks of a pipeline of models, and accelerators."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import (
    Accelerator,
    Trainer,
    TrainingModule,
    attach_layerwise_casting_hooks,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    remove_hook_from_submodules,
    save_torch_model,
    weights_of,
)
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.offload.strategy import OffloadStrategy
from offload_models import WHOLE, Net, empty
from torch import Tensor, nn


def test_a_chain_of_models_comes_and_goes_by_its_hooks(net: Net, words: Tensor) -> None:
    first, hook = cpu_offload_with_hook(net)
    second, other = cpu_offload_with_hook(Net().eval(), prev_module_hook=hook)
    assert torch.equal(first(words), net(words))
    second(words)
    hook.offload()
    for one in (hook, other):
        one.remove()
    assert "forward" not in first.__dict__


def test_layer_wise_casting_keeps_a_small_type_and_computes_in_a_large_one(words: Tensor) -> None:
    torch.manual_seed(0)
    model = Net().eval().requires_grad_(False)
    truth = Net().eval()
    truth.load_state_dict(model.state_dict())
    for module in truth.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            for p in module.parameters():
                p.data = p.data.to(torch.float8_e4m3fn).to(torch.float32)
    attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern="norm")
    assert model.layers[0].up.weight.dtype == torch.float8_e4m3fn  # pyright: ignore
    assert model.norm.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(words), truth(words))
    remove_hook_from_submodules(model)
    assert model.layers[0].up.weight.dtype == torch.float32  # pyright: ignore
    with pytest.raises(ConfigError, match="no Linear"):
        attach_layerwise_casting_hooks(nn.ReLU(), torch.float8_e4m3fn, torch.float32)


class Predicts(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = empty()

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.net(batch)


def test_a_trainer_predicts_with_a_model_on_the_disk(net: Net, words: Tensor, tmp_path: Path) -> None:
    wrapped = nn.Module()
    wrapped.net = net
    save_torch_model(wrapped, tmp_path / "weights")
    strategy = OffloadStrategy(tmp_path / "weights", max_memory={"cpu": "320KB"})
    trainer = Trainer(strategy=strategy, device="cpu", root=tmp_path, loggers=(), enable_progress_bar=False)
    got = trainer.predict(Predicts(), [words])
    assert got is not None
    assert torch.equal(got[0], net(words))


@pytest.mark.parametrize("precision", ["fp8-ao", "fp8-ao-rowwise", "mxfp8-ao", "int8-ao", "int8-weights-ao"])
def test_a_model_that_has_its_values_is_converted_and_then_offloaded(
    net: Net, words: Tensor, tmp_path: Path, precision: str
) -> None:
    """Outputs and gradients are those of the converted model in memory, bit for bit."""
    if find_spec("torchao") is None:
        pytest.skip("needs torchao: pip install torchao")
    found = []
    for strategy in ("single", OffloadStrategy(device_map=WHOLE, offload_dir=tmp_path)):
        accelerator = Accelerator(strategy=strategy, mixed_precision=precision)
        try:
            model = accelerator.prepare(copy.deepcopy(net).requires_grad_(False))
            soft = torch.zeros(1, 1, 64, requires_grad=True)
            x = model.embed(words) + soft
            for layer in model.layers:
                x = layer(x)
            found += [*torch.autograd.grad(model.norm(x).square().sum(), soft), model(words)]
        finally:
            accelerator.end_training()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[1], net(words))


@pytest.mark.parametrize(("precision", "says"), [("fp8-ao", "are not there"), ("bitnet-ao", "cannot pass through buffers")])
def test_conversions_that_need_what_is_away_are_refused(net: Net, folder: Path, precision: str, says: str) -> None:
    if find_spec("torchao") is None:
        pytest.skip("needs torchao: pip install torchao")
    accelerator = Accelerator(strategy=OffloadStrategy(folder, device_map=WHOLE), mixed_precision=precision)
    try:
        with pytest.raises(ConfigError, match=rf"precision='{precision}' converts .*{says}"):
            accelerator.prepare(empty() if says == "are not there" else net)
    finally:
        accelerator.end_training()


def test_accelerator_refuses_a_dispatched_model_by_name_unless_it_is_to_offload(net: Net, words: Tensor, folder: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    accelerator = Accelerator()
    try:
        with pytest.raises(ConfigError, match="strategy='offload'"):
            accelerator.prepare(model)
    finally:
        accelerator.end_training()
    accelerator = Accelerator(strategy="offload")
    try:
        assert torch.equal(accelerator.prepare(model)(words), net(words))
    finally:
        accelerator.end_training()


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", [WHOLE, {"": "cpu"}])
def test_on_an_accelerator_blocks_come_from_the_host_and_from_the_disk(
    net: Net, words: Tensor, folder: Path, device_map: dict[str, str], tmp_path: Path
) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    here = words.to(device)
    model = cpu_offload(net) if device_map == {"": "cpu"} else disk_offload(net, tmp_path)
    truth = Net().eval().to(device)
    load_checkpoint_in_model(truth, folder)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(here), truth(here))
    assert torch.accelerator.memory_allocated() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": 0, "layers.3": 1, "layers.4": "disk", "layers.1": "cpu"}])
def test_over_two_accelerators_the_host_and_the_disk(net: Net, words: Tensor, folder: Path, device_map: Any) -> None:
    """Each part computes where the map says; what is in the host or on the disk passes through the first one."""
    if torch.accelerator.device_count() < 2:
        pytest.skip(f"needs two accelerators: there is {torch.accelerator.device_count()}")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    limits: Any = None if isinstance(device_map, dict) else {0: "120KB", 1: "120KB", "cpu": "40KB"}
    model = load_checkpoint_and_dispatch(empty(), folder, device_map, limits)
    with torch.no_grad():
        truth = net(words)
        for _ in range(3):
            torch.testing.assert_close(model(words.to(kind.type + ":0")).cpu(), truth)
    assert set(weights_of(model).device_map.values()) >= {0, 1}
