"""Device maps: limits are kept, tied weights count once, what is small stays, and what passes is spread."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from drivetrain import get_balanced_memory, infer_auto_device_map, infer_device_map, init_empty_weights
from drivetrain.strategies import placement
from drivetrain.strategies.errors import ConfigError, UnknownName
from drivetrain.strategies.offload.sizes import compute_module_sizes, find_tied_parameters, measure_activations
from torch import Tensor, nn

BLOCK = 4 * (64 * 64 + 64)
EMBED = 4 * 10 * 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList(Block() for _ in range(8))
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def net() -> Net:
    with init_empty_weights():
        return Net()


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are four accelerators: placing asks for their number and their kind only."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))


def resident(net: nn.Module, device_map: dict[str, Any], place: Any) -> int:
    """Bytes that a map puts on `place`, tied weights once."""
    tensors = {id(t): t for n, t in net.named_parameters() if placement.place_of(n, device_map) == place}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_sizes_count_a_tied_weight_once_and_in_the_type_that_is_asked_for(net: Net) -> None:
    sizes = compute_module_sizes(net)
    assert (sizes[""], sizes["layers"], sizes["layers.3"], sizes["head"]) == (EMBED + 8 * BLOCK, 8 * BLOCK, BLOCK, EMBED)
    assert compute_module_sizes(net, dtype="bfloat16")[""] == sizes[""] // 2
    assert find_tied_parameters(net) == [["embed.weight", "head.weight"]]


def test_what_fits_is_one_entry(net: Net) -> None:
    assert infer_auto_device_map(net, {"cpu": "1MB"}) == {"": "cpu"}
    assert infer_device_map is infer_auto_device_map


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
def test_as_many_blocks_stay_as_fit_beside_the_buffers_evenly_spread(net: Net, kept: int) -> None:
    buffers = 2 * (BLOCK + 2**14)
    limit = EMBED + buffers + kept * BLOCK + 5
    found = infer_auto_device_map(net, {"cpu": limit})
    stays = [i for i in range(8) if placement.place_of(f"layers.{i}", found) == "cpu"]
    assert len(stays) == kept
    assert found["embed"] == found["head"] == "cpu"
    assert resident(net, found, "cpu") + buffers <= limit
    gaps = [b - a for a, b in itertools.pairwise(stays)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_room_for_activations_is_left(net: Net) -> None:
    limit = EMBED + 2 * (BLOCK + 2**14) + 3 * BLOCK
    less = infer_auto_device_map(net, {"cpu": limit}, activations=2 * BLOCK)
    assert resident(net, less, "cpu") == EMBED + BLOCK


def test_activations_are_counted_without_computing(net: Net) -> None:
    """The embedding's and the head's output, and what one block makes: its product."""
    words = torch.zeros(2, 5, dtype=torch.long)
    needed = measure_activations(net, words)
    assert needed >= 4 * (10 * 64 + 10 * 64 + 10 * 10)
    assert needed <= 4 * (10 * 64 * 3 + 10 * 10 * 2)


def test_too_small_a_limit_says_what_it_lacks(net: Net) -> None:
    with pytest.raises(ConfigError, match=r"the buffers alone take .*prefetch=False"):
        infer_auto_device_map(net, {"cpu": 2 * BLOCK})
    with pytest.raises(ConfigError, match=r"does not fit: .* the disk included"):
        infer_auto_device_map(net, {"cpu": EMBED + 2 * (BLOCK + 2**14), "disk": BLOCK})


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"cpu": 0, "disk": "1GB"}, "gives 'cpu' 0 bytes for the weights, and the buffers alone take"),
        ({"disk": "1GB"}, "gives 'cpu' 0 bytes for the weights, and the buffers alone take"),
        ({"cpu": "lots"}, r"max_memory\['cpu'\] is 'lots': expected a size such as '10GB'"),
        ({"cpu": -1}, r"max_memory\['cpu'\] is -1: expected a size"),
        ({"CPU": "1GB"}, "no device 'CPU' here.*Did you mean 'cpu'"),
        ({True: "1GB"}, "True is no place"),
        ("1GB", "max_memory='1GB': expected a mapping"),
    ],
)
def test_limits_that_cannot_be_meant_are_told_by_their_name(net: Net, limits: Any, says: str) -> None:
    net.register_buffer("scale", torch.ones(1))  # which was named in the place of the buffers that do not fit
    with pytest.raises(ConfigError, match=says):
        infer_auto_device_map(net, limits)


@pytest.mark.parametrize(("device_map", "says"), [({"": None}, "None is no place"), (5, "device_map=5: expected auto, ")])
def test_maps_that_are_none_are_told_so(net: Net, device_map: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        placement.make_device_map(net, device_map)
    with pytest.raises(ConfigError, match="activations is 'many': expected a size"):
        infer_auto_device_map(net, {"cpu": BLOCK}, activations="many")


def test_accelerators_are_filled_in_order_then_the_host_then_the_disk(net: Net, four: None) -> None:
    limits = {0: EMBED + 2 * (BLOCK + 2**14) + 2 * BLOCK + 9, 1: 2 * BLOCK + 9, "cpu": 2 * BLOCK + 9}
    found = infer_auto_device_map(net, limits)
    places = [placement.place_of(f"layers.{i}", found) for i in range(8)]
    assert places == [0, 0, 1, 1, "cpu", "cpu", "disk", "disk"]
    assert (found["embed"], found["head"]) == (0, 0)


def test_balanced_shares_evenly_and_low_zero_spares_the_first(net: Net, four: None) -> None:
    limits: dict[Any, Any] = dict.fromkeys(range(4), "10MB")
    found = placement.make_device_map(net, "balanced", limits)
    counts = [sum(placement.place_of(f"layers.{i}", found) == device for i in range(8)) for device in range(4)]
    assert counts == [2, 2, 2, 2]
    spared = get_balanced_memory(net, limits, low_zero=True)
    assert spared[0] < spared[1]
    sequential = placement.make_device_map(net, "sequential", limits)
    assert sequential == {"": 0}


def test_what_is_tied_lies_in_one_place(net: Net, four: None) -> None:
    found = infer_auto_device_map(net, {0: EMBED + 4 * BLOCK + 9, 1: EMBED + 5 * BLOCK})
    assert found["head"] == found["embed"] == 0


@pytest.mark.parametrize(
    ("device_map", "told"),
    [
        ({"embed": "cpu"}, r"says nothing of layers\.0\.linear\.weight"),
        ({"": "cpu", "layer": "disk"}, "'layer', which Net has not. Did you mean 'layers'"),
        ("automatic", "Did you mean 'auto'"),
        ({"": "cuda:7"}, "no device 'cuda:7' here"),
        ({"": 3}, "no accelerator 3"),
    ],
)
def test_a_map_that_fits_neither_model_nor_machine_is_refused(net: Net, device_map: Any, told: str) -> None:
    if torch.accelerator.is_available() and "cuda" in told:
        pytest.skip("this machine has accelerators")
    with pytest.raises(ConfigError, match=told):
        placement.make_device_map(net, device_map)


def test_classes_that_are_named_are_never_split(net: Net) -> None:
    found = infer_auto_device_map(net, {"cpu": EMBED + 2 * (BLOCK + 2**14) + BLOCK}, ["Block"], clean_result=False)
    assert sorted(n for n in found if n.startswith("layers")) == [f"layers.{i}" for i in range(8)]
    with pytest.raises(UnknownName, match="Did you mean 'Block'"):
        infer_auto_device_map(net, {"cpu": "1MB"}, ["Blok"])


def test_the_free_memory_of_this_machine_is_found() -> None:
    limits = placement.get_max_memory()
    assert 2**27 < limits["cpu"] < 2**50


def test_a_model_without_blocks_leaves_room_for_the_buffers_that_its_layers_need() -> None:
    """Each of its layers may stay or pass: those that stay must not take the room of the buffers for the others."""
    with init_empty_weights():
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    buffers = 2 * (BLOCK + 2**14)
    found = infer_auto_device_map(model, {"cpu": buffers + BLOCK + BLOCK // 2})
    assert sorted(found.values()) == ["cpu", *["disk"] * 11]
