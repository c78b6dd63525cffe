"""The command line: one screen of help, did-you-mean, exit codes, and no torch until it is needed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import drivetrain
import pytest
from drivetrain.strategies.environment import VARIABLES
from drivetrain.strategies.errors import ConfigError
from drivetrain.trainer.cli import env, run
from drivetrain.trainer.cli.main import COMMANDS, main

OPTIONS = {
    "run": [
        *("--devices", "--dry-run", "--help", "--logs", "--master-addr", "--master-port", "--module", "--nnodes", "--node-rank"),
        *("-h", "-m", "-n"),
    ],
    "env": ["--help", "--json", "-h"],
}


def test_the_options_of_our_commands_are_those_of_this_list() -> None:
    """Whoever adds, renames or drops one changes this list, and the CHANGELOG. Other commands have lists in their own tests."""
    for name, expected in OPTIONS.items():
        module = importlib.import_module(COMMANDS[name].target.partition(":")[0])
        assert module.parser().option_names() == expected


def test_every_command_in_the_table_exists_and_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        assert command.summary
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: drivetrain {name}")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_is_one_screen(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines) <= 80
    assert all(any(line.strip().startswith(name) for line in lines) for name in COMMANDS)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"drivetrain {drivetrain.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "drivetrain: There is no command 'rum'. Did you mean 'run'?"),
        (["--versoin"], "drivetrain: There is no option '--versoin'. Did you mean '--version'?"),
        (["run", "--dry_run", "x.py"], "drivetrain: drivetrain run has no option '--dry_run'. Did you mean '--dry-run'?"),
        (["run", "--device=2", "x.py"], "drivetrain: drivetrain run has no option '--device'. Did you mean '--devices'?"),
        (["env", "--jsno"], "drivetrain: drivetrain env has no option '--jsno'. Did you mean '--json'?"),
        (["run"], "drivetrain: No script was named"),
        (["run", "-n", "2"], "drivetrain: No script was named"),
        (["run", "-n"], "drivetrain: drivetrain run: argument -n/--devices: expected one argument."),
        (["run", "-n", "two", "x.py"], "drivetrain: -n 'two': expected a number of processes, or 'auto'."),
        (["run", "-n", "0", "x.py"], "drivetrain: 0 processes were asked for: expected 1 or more"),
        (["run", "-n", "\u00b2", "x.py"], "drivetrain: -n '\u00b2': expected a number of processes, or 'auto'."),
        (
            ["run", "-n", "1", os.path.dirname(__file__)],
            f"drivetrain: {os.path.dirname(__file__)!r} is a folder without a __main__.py",
        ),
        (["run", "-n", "1", "--logs", __file__, __file__], f"drivetrain: --logs {__file__}: this folder cannot be made"),
        (["run", "--nnodes", "2", "x.py"], "drivetrain: --nnodes 2 needs --master-addr, the address of node 0"),
        (["run", "--nnodes", "2", "--master-addr", "a", "x.py"], "drivetrain: --nnodes 2 needs --node-rank: expected a number"),
        (["run", "--nnodes=2", "--master-addr=a", "--node-rank=2", "x.py"], "drivetrain: --nnodes 2 --node-rank 2: expected"),
        (["run", "--nnodes=2", "--master-addr=a", "--node-rank=0", "--master-port=0", "x.py"], "drivetrain: --master-port 0"),
        (["run", "--nnodes", "two", "x.py"], "drivetrain: --nnodes 'two': expected a whole number."),
        (["run", "--nnodes", "0", "x.py"], "drivetrain: --nnodes 0: expected 1 or more machines."),
        (["run", "--node-rank", "1", "x.py"], "drivetrain: --node-rank 1 without --nnodes"),
        (["run", "--master-addr", "a", "x.py"], "drivetrain: --master-addr without --nnodes"),
        (["run", "-n", "1", "no_such_script.py"], "drivetrain: There is no script 'no_such_script.py'"),
        (["run", "-n", "1", "-m", "no_such_module"], "drivetrain: No module named 'no_such_module'"),
    ],
)
def test_wrong_use_is_one_line_with_the_nearest_name_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert len(captured.err.splitlines()) == 1


def test_a_near_script_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").touch()
    assert main(["run", "-n", "1", str(tmp_path / "tran.py")]) == 2
    assert "Did you mean 'train.py'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "own", "command"),
    [
        (["-n", "2", "t.py", "-n", "3"], ["-n", "2"], ["t.py", "-n", "3"]),
        (["--devices=2", "--dry-run", "t.py", "--help"], ["--devices=2", "--dry-run"], ["t.py", "--help"]),
        (["-n2", "-m", "pkg.mod", "--logs", "x"], ["-n2"], ["-m", "pkg.mod", "--logs", "x"]),
        (["--module=pkg", "a"], [], ["-m", "pkg", "a"]),
        (["--logs", "d", "--", "t.py"], ["--logs", "d"], ["t.py"]),
        (["-n", "2"], ["-n", "2"], []),
    ],
)
def test_our_options_end_where_the_script_begins(argv: list[str], own: list[str], command: list[str]) -> None:
    assert run.split(argv, run.parser()) == (own, command)


def test_dry_run_prints_the_torchrun_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-n", "2", "--dry-run", "my train.py", "--lr", "0.1"]) == 0
    assert capsys.readouterr().out == "torchrun --nnodes 1 --nproc-per-node 2 --standalone 'my train.py' --lr 0.1\n"


def test_dry_run_of_several_machines_is_the_torchrun_line_of_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["--nnodes", "3", "--node-rank", "1", "--master-addr", "first"]
    assert main(["run", *nodes, "-n", "2", "--dry-run", "train.py"]) == 0
    expected = "--nnodes 3 --nproc-per-node 2 --node-rank 1 --master-addr first --master-port 29500 train.py"
    assert capsys.readouterr().out == f"torchrun {expected}\n"


def test_auto_on_a_machine_without_accelerator_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert run.count("auto") == 1
    with pytest.raises(ConfigError, match="-1 processes"):
        run.count("-1")


def test_env_reports_versions_devices_and_our_variables_but_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-canary")
    assert main(["env", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["versions"]["drivetrain"] == drivetrain.__version__
    assert found["versions"]["torch"].startswith("2.")
    assert sorted(found["drivetrain variables"]) == sorted(VARIABLES)
    assert main(["env"]) == 0
    printed += capsys.readouterr().out
    assert "a-canary" not in printed
    for name in VARIABLES:
        assert name.startswith("DRIVETRAIN_")
        assert name in printed


def test_env_reports_junk_in_rank_variables_instead_of_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "abc")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK='abc'" in env.report()["ranks"]["problem"]


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    """`import torch` takes seconds; help, a wrong flag and the agent of `drivetrain run` need none of it."""
    (tmp_path / "script.py").write_text("print('ran')")
    code = (
        "import sys\nfrom drivetrain.trainer.cli.main import main\n"
        "codes = [main(a) for a in (['--help'], ['--version'], ['run', '--dry_run'], ['run', '-n', '2', 'script.py'])]\n"
        "print(codes, [m for m in ('torch', 'numpy', 'tqdm', 'yaml', 'tyro') if m in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ended.stdout.splitlines()[-1] == "[0, 0, 2, 0] []"
    assert "ran" in ended.stdout.splitlines()


def test_logs_of_the_other_ranks_go_where_they_are_wanted(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os\nprint('rank', os.environ['RANK'])\n")
    code = [sys.executable, "-m", "drivetrain", "run", "-n", "3", "--logs", str(tmp_path / "logs"), str(script)]
    ended = subprocess.run(code, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("rank 0\n", "", 0)
    assert {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()} == {
        "rank1.log": "rank 1\n",
        "rank2.log": "rank 2\n",
    }
