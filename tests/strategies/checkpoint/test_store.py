"""CheckpointStore in one process: what goes in comes out, what is committed stays, what is deleted was not needed."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from drivetrain.strategies.checkpoint import Checkpoint, CheckpointInfo, CheckpointStore, Keep, Shard, dtypes, layout, store
from drivetrain.strategies.checkpoint.writer import bytes_of
from drivetrain.strategies.errors import CheckpointError, ConfigError
from safetensors.torch import load_file
from torch import Tensor, nn

DTYPES = list(dtypes.DTYPES)


def filled(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of any type from random bytes: all bit patterns are met, NaNs with payload too."""
    kind = dtypes.DTYPES[dtype][0]
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (max(1, layout.count(shape)) * kind.itemsize,), dtype=torch.uint8)
    return raw[: layout.count(shape) * kind.itemsize].view(kind).reshape(shape)


def save(root: Path, step: int, **metrics: float) -> CheckpointInfo:
    return CheckpointStore(root).save(step, {"w": torch.full((3,), float(step))}, {}, meta={"metrics": metrics})


def steps(root: Path) -> list[int]:
    return sorted(info.step for info in CheckpointStore(root).list())


# -- what goes in comes out -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5, 7), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back_byte_for_byte(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = filled(dtype, shape)
    with CheckpointStore(tmp_path).open(CheckpointStore(tmp_path).save(1, {"t": tensor}, {}).path) as checkpoint:
        back = checkpoint.tensor("t")
        assert (back.dtype, back.shape, checkpoint.dtype("t"), checkpoint.shape("t")) == (
            tensor.dtype,
            shape,
            tensor.dtype,
            shape,
        )
        assert bytes(bytes_of(back)) == bytes(bytes_of(tensor))


