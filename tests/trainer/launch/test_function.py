"""`launch(fn, devices=2)`: two real processes, their results in order, their errors as if they had been raised here."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import CheckpointStore
from drivetrain.strategies.errors import ConfigError, DistributedError
from drivetrain.strategies.world import World
from drivetrain.trainer.accelerator import Accelerator
from drivetrain.trainer.launch import launch

forks = pytest.mark.skipif(sys.platform != "linux", reason="waits for Linux: processes are forked")
pytestmark = forks


def total(factor: float) -> tuple[int, float, int]:
    world = World.start("cpu", timeout_s=60)
    result = float(world.all_reduce(torch.tensor(factor * (world.rank + 1))))
    world.stop()
    return world.rank, result, os.getpid()


def test_two_devices_are_two_processes_that_know_each_other() -> None:
    first, second = launch(total, 2.0, devices=2)
    assert (first[:2], second[:2]) == ((0, 6.0), (1, 6.0))
    assert len({first[2], second[2], os.getpid()}) == 3
    assert "RANK" not in os.environ


def test_any_function_will_do_and_results_may_be_large() -> None:
    """A closure, and 4 MB of result: more than a pipe holds."""
    factor = 3

    def big() -> torch.Tensor:
        return torch.full((1_000_000,), factor + int(os.environ["RANK"]), dtype=torch.float32)

    results = launch(big, devices=2)
    assert [float(tensor.mean()) for tensor in results] == [3.0, 4.0]


def test_one_device_is_one_process_too() -> None:
    assert launch(os.getpid, devices=1) != [os.getpid()]


def fail_on_one() -> None:
    world = World.start("cpu", timeout_s=60)
    if world.rank == 1:
        raise ConfigError("Met this. Expected that. Do so.")
    world.barrier()


def test_the_first_error_is_raised_here_with_its_type_and_rank(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"Met this\.") as caught:
        launch(fail_on_one, devices=2)
    (note,) = caught.value.__notes__
    assert note.startswith("Raised on rank 1 of 2, which failed first:\n[rank 1/2] ConfigError: Met this.")
    assert capfd.readouterr() == ("", "")


class Odd(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("cannot be rebuilt from its args")


def raise_odd() -> None:
    raise Odd(1, 2)


def test_an_error_that_cannot_be_sent_keeps_its_text() -> None:
    with pytest.raises(DistributedError, match=re.escape("[rank 0/2] ") + ".*Odd: cannot be rebuilt"):
        launch(raise_odd, devices=2)


def test_a_result_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(DistributedError, match="returned cannot be sent back"):
        launch(lambda: threading.Lock(), devices=2)


def die(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    time.sleep(0 if how == "gone" else 60)


@pytest.mark.parametrize(
    ("how", "message"), [("killed", r"\[rank 1/2\] was killed by SIGKILL"), ("gone", "ended without a result")]
)
def test_a_rank_that_dies_without_a_word_is_named(how: str, message: str) -> None:
    with pytest.raises(DistributedError, match=message):
        launch(die, how, devices=2)


def test_ctrl_c_reaches_the_ranks_and_then_the_caller(tmp_path: Path) -> None:
    def wait() -> None:
        try:
            (tmp_path / f"ready{os.environ['RANK']}").touch()
            time.sleep(60)
        except KeyboardInterrupt:
            (tmp_path / f"interrupted{os.environ['RANK']}").touch()
            raise

    def press() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        launch(wait, devices=2)
    assert all((tmp_path / f"interrupted{rank}").exists() for rank in range(2))


def launch_inside() -> str:
    try:
        launch(os.getpid, devices=2)
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


def test_a_rank_does_not_launch_ranks() -> None:
    assert launch(launch_inside, devices=2)[1].startswith("launch() was called in rank 1 of 2")


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 processes"):
        launch(os.getpid, devices=0)
    with pytest.raises(ConfigError, match="method='threads'"):
        launch(os.getpid, devices=2, method="threads")
    with pytest.raises(ConfigError, match="cannot be sent"):
        launch(lambda: 0, devices=2, method="spawn")


def spawned() -> list[Any]:
    return launch(total, 1.0, devices=2, method="spawn")


@pytest.mark.slow
def test_spawned_processes_give_the_same(tmp_path: Path) -> None:
    """In a process of its own: under pytest the function's module has no importable name."""
    (tmp_path / "functions.py").write_text(
        "import torch\nfrom drivetrain.strategies.world import World\n"
        "def total(factor):\n    world = World.start('cpu')\n"
        "    return world.rank, float(world.all_reduce(torch.tensor(factor * (world.rank + 1))))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "from functions import total\nfrom drivetrain.trainer.launch import launch\n"
        "if __name__ == '__main__':\n    print(launch(total, 2.0, devices=2, method='spawn'))\n"
    )
    import subprocess

    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90)
    assert (ended.stdout, ended.stderr) == ("[(0, 6.0), (1, 6.0)]\n", "")


def saves_and_returns(folder: Path, fails: bool) -> None:
    """Leave a save behind that has just begun, on a slow disk."""
    real = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.05), real(descriptor))[1]  # pyright: ignore[reportAttributeAccessIssue]
    accelerator = Accelerator(strategy="ddp")
    accelerator.prepare(torch.nn.Linear(5, 5))
    handle = accelerator.save_state(folder, wait=False)
    assert not handle.done
    if fails:
        raise ValueError("it fails here")


@pytest.mark.parametrize(("devices", "fails"), [(2, False), (1, True)])
def test_a_save_that_is_under_way_when_the_function_ends_is_finished(devices: int, fails: bool, tmp_path: Path) -> None:
    """The processes end by os._exit, which waits for no thread. (Ranks beside one that failed are stopped.)"""
    with pytest.raises(ValueError, match="it fails here") if fails else contextlib.nullcontext():
        launch(saves_and_returns, tmp_path, fails, devices=devices)
    infos = CheckpointStore(tmp_path).list()
    assert len(infos) == 1
    assert CheckpointStore(tmp_path).verify(infos[0].path) == []
