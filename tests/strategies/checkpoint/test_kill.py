"""A save that is killed, cut off from power, or refused by the disk loses nothing that was committed.

The victims are forked and do not cooperate: they are killed with SIGKILL, either from outside at a random instant, or at
their k-th system call that changes the disk, for every k. Afterwards the newest checkpoint must be whole, hold the values
of one single step, and be no older than the last save that had returned.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import CheckpointStore, Keep, writer
from drivetrain.strategies.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent))

from syscall_jobs import saves_and_prunes, saves_beside

CHANGES = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate", "pwrite")
"""The system calls by which a save or a prune changes the disk, as functions of `os`."""


def save(saver: CheckpointStore, step: int, size: int = 10) -> None:
    tensors = {f"w{i}": torch.full((size,), float(step)) for i in range(3)}
    saver.save(step, tensors, {"step": step}, rank_values={"step": step}, meta={"step": step})


def assert_whole(root: Path, at_least: int) -> int:
    """The newest checkpoint is whole, of one step and no older than `at_least`; nothing had to be passed over."""
    saver = CheckpointStore(root)
    info = saver.latest()
    assert info is not None
    assert info.notes == ()
    with saver.open(info.path) as checkpoint:
        seen = {checkpoint.value("step"), checkpoint.rank_value("step", 0), checkpoint.meta["step"], info.step}
        for name in checkpoint.names():
            seen |= set(checkpoint.tensor(name).tolist())
    assert seen == {info.step}, "values of different steps in one checkpoint"
    assert info.step >= at_least
    assert all(CheckpointStore(root).verify(other.path) == [] for other in saver.list())
    return info.step


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process; return its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


class Disk:
    """Stands between a process and its disk: counts the calls that change it, and lets something happen at the k-th.

    It also knows what a power cut would leave, at its worst: bytes of files and names in folders that no fsync has made
    durable are lost, while a rename may or may not have reached the disk before its folder's fsync.
    """

    def __init__(self, at: int, happen: Callable[[Disk, str, tuple[Any, ...]], None], *, fsync: bool = True) -> None:
        self.at, self.happen, self.fsync = at, happen, fsync
        self.count = 0
        self.real = {name: getattr(os, name) for name in CHANGES}
        self.names: dict[int, str] = {}
        self.unsaved_bytes: set[str] = set()
        self.unsaved_names: dict[str, set[str]] = {}
        self.unsaved_renames: list[tuple[str, str]] = []

    def install(self, patch: pytest.MonkeyPatch | None = None) -> None:
        for name in CHANGES:
            call = functools.partial(self._call, name)
            if patch:
                patch.setattr(os, name, call)
            else:
                setattr(os, name, call)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
            self.count += 1
            if self.count == self.at:
                self.happen(self, name, args)
        if name == "fsync" and not self.fsync:
            return None
        result = self.real[name](*args, **kwargs)
        self._note(name, args, result)
        return result

    def _note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open" and "dir_fd" not in args:
            self.names[result] = str(args[0])
        if (name == "open" and args[1] & os.O_CREAT) or name == "mkdir":
            self.unsaved_names.setdefault(os.path.dirname(args[0]), set()).add(str(args[0]))
        if name == "write":
            self.unsaved_bytes.add(self.names[args[0]])
        if name == "fsync":
            path = self.names[args[0]]
            self.unsaved_bytes.discard(path)
            self.unsaved_names.pop(path, None)
            self.unsaved_renames = [(a, b) for a, b in self.unsaved_renames if os.path.dirname(b) != path]
        if name == "rename":
            old, new = str(args[0]), str(args[1])
            self.unsaved_renames.append((old, new))
            self.unsaved_bytes = {p.replace(old, new) for p in self.unsaved_bytes}
            self.unsaved_names = {
                p.replace(old, new): {n.replace(old, new) for n in names if n != old} for p, names in self.unsaved_names.items()
            }

    def cut_power(self, *, renames_are_lost: bool) -> None:
        """Make the disk look as it may after a power cut at this instant."""
        for path in self.unsaved_bytes:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, 0)
        for names in self.unsaved_names.values():
            for path in names:
                shutil.rmtree(path, ignore_errors=True)
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                    self.real["unlink"](path)
        if renames_are_lost:
            for old, new in reversed(self.unsaved_renames):
                with contextlib.suppress(FileNotFoundError):
                    self.real["rename"](new, old)


def kill(disk: Disk, name: str, args: tuple[Any, ...]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_within_write(disk: Disk, name: str, args: tuple[Any, ...]) -> None:
    if name == "write":
        disk.real["write"](args[0], args[1][: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power(disk: Disk, name: str, args: tuple[Any, ...]) -> None:
    disk.cut_power(renames_are_lost=False)
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power_and_lose_renames(disk: Disk, name: str, args: tuple[Any, ...]) -> None:
    disk.cut_power(renames_are_lost=True)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: fsync costs nothing there, and these tests look at calls, not at a disk."""
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path))
    yield folder
    shutil.rmtree(folder)


