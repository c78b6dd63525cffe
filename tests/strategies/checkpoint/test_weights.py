"""Bare weights, in the form that Hugging Face's libraries read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drivetrain.strategies.checkpoint import weights
from drivetrain.strategies.errors import CheckpointError, ConfigError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 50, bias=False))
    model[3].weight = model[0].weight
    return model


def save(model: nn.Module, folder: Path, size: int | str = "5GB") -> list[str]:
    kept, tied = weights.untied(model.state_dict())
    sizes = {n: t.numel() * t.element_size() for n, t in kept.items()}
    files = weights.save_weights(folder, sizes, lambda names: {n: kept[n] for n in names}, max_shard_size=size, metadata=tied)
    return [file.name for file in files]


def read_all(folder: Path) -> dict[str, Tensor]:
    """As transformers does it: by the index."""
    weight_map = json.loads((folder / weights.INDEX).read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for file in set(weight_map.values()):
        found |= load_file(folder / file)
    assert found.keys() == weight_map.keys()
    return found


def test_a_small_model_is_one_file_and_tied_weights_are_in_it_once(tmp_path: Path) -> None:
    model = net()
    assert save(model, tmp_path) == ["model.safetensors"]
    expected = {n: t for n, t in model.state_dict().items() if n != "3.weight"}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "3.weight": "0.weight"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_big_model_is_several_files_and_an_index(tmp_path: Path) -> None:
    model = net()
    names = save(model, tmp_path, 500)
    assert names[0] == f"model-00001-of-{len(names) - 1:05d}.safetensors"
    assert names[-1] == weights.INDEX
    found = read_all(tmp_path)
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items() if n != "3.weight")
    total = json.loads((tmp_path / weights.INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(t.numel() * t.element_size() for t in found.values())
    for file in names[:-1]:
        held = load_file(tmp_path / file)
        assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= 500


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    many = save(net(), tmp_path, 300)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(many)
    save(net(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    fewer = save(net(), tmp_path, 1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(fewer)


@pytest.mark.parametrize("size", ["5GB", 500])
def test_what_was_saved_is_loaded_and_tied_weights_stay_tied(size: int | str, tmp_path: Path) -> None:
    save(net(), tmp_path, size)
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    assert weights.load_weights(model.state_dict(), tmp_path) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), net().state_dict().values(), strict=True))
    assert model[3].weight is model[0].weight  # type: ignore[index]


def test_another_library_may_have_kept_the_other_name_of_tied_weights(tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in net().state_dict().items() if n != "0.weight"}
    save_file(state, tmp_path / "model.safetensors")
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(7.0)  # type: ignore[index, union-attr, operator]
    assert weights.load_weights(model.state_dict(), tmp_path) == []
    assert torch.equal(model[0].weight, state["3.weight"])  # type: ignore[index, arg-type]


def test_the_weights_of_another_model_are_refused_with_everything_that_differs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    save(nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2, bias=False), nn.Linear(1, 1, bias=False)), tmp_path)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    message = r"1 missing \(1.bias\); 1 not in the model \(2.weight\); 2 of another shape \(0.weight \[5, 3\] for \[4, 3\]"
    with pytest.raises(CheckpointError, match=message):
        weights.load_weights(model.state_dict(), tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert weights.load_weights(model.state_dict(), tmp_path, strict=False) == ["1.bias", "2.weight", "0.bias", "0.weight"]
    assert not torch.equal(model.state_dict()["1.weight"], before["1.weight"])


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    save(net(), tmp_path / "a", 500)
    index = tmp_path / "a" / weights.INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["0.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no plain file beside it"):
        weights.load_weights(net().state_dict(), tmp_path / "a")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no index of weights"):
        weights.load_weights(net().state_dict(), tmp_path / "a")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled weights .* are not read"):
        weights.load_weights(net().state_dict(), tmp_path)


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1.5MiB", 3 * 2**19), (77, 77), ("200 kb", 200_000)])
def test_sizes_are_those_that_are_usual(size: int | str, expected: int) -> None:
    assert weights.parse_size(size) == expected


@pytest.mark.parametrize("size", ["big", "5XB", 0, "-1GB", ""])
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as"):
        weights.parse_size(size)
