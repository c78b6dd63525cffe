"""The command line: `drivetrain COMMAND ...`. A command is one line in `COMMANDS` and one file beside this one.

The module of a command is imported only when it is called, and none of them imports torch before it needs it.
It has `parser() -> Parser` (the options, pinned by a test) and `main(argv: list[str]) -> int` (returns the exit code).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from drivetrain import __version__

from ...strategies.environment import debug_tracebacks
from ...strategies.errors import DrivetrainError, unknown_name
from ..launch.report import INTERRUPTED, describe


@dataclass(frozen=True)
class Command:
    """Where a command lives, as `module:function`, and what it does in one line."""

    target: str
    summary: str


COMMANDS = {
    "run": Command("drivetrain.trainer.cli.run:main", "run a script on n processes of this machine"),
    "ckpt": Command("drivetrain.trainer.cli.ckpt:main", "list, show, verify, compare, export and prune checkpoints"),
    "bench": Command("drivetrain.trainer.cli.bench:main", "compare the precisions on your model: speed, memory, losses"),
    "estimate": Command("drivetrain.trainer.cli.estimate:main", "estimate the memory of a local model, without its weights"),
    "env": Command("drivetrain.trainer.cli.env:main", "show versions, devices and variables, for bug reports"),
}

_OPTIONS = {"-h": "show this", "--help": "show this", "--version": "show the version"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code. Errors of ours are one paragraph on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except DrivetrainError as error:
        # The place in our own code, which `describe` would add, helps nobody here.
        print(describe(error) if debug_tracebacks() else f"drivetrain: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `drivetrain env | head`: the reader has gone, which is no error. Python's own flush at the end would complain.
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue]
        return 0


def help_text() -> str:
    """Return what `drivetrain --help` prints: one screen."""
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: drivetrain COMMAND [options]\n\n"
        "Train PyTorch models, from one CPU to many machines.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  -h, --help  show this\n  --version   show the version\n\n"
        "`drivetrain COMMAND --help` shows the options of a command."
    )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"drivetrain {__version__}")
        return 0
    if name.startswith("-"):
        raise unknown_name("option", name, _OPTIONS)
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    module, _, function = COMMANDS[name].target.partition(":")
    return int(getattr(importlib.import_module(module), function)(rest))


if __name__ == "__main__":
    raise SystemExit(main())
