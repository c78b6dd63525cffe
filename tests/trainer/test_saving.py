"""save_state, load_state and save_model of the raw API: what was saved goes on bit for bit, and nothing is loaded by halves."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.checkpoint.urls import UrlSink, path_of
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.strategies.world import World
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 26


class Counter:
    """Something of the user's own with a state."""

    def __init__(self) -> None:
        self.count, self.seen = 0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.seen = state["count"], state["seen"].clone()


class Job:
    """A raw loop with dropout, momentum, a schedule, windows of 2, shuffled data, python's own random numbers, a counter."""

    def __init__(self, workers: int = 0) -> None:
        self.accelerator = Accelerator(gradient_accumulation_steps=2, seed=4)
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        data = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(9))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        loader = DataLoader(TensorDataset(data), batch_size=2, shuffle=True, num_workers=workers)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            net, optimizer, loader, StepLR(optimizer, 3, 0.5)
        )
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)
        torch.manual_seed(100 + self.accelerator.process_index)
        random.seed(self.accelerator.process_index)

    def run(self, epochs: range, save_at: int = -1, folder: Path | None = None) -> list[float]:
        """Train; save when the counter is `save_at`. Returns the losses of every micro-batch."""
        losses = []
        for _ in epochs:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = (self.model(batch[0]) - random.random()).pow(2).mean()
                    self.accelerator.backward(loss)
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                losses.append(loss.item())
                self.counter.count += 1
                self.counter.seen += loss.detach()
                if self.counter.count == save_at:
                    assert folder is not None
                    self.accelerator.save_state(folder)
        return losses

    def end(self) -> dict[str, Any]:
        weights = {n: p.detach().clone() for n, p in self.accelerator.unwrap_model(self.model).named_parameters()}
        found = {"weights": weights, "lr": self.optimizer.param_groups[0]["lr"], "seen": self.counter.seen.tolist()}
        self.accelerator.end_training()
        return found


