"""Prepared optimizers and schedulers, and every form that configure_optimizers may return."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Trainer, TrainingModule
from drivetrain.strategies.errors import NonFiniteError
from drivetrain.strategies.world import World
from drivetrain.trainer.optimizers import SchedulerConfig, read_optimizers
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "seed": 0}
DATA = TensorDataset(torch.arange(1.0, 9.0).reshape(8, 1))
A, B = (SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
S, T = StepLR(A, 1), StepLR(B, 1)


@pytest.mark.parametrize(
    ("returned", "names", "schedulers"),
    [
        (A, ["optimizer"], []),
        ([A], ["optimizer"], []),
        ([A, B], ["optimizer_0", "optimizer_1"], []),
        ((A, B), ["optimizer_0", "optimizer_1"], []),
        ((A, S), ["optimizer"], [(S, "epoch")]),
        (([A], [S]), ["optimizer"], [(S, "epoch")]),
        ([[A, B], [S, T]], ["optimizer_0", "optimizer_1"], [(S, "epoch"), (T, "epoch")]),
        (([A], [{"scheduler": S, "interval": "step"}]), ["optimizer"], [(S, "step")]),
        ({"optimizer": A}, ["optimizer"], []),
        ({"optimizer": A, "lr_scheduler": S}, ["optimizer"], [(S, "epoch")]),
        ({"optimizer": A, "lr_scheduler": {"scheduler": S, "interval": "step"}}, ["optimizer"], [(S, "step")]),
        ([{"optimizer": A, "lr_scheduler": S}, {"optimizer": B}], ["optimizer_0", "optimizer_1"], [(S, "epoch")]),
        (({"optimizer": A}, {"optimizer": B}), ["optimizer_0", "optimizer_1"], []),
        ({"generator": A, "critic": B}, ["generator", "critic"], []),
        ({"generator": {"optimizer": A, "lr_scheduler": S}, "critic": B}, ["generator", "critic"], [(S, "epoch")]),
        ((A, SchedulerConfig(S, interval="step")), ["optimizer"], [(S, "step")]),
    ],
)
def test_every_form_of_configure_optimizers_is_read(returned: Any, names: list[str], schedulers: list[Any]) -> None:
    optimizers, configs = read_optimizers(returned, "Digits")
    assert list(optimizers) == names
    assert [(c.scheduler, c.interval) for c in configs] == schedulers


def prepared(make: Callable[[Optimizer], Any], *, steps: int = 1, **options: Any) -> tuple[Any, ...]:
    accelerator = Accelerator(gradient_accumulation_steps=steps, **options)
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=1.0)
    return accelerator, *accelerator.prepare(model, optimizer, make(optimizer), DataLoader(DATA, batch_size=1))


def rates(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, loader: Any, *, spoil: int = -1) -> list[float]:
    """The learning rate after every micro-batch of one epoch, `scheduler.step()` being called after each."""
    found = []
    for i, batch in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch[0]).mean() * (math.nan if i == spoil else 1e-3))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def halved(ranks: int) -> list[float]:
    world = World.start()
    run = prepared(lambda o: StepLR(o, 1, 0.5), steps=2)
    found = rates(*run)
    world.stop()
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_scheduler_counts_optimizer_steps_on_any_number_of_ranks(size: int, ranks: Any) -> None:
    """StepLR(0.5), 8 samples, windows of two: Accelerate 1.15 multiplies by 0.5 once for each process."""
    expected = {1: [1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625], 2: [1, 0.5, 0.5, 0.25], 4: [1, 0.5]}
    assert ranks(size, halved, size) == [expected[size]] * size


@pytest.mark.filterwarnings("ignore:Detected call of")  # as asked for
def test_step_scheduler_with_optimizer_false_steps_at_every_call() -> None:
    found = rates(*prepared(lambda o: StepLR(o, 1, 0.5), steps=4, step_scheduler_with_optimizer=False))
    assert found[:3] == [0.5, 0.25, 0.125]


def test_a_scheduler_made_from_the_prepared_optimizer_works_too() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Linear(1, 1)
    model, optimizer, loader = accelerator.prepare(model, SGD(model.parameters(), lr=1.0), DataLoader(DATA, batch_size=1))
    scheduler = accelerator.prepare(StepLR(optimizer, 1, 0.5))
    assert rates(accelerator, model, optimizer, scheduler, loader)[:4] == [1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: SequentialLR(o, [LinearLR(o, 0.5, total_iters=2), StepLR(o, 1, 0.5)], [2]),
        lambda o: ChainedScheduler([LinearLR(o, 0.5, total_iters=2), StepLR(o, 1, 0.5)], optimizer=o),
    ],
)
def test_composed_schedulers_step_with_their_optimizer(make: Any) -> None:
    accelerator, model, optimizer, scheduler, loader = prepared(make, steps=2)
    plain = make(SGD(nn.Linear(1, 1).parameters(), lr=1.0))
    found = rates(accelerator, model, optimizer, scheduler, loader)[1::2]
    expected = []
    for _ in range(4):
        plain.optimizer.step()
        plain.step()
        expected.append(plain.optimizer.param_groups[0]["lr"])
    assert found == expected


def test_a_plateau_scheduler_takes_its_value() -> None:
    _, model, optimizer, scheduler, _ = prepared(lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5))
    model(torch.ones(1, 1)).mean().backward()
    optimizer.step()
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_that_is_skipped_changes_nothing_and_the_schedule_waits(steps: int) -> None:
    """NaN in the fourth micro-batch under nonfinite="skip"."""
    accelerator, model, optimizer, scheduler, loader = prepared(lambda o: StepLR(o, 1, 0.5), steps=steps, nonfinite="skip")
    weights, skipped = [], []
    for i, batch in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch[0]).mean() * (math.nan if i == 3 else 1e-3))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        weights.append(model.weight.item())
        skipped.append(accelerator.optimizer_step_was_skipped)
    assert weights[3] == weights[2]
    assert all(math.isfinite(w) for w in weights)
    # Within a window the answer is that of the window before.
    assert skipped == ([i == 3 for i in range(8)] if steps == 1 else [False] * 3 + [True] * 2 + [False] * 3)
    assert optimizer.param_groups[0]["lr"] == 0.5 ** (8 / steps - 1)
    assert accelerator.skipped_steps == 1


def meet_nan(policy: str, where: str) -> tuple[list[float], int, str]:
    """Train on; rank 1 meets NaN in its third loss, or in a gradient whose loss is finite."""
    world = World.start()
    accelerator = Accelerator(nonfinite=policy, seed=0)
    torch.manual_seed(0)
    bare = nn.Linear(1, 1)
    model, optimizer, loader = accelerator.prepare(bare, SGD(bare.parameters(), lr=0.01), DataLoader(DATA, batch_size=1))
    weights, told = [], ""
    for i, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(batch[0]).pow(2).mean()
            if i == 2 and accelerator.is_last_process:
                loss = loss * math.nan if where == "loss" else loss + (loss - loss.detach()).sqrt()
            try:
                accelerator.backward(loss)
                optimizer.step()
            except NonFiniteError as error:
                told = str(error)
                break
            optimizer.zero_grad()
        weights.append(bare.weight.item())
    weights.append(bare.weight.item())
    skipped = accelerator.skipped_steps
    accelerator.end_training()
    world.stop()
    return weights, skipped, told


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_value_that_is_not_finite_never_reaches_the_weights(size: int, where: str, ranks: Any) -> None:
    """Skipped on all ranks alike when one of them met it; a gradient that is NaN raises on all of them."""
    skipped = ranks(size, meet_nan, "skip", where)
    for weights, count, _ in skipped:
        assert weights[2] == weights[1]
        assert weights[3] != weights[2]
        assert all(math.isfinite(w) for w in weights)
        assert count == 1
        assert weights == skipped[0][0]
    if where == "gradient":
        for weights, _, told in ranks(size, meet_nan, "raise", where):
            assert weights[-1] == weights[-2] == skipped[0][0][1]
            assert "NaN or Inf (weight" in told


def test_a_prepared_optimizer_can_be_used_like_the_one_it_holds() -> None:
    """Closures, hooks, groups that are added, its state."""
    accelerator = Accelerator()
    model, other = nn.Linear(1, 1), nn.Parameter(torch.ones(1))
    inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, inner)
    accepted: Any = optimizer
    assert isinstance(accepted, Optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).mean()
        loss.backward()
        return loss.item()

    before = model.weight.item()
    optimizer.step(closure)
    assert calls == ["post"]
    assert optimizer.stepped
    assert model.weight.item() == pytest.approx(before - 0.1)
    optimizer.add_param_group({"params": [other], "lr": 0.5})
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    assert any(p is other for p in optimizer.parameters)
    optimizer.param_groups[0]["lr"] = 0.7
    assert inner.param_groups[0]["lr"] == 0.7
    assert optimizer.state is inner.state
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert "SGD" in repr(optimizer)


class Two(TrainingModule):
    """Two optimizers over one loss, each with its own scheduler."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(1, 1), nn.Linear(1, 1)
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.one(batch[0]) + self.two(batch[0])).pow(2).mean()
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        made = [SGD(self.one.parameters(), lr=1e-4), SGD(self.two.parameters(), lr=1e-4)]
        return made, [{"scheduler": StepLR(made[0], 1, 0.5), "interval": "step"}, StepLR(made[1], 1, 0.5)]


