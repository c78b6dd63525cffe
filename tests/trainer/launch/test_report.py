"""What a process says of its error, where it says it, and the code it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from drivetrain.strategies.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from drivetrain.trainer.launch.report import ErrorReport, describe, exit_code, is_consequence, read_report, report, write_report


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError("x"), 2),
        (CheckpointError("x"), 3),
        (DataError("x"), 1),
        (NonFiniteError("x"), 1),
        (ValueError("x"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(), 0),
        (SystemExit(75), 75),
        (SystemExit("a word"), 1),
    ],
)
def test_every_outcome_has_its_exit_code(error: BaseException | None, code: int) -> None:
    assert exit_code(error) == code


def caught(error: Exception) -> Exception:
    try:
        raise error
    except Exception as same:
        return same


def test_our_errors_are_one_paragraph_and_the_place_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    text = describe(caught(ConfigError("Met this.")), prefix="[rank 1/2] ")
    assert text.startswith("[rank 1/2] ConfigError: Met this. (test_report.py:")
    assert "in caught; DRIVETRAIN_TRACEBACK=1" in text
    monkeypatch.setenv("DRIVETRAIN_TRACEBACK", "1")
    assert describe(caught(ConfigError("Met this."))).startswith("Traceback (most recent call last):")


def test_other_errors_keep_their_traceback_and_end_with_the_rank_and_the_error() -> None:
    lines = describe(caught(ValueError("boom")), prefix="[rank 0/4] ").splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "[rank 0/4] ValueError: boom"


def test_notes_and_causes_are_kept() -> None:
    error = ValueError("boom")
    error.add_note("in training_step at epoch 0, batch 7")
    error.__cause__ = KeyError("deeper")
    text = describe(caught(error))
    assert text.endswith("ValueError: boom\nin training_step at epoch 0, batch 7")
    assert "KeyError: 'deeper'" in text


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5: Connection reset by peer."), True),
        (RuntimeError("Connection closed by peer [127.0.0.1]:42"), True),
        (RuntimeError("NCCL communicator was aborted on rank 0."), True),
        (ValueError("boom"), False),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)
def test_an_error_that_only_says_that_another_rank_has_gone_is_known(error: Exception, consequence: bool) -> None:
    assert is_consequence(error) is consequence
    wrapped = DataError("in the loop")
    wrapped.__cause__ = error
    assert is_consequence(wrapped) is consequence


def test_the_first_report_of_a_rank_is_kept(tmp_path: Path) -> None:
    first = ErrorReport(1, 2, "first", 1, 5.0, False)
    write_report(tmp_path / "e.json", first)
    write_report(tmp_path / "e.json", ErrorReport(1, 2, "second", 2, 6.0, False))
    assert read_report(tmp_path / "e.json") == first
    assert read_report(tmp_path / "none.json") is None
    (tmp_path / "half.json").write_text('{"rank": 1')
    assert read_report(tmp_path / "half.json") is None


SCRIPT = """
import atexit, sys
from drivetrain.trainer.launch.report import install_excepthook
from drivetrain.strategies.errors import ConfigError
install_excepthook()
atexit.register(print, "atexit ran")
raise {}("Met this.")
"""


def script(folder: Path, error: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT.format(error))
    return run_script(folder / "train.py")


def run_script(path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env={**os.environ, **variables}, timeout=120
    )


def test_in_a_plain_script_wrong_use_is_one_paragraph_and_exit_code_2(tmp_path: Path) -> None:
    ended = script(tmp_path, "ConfigError")
    assert (ended.returncode, ended.stdout) == (2, "atexit ran\n")
    assert ended.stderr == "ConfigError: Met this. (train.py:7 in <module>; DRIVETRAIN_TRACEBACK=1 shows the traceback)\n"


def test_in_a_plain_script_other_errors_are_pythons_own(tmp_path: Path) -> None:
    ended = script(tmp_path, "ValueError")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last):")
    assert ended.stderr.endswith("ValueError: Met this.\n")


def test_torchrun_is_told_the_cause_in_its_own_format(tmp_path: Path) -> None:
    """Its summary names the error then, instead of "To enable traceback see ..."."""
    (tmp_path / "train.py").write_text(SCRIPT.format("ValueError"))
    file = tmp_path / "elastic.json"
    variables = {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(file),
    }  # fmt: skip
    ended = run_script(tmp_path / "train.py", **variables)
    assert ended.returncode == 1
    assert ended.stderr.endswith("[rank 1/2] ValueError: Met this.\n")
    assert json.loads(file.read_text())["message"]["message"].endswith("[rank 1/2] ValueError: Met this.")


def test_for_torchrun_the_root_cause_is_the_rank_that_failed_and_not_one_that_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its summary takes the earliest, in whole seconds, and the lowest rank of those that are equal."""
    told = {}
    monkeypatch.setattr("time.time", lambda: 1000.5)
    for rank, text in enumerate(["Connection closed by peer [127.0.0.1]:42", "boom"]):
        file = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        report(RuntimeError(text))
        told[rank] = int(json.loads(file.read_text())["message"]["extraInfo"]["timestamp"])
    assert told[1] < told[0]


AS_TORCH_DOES = """
import os, torch, torch.distributed as dist
from drivetrain.trainer.launch.report import install_excepthook
install_excepthook()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torch puts its own hook around ours
os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
raise ValueError("Met this.")
"""


def test_an_error_is_still_on_the_screen_when_torch_has_put_its_own_hook_around_ours(tmp_path: Path) -> None:
    """Under srun and mpirun nobody else says it."""
    (tmp_path / "train.py").write_text(AS_TORCH_DOES)
    ended = run_script(tmp_path / "train.py")
    assert ended.returncode == 1
    assert ended.stderr.count("[rank 1/2] ValueError: Met this.") == 1


A_LIBRARYS_THREAD = """
import os, sys, threading
from drivetrain.trainer.launch.report import install_excepthook
install_excepthook()
os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")

def serve():  # as multiprocessing.resource_sharer does in a loader's worker
    try:
        raise EOFError("a client has gone")
    except Exception:
        sys.excepthook(*sys.exc_info())

thread = threading.Thread(target=serve)
thread.start()
thread.join()
print("goes on")
"""


def test_an_error_that_a_librarys_thread_shows_ends_nothing(tmp_path: Path) -> None:
    """It once ended the process from that thread: in a loader's worker, which then destroyed its trainer's groups and crashed."""
    (tmp_path / "train.py").write_text(A_LIBRARYS_THREAD)
    ended = run_script(tmp_path / "train.py")
    assert (ended.returncode, ended.stdout) == (0, "goes on\n")
    assert ended.stderr.endswith("EOFError: a client has gone\n")


A_WORKER_IS_LEFT = """
import multiprocessing, os, signal, sys, threading
from drivetrain.trainer.launch.report import install_excepthook
install_excepthook()

def shows():
    sys.excepthook(ConnectionResetError, ConnectionResetError("by the trainer"), None)
    print("the worker is there", flush=True)

def work():
    multiprocessing.parent_process().join()
    thread = threading.Thread(target=shows)
    thread.start()
    thread.join()

multiprocessing.get_context("fork").Process(target=work).start()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_whose_trainer_was_killed_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(A_WORKER_IS_LEFT)
    ended = run_script(tmp_path / "train.py")
    assert (ended.stdout, ended.stderr) == ("the worker is there\n", "")
