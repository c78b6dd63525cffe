"""fsdp and hsdp through the Trainer and the Accelerator: the numbers of a plain loop, resumed bit for bit, on other ranks too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.world import World
from resume_jobs import Job, read_ledger, train
from test_resume import resumed_runs_are_exact
from test_same_numbers import CASES, Case, Found, by_accelerator, by_trainer, compare, merged, plain_loop

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
