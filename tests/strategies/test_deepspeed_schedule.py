"""The scheduler (and the optimizer) of a DeepSpeed JSON, by their stand-ins.

The truth is a plain PyTorch loop in one process, in which the class that the JSON names (DeepSpeed's own, or torch's) is stepped
after every optimizer step; and numbers computed by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, DeepSpeedStrategy, DummyOptim, DummyScheduler, Trainer, TrainingModule
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.errors import ConfigError, UnknownName
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

library(torch.device("cpu"))

from deepspeed.runtime import lr_schedules  # noqa: E402  # by `library`, quietly

STEPS, WINDOW = 6, 2
X = torch.randn(STEPS * WINDOW * 4, 5, generator=torch.Generator().manual_seed(4))
ADAM = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
FIXED = {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}
WARM = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"}
DECAY = {"type": "WarmupDecayLR", "params": WARM | {"total_num_steps": "auto"}}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def json(stage: int, scheduler: dict[str, Any] | None, optimizer: dict[str, Any] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    return found | {k: v for k, v in (("scheduler", scheduler), ("optimizer", optimizer)) if v is not None}


def plain(schedule: Callable[[Any], Any], lr: float = 1e-2, weight_decay: float = 0.0) -> tuple[list[float], dict[str, Tensor]]:
    """Return the learning rate of each step, and the weights."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    scheduler = schedule(optimizer)
    rates = []
    for x in X.chunk(STEPS):
        model(x).pow(2).mean().backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return rates, model.state_dict()


def trained(
    config: dict[str, Any],
    optimizer: Callable[[Any], Any],
    schedule: Callable[[Any], Any],
    save: Path | None = None,
    load: Path | None = None,
    steps: range = range(STEPS),
) -> tuple[list[float], dict[str, list[float]]]:
    """The same on this rank's part of each batch, in windows of two, `scheduler.step` called on each micro-batch."""
    accelerator = Accelerator(strategy=DeepSpeedStrategy(config=config), gradient_accumulation_steps=WINDOW)
    model = net()
    made = optimizer(model.parameters())
    prepared, stepper, scheduler = accelerator.prepare(model, made, schedule(made))
    if load is not None:
        accelerator.load_state(load)
    rates = []
    for i in steps:
        for x in X.chunk(STEPS)[i].chunk(WINDOW):
            with accelerator.accumulate(prepared):
                mine = x[accelerator.process_index :: accelerator.num_processes]
                accelerator.backward(prepared(mine).pow(2).mean())
                if accelerator.sync_gradients:
                    rates.append(stepper.param_groups[0]["lr"])
                stepper.step()
                scheduler.step()
                stepper.zero_grad()
    assert scheduler.get_last_lr() == [stepper.param_groups[0]["lr"]]
    if save is not None:
        accelerator.save_state(save)
    weights = {n: t.flatten().tolist() for n, t in accelerator.get_state_dict(prepared).items()}
    accelerator.end_training()
    return rates, weights


def assert_same(found: tuple[list[float], dict[str, list[float]]], truth: tuple[list[float], dict[str, Tensor]]) -> None:
    assert found[0] == truth[0]
    for name, weight in truth[1].items():
        assert found[1][name] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-6), name


def test_auto_values_of_optimizer_and_scheduler_come_from_their_dummies(ranks: Any) -> None:
    """Accelerate's template zero_stage2_config.json; warm-up to 1e-2 in 2 steps, then down to 0 at step 6: by hand."""
    found = ranks(
        2,
        trained,
        json(2, DECAY, ADAM),
        lambda p: DummyOptim(p, lr=1e-2),
        lambda o: DummyScheduler(o, total_num_steps=6, warmup_num_steps=2),
    )[0]
    assert found[0] == pytest.approx([0.0, 0.0, 0.005, 0.01, 0.0075, 0.005])
    assert_same(found, plain(lambda o: lr_schedules.WarmupDecayLR(o, 6, 0.0, 1e-2, 2, "linear")))


SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "WarmupLR": ({"warmup_num_steps": 3, "warmup_max_lr": 0.02}, lambda o: lr_schedules.WarmupLR(o, 0.0, 0.02, 3)),
    "WarmupCosineLR": (
        {"total_num_steps": 6, "warmup_num_steps": 2, "cos_min_ratio": 0.1},
        lambda o: lr_schedules.WarmupCosineLR(o, 6, 0.0, 2, 0.1),
    ),
    "OneCycle": (  # the momentum too
        {"cycle_min_lr": 1e-3, "cycle_max_lr": 2e-2, "cycle_first_step_size": 3, "cycle_min_mom": 0.7},
        lambda o: lr_schedules.OneCycle(o, 1e-3, 2e-2, cycle_first_step_size=3, cycle_min_mom=0.7),
    ),
    "LRRangeTest": (
        {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 2},
        lambda o: lr_schedules.LRRangeTest(o, 1e-3, 2),
    ),
    "StepLR": ({"step_size": 2, "gamma": 0.5}, lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_each_class_steps_once_for_each_optimizer_step(kind: str, stage: int, ranks: Any) -> None:
    """Over an optimizer of torch; under stage 0 it is the same object that is stepped."""
    params, schedule = SCHEDULES[kind]
    section = {"type": kind, "params": params}
    found = ranks(2, trained, json(stage, section), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0), DummyScheduler)[0]
    assert_same(found, plain(schedule))


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_is_saved_and_goes_on_where_it_stood(stage: int, ranks: Any, tmp_path: Path) -> None:
    """OneCycle has the most to remember: the rate, and Adam's betas."""
    params, _ = SCHEDULES["OneCycle"]
    given = json(stage, {"type": "OneCycle", "params": params}, ADAM), lambda p: DummyOptim(p, lr=1e-2), DummyScheduler
    straight = ranks(2, trained, *given)[0]
    ranks(2, trained, *given, save=tmp_path / "half", steps=range(3))
    rest = ranks(2, trained, *given, load=tmp_path / "half", steps=range(3, STEPS))[0]
    assert rest[0] == straight[0][3:]
    assert rest[1] == straight[1]