def straight_and_resumed(folder: Path, save_at: int, workers: int) -> tuple[Any, Any]:
    world = World.start()
    straight = Job(workers)
    losses = straight.run(range(3), save_at, folder)
    first = (losses, straight.end())
    resumed = Job(workers)
    resumed.run(range(1))  # it has its own past, of which nothing may remain
    resumed.accelerator.load_state(folder)
    assert resumed.counter.count == save_at
    per_epoch = len(losses) // 3
    rest = resumed.run(range((save_at - 1) // per_epoch, 3))  # from the epoch in which it was saved
    second = (losses[:save_at] + rest, resumed.end())
    world.stop()
    return first, second


@pytest.mark.parametrize(("size", "save_at", "workers"), [(1, 4, 0), (1, 13, 0), (1, 19, 2), (2, 4, 0), (2, 11, 0)])
def test_a_loaded_state_goes_on_bit_for_bit(size: int, save_at: int, workers: int, ranks: Any, tmp_path: Path) -> None:
    """In the middle of an epoch, at its end (13 micro-batches on one rank), and with workers."""
    results = ranks(size, straight_and_resumed, tmp_path, save_at, workers)
    (_, end), (_, other_end) = results[0]
    assert end["seen"] == other_end["seen"]  # what is registered is one for all ranks: rank 0's
    for (losses, end), (others, other_end) in results:
        assert others == losses
        assert end["lr"] == other_end["lr"]
        for name, weight in end["weights"].items():
            assert torch.equal(other_end["weights"][name], weight)


def test_the_newest_is_taken_and_nothing_is_overwritten(tmp_path: Path) -> None:
    job = Job()
    first = job.accelerator.save_state(tmp_path)
    job.run(range(1))
    second = job.accelerator.save_state(tmp_path)
    assert (first.name, second.name) == ("step-00000001", "step-00000002")
    assert job.accelerator.load_state(tmp_path) == second
    assert job.counter.count == 13
    assert job.accelerator.load_state(first) == first
    assert job.counter.count == 0
    job.end()


def test_project_dir_is_where_a_state_without_a_folder_goes(tmp_path: Path) -> None:
    accelerator = Accelerator(project_dir=tmp_path)
    accelerator.prepare(nn.Linear(1, 1))
    path = accelerator.save_state()
    assert path.parent == tmp_path / "checkpoints"
    assert accelerator.load_state() == path


def test_a_state_is_not_saved_in_the_middle_of_a_window(tmp_path: Path) -> None:
    """Its gradients would be lost, and the resumed run another one."""
    job = Job()
    with pytest.raises(ConfigError, match="after micro-batch 1 of 2"):
        job.run(range(1), 3, tmp_path)
    assert list(tmp_path.iterdir()) == []


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_state_of_other_objects_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    """Another shape, another optimizer, another number of schedulers, a thing that is not registered: the weights stay."""
    saved = Accelerator()
    net = nn.Linear(2, 2)
    saved.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    saved.save_state(tmp_path)

    def other(kind: str) -> tuple[Accelerator, nn.Module]:
        accelerator = Accelerator()
        model = nn.Linear(3 if kind == "shape" else 2, 2)
        accelerator.prepare(model)
        if kind != "shape":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            accelerator.prepare(optimizer)
            if kind == "scheduler":
                accelerator.prepare(StepLR(optimizer, 1))
            if kind == "registered":
                accelerator.register_for_checkpointing(Counter())
            if kind == "model":
                accelerator.prepare(nn.Linear(1, 1))
        return accelerator, model

    for kind, words in (("shape", "weight"), ("scheduler", "0 scheduler"), ("registered", "registered/0"), ("model", "model_1")):
        accelerator, model = other(kind)
        before = weights(model)
        with pytest.raises(CheckpointError, match=words):
            accelerator.load_state(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)), kind


def test_other_data_are_refused_before_the_weights_are_loaded(tmp_path: Path) -> None:
    """A position in the middle of an epoch of 26 samples means nothing in one of 20."""

    def made(samples: int, value: float) -> tuple[Accelerator, nn.Module, Any]:
        accelerator = Accelerator(seed=0)
        net = nn.Linear(2, 1)
        nn.init.constant_(net.weight, value)
        optimizer = torch.optim.AdamW(net.parameters())
        loader = DataLoader(TensorDataset(torch.zeros(samples, 2)), batch_size=4)
        return (accelerator, *accelerator.prepare(net, optimizer, loader)[::2])

    accelerator, _, loader = made(26, 1.0)
    next(iter(loader))
    accelerator.save_state(tmp_path)
    accelerator, net, _ = made(20, 2.0)
    with pytest.raises(CheckpointError, match="sample 4 of 26, and this data set has 20"):
        accelerator.load_state(tmp_path)
    weight: Any = net.weight
    assert weight.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("live", [False, True])
def test_damage_anywhere_leaves_everything_as_it_was(live: bool, tmp_path: Path) -> None:
    """Tensors are read straight into model and optimizer, and yet a bit that flipped in the last of them is met before."""
    job = Job()
    job.run(range(1), save_at=4, folder=tmp_path)
    (folder,) = tmp_path.glob("step-*")
    shard = folder / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    other = Job()
    if live:
        other.run(range(1))
    held = [w.clone() for w in weights(other.model)]
    state = {n: v.clone() for s in other.optimizer.state.values() for n, v in s.items()}
    with pytest.raises(CheckpointError, match=r"crc32 mismatch.*Nothing was loaded"):
        other.accelerator.load_state(folder)
    assert all(torch.equal(a, b) for a, b in zip(held, weights(other.model), strict=True))
    assert state.keys() == {n for s in other.optimizer.state.values() for n in s}
    now = {n: v for s in other.optimizer.state.values() for n, v in s.items()}
    assert all(torch.equal(state[n], now[n]) for n in state)


def test_a_live_optimizer_keeps_its_memory(tmp_path: Path) -> None:
    """The state is read into the tensors that are there: no second copy of it."""
    job = Job()
    job.run(range(1), save_at=4, folder=tmp_path)
    before = {id(p): s["exp_avg"].data_ptr() for p, s in job.optimizer.state.items()}
    job.accelerator.load_state(tmp_path)
    assert {id(p): s["exp_avg"].data_ptr() for p, s in job.optimizer.state.items()} == before


def test_a_state_goes_to_a_url_and_back() -> None:
    pytest.importorskip("fsspec", reason="waits for fsspec")
    job = Job()
    job.run(range(1))
    expected = [w.clone() for w in weights(job.model)]
    path = job.accelerator.save_state("memory://test-saving/states")
    assert str(path) == "memory:///test-saving/states/step-00000001"
    for place in ("memory://test-saving/states", path, str(path)):
        other = Job()
        other.accelerator.load_state(place)
        assert all(torch.equal(a, b) for a, b in zip(expected, weights(other.model), strict=True))


def of_all_kinds(fill: float) -> nn.Module:
    """Tied weights, a 0-d and an empty tensor, 16 bits, several files when they are small."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 3, dtype=torch.bfloat16))
    model[1].weight = model[0].weight
    model.register_buffer("scale", torch.tensor(1.0))
    model.register_buffer("nothing", torch.zeros(0, 4))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.arange(value.numel()).reshape(value.shape) % 7 + fill)
    return model


@pytest.mark.parametrize("size", ["5GB", "8KB"])
def test_bare_weights_go_to_a_url_and_back_and_are_the_bytes_of_a_local_save(size: str, tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="waits for fsspec")
    url = f"memory://test-saving/weights {size}"
    accelerator = Accelerator()
    model = accelerator.prepare(of_all_kinds(1))
    first = accelerator.save_model(model, url, max_shard_size=size)
    accelerator.save_model(model, tmp_path / "local", max_shard_size=size)
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert {path.name: path.read_bytes() for path in path_of(url).iterdir()} == local
    assert len(local) == (1 if size == "5GB" else 4)
    assert str(first) == f"memory:///test-saving/weights {size}/{min(local)}"
    other = accelerator.prepare(of_all_kinds(2))
    assert accelerator.load_model(other, url) == []
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"weights of another model: .* missing"):
        accelerator.load_model(accelerator.prepare(nn.Linear(2, 2)), url)


def test_weights_saved_again_behind_a_url_leave_nothing_of_the_old_ones() -> None:
    pytest.importorskip("fsspec", reason="waits for fsspec")
    url = "memory://test-saving/again"
    accelerator = Accelerator()
    for size, count in (("8KB", 4), ("5GB", 1), ("8KB", 4)):
        accelerator.save_model(accelerator.prepare(of_all_kinds(1)), url, max_shard_size=size)
        assert len(list(path_of(url).iterdir())) == count


def test_weights_behind_a_url_are_never_some_old_and_some_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that breaks off at its second file: there are no weights then, and that is said."""
    pytest.importorskip("fsspec", reason="waits for fsspec")
    url = "memory://test-saving/broken"
    accelerator = Accelerator()
    model = accelerator.prepare(of_all_kinds(1))
    accelerator.save_model(model, url, max_shard_size="8KB")
    finish, count = UrlSink.finish, itertools.count()

    def breaks(self: Any) -> None:
        if next(count):
            raise OSError("the network is gone")
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(UrlSink, "finish", breaks)
        with pytest.raises(CheckpointError, match="the network is gone"):
            accelerator.save_model(accelerator.prepare(of_all_kinds(2)), url, max_shard_size="8KB")
    with pytest.raises(CheckpointError, match=r"there is no model.safetensors.index.json"):
        accelerator.load_model(model, url)


def test_weights_behind_a_url_that_were_cut_are_refused() -> None:
    pytest.importorskip("fsspec", reason="waits for fsspec")
    accelerator = Accelerator()
    model = accelerator.prepare(of_all_kinds(1))
    path: Any = accelerator.save_model(model, "memory://test-saving/cut")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"is no whole safetensors file: .*its tensors end at byte"):
        accelerator.load_model(model, "memory://test-saving/cut")


