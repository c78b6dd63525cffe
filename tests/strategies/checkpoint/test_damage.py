"""Damage of any kind to any file is noticed, by latest, by verify and by whoever reads it; nothing wrong is ever handed out."""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drivetrain.strategies.checkpoint import Checkpoint, CheckpointStore, layout, verified, writer
from drivetrain.strategies.errors import CheckpointError

FILES = ("manifest.json", "shard-00000-of-00001.safetensors", "values.json", "values-00000.json")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints with every kind of content, in checksum chunks of 256 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drivetrain.strategies.checkpoint.writer.CHUNK", 256)
        for step in (1, 2):
            generator = torch.Generator().manual_seed(step)
            tensors = {f"w{i}": torch.randn(7 + i, 13, generator=generator) for i in range(3)}
            values = {"counters": {"epoch": step, "text": "x" * 50, "list": list(range(40))}, "t": torch.arange(5)}
            CheckpointStore(tmp_path).save(
                step, tensors, values, rank_values={"r": [1.5] * 9}, rank_tensors={"rng": torch.arange(30)}
            )
    return tmp_path


def read_everything(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            checkpoint.tensor(name)
        for name in checkpoint.value_names():
            checkpoint.value(name)
        for name in checkpoint.rank_value_names(0):
            checkpoint.rank_value(name, 0)
        for name in checkpoint.rank_names(0):
            checkpoint.rank_tensor(name, 0)


def is_noticed(root: Path, path: Path, file: str) -> None:
    """By name, by everyone, and the checkpoint before it is used."""
    saver = CheckpointStore(root)
    with pytest.raises(CheckpointError, match=file):
        read_everything(path)
    for full in (False, True):
        faults = saver.verify(path, full=full)
        assert faults
        assert file in faults[0]
    latest = saver.latest()
    assert latest is not None
    assert latest.step == 1
    assert len(latest.notes) == 1
    assert file in latest.notes[0]


def test_every_flipped_bit_is_noticed(root: Path) -> None:
    """600 random bits over all files, by their share of the bytes but at least 100 a file."""
    path = root / "step-00000002"
    generator = random.Random(3)
    flips = 0
    for file in FILES:
        whole = (path / file).read_bytes()
        for _ in range(150):
            bit = generator.randrange(len(whole) * 8)
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (path / file).write_bytes(damaged)
            is_noticed(root, path, file)
            flips += 1
        (path / file).write_bytes(whole)
    assert flips == 600
    assert CheckpointStore(root).verify(path) == []


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "one byte less": lambda b: b[:-1],
    "half": lambda b: b[: len(b) // 2],
    "one byte more": lambda b: b + b"\0",
    "zeros at the end": lambda b: b[:-64] + bytes(64),
    "all zeros": lambda b: bytes(len(b)),
    "reversed": lambda b: b[::-1],
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_every_cut_or_overwritten_file_is_noticed(damage: str, file: str, root: Path) -> None:
    path = root / "step-00000002"
    (path / file).write_bytes(DAMAGE[damage]((path / file).read_bytes()))
    is_noticed(root, path, file)


@pytest.mark.parametrize("file", FILES)
def test_a_deleted_file_is_noticed(file: str, root: Path) -> None:
    (root / "step-00000002" / file).unlink()
    is_noticed(root, root / "step-00000002", file)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_step_is_noticed(file: str, root: Path) -> None:
    """A swapped manifest names another step; every other swapped file has other bytes, unless the content is the same."""
    old, new = root / "step-00000001" / file, root / "step-00000002" / file
    if old.read_bytes() == new.read_bytes():
        assert file == "values-00000.json"
        return
    shutil.copy(old, new)
    with pytest.raises(CheckpointError):
        read_everything(new.parent)
    latest = CheckpointStore(root).latest()
    assert latest is not None
    assert latest.step == 1


SHARD = "shard-00000-of-00001.safetensors"
CHUNK = 2**16
MOVED: dict[str, Callable[[bytes], bytes]] = {
    "the first chunk last": lambda b: b[CHUNK:] + b[:CHUNK],
    "shifted by a chunk": lambda b: b[:CHUNK] + b[:-CHUNK],
    "shifted back by a chunk": lambda b: b[CHUNK:] + b[-CHUNK:],
    "two chunks exchanged": lambda b: b[:CHUNK] + b[2 * CHUNK : 3 * CHUNK] + b[CHUNK : 2 * CHUNK] + b[3 * CHUNK :],
    "one chunk twice": lambda b: b[: 2 * CHUNK] + b[CHUNK : 2 * CHUNK] + b[3 * CHUNK :],
}


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 1 and 2, whose tensors are in files that are too big for a sha256: nine chunks with a crc32 each."""
    monkeypatch.setattr(writer, "_BIG", CHUNK)
    monkeypatch.setattr(writer, "CHUNK", CHUNK)
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        CheckpointStore(tmp_path).save(step, {f"w{i}": torch.randn(16, 2**11, generator=generator) for i in range(4)}, {})
        entry = layout.read_manifest(tmp_path / f"step-{step:08d}")["files"][SHARD]
        assert "sha256" not in entry
        assert len(entry["crc32"]) == 9
    return tmp_path


@pytest.mark.parametrize("move", MOVED)
def test_whole_chunks_in_other_places_are_noticed_without_a_sha256(move: str, big: Path) -> None:
    """Each chunk's crc32 belongs to its place; the list of them is under the manifest's sha256."""
    file = big / "step-00000002" / SHARD
    whole = file.read_bytes()
    moved = MOVED[move](whole)
    assert len(moved) == len(whole)
    file.write_bytes(moved)
    is_noticed(big, file.parent, SHARD)


def test_files_of_equal_size_that_were_exchanged_are_noticed_without_a_sha256(big: Path) -> None:
    """Between two steps: the same names, shapes and header in both."""
    one, two = (big / f"step-0000000{step}" / SHARD for step in (1, 2))
    assert one.stat().st_size == two.stat().st_size
    one.rename(big / "aside")
    two.rename(one)
    (big / "aside").rename(two)
    for path in (one.parent, two.parent):
        with pytest.raises(CheckpointError, match=SHARD):
            read_everything(path)
        assert CheckpointStore(big).verify(path, full=False)
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        CheckpointStore(big).latest()


def test_a_renamed_folder_is_noticed(root: Path) -> None:
    (root / "step-00000002").rename(root / "step-00000007")
    with pytest.raises(CheckpointError, match="the manifest is of step 2: the folder was renamed"):
        CheckpointStore(root).open(7)


def test_an_edited_manifest_is_noticed_however_well_formed(root: Path) -> None:
    manifest = root / "step-00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step":2', '"step":3'))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        CheckpointStore(root).open(2)


def test_files_that_the_manifest_does_not_name_do_no_harm(root: Path) -> None:
    """Somebody's notes, or what a network file system leaves behind: never opened, no reason to lose a checkpoint."""
    (root / "step-00000002" / ".nfs000001").write_bytes(b"x")
    (root / "step-00000002" / "notes.txt").write_text("good one")
    latest = CheckpointStore(root).latest()
    assert latest is not None
    assert latest.step == 2


def test_a_copy_of_a_checkpoint_is_as_good(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "step-00000002", tmp_path / "elsewhere" / "my best")
    assert CheckpointStore(root).verify(tmp_path / "elsewhere" / "my best") == []
    read_everything(tmp_path / "elsewhere" / "my best")


def test_damage_in_one_tensor_does_not_keep_the_others_from_being_read(root: Path) -> None:
    """Only the chunks that are read are checked: what was asked for is right, or refused. w2 lies last in its file."""
    shard = root / "step-00000002" / FILES[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with Checkpoint(shard.parent) as checkpoint:
        with pytest.raises(CheckpointError, match="crc32 mismatch in bytes"):
            checkpoint.tensor("w2")
        assert checkpoint.tensor("w1").shape == (8, 13)


def test_the_tests_notice_a_missing_checksum(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: without the comparison a flipped bit comes through as another number."""
    shard = root / "step-00000002" / FILES[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    monkeypatch.setattr(verified.VerifiedFile, "_check", lambda self, index, part: None)
    with pytest.raises(pytest.fail.Exception):
        is_noticed(root, shard.parent, FILES[1])


def test_sha256_notices_what_was_made_to_fit_crc32(root: Path) -> None:
    """verify(full=True) looks at more than the quick check: an entry whose crc32 fits other bytes is still found."""
    path = root / "step-00000002"
    manifest = layout.read_manifest(path)
    entry = manifest["files"]["values.json"]
    data = bytearray((path / "values.json").read_bytes())
    data[-3] ^= 1
    (path / "values.json").write_bytes(data)
    entry["crc32"] = [zlib.crc32(data[i : i + 256]) for i in range(0, len(data), 256)]
    manifest.pop("sha256")
    (path / "manifest.json").write_bytes(layout.encode_manifest(manifest))
    assert any("sha256 mismatch" in fault for fault in CheckpointStore(root).verify(path))
