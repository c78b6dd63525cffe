"""`drivetrain run -n 2 script.py args...`: run a script on n processes of this machine, or of each of several."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from ...strategies.errors import ConfigError, suggest
from ..launch.agent import Nodes, check_ranks, run_command
from .parser import Parser


def parser() -> Parser:
    """Return the options of `drivetrain run`; those of the script are not among them."""
    result = Parser(
        "run",
        "Run a script, or a module with -m, on n processes of this machine. The first error of any process ends all,\n"
        "is shown last and once, and its exit code is that of this command. On several machines: the same command on\n"
        "each, with --nnodes, --master-addr and its own --node-rank; or torchrun, or srun.",
        usage="drivetrain run [-n N] [options] script.py [args...]\n       drivetrain run [-n N] [options] -m module [args...]",
    )
    result.add_argument(
        "-n", "--devices", default="auto", metavar="N", help="processes; 'auto' (default): one per accelerator, on CPU one"
    )
    result.add_argument("-m", "--module", metavar="MODULE", help="run a module, as `python -m`; the rest are its arguments")
    result.add_argument("--nnodes", default="1", metavar="N", help="machines that run this command, each with -n processes")
    result.add_argument("--node-rank", metavar="K", help="which of them this one is, from 0")
    result.add_argument("--master-addr", default="", metavar="HOST", help="the address of machine 0, at which all meet")
    result.add_argument("--master-port", default="29500", metavar="PORT", help="a port that is free there; default 29500")
    result.add_argument("--logs", type=Path, metavar="DIR", help="keep the output of processes above 0 in DIR/rank*.log")
    result.add_argument("--dry-run", action="store_true", help="only print the torchrun line that does the same")
    return result


def main(argv: list[str]) -> int:
    """Run `drivetrain run` with these arguments; return the exit code of the first process that failed."""
    options = parser()
    own, command = split(argv, options)
    chosen = options.parse_args(own)
    if not command:
        raise ConfigError("No script was named: `drivetrain run -n 2 script.py`, or `-m module`. See `drivetrain run --help`.")
    ranks = count(chosen.devices)
    nodes = nodes_of(chosen)
    if chosen.dry_run:
        line = ["torchrun", "--nnodes", str(nodes.count), "--nproc-per-node", str(ranks)]
        if nodes.count == 1:
            line.append("--standalone")
        else:
            line += ["--node-rank", str(nodes.rank), "--master-addr", nodes.address, "--master-port", str(nodes.port)]
        line += command
        print(shlex.join(line))
        return 0
    _check_target(command)
    return run_command(command, ranks=ranks, logs=chosen.logs, nodes=nodes)


def split(argv: list[str], options: Parser) -> tuple[list[str], list[str]]:
    """Cut a command line into our options and what is to be run: ("-m", module, args...) or (script, args...)."""
    valued = options.takes_value()
    index = 0
    while index < len(argv):
        token = argv[index]
        if token in ("-m", "--module"):
            return argv[:index], ["-m", *argv[index + 1 :]] if len(argv) > index + 1 else []
        if token.startswith("--module="):
            return argv[:index], ["-m", token.partition("=")[2], *argv[index + 1 :]]
        if token == "--":
            return argv[:index], argv[index + 1 :]
        if not token.startswith("-"):
            return argv[:index], argv[index:]
        index += 2 if token in valued else 1
    return argv, []


def count(text: str) -> int:
    """Return the number of processes that `-n` asks for."""
    if text == "auto":
        import torch

        return torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    if not text.lstrip("+-").isdecimal():
        raise ConfigError(f"-n {text!r}: expected a number of processes, or 'auto'.")
    check_ranks(int(text))
    return int(text)


def nodes_of(chosen: argparse.Namespace) -> Nodes:
    """Read the options about several machines.

    Raises:
        ConfigError: no numbers, some are missing, or they are given for one machine, where they would be ignored.
    """
    number = {
        name: _whole(f"--{name.replace('_', '-')}", getattr(chosen, name)) for name in ("nnodes", "node_rank", "master_port")
    }
    if number["nnodes"] == 1:
        if chosen.node_rank not in (None, "0"):
            raise ConfigError(f"--node-rank {chosen.node_rank} without --nnodes: say how many machines there are.")
        if chosen.master_addr:
            raise ConfigError(
                "--master-addr without --nnodes: one machine meets on its loopback. Say how many machines there are."
            )
        return Nodes()
    nodes = Nodes(number["nnodes"], number["node_rank"], chosen.master_addr, number["master_port"])
    nodes.check()
    return nodes


def _whole(option: str, text: str | None) -> int:
    if text is None:
        return -1
    if not text.isdecimal():
        raise ConfigError(f"{option} {text!r}: expected a whole number.")
    return int(text)


def _check_target(command: list[str]) -> None:
    if command[0] == "-m":
        sys.path.insert(0, os.getcwd())
        try:
            found = importlib.util.find_spec(command[1].partition(".")[0]) is not None
        finally:
            sys.path.pop(0)
        if not found:
            raise ConfigError(f"No module named {command[1]!r} was found from {os.getcwd()}. Name one as for `python -m`.")
        return
    script = Path(command[0])
    if script.is_dir() and not (script / "__main__.py").exists():
        near = ", ".join(sorted(entry.name for entry in script.glob("*.py"))[:5])
        raise ConfigError(
            f"{command[0]!r} is a folder without a __main__.py: expected a script. "
            + (f"It holds {near}." if near else "It holds no .py file.")
        )
    if not script.exists():
        folder = script.parent
        near = [entry.name for entry in folder.glob("*.py")] if folder.is_dir() else []
        raise ConfigError(
            f"There is no script {command[0]!r} in {os.getcwd()}.{suggest(script.name, near)} Give the path of a file."
        )
