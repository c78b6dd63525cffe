"""Memory under sharding, counted in the storages: a quarter of a model on each of four ranks, the whole on none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.checkpoint.reader import Checkpoint
from drivetrain.strategies.contract_models import Llama
from drivetrain.strategies.world import World
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BIG: dict[str, Any] = {"vocabulary": 64, "dim": 32, "layers": 16, "heads": 4, "kv_heads": 4, "hidden": 96}


class LiveBytes(TorchDispatchMode):
    """The most bytes that lived at once in storages that were made while it was on, and in those of `held`."""

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        for tensor in held:
            self._add(_local(tensor).untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and not isinstance(made, DTensor) and made.device.type == "cpu":
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def held(tensors: Any) -> int:
    """Bytes of the storages of tensors, each once."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors for s in [_local(t).untyped_storage()]}
    return sum(storages.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def state_bytes(words: str) -> int:
    """Bytes of parameters, gradients and AdamW's moments on this rank after a step."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words)
    strategy.start(world)
    model: Any = Llama(**BIG)
    _, (optimizer,) = strategy.prepare({"model": model}, lambda: [torch.optim.AdamW(model.parameters())])
    tokens = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    strategy.backward(strategy.bind(model, "step")({"x": tokens, "y": tokens}, False))
    strategy.step(optimizer)
    parameters = list(model.parameters())
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    found = held([*parameters, *[p.grad for p in parameters if p.grad is not None], *moments])
    world.stop()
    return found


@pytest.mark.parametrize("words", ["fsdp", "fsdp:2+tp:2"])
def test_four_ranks_hold_a_quarter_each(ranks: Any, words: str) -> None:
    whole = ranks(1, state_bytes, "single")[0]
    for found in ranks(4, state_bytes, words):
        assert found == pytest.approx(whole / 4, rel=0.1)


def peak_while_building(words: str) -> tuple[int, int]:
    """(the most bytes that lived while a model was built, cut up, and given a checkpoint; the bytes of the whole model)."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words)
    strategy.start(world)
    with torch.device("meta"):
        model = Llama(**BIG)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    with LiveBytes() as live:
        strategy.prepare({"model": model}, [])
        tensors, values = strategy.state_tensors({"model": model}, {})
        shapes = {name: tuple(getattr(t, "shape")) for name, t in tensors.items()}  # noqa: B009  a Shard's is the whole's
        strategy.load_state_tensors({"model": model}, {}, list(shapes), zeros(shapes), values)
    assert all(float(_local(p).abs().sum()) == 0 for p in model.parameters()), "the checkpoint's zeros were not loaded"
    world.stop()
    return live.most, whole


def zeros(shapes: dict[str, tuple[int, ...]]) -> Any:
    """A checkpoint of zeros that is read in pieces."""
    from drivetrain.strategies.named_state import Source

    def read(name: str, *, offset: Any = None, shape: Any = None) -> Tensor:
        return torch.zeros(tuple(shape) if shape is not None else shapes[name])

    return Source(read, shape=shapes.__getitem__, sliced=True)


@pytest.mark.parametrize("words", ["fsdp", "fsdp:2+tp:2"])
def test_no_rank_ever_holds_the_whole_model(ranks: Any, words: str) -> None:
    """Its quarter, twice while a checkpoint is read, and a unit: the limit is two thirds of the model."""
    for most, whole in ranks(4, peak_while_building, words):
        assert most < whole * 2 / 3, (most, whole)


def test_the_count_sees_a_model_that_is_whole() -> None:
    with LiveBytes() as live:
        model = Llama(**BIG)
    assert live.most >= sum(p.numel() * p.element_size() for p in model.parameters())


SHARDS = "200KB"
"""The largest file of an export: a quarter of a layer's files are less."""


def write_whole(folder: Path) -> None:
    from drivetrain import Accelerator

    torch.manual_seed(3)
    accelerator = Accelerator(strategy="single")
    accelerator.save_model(accelerator.prepare(Llama(**BIG)), folder, max_shard_size=SHARDS)
    accelerator.end_training()


def peaks_in_life(words: str, source: Path, folder: Path) -> tuple[dict[str, float], bool]:
    """(the most that this rank held while it built, loaded, saved and exported a model, in models; whether it is rank 0)."""
    from drivetrain import Accelerator

    accelerator = Accelerator(strategy=words)
    with torch.device("meta"):
        model: Any = Llama(**BIG)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    found: dict[str, float] = {}

    def measure(step: str, action: Any) -> None:
        gc.collect()
        with LiveBytes(p for p in model.parameters() if not p.is_meta) as live:
            action()
        found[step] = live.most / whole

    measure("build", lambda: accelerator.prepare(model))
    measure("load_model", lambda: accelerator.load_model(model, source))
    measure("save_model", lambda: accelerator.save_model(model, folder / "export", max_shard_size=SHARDS))
    measure("save_state", lambda: accelerator.save_state(folder / "state"))
    measure("load_state", lambda: accelerator.load_state(folder / "state"))
    accelerator.save_model(model, folder / "again", max_shard_size=SHARDS)
    measure("get_state_dict", lambda: accelerator.get_state_dict(model))
    is_main = accelerator.is_main_process
    accelerator.end_training()
    return found, is_main


def check_life(words: str, limit: float, ranks: Any, tmp_path: Path) -> None:
    ranks(1, write_whole, tmp_path / "whole")
    for found, is_main in ranks(4, peaks_in_life, words, tmp_path / "whole", tmp_path, timeout=120):
        whole_on_main = found.pop("get_state_dict")
        assert max(found.values()) < limit, found
        if is_main:
            assert whole_on_main > 1, "the measure does not see a model that is whole"
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) > 4
    for export in ("export", "again"):
        assert {path.name: path.read_bytes() for path in (tmp_path / export).iterdir()} == files


