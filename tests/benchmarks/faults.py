"""Random SIGKILLs of a real training, resumed until it ends: is it the run that was never killed, bit for bit?

    python tests/benchmarks/faults.py --kills 200 --seed 1
    python tests/benchmarks/faults.py --resume 1000000          something else: what it costs to go on far into the data

The training has all that would show a resume that is not exact (tests/trainer/resume_jobs.py): shuffling, dropout, BatchNorm,
random augmentation in two loader workers, accumulation, validations, schedulers by step, epoch and plateau. A checkpoint is due
at every step, written beside the training; the two best by validation loss and the newest are kept, the others deleted. It runs
as one process, and as ddp on 1, 2 and 4 ranks and fsdp on 2, which `launch` forks from a prepared process without any import.

A chain is one run: started, killed, resumed with resume="auto", killed again, ..., and at last left to end. Half of the kills
come at a uniformly random instant of the time that the whole run takes, start-up included; the other half wait from there for a
half-written save, and come up to 10 ms behind its beginning. With several ranks one in two kills hits one rank, the others hit
all. The kills come from outside, and nothing in the training knows of them. Compared at the end of each chain with the run that
was never killed: every line of metrics.jsonl, the final weights, and the ledger of samples (each once an epoch; a step that was
trained on again had the same ones).

"seconds to exit": from the signal until no process of the training is left, loader workers included. "steps lost": optimizer
steps that were begun before the kill and are trained on again. A busy machine changes the seconds, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before torch: what has no pool of threads may be forked
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "trainer"))

import torch
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.trainer.data.loader import prepare_loader
from drivetrain.trainer.launch import launch
from resume_jobs import Job, Started, _warm, assert_each_sample_once, logged_by, newest_run, read_ledger, result_of, train
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

for _name in ("ddp", "fsdp"):  # once here, not in every rank
    importlib.import_module(f"drivetrain.strategies.{_name}")

WAYS = {"single": 1, "ddp 1": 1, "ddp 2": 2, "ddp 4": 4, "fsdp 2": 2}
JOB: dict[str, Any] = {"epochs": 2, "samples": 95, "batch_size": 3, "workers": 2}
"""95: no rank is left with one sample, of which BatchNorm has no variance."""
OPTIONS: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 2}
PATIENCE_S = 60.0


# -- the victim -------------------------------------------------------------------------------------------------------------
def one_rank(given: dict[str, Any]) -> None:
    """Train to the end; the newest whole checkpoint is where it goes on."""
    root, job = Path(given["root"]), Job(**given["job"])
    saving = Checkpoint("1step", monitor="val_loss", save_top_k=2)
    result = train(job, root, resume="auto", ledger=root, callbacks=[saving], **given["options"])
    if int(os.environ.get("RANK", "0")) == 0:
        weights = {name: value.to(torch.float64).tolist() for name, value in result.weights.items()}
        (root / "result.tmp").write_text(json.dumps({"weights": weights, "progress": result.progress}))
        (root / "result.tmp").rename(root / "result.json")


def run(given: dict[str, Any]) -> None:
    """What the user started: the training itself, or the process that has ranks."""
    if given["ranks"]:
        launch(one_rank, given, devices=given["ranks"])
    else:
        one_rank(given)


class Victim(Started):
    """`run` in a process forked from this one."""

    body = staticmethod(run)


# -- one chain --------------------------------------------------------------------------------------------------------------
@dataclass
class Counts:
    """What the kills of one way of training did."""

    kills: int = 0
    of_one_rank: int = 0
    half_written: int = 0
    before_the_first_step: int = 0
    chains: int = 0
    mismatches: list[str] = field(default_factory=list)
    whole_s: float = 0.0
    steps_lost: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def given_for(way: str, root: Path) -> dict[str, Any]:
    ranks = 0 if way == "single" else WAYS[way]
    options = OPTIONS | ({"strategy": way.split()[0]} if ranks else {})
    return {"root": str(root), "job": JOB, "options": options, "ranks": ranks}


def never_killed(way: str, root: Path) -> float:
    """Train to the end; return the seconds that it took."""
    _warm()
    began = time.monotonic()
    victim = Victim(given_for(way, root))
    try:
        assert victim.wait(5 * PATIENCE_S) == 0, victim.output()
    finally:
        victim.kill()
    return time.monotonic() - began


def chain(way: str, root: Path, whole: Path, kills: int, dice: random.Random, counts: Counts) -> None:
    """Start, kill `kills` times, let it end, compare. A kill that came too late is tried again with the next chain."""
    counts.chains += 1
    begun = 0
    for left in range(kills, -1, -1):
        victim = Victim(given_for(way, root))
        try:
            if left == 0:
                code = victim.wait(5 * PATIENCE_S)
                if code != 0:
                    counts.mismatches.append(f"{way}: ended with {code}:\n{victim.output()}")
                    return
            elif not _kill(way, victim, dice, counts, begun):
                break
            begun = max(begun, _steps_begun(way, root))
        finally:
            victim.kill()
    counts.mismatches += [f"{way}, chain {counts.chains}: {what}" for what in differences(root, whole)]


def _kill(way: str, victim: Victim, dice: random.Random, counts: Counts, begun: int) -> bool:
    """Kill at a random instant; return False when it had ended before."""
    began = time.monotonic()
    aimed, one, at = dice.random() < 0.5, dice.random() < 0.5, began + dice.uniform(0, counts.whole_s)
    victim.wait_until(lambda: time.monotonic() >= at, PATIENCE_S)
    if aimed:
        victim.wait_until(lambda: is_half_written(victim.root), PATIENCE_S)
        time.sleep(dice.uniform(0, 0.01))
    ranks = victim.ranks() if WAYS[way] > 1 else {}
    group = {victim.pid, *ranks.values()}
    if victim.poll() is not None:
        if victim.code:
            counts.mismatches.append(f"{way}: ended by itself with {victim.code}:\n{victim.output()}")
        if not begun:  # the machine is less busy now: later instants would hit nothing
            counts.whole_s = min(counts.whole_s, time.monotonic() - began)
        return False
    one = one and len(ranks) == WAYS[way]
    killed_at = time.monotonic()
    for pid in [ranks[dice.choice(sorted(ranks))]] if one else group:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    victim.wait(PATIENCE_S)
    while _alive(group):
        if time.monotonic() - killed_at > PATIENCE_S:
            counts.mismatches.append(f"{way}: processes are left {PATIENCE_S:g} s after the kill: {_alive(group)}")
            break
        time.sleep(0.002)
    if victim.code == 0:
        return False  # its last line was written when the signal came
    counts.kills += 1
    counts.of_one_rank += one
    counts.seconds.append(time.monotonic() - killed_at)
    counts.half_written += is_half_written(victim.root)
    now = _steps_begun(way, victim.root)
    counts.before_the_first_step += now <= begun and not victim.ranks()
    runs = list((victim.root / "job").glob("*/checkpoints"))
    latest = CheckpointStore(max(runs)).latest() if runs else None
    counts.steps_lost.append(max(0, now - (latest.step if latest else 0)))
    return True


def is_half_written(root: Path) -> bool:
    """Whether a temporary folder is there; in the newest run, since one without any checkpoint is not gone on with."""
    runs = list((root / "job").glob("*/checkpoints"))
    return bool(runs) and any(max(runs).glob(".tmp-step*"))


def _steps_begun(way: str, root: Path) -> int:
    """Return how many optimizer steps have been begun, by the ledgers."""
    batches = -(-JOB["samples"] // (JOB["batch_size"] * WAYS[way]))
    accumulation = OPTIONS["accumulate_grad_batches"]
    steps = 0
    for path in root.glob("ledger-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True)[-2:]:
            if line.endswith("\n"):
                batch, epoch, _, _ = json.loads(line)
                steps = max(steps, epoch * -(-batches // accumulation) + (batch - epoch * batches) // accumulation + 1)
    return steps


def _alive(pids: set[int]) -> list[int]:
    """Return the processes that are left of these and of their groups, which loader workers are in; zombies are none."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, _, group = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:3]
                if state != "Z" and (int(entry) in pids or int(group) in pids):
                    found.append(int(entry))
    return found


