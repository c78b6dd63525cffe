"""Checkpoints as a star: what any strategy writes, any other reads, through one format.

One process trains three steps: its checkpoint and its Hugging Face export are the canonical ones. Every strategy, on 1, 2 and 4
ranks, loads that checkpoint and at once writes a checkpoint and an export of its own, whose bytes are the canonical ones'; its
next ten losses are those of the one process that went on. The model is a Llama in float64, under AdamW with clipping.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.checkpoint.reader import Checkpoint
from drivetrain.strategies.contract import CASES, Case, _one_step, windows
from drivetrain.strategies.contract_models import GPT, Learner, Llama, MoELlama
from drivetrain.strategies.deepspeed_engine import library

BEFORE, AFTER = 3, 10
DOUBLE: Case = replace(next(c for c in CASES if c.name == "float64 adamw"), model="llama", clip=0.05, steps=BEFORE + AFTER + 1)
SINGLE: Case = replace(DOUBLE, dtype=torch.float32)  # DeepSpeed has no float64
"""One step more than is used: the last one is cut short."""

MODELS: dict[str, Any] = {
    "llama": lambda: Llama(1, kv_heads=4),  # four of everything: it can be cut by four
    "tied": lambda: GPT(1),
    "moe": lambda: MoELlama(1, layers=2),
}

Way = tuple[str, int]
"""A strategy on so many ranks."""


class Star:
    """A model on this rank, prepared by a strategy, and what is done to it."""

    def __init__(self, words: str, kind: str, case: Case, options: dict[str, Any]) -> None:
        self.case = case
        self.accelerator = Accelerator(strategy=make_strategy(words, **options))
        self.model: Learner = MODELS[kind]().to(case.dtype)
        self.prepared, self.optimizer = self.accelerator.prepare(
            self.model, torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.1)
        )
        self.step = self.accelerator.strategy.bind(self.model, "step")
        self.windows = list(windows(case))

    def train(self, first: int, last: int) -> list[float]:
        strategy, world = self.accelerator.strategy, self.accelerator.world
        what = {"model": self.model}, {"model": self.prepared}, [self.optimizer.optimizer], [self.step]
        return [_one_step(strategy, world, self.case, window, *what) for window in self.windows[first:last]]

    def write(self, folder: Path) -> None:
        self.accelerator.save_state(folder / "state", step=1)
        self.accelerator.save_model(self.model, folder / "export")

    def read(self, folder: Path) -> None:
        self.accelerator.load_state(folder / "state")


def canonical(folder: Path, kind: str, case: Case) -> tuple[list[float], list[float]]:
    """Train on one process, write in the middle; return the losses before and after that."""
    star = Star("single", kind, case, {})
    before = star.train(0, BEFORE)
    star.write(folder)
    after = star.train(BEFORE, BEFORE + AFTER)
    star.accelerator.end_training()
    return before, after


def ray(words: str, kind: str, case: Case, options: dict[str, Any], source: Path, folder: Path) -> list[float]:
    """Read the canonical checkpoint, write it again, and train on."""
    star = Star(words, kind, case, options)
    star.read(source)
    star.write(folder)
    losses = star.train(BEFORE, BEFORE + AFTER)
    star.accelerator.end_training()
    return losses


def export_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "export").iterdir())}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint, by name, read through `Checkpoint`."""
    with Checkpoint(next((folder / "state").glob("step-*"))) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def check(n: int, words: str, options: dict[str, Any], kind: str, case: Case, ranks: Any, tmp_path: Path) -> None:
    """Hold one way against the canonical one."""
    source, folder = tmp_path / "canonical", tmp_path / "way"
    _, after = ranks(1, canonical, source, kind, case)[0]
    found = ranks(n, ray, words, kind, case, options, source, folder, timeout=120)
    assert export_of(folder) == export_of(source)
    ours, theirs = state_of(folder), state_of(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert any(name.endswith("exp_avg_sq") for name in theirs)
    for losses in found:
        assert losses == pytest.approx(after, rel=1e-12 if case.dtype == torch.float64 else 2e-6)


CASES_OF_STAR: list[Any] = [
    ("single", 1, {}, "llama"),  # refused on more, as hsdp is on less than four
    *((words, n, {}, "llama") for words in ("ddp", "fsdp") for n in (1, 2, 4)),
    ("hsdp", 4, {}, "llama"),
    *((words, n, {}, "llama") for words in ("tp", "tp+sp", "cp", "pp") for n in (1, 2, 4)),
    *(("cp", 4, {"context_parallel": method}, "llama") for method in ("all-gather", "ring", "ulysses")),
    *(("pp", 2, {"pipeline": schedule}, "llama") for schedule in ("gpipe", "interleaved", "zbv")),
    *((words, 4, {}, "llama") for words in ("fsdp:2+tp:2", "fsdp:2+pp:2", "fsdp:2+cp:2", "tp:2+pp:2", "cp:2+tp:2")),
    *((words, n, {}, "moe") for words, n in (("ep:2", 2), ("ep:4", 4), ("ep:2", 4), ("fsdp", 2), ("fsdp", 1), ("ddp", 2))),
    *((words, n, {}, "tied") for words, n in (("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("tp", 2), ("fsdp:2+tp:2", 4))),
    *(("pp", n, {}, "tied") for n in (2, 4)),
    ("pp", 2, {"pipeline": "dualpipev"}, "tied"),
    *((words, 4, {}, "tied") for words in ("fsdp:2+pp:2", "tp:2+pp:2")),
]
FAST = [("fsdp", 2, {}, "llama"), ("fsdp:2+tp:2", 4, {}, "tied"), ("pp", 2, {}, "tied")]


def _name(way: Any) -> str:
    words, n, options, kind = way
    return "-".join([words, *options.values(), str(n), kind])


@pytest.mark.parametrize("way", FAST, ids=_name)
def test_a_strategy_writes_the_bytes_it_read_and_goes_on_as_one_process(way: Any, ranks: Any, tmp_path: Path) -> None:
    words, n, options, kind = way
    check(n, words, options, kind, DOUBLE, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in CASES_OF_STAR if way not in FAST], ids=_name)
def test_every_strategy_writes_the_bytes_it_read_and_goes_on_as_one_process(way: Any, ranks: Any, tmp_path: Path) -> None:
    words, n, options, kind = way
    check(n, words, options, kind, DOUBLE, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="waits for the package deepspeed")
@pytest.mark.parametrize(("stage", "n"), [(2, 2), (3, 1), (3, 2), (3, 4)])
def test_deepspeed_writes_the_bytes_it_read(stage: int, n: int, ranks: Any, tmp_path: Path) -> None:
    """In fp32, which is what its masters are."""
    library(torch.device("cpu"))
    check(n, f"deepspeed:{stage}", {}, "llama", SINGLE, ranks, tmp_path)


# -- pairs ------------------------------------------------------------------------------------------------------------------
SIX: list[Way] = [("ddp", 2), ("fsdp", 4), ("hsdp", 4), ("fsdp:2+tp:2", 4), ("cp", 2), ("pp", 2)]


def writes(words: str, folder: Path) -> list[float]:
    star = Star(words, "llama", DOUBLE, {})
    losses = star.train(0, BEFORE)
    star.write(folder)
    star.accelerator.end_training()
    return losses


def reads_all(words: str, folders: dict[str, Path], own: Path) -> dict[str, list[float]]:
    """Read what each of the others wrote, one after the other, write it again, and train on."""
    star = Star(words, "llama", DOUBLE, {})
    found: dict[str, list[float]] = {}
    for name, folder in folders.items():
        star.read(folder)
        star.write(own / name)
        found[name] = star.train(BEFORE, BEFORE + AFTER)
    star.accelerator.end_training()
    return found


def pairs(ways: list[Way], ranks: Any, tmp_path: Path) -> None:
    before, after = ranks(1, canonical, tmp_path / "canonical", "llama", DOUBLE)[0]
    folders = {f"{words} on {n}": tmp_path / f"{words} on {n}" for words, n in ways}
    for (words, n), folder in zip(ways, folders.values(), strict=True):
        for losses in ranks(n, writes, words, folder):
            assert losses == pytest.approx(before, rel=1e-12)
    for (words, n), name in zip(ways, folders, strict=True):
        others = {other: folder for other, folder in folders.items() if other != name}
        for found in ranks(n, reads_all, words, others, tmp_path / "by" / name, timeout=240):
            assert found == {other: pytest.approx(after, rel=1e-12) for other in others}
    for writer, reader in itertools.permutations(folders, 2):
        assert export_of(tmp_path / "by" / reader / writer) == export_of(folders[writer]), (writer, reader)


def test_two_strategies_read_each_other(ranks: Any, tmp_path: Path) -> None:
    pairs([("fsdp", 2), ("tp", 2)], ranks, tmp_path)


@pytest.mark.slow
def test_all_ordered_pairs_of_six_strategies(ranks: Any, tmp_path: Path) -> None:
    """Thirty of them. The export that the reader writes is the writer's, bit for bit."""
    pairs(SIX, ranks, tmp_path)
