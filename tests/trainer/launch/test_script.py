"""`Trainer(devices=2)` in a script: run again as it was started, or refused with the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from drivetrain.strategies.errors import ConfigError
from drivetrain.trainer.launch.script import command_line, ensure_ranks

JOB = """
import sys
from drivetrain.trainer.launch import ensure_ranks
ensure_ranks(2)
import torch
from drivetrain.strategies.world import World
world = World.start("cpu", timeout_s=60)
if world.is_main:
    print(world.size, float(world.all_reduce(torch.ones(()))), sys.argv[1:])
else:
    world.all_reduce(torch.ones(()))
"""
ENSURE = "from drivetrain.trainer.launch import ensure_ranks; ensure_ranks({})"


def python(*arguments: str, folder: Path, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **variables},
        timeout=90,
    )


@pytest.mark.parametrize(
    ("started", "options", "command"),
    [
        (["python", "train.py", "--lr", "1"], [], ["train.py", "--lr", "1"]),
        (["python", "-u", "-X", "dev", "-Werror", "a/t.py", "-m", "x"], ["-u", "-X", "dev", "-Werror"], ["a/t.py", "-m", "x"]),
        (["python", "-W", "ignore", "-m", "pkg.mod", "-x"], ["-W", "ignore"], ["-m", "pkg.mod", "-x"]),
        (["python", "-um", "pkg", "a"], ["-u"], ["-m", "pkg", "a"]),
        (["python", "-mpkg", "a"], [], ["-m", "pkg", "a"]),
        (["python", "-uXdev", "t.py"], ["-uXdev"], ["t.py"]),
        (["python", "--check-hash-based-pycs", "never", "t.py"], ["--check-hash-based-pycs", "never"], ["t.py"]),
        (["python", "-c", "import x", "t.py"], [], []),
        (["python", "-uc", "import x"], ["-u"], []),
        (["python", "-"], [], []),
        (["python", "-i"], ["-i"], []),
        (["python"], [], []),
    ],
)
def test_how_python_was_started_is_taken_apart(started: list[str], options: list[str], command: list[str]) -> None:
    found = command_line(started)
    assert (list(found.python), list(found.command)) == (options, command)


def test_a_plain_script_becomes_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    ended = python("job.py", "--lr", "0.1", folder=tmp_path)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("2 2.0 ['--lr', '0.1']\n", "", 0)


@pytest.mark.slow
def test_a_module_becomes_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "job.py").write_text(JOB)
    ended = python("-m", "package.job", "x", folder=tmp_path)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("2 2.0 ['x']\n", "", 0)


@pytest.mark.slow
def test_torchrun_starts_what_was_asked_for_and_a_mismatch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    ended = python(*run, "2", "job.py", "x", folder=tmp_path, OMP_NUM_THREADS="1")
    assert (ended.stdout, ended.returncode) == ("2 2.0 ['x']\n", 0)
    refused = python(*run, "1", "job.py", folder=tmp_path)
    assert refused.returncode == 1  # torchrun's own
    assert "ConfigError: devices=2 and num_nodes=1 ask for 2 processes, but torchrun (WORLD_SIZE=1) started 1." in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "reason"),
    [
        (("-c", ENSURE.format(2)), "", "no script: `python -c`"),
        (("-",), ENSURE.format(2), "no script"),
        ((), ENSURE.format(2), "no script"),
        (("-i", "-c", ENSURE.format(2)), "", "an interactive session"),
        (("gone.py",), "", "not found again as 'gone.py'"),
        (("thread.py",), "", "not the main thread"),
    ],
)
def test_what_cannot_be_run_again_is_refused_with_the_way_out(
    arguments: tuple[str, ...], stdin: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "gone.py").write_text(f"import os\nos.chdir('/')\n{ENSURE.format(2)}\n")
    (tmp_path / "thread.py").write_text(
        "import os, threading\nfrom drivetrain.trainer.launch import ensure_ranks\n"
        "from drivetrain.trainer.launch.report import report_and_exit\n"
        "def job():\n    try: ensure_ranks(2)\n    except Exception as error: report_and_exit(error)\n"
        "thread = threading.Thread(target=job)\nthread.start()\nthread.join()\n"
    )
    ended = python(*arguments, folder=tmp_path, stdin=stdin)
    assert reason in ended.stderr
    assert "launch(function, devices=2)" in ended.stderr
    if reason != "an interactive session":  # which goes on after an error
        assert ended.returncode == 2
        assert "Traceback" not in ended.stderr


def test_in_a_test_it_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="this is a test"):
        ensure_ranks(2)


def test_one_process_or_auto_starts_nothing() -> None:
    ensure_ranks(1)
    ensure_ranks(None)


@pytest.mark.parametrize("devices", [0, -1])
def test_no_processes_at_all_is_refused(devices: int) -> None:
    with pytest.raises(ConfigError, match=f"{devices} processes were asked for: expected 1 or more"):
        ensure_ranks(devices)


def test_several_nodes_need_a_launcher() -> None:
    with pytest.raises(ConfigError, match=r"num_nodes=2, but no launcher.*drivetrain run --nnodes 2 .* -n 4"):
        ensure_ranks(4, num_nodes=2)


def test_ranks_that_a_launcher_started_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    ensure_ranks(2, num_nodes=2)
    ensure_ranks(None)
    with pytest.raises(ConfigError, match=r"ask for 2 processes, but WORLD_SIZE=4: started 4 \(2 on this node\)"):
        ensure_ranks(2)
    with pytest.raises(ConfigError, match="ask for 4 processes"):
        ensure_ranks(4)
    with pytest.raises(ConfigError, match="devices=1 and num_nodes=4"):
        ensure_ranks(1, num_nodes=4)