def test_file_urls_are_local_paths_and_a_project_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a URL taken for a path, a folder called "memory:" would be made here."""
    monkeypatch.chdir(tmp_path)
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"Accelerator\(project_dir=...\): memory://out is a URL"):
        Accelerator(project_dir="memory://out")
    assert list(tmp_path.iterdir()) == []
    path = accelerator.save_model(model, f"file://{tmp_path}/out")
    assert path == tmp_path / "out" / "model.safetensors"
    assert accelerator.load_model(model, f"file://{tmp_path}/out") == []


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    accelerator = Accelerator()
    accelerator.prepare(nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=str(tmp_path / "empty")):
        accelerator.load_state(tmp_path / "empty")


def test_save_model_writes_plain_weights_with_tied_ones_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    accelerator, net = Accelerator(), Tied()
    model = accelerator.prepare(net)
    path = accelerator.save_model(model, tmp_path / "out")
    assert list(load_file(path)) == ["embed.weight"]
    torch.testing.assert_close(load_file(path)["embed.weight"], net.embed.weight)
    assert sorted(accelerator.get_state_dict(model)) == ["embed.weight", "head.weight"]


def save_on_two(folder: Path) -> list[str]:
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(2, 2))
    path = accelerator.save_model(model, folder)
    found = sorted(load_file(path))
    assert sorted(accelerator.get_state_dict(model)) == found
    accelerator.end_training()
    return found


def test_save_model_has_the_users_own_names_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, save_on_two, tmp_path) == [["bias", "weight"]] * 2


def test_a_big_model_is_saved_as_several_files_and_loaded_back(tmp_path: Path) -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = accelerator.prepare(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)))
    first = accelerator.save_model(model, tmp_path, max_shard_size="3KB")
    assert first.name == "model-00001-of-00002.safetensors"
    other = accelerator.prepare(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)))
    assert accelerator.load_model(other, tmp_path) == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="2 not in the model"):
        accelerator.load_model(accelerator.prepare(nn.Sequential(nn.Linear(20, 30))), tmp_path)
