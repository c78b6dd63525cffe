"""Memory under sharding, counted in the storages: a quarter of a model on each of four ranks, the whole on none."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract_models import Llama
from drivetrain.strategies.world import World
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BIG = {"vocabulary": 64, "dim": 32, "layers": 16, "heads": 4, "kv_heads": 4, "hidden": 96}


class LiveBytes(TorchDispatchMode):
    """The most bytes that lived at once in storages that were made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

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
