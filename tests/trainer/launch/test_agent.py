"""The agent with real processes: the first error last and once, exit codes kept, signals handed on, nobody left behind.

Most scripts here import no torch, so that a run of two ranks takes a fifth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

AGENT = (
    "import sys; from drivetrain.trainer.launch.agent import run_command; "
    "sys.exit(run_command(sys.argv[2:], ranks=int(sys.argv[1]), python=['-W', 'ignore::ImportWarning']))"
)
TORCH = """
import os, sys, time
import torch
from drivetrain.strategies.world import World
world = World.start("cpu")
"""


def start(folder: Path, script: str, *arguments: str, ranks: int = 2) -> subprocess.Popen[str]:
    """Start an agent for `script`, which becomes folder/script.py."""
    (folder / "script.py").write_text(script)
    return start_command(folder, "script.py", *arguments, ranks=ranks)


def start_command(folder: Path, *command: str, ranks: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", AGENT, str(ranks), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**{name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}, "TMPDIR": str(folder)},
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess([], process.returncode, out, err)


def run(folder: Path, script: str, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    return finish(start(folder, script, *arguments, ranks=ranks))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_error_on_one_rank_ends_all_and_is_shown_last_and_once(tmp_path: Path) -> None:
    """The others die of "Connection closed by peer", which is not shown: it is not what went wrong."""
    script = TORCH + (
        "for step in range(10**6):\n"
        "    world.all_reduce(torch.ones(3))\n"
        "    if step == 3 and world.rank == 1:\n"
        "        open('failed', 'w').write(str(time.time()))\n"
        "        raise ValueError('boom')\n"
    )
    ended = run(tmp_path, script)
    took = time.time() - float((tmp_path / "failed").read_text())
    print(f"from the error to the end of all: {took:.1f} s")
    assert took < 10
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == "[rank 1/2] ValueError: boom"
    assert ended.stderr.count("ValueError: boom") == 1
    assert ended.stderr.count("Traceback") == 1
    assert "script.py" in ended.stderr
    assert "onnection" not in ended.stderr
    assert "/trainer/launch/" not in ended.stderr


def test_wrong_use_is_one_paragraph_without_traceback_and_exit_code_2(tmp_path: Path) -> None:
    script = "from drivetrain.strategies.errors import ConfigError\nraise ConfigError('Met this. Expected that. Do so.')\n"
    ended = run(tmp_path, script)
    assert ended.returncode == 2
    first, last = ended.stderr.strip().splitlines()
    assert first == "All 2 ranks failed:"
    assert last.startswith("[rank 0/2] ConfigError: Met this. Expected that. Do so. (script.py:2 in <module>; ")


@pytest.mark.parametrize(
    ("on_rank_1", "code", "last_line"),
    [
        ("pass", 0, ""),
        ("sys.exit(7)", 7, "[rank 1/2] ended with exit code 7 without an exception that reached the top."),
        ("sys.exit('a word')", 1, "[rank 1/2] a word"),
        ("os.kill(os.getpid(), 9)", 137, "[rank 1/2] was killed by SIGKILL: by hand, or by the kernel because the machine had"),
        ("os._exit(3)", 3, "[rank 1/2] ended with exit code 3 without an exception"),
        ("from drivetrain.strategies.errors import CheckpointError as C; raise C('damaged')", 3, "[rank 1/2] CheckpointError"),
    ],
)
def test_the_exit_code_is_that_of_the_first_rank_that_failed(on_rank_1: str, code: int, last_line: str, tmp_path: Path) -> None:
    """Rank 0 would go on for a minute, and is stopped."""
    script = f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {on_rank_1}\nelif {code} != 0:\n    time.sleep(60)\n"
    ended = run(tmp_path, script)
    assert ended.returncode == code
    assert (ended.stderr.strip().splitlines() or [""])[-1].startswith(last_line)


@pytest.mark.parametrize("code", [75, 130, 143])
def test_ranks_that_leave_on_purpose_may_do_so_one_after_the_other(code: int, tmp_path: Path) -> None:
    """Saved and left: no failure, so nobody is killed and nothing is shown."""
    script = f"import os, sys, time\ntime.sleep(0.2 + int(os.environ['RANK']))\nprint('left')\nsys.exit({code})\n"
    ended = run(tmp_path, script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "left\n", "")


def test_a_rank_that_is_done_early_waits_for_nobody_and_stops_nobody(tmp_path: Path) -> None:
    script = "import os, time\nif os.environ['RANK'] == '1':\n    time.sleep(1.5)\n    open('done', 'w')\n"
    assert run(tmp_path, script).returncode == 0
    assert (tmp_path / "done").exists()


def test_a_rank_that_ignores_sigterm_is_killed_after_another_failed(tmp_path: Path) -> None:
    script = (
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    while not os.path.exists('ready'): time.sleep(0.01)\n"
        "    raise KeyError('x')\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(300)\n"
    )
    ended = run(tmp_path, script)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("[rank 1/2] KeyError: 'x'")


def test_rank_0_writes_to_the_screen_and_the_others_do_not(tmp_path: Path) -> None:
    ended = run(tmp_path, "import os, sys\nprint('out', os.environ['RANK'])\nprint('err', os.environ['RANK'], file=sys.stderr)\n")
    assert (ended.stdout, ended.stderr) == ("out 0\n", "err 0\n")
    assert not list(tmp_path.glob("drivetrain-*")), "their output is gone with the success"


def test_a_script_that_cannot_be_parsed_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    """No frame of runpy, and the rank stands before the error, not before its file."""
    ended = run(tmp_path, "def f(:\n")
    shown = [
        "All 2 ranks failed:",
        '  File "script.py", line 1',
        "    def f(:",
        "          ^",
        "[rank 0/2] SyntaxError: invalid syntax",
    ]
    assert ended.stderr.splitlines() == shown
    assert ended.returncode == 1


def test_closed_standard_streams_are_not_given_to_sockets(tmp_path: Path) -> None:
    """As under some daemons: the agent's next file would become the stdout of a rank."""
    (tmp_path / "script.py").write_text("import os, sys\nprint('x')\nopen(f'ran{os.environ[\"RANK\"]}', 'w').close()\n")
    line = [sys.executable, "-c", AGENT, "2", "script.py"]
    closed = 'exec "$@" <&- >&- 2>&-'
    ended = subprocess.run(["sh", "-c", closed, "sh", *line], cwd=tmp_path, timeout=60, check=False)
    assert ended.returncode == 0
    assert sorted(path.name for path in tmp_path.glob("ran*")) == ["ran0", "ran1"]