def test_the_tensor_files_are_plain_safetensors(tmp_path: Path) -> None:
    """Truth: the reference implementation reads the same values."""
    tensors = {f"{d}{s}": filled(d, s) for d in DTYPES if dtypes.DTYPES[d][1] for s in ((), (3,), (0, 2), (4, 5))}
    info = CheckpointStore(tmp_path).save(1, tensors, {})
    theirs = load_file(info.path / "shard-00000-of-00001.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype
        assert bytes(bytes_of(theirs[name])) == bytes(bytes_of(tensor)), name


def test_views_are_saved_contiguous_and_tied_weights_once(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    conj = torch.randn(4, dtype=torch.complex64).conj()
    tied = {"w": base, "same": base, "same.data": nn.Parameter(base).detach()}
    views = {"t": base.t(), "cut": base[1:4, ::2], "wide": base[:1].expand(5, 8), "conj": conj, "neg": conj.imag}
    info = CheckpointStore(tmp_path).save(1, {**tied, **views}, {})
    with Checkpoint(info.path) as checkpoint:
        assert checkpoint.aliases == {"same": "w", "same.data": "w"}
        assert set(checkpoint.names()) == tied.keys() | views.keys()
        for name, tensor in {**tied, **views}.items():
            assert torch.equal(checkpoint.tensor(name), tensor), name
    assert info.num_bytes < 4 * (48 + 48 + 12 + 40) + 8 * 4 + 4 * 4 + 2000


def test_values_and_ranks_own_things_come_back(tmp_path: Path) -> None:
    values = {"optimizer/0": {"lr": float("inf"), "betas": (0.9, 0.99), 3: torch.arange(3), "nan": float("nan")}, "none": None}
    info = CheckpointStore(tmp_path).save(
        7,
        {"w": torch.ones(2)},
        values,
        rank_values={"loader": {"position": 12, "buffer": torch.arange(4)}},
        rank_tensors={"rng/torch": torch.get_rng_state()},
        meta={"counters": {"epoch": 2}, "metrics": {"loss": float("nan"), "acc": 0.5}, "shape": (1, 2)},
    )
    with Checkpoint(info.path) as checkpoint:
        optimizer = checkpoint.value("optimizer/0")
        assert optimizer["lr"] == float("inf")
        assert optimizer["betas"] == (0.9, 0.99)
        assert torch.equal(optimizer[3], torch.arange(3))
        assert optimizer["nan"] != optimizer["nan"]
        assert checkpoint.value("none") is None
        assert checkpoint.value_names() == ["optimizer/0", "none"]
        assert checkpoint.names() == ["w"]
        assert checkpoint.rank_value("loader", 0)["position"] == 12
        assert torch.equal(checkpoint.rank_value("loader", 0)["buffer"], torch.arange(4))
        assert torch.equal(checkpoint.rank_tensor("rng/torch", 0), torch.get_rng_state())
        assert (checkpoint.rank_names(0), checkpoint.rank_value_names(0)) == (["rng/torch"], ["loader"])
        assert checkpoint.meta["counters"] == {"epoch": 2}
        assert checkpoint.meta["metrics"]["loss"] != checkpoint.meta["metrics"]["loss"]
        assert checkpoint.meta["shape"] == (1, 2)
        assert (checkpoint.step, checkpoint.world_size) == (7, 1)
        assert checkpoint.manifest["torch"] == torch.__version__


def test_any_slice_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksum chunks of 64 bytes, so that slices begin and end in the middle of them."""
    monkeypatch.setattr("drivetrain.strategies.checkpoint.writer.CHUNK", 64)
    tensor = torch.arange(20 * 6 * 3).reshape(20, 6, 3).to(torch.float8_e4m3fn)
    info = CheckpointStore(tmp_path).save(1, {"t": tensor, "other": torch.arange(7)}, {})
    with Checkpoint(info.path) as checkpoint:
        for offset in itertools.product((0, 3, 19), (0, 2, 5), (0, 2)):
            for shape in itertools.product((0, 1, 2, 17, 20), (1, 3, 6), (1, 2, 3)):
                if all(o + s <= f for o, s, f in zip(offset, shape, tensor.shape, strict=True)):
                    cut = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
                    part = checkpoint.tensor("t", offset=offset, shape=shape)
                    assert torch.equal(part.view(torch.uint8), tensor[cut].contiguous().view(torch.uint8))


def test_a_slice_outside_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path).open(save(tmp_path, 1).path) as checkpoint:
        with pytest.raises(CheckpointError, match="no slice"):
            checkpoint.tensor("w", offset=(1,), shape=(3,))
        with pytest.raises(CheckpointError, match=r"holds no tensor 'ww'\. Did you mean 'w'"):
            checkpoint.tensor("ww")
        with pytest.raises(CheckpointError, match="holds no value"):
            checkpoint.value("w")
        with pytest.raises(CheckpointError, match="nothing of rank 1"):
            checkpoint.rank_value("w", 1)


@pytest.mark.parametrize(
    ("tensors", "values", "message"),
    [
        ({"w": 3}, {}, "Cannot save 'w': int"),
        ({"w": torch.ones(2, device="meta")}, {}, "meta device"),
        ({"w": torch.eye(3).to_sparse()}, {}, "layout torch.sparse_coo"),
        ({"w": torch.empty(2, dtype=cast(Any, torch).uint4)}, {}, "torch.uint4"),
        ({"value/w": torch.ones(2)}, {}, "store's own"),
        ({"w": Shard(torch.ones(3), (8,), (10,))}, {}, "does not lie in a tensor of shape"),
        ({}, {"EMA": {"state": {"fn": print}}}, re.escape("EMA.state['fn']: function")),
        ({}, {"a": {"b": [1, object()]}}, re.escape("a.b[1]: object")),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name_before_anything_is_written(
    tensors: dict[str, Any], values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointStore(tmp_path / "new").save(1, tensors, values)
    assert not (tmp_path / "new").exists()


def test_shards_that_leave_a_hole_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hold 3 of 10 elements(.|\n)*Nothing was committed"):
        CheckpointStore(tmp_path).save(1, {"w": Shard(torch.ones(3), (0,), (10,))}, {})
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


# -- the protocol ---------------------------------------------------------------------------------------------------------
def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record what reaches the disk, in order: (call, name of the file or folder)."""
    calls: list[tuple[str, str]] = []
    paths: dict[int, str] = {}

    def wrap(name: str, note: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, note(*args)))
            result = real(*args, **kwargs)
            if name == "open":
                paths[result] = Path(args[0]).name
            return result

        monkeypatch.setattr(os, name, call)

    wrap("open", lambda path, *_: Path(path).name)
    wrap("write", lambda fd, *_: paths[fd])
    wrap("fsync", lambda fd: paths[fd])
    wrap("rename", lambda a, b: f"{Path(a).name} -> {Path(b).name}")
    return calls


def test_files_are_durable_before_the_folder_and_the_folder_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves depends on this order: fsync each file, then the folder, rename, then the parent."""
    root = tmp_path / "runs" / "a"
    calls = record_calls(monkeypatch)
    CheckpointStore(root).save(1, {"w": torch.ones(3)}, {"v": 1}, rank_values={"r": 1})
    names = [f"{call} {name}" for call, name in calls]
    temporary = next(name.split(" -> ")[0] for call, name in calls if call == "rename")
    rename = names.index(f"rename {temporary} -> step-00000001")
    folder = names.index(f"fsync {temporary}")
    for file in ("shard-00000-of-00001.safetensors", "values.json", "values-00000.json", "manifest.json"):
        last_write = max(i for i, name in enumerate(names) if name == f"write {file}")
        assert last_write < names.index(f"fsync {file}") < folder < rename < len(names) - 1
    first_of_manifest = names.index("write manifest.json")
    assert all(names.index(f"fsync {f}") < first_of_manifest for f in ("shard-00000-of-00001.safetensors", "values.json"))
    assert f"fsync {root.name}" in names[rename:]
    assert names.index("fsync runs") < rename  # the folders that had to be made are durable too
    assert f"fsync {tmp_path.name}" in names[:rename]


def test_saving_a_step_again_replaces_it_only_when_the_new_one_is_committed(tmp_path: Path) -> None:
    store_ = CheckpointStore(tmp_path)
    first = store_.save(5, {"w": torch.zeros(2)}, {})
    second = store_.save(5, {"w": torch.ones(2)}, {})
    assert (first.path.name, second.path.name) == ("step-00000005", "step-00000005.2")
    assert store_.path_of(5) == second.path
    assert not first.path.exists()
    assert [info.path for info in store_.list()] == [second.path]
    with store_.open(5) as checkpoint:
        assert torch.equal(checkpoint.tensor("w"), torch.ones(2))
    assert store_.save(5, {"w": torch.ones(2)}, {}).path.name == "step-00000005.3"  # the one that was resumed from stays
    assert second.path.exists()
    assert store_.path_of(5).name == "step-00000005.3"  # pyright: ignore[reportOptionalMemberAccess]


def test_leftovers_of_killed_saves_are_never_taken_and_go_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000009-abc").mkdir()
    (tmp_path / ".tmp-step-00000009-abc" / "manifest.json").write_text("{}")
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("x")
    (tmp_path / ".tmp-link").symlink_to(outside)
    store_ = CheckpointStore(tmp_path)
    assert store_.latest() is None
    save(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".tmp-link", "precious", "step-00000010"]
    assert (outside / "file").read_text() == "x"


def test_another_process_that_saves_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PATIENCE_S", 0.2)
    code = (
        "import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
        "f.write('process 4711')\nf.flush()\nprint(flush=True)\ninput()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        with pytest.raises(CheckpointError, match=r"another process .process 4711. is saving"):
            save(tmp_path, 1)
        holder.stdin.write("\n")
    assert save(tmp_path, 1).step == 1


def test_too_little_space_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
    assert CheckpointStore(tmp_path).save(1, {"w": torch.ones(2)}, {}).step == 1
    with pytest.raises(CheckpointError, match=r"takes 3.8 MiB, and .* has 3.0 MiB free. Free some space"):
        CheckpointStore(tmp_path).save(2, {"w": torch.ones(1_000_000)}, {})
    assert steps(tmp_path) == [1]


def test_folders_and_files_have_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        info = save(tmp_path / "r", 1)
    finally:
        os.umask(before)
    assert oct(info.path.stat().st_mode & 0o777) == "0o750"
    assert {oct(p.stat().st_mode & 0o777) for p in info.path.iterdir()} == {"0o640"}


@pytest.mark.parametrize("name", ["with space", "ünï-日本", "quote'\"", "a" * 200])
def test_any_folder_name_works_also_through_a_link_and_relative(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    store_ = CheckpointStore(Path("link") / name)
    monkeypatch.chdir("/")  # the store knows its place whatever the working folder becomes
    info = store_.save(1, {"w": torch.ones(2)}, {})
    assert (tmp_path / "real" / name / "step-00000001" / "manifest.json").exists()
    assert store_.latest() == info


# -- which one ------------------------------------------------------------------------------------------------------------
def test_newest_is_the_last_committed_also_after_going_back(tmp_path: Path) -> None:
    """A run that goes on from step 20 makes a new line; when it is killed at 30, it goes on from 30, not from the old 60."""
    for step in (20, 40, 60, 30):
        save(tmp_path, step)
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert (latest.step, latest.notes) == (30, ())
    assert [info.step for info in CheckpointStore(tmp_path).list()] == [20, 40, 60, 30]


def test_no_checkpoint_is_none_and_no_whole_one_is_an_error(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "nothing").latest() is None
    assert CheckpointStore(tmp_path).latest() is None
    for step in (1, 2):
        (save(tmp_path, step).path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"None of the 2 checkpoints(.|\n)*step-00000001(.|\n)*step-00000002") as error:
        CheckpointStore(tmp_path).latest()
    assert error.value.exit_code == 3


def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    shard = tmp_path / "step-00000003" / "shard-00000-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert latest.step == 2
    assert len(latest.notes) == 2
    assert "step-00000004 was passed over" in latest.notes[0]
    assert "manifest.json is missing" in latest.notes[0]
    assert "step-00000003 was passed over" in latest.notes[1]
    assert shard.name in latest.notes[1]


def test_an_explicit_path_never_falls_back(tmp_path: Path) -> None:
    for step in (40, 60):
        save(tmp_path, step)
    store_ = CheckpointStore(tmp_path)
    (tmp_path / "step-00000060" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        store_.open(60)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 50 in .* There are: step-00000040, step-00000060"):
        store_.open(50)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*elsewhere"):
        store_.open(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="it holds checkpoints; name one of them: step-00000040, step-00000060"):
        store_.open(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        store_.open(tmp_path / "model.ckpt")
    with store_.open("step-00000040") as by_name, store_.open(tmp_path / "step-00000040") as by_path:
        assert by_name.step == by_path.step == 40


def test_a_newer_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    info = save(tmp_path, 1)
    manifest = layout.read_manifest(info.path)
    (info.path / "manifest.json").write_bytes(layout.encode_manifest({**manifest, "version": 2} | {"sha256": ""}))
    with pytest.raises(CheckpointError, match="format version 2, this drivetrain reads up to 1: install a newer one"):
        Checkpoint(info.path)


# -- keep and delete ------------------------------------------------------------------------------------------------------
def test_keep_rules(tmp_path: Path) -> None:
    losses = {10: 0.5, 20: 0.1, 30: 0.9, 40: float("nan"), 50: 0.2, 60: 0.7}
    for step, loss in losses.items():
        save(tmp_path, step, loss=loss)
    store_ = CheckpointStore(tmp_path)
    assert store_.prune(Keep()) == []
    assert store_.prune(Keep(last=1, best=2, metric="loss", every=30)) == [10, 40]
    assert steps(tmp_path) == [20, 30, 50, 60]
    assert store_.prune(Keep(best=1, metric="loss", mode="max")) == [20, 50, 60]
    assert steps(tmp_path) == [30]


def test_nothing_that_is_needed_is_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    store_ = CheckpointStore(tmp_path)
    store_.protect(1)
    store_.protect(2, by="best")
    store_.open(3).close()  # resumed from
    assert store_.prune(Keep(last=1)) == [4]
    assert steps(tmp_path) == [1, 2, 3, 5]
    store_.release(1)
    store_.release(2)  # by somebody else than who protects it
    assert store_.remove([1, 2, 3, 5]) == [2, 3]
    assert steps(tmp_path) == [2, 3]


def test_the_last_whole_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    """Damaged ones do not count, however new they are."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "shard-00000-of-00001.safetensors").write_bytes(b"")
    assert CheckpointStore(tmp_path).remove([1, 2]) == [2]
    assert steps(tmp_path) == [2, 3]
    assert CheckpointStore(tmp_path).remove([2, 3]) == [2]
    assert steps(tmp_path) == [2]


def test_a_link_is_no_checkpoint_and_what_it_points_to_is_never_deleted(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside", 9).path
    root = tmp_path / "run"
    save(root, 1)
    (root / "step-00000009").symlink_to(outside)
    store_ = CheckpointStore(root)
    assert [info.step for info in store_.list()] == [1]
    store_.remove([9])
    store_.prune(Keep(last=1))
    assert outside.exists()


def test_the_manifest_says_what_is_where(tmp_path: Path) -> None:
    """Pins the format, version 1: whoever changes this must raise layout.VERSION and keep reading the old one."""
    info = CheckpointStore(tmp_path).save(3, {"w": torch.ones(2, 2), "c": torch.ones(1, dtype=torch.complex64)}, {"v": 1})
    manifest = json.loads((info.path / "manifest.json").read_text())
    assert list(manifest) == [
        *("sha256", "format", "version", "step", "sequence", "meta", "world_size", "torch", "drivetrain", "saved_at"),
        *("files", "tensors", "aliases", "rank_tensors", "values", "rank_values"),
    ]
    assert (manifest["format"], manifest["version"], manifest["values"]) == ("drivetrain.checkpoint", 1, "values.json")
    shard = "shard-00000-of-00001.safetensors"
    piece = {"file": shard, "key": "w", "offset": [0, 0], "shape": [2, 2]}
    assert manifest["tensors"]["w"] == {"dtype": "float32", "shape": [2, 2], "pieces": [piece]}
    assert manifest["tensors"]["c"]["dtype"] == "complex64"
    assert sorted(manifest["files"][shard]) == ["bytes", "chunk", "crc32", "sha256"]
    assert (info.path / "values.json").read_text() == '{"v":1}'


# -- into memory that is there --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_read_into_the_memory_that_is_given(dtype: str, tmp_path: Path) -> None:
    tensor = filled(dtype, (5, 7))
    with CheckpointStore(tmp_path).open(CheckpointStore(tmp_path).save(1, {"t": tensor}, {}).path) as checkpoint:
        out = filled(dtype, (5, 7))
        where = out.data_ptr()
        assert checkpoint.read_into("t", out) is out
        assert out.data_ptr() == where
        assert bytes(bytes_of(out)) == bytes(bytes_of(tensor))


def test_what_is_read_into_may_be_a_part_of_another_type_or_order(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    parameter = nn.Parameter(torch.zeros(6, 8))
    with CheckpointStore(tmp_path).open(CheckpointStore(tmp_path).save(1, {"w": whole}, {}).path) as checkpoint:
        assert torch.equal(checkpoint.read_into("w", parameter), whole)
        assert torch.equal(checkpoint.read_into("w", torch.zeros(6, 8, dtype=torch.float64)), whole.double())
        assert torch.equal(checkpoint.read_into("w", torch.zeros(8, 6).t()), whole)
        assert torch.equal(checkpoint.read_into("w", torch.zeros(2, 3), offset=(3, 4)), whole[3:5, 4:7])
        column = torch.zeros(6, 8)
        checkpoint.read_into("w", column[:, 2:3], offset=(0, 2))
        assert torch.equal(column[:, 2], whole[:, 2])
        with pytest.raises(CheckpointError, match=r"'w' has shape \[6, 8\] and was to be read into \[6, 7\]"):
            checkpoint.read_into("w", torch.zeros(6, 7))
        with pytest.raises(CheckpointError, match="there is no slice"):
            checkpoint.read_into("w", torch.zeros(6, 7), offset=(0, 2))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_big_tensors_are_read_on_two_threads_and_damage_is_seen_on_both(at: int, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7), "big": torch.randn(5_000_001), "c": torch.randn(3)}
    path = CheckpointStore(tmp_path).save(1, tensors, {}).path
    with Checkpoint(path) as checkpoint:
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
        assert torch.equal(checkpoint.tensor("big", offset=(17,), shape=(4_900_000,)), tensors["big"][17:4_900_017])
    shard = path / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[1000 + at * (len(data) - 2000) // 2] ^= 1
    shard.write_bytes(data)
    with Checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="crc32 mismatch"):
        checkpoint.tensor("big")
