"""Models larger than their memory give the numbers of the same model held whole, and hold no more than they may."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    remove_hook_from_submodules,
    save_torch_model,
    split_torch_state_dict_into_shards,
    weights_of,
)
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.strategies.offload.away import is_away
from drivetrain.strategies.offload.sources import open_source
from drivetrain.strategies.offload.strategy import OffloadStrategy
from offload_models import LAYERS, MIXED, WHOLE, WIDTH, Block, Net, empty
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@pytest.mark.parametrize("io", ["cached", "drop", "direct"])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("device_map", [WHOLE, MIXED, "auto"])
def test_a_model_on_the_disk_computes_what_it_computes_in_memory(
    net: Net, words: Tensor, folder: Path, io: str, prefetch: bool, device_map: Any
) -> None:
    limit = None if device_map != "auto" else {"cpu": "300KB"}
    model = load_checkpoint_and_dispatch(empty(), folder, device_map, limit, io=io, prefetch=prefetch)
    weights = weights_of(model)
    assert weights.streamed
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(words), net(words))
    if limit:
        assert weights.held_bytes <= 300_000
    assert len(weights.stream.slots) == 1 + prefetch


def test_after_the_first_blocks_no_read_is_waited_for_that_was_not_foreseen(net: Net, words: Tensor, folder: Path) -> None:
    """Cyclic: after the last block of a token comes the first of the next."""
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    with torch.no_grad():
        for _ in range(4):
            model(words)
    stats = weights_of(model).stream.stats
    assert stats.missed == 1
    assert stats.reads >= 4 * len(weights_of(model).streamed)


def test_a_block_is_one_read_and_its_bytes_are_those_of_the_file(net: Net, tmp_path: Path) -> None:
    save_torch_model(net, tmp_path)
    model = load_checkpoint_and_dispatch(empty(), tmp_path, WHOLE)
    blocks = {b.name: b for b in weights_of(model).stream.blocks}
    assert [len(blocks[f"layers.{i}"].layout.runs) for i in range(LAYERS)] == [1] * LAYERS
    assert sum(r.num_bytes for r in blocks["layers.0"].layout.runs) == sum(p.numel() * 4 for p in Block().parameters())


@pytest.mark.parametrize("io", ["cached", "drop", "direct"])
def test_tensors_of_any_alignment_come_whole(tmp_path: Path, io: str) -> None:
    """Odd sizes and types put tensors at odd places of the file, and at its very end."""
    made = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 7),
        "c": torch.randn(3).to(torch.bfloat16),
        "d": torch.tensor([True, False, True]),
        "e": torch.randn(4099, 3).double(),
        "f": torch.randn(0, 3),
        "g": torch.tensor(2.5),
    }
    save_file(made, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors", io=io)
    for wanted in ({n: t.dtype for n, t in made.items()}, dict.fromkeys("bceg", torch.float32)):
        from drivetrain.strategies.offload.stream import host_buffer

        layout = source.layout(wanted)
        buffer = host_buffer(layout.num_bytes)
        source.fill(layout, buffer)
        for name, dtype in wanted.items():
            assert torch.equal(layout.view(buffer, name), made[name].to(dtype)), (name, dtype)


def test_other_types_than_those_of_the_file_are_converted_while_they_are_read(net: Net, words: Tensor, folder: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), folder, MIXED, dtype=torch.bfloat16)
    model.scale = model.scale.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(words), net.bfloat16()(words))


def test_our_own_checkpoints_are_read_too(net: Net, words: Tensor, tmp_path: Path) -> None:
    accelerator = Accelerator()
    try:
        accelerator.prepare(net)
        path = accelerator.save_state(tmp_path)
    finally:
        accelerator.end_training()
    model = load_checkpoint_and_dispatch(empty(), path, MIXED)
    with torch.no_grad():
        assert torch.equal(model(words), net(words))
    with pytest.raises(ConfigError, match=r"holds no model 'modle'\. Did you mean 'model'"):
        load_checkpoint_and_dispatch(empty(), path, MIXED, model_name="modle")


@pytest.mark.parametrize("offload", ["disk", "cpu", "dispatch"])
def test_a_model_that_has_its_values_is_offloaded_and_comes_back(net: Net, words: Tensor, tmp_path: Path, offload: str) -> None:
    with torch.no_grad():
        truth = net(words)
        if offload == "disk":
            model = disk_offload(net, tmp_path)
        elif offload == "cpu":
            model = cpu_offload(net)
        else:
            model = dispatch_model(net, MIXED, offload_dir=tmp_path)
        assert torch.equal(model(words), truth)
        if offload == "cpu":
            assert not weights_of(model).streamed
            assert torch.equal(remove_hook_from_submodules(model)(words), truth)
        else:
            assert is_away(model.layers[0].up.weight)  # pyright: ignore
            values = load_file(next(iter(tmp_path.glob("*.safetensors"))))
            assert "layers.0.up.weight" in values
            remove_hook_from_submodules(model)
            with pytest.raises(ConfigError, match="is not in memory"):
                model(words)


def test_tied_weights_are_one_stand_in_and_are_written_once(net: Net, folder: Path, tmp_path: Path) -> None:
    model: Any = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    assert model.head.weight is model.embed.weight
    files = save_torch_model(model, tmp_path / "again", max_shard_size="100KB")
    names = [n for f in files if f.suffix == ".safetensors" for n in load_file(f)]
    assert sorted(names) == sorted(n for n in net.state_dict() if n != "head.weight")
    read = {n: t for f in files if f.suffix == ".safetensors" for n, t in load_file(f).items()}
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in read.items())


def test_shards_are_split_as_huggingface_hub_splits_them(net: Net) -> None:
    hub = pytest.importorskip("huggingface_hub")
    tensors = {n: t for n, t in net.state_dict().items() if n != "head.weight"}
    ours = split_torch_state_dict_into_shards(tensors, max_shard_size="60KB")
    theirs = hub.split_torch_state_dict_into_shards(tensors, max_shard_size="60KB")
    assert ours.is_sharded == theirs.is_sharded
    assert ours.tensor_to_filename.keys() == theirs.tensor_to_filename.keys()
    assert ours.metadata == {"total_size": theirs.metadata["total_size"]}
    for names in ours.filename_to_tensors.values():
        assert len(names) == 1 or sum(tensors[n].numel() * 4 for n in names) <= 60_000


def test_what_is_away_says_its_name_to_whoever_computes_with_it(folder: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    weight = model.layers[0].up.weight  # pyright: ignore
    assert (weight.device.type, tuple(weight.shape)) == ("cpu", (2 * WIDTH, WIDTH))
    with pytest.raises(ConfigError, match=r"layers\.0\.up\.weight is not in memory"):
        _ = weight + 1
    assert torch.equal(weights_of(model).tensor("layers.0.up.weight"), open_source(folder).tensor("layers.0.up.weight"))


@pytest.mark.parametrize("method", ["half", "float", "bfloat16"])
def test_moving_or_converting_a_dispatched_model_is_refused(folder: Path, method: str) -> None:
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    with pytest.raises(ConfigError, match="offloaded"):
        getattr(model, method)()
    assert model.to("cpu") is model


def test_weights_that_pass_are_never_trained_silently(net: Net, words: Tensor, folder: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE).train()
    with pytest.raises(ConfigError, match=r"embed\.weight is to be trained"):
        model(words)
    with pytest.raises(ConfigError, match="optimizer holds"):
        OffloadStrategy().prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


def test_gradients_flow_through_blocks_that_are_read_again_for_the_backward_pass(net: Net, words: Tensor, folder: Path) -> None:
    """What is trained stands in front of the blocks: every gradient has passed through all of them."""

    def train(model: Net) -> tuple[list[float], Tensor]:
        model.requires_grad_(False)
        soft = nn.Parameter(torch.zeros(1, 1, WIDTH))
        optimizer = torch.optim.SGD([soft], lr=0.5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            x = model.embed(words) * model.scale + soft
            for layer in model.layers:
                x = layer(x)
            loss = model.head(model.norm(x)).logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, soft.detach()

    want = train(net)
    for prefetch in (True, False):
        model: Any = load_checkpoint_and_dispatch(empty(), folder, WHOLE, prefetch=prefetch)
        got = train(model.train())
        assert got[0] == want[0]
        assert torch.equal(got[1], want[1])
        assert weights_of(model).stream.stats.reads > 3 * LAYERS


def test_an_output_that_is_a_view_of_the_weights_keeps_its_values(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, n: int) -> dict[str, Tensor]:
            return {"rows": self.weight[:n]}

    tables = nn.ModuleList(Table() for _ in range(4)).eval()
    want = [t(3)["rows"].detach().clone() for t in tables]
    disk_offload(tables, tmp_path)
    got = [t(3)["rows"] for t in tables]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_branch_that_nobody_foresaw_costs_a_read_and_no_wrong_number(net: Net, words: Tensor, folder: Path) -> None:
    model: Any = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for index in (3, 1, 4, 1, 0, 2, 2, 3, 0, 4) * 3:
            assert torch.equal(model.layers[index](x), net.layers[index](x))


def test_who_computes_reads_by_itself_where_the_reader_gets_no_core(
    net: Net, words: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is read in parts, which both threads take; with a reader that never runs, one takes all."""
    monkeypatch.setattr("drivetrain.strategies.offload.stream.Stream._start_reader", lambda stream: None)
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(words), net(words))
    assert weights_of(model).stream._reader is None
    assert weights_of(model).stream.stats.missed == 1