def test_what_a_launcher_above_said_of_its_ranks_is_not_about_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`drivetrain run` in a rank of torchrun: its agent holds no store for ours, which would wait for it."""
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "3",
        "WORLD_SIZE": "8",
    }.items():
        monkeypatch.setenv(name, value)
    script = (
        "from drivetrain.strategies.environment import read_environment as r\nprint(r().agent_store, r().launcher, r().size)\n"
    )
    assert run(tmp_path, script).stdout == "False drivetrain 2\n"


def test_the_output_of_the_others_is_kept_and_named_when_something_fails(tmp_path: Path) -> None:
    ended = run(tmp_path, "import os\nprint('a trace', os.environ['RANK'])\nassert os.environ['RANK'] == '0'\n")
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("Output of the other ranks: ")]
    assert Path(line.removeprefix("Output of the other ranks: ")).read_text() == "a trace 1\n"


def test_a_rank_that_dies_without_an_exception_shows_the_end_of_its_log(tmp_path: Path) -> None:
    script = "import os\nprint('last words', flush=True)\nif os.environ['RANK'] == '1': os.abort()\nimport time; time.sleep(60)\n"
    ended = run(tmp_path, script)
    assert ended.returncode == 134
    assert ended.stderr.splitlines()[-2] == "last words"
    assert "was killed by SIGABRT: a crash in native code" in ended.stderr.splitlines()[-1]


LISTENS = """
import os, signal, sys, time
count = 0
def handle(number, frame):
    global count
    count += 1
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(getattr(signal, name), handle)
open("ready" + os.environ["RANK"], "w").close()
end = time.time() + 60
while not count and time.time() < end:
    time.sleep(0.02)