def differences(root: Path, whole: Path) -> list[str]:
    """Return how the run in `root` differs from the one in `whole`: nothing, if nothing was lost."""
    found = []
    try:
        if logged_by(root) != logged_by(whole):
            found.append("the curve (metrics.jsonl) differs")
        if result_of(root) != result_of(whole):
            found.append("the final weights or counters differ")
        assert_each_sample_once(root, Job(**JOB))
        if read_ledger(root) != read_ledger(whole):
            found.append("the batches have other samples")
        if is_half_written(root):
            found.append("a half-written save is left at the end")
        infos = CheckpointStore(newest_run(root) / "checkpoints").list()
        if not 1 <= len(infos) <= 4:  # the two best, the newest, and what was resumed from
            found.append(f"{len(infos)} checkpoints are kept")
    except (AssertionError, OSError, ValueError) as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


# -- far into the data ------------------------------------------------------------------------------------------------------
class Numbers(Dataset[int]):
    """So many samples that it takes a while to count them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


SAMPLERS: dict[str, Callable[[Numbers], Any]] = {
    "in order": lambda data: None,
    "shuffled": lambda data: RandomSampler(data, generator=torch.Generator().manual_seed(1)),
    "weighted": lambda data: WeightedRandomSampler([1.0] * len(data), len(data), generator=torch.Generator().manual_seed(1)),
}


def first_batch(sampler: str, batch: int, workers: int, batch_size: int = 4) -> float:
    """Return the seconds from a new loader to its first batch, when it goes on at that number of a batch."""
    data = Numbers(1_000_100 * batch_size)
    chosen = SAMPLERS[sampler](data)
    began = time.perf_counter()
    loader = prepare_loader(DataLoader(data, batch_size=batch_size, sampler=chosen, num_workers=workers))
    loader.load_state_dict(loader.state_dict() | {"position": batch * batch_size})
    next(iter(loader))
    return time.perf_counter() - began


def measure_resume(batch: int) -> None:
    print(f"seconds to the first batch of a map-style set of {4 * 1_000_100:,} samples, best of 5: resumed at batch 0, {batch:,}")
    for sampler in SAMPLERS:
        for workers in (0, 2):
            at = {b: min(first_batch(sampler, b, workers) for _ in range(5)) for b in (0, batch)}
            print(f"{sampler:10} {workers} workers   {at[0]:6.3f}  {at[batch]:6.3f}   {at[batch] - at[0]:+.3f}", flush=True)


# -- all of it --------------------------------------------------------------------------------------------------------------
def measure(kills: int, seed: int, folder: Path, ways: list[str], per_chain: int = 5, say: Any = print) -> dict[str, Counts]:
    """Kill `kills` times, divided over the ways; return what happened by way."""
    dice = random.Random(seed)
    results: dict[str, Counts] = {}
    for index, way in enumerate(ways):
        goal = kills // len(ways) + (index < kills % len(ways))
        counts = results[way] = Counts()
        whole = folder / f"{way} whole"
        counts.whole_s = never_killed(way, whole)
        while counts.kills < goal and len(counts.mismatches) < 20:
            root = folder / f"{way} {counts.chains + 1}"
            chain(way, root, whole, min(per_chain, goal - counts.kills), dice, counts)
            if not counts.mismatches:
                shutil.rmtree(root)
        say(row(way, counts))
    return results


HEAD = (
    f"{'':8} {'kills':>5} {'one rank':>8} {'in a save':>9} {'no step yet':>11} {'runs':>5} {'mismatches':>10}"
    f"   {'steps lost: median, max, all':>30}   {'seconds to exit: min, median, max':>34}"
)


def row(way: str, c: Counts) -> str:
    lost, seconds = c.steps_lost or [0], c.seconds or [0.0]
    return (
        f"{way:8} {c.kills:5} {c.of_one_rank:8} {c.half_written:9} {c.before_the_first_step:11} {c.chains:5} "
        f"{len(c.mismatches):10}"
        f"   {f'{statistics.median(lost):g}, {max(lost)}, {sum(lost)}':>30}"
        f"   {f'{min(seconds):.2f}, {statistics.median(seconds):.2f}, {max(seconds):.2f}':>34}"
    )


def together(results: dict[str, Counts]) -> Counts:
    total = Counts()
    for c in results.values():
        for name, value in vars(c).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the instants; default: from the clock")
    parser.add_argument("--ways", default=",".join(WAYS), help="of training, separated by commas")
    parser.add_argument("--folder", help="where the runs go; default: a new folder for temporary files")
    parser.add_argument("--json", help="write the counts into this file")
    parser.add_argument("--resume", type=int, metavar="BATCH", help="instead: what it costs to go on at that batch")
    asked = parser.parse_args()
    if asked.resume is not None:
        measure_resume(asked.resume)
        return 0
    seed = asked.seed if asked.seed is not None else time.time_ns() % 10**6
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=asked.folder))
    torch.set_num_threads(1)
    print(f"{asked.kills} SIGKILLs, seed {seed}, {time.strftime('%Y-%m-%d %H:%M')}")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    print(HEAD, flush=True)
    try:
        results = measure(asked.kills, seed, folder, asked.ways.split(","), say=lambda line: print(line, flush=True))
    finally:
        if not any(folder.glob("* *[0-9]/job")):  # what differs is left to be looked at
            shutil.rmtree(folder, ignore_errors=True)
    total = together(results)
    print(row("all", total))
    for what in total.mismatches:
        print(what)
    if asked.json:
        Path(asked.json).write_text(json.dumps({way: vars(counts) for way, counts in results.items()}, indent=1))
    return 1 if total.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
