"""The job that test_resume, test_kill and test_signals stop and resume: everything in it would show a resume that is not exact.

    dropout and BatchNorm in the model; random augmentation from torch, python and numpy in the data set; AdamW with a scheduler
    by step, one by epoch and one on a plateau; epoch means; a callback and a registered object with states of their own.
`train` runs it in this process and returns all that can be compared. As a script, `python resume_jobs.py '{"root": ...}'`, it
is what the tests kill. The ledger is a file per process, which gets the numbers of the samples that were trained on.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.trainer.launch.report import report
from drivetrain.trainer.module import TrainingModule
from drivetrain.trainer.trainer import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Job:
    """What is trained; `options` go to the Trainer."""

    samples: int = 44
    batch_size: int = 4
    epochs: int = 3
    workers: int = 0
    dropout: float = 0.3
    augment: bool = True
    batch_norm: bool = True
    num_items: bool = False
    plateau: bool = True
    validate: bool = True
    sgd: bool = False
    manual: bool = False
    step_s: float = 0.0
    validation_s: float = 0.0
    fail_at: tuple[int, int] | None = None
    """(batch, rank) at which training_step raises."""
    options: dict[str, Any] = field(default_factory=dict)


class Samples(Dataset[tuple[Tensor, Tensor, int]]):
    """Samples that are augmented with random numbers of every kind, and know their numbers."""

    def __init__(self, job: Job, offset: int = 0) -> None:
        self.job, self.offset = job, offset
        made = torch.Generator().manual_seed(5 + offset)
        self.x = torch.randn(job.samples, 6, generator=made)
        self.y = torch.sin(self.x).sum(1, keepdim=True)

    def __len__(self) -> int:
        return self.job.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.x[index]
        if self.job.augment and not self.offset:
            x = x + 0.1 * torch.randn(6) + random.random() * 0.1 + float(np.random.rand()) * 0.1
        return x, self.y[index], index


class Ledger:
    """Which samples were trained on: (batch, epoch, rank, numbers), a file for each process."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / f"ledger-{time.time_ns()}-{os.getpid()}.jsonl"

    def note(self, *entry: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def read_ledger(folder: Path) -> dict[int, list[list[int]]]:
    """Return epoch -> for each micro-batch in order the sorted samples of all ranks.

    A step that was trained on again after a kill must have had the same samples, on each rank.
    """
    found: dict[int, dict[int, dict[int, list[int]]]] = {}
    for path in sorted(folder.glob("ledger-*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # the kill came while it was written
            batch, epoch, rank, numbers = json.loads(line)
            known = found.setdefault(epoch, {}).setdefault(batch, {}).setdefault(rank, numbers)
            assert known == numbers, f"batch {batch} of epoch {epoch} on rank {rank}: {known}, and later {numbers}"
    return {
        epoch: [sorted(n for numbers in batches[b].values() for n in numbers) for b in sorted(batches)]
        for epoch, batches in found.items()
    }


def assert_each_sample_once(folder: Path, job: Job) -> None:
    ledger = read_ledger(folder)
    assert sorted(ledger) == list(range(job.epochs))
    for epoch, batches in ledger.items():
        assert sorted(n for batch in batches for n in batch) == list(range(job.samples)), f"epoch {epoch}: {batches}"


class Module(TrainingModule):
    def __init__(self, job: Job, ledger: Ledger) -> None:
        super().__init__()
        self.job, self.ledger = job, ledger
        self.automatic_optimization = not job.manual
        torch.manual_seed(1)
        middle = [nn.BatchNorm1d(8)] if job.batch_norm else []
        self.net = nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Dropout(job.dropout), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, numbers = batch
        progress, rank = self.trainer.progress, self.trainer.world.rank
        if self.job.step_s:
            time.sleep(self.job.step_s)
        real = numbers.tolist()[: self.trainer.train_loader.num_samples]
        self.ledger.note(progress.batches, progress.epoch, rank, real)
        prediction = self.net(x)
        if self.job.fail_at == (progress.batches, rank):
            raise ValueError("the step fails here")
        loss = nn.functional.mse_loss(prediction, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("samples", float(len(real)), on_step=False, on_epoch=True, reduce="sum")
        if self.job.manual:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        if self.job.num_items:
            return {"loss": nn.functional.mse_loss(prediction, y, reduction="sum"), "num_items": len(real)}
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        if self.job.validation_s:
            time.sleep(self.job.validation_s)
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))
        self.log("val_noise", torch.rand(()))  # a validation may draw random numbers too

    def configure_optimizers(self) -> Any:
        if self.job.sgd:
            return torch.optim.SGD(self.parameters(), lr=0.01)
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedulers: list[Any] = [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50), "interval": "step"},
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9), "interval": "epoch"},
        ]
        if self.job.plateau and self.job.validate:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            schedulers.append({"scheduler": plateau, "monitor": "val_loss", "strict": False})
        return [optimizer], schedulers


