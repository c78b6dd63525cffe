"""Killed, refused or cut off from power at its k-th system call, for every k, a save or a prune loses nothing.

The calls are those of libc: a shim (disk.c, LD_PRELOAD) stands before write, pwrite, fsync, fdatasync, rename*, unlink*, mkdir*,
rmdir, ftruncate and the opening of new files, whoever makes them. test_kill.py has the same by way of Python's `os`, with random
instants and full disks beside it. What a power cut leaves is a model, described in syscall_jobs.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from syscall_jobs import Victims

COMPILER = shutil.which("gcc") or shutil.which("cc")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD as disk.c uses it is Linux's"),
    pytest.mark.skipif(COMPILER is None, reason="waits for a C compiler: the shim is built from disk.c"),
]


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victims]:
    shim = tmp_path_factory.mktemp("shim") / "disk.so"
    source = Path(__file__).parent / "disk.c"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-O1", "-Wall", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    with Victims(shim) as started:
        yield started


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: these tests look at calls, not at a disk."""
    folder = Path(tempfile.mkdtemp(prefix="calls-", dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path))
    yield folder
    shutil.rmtree(folder)


def loses_nothing(victims: Victims, folder: Path, scenario: str, how: str, **more: Any) -> dict[str, Any]:
    found = victims.ask(folder, scenario, how, **more)
    assert found["faults"] == []
    return found


@pytest.mark.parametrize(
    ("scenario", "how"),
    [
        *(("saves and prunes", how) for how in ("kill", "power", "eio")),
        ("beside", "kill"),
        *(pytest.param("saves and prunes", how, marks=pytest.mark.slow) for how in ("half", "behind")),
        *(pytest.param("beside", how, marks=pytest.mark.slow) for how in ("half", "behind", "power", "eio")),
    ],
)
def test_nothing_is_lost_at_any_system_call(scenario: str, how: str, victims: Victims, memory_path: Path) -> None:
    found = loses_nothing(victims, memory_path, scenario, how)
    calls = found["calls"]
    # Three saves of three files and a manifest, with their folders, and two deletions: the shim saw every kind of call.
    assert calls["W"] >= 12
    assert calls["S"] >= 18
    assert calls["R"] >= 6
    assert calls["U"] >= 12
    assert calls["D"] == 3
    assert found["kills"] == sum(calls.values())
    assert how == "eio" or found["hits"] > 20


def test_a_disk_that_lies_about_fsync_is_found_out_and_the_checkpoint_before_it_is_used(
    victims: Victims, memory_path: Path
) -> None:
    found = loses_nothing(victims, memory_path, "save", "kill", lies=True)
    assert found["checks"] > 4 * found["kills"]


@pytest.mark.parametrize(
    ("mutant", "how", "more", "said"),
    [
        ("fsync", "power", {}, "had returned, the newest is 2|was passed over"),
        ("rename", "kill", {}, "was passed over"),
        ("checksum", "kill", {"lies": True}, r"shard-\S+ zeroed: AssertionError: step \d was taken"),
    ],
)
def test_these_tests_fail_without(
    mutant: str, how: str, more: dict[str, Any], said: str, victims: Victims, memory_path: Path
) -> None:
    """Mutants: with a part of the protocol taken out, runs are lost, and that is noticed. Without the mutant none is."""
    loses_nothing(victims, memory_path / "as it is", "save", how, **more)
    with pytest.raises(AssertionError, match=said):
        loses_nothing(victims, memory_path / "mutant", "save", how, mutant=mutant, **more)


@pytest.mark.parametrize("victim", [0, 1])
def test_two_ranks_lose_nothing_when_either_is_killed_at_some_call(victim: int, victims: Victims, memory_path: Path) -> None:
    found = loses_nothing(victims, memory_path, "save", "kill", ranks=2, victim=victim, ks=list(range(1 + victim, 40, 5)))
    assert found["kills"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "power"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("scenario", ["saves and prunes", "beside"])
def test_two_ranks_lose_nothing_at_any_call_of_either(
    scenario: str, victim: int, how: str, victims: Victims, memory_path: Path
) -> None:
    """One rank is killed, and the other ends by itself, at the latest after 20 s; or both lose their power."""
    found = loses_nothing(victims, memory_path, scenario, how, ranks=2, victim=victim)
    assert found["kills"] >= (60 if victim == 0 else 9)
    assert max(found["seconds"]) < 20
