"""The folder that holds a run's checkpoints: a save is visible when it is whole, or not at all.

    1  every rank    checks what it was given; says how much it has            ranks agree
    2  rank 0        clears leftovers of killed saves, checks the free space, makes .tmp-step-00000042-<token>/
    3  every rank    writes its files into it: checksums on the way, fsync     ranks agree
    4  rank 0        manifest.json, fsync; fsync the folder; rename it to step-00000042; fsync the parent     ranks agree

A kill before the rename leaves a folder that nobody takes for a checkpoint, a kill after it a whole one: a reader sees the
old state or the new. Nothing is overwritten: a step that is saved again gets a new folder (step-00000042.2), and the one
before it goes only when that is committed. Folders are renamed to .tmp-* before they are deleted, for the same reason.
What goes wrong on one rank is raised on all of them, after the temporary folder was removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..errors import CheckpointError
from .background import Background, SaveHandle, join_all
from .job import Job
from .keep import Keep
from .layout import (
    FORMAT,
    LOCK,
    MANIFEST,
    TEMPORARY,
    VERSION,
    CheckpointInfo,
    Shard,
    encode_manifest,
    folder_name,
    info_of,
    library_version,
    parse_folder,
    read_manifest,
)
from .lock import FolderLock
from .reader import Checkpoint
from .together import Alone, Ranks, Together, attempt
from .urls import is_url, path_of
from .writer import check_space, make_folder, sync_folder, wait_for, write_bytes

Steps = list[int]  # named here: inside the store, `list` is a method
_PATIENCE_S = 10.0
"""How long a save waits for another process to let go of the folder, and for the folder to appear on another machine."""
_unfinished: set[Path] = set()
"""The temporary folders in which this process is writing. They are no leftovers: several saves may go to one folder."""


class CheckpointStore:
    """The checkpoints of one run, in the folder `root`: a path, or a URL (url_store.py says what is different there).

    Methods marked "together" are called by all ranks.
    """

    def __new__(cls, root: str | Path, world: Ranks | None = None) -> CheckpointStore:
        if cls is CheckpointStore and is_url(root):
            from .url_store import UrlStore

            return super().__new__(UrlStore)  # pyright: ignore[reportArgumentType]
        return super().__new__(cls)

    def __init__(self, root: str | Path, world: Ranks | None = None) -> None:
        self.root: Path = path_of(root).expanduser().absolute()
        self._world: Ranks = world or Alone()
        self._together = Together(self._world, self.root)
        self._background = Background.of(self._world)
        self._whole: set[Path] = set()  # seen to be whole by this process
        self._claims: dict[str, set[int]] = {}  # who -> the steps that they need
        self._claims_lock = threading.Lock()  # a save may look at them from its own thread
        self._sequence: int | None = None  # of the last commit
        self._lock: FolderLock | None = None

    # -- save ---------------------------------------------------------------------------------------------------------
    @overload
    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | Shard | tuple[Shard, ...]],
        values: Mapping[str, Any],
        *,
        rank_values: Mapping[str, Any] | None = None,
        rank_tensors: Mapping[str, Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        remove: Iterable[int] = (),
        wait: Literal[True] = True,
    ) -> CheckpointInfo: ...
    @overload
    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | Shard | tuple[Shard, ...]],
        values: Mapping[str, Any],
        *,
        rank_values: Mapping[str, Any] | None = None,
        rank_tensors: Mapping[str, Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        remove: Iterable[int] = (),
        wait: Literal[False],
        on_failure: Callable[[], None] | None = None,
    ) -> SaveHandle: ...
    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | Shard | tuple[Shard, ...]],
        values: Mapping[str, Any],
        *,
        rank_values: Mapping[str, Any] | None = None,
        rank_tensors: Mapping[str, Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        remove: Iterable[int] = (),
        wait: bool = True,
        on_failure: Callable[[], None] | None = None,
    ) -> CheckpointInfo | SaveHandle:
        """Write a checkpoint and commit it (together). It is on the disk when this returns, or, without `wait`, later.

        Args:
            tensors: shared ones: the same on every rank that has them, or Shards of one whole. Each is written once.
            values: shared trees of plain values and tensors (state.py); rank 0's are written.
            rank_values, rank_tensors: what each rank keeps for itself, such as random states.
            meta: small plain values, readable without opening a file: counters, plan, `metrics`. Rank 0's are written.
            remove: steps that are deleted once this one is committed, as by `remove`.
            wait: False copies this rank's share and writes it on a thread (background.py). The copy is made when this
                returns: the tensors may change. Only one such save is under way: the next one of this world waits for it.
            on_failure: called on the thread when nothing could be committed.
        Returns: the committed checkpoint; without `wait` a SaveHandle, whose `wait()` returns it.
        Raises:
            ConfigError: something in it cannot be saved; the message has its name.
            CheckpointError: it could not be written. Nothing was committed, on any rank; what was there is untouched.
                Or the save under way before it failed; then this one was not begun.
        """
        self._background.settle()
        meta = meta or {}
        job = Job(step, self._world.rank, self._world.size)
        what = f"Saving step {step}"
        agree = self._together.agree
        prepared = attempt(lambda: job.prepare(tensors, values, rank_values or {}, rank_tensors or {}, meta))
        reports = agree(what, prepared)
        others = self._exchange(job, reports)
        planned = agree(what, attempt(lambda: job.plan(others)))
        needed = planned[0] + sum(report["bytes"] for report in reports)
        going = set(remove)
        if wait:
            return self._finish(job, needed, going, self._together, None)
        self._background.open(self._world)
        _, error = attempt(lambda: job.stage(self._background.staging))
        return self._background.start(
            step, lambda ranks: self._finish(job, needed, going, Together(ranks, self.root), error), on_failure
        )

    def _finish(self, job: Job, needed: int, going: set[int], together: Together, error: Exception | None) -> CheckpointInfo:
        """Write what is planned and commit it (together; perhaps on a thread, whose ranks are then those of `together`)."""
        what = f"Saving step {job.step}"
        on_main = together.ranks.rank == 0
        temporary = self.root / together.from_main(what, lambda: self._open_temporary(job.step, needed))
        try:
            outcome = (None, error) if error else attempt(lambda: job.write(self._see(temporary)))
            written = together.agree(what, outcome)
            told = together.from_main(what, lambda: self._commit(job, temporary, written))
        except BaseException:
            if on_main:
                self._drop(temporary)
            raise
        finally:
            _unfinished.discard(temporary)
        path = self.root / told.pop("name")
        self._whole.add(path)
        if on_main:
            with contextlib.suppress(OSError):  # the save itself has succeeded
                self._remove_replaced(job.step, path)
                self._remove(going - {job.step})
        # Described from what rank 0 said: another machine may see the new name a moment later.
        return info_of(path, told)

    def claim(self) -> None:
        """Take the folder for this run (together), so that a second one in it is refused before it writes anything.

        Raises:
            CheckpointError: another process has it.
        """
        self._together.from_main("Opening", self._take_and_clear)

    def unclaim(self) -> None:
        """Let other processes save in the folder, once no save is under way. The next save takes it again."""
        self.join()
        self._lock = None

    def join(self) -> None:
        """Wait until no save of this process is under way, however it ends. Local, as `settle`."""
        join_all()

    def settle(self) -> None:
        """Wait until no save is under way, in this or another folder of this world.

        Raises:
            CheckpointError: the last one failed, and nobody was told yet.
        """
        self._background.settle()

    def _exchange(self, job: Job, reports: list[Any]) -> list[Any] | None:
        """Return what each rank holds where they differ; None where all hold the same, as in ddp."""
        return None if len({r["digest"] for r in reports}) == 1 else self._world.gather_json([list(u) for u in job.held])

    def _take_and_clear(self) -> None:
        """Take the folder and delete what killed saves left: also for a run that has nothing more to save."""
        self._take()
        self._clear(_unfinished)

    def _open_temporary(self, step: int, needed: int) -> str:
        self._take_and_clear()
        self._check_space(needed)
        name = self._name_of_temporary(step)
        _unfinished.add(self.root / name)
        (self.root / name).mkdir()
        return name

    def _commit(self, job: Job, temporary: Path, written: list[Any]) -> dict[str, Any]:
        """Check that everything is there, write the manifest, rename; return what the others must know. On rank 0."""
        tables = job.index(written)
        for name, entry in tables["files"].items():
            size = self._size(temporary / name)
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{name}, written by another rank, is not to be seen from rank 0 in {temporary} "
                    f"({size} of {entry['bytes']} bytes). All ranks must see one folder: put the root on a shared file system."
                )
        sequence, revision = self._next(job.step)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": job.step,
            "sequence": sequence,
            "meta": job.meta,
            "world_size": job.size,
            "torch": str(torch.__version__),
            "drivetrain": library_version(),
            "saved_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **tables,
        }
        final = self._publish(temporary, folder_name(job.step, revision), encode_manifest(content))
        self._sequence = sequence
        sizes = {name: {"bytes": entry["bytes"]} for name, entry in tables["files"].items()}
        return {"name": final, "files": sizes} | {k: content[k] for k in ("step", "sequence", "meta", "world_size", "saved_at")}

    def _next(self, step: int) -> tuple[int, int]:
        """Return the sequence number and the folder's revision of the next commit."""
        if self._sequence is None:  # read once: nobody else commits here while this process holds the lock
            self._sequence = max((info.sequence for info in self.list()), default=0)
        last = self.path_of(step)
        named = parse_folder(last.name) if last else None
        return self._sequence + 1, named[1] + 1 if named else 1

    def _remove_replaced(self, step: int, path: Path) -> None:
        for other in self._folders():
            if other != path and _step_of(other) == step and step not in self._claims.get("resumed", ()):
                self._delete(other)

    # -- find and read ------------------------------------------------------------------------------------------------
    def list(self) -> list[CheckpointInfo]:
        """Return the committed checkpoints whose manifest can be read, oldest commit first. Their files are not read."""
        return self._scan()[0]

    def latest(self) -> CheckpointInfo | None:
        """Return the newest whole checkpoint, every file checked (together); None where there is no checkpoint at all.

        "Newest" is the last one committed: after a run went on from an older step, that is not the highest step.
        Newer ones that are damaged are passed over: `notes` has a sentence for each.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        self.join()
        infos, broken = self._together.from_main("Looking for checkpoints", self._names)
        notes: list[str] = []
        for name in reversed(infos):
            faults = self._faults_together(self.root / name)
            if not faults:
                info = info_of(self.root / name, read_manifest(self.root / name))
                newer = [why for step, why in broken if step >= info.step]
                self._whole.add(info.path)
                return replace(info, notes=tuple(newer + notes))
            notes.append(f"{name} was passed over: {faults[0]}")
        notes = [why for _, why in broken] + notes
        if notes:
            listed = "\n  ".join(notes)
            raise CheckpointError(
                f"None of the {len(notes)} checkpoints in {self.root} is whole:\n  {listed}\n"
                "Restore one from a copy, or start a new run under another name."
            )
        return None

    def open(self, target: str | Path | int) -> Checkpoint:
        """Open a checkpoint by step or path; just that one, whatever its state. It is protected from pruning.

        Raises:
            CheckpointError: there is no such checkpoint, or its manifest is damaged.
        """
        self.join()
        path = self._path_of(target)
        checkpoint = Checkpoint(path)
        if path.parent == self.root:
            with self._claims_lock:
                self._claims["resumed"] = {checkpoint.step}
        return checkpoint

    def verify(self, target: str | Path | int, *, full: bool = True) -> list[str]:
        """Read every file and return what is wrong, one sentence each; empty when it is whole.

        Args:
            full: compare the sha256 of the files that have one, too; without it only the crc32 of each chunk.
        """
        try:
            with Checkpoint(self._path_of(target)) as checkpoint:
                return checkpoint.faults(full=full)
        except CheckpointError as error:
            return [str(error)]

    def path_of(self, step: int) -> Path | None:
        """Return the folder of `step`, the last one committed if it was saved again; None if there is none."""
        own = [path for path in self._folders() if _step_of(path) == step]
        return own[-1] if own else None  # they are in order of (step, revision)

    # -- keep and delete ----------------------------------------------------------------------------------------------
    def protect(self, step: int, *, by: str = "user") -> None:
        """Never delete `step` until the same `by` releases it. For this process only, like every claim."""
        with self._claims_lock:
            self._claims.setdefault(by, set()).add(step)

    def release(self, step: int, *, by: str = "user") -> None:
        with self._claims_lock:
            self._claims.get(by, set()).discard(step)

    def remove(self, steps: Iterable[int]) -> Steps:
        """Delete the checkpoints of `steps` (together; rank 0 does it); return the steps that had to stay.

        A step stays that somebody protects or that was resumed from, and the last whole checkpoint always does.
        """
        return self._together.from_main("Deleting checkpoints", lambda: self._remove(set(steps)))

    def _remove(self, wanted: set[int]) -> Steps:
        with self._claims_lock:
            kept = wanted & set[int]().union(*self._claims.values())
        folders = self._folders()
        going = [path for path in folders if _step_of(path) in wanted - kept]
        stays = [path for path in folders if path not in going]
        if not any(path in self._whole for path in stays) and not any(self._is_whole(path) for path in stays):
            rescued = [path for path in reversed(going) if self._is_whole(path)][:1]
            going = [path for path in going if path not in rescued]
            kept |= {_step_of(path) for path in rescued}
        kept |= {_step_of(path) for path in going if not self._delete(path)}
        return sorted(kept)

    def prune(self, keep: Keep) -> Steps:
        """Delete what no rule of `keep` names (together); return the steps that are gone. See `remove` for what stays."""
        return self._together.from_main("Deleting checkpoints", lambda: self._prune(keep))

    def _prune(self, keep: Keep) -> Steps:
        if not (keep.last or keep.best or keep.every):
            return []
        infos = self.list()
        going = {info.step for info in infos} - keep.chosen(infos)
        return sorted(going - set(self._remove(going)))

    # -- inside -------------------------------------------------------------------------------------------------------
    def _scan(self) -> tuple[list[CheckpointInfo], list[tuple[int, str]]]:
        """Return what has a readable manifest, oldest commit first, and (step, reason) of what has not."""
        infos: list[CheckpointInfo] = []
        broken: list[tuple[int, str]] = []
        for path in self._folders():
            try:
                infos.append(info_of(path, read_manifest(path)))
            except CheckpointError as error:
                broken.append((_step_of(path), f"{path.name} was passed over: {error}"))
        return sorted(infos, key=lambda info: (info.sequence, info.step)), broken

    def _names(self) -> tuple[list[str], list[tuple[int, str]]]:
        infos, broken = self._scan()
        return [info.path.name for info in infos], broken

    def _faults_together(self, path: Path) -> list[str]:
        """Check a checkpoint's files, each rank its share."""
        try:
            with Checkpoint(path) as checkpoint:
                own = list(checkpoint.manifest["files"])[self._world.rank :: self._world.size]
                found = checkpoint.faults(files=own, full=False)
        except CheckpointError as error:
            found = [str(error)]
        return [fault for faults in self._world.gather_json(found) for fault in faults]

    def _path_of(self, target: str | Path | int) -> Path:
        if isinstance(target, int):
            found = self.path_of(target)
            if found is None:
                raise CheckpointError(f"There is no checkpoint of step {target} in {self.root}.{self._near()}")
            return found
        path: Path = path_of(target).expanduser()
        path = path.resolve() if path.exists() else self.root / path
        if path.is_file():
            raise CheckpointError(
                f"{path} is a file; a checkpoint is a folder with {MANIFEST}. Files of torch.save, Lightning or Hugging Face "
                "are pickles and are not read: load their weights yourself with torch.load(..., weights_only=True)."
            )
        if not path.is_dir():
            raise CheckpointError(f"There is no checkpoint at {Path(target).expanduser().absolute()}.{self._near()}")
        if not (path / MANIFEST).exists():
            inside = [found.name for found in CheckpointStore(path)._folders()]
            what = f"it holds checkpoints; name one of them: {', '.join(inside)}" if inside else f"it has no {MANIFEST}"
            raise CheckpointError(f"{path} is no checkpoint: {what}.{'' if inside else self._near()}")
        return path

    def _near(self) -> str:
        names = [path.name for path in self._folders()]
        return f" There are: {', '.join(names[-10:])}." if names else f" There is none in {self.root}."

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole and not self.verify(path, full=False):
            self._whole.add(path)
        return path in self._whole

    # -- on a disk: what another place does in its own way ----------------------------------------------------------------
    def _take(self) -> None:
        make_folder(self.root)
        if self._lock is None:
            self._lock = FolderLock(self.root / LOCK, _PATIENCE_S)

    def _clear(self, unfinished: set[Path]) -> None:
        for name in os.listdir(self.root):
            if name.startswith(TEMPORARY) and self.root / name not in unfinished:
                shutil.rmtree(self.root / name, ignore_errors=True)

    def _check_space(self, needed: int) -> None:
        check_space(self.root, needed)

    def _name_of_temporary(self, step: int) -> str:
        return f"{TEMPORARY}{folder_name(step)}-{secrets.token_hex(4)}"

    def _see(self, folder: Path) -> Path:
        return wait_for(folder, _PATIENCE_S)

    def _size(self, path: Path) -> int | None:
        return os.stat(path).st_size if os.path.lexists(path) else None

    def _drop(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, temporary: Path, final: str, manifest: bytes) -> str:
        write_bytes(temporary / MANIFEST, [memoryview(manifest)])
        sync_folder(temporary)
        # Rename last: a reader sees either no checkpoint or the whole one.
        os.rename(temporary, self.root / final)
        try:
            sync_folder(self.root)
        except OSError:
            self._delete(self.root / final)  # nobody knows whether it would survive a power cut
            raise
        return final

    def _folders(self) -> list[Path]:
        """Return the committed folders, by step. Links are none of ours."""
        try:
            with os.scandir(self.root) as entries:
                found = [e.name for e in entries if parse_folder(e.name) and e.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        return [self.root / name for name in sorted(found, key=lambda name: parse_folder(name) or (0, 0))]

    def _delete(self, path: Path) -> bool:
        """Delete a folder: first take its name away, so that a kill in between leaves no half checkpoint."""
        self._whole.discard(path)
        gone = self.root / f"{TEMPORARY}deleted-{path.name}-{secrets.token_hex(4)}"
        try:
            os.rename(path, gone)
            sync_folder(self.root)  # else a power cut could undo the renaming and not the deleting
        except OSError:
            return not os.path.lexists(path)
        shutil.rmtree(gone, ignore_errors=True)  # what is left of it goes at the next save
        return True


def _step_of(path: Path) -> int:
    return (parse_folder(path.name) or (-1, 0))[0]