class Average:
    """An object of the user's own: the running mean of the weights."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.count = 0

    def update(self, value: Tensor) -> None:
        self.mean = value.clone() if self.mean is None else self.mean.lerp(value, 0.1)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.count = state["mean"], state["count"]


class Recorder(Callback):
    """Notes what happens and with which numbers, and has a state; its `average` is registered for checkpointing."""

    state_is_required = False
    state_is_per_rank = True  # it draws random numbers, which differ between ranks

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.events: list[tuple[Any, ...]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.average = Average()
        self.seen = 0
        self.noise = torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "noise": self.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.noise = state["seen"], state["noise"]

    def setup(self, trainer: Any, module: nn.Module, stage: str) -> None:
        if stage == "fit":
            trainer.accelerator.register_for_checkpointing(self.average)

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses[trainer.progress.batches] = loss.item()
        self.seen += 1
        self.noise = self.noise + torch.rand(())
        if trainer.accelerator.sync_gradients:
            net: Any = module.net
            self.average.update(whole(net[0].weight.detach()))
            rates = [group["lr"] for o in trainer.optimizers.values() for group in o.param_groups]
            self.events.append(("step", trainer.progress.global_step, rates, self.seen, float(self.noise)))

    def on_train_epoch_start(self, trainer: Any, module: nn.Module) -> None:
        self.events.append(("epoch starts", trainer.progress.epoch, trainer.progress.global_step))

    def on_train_epoch_end(self, trainer: Any, module: nn.Module) -> None:
        self.events.append(("epoch ends", trainer.progress.epoch, trainer.progress.global_step))

    def on_validation_end(self, trainer: Any, module: nn.Module) -> None:
        if trainer.stage == "fit":
            self.events.append(("validated", trainer.progress.global_step, trainer.metrics["val_loss"]))

    def on_log(self, trainer: Any, module: nn.Module, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))


@dataclass
class Result:
    """What a run did, as plain data."""

    losses: dict[int, float]
    events: list[tuple[Any, ...]]
    logged: list[tuple[int, dict[str, float]]]
    weights: dict[str, Tensor]
    average: Tensor | None
    progress: dict[str, Any]
    folder: str


def trainer_for(job: Job, root: Path, callbacks: Sequence[Callback] = (), **more: Any) -> Trainer:
    options: dict[str, Any] = {
        "max_epochs": job.epochs,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "seed": 3,
        "root": root,
        "name": "job",
    }
    options |= {name: value() if callable(value) else value for name, value in job.options.items()}
    options |= {"callbacks": list(callbacks)} | more
    return Trainer(**options)


def loaders(job: Job) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
    train = DataLoader(Samples(job), batch_size=job.batch_size, shuffle=True, num_workers=job.workers)
    if not job.validate:
        return train, None
    small = Job(samples=7, batch_size=3, augment=job.augment)
    return train, DataLoader(Samples(small, offset=1), batch_size=3)


def whole(value: Any) -> Tensor:
    """Put a tensor together that the strategy cut up."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def train(
    job: Job, root: Path, *, resume: Any = None, ledger: Path | None = None, callbacks: Sequence[Callback] = (), **options: Any
) -> Result:
    """Run the job to its end (or `max_steps`) in a fresh Trainer; return what happened in this part of it."""
    recorder = Recorder()
    trainer = trainer_for(job, root, [recorder, *callbacks], **options)
    module = Module(job, Ledger(ledger))
    trainer.fit(module, *loaders(job), resume=resume)
    progress = asdict(trainer.progress)
    del progress["seconds"]
    cut_up = any(hasattr(p, "ds_id") for p in module.parameters())  # by ZeRO's stage 3, whose parameters are no DTensors
    state = trainer.accelerator.get_state_dict(module) if cut_up else module.state_dict()
    weights = {name: whole(value.detach()).clone() for name, value in state.items()}
    return Result(recorder.losses, recorder.events, recorder.logged, weights, recorder.average.mean, progress, str(trainer.root))


def assert_same_end(result: Result, expected: Result) -> None:
    """The weights, the registered average and the counters are equal, bit for bit."""
    assert result.progress == expected.progress
    for name, value in expected.weights.items():
        assert torch.equal(result.weights[name], value), f"{name} differs by {(result.weights[name] - value).abs().max()}"
    assert result.average is not None
    assert expected.average is not None
    assert torch.equal(result.average, expected.average)