@pytest.mark.parametrize("io", ["cached", "direct"])
def test_two_threads_share_the_parts_of_a_block_and_each_byte_is_read_once(
    tmp_path: Path, io: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of two pages, so that each block has many; each thread leaves some to the other."""
    monkeypatch.setattr("drivetrain.strategies.offload.sources._PIECE", 8192)
    monkeypatch.setattr("drivetrain.strategies.offload.sources._DIRECT_PIECE", 8192)
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(4))).eval()
    x = torch.randn(2, 128)
    with torch.no_grad():
        want = layers(x)
    disk_offload(layers, tmp_path, io=io)
    source: Any = weights_of(layers).stream.blocks[0].source
    source = getattr(source, "files", source)
    read, readers = source._read, []

    def noted(*given: Any) -> None:
        readers.append(threading.current_thread().name)
        time.sleep(0.0005)  # the other one is let in
        read(*given)

    monkeypatch.setattr(source, "_read", noted)
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(layers(x), want)
    assert len(set(readers)) == 2
    stats = weights_of(layers).stream.stats
    assert len(readers) >= 8 * stats.reads


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_buffers_are_not_offloaded_and_whoever_asks_is_told(net: Net, tmp_path: Path, offload: Any) -> None:
    if offload is cpu_offload:  # where the CPU computes nothing is offloaded, so nothing is refused
        assert cpu_offload(net, offload_buffers=True) is net
        return
    with pytest.raises(ConfigError, match=r"offload_buffers=True: the buffers scale \(4 bytes\)"):
        disk_offload(net, tmp_path / "o", offload_buffers=True)
    assert not (tmp_path / "o").exists()
    linear = nn.Sequential(nn.Linear(4, 4))
    assert weights_of(disk_offload(linear, tmp_path / "p", offload_buffers=True)).streamed


def test_the_reader_ends_with_its_model(words: Tensor, folder: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    with torch.no_grad():
        model(words)
    reader = weights_of(model).stream._reader
    assert reader is not None
    thread, gone = reader[1], weakref.ref(weights_of(model).stream)
    del model
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    gc.collect()
    assert gone() is None


def test_an_error_while_reading_reaches_the_one_who_computes(words: Tensor, folder: Path) -> None:
    model = load_checkpoint_and_dispatch(empty(), folder, WHOLE)
    for file in folder.glob("*.safetensors"):
        with open(file, "r+b") as opened:
            opened.truncate(2000)
    with pytest.raises(CheckpointError, match="cut short"), torch.no_grad():
        model(words)


@pytest.mark.parametrize("fault", ["missing", "shape", "excess", "truncated", "none"])
def test_weights_of_another_model_are_refused_by_name(net: Net, tmp_path: Path, fault: str) -> None:
    tensors = {n: t.clone() for n, t in net.state_dict().items() if n != "head.weight"}
    if fault == "missing":
        del tensors["layers.1.up.bias"]
    elif fault == "shape":
        tensors["layers.1.up.bias"] = torch.zeros(3)
    elif fault == "excess":
        tensors["more"] = torch.zeros(3)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    told = {"missing": "missing .layers.1.up.bias", "shape": r"layers.1.up.bias \[3\]", "excess": "more"}
    told |= {"truncated": "cannot be read", "none": "nothing at"}
    with pytest.raises(CheckpointError, match=told[fault]):
        load_checkpoint_and_dispatch(empty(), tmp_path / "no" if fault == "none" else path, WHOLE, strict=True)


def test_load_checkpoint_in_model_fills_in_place_and_says_what_was_left(net: Net, words: Tensor, tmp_path: Path) -> None:
    tensors = {n: t.clone() for n, t in net.state_dict().items() if n != "head.weight"} | {"more": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    there, other = empty(), Net().eval()
    kept = other.layers[0].up.weight  # pyright: ignore
    assert load_checkpoint_in_model(there, tmp_path) == load_checkpoint_in_model(other, tmp_path) == ["more"]
    assert other.layers[0].up.weight is kept  # pyright: ignore
    for model in (there, other):
        assert torch.equal(model(words), net(words))
        assert model.head.weight is model.embed.weight


def test_models_without_values_keep_their_ties_and_their_buffers_and_draw_nothing() -> None:
    state = torch.get_rng_state()
    model = empty()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.is_meta for p in model.parameters())
    assert model.head.weight is model.embed.weight
    assert model.scale.item() == 0.5
    with init_empty_weights(include_buffers=True):
        assert Net(1).scale.is_meta
    with init_on_device("meta"):
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(Net(1).head.weight.is_meta))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not Net(1).head.weight.is_meta