def at_every_call(
    tmp_path: Path,
    happen: Callable[[Disk, str, tuple[Any, ...]], None],
    *,
    fsync: bool = True,
    action: Callable[[CheckpointStore, Callable[[int], None]], None] = saves_and_prunes,
) -> int:
    """Start `action` once for every k, until it gets through; return how many k there were."""
    base = tmp_path / "base"
    in_child(lambda: [save(CheckpointStore(base), step) for step in (1, 2)])  # type: ignore[func-returns-value]
    for k in range(1, 1000):
        root = tmp_path / str(k)
        shutil.copytree(base, root)
        told = os.open(tmp_path / "told", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.pwrite(told, struct.pack("q", 2), 0)

        def victim(root: Path = root, told: int = told, k: int = k) -> None:
            Disk(k, happen, fsync=fsync).install()
            action(CheckpointStore(root), lambda step: (os.pwrite(told, struct.pack("q", step), 0), None)[1])

        code = in_child(victim)
        acknowledged = struct.unpack("q", os.pread(told, 8, 0))[0]
        os.close(told)
        assert_whole(root, acknowledged)
        assert in_child(lambda root=root: save(CheckpointStore(root), 9)) == 0
        assert assert_whole(root, 9) == 9
        assert not [p for p in root.iterdir() if p.name.startswith(".tmp-")]
        shutil.rmtree(root)
        if code == 0:
            return k - 1
        assert code == -signal.SIGKILL
    raise AssertionError("the saves never got through")


@pytest.mark.parametrize("happen", [kill, kill_within_write, cut_power, cut_power_and_lose_renames])
def test_a_kill_at_any_system_call_loses_nothing(happen: Callable[[Disk, str, tuple[Any, ...]], None], memory_path: Path) -> None:
    calls = at_every_call(memory_path, happen)
    assert calls > 60  # three saves and two deletions: the hook saw them all


@pytest.mark.parametrize("happen", [pytest.param(kill, marks=pytest.mark.slow), cut_power])
def test_a_kill_at_any_system_call_of_a_save_beside_the_training_loses_nothing(
    happen: Callable[[Disk, str, tuple[Any, ...]], None], memory_path: Path
) -> None:
    assert at_every_call(memory_path, happen, action=saves_beside) > 60


def test_the_test_notices_a_missing_fsync(memory_path: Path) -> None:
    """A mutant: without fsync a power cut leaves a committed checkpoint of empty files."""
    with pytest.raises((AssertionError, CheckpointError)):
        at_every_call(memory_path, cut_power, fsync=False)


def test_the_test_notices_a_save_in_place(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: a save that writes under its final name is seen half-written."""

    def open_in_place(self: CheckpointStore, step: int, needed: int) -> str:
        self.root.mkdir(exist_ok=True)
        shutil.rmtree(self.root / f"step-{step:08d}", ignore_errors=True)
        os.mkdir(self.root / f"step-{step:08d}")
        return f"step-{step:08d}"

    monkeypatch.setattr(CheckpointStore, "_open_temporary", open_in_place)
    monkeypatch.setattr(CheckpointStore, "_next", lambda self, step: (step, 1))
    with pytest.raises((AssertionError, CheckpointError)):
        at_every_call(memory_path, kill)


# -- at random instants ---------------------------------------------------------------------------------------------------
def random_kills(root: Path, kills: int, seed: int, least: int) -> int:
    """SIGKILL a process that saves without a pause; return how many left a half-written save behind.

    `kills` times, and on, up to ten times as often, until `least` left one: how many do depends on the machine.
    """
    generator = random.Random(seed)
    told = os.open(root.parent / "told", os.O_RDWR | os.O_CREAT)
    os.pwrite(told, struct.pack("qq", 0, 0), 0)  # the last save that returned, and how many processes have begun to save
    half_written = 0
    for n in range(10 * kills):
        if n >= kills and half_written >= least:
            break
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                saver = CheckpointStore(root)
                newest = saver.latest()
                step = newest.step if newest else 0
                while True:
                    step += 1
                    os.pwrite(told, struct.pack("q", n + 1), 8)
                    save(saver, step, size=300_000)
                    os.pwrite(told, struct.pack("q", step), 0)
                    saver.prune(Keep(last=2))
            os._exit(1)
        while struct.unpack("q", os.pread(told, 8, 8))[0] <= n:  # until it has begun: the instants are in the saves
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        half_written += any(p.name.startswith(".tmp-step") for p in root.iterdir()) if root.exists() else 0
        acknowledged = struct.unpack("q", os.pread(told, 8, 0))[0]
        if acknowledged or CheckpointStore(root).list():
            assert_whole(root, acknowledged)
    os.close(told)
    return half_written


def test_twenty_random_kills_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = 20261122
    hits = random_kills(tmp_path / "run", 20, seed, 5)
    with capsys.disabled():
        print(f"\n[20 SIGKILLs or more, seed {seed}: {hits} hit a half-written save, 0 lost] ", end="")
    assert hits >= 5, "too few kills fell into a save to prove anything"


@pytest.mark.slow
def test_three_hundred_random_kills_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 losses of 300: with 95 % confidence the rate is under 1.3 %."""
    seed = time.time_ns() % 10**9
    hits = random_kills(tmp_path / "run", 300, seed, 75)
    with capsys.disabled():
        print(f"\n[300 SIGKILLs or more, seed {seed}: {hits} hit a half-written save, 0 lost] ", end="")
    assert hits >= 75


# -- a disk that refuses --------------------------------------------------------------------------------------------------
def refuse(disk: Disk, name: str, args: tuple[Any, ...]) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_error_at_any_system_call_leaves_the_earlier_ones_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call fails once: the save says so and nothing is committed, or it had been committed and stays."""
    base = tmp_path / "base"
    for step in (1, 2):
        save(CheckpointStore(base), step)
    failed = 0
    for k in range(1, 200):
        root = tmp_path / str(k)
        shutil.copytree(base, root)
        disk = Disk(k, refuse)
        saver = CheckpointStore(root)
        error = ""
        with monkeypatch.context() as patch:
            disk.install(patch)
            try:
                save(saver, 3)
            except CheckpointError as failure:
                error = str(failure)
        assert not error or ("Saving step 3" in error and "Input/output error" in error)
        failed += bool(error)
        expected = 2 if error else 3
        assert assert_whole(root, expected) == expected
        assert not [p for p in root.iterdir() if p.name.startswith(".tmp-")]
        save(saver, 4)  # the store itself is as good as new
        assert assert_whole(root, 4) == 4
        if disk.count < k:
            break
    assert failed > 15


def file_size_limit() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_file_that_may_not_grow_is_a_clear_error_and_leaves_the_earlier_ones(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def child() -> None:
        saver = CheckpointStore(root)
        save(saver, 1)
        file_size_limit()
        with pytest.raises(CheckpointError, match=r"File too large.* Free some space(.|\n)*Nothing was committed"):
            save(saver, 2, size=100_000)
        save(saver, 3)

    assert in_child(child) == 0
    assert assert_whole(root, 3) == 3
    assert sorted(p.name for p in root.iterdir()) == [".lock", "step-00000001", "step-00000003"]


def mount_small_disk(disk: Path) -> None:
    """Mount 4 MiB of memory for this process alone: the mount goes with it, whatever happens."""
    if ctypes.CDLL(None).unshare(0x00020000) or subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode:
        os._exit(77)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=False).returncode:
        os._exit(77)


@pytest.mark.parametrize("warned", [True, False])
def test_a_disk_that_fills_up_leaves_the_earlier_ones(warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the free space looked at before (warned), and with another process taking it in between (not warned)."""
    if not warned:
        monkeypatch.setattr(writer, "_MARGIN", -(2**40))

    def child() -> None:
        mount_small_disk(tmp_path)
        saver = CheckpointStore(tmp_path)
        for step in (1, 2):
            save(saver, step)
        with pytest.raises(CheckpointError, match="MiB free" if warned else "No space left on device"):
            save(saver, 3, size=1_000_000)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-00000001", "step-00000002"]
        assert assert_whole(tmp_path, 2) == 2
        save(saver, 4)

    code = in_child(child)
    if code == 77:
        pytest.skip("waits for the right to mount a tmpfs")
    assert code == 0


def test_a_folder_that_may_not_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Saving step 1 in .*file/run failed: FileExistsError"):
        save(CheckpointStore(tmp_path / "file" / "run"), 1)


def test_what_killed_saves_left_goes_when_a_run_takes_the_folder(tmp_path: Path) -> None:
    """Also when it has nothing more to save: a run that was killed in its last save, and is resumed at its end."""
    save(CheckpointStore(tmp_path), 1)
    (tmp_path / ".tmp-step-00000002-0a1b2c3d").mkdir()
    (tmp_path / ".tmp-step-00000002-0a1b2c3d" / "values.json").write_text("half")
    CheckpointStore(tmp_path).claim()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-00000001"]
