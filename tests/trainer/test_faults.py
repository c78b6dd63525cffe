"""Random kills of a real training (tests/benchmarks/faults.py, a few of them), and what a killed training leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.utils.data._utils.worker
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.trainer.data.loader import prepare_loader
from drivetrain.trainer.launch import launch
from drivetrain.trainer.tracking import LoggerWarning
from resume_jobs import Job, newest_run, train
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import faults


# -- kills --------------------------------------------------------------------------------------------------------------
def loses_nothing(kills: int, ways: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> faults.Counts:
    results = faults.measure(kills, 20261122, folder, ways, say=lambda line: None)
    total = faults.together(results)
    with capsys.disabled():
        print("\n" + "\n".join([faults.HEAD, *(faults.row(way, counts) for way, counts in results.items())]))
    assert total.mismatches == []
    assert total.kills == kills
    return total


def test_a_training_that_is_killed_and_resumed_is_the_one_that_was_never_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder whose name has spaces and other people's letters."""
    folder = tmp_path / "mit Leerzeichen, ünï 日本"
    folder.mkdir()
    loses_nothing(2, ["single"], folder, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp 1", "ddp 2", "ddp 4", "fsdp 2"])
def test_five_kills_of_a_training_on_several_ranks_lose_nothing(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loses_nothing(5, [way], tmp_path, capsys)


def test_the_comparison_notices_what_was_lost(tmp_path: Path) -> None:
    """A chain whose result differs in one digit, one sample or one line is a mismatch."""
    for name in ("whole", "same"):
        faults.never_killed("single", tmp_path / name)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    assert faults.differences(tmp_path / "same", tmp_path / "whole") == []
    result = tmp_path / "other" / "result.json"
    text = result.read_text()
    at = max(i for i, letter in enumerate(text) if letter in "12345678")
    result.write_text(text[:at] + str(int(text[at]) + 1) + text[at + 1 :])
    assert faults.differences(tmp_path / "other", tmp_path / "whole") == ["the final weights or counters differ"]
    result.write_text(text)
    metrics = next((tmp_path / "other").glob("job/*/metrics.jsonl"))
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    assert faults.differences(tmp_path / "other", tmp_path / "whole") == ["the curve (metrics.jsonl) differs"]
    metrics.write_text("".join(lines))
    ledger = next((tmp_path / "other").glob("ledger-*.jsonl"))
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    assert len(faults.differences(tmp_path / "other", tmp_path / "whole")) == 1


# -- disks --------------------------------------------------------------------------------------------------------------
NOT_ALLOWED = 77


def forked(action: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            action()
        os._exit(1)
    return pid


def on_a_small_disk(folder: Path, action: Callable[[], None]) -> None:
    """Run `action` in a process that alone sees 4 MiB of memory mounted at `folder`; what is not mounted goes with it."""

    def child() -> None:
        if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
            os._exit(NOT_ALLOWED)
        for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]):
            if subprocess.run(command, check=False).returncode:
                os._exit(NOT_ALLOWED)
        warnings.simplefilter("ignore", LoggerWarning)  # metrics.jsonl lies there too
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    _, status = os.waitpid(forked(child), 0)
    code = os.waitstatus_to_exitcode(status)
    if code == NOT_ALLOWED:
        pytest.skip("waits for the right to mount a tmpfs")
    assert code == 0


class Fills(Callback):
    """Another program takes all of the disk in step 4, and gives it back in step 8."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "others"

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.global_step == 4:
            trainer.store.join()
            with contextlib.suppress(OSError), self.file.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if trainer.progress.global_step == 8:
            trainer.store.join()
            self.file.unlink()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_real_disk_that_fills_up_costs_no_earlier_checkpoint(
    on_error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Job(samples=48, epochs=1, validate=False)

    def action() -> None:
        saving = Checkpoint("1step", save_top_k=-1, on_error=on_error)
        expected = pytest.raises(CheckpointError, match="free") if on_error == "raise" else contextlib.nullcontext()
        with expected:
            train(job, tmp_path, callbacks=[saving, Fills(tmp_path)])
        folder = CheckpointStore(newest_run(tmp_path) / "checkpoints")
        steps = [info.step for info in folder.list()]
        assert steps == ([1, 2, 3] if on_error == "raise" else [1, 2, 3, 8, 9, 10, 11, 12]), steps
        assert all(folder.verify(info.path) == [] for info in folder.list())
        assert not list(folder.root.glob(".tmp-*"))
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "others").unlink()
        result = train(job, tmp_path, resume="auto")
        assert sorted(result.losses) == (list(range(4, 13)) if on_error == "raise" else [])

    on_a_small_disk(tmp_path, action)
    said = capfd.readouterr()
    assert on_error == "raise" or re.search(r"\d (B|KiB|MiB) free", said.out + said.err)


@pytest.mark.parametrize("when", ["at the start", "meanwhile"])
def test_a_disk_that_is_read_only_is_an_error_that_says_so(when: str, tmp_path: Path) -> None:
    job = Job(samples=48, epochs=1, validate=False)

    def remount(way: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{way}", str(tmp_path)], check=True)

    class Turns(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.progress.global_step == 4:
                trainer.store.join()
                trainer.tracking.close("stopped")  # a file that is open for writing would keep the system from it
                trainer.store._lock = None
                remount("ro")

    def action() -> None:
        if when == "at the start":
            remount("ro")
            with pytest.raises(ConfigError, match=r"Read-only file system.*Pass root= another folder"):
                train(job, tmp_path)
            return
        with pytest.raises(CheckpointError, match=r"Saving step \d in (.|\n)*Read-only file system(.|\n)*untouched"):
            train(job, tmp_path, callbacks=[Checkpoint("1step", save_top_k=-1), Turns()])
        remount("rw")
        assert sorted(train(job, tmp_path, resume="auto").losses)[0] == 4

    on_a_small_disk(tmp_path, action)


# -- memory -------------------------------------------------------------------------------------------------------------
def runs_out_of_memory(root: Path) -> None:
    class Greedy(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.progress.global_step == 4 and trainer.world.rank == 1:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
                torch.zeros(2**28)

    train(Job(samples=48, epochs=1, validate=False), root, callbacks=[Checkpoint("1step"), Greedy()], strategy="ddp")


def test_a_rank_without_memory_ends_all_and_is_named(tmp_path: Path) -> None:
    """A stand-in for a memory limit that refuses; one that kills is the SIGKILL of one rank, above."""
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        launch(runs_out_of_memory, tmp_path, devices=2)
    assert any("Raised on rank 1 of 2" in note for note in caught.value.__notes__)
    newest = CheckpointStore(newest_run(tmp_path) / "checkpoints").latest()
    assert newest is not None
    assert newest.step in (3, 4)
    assert newest.notes == ()


# -- loader workers -----------------------------------------------------------------------------------------------------
def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("moment", ["while it waits", "before its first look"])
def test_the_workers_of_a_trainer_that_was_killed_end_too(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own look, every 5 s, is switched off here. It never notices a trainer that died before the first one."""
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 3600)

    def slow_start(n: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.5)

    class Told(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            (tmp_path / str(os.getpid())).touch()
            return super().__getitem__(index)

    def train() -> NoReturn:
        loader = DataLoader(Told(torch.arange(64)), batch_size=1, num_workers=2)
        if moment == "before its first look":
            torch.set_num_threads = slow_start  # what a worker calls first
        for _ in prepare_loader(loader):
            time.sleep(60)
        raise AssertionError

    pid = forked(train)
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    try:
        wait_for(lambda: not any(is_there(worker) for worker in workers))
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
