"""The step stays thin: function calls, host reads and collectives are counted exactly. No clock is asked."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Accelerator, Callback, Trainer, TrainingModule
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def overhead() -> Iterator[ModuleType]:
    """tests/benchmarks/overhead.py as a module: it counts, the tests here set the limits."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_overhead", BENCHMARKS / "overhead.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.mark.parametrize(
    ("framework", "limit"),
    [("drivetrain Accelerator", 20), ("drivetrain Trainer, all off", 25), ("drivetrain Trainer, defaults", 40)],
)
def test_calls_above_the_raw_loop_stay_below_the_limit(overhead: ModuleType, framework: str, limit: int) -> None:
    assert overhead.count_calls(framework) - overhead.count_calls("raw") <= limit


def test_calls_do_not_grow_with_the_number_of_parameters(overhead: ModuleType) -> None:
    above = [
        overhead.count_calls("drivetrain Trainer, defaults", layers=n) - overhead.count_calls("raw", layers=n) for n in (1, 30)
    ]
    # Growth would be 29 calls for each one a layer; a screen that is drawn by the clock may be drawn once more.
    assert above[0] == pytest.approx(above[1], abs=1)


def test_a_logged_value_costs_at_most_eight_calls(overhead: ModuleType) -> None:
    one, eleven = (overhead.count_calls("drivetrain Trainer, all off", logs=n) for n in (1, 11))
    assert (eleven - one) / 10 <= 8


class Nothing(Callback):
    """Overrides nothing."""


class Module(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("mean_error", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(ranks: int = 1, steps: int = 40) -> DataLoader:
    x = torch.randn(8 * ranks * steps, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def quiet(root: Path, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=1, root=root, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options
    )


def test_a_callback_that_overrides_nothing_costs_no_call(tmp_path: Path) -> None:
    def calls(callbacks: list[Callback]) -> int:
        count, on = 0, False

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        class Counted(Module):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                nonlocal on
                if batch_idx == 10:
                    sys.setprofile(profile)
                elif batch_idx == 30:
                    sys.setprofile(None)
                return super().training_step(batch, batch_idx)

        quiet(tmp_path, log_every_n_steps=0, callbacks=callbacks).fit(Counted(), batches())
        return count

    assert calls([Nothing() for _ in range(50)]) == calls([])


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by step: `_local_scalar_dense` is what `.item()`, `float()` and `bool()` end in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[int] = Counter()
        self.step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found[self.step] += 1
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_between_log_points(tmp_path: Path) -> None:
    """The finite check of the CPU reads the loss, and is switched off for this count; on an accelerator it reads nothing."""
    reads = HostReads()

    class Watched(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            reads.step = batch_idx
            return super().training_step(batch, batch_idx)

    with reads:
        quiet(tmp_path, log_every_n_steps=10, nonfinite="ignore", gradient_clip_val=1.0).fit(Watched(), batches())
    log_points = {9, 19, 29, 39}
    assert {step for step in reads.found if step > 0} <= log_points, reads.found


def collectives(root: str) -> list[int]:
    """The collectives on the compute group after each step, from a run with a log point at every tenth."""
    world = World.start()
    seen: list[int] = []
    calls = Counter[str]()
    original = {
        name: getattr(torch.distributed, name) for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor")
    }
    compute = world.group()

    def counted(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("group") in (None, compute):
                calls[name] += 1
            return original[name](*args, **kwargs)

        return run

    for name in original:
        setattr(torch.distributed, name, counted(name))

    class Watched(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(sum(calls.values()))
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss * len(batch[0]), "num_items": len(batch[0])}

    quiet(Path(root), log_every_n_steps=10).fit(Watched(), batches(ranks=2))
    for name, function in original.items():
        setattr(torch.distributed, name, function)
    world.stop()
    return [b - a for a, b in itertools.pairwise(seen)]


def test_the_count_of_items_is_the_only_collective_between_log_points(ranks: Any, tmp_path: Path) -> None:
    """The gradients' own are inside DDP's reducer. The control channel has its own group, about once a second."""
    for found in ranks(2, collectives, str(tmp_path)):
        between = [n for step, n in enumerate(found) if step > 1 and step % 10 != 9]
        assert set(between) == {1}, found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


def sharded_calls(ours: bool, tp: int) -> float:
    """Calls of a step of a model in two units on `fsdp:2` with tp, by hand or by the Accelerator."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model: Any = nn.Sequential(Block(), Block())
    x = torch.randn(4, 8)
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    steps, first = 16, 6
    accelerator = Accelerator(strategy="fsdp:2" if tp == 1 else f"fsdp:2+tp:{tp}") if ours else None
    if accelerator is None:
        world = World.start("cpu")
        mesh = init_device_mesh("cpu", (2, tp)[: min(tp, 2)], mesh_dim_names=("fsdp", "tp")[: min(tp, 2)])
        for block in model:
            if tp > 1:
                parallelize_module(block, mesh["tp"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
            fully_shard(block, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(steps):
            if step == first:
                sys.setprofile(profile)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        sys.setprofile(None)
        world.stop()
    else:
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(steps):
            if step == first:
                sys.setprofile(profile)
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        sys.setprofile(None)
        accelerator.end_training()
    return count / (steps - first)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_sharded_step_has_at_most_thirty_calls_above_one_by_hand(ranks: Any, tp: int) -> None:
    """All calls are counted. 21 of them are ours; torch's dispatch cache compares equal keys now and then, which hangs on where
    objects happen to lie and is up to 8 calls a step, on either side."""
    by_hand, ours = (ranks(2 * tp, sharded_calls, own, tp)[0] for own in (False, True))
    assert ours - by_hand <= 30, (ours, by_hand)


def test_steps_on_a_device_are_gated_without_reading(tmp_path: Path) -> None:
    """What happens on an accelerator, run here: a fused optimizer leaves the step out by itself, and the count is read later."""
    accelerator = Accelerator(nonfinite="skip")
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator._gates, accelerator._reads_loss = True, False
    for value in (float("nan"), 1.0):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 2), value)).sum())
            optimizer.step()
            optimizer.zero_grad()
        if value != 1.0:
            assert torch.equal(model.weight, before)
    assert not torch.equal(model.weight, before)
    assert torch.isfinite(model.weight).all()
    assert accelerator.check_finite() == 1
    accelerator.end_training()