def test_a_callable_makes_the_scheduler_over_the_optimizer_of_the_json(ranks: Any) -> None:
    """What the JSON fixes wins over the stand-in's defaults, and the scheduler is made when it is known."""
    fixed = {"type": "AdamW", "params": {"lr": 2e-2, "weight_decay": 0.1, "torch_adam": True}}
    found = ranks(
        1,
        trained,
        json(2, None, fixed),
        DummyOptim,
        lambda o: DummyScheduler(
            o, lr_scheduler_callable=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, lambda n: 1 / (n + 1))
        ),
    )[0]
    assert found[0] == pytest.approx([2e-2 / n for n in range(1, STEPS + 1)])
    truth = plain(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)), lr=2e-2, weight_decay=0.1)
    assert_same(found, truth)


def test_a_group_of_its_own_keeps_what_it_says_and_the_rest_is_the_jsons(ranks: Any) -> None:
    """Frozen groups, which ZeRO drops, in between."""

    def groups() -> list[dict[str, Any]]:
        strategy = DeepSpeedStrategy(config=json(2, None, FIXED))
        accelerator = Accelerator(strategy=strategy)
        model = net()
        model[0].bias.requires_grad_(False)
        asked = [{"params": [model[0].bias]}, {"params": [model[0].weight], "lr": 0.5, "weight_decay": 0.25}]
        optimizer = DummyOptim([*asked, {"params": [*model[2].parameters()]}], weight_decay=0.125)
        prepared = accelerator.prepare(model, optimizer)[1]
        zero = strategy.engine(model).optimizer.optimizer
        inner = [{k: g[k] for k in ("lr", "weight_decay")} for g in zero.param_groups]
        found = [{k: g[k] for k in ("lr", "weight_decay")} for g in prepared.param_groups[1:]]
        accelerator.end_training()
        assert found == inner
        return found

    assert ranks(1, groups)[0] == [{"lr": 0.5, "weight_decay": 0.25}, {"lr": 0.1, "weight_decay": 0.125}]


def refused(config: dict[str, Any], optimizer: Callable[[Any], Any], schedule: Callable[[Any], Any]) -> str:
    with pytest.raises((ConfigError, UnknownName)) as caught:
        trained(config, optimizer, schedule)
    return str(caught.value)


