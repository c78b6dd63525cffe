"""fsdp and hsdp through the Trainer and the Accelerator: the numbers of a plain loop, resumed bit for bit, on other ranks too."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, ParallelPlan, Trainer, TrainingModule
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.world import World
from resume_jobs import Job, read_ledger, train
from test_resume import resumed_runs_are_exact
from test_same_numbers import CASES, QUIET, Case, Found, by_accelerator, by_trainer, compare, merged, plain_loop
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FAST = (
    "adamw, windows of 3 cut short, 50 steps",
    "num_items, no items on a rank and in a window",
    "two optimizers, clipped, a schedule by steps",
)


def both(cases: list[Case], ranks: int, root: Path, strategy: str) -> dict[str, tuple[Found, Found]]:
    world = World.start("cpu", need_group=True)
    try:
        return {
            case.name: (by_trainer(case, ranks, root, strategy=strategy), by_accelerator(case, ranks, strategy=strategy))
            for case in cases
        }
    finally:
        world.stop()


def check(cases: list[Case], results: list[dict[str, tuple[Found, Found]]]) -> None:
    for case in cases:
        truth = plain_loop(case)
        for way in (0, 1):
            compare(case, merged([result[case.name][way] for result in results]), truth)


@pytest.mark.parametrize(("strategy", "size"), [("fsdp", 2), ("hsdp", 4)])
def test_trainer_and_raw_loop_give_the_numbers_of_a_plain_loop(strategy: str, size: int, ranks: Any, tmp_path: Path) -> None:
    """The model has a 0-d parameter; the raw loop's optimizers are built before the model is cut up."""
    cases = [replace(c, epochs=min(c.epochs, 4)) for c in CASES if c.name in FAST]
    check(cases, ranks(size, both, cases, size, tmp_path, strategy))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "size"), [("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_all_cases_give_the_numbers_of_a_plain_loop(strategy: str, size: int, ranks: Any, tmp_path: Path) -> None:
    check(CASES, ranks(size, both, CASES, size, tmp_path, strategy, timeout=300))


def resumed(strategy: str, root: Path, size: int) -> None:
    """Dropout, BatchNorm, random augmentation, three schedulers, validation; the micro-batches' last one is ragged."""
    (root / "a").mkdir(exist_ok=True)
    resumed_runs_are_exact(
        Job(epochs=2, batch_size=4 if size == 2 else 3, options={"strategy": strategy}), root / "a", (2, 4), (0,)
    )
    if size == 2:
        (root / "b").mkdir(exist_ok=True)
        options = {"strategy": strategy, "accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
        resumed_runs_are_exact(Job(epochs=2, workers=1, num_items=True, options=options), root / "b", (1, 2))


@pytest.mark.parametrize(("strategy", "size"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_never_stopped(
    strategy: str, size: int, ranks: Any, tmp_path: Path
) -> None:
    ranks(size, resumed, strategy, tmp_path, size, timeout=120)


def losses_of(root: Path, job: Job, strategy: str, **options: Any) -> dict[int, float]:
    world = World.start("cpu", need_group=True)
    try:
        result = train(job, root, ledger=root, strategy=strategy, **options)
    finally:
        world.stop()
    steps = read_metrics(Path(result.folder))
    return {x["step"]: x["metrics"]["train_loss_step"] for x in steps if "train_loss_step" in x["metrics"]}


STAR = [
    (("single", 1), ("fsdp", 2)),
    (("fsdp", 2), ("single", 1)),
    (("ddp", 2), ("fsdp", 4)),
    (("fsdp", 4), ("ddp", 2)),
    (("fsdp", 4), ("fsdp", 1)),
    (("hsdp", 4), ("fsdp", 2)),
    (("fsdp", 1), ("hsdp", 4)),
]


@pytest.mark.parametrize(("before", "after"), [STAR[0], STAR[3], *(pytest.param(*s, marks=pytest.mark.slow) for s in STAR)])
def test_any_strategy_on_any_number_of_ranks_goes_on_from_any_other(
    before: tuple[str, int], after: tuple[str, int], ranks: Any, tmp_path: Path
) -> None:
    """With the global batch fixed; weights, AdamW's state and the data's position all cross."""
    job = Job(epochs=2, batch_size=2, dropout=0.0, batch_norm=False, validate=False, options={"global_batch_size": 8})
    (expected,) = ranks(1, losses_of, tmp_path / "whole", job, "single")
    ranks(before[1], losses_of, tmp_path / "cut", job, before[0], max_steps=3)
    losses = ranks(after[1], losses_of, tmp_path / "cut", job, after[0], resume="auto")[0]
    assert sorted(losses) == sorted(expected)
    for step, loss in expected.items():
        assert losses[step] == pytest.approx(loss, rel=1e-6)
    for numbers in read_ledger(tmp_path / "cut").values():
        assert sorted(n for batch in numbers for n in batch) == list(range(job.samples))


class Small(TrainingModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.head(self.body(x)) * self.scale, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.body(batch[0])) * self.scale

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data(size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(18, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=size)


def every_call(strategy: str, root: Path) -> dict[str, Any]:
    """Validated before anything was trained, trained, validated, predicted, trained again."""
    trainer = Trainer(**QUIET, root=root, strategy=strategy, max_epochs=1)
    module = Small()
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    before = trainer.validate(module, data(size))[0]["val_loss"]
    trainer.fit(module, data(size), data(size))
    after = trainer.validate(module, data(size))[0]["val_loss"]
    predicted = torch.cat(trainer.predict(module, data(size)))
    found = {
        "before": before,
        "after": after,
        "predicted": trainer.world.all_reduce(predicted.sum()).item(),
        "rows": trainer.world.all_reduce(torch.tensor(len(predicted))).item(),
        "best": trainer.metrics["val_loss"],
    }
    trainer.max_epochs = 2
    trainer.fit(module, data(size), data(size))
    found["again"] = trainer.metrics["val_loss"]
    trainer.accelerator.end_training()
    return found


def test_all_calls_of_the_trainer_give_what_one_process_gives(ranks: Any, tmp_path: Path) -> None:
    (truth,) = ranks(1, every_call, "single", tmp_path / "single")
    for found in ranks(2, every_call, "fsdp", tmp_path / "fsdp"):
        assert found == pytest.approx(truth, rel=1e-5)
    assert truth["after"] < truth["before"]


def saved(strategy: str, root: Path, *, load: bool) -> list[float]:
    """The raw API: a few steps, everything saved, a few more; or everything loaded, and the same few more."""
    accelerator = Accelerator(strategy=strategy)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data(4 // accelerator.world.size))
    losses = []

    def epoch() -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model.predict_step(batch, 0), batch[1])
                optimizer.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                share = loader.num_samples / loader.global_samples
                losses.append(accelerator.world.all_reduce(loss.detach() * share).item())

    if not load:
        epoch()
        accelerator.save_state(root / "state")
        accelerator.save_model(model, root / "model")
        whole = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            from safetensors.torch import load_file

            exported = load_file(root / "model" / "model.safetensors")
            assert all(torch.equal(exported[n], t) for n, t in whole.items())
            assert list(whole) == list(Small().state_dict())
        losses.clear()
    else:
        accelerator.load_state(root / "state")
    epoch()
    accelerator.end_training()
    return losses


@pytest.mark.parametrize(("strategy", "size", "other"), [("fsdp", 2, "ddp"), ("hsdp", 4, "fsdp")])
def test_what_the_raw_api_saves_is_loaded_by_itself_and_by_others(
    strategy: str, size: int, other: str, ranks: Any, tmp_path: Path
) -> None:
    expected = ranks(size, saved, strategy, tmp_path, load=False)[0]
    assert ranks(size, saved, strategy, tmp_path, load=True)[0] == expected
    assert ranks(2, saved, other, tmp_path, load=True)[0] == pytest.approx(expected, rel=1e-5)
    assert ranks(1, saved, "single", tmp_path, load=True)[0] == pytest.approx(expected, rel=1e-5)


def adversaries(strategies: dict[str, str]) -> list[float]:
    """Two models with an optimizer each, trained in turns through the raw API."""
    accelerator = Accelerator(strategy="auto", models=strategies, device="cpu")
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    judge = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    models, optimizers = accelerator.prepare_models(
        {"maker": maker, "judge": judge},
        lambda: {
            "maker": torch.optim.SGD(maker.parameters(), lr=0.1, momentum=0.9),
            "judge": torch.optim.SGD(judge.parameters(), lr=0.1),
        },
    )
    generator = torch.Generator().manual_seed(2)
    rank, count = accelerator.world.rank, accelerator.world.size
    losses = []
    for _ in range(5):
        noise, real = torch.randn(8, 3, generator=generator).double(), torch.randn(8, 4, generator=generator).double()
        noise, real = noise.tensor_split(count)[rank], real.tensor_split(count)[rank]
        made = models["maker"](noise)
        apart = models["judge"](made.detach()).mean() - models["judge"](real).mean() + judge_norm(models["judge"], real)
        optimizers[1].zero_grad()
        accelerator.backward(apart)
        optimizers[1].step()
        fooled = -models["judge"](made).mean()
        optimizers[0].zero_grad()
        accelerator.backward(fooled)
        optimizers[0].step()
        losses.append(accelerator.world.all_reduce((apart + fooled).detach(), "mean").item())
    accelerator.end_training()
    return losses


def judge_norm(judge: nn.Module, real: Tensor) -> Tensor:
    return judge(real).square().mean()


def test_models_with_strategies_of_their_own_train_in_turns(ranks: Any) -> None:
    (truth,) = ranks(1, adversaries, {})
    assert ranks(2, adversaries, {"maker": "fsdp", "judge": "fsdp"})[0] == pytest.approx(truth, rel=1e-12)
    assert ranks(2, adversaries, {"maker": "fsdp"})[0] == pytest.approx(truth, rel=1e-12)


def with_plan(plan: ParallelPlan, strategy: str, root: Path) -> tuple[str, str, dict[str, str]]:
    trainer = Trainer(**QUIET, root=root, plan=plan, strategy=strategy, max_steps=1, max_epochs=1)
    trainer.fit(Small(), data(1))
    found = trainer.strategy.name, trainer.accelerator.strategy_reason, dict(trainer.strategy.explain())
    trainer.accelerator.end_training()
    return found


def test_a_plan_says_the_strategy(ranks: Any, tmp_path: Path) -> None:
    name, reason, rows = ranks(4, with_plan, ParallelPlan(dp_replicate=2, dp_shard=-1), "auto", tmp_path)[0]
    assert (name, reason) == ("hsdp", "chosen: the plan is dp_replicate=2 dp_shard=-1")
    assert rows["plan"] == "dp_replicate=2 dp_shard=2   asked for"
    assert ranks(1, with_plan, ParallelPlan(dp_shard=-1), "auto", tmp_path)[0][0] == "fsdp"
    assert ranks(2, with_plan, ParallelPlan(dp_replicate=2), "auto", tmp_path)[0][0] == "ddp"
    with pytest.raises(ConfigError, match="names dp_shard, and strategy='ddp' holds a whole copy"):
        ranks(2, with_plan, ParallelPlan(dp_shard=2), "ddp", tmp_path)
    with pytest.raises(ConfigError, match="launch 3 processes"):
        ranks(2, with_plan, ParallelPlan(dp_shard=3), "auto", tmp_path)
    with pytest.raises(ConfigError, match="plan must be a ParallelPlan"):
        ranks(1, with_plan, "dp_shard=2", "auto", tmp_path)
