"""A checkpoint made by an enemy: checksums right, content hostile. No code runs, nothing outside the folder is read or
written, no memory is taken for what is not there; always a CheckpointError.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.checkpoint import Checkpoint, CheckpointStore, layout
from drivetrain.strategies.errors import CheckpointError

PACKAGE = Path(layout.__file__).parent
SHARD = "shard-00000-of-00001.safetensors"


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    return CheckpointStore(tmp_path / "run").save(1, {"w": torch.arange(8.0)}, {"v": {"a": 1}}, rank_values={"r": 1}).path


def forge(path: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None, **files: bytes) -> None:
    """Change the manifest and the content of files, and make every checksum right again."""
    manifest = json.loads((path / "manifest.json").read_text())
    names = {"shard": SHARD, "values": "values.json"}
    for key, data in files.items():
        (path / names[key]).write_bytes(data)
        manifest["files"][names[key]] |= {"bytes": len(data), "sha256": sha256(data).hexdigest(), "chunk": max(1, len(data))}
        manifest["files"][names[key]]["crc32"] = [zlib.crc32(data)] if data else []
    change(manifest)
    manifest.pop("sha256")
    (path / "manifest.json").write_bytes(layout.encode_manifest(manifest))


def read_everything(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            checkpoint.tensor(name)
        for name in checkpoint.value_names():
            checkpoint.value(name)
        for rank in range(checkpoint.world_size):
            for name in checkpoint.rank_value_names(rank):
                checkpoint.rank_value(name, rank)


def is_refused(path: Path, match: str | None = None) -> None:
    """By reading, by verify, and by latest; and it took no memory worth speaking of."""
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=match):
        read_everything(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20
    if path.parent.name == "run":
        with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
            CheckpointStore(path.parent).latest()


def test_nothing_in_the_package_can_unpickle() -> None:
    """The one place that reads checkpoints has no pickle, no torch.load, no eval."""
    for file in PACKAGE.glob("*.py"):
        code = re.sub(r'"""(.|\n)*?"""|#.*|f?"[^"\n]*"', "", file.read_text())
        found = re.search(r"pickle|torch\.load|\beval\(|\bexec\(|import_module|__import__|shelve|marshal|yaml|subprocess", code)
        assert found is None, f"{file.name}: {found and found[0]}"


@pytest.mark.parametrize(
    "place", ["manifest.json", SHARD, "values.json", "values-00000.json", "extra.pkl", ".metadata", "data.pkl"]
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_anywhere_does_not_run(place: str, protocol: int, victim: Path, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "ran"), protocol)
    (victim / place).write_bytes(bomb)
    if place in (SHARD, "values.json"):
        files = {"shard" if place == SHARD else "values": bomb}
        forge(victim, lambda manifest: None, **files)
    if place in ("extra.pkl", ".metadata", "data.pkl"):
        read_everything(victim)  # nobody asks for it
    else:
        is_refused(victim)
    assert CheckpointStore(victim.parent).verify(victim) is not None
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)  # the bomb is live
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "/etc/hostname",
        "..",
        ".",
        "a/b",
        "a\\b",
        "",
        "~/x",
        "x\n",
        "x\0",
        "manifest.json",
        ".hidden",
        "con:x",
        "ü",
        "x" * 300,
    ],
)
def test_a_file_name_that_leaves_the_folder_is_refused(name: str, victim: Path) -> None:
    (victim.parent / "outside.bin").write_bytes((victim / SHARD).read_bytes())

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(SHARD)
        manifest["tensors"]["w"]["pieces"][0]["file"] = name

    forge(victim, change)
    is_refused(victim, "file name")


@pytest.mark.parametrize("file", [SHARD, "values.json", "manifest.json"])
def test_a_link_out_of_the_folder_is_not_followed(file: str, victim: Path) -> None:
    """The same bytes through a link: refused for being a link."""
    outside = victim.parent / "outside.bin"
    shutil.move(victim / file, outside)
    (victim / file).symlink_to(outside)
    is_refused(victim, f"{file} is missing or cannot be opened: it is a symlink")


def test_a_pipe_in_place_of_a_file_does_not_hang(victim: Path) -> None:
    (victim / SHARD).unlink()
    os.mkfifo(victim / SHARD)
    is_refused(victim, "no regular file")


def test_a_folder_in_place_of_a_file_is_refused(victim: Path) -> None:
    (victim / "values.json").unlink()
    (victim / "values.json").mkdir()
    is_refused(victim, "no regular file")


def shard(header: Any, data: bytes = bytes(32), size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


W = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        bytes(8),
        shard({"w": W}, size=2**63),
        shard({"w": W}, size=10 * 2**30),
        shard({"w": W}, size=5),
        shard(b"[1]"),
        shard(b"not json"),
        shard(b"[" * 100_000),
        shard(b'{"w": {"a":' * 50_000),
        shard({}),
        shard({"w": W}, bytes(31)),
        shard({"w": W}, bytes(33)),
        shard({"v": W}),
        shard({"w": {**W, "dtype": "F64"}}),
        shard({"w": {**W, "dtype": "PICKLE"}}),
        shard({"w": {**W, "dtype": []}}),
        shard({"w": {**W, "shape": [2**40, 2**40]}}),
        shard({"w": {**W, "shape": [-8]}}),
        shard({"w": {**W, "shape": [8.0]}}),
        shard({"w": {**W, "shape": [True] * 70}}),
        shard({"w": {**W, "shape": [4, 2]}}),
        shard({"w": {**W, "data_offsets": [32, 0]}}),
        shard({"w": {**W, "data_offsets": [-8, 24]}}),
        shard({"w": {**W, "data_offsets": [0, 2**60]}}),
        shard({"w": {**W, "data_offsets": [8, 40]}}, bytes(40)),
        shard({"w": W, "x": {**W, "data_offsets": [16, 48]}}, bytes(48)),
        shard({"w": W, "x": 3}),
        shard({"w": None}),
    ],
)
def test_a_wrong_header_is_refused_before_memory_is_taken(data: bytes, victim: Path) -> None:
    forge(victim, shard=data)
    is_refused(victim, re.escape(SHARD))


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"3", b"{", b"[" * 100_000, b'{"v":' * 100_000, b'{"v": {"$code": "x"}}', b'{"v": 1' + b"0" * 9999 + b"}"],
)
def test_values_that_are_no_values_are_refused(data: bytes, victim: Path) -> None:
    forge(victim, values=data)
    with pytest.raises(CheckpointError):
        read_everything(victim)


def set_piece(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"]["w"]["pieces"][0].update(change)


def set_tensor(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"]["w"].update(change)


def repeat_the_piece(manifest: dict[str, Any]) -> None:
    """A petabyte out of 32 bytes."""
    piece = manifest["tensors"]["w"]["pieces"][0]
    manifest["tensors"]["w"] |= {"shape": [8000], "pieces": [{**piece, "offset": [8 * i]} for i in range(1000)]}


@pytest.mark.parametrize(
    "change",
    [
        set_tensor(shape=[2**50]),
        set_tensor(shape=[0, 2**61]),
        set_tensor(shape=[2**70]),
        set_tensor(shape=[-8]),
        set_tensor(shape="8"),
        set_tensor(shape=[8] * 100),
        set_tensor(dtype="object"),
        set_tensor(dtype="float64"),
        set_tensor(dtype=["float32"]),
        set_tensor(pieces=[]),
        set_tensor(pieces={}),
        set_tensor(pieces=3),
        set_piece(key="other"),
        set_piece(key=3),
        set_piece(file="gone"),
        set_piece(file=None),
        set_piece(offset=[1]),
        set_piece(offset=[-1]),
        set_piece(offset=[]),
        set_piece(shape=[4]),
        repeat_the_piece,
        lambda m: m.update(tensors=[]),
        lambda m: m.update(aliases={"x": "nothing"}),
        lambda m: m.update(step="1"),
        lambda m: m.update(step=-1),
        lambda m: m.update(step=True),
        lambda m: m.update(format="other"),
        lambda m: m.update(version=0),
        lambda m: m.update(world_size=10**9),
        lambda m: m.update(values="../values.json"),
        lambda m: m.update(rank_values=["manifest.json"]),
        lambda m: m.update(meta=[]),
        lambda m: m.pop("files"),
        lambda m: m.update(files=[]),
        lambda m: m["files"][SHARD].update(bytes=2**60),
        lambda m: m["files"][SHARD].update(bytes=-1),
        lambda m: m["files"][SHARD].update(chunk=0),
        lambda m: m["files"][SHARD].update(crc32=[]),
        lambda m: m["files"][SHARD].update(crc32=["x"]),
        lambda m: m["files"][SHARD].update(sha256=None),
    ],
)
def test_a_manifest_that_lies_is_refused(change: Callable[[dict[str, Any]], None], victim: Path) -> None:
    forge(victim, change)
    is_refused(victim)


def test_a_huge_file_in_place_of_the_manifest_is_refused_unread(victim: Path) -> None:
    with open(victim / "manifest.json", "r+b") as file:
        file.truncate(10 * 2**30)  # a hole: takes no space
    is_refused(victim, "more than")


def test_the_folder_itself_may_be_reached_by_a_link_only_when_the_user_names_it(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(victim)
    with CheckpointStore(tmp_path / "run").open(tmp_path / "best") as checkpoint:
        assert checkpoint.step == 1


def test_names_of_saved_tensors_are_never_paths(tmp_path: Path) -> None:
    names = ["../../up", "/abs", "a\nb", "ünï", "__metadata__", "x" * 5000, "rank-00000/rng"]
    info = CheckpointStore(tmp_path / "run").save(
        1, {n: torch.ones(i + 1) for i, n in enumerate(names)}, {}, rank_tensors={"rng": torch.ones(9)}
    )
    assert sorted(p.name for p in info.path.iterdir()) == ["manifest.json", SHARD]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with Checkpoint(info.path) as checkpoint:
        assert [checkpoint.tensor(n).numel() for n in names] == [1, 2, 3, 4, 5, 6, 7]
        assert checkpoint.rank_tensor("rng", 0).numel() == 9
