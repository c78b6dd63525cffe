"""What test_syscalls kills at every system call: a process under the shim disk.c, which forks a victim for each k.

    Victims(shim)                 starts this file as a script with LD_PRELOAD; torch is imported there once
    victims.ask(scenario=...)     a forked worker runs the scenario once for every k; the answer has what was lost

What a power cut leaves is worked out from the shim's journal, in the worker, after the death (`Cut`). It is a model, and this is
it: bytes written to a file since its last fsync are lost, or zeros are found in their place; names made in a folder since that
folder's last fsync are lost; renames since then are undone; or a random part of all that is, each for itself. What had an fsync
behind it is there, and so is what nobody changed. Names that were deleted stay deleted. A kill alone loses none of this.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from drivetrain.strategies.checkpoint import CheckpointStore, Keep
from drivetrain.strategies.checkpoint.verified import VerifiedFile
from drivetrain.strategies.errors import CheckpointError
from drivetrain.strategies.world import World

HOW = {"kill": 0, "half": 1, "power": 0, "eio": 2, "behind": 3}
"""At the k-th call: killed before it, in the middle of a write, killed and the power cut too, refused, killed behind it."""


# -- what is done while the k-th call comes ---------------------------------------------------------------------------------
def save(saver: CheckpointStore, step: int, **more: Any) -> Any:
    tensors = {f"w{i}": torch.full((10,), float(step)) for i in range(3)}
    return saver.save(step, tensors, {"step": step}, rank_values={"step": step}, meta={"step": step}, **more)


def one_save(saver: CheckpointStore, done: Callable[[int], None]) -> None:
    save(saver, 3)
    done(3)


def saves_and_prunes(saver: CheckpointStore, done: Callable[[int], None]) -> None:
    """A new step, the same step again, a prune, a deletion: every way in which a folder changes."""
    for step in (3, 3):
        save(saver, step)
        done(step)
    saver.prune(Keep(last=1))
    save(saver, 4)
    done(4)
    saver.remove([3])


def saves_beside(saver: CheckpointStore, done: Callable[[int], None]) -> None:
    """The same on a thread, beside which the weights go on changing; what is deleted goes behind the commit."""
    weights = {f"w{i}": torch.full((10,), 2.0) for i in range(3)}
    for step, gone in ((3, []), (3, [1, 2]), (4, [3])):
        for w in weights.values():
            w.fill_(step)
        handle = saver.save(
            step, weights, {"step": step}, rank_values={"step": step}, meta={"step": step}, remove=gone, wait=False
        )
        for w in weights.values():
            w.fill_(-1.0)
        handle.wait()
        done(step)


SCENARIOS = {"save": one_save, "saves and prunes": saves_and_prunes, "beside": saves_beside}


# -- mutants ----------------------------------------------------------------------------------------------------------------
def rename_by_copying(old: Any, new: Any) -> None:
    """What a move to another file system is: the files appear under the new name one by one."""
    if os.path.isdir(old):
        os.mkdir(new)
        for name in sorted(os.listdir(old)):
            Path(new, name).write_bytes(Path(old, name).read_bytes())
        shutil.rmtree(old)
    else:
        Path(new).write_bytes(Path(old).read_bytes())
        os.unlink(old)


def mutate(what: str) -> None:
    """Take a part of the protocol out, in this process and those that it forks. Nothing in the library knows of it."""
    if what == "fsync":
        os.fsync = lambda descriptor: None
    elif what == "rename":
        os.rename = rename_by_copying
    elif what == "checksum":
        assert callable(VerifiedFile._check)
        VerifiedFile._check = lambda self, index, data: None  # type: ignore[method-assign]
    else:
        raise ValueError(what)


# -- the disk after a power cut ---------------------------------------------------------------------------------------------
@dataclass
class Cut:
    """What was not durable when the power went, by the shim's journal."""

    lost_bytes: set[str]
    lost_names: dict[str, set[str]]
    renames: list[tuple[str, str]]

    @classmethod
    def read(cls, journal: Path) -> Cut:
        cut = cls(set(), {}, [])
        for line in journal.read_text().splitlines():
            cut._note(line[0], *line[2:].split("\t"))
        return cut

    def _note(self, kind: str, path: str, new: str = "") -> None:
        if kind in "CD":
            self.lost_names.setdefault(os.path.dirname(path), set()).add(path)
        elif kind in "WT":
            self.lost_bytes.add(path)
        elif kind == "S":
            self.lost_bytes.discard(path)
            self.lost_names.pop(path, None)
            self.renames = [(a, b) for a, b in self.renames if os.path.dirname(b) != path]
        elif kind == "U":
            self.lost_bytes.discard(path)
            for names in self.lost_names.values():
                names.discard(path)
        elif kind == "R":
            self.renames.append((path, new))
            self.lost_bytes = {_moved(p, path, new) for p in self.lost_bytes}
            self.lost_names = {
                _moved(folder, path, new): {_moved(n, path, new) for n in names if n != path}
                for folder, names in self.lost_names.items()
            }

    def apply(self, root: Path, there: Path, variant: str, dice: random.Random) -> None:
        """Make `there`, a copy of `root`, look as it may after the cut."""

        def is_lost() -> bool:
            return variant != "some of it" or dice.random() < 0.5

        def at(path: str) -> str:
            return _moved(path, str(root), str(there))

        for path in sorted(self.lost_bytes):
            if is_lost() and os.path.isfile(at(path)):
                size = os.path.getsize(at(path))
                os.truncate(at(path), 0)
                os.truncate(at(path), size if "zeros" in variant else 0)
        for path in sorted(name for names in self.lost_names.values() for name in names):
            if "names" in variant or (variant == "some of it" and is_lost()):
                shutil.rmtree(at(path), ignore_errors=True)
                with contextlib.suppress(OSError):
                    os.unlink(at(path))
        for old, new in reversed(self.renames):
            if "renames" in variant or (variant == "some of it" and is_lost()):
                with contextlib.suppress(OSError):
                    os.rename(at(new), at(old))


