"""Random kills of a real training (tests/benchmarks/faults.py, a few of them), and what a killed training leaves behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.utils.data._utils.worker
from drivetrain.trainer.data.loader import prepare_loader
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
    loses_nothing(3, ["single"], tmp_path, capsys)


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


# -- loader workers -----------------------------------------------------------------------------------------------------
def forked(action: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            action()
        os._exit(1)
    return pid


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