@pytest.mark.parametrize("manual", [False, True])
def test_global_step_counts_steps_whatever_the_number_of_optimizers(manual: bool, tmp_path: Path) -> None:
    """Lightning counts each optimizer's steps when it optimises manually. There the schedulers are the module's own business."""
    module = Two(manual=manual)
    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=2)
    trainer.fit(module, DataLoader(DATA, batch_size=2))
    assert trainer.global_step == 8
    last = [o.param_groups[0]["lr"] for o in trainer.optimizers.values()]
    assert last == ([1e-4, 1e-4] if manual else [1e-4 * 0.5**8, 1e-4 * 0.5**2])


def test_a_schedulers_frequency_and_the_modules_own_way_of_stepping(tmp_path: Path) -> None:
    calls: list[tuple[str, float | None]] = []

    class Own(Two):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("watched", float(batch_idx), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            made = SGD(self.parameters(), lr=1e-4)
            return [made], [
                {"scheduler": StepLR(made, 1, 0.5), "interval": "step", "frequency": 3},
                {"scheduler": ReduceLROnPlateau(made), "monitor": "watched", "frequency": 2},
            ]

        def lr_scheduler_step(self, scheduler: Any, metric: float | None) -> None:
            calls.append((type(scheduler).__name__, metric))
            super().lr_scheduler_step(scheduler, metric)

    trainer = Trainer(**QUIET, root=tmp_path, max_epochs=2)
    trainer.fit(Own(), DataLoader(DATA, batch_size=2))
    assert calls == [("StepLR", None), ("StepLR", None), ("ReduceLROnPlateau", 1.5)]


def test_the_modules_own_clipping_takes_the_place_of_the_trainers(tmp_path: Path) -> None:
    """It sees complete gradients in the loss's unit, also of a window with num_items, and nothing is clipped after it."""
    seen: list[float] = []

    class Own(TrainingModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.layer(batch[0]).sum(), "num_items": len(batch[0])}

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self.layer.weight.grad.item())  # pyright: ignore[reportOptionalMemberAccess]

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            assert (gradient_clip_val, gradient_clip_algorithm) == (0.5, "norm")
            self.clip_gradients(optimizer, 2.0)
            seen.append(self.layer.weight.grad.item())  # pyright: ignore[reportOptionalMemberAccess]

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=1.0)

    module = Own()
    before = module.layer.weight.item()
    loader = DataLoader(TensorDataset(torch.tensor([[1.0], [2.0], [9.0]])), batch_size=1)
    Trainer(**QUIET, root=tmp_path, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.5).fit(module, loader)
    assert seen == pytest.approx([1.5, 1.5, 9.0, 2.0], rel=1e-5)
    assert module.layer.weight.item() == pytest.approx(before - 3.5, rel=1e-5)