@pytest.mark.parametrize("words", ["fsdp:2+tp:2"])
def test_no_rank_holds_the_model_while_it_builds_loads_saves_and_exports(ranks: Any, tmp_path: Path, words: str) -> None:
    """A quarter and a few tensors: the limit is half of the model, which its whole would break. The export has the same bytes."""
    check_life(words, 0.5, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "limit"), [("fsdp", 0.5), ("hsdp", 0.75), ("tp", 0.5), ("pp", 0.5), ("fsdp:2+pp:2", 0.5), ("cp:2+tp:2", 0.5)]
)
def test_no_strategy_holds_the_model_anywhere(ranks: Any, tmp_path: Path, words: str, limit: float) -> None:
    """Under hsdp, with two replicas, a rank's own part is a half."""
    check_life(words, limit, ranks, tmp_path)


LARGE: dict[str, Any] = {"vocabulary": 64, "dim": 256, "layers": 16, "heads": 4, "kv_heads": 4, "hidden": 704}


def memory(kind: str) -> int:
    """Bytes of this process, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1]) * 1024


def peaks_while_saving(words: str, folder: Path) -> tuple[list[int], int]:
    """(by how much the process grew in a save, and in one beside the training; the bytes of the whole model)."""
    from drivetrain import Accelerator

    accelerator = Accelerator(strategy=words)
    with torch.device("meta"):
        model: Any = Llama(**LARGE)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    model = accelerator.prepare(model)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    tokens = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    accelerator.backward(accelerator.bind(model, "step")({"x": tokens, "y": tokens}, False))
    optimizer.step()
    optimizer.zero_grad()
    found: list[int] = []
    for wait in (True, False):
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        accelerator.save_state(folder, wait=wait)  # pyright: ignore[reportCallIssue, reportArgumentType]
        accelerator.settle_saves()
        found.append(memory("VmHWM") - before)
    accelerator.end_training()
    return found, whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux: the peak is read from /proc")
@pytest.mark.parametrize("words", ["fsdp", "fsdp:2+tp:2"])
def test_no_rank_ever_holds_the_whole_model_while_it_saves(ranks: Any, tmp_path: Path, words: str) -> None:
    """Weights and moments are three models, of which each of four ranks has three quarters of one: a save writes them from
    where they lie, one beside the training from a copy."""
    for (waits, beside), whole in ranks(4, peaks_while_saving, words, tmp_path / words, timeout=120):
        assert waits < whole / 4, (waits, whole)
        assert beside < whole * 0.95, (beside, whole)
    for path in (tmp_path / words).glob("step-*"):
        with Checkpoint(path) as saved:
            assert sum(saved.shape(n) == (704, 256) for n in saved.names()) == 2 * 3 * LARGE["layers"], "not all was saved"