REFUSED: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "a misspelt type": (json(2, {"type": "WarmupDecyLR"}), torch.optim.AdamW, DummyScheduler, "Did you mean 'WarmupDecayLR'"),
    "a misspelt parameter": (
        json(2, {"type": "WarmupLR", "params": {"warmup_steps": 3}}),
        torch.optim.AdamW,
        DummyScheduler,
        "WarmupLR of the JSON's scheduler takes no 'warmup_steps'.",
    ),
    "a total that nobody knows": (
        json(2, DECAY),
        torch.optim.AdamW,
        DummyScheduler,
        "needs 'total_num_steps', which nobody said",
    ),
    "two totals": (
        json(2, {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}),
        torch.optim.AdamW,
        lambda o: DummyScheduler(o, total_num_steps=8),
        "scheduler.params.total_num_steps is 9 in the DeepSpeed JSON, and DummyScheduler says 8",
    ),
    "no section": (json(2, None), torch.optim.AdamW, DummyScheduler, "which has no section 'scheduler'"),
    "two schedulers": (
        json(2, DECAY),
        torch.optim.AdamW,
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        r"has a scheduler (WarmupDecayLR), and the run brings its own",
    ),
    "betas of SGD": (
        json(2, {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_min_mom": 0.5}}),
        lambda p: torch.optim.SGD(p, lr=0.1),
        DummyScheduler,
        "it cycles Adam's betas, of which SGD has none",
    ),
    "a value that cannot be": (
        json(2, {"type": "WarmupLR", "params": {"warmup_num_steps": -1}}),
        torch.optim.AdamW,
        DummyScheduler,
        "cannot be made with {'warmup_num_steps': -1} over AdamW: warmup_num_steps must be a positive integer, got -1",
    ),
    "two learning rates": (
        json(2, None, FIXED),
        lambda p: DummyOptim(p, lr=0.2),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        "optimizer.params.lr is 0.1 in the JSON, and DummyOptim says 0.2",
    ),
    "a scheduler over a rate that was not known": (
        json(2, None, FIXED),
        DummyOptim,
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        "made over DummyOptim with the learning rate 0.001, and the DeepSpeed JSON says 0.1",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_go_together_is_named(case: str, ranks: Any) -> None:
    config, optimizer, schedule, words = REFUSED[case]
    assert words in ranks(1, refused, config, optimizer, schedule)[0]


def unprepared() -> str:
    accelerator = Accelerator(strategy=DeepSpeedStrategy(config=json(2, DECAY)))
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator.backward(model(X).pow(2).mean())
    with pytest.raises(ConfigError) as caught:
        optimizer.step()
    accelerator.end_training()
    return str(caught.value)


def test_a_scheduler_of_the_json_that_nobody_prepared_is_no_scheduler_that_stands_still(ranks: Any) -> None:
    assert "has a scheduler (WarmupDecayLR), and none was prepared" in ranks(1, unprepared)[0]


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_a_stand_in_under_another_strategy_is_refused(strategy: str, ranks: Any) -> None:
    def said() -> list[str]:
        accelerator = Accelerator(strategy=strategy)
        model, found = net(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for objects in ((model, DummyOptim(model.parameters())), (optimizer, DummyScheduler(optimizer))):
            with pytest.raises(ConfigError) as caught:
                accelerator.prepare(*objects)
            found.append(str(caught.value))
        accelerator.end_training()
        return found

    first, second = ranks(1, said)[0]
    assert f"DummyOptim stands for the optimizer of a DeepSpeed JSON, and strategy '{strategy}' has none" in first
    assert f"DummyScheduler stands for the scheduler of a DeepSpeed JSON, and strategy '{strategy}' has none" in second


class Module(TrainingModule):
    """`stand_ins` says what configure_optimizers returns."""

    def __init__(self, stand_ins: str, halt: bool = False) -> None:
        super().__init__()
        self.net = net()
        self.stand_ins, self.halt = stand_ins, halt
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])  # pyright: ignore[reportAttributeAccessIssue]
        return self.net(batch[0]).pow(2).mean()

    def on_train_epoch_end(self) -> None:
        if self.halt:
            self.trainer.stop("half-way")

    def configure_optimizers(self) -> Any:
        if self.stand_ins == "none":
            return None
        optimizer = DummyOptim(self.parameters(), lr=1e-2)
        if self.stand_ins == "dict":
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": DummyScheduler(optimizer)}}
        return [optimizer], [DummyScheduler(optimizer)]


def fitted(stand_ins: str, root: Path, *, resume: Any = None, lr: Any = "auto", halt: bool = False) -> tuple[list[float], Any]:
    optimizer = {"type": "AdamW", "params": {"lr": lr, "weight_decay": "auto", "torch_adam": True}}
    section = {"type": "WarmupDecayLR", "params": WARM | {"total_num_steps": "auto", "warmup_num_steps": 2}}
    strategy = DeepSpeedStrategy(config=json(2, section, optimizer))
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": WINDOW, "seed": 0, "enable_progress_bar": False}
    trainer = Trainer(**options, strategy=strategy, root=root, name="run", resume=resume)
    module = Module(stand_ins, halt)
    batches = DataLoader(TensorDataset(X[: len(X) // 2]), batch_size=4 // trainer.world.size)
    trainer.fit(module, batches)
    weights = {n: t.tolist() for n, t in trainer.accelerator.get_state_dict(module).items()}
    trainer.accelerator.end_training()
    return module.rates[::WINDOW], weights


def test_the_trainer_fills_the_total_and_steps_after_each_optimizer_step(ranks: Any, tmp_path: Path) -> None:
    """Two epochs of three steps: the total is 6. configure_optimizers returns stand-ins, or leaves it to the JSON by None."""
    rates, weights = ranks(2, fitted, "list", tmp_path / "list")[0]
    assert rates == pytest.approx([0.0, 0.0, 0.005, 0.01, 0.0075, 0.005])
    assert ranks(2, fitted, "none", tmp_path / "none", lr=1e-2)[0] == (rates, weights)


@pytest.mark.slow
def test_the_trainer_resumes_it(ranks: Any, tmp_path: Path) -> None:
    straight = ranks(2, fitted, "dict", tmp_path / "straight")[0]

    ranks(2, fitted, "dict", tmp_path / "cut", halt=True)
    rest = ranks(2, fitted, "dict", tmp_path / "cut", resume="auto")[0]
    assert (rest[0], rest[1]) == (straight[0][3:], straight[1])


def test_none_without_a_section_is_refused_as_ever(ranks: Any, tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(ConfigError) as caught:
            Trainer(strategy="deepspeed:2", max_steps=1, root=tmp_path, enable_progress_bar=False).fit(
                Module("none"), DataLoader(TensorDataset(X), batch_size=4)
            )
        return str(caught.value)

    assert "configure_optimizers returned None" in ranks(1, said)[0]
