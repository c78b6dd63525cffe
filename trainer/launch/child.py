"""What one rank runs before the user's script: `python -m drivetrain.trainer.launch.child script.py args...`.

It ties its life to the agent's, becomes `python script.py args...` as closely as can be, and reports an error that reaches the
top, one during the script's imports included. Imports no torch: that is the script's business.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from .report import end, exit_code, report_and_exit

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the process `parent` ends, even by SIGKILL. Linux; elsewhere nothing."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def run_script(command: list[str]) -> None:
    """Run `script.py args...` or `-m module args...` in this process, as Python itself would."""
    if command[0] == "-m":
        sys.argv = ["-m", *command[2:]]  # runpy replaces the first, as Python does
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(command)
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(command[0]))  # it was the working folder, as `python -m` has it
    runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    """Run the command of `sys.argv[1:]` as a rank, and end with its code."""
    die_with_parent(int(os.environ["DRIVETRAIN_AGENT_PID"]))
    try:
        run_script(sys.argv[1:])
    except SystemExit as error:
        if isinstance(error.code, str):
            report_and_exit(error)
        if exit_code(error):
            end(exit_code(error))
        raise
    except BaseException as error:
        report_and_exit(error)


if __name__ == "__main__":
    main()