time.sleep(0.3)
open("count" + os.environ["RANK"], "w").write(str(count))
if sys.argv[1] == "stay":
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_agent_reaches_every_rank_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start(tmp_path, LISTENS, str(code))
    assert wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    process.send_signal(number)
    ended = finish(process)
    assert ended.returncode == code
    assert [(tmp_path / f"count{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_the_second_sigterm_kills(tmp_path: Path) -> None:
    process = start(tmp_path, LISTENS, "stay")
    assert wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGTERM)
    assert wait_for(lambda: all((tmp_path / f"count{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert (ended.returncode, ended.stderr) == (143, "Stopped by SIGTERM.\n")


def test_ctrl_c_in_a_script_without_handlers_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    script = "import os, time\nopen('ready' + os.environ['RANK'], 'w').close()\ntime.sleep(60)\n"
    process = start(tmp_path, script)
    assert wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert (ended.returncode, ended.stderr) == (130, "Stopped by SIGINT.\n")


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Linux: PR_SET_PDEATHSIG")
def test_an_agent_killed_with_sigkill_leaves_no_orphan(tmp_path: Path) -> None:
    rank = "os.environ['RANK']"
    script = f"import os, time\nopen('pid' + {rank}, 'w').write(str(os.getpid()))\nopen('ready' + {rank}, 'w')\ntime.sleep(300)\n"
    process = start(tmp_path, script)
    assert wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert all(alive(pid) for pid in pids)
    process.kill()
    finish(process)
    assert wait_for(lambda: not any(alive(pid) for pid in pids), 10)


def test_the_workers_of_a_killed_rank_are_killed_too(tmp_path: Path) -> None:
    """A rank's process group holds its DataLoader workers, which would not notice by themselves for seconds."""
    script = (
        "import os, subprocess, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "    open('pid', 'w').write(str(worker.pid))\n"
        "    open('ready', 'w').close()\n"
        "    time.sleep(300)\n"
        "while not os.path.exists('ready'): time.sleep(0.01)\n"
        "raise ValueError('x')\n"
    )
    assert run(tmp_path, script).returncode == 1
    pid = int((tmp_path / "pid").read_text())
    assert wait_for(lambda: not alive(pid), 10)


def test_the_script_finds_itself_as_if_python_had_started_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").write_text("")
    script = tmp_path / "folder" / "script.py"
    script.write_text(
        "import beside, json, os, sys\n"
        "import __main__\n"
        "facts = [sys.argv, sys.path[0], __name__, __file__, __main__.__file__, sys.warnoptions, sys.stdin.read()]\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')\n"
        "json.dump([facts, [os.environ[n] for n in names]], open('facts' + os.environ['RANK'], 'w'))\n"
    )
    process = start_command(tmp_path, "folder/script.py", "--lr", "0.1 x")
    assert process.stdin is not None
    process.stdin.write("typed")
    assert finish(process).returncode == 0
    for rank in range(2):
        facts, names = json.loads((tmp_path / f"facts{rank}").read_text())
        told = ["typed", ""][rank]  # rank 0 reads what is piped in, the others nothing
        folder = str(tmp_path / "folder")
        path = "folder/script.py"
        assert facts == [[path, "--lr", "0.1 x"], folder, "__main__", path, path, ["ignore::ImportWarning"], told]
        assert names == [str(rank), str(rank), "2", "2"]


def test_a_module_is_run_as_python_m_would(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "job.py").write_text("import sys\nfrom . import job\nprint(__name__, __package__, sys.argv[1:])\n")
    ended = finish(start_command(tmp_path, "-m", "package.job", "a"))
    assert ended.stdout.splitlines()[-1] == "__main__ package ['a']"


def test_ranks_of_one_node_meet_on_loopback_only(tmp_path: Path) -> None:
    """The agent opens the store's socket and hands it to rank 0; nothing of the agent or the ranks listens elsewhere."""
    script = TORCH + (
        "import json\n"
        "from pathlib import Path\n"
        "world.all_reduce(torch.ones(1))\n"
        "def inodes(pid):\n"
        "    found = set()\n"
        "    for fd in Path(f'/proc/{pid}/fd').iterdir():\n"
        "        try: found.add(os.readlink(fd))\n"
        "        except OSError: pass\n"
        "    return found\n"
        "mine = inodes('self') | inodes(os.getppid())\n"
        "tables = [Path('/proc/self/net', name).read_text().splitlines()[1:] for name in ('tcp', 'tcp6')]\n"
        "rows = [line.split() for table in tables for line in table]\n"
        "listening = [row[1].split(':')[0] for row in rows if row[3] == '0A' and f'socket:[{row[9]}]' in mine]\n"
        "json.dump(listening, open(f'listening{world.rank}', 'w'))\n"
        "world.barrier()\n"
    )
    ended = run(tmp_path, script)
    assert (ended.returncode, ended.stderr) == (0, "")
    for rank in range(2):
        addresses = json.loads((tmp_path / f"listening{rank}").read_text())
        assert addresses
        assert set(addresses) == {"0100007F"}
