"""What a step costs beside your model: function calls (exact on any machine) and CPU time (paired), ours and the peers'.

    python tests/benchmarks/overhead.py                  calls and times of every installed framework, a table
    python tests/benchmarks/overhead.py --calls          calls only: seconds instead of minutes
    python tests/benchmarks/overhead.py --ddp            two ranks: CPU time of a rank's step above plain DistributedDataParallel
    python tests/benchmarks/overhead.py --fetching       our batched fetching against a plain DataLoader loop
    ... --json FILE --frameworks "accelerate;Fabric"

calls   Python and C function calls per optimizer step (sys.setprofile), above the raw loop with the same DataLoader, over a
        data set that is read row by row (over a TensorDataset ours are negative: its rows are fetched in batches).
time    one step of the raw loop runs inside every forward of the framework: the two alternate step by step in one process, so
        whatever the machine does to one it does to the other. Ratio = median of (step / mean of its two raw neighbours), divided
        by the same figure of raw against raw (the control, whose own ratio is printed); the interval is a bootstrap's 95 %.
Peers that are not installed are left out: pip install accelerate lightning transformers pytorch-ignite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from frameworks import BATCH, FRAMEWORKS, Job, quiet
from torch import nn
from torch.utils.data import DataLoader

LOW, HIGH = 100, 200  # the steps between which calls are counted: two of the log points of every 50 steps are among them


def count_calls(name: str, *, logs: int = 0, layers: int = 1) -> float:
    """Return the Python and C function calls per optimizer step of a framework, between step LOW and HIGH."""
    calls = ticks = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == LOW:
            sys.setprofile(profile)
        elif ticks == HIGH:
            sys.setprofile(None)

    with quiet():
        FRAMEWORKS[name](Job(tick, steps=HIGH + 20, logs=logs, layers=layers))
    return round(calls / (HIGH - LOW), 1)


class PairedClock:
    """Runs one raw step at each tick and keeps the CPU time of it and of the step around it."""

    def __init__(self, reference: Iterator[None], warm_up: int) -> None:
        self.reference, self.warm_up = reference, warm_up
        self.entries: list[tuple[int, int]] = []

    def tick(self) -> None:
        start = time.process_time_ns()
        next(self.reference, None)
        self.entries.append((start, time.process_time_ns()))

    def ratios(self) -> list[float]:
        """Each step's time over the mean of the two raw steps around it."""
        entries = self.entries[self.warm_up :]
        found = []
        for (a_start, a_end), (b_start, b_end) in itertools.pairwise(entries):
            raw = ((a_end - a_start) + (b_end - b_start)) / 2
            found.append((b_start - a_end) / raw)
        return found


def reference_steps(job: Job, ddp: bool) -> Iterator[None]:
    """The raw loop over its own model and loader, one step for each `next`."""
    model: nn.Module = job.model()
    if ddp:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = job.optimizer(model.parameters())
    while True:
        for x, y in DataLoader(job.dataset(), batch_size=BATCH):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            yield


def paired(name: str, *, steps: int, logs: int = 0, ddp: bool = False, ranks: int = 1, batched: bool = False) -> list[float]:
    """Return the ratios of one run of a framework."""
    clock = PairedClock(reference_steps(Job(lambda: None, steps=steps, batched=batched), ddp), warm_up=50)
    job = Job(clock.tick, steps=steps, logs=logs, ranks=ranks, batched=batched)
    with quiet():
        FRAMEWORKS[name](job)
    return clock.ratios()


def interval(values: list[float], control: float, rounds: int = 400) -> tuple[float, float, float]:
    """Return (median, low, high) of `values` over `control`: a bootstrap over blocks of 20 neighbours (shared noise)."""
    generator = random.Random(0)
    blocks = [values[i : i + 20] for i in range(0, len(values), 20)]
    medians = sorted(statistics.median([v for b in generator.choices(blocks, k=len(blocks)) for v in b]) for _ in range(rounds))
    low, high = medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]
    return statistics.median(values) / control, low / control, high / control


