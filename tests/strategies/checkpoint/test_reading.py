"""Reading in one pass, straight into the places of the tensors: the same values, all of them checked, and no second copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import CheckpointStore, Shard, verified
from drivetrain.strategies.errors import CheckpointError
from torch import Tensor

MIB = 2**20


def state() -> dict[str, Tensor]:
    """Tensors around the chunks' size: across their ends, many in one, none at all, and a type of 2 bytes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [MIB // 4 - 3, 5, 0, 3 * MIB // 4 + 1, 1, 2 * MIB, 17]
    found = {f"t{i}": torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    found |= {f"small{i}": torch.rand(3, generator=generator) for i in range(1500)}  # more than one read can take buffers
    return found | {"half": torch.rand(1000, 7, generator=generator).half(), "scalar": torch.tensor(3.5)}


def settle(path: Path) -> None:
    """Let the files look as if they had been written a while ago."""
    for file in path.iterdir():
        os.utime(file, (1e9, 1e9))


def old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the time of the last change, which nobody can set: let the clock go on."""
    settle(path)
    now = verified.time.time()
    monkeypatch.setattr(verified.time, "time", lambda: now + 60)


def test_many_tensors_are_read_as_they_were_saved(tmp_path: Path) -> None:
    saved = state()
    info = CheckpointStore(tmp_path).save(1, saved, {})
    out = {name: torch.full_like(tensor, -1) for name, tensor in saved.items()}
    with CheckpointStore(tmp_path).open(info.path) as checkpoint:
        checkpoint.read_many(out.items())
    assert all(torch.equal(out[name], saved[name]) for name in saved)


def test_places_of_another_type_or_order_in_memory_are_filled_as_well(tmp_path: Path) -> None:
    weight = torch.rand(300, 200)
    CheckpointStore(tmp_path).save(1, {"w": weight, "v": weight + 1}, {})
    turned, double = torch.zeros(200, 300).t(), torch.zeros(300, 200, dtype=torch.float64)
    with CheckpointStore(tmp_path).open(1) as checkpoint:
        checkpoint.read_many([("w", turned), ("v", double)])
    assert torch.equal(turned, weight)
    assert torch.equal(double, (weight + 1).double())


def test_one_tensor_may_be_read_into_two_places(tmp_path: Path) -> None:
    weight = torch.rand(3 * MIB)
    CheckpointStore(tmp_path).save(1, {"w": weight}, {})
    a, b = torch.zeros(3 * MIB), torch.zeros(3 * MIB)
    with CheckpointStore(tmp_path).open(1) as checkpoint:
        checkpoint.read_many([("w", a), ("w", b)])
    assert torch.equal(a, weight)
    assert torch.equal(b, weight)


@pytest.mark.parametrize("cut", [0, 1])
def test_pieces_are_read_into_their_place_however_they_were_cut(cut: int, tmp_path: Path, ranks: Any) -> None:
    full = torch.arange(6 * 10).reshape(6, 10).float()
    ranks(2, _save_half, str(tmp_path), cut)
    out, rows, columns = torch.zeros(6, 10), torch.zeros(2, 10), torch.zeros(6, 4)
    with CheckpointStore(tmp_path).open(1) as checkpoint:
        checkpoint.read_many([("w", out)])
        checkpoint.read_into("w", rows, offset=(2, 0))
        checkpoint.read_into("w", columns, offset=(0, 3))
    assert torch.equal(out, full)
    assert torch.equal(rows, full[2:4])
    assert torch.equal(columns, full[:, 3:7])


def _save_half(root: str, cut: int) -> None:
    from drivetrain.strategies.world import World

    world = World.start()
    full = torch.arange(6 * 10).reshape(6, 10).float()
    half = full.shape[cut] // 2
    offset = [0, 0]
    offset[cut] = half * world.rank
    piece = full.narrow(cut, offset[cut], half).contiguous()
    CheckpointStore(root, world).save(1, {"w": Shard(piece, tuple(offset), (6, 10))}, {})
    world.stop()


@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_met_in_one_pass(where: float, tmp_path: Path) -> None:
    saved = state()
    info = CheckpointStore(tmp_path).save(1, saved, {})
    file = next(info.path.glob("*.safetensors"))
    flip(file, int(file.stat().st_size * where))
    with CheckpointStore(tmp_path).open(1) as checkpoint, pytest.raises(CheckpointError, match="crc32 mismatch"):
        checkpoint.read_many((name, torch.zeros_like(tensor)) for name, tensor in saved.items())


def flip(file: Path, at: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 1]))


def test_what_was_found_whole_is_not_checked_again_until_it_was_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = state()
    info = CheckpointStore(tmp_path).save(1, saved, {})
    old(info.path, monkeypatch)
    checked: list[int] = []
    check = verified.VerifiedFile._check
    monkeypatch.setattr(verified.VerifiedFile, "_check", lambda self, i, p: (checked.append(i), check(self, i, p))[1])
    with CheckpointStore(tmp_path).open(1) as checkpoint:
        checkpoint.require_whole()
    assert checked
    checked.clear()
    with CheckpointStore(tmp_path).open(1) as checkpoint:
        checkpoint.require_whole()
    assert not checked
    flip(next(info.path.glob("*.safetensors")), 10 * MIB)
    with CheckpointStore(tmp_path).open(1) as checkpoint, pytest.raises(CheckpointError, match=r"crc32 mismatch.*Nothing was"):
        checkpoint.require_whole()


def test_a_file_that_was_just_written_is_never_taken_as_known(tmp_path: Path) -> None:
    """Within one tick of the clock of a file's times, it could change and look the same."""
    CheckpointStore(tmp_path).save(1, {"w": torch.zeros(9)}, {})
    with CheckpointStore(tmp_path).open(1) as checkpoint:
        checkpoint.require_whole()
        assert not any(checkpoint._file(name).known_whole() for name in checkpoint.manifest["files"])


def test_what_the_page_cache_does_not_have_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the reading, memory may have run short: what comes from the disk anew is nothing that was checked."""
    saved = {"w": torch.rand(3 * MIB)}
    info = CheckpointStore(tmp_path).save(1, saved, {})
    old(info.path, monkeypatch)
    with CheckpointStore(tmp_path).open(1) as checkpoint:
        checkpoint.require_whole()
    monkeypatch.setattr(verified.LocalFile, "cached", lambda *_: False)
    monkeypatch.setattr(verified.zlib, "crc32", lambda *_: 12345)
    with CheckpointStore(tmp_path).open(1) as checkpoint, pytest.raises(CheckpointError, match="crc32 mismatch"):
        checkpoint.read_many([("w", torch.zeros(3 * MIB))])


_LOAD = """
import json, sys, torch
from torch import nn
from drivetrain import Accelerator
layers = [nn.Linear(1024, 1024) for _ in range(24)]  # 4 MiB each; 288 MiB with the state of AdamW
model = nn.Sequential(*layers)
accelerator = Accelerator(device="cpu")
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
def step():
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
def peak():
    return {l.split(":")[0]: int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(("VmHWM", "RssAnon"))}
step()
if sys.argv[2] == "save":
    accelerator.save_state(sys.argv[1])
else:
    before = peak()["RssAnon"]
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    base = peak()["VmHWM"]
    accelerator.load_state(sys.argv[1])
    print(json.dumps({"extra": peak()["VmHWM"] - base, "state": before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux' /proc/self/clear_refs")
def test_loading_takes_no_second_copy_of_the_state(tmp_path: Path) -> None:
    """At most the largest tensor and 64 MiB beyond the live model and optimizer, measured from outside of Python."""
    for what in ("save", "load"):
        command = [sys.executable, "-c", _LOAD, str(tmp_path), what]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["state"] > 288
    assert found["extra"] <= 4 + 64


LEFT_OPEN = """
import sys, torch
from drivetrain.strategies.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save(1, {"w": torch.ones(3)}, {})
checkpoint = store.open(1)
print(checkpoint.tensor("w").sum().item())
"""


def test_a_checkpoint_that_is_left_open_says_nothing_at_the_end(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3.0\n", "")
