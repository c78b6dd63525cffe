"""The option parser of the commands: argparse, with did-you-mean, no guessing of shortened options, and our exit codes."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from ...strategies.errors import ConfigError, suggest


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are ConfigErrors that name the nearest option."""

    def __init__(self, command: str, description: str, usage: str | None = None) -> None:
        super().__init__(
            prog=f"drivetrain {command}",
            description=description,
            usage=usage,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def option_names(self) -> list[str]:
        """Return every spelling of every option, sorted."""
        return sorted(name for action in self._actions for name in action.option_strings)

    def takes_value(self) -> set[str]:
        """Return the spellings of the options that are followed by a value."""
        return {name for action in self._actions if action.nargs != 0 for name in action.option_strings}

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown[1].partition("=")[0]
            raise ConfigError(
                f"{self.prog} has no option {name!r}.{suggest(name, self.option_names())} "
                f"Known: {', '.join(self.option_names())}. See `{self.prog} --help`."
            )
        raise ConfigError(f"{self.prog}: {message}. See `{self.prog} --help`.")
