"""The Accelerator as a whole: what prepare returns, what a step runs, and how it ends. Its parts have tests of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain import Accelerator, Trainer
from drivetrain.strategies.base import Strategy
from drivetrain.strategies.errors import ConfigError
from drivetrain.trainer.data.loader import Loader
from drivetrain.trainer.optimizers import PreparedOptimizer, PreparedScheduler
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

DATA = TensorDataset(torch.arange(9.0).reshape(9, 1))


def made() -> tuple[nn.Module, SGD, DataLoader[Any], StepLR]:
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, DataLoader(DATA, batch_size=2), StepLR(optimizer, 1, 0.5)


def test_prepare_returns_everything_in_the_order_given() -> None:
    accelerator = Accelerator()
    model, optimizer, loader, scheduler = made()
    got = accelerator.prepare(scheduler, loader, optimizer, model)
    assert [type(o) for o in got] == [PreparedScheduler, Loader, PreparedOptimizer, nn.Linear]
    assert got[3] is model
    assert got[0].optimizer is got[2]
    assert accelerator.prepare(nn.Linear(1, 1)) is not None
    assert list(accelerator.models) == ["model", "model_1"]
    assert list(accelerator.optimizers) == ["optimizer"]


def test_prepare_takes_objects_one_by_one_too() -> None:
    accelerator = Accelerator()
    model, optimizer, loader, scheduler = made()
    assert accelerator.prepare_model(model) is model
    assert isinstance(accelerator.prepare_optimizer(optimizer), PreparedOptimizer)
    assert isinstance(accelerator.prepare_scheduler(scheduler), PreparedScheduler)
    assert len(accelerator.prepare_data_loader(loader)) == 5


def test_peers_spellings_mean_the_same() -> None:
    assert Accelerator(mixed_precision="bf16").precision.name == "bf16-mixed"
    assert Accelerator(mixed_precision="no").precision.name == "fp32"
    assert Accelerator(cpu=True).device.type == "cpu"
    trainer = Trainer(logger=False, gradient_accumulation_steps=3, max_grad_norm=0.5, default_root_dir="x", precision=32)
    assert (trainer.options["accumulate_grad_batches"], trainer.gradient_clip_val) == (3, 0.5)


def test_a_step_runs_under_the_precision() -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    model, optimizer, loader, _ = made()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    dtypes, extras = [], []

    def step(batch: Any) -> Any:
        output = model(batch[0])
        dtypes.append(output.dtype)
        return {"loss": output.float().mean(), "extra": 3}

    for batch in loader:
        with accelerator.accumulate(model):
            extras.append(accelerator.forward_backward(step, batch)["extra"])
            optimizer.step()
            optimizer.zero_grad()
    assert set(dtypes) == {torch.bfloat16}
    assert extras == [3] * 5
    with accelerator.autocast():
        assert model(torch.ones(1, 1)).dtype == torch.bfloat16


def unwrapped() -> dict[str, Any]:
    accelerator = Accelerator()
    model: Any
    model, optimizer, loader, _ = made()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    frozen = accelerator.prepare(nn.Linear(1, 1).requires_grad_(False))
    found: dict[str, Any] = {
        "wrapped": prepared is not model,
        "unwrapped": accelerator.unwrap_model(prepared) is model,
        "bare": accelerator.unwrap_model(model) is model,
        "names": sorted(accelerator.get_state_dict(prepared)),
        "frozen": type(frozen).__name__,
        "length": len(loader),
        "repr": repr(accelerator),
    }
    # no_sync leaves each rank's own gradient; the next backward averages what has been accumulated.
    rank = accelerator.process_index
    x = torch.full((1, 1), 1.0 + rank)
    with accelerator.no_sync(prepared):
        accelerator.backward(prepared(x).mean())
    found["own"] = model.weight.grad.item() == 1.0 + rank
    accelerator.backward(prepared(x).mean())
    found["together"] = model.weight.grad.item()
    # With several strategies in one run: a teacher that is only evaluated beside a model that is trained.
    found["joined"] = joined_steps(accelerator, prepared, optimizer)
    accelerator.end_training()
    found["stopped"] = not dist.is_initialized()
    return found


def joined_steps(accelerator: Accelerator, model: Any, optimizer: Any) -> int:
    """Ranks with different numbers of steps over data of their own."""
    steps = 0
    with accelerator.join_uneven_inputs([model]):
        for _ in range(2 + accelerator.process_index):
            optimizer.zero_grad()
            accelerator.backward(model(torch.ones(1, 1)).mean())
            optimizer.step()
            steps += 1
    return steps


def test_on_two_ranks_models_are_replicas_that_unwrap(ranks: Any) -> None:
    results = ranks(2, unwrapped)
    for found in results:
        assert found["wrapped"]
        assert found["unwrapped"]
        assert found["bare"]
        assert found["names"] == ["bias", "weight"]
        assert found["frozen"] == "Linear"
        assert found["length"] == 3
        assert found["repr"] == "Accelerator(ddp x2, fp32, cpu, window=1)"
        assert found["own"]
        assert found["together"] == 3.0  # (1 + 1 and 2 + 2) / 2
        assert found["stopped"]
    assert [found["joined"] for found in results] == [2, 3]


def test_a_strategy_for_each_named_model() -> None:
    """A teacher that is only evaluated: no gradients are kept for it, and it has no optimizer."""
    accelerator = Accelerator(models={"teacher": Strategy(inference=True)})
    teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
    models, (optimizer,) = accelerator.prepare_models(
        {"teacher": teacher, "student": student}, [SGD(student.parameters(), lr=0.1)]
    )
    assert not any(p.requires_grad for p in models["teacher"].parameters())
    assert not models["teacher"].training
    loss = (models["student"](torch.ones(1, 1)) - models["teacher"](torch.ones(1, 1))).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    assert optimizer.stepped


def test_an_optimizer_over_models_of_two_strategies_is_refused() -> None:
    accelerator = Accelerator(models={"one": "single"})
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    accelerator.prepare_models({"one": one, "two": two})
    with pytest.raises(ConfigError, match="different strategies"):
        accelerator.prepare(SGD([*one.parameters(), *two.parameters()], lr=0.1))


def test_skipped_batches_are_not_read() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    loader = accelerator.prepare(DataLoader(DATA, batch_size=2))
    rest = accelerator.skip_first_batches(loader, 3)
    assert len(rest) == 2
    seen, synced = [], []
    for batch in rest:
        with accelerator.accumulate():
            seen.append(batch[0].flatten().tolist())
            synced.append(accelerator.sync_gradients)
    assert (seen, synced) == ([[6, 7], [8]], [False, True])


def test_free_memory_forgets_what_was_prepared_and_the_open_window() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=3)
    model, optimizer, loader, scheduler = made()
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    accelerator.register_for_checkpointing(scheduler)
    with accelerator.accumulate(model):
        pass
    names = accelerator.free_memory(model, optimizer)
    assert names == [None, None]
    assert not any(
        (accelerator.models, accelerator.optimizers, accelerator.schedulers, accelerator.loaders, accelerator.registered)
    )
    with accelerator.accumulate():
        assert accelerator.window.index == 1
    # Everything can be prepared anew.
    accelerator.prepare(*made())


def test_end_training_may_be_called_twice() -> None:
    accelerator = Accelerator()
    accelerator.end_training()
    accelerator.end_training()