def assert_goes_on_as(result: Result, expected: Result, *, batches: int) -> None:
    """`result`, resumed behind `batches` micro-batches, did from there on what `expected` did, bit for bit."""
    assert result.losses == {b: loss for b, loss in expected.losses.items() if b > batches}
    assert result.events == expected.events[len(expected.events) - len(result.events) :]
    assert result.logged == expected.logged[len(expected.logged) - len(result.logged) :]
    assert_same_end(result, expected)


# -- in processes of their own ----------------------------------------------------------------------------------------
def main(given: dict[str, Any]) -> None:
    """Train as `given` says: {"root", "job", "every", "resume", "options"}; leave the end's state in <root>/result.json."""
    options: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.get("job", {}).items()}
    job = Job(**options)
    root = Path(given["root"])
    every = given.get("every", "1step")
    callbacks: list[Callback] = [Checkpoint(every)] if every else []
    result = train(job, root, resume=given.get("resume", "auto"), ledger=root, callbacks=callbacks, **given.get("options", {}))
    if int(os.environ.get("RANK", "0")) == 0:
        weights = {name: value.to(torch.float64).tolist() for name, value in result.weights.items()}
        (root / "result.tmp").write_text(json.dumps({"weights": weights, "progress": result.progress}))
        (root / "result.tmp").rename(root / "result.json")


class Started:
    """A training in a process of its own: forked from this one, which is quick, or the script with its agent and ranks."""

    body: Callable[[dict[str, Any]], None] = staticmethod(main)

    def __init__(self, given: dict[str, Any], *, script: bool = False) -> None:
        self.root = Path(given["root"])
        self.root.mkdir(parents=True, exist_ok=True)
        self.before = {path.name for path in self.root.glob("ledger-*")}
        self.log = self.root / f"log-{time.time_ns()}.txt"
        self.code: int | None = None
        if script:
            with self.log.open("wb") as log:
                command = [sys.executable, __file__, json.dumps(given)]
                self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            self.pid = self.process.pid
            return
        self.process = None
        _warm()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _forked(given, self.log, self.body)

    def poll(self) -> int | None:
        """Return the exit code (minus the signal), None while it runs."""
        if self.code is None:
            if self.process is not None:
                self.code = self.process.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout_s: float = 60.0) -> int:
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {timeout_s:g} s:\n{self.output()}")
            time.sleep(0.01)
        return code

    def ranks(self) -> dict[int, int]:
        """Return rank -> process id, of those that have trained on a batch."""
        return {rank: int(name.rpartition("-")[2].partition(".")[0]) for name, rank, _ in self._ledgers()}

    def trained(self) -> int:
        """Return how many micro-batches rank 0 has begun."""
        return sum(lines for _, rank, lines in self._ledgers() if rank == 0)

    def last_batch(self) -> int:
        """Return the number of the last micro-batch that any rank has begun, -1 before the first."""
        texts = [path.read_text() for path in self.root.glob("ledger-*.jsonl") if path.name not in self.before]
        return max((json.loads(line)[0] for text in texts for line in text.splitlines(True) if line.endswith("\n")), default=-1)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until `condition()`, or the end of the process."""
        deadline = time.monotonic() + timeout_s
        while not condition() and self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"did not come so far within {timeout_s:g} s:\n{self.output()}")
            time.sleep(0.002)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """Kill the process and all that it started."""
        pids = [*self.ranks().values(), self.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while self.poll() is None:
                time.sleep(0.005)

    def _ledgers(self) -> Iterator[tuple[str, int, int]]:
        for path in self.root.glob("ledger-*.jsonl"):
            lines = path.read_text().splitlines(keepends=True) if path.name not in self.before else []
            if lines and lines[0].endswith("\n"):
                yield path.name, json.loads(lines[0])[2], len(lines)


@functools.cache
def _warm() -> None:
    """Train once in this process, so that what is forked from it finds everything imported."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(Job(samples=4, epochs=1), Path(folder))


def _forked(given: dict[str, Any], log: Path, body: Callable[[dict[str, Any]], None]) -> NoReturn:
    """Be a fresh process of one rank: what a script would be, without the seconds that its imports take."""
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        body(given)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        code = report(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def result_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "result.json").read_text())


def newest_run(root: Path) -> Path:
    return max((root / "job").iterdir(), key=lambda run: run.name)


def logged_by(root: Path) -> list[tuple[int, int, dict[str, float]]]:
    """The lines of metrics.jsonl without their times; that each step is there once is for the caller to compare."""
    return [(line["step"], line["epoch"], line["metrics"]) for line in read_metrics(newest_run(root))]


def steps_saved(root: Path) -> list[int]:
    folder = newest_run(root) / "checkpoints"
    return sorted(int(path.name[5:].partition(".")[0]) for path in folder.glob("step-*"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