def call_table(names: list[str]) -> dict[str, dict[str, float]]:
    """Print and return calls above raw, per framework: plain, with one and ten logged scalars, and with 102 parameter tensors."""
    base, deep = count_calls("raw"), count_calls("raw", layers=50)
    print(f"calls per optimizer step above the raw loop ({base:g}; with 102 parameter tensors {deep:g})")
    print(f"  {'framework':<32}{'plain':>10}{'1 log':>10}{'10 logs':>10}{'102 tensors':>13}")
    found: dict[str, dict[str, float]] = {}
    for name in names:
        row = {
            "plain": count_calls(name) - base,
            "one_log": count_calls(name, logs=1) - base,
            "ten_logs": count_calls(name, logs=10) - base,
            "deep": count_calls(name, layers=50) - deep,
        }
        found[name] = row
        print(f"  {name:<32}{row['plain']:>10.1f}{row['one_log']:>10.1f}{row['ten_logs']:>10.1f}{row['deep']:>13.1f}", flush=True)
    return found


def time_table(names: list[str], *, steps: int, rounds: int, batched: bool) -> dict[str, dict[str, float]]:
    """Print and return the paired CPU time of each framework, with its interval; the control first."""
    controls = [statistics.median(paired("raw", steps=steps, batched=batched)) for _ in range(rounds)]
    control = statistics.median(controls)
    data = "a TensorDataset" if batched else "a data set that is read row by row"
    print(f"CPU time of a step over {data}, of the raw loop's (control: raw against raw {control:.3f})")
    found: dict[str, dict[str, float]] = {"control": {"ratio": control}}
    for name in names:
        for logs in (0, 1):
            if logs and name in ("raw", "drivetrain Accelerator", "Fabric", "accelerate", "HF Trainer"):
                continue  # their way to log is the user's own code
            values = [v for _ in range(rounds) for v in paired(name, steps=steps, logs=logs, batched=batched)]
            ratio, low, high = interval(values, control)
            label = f"{name}{', one log' if logs else ''}"
            found[label] = {"ratio": ratio, "low": low, "high": high}
            print(f"  {label:<42}{ratio:>7.3f}  [{low:.3f}, {high:.3f}]", flush=True)
    return found


def _ddp_rank(steps: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    from drivetrain.strategies.world import World

    world = World.start()
    found = {
        name: paired(name, steps=steps, ddp=True, ranks=2)
        for name in ("raw ddp", "drivetrain Accelerator", "drivetrain Trainer, all off", "drivetrain Trainer, defaults")
    }
    world.stop()
    return found


def ddp_table(*, steps: int) -> dict[str, dict[str, float]]:
    """Print and return the CPU time of rank 0's step on two ranks, of plain DistributedDataParallel's."""
    from drivetrain import launch

    first = launch(_ddp_rank, steps, devices=2)[0]
    control = statistics.median(first["raw ddp"])
    print(f"two ranks: CPU time of a rank's step, of plain DDP's (control: {control:.3f})")
    found = {}
    for name, values in first.items():
        ratio, low, high = interval(values, control)
        found[name] = {"ratio": ratio, "low": low, "high": high}
        print(f"  {name:<42}{ratio:>7.3f}  [{low:.3f}, {high:.3f}]")
    return found


def fetching_table(*, steps: int) -> dict[str, float]:
    """Print and return the time of the raw loop over our loader, of the same over a plain one, on a TensorDataset."""
    values = paired("drivetrain loader", steps=steps, batched=True)
    control = statistics.median(paired("raw", steps=steps, batched=True))
    ratio, low, high = interval(values, control)
    print(
        f"batched fetching: our loop over a plain DataLoader loop {ratio:.3f}  [{low:.3f}, {high:.3f}]  (control {control:.3f})"
    )
    return {"ratio": ratio, "low": low, "high": high}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--calls", "--ddp", "--fetching"):
        parser.add_argument(flag, action="store_true", help="this table only")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frameworks", default="", help="names separated by semicolons")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wanted = [n for n in options.frameworks.split(";") if n]
    names = [n for n in FRAMEWORKS if n not in ("raw ddp", "drivetrain loader") and (not wanted or n in wanted)]
    tables: dict[str, Callable[[], Any]] = {
        "calls": lambda: call_table([n for n in names if n != "raw"]),
        "time": lambda: time_table(names, steps=options.steps, rounds=options.rounds, batched=True),
        "time_rows": lambda: time_table(
            [n for n in names if n == "raw" or n.startswith("drivetrain")],
            steps=options.steps,
            rounds=options.rounds,
            batched=False,
        ),
        "ddp": lambda: ddp_table(steps=options.steps),
        "fetching": lambda: fetching_table(steps=options.steps),
    }
    chosen = [n for n in ("calls", "ddp", "fetching") if getattr(options, n)] or list(tables)
    found = {name: tables[name]() for name in chosen}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
