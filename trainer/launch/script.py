"""`Trainer(devices=2)` in a plain script: the first process becomes the agent and runs the script again, once per rank.

    python train.py --lr 0.1  -> Trainer(devices=2) -> ensure_ranks(2) -> 2 x `python train.py --lr 0.1` with rank variables
                                                                       -> the first process ends with their code
    torchrun, srun, mpirun    -> ensure_ranks only checks that they started what was asked for
Read `ensure_ranks` first. Imports no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ...strategies.environment import RankEnvironment, read_environment
from ...strategies.errors import ConfigError
from .agent import check_ranks, run_command
from .report import install_excepthook

_TAKE_A_VALUE = "WX"  # single letters of the interpreter's options; -c and -m end them


@dataclass(frozen=True)
class CommandLine:
    """How this process was started: the interpreter's options, then what it runs."""

    python: tuple[str, ...]
    command: tuple[str, ...]  # ("script.py", args...) or ("-m", "module", args...); empty: neither


def ensure_ranks(devices: int | None, num_nodes: int = 1) -> None:
    """Return in each of the `devices` ranks of this node; in a process that is not one of them, start them and exit.

    Args:
        devices: ranks on this node; None: as many as there are ("auto"), nothing is started or checked.
        num_nodes: machines; more than one need a launcher on each.
    Raises:
        ConfigError: a launcher started another number of ranks, or this process cannot be run again.
        SystemExit: in the agent, when the ranks have ended, with their code.
    """
    install_excepthook()
    if devices is not None:
        check_ranks(devices)
    env = read_environment()
    if env.is_launched or _group_exists():
        if devices is not None:
            _check_what_was_launched(env, devices, num_nodes)
        return
    if num_nodes != 1:
        raise ConfigError(
            f"num_nodes={num_nodes}, but no launcher started this process: each of the machines must start its own. Run "
            f"`drivetrain run --nnodes {num_nodes} --node-rank K --master-addr FIRST_HOST -n {devices or 1} {_script_name()}` on "
            "every node, with K from 0, or use torchrun or srun."
        )
    if devices is None or devices == 1:
        return
    reason = why_not_again()
    if reason:
        raise ConfigError(
            f"devices={devices} starts {devices} processes by running the script again, and this is {reason}. Put the training "
            f"into a function and call `from drivetrain import launch; launch(function, devices={devices})`, or "
            f"put it into a file and run `drivetrain run -n {devices} file.py`."
        )
    line = command_line()
    raise SystemExit(run_command(line.command, ranks=devices, python=line.python))


def command_line(orig_argv: Sequence[str] | None = None) -> CommandLine:
    """Take apart how Python was started (`sys.orig_argv`), so that it can be started so again."""
    argv = list(sys.orig_argv if orig_argv is None else orig_argv)
    options: list[str] = []
    index = 1
    while index < len(argv):
        token = argv[index]
        if token == "-" or not token.startswith("-"):
            command = argv[index:] if token != "-" else []
            return CommandLine(tuple(options), tuple(command))
        if token.startswith("--"):
            # Only --check-hash-based-pycs takes a value.
            width = 2 if token == "--check-hash-based-pycs" else 1
            options += argv[index : index + width]
            index += width
            continue
        used = 1
        for position, letter in enumerate(token[1:], start=1):
            rest = token[position + 1 :]
            if letter in "mc":
                before = [token[:position]] if position > 1 else []
                value = [rest, *argv[index + 1 :]] if rest else argv[index + 1 :]
                command = ["-m", *value] if letter == "m" else []
                return CommandLine((*options, *before), tuple(command))
            if letter in _TAKE_A_VALUE:
                used = 1 if rest else 2
                break
        options += argv[index : index + used]
        index += used
    return CommandLine(tuple(options), ())


def why_not_again() -> str:
    """Say what keeps this process from being run again as a script; empty when nothing does."""
    main = sys.modules.get("__main__")
    if "ipykernel" in sys.modules or "google.colab" in sys.modules:
        return "a notebook"
    if hasattr(sys, "ps1") or sys.flags.interactive or ("IPython" in sys.modules and hasattr(main, "get_ipython")):
        return "an interactive session"
    if "_pytest" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ:  # the second alone is inherited by what a test starts
        return "a test"
    if multiprocessing.parent_process() is not None:
        return "a process started by another one (multiprocessing)"
    if threading.current_thread() is not threading.main_thread():
        return "not the main thread"
    line = command_line()
    if not line.command:
        return "no script: `python -c`, or one read from standard input"
    if line.command[0] != "-m" and not os.path.exists(line.command[0]):
        return f"a script that is not found again as {line.command[0]!r} (was the working folder changed?)"
    return ""


def _check_what_was_launched(env: RankEnvironment, devices: int, num_nodes: int) -> None:
    size, local_size = (env.size, env.local_size) if env.is_launched else (_group_size(), None)
    if size == devices * num_nodes and (local_size in (None, devices)):
        return
    there = "the process group has" if not env.is_launched else f"{_launcher_name(env)} started"
    here = f" ({env.local_size} on this node)" if env.is_launched and env.num_nodes > 1 else ""
    raise ConfigError(
        f"devices={devices} and num_nodes={num_nodes} ask for {devices * num_nodes} processes, but {there} {size}{here}. "
        f"Start {devices * num_nodes}, or leave out devices= and take what was started."
    )


def _launcher_name(env: RankEnvironment) -> str:
    names = {"drivetrain": "`drivetrain run`", "slurm": "srun", "mpi": "mpirun"}
    return names.get(
        env.launcher, f"{env.launcher} (WORLD_SIZE={env.size})" if env.launcher == "torchrun" else f"WORLD_SIZE={env.size}:"
    )


def _group_exists() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported: then nobody has made a group
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _group_size() -> int:
    return sys.modules["torch.distributed"].get_world_size()


def _script_name() -> str:
    return os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "script.py"