VARIANTS = ("bytes and names", "bytes, names and renames", "zeros", "zeros and renames", "some of it")
"""What is lost of that which no fsync had made durable."""


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(old + "/") else path


# -- one k ------------------------------------------------------------------------------------------------------------------
class Runs:
    """One request: the scenario for every k. `faults` says what was lost where."""

    def __init__(self, asked: dict[str, Any], shim: Any) -> None:
        self.asked, self.shim = asked, shim
        self.folder = Path(asked["folder"])
        self.base, self.root, self.journal = self.folder / "base", self.folder / "run", self.folder / "journal"
        self.faults: list[str] = []
        self.checks = self.hits = 0
        self.seconds: list[float] = []
        self.dice = random.Random(1)

    def answer(self) -> dict[str, Any]:
        for step in (1, 2):
            save(CheckpointStore(self.base), step)
        codes, _ = self._run(0)
        assert codes == [0] * self.asked["ranks"], f"the dry run ended with {codes}"
        kinds = Counter(line[0] for line in self.journal.read_text().splitlines())
        ks = self.asked["ks"] or range(1, 1000)
        kills = 0
        for k in ks:
            codes, acknowledged = self._run(k)
            if self.asked["how"] == "eio":
                through = not any(codes) and self._count < k
            else:
                through = codes[self.asked["victim"]] != -signal.SIGKILL
            self._judge(k, acknowledged)
            if through:
                break
            kills += 1
        return {
            "kills": kills,
            "checks": self.checks,
            "hits": self.hits,
            "faults": self.faults,
            "calls": dict(kinds),
            "seconds": self.seconds,
        }

    def _run(self, k: int) -> tuple[list[int], int]:
        """Run the scenario with the k-th call of the victim hit; return the exit codes and the last save that had returned."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.base, self.root)
        self.journal.write_text("")
        told = os.open(self.folder / "told", os.O_RDWR | os.O_CREAT)
        os.pwrite(told, struct.pack("qq", 2, 0), 0)
        size = self.asked["ranks"]
        port = free_port() if size > 1 else 0
        pids = [self._fork(rank, size, port, k, told) for rank in range(size)]
        codes = self._wait(pids)
        acknowledged, self._count = struct.unpack("qq", os.pread(told, 16, 0))
        os.close(told)
        return codes, acknowledged

    def _fork(self, rank: int, size: int, port: int, k: int, told: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            world = join(rank, size, port) if size > 1 else None
            saver = CheckpointStore(self.root, world)
            is_victim = rank == self.asked["victim"]
            how = HOW[self.asked["how"]]
            self.shim.disk_arm(os.fsencode(self.root), ctypes.c_long(k if is_victim else 0), how, os.fsencode(self.journal))

            def done(step: int) -> None:
                if rank == 0:
                    os.pwrite(told, struct.pack("q", step), 0)

            if world is not None:
                world.barrier()
            try:
                SCENARIOS[self.asked["scenario"]](saver, done)
            except CheckpointError:
                if self.asked["how"] != "eio":
                    raise
            if is_victim:
                os.pwrite(told, struct.pack("q", self.shim.disk_count()), 8)
            if world is not None:
                world.stop()
            code = 0
        except BaseException:
            if size == 1 or self.asked.get("verbose"):
                traceback.print_exc()
        finally:
            os._exit(code)

    def _wait(self, pids: list[int]) -> list[int]:
        """Wait for all ranks: a kill leaves the others to end by themselves, a power cut ends all of them at once."""
        codes: dict[int, int] = {}
        died, deadline = 0.0, time.monotonic() + 60
        while len(codes) < len(pids):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if len(codes) == 1:
                    died, deadline = time.monotonic(), time.monotonic() + 20
                    if self.asked["how"] == "power" and codes[pid] < 0:
                        for other in pids:
                            if other != pid:
                                os.kill(other, signal.SIGKILL)
                continue
            if time.monotonic() > deadline:
                self.faults.append(f"{len(pids) - len(codes)} of {len(pids)} ranks hang")
                for other in pids:
                    if other not in codes:
                        os.kill(other, signal.SIGKILL)
                deadline += 1e9
            time.sleep(0.0005)
        if len(pids) > 1:
            self.seconds.append(time.monotonic() - died)
        return [codes[pid] for pid in pids]

    # -- what is left -------------------------------------------------------------------------------------------------
    def _judge(self, k: int, acknowledged: int) -> None:
        self.hits += any(p.name.startswith(".tmp-step") for p in self.root.iterdir())
        if self.asked["how"] == "power":
            cut = Cut.read(self.journal)
            for variant in VARIANTS:
                self._copy_and_check(k, acknowledged, variant, lambda there, v=variant: cut.apply(self.root, there, v, self.dice))
        else:
            self._copy_and_check(k, acknowledged, "", lambda there: None)
        if self.asked.get("lies"):
            self._check_lies(k)

    def _copy_and_check(self, k: int, acknowledged: int, variant: str, change: Callable[[Path], None]) -> None:
        there = self.folder / "there"
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(self.root, there)
        change(there)
        self.checks += 1
        try:
            assert_whole(there, acknowledged)
            save(CheckpointStore(there), 9)
            assert assert_whole(there, 9) == 9
            left = [p.name for p in there.iterdir() if p.name.startswith(".tmp-")]
            assert not left, f"the next save leaves {left}"
        except (AssertionError, CheckpointError) as error:
            self.faults.append(f"call {k}{', lost: ' + variant if variant else ''}: {type(error).__name__}: {error}")

    def _check_lies(self, k: int) -> None:
        """A disk that lied: what had an fsync is zeros all the same, in one file of the newest checkpoint after the other."""
        newest = CheckpointStore(self.root).list()[-1]
        for file in sorted(p.name for p in newest.path.iterdir()):
            there = self.folder / "there"
            shutil.rmtree(there, ignore_errors=True)
            shutil.copytree(self.root, there)
            damaged = there / newest.path.name / file
            data = damaged.read_bytes()
            damaged.write_bytes(data[: -min(40, len(data) // 2)] + bytes(min(40, len(data) // 2)))
            self.checks += 1
            try:
                info = CheckpointStore(there).latest()
                assert info is not None
                assert info.step == newest.step - 1, f"step {info.step} was taken"
                assert len(info.notes) == 1, f"notes: {info.notes}"
                assert values_of(there, info.path) == {info.step}
            except (AssertionError, CheckpointError) as error:
                self.faults.append(f"call {k}, {file} zeroed: {type(error).__name__}: {error}")


def values_of(root: Path, path: Path) -> set[float]:
    """Return every number that the checkpoint holds: they are all its step."""
    with CheckpointStore(root).open(path) as checkpoint:
        seen: set[float] = {checkpoint.value("step"), checkpoint.meta["step"], checkpoint.step}
        seen |= {checkpoint.rank_value("step", rank) for rank in range(checkpoint.world_size)}
        for name in checkpoint.names():
            seen |= set(checkpoint.tensor(name).tolist())
    return seen


def assert_whole(root: Path, at_least: int) -> int:
    """The newest checkpoint is whole, of one step and no older than `at_least`; nothing had to be passed over."""
    saver = CheckpointStore(root)
    info = saver.latest()
    assert info is not None, "no checkpoint is left"
    assert info.notes == (), info.notes
    seen = values_of(root, info.path)
    assert seen == {info.step}, f"step {info.step} holds {sorted(seen)}"
    assert info.step >= at_least, f"step {at_least} had returned, the newest is {info.step}"
    for other in saver.list():
        assert saver.verify(other.path) == [], f"step {other.step} is damaged"
    return info.step


def join(rank: int, size: int, port: int) -> World:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), NODE_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return World.start("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- the server and its client ----------------------------------------------------------------------------------------------
class Victims:
    """The process under the shim. Use it with `with`."""

    def __init__(self, shim: Path) -> None:
        self.shim = shim

    def __enter__(self) -> Victims:
        env = os.environ | {"LD_PRELOAD": str(self.shim), "OMP_NUM_THREADS": "1", "DRIVETRAIN_TEST_SHIM": str(self.shim)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=env, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def ask(self, folder: Path, scenario: str, how: str, **more: Any) -> dict[str, Any]:
        """Return {kills, checks, hits (a half-written save was there), faults, calls (by kind), seconds (death to last exit)}.

        Args: see SCENARIOS and HOW; `ranks`, `victim`, `ks` (default: all), `mutant`, `lies`.
        """
        asked = {"folder": str(folder), "scenario": scenario, "how": how, "ranks": 1, "victim": 0, "ks": None} | more
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process under the shim has died"
        found = json.loads(answer)
        assert "error" not in found, found["error"]
        return found


def main(requests: Iterator[str]) -> None:
    shim = ctypes.CDLL(os.environ["DRIVETRAIN_TEST_SHIM"])
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # once here, not in every child
    out = os.dup(1)
    os.dup2(2, 1)
    for line in requests:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if asked.get("mutant"):
                    mutate(asked["mutant"])
                answer = Runs(asked, shim).answer()
                code = 0
            except BaseException:
                answer = {"error": traceback.format_exc()}
            data = json.dumps(answer).encode() + b"\n"
            while data:
                data = data[os.write(out, data) :]
            os._exit(code)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(iter(sys.stdin.readline, ""))
