"""The folder of a run: runs/<name>/<id>/ with config.yaml, metrics.jsonl, logs/ and checkpoints/; and which run a resume means.

`resume=None` makes a new folder; "auto" goes on in the newest folder of that name, or starts anew when that has no checkpoint;
a path names a checkpoint, a run folder, or a checkpoints folder, and is taken just as it is.

root= may be a URL (memory://, s3://, ...: strategies/checkpoint/url_store.py). The checkpoints lie there, under the same names,
and there a resume looks for runs; config.yaml, metrics and logs are written to runs/<name>/<id>/ on this machine.
Checkpoint(dirpath=...), a folder or a URL, takes the place of checkpoints/. There is not one for each run, so it belongs to the
run whose checkpoints are in it: another one goes on from them, or is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..strategies.checkpoint.layout import LOCK
from ..strategies.checkpoint.urls import is_url, path_of
from ..strategies.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ..strategies.checkpoint.layout import CheckpointInfo
    from ..strategies.world import World

__all__ = ["RunFolder", "check_shared", "open_run"]

# How long a shared file system may take to show another machine what was made.
_PATIENCE_S = 10.0
_RUN = re.compile(r"(\d{8}-\d{6})(?:-\d+)?")


@dataclass
class RunFolder:
    """Where a run writes, and what it goes on from.

    Attributes:
        resume_from: the folder of the checkpoint to load; None starts fresh.
        notes: what the user should be told: which checkpoint, which were passed over, an unfinished run that lies there.
    """

    name: str
    id: str
    path: Path
    resume_from: Path | None = None
    notes: list[str] = field(default_factory=list)
    remote: Any = None
    """The run's folder behind a URL, where its checkpoints lie, if root= was one."""
    elsewhere: Any = None
    """The folder of its checkpoints, where one was given."""

    @property
    def checkpoints(self) -> Path:
        return self.elsewhere or (self.remote or self.path) / "checkpoints"


def open_run(
    root: Path | str,
    name: str | None,
    resume: str | Path | None,
    world: World,
    *,
    create: bool = True,
    own: RunFolder | None = None,
    elsewhere: str | Path | None = None,
) -> RunFolder:
    """Choose the run's folder on rank 0 and tell all ranks; create it unless `create` is False.

    Args:
        own: the run whose "last" and "best" are meant, if it has checkpoints; by default the newest of that name.
        elsewhere: the folder or the URL where the checkpoints lie, if it is not that of the run.
    Raises:
        ConfigError: a new run is asked for, and `elsewhere` holds the checkpoints of another.
        CheckpointError: `resume` is a path and there is nothing whole, or "auto" found checkpoints and none of them is whole.
    """
    name = name or "default"
    if any(c in name for c in "\n\0") or name in (".", "..") or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"A run's name is a plain folder name, got {name!r}. Say where it lies with root=, as in root='runs'.")
    if resume is not None and not isinstance(resume, str | PathLike):
        raise ConfigError(f"resume={resume!r}: expected None, 'auto', 'last', 'best', or the path of a checkpoint or of a run.")
    found: dict[str, Any] | None = None
    # Absolute: the working folder may change while the run goes on.
    place = path_of(root).expanduser().absolute()
    local = Path("runs").absolute() if is_url(place) else place
    there = None if elsewhere is None else path_of(elsewhere).expanduser().absolute()
    if world.is_main:
        try:
            before = None if own is None else own.remote or own.path
            found = (
                _choose(place, name, resume, create, before) if there is None else _choose_in(there, place / name, resume, create)
            )
            if create:
                here = _here(path_of(found["path"]), local)
                here.mkdir(parents=True, exist_ok=True)
                for folder in [here / "checkpoints", path_of(found["path"]) / "checkpoints"] if there is None else [there]:
                    folder.mkdir(parents=True, exist_ok=True)
                (here / "finished").unlink(missing_ok=True)
        except (CheckpointError, ConfigError) as error:
            found = {"error": str(error), "checkpoint": isinstance(error, CheckpointError)}
        except OSError as error:
            where = "root=" if there is None else "root= or dirpath="
            found = {"error": f"The run folder cannot be made: {error}. Pass {where} another folder.", "checkpoint": False}
    found = world.broadcast_json(found)
    assert found is not None
    if "error" in found:
        raise (CheckpointError if found["checkpoint"] else ConfigError)(found["error"])
    resume_from = path_of(found["resume_from"]) if found["resume_from"] else None
    path = path_of(found["path"])
    return RunFolder(name, found["id"], _here(path, local), resume_from, found["notes"], path if is_url(path) else None, there)


def check_shared(folder: RunFolder, world: World) -> None:
    """Refuse a run folder that is not one for all nodes, before anything is trained: together.

    Each rank writes its shard of a checkpoint. On disks of their own the first one would fail, hours later it may be.

    Raises:
        CheckpointError: ranks on other nodes do not see what rank 0 made there.
    """
    if world.one_node or folder.remote is not None:
        return
    deadline = time.monotonic() + _PATIENCE_S
    while not (seen := (folder.checkpoints / LOCK).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)  # another machine's view of a shared file system may lag behind
    found = world.gather_json("" if seen else f"rank {world.rank} on node {world.node_rank} ({socket.gethostname()})")
    blind = [who for who in found if who]
    if blind:
        raise CheckpointError(
            f"{folder.checkpoints}, made by rank 0, is not to be seen by {', '.join(blind[:4])}"
            f"{f' and {len(blind) - 4} more' if len(blind) > 4 else ''}. All ranks must see one folder: put root= on a shared "
            "file system, or behind a URL (s3://...), or train without checkpoints (enable_checkpointing=False)."
        )


def _here(run: Path, local: Path) -> Path:
    """Return where a run's own files lie: beside its checkpoints, or under the same name on this machine."""
    return local / run.parent.name / run.name if is_url(run) else run


def _choose(root: Path, name: str, resume: str | Path | None, create: bool, own: Path | None) -> dict[str, Any]:
    base = root / name
    notes: list[str] = []

    def fresh(*said: str, start: Path | None = None) -> dict[str, Any]:
        path = _new(base, create)
        return {"id": path.name, "path": str(path), "resume_from": str(start) if start else None, "notes": list(said)}

    if resume is None:
        unfinished = _newest(base)
        if unfinished is not None and _has_checkpoints(unfinished) and not _is_finished(unfinished):
            return fresh(f"starting anew; an unfinished run lies in {unfinished} (resume='auto' goes on with it)")
        return fresh()
    if str(resume) == "auto":
        path = _newest(base)
        if path is None:
            return fresh(f"no checkpoint in {base}: starting anew")
        if not _has_checkpoints(path):
            return fresh(f"the newest run, {path.name}, has no checkpoint: starting anew")
        info = _latest(path / "checkpoints")
        notes.extend(info.notes)
        return {"id": path.name, "path": str(path), "resume_from": str(info.path), "notes": notes}
    if str(resume) in ("last", "best"):
        path = own if own is not None and _has_checkpoints(own) else _newest(base, with_checkpoints=True)
        if path is None:
            raise CheckpointError(
                f"resume={str(resume)!r}: there is no checkpoint in {base.absolute()}. Use resume=None to start anew."
            )
        info = _best(path / "checkpoints") if str(resume) == "best" else _latest(path / "checkpoints")
        return {"id": path.name, "path": str(path), "resume_from": str(info.path), "notes": list(info.notes)}
    given = path_of(resume).expanduser().absolute()
    if not given.exists():
        raise CheckpointError(f"There is no checkpoint {given.absolute()}.{_near(given)} Use resume='auto' to take the newest.")
    if given.is_file():
        raise CheckpointError(
            f"{given.absolute()} is a file; a checkpoint is a folder with a manifest.json. Files that were pickled are not read."
        )
    if (given / "manifest.json").exists():
        _check_whole(given)
        run = given.parent.parent if given.parent.name == "checkpoints" else None
        if run is not None and run.parent.resolve() == base.resolve():
            return {"id": run.name, "path": str(run), "resume_from": str(given), "notes": notes}
        return fresh(start=given)
    folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    info = _latest(folder)
    if folder == given:
        return fresh(*info.notes, start=info.path)
    return {"id": given.name, "path": str(given), "resume_from": str(info.path), "notes": list(info.notes)}


def _choose_in(folder: Path, base: Path, resume: str | Path | None, create: bool) -> dict[str, Any]:
    """As `_choose`, where the checkpoints lie in `folder`: the run is the one that wrote them."""

    def goes_on(info: CheckpointInfo) -> dict[str, Any]:
        run = base / str(info.meta.get("run", ""))
        known = _RUN.fullmatch(run.name) is not None and run.is_dir()
        path = run if known else _new(base, create)
        return {"id": path.name, "path": str(path), "resume_from": str(info.path), "notes": list(info.notes)}

    def fresh(note: str) -> dict[str, Any]:
        path = _new(base, create)
        return {"id": path.name, "path": str(path), "resume_from": None, "notes": [note] if note else []}

    inside = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
    if str(resume) in ("auto", "last", "best"):
        if not inside and str(resume) == "auto":
            return fresh(f"no checkpoint in {folder}: starting anew")
        return goes_on(_best(folder) if str(resume) == "best" else _latest(folder))
    given = None if resume is None else path_of(resume).expanduser().absolute()
    if given is not None and given in (folder, folder.parent if folder.name == "checkpoints" else folder):
        return goes_on(_latest(folder))
    if given is not None and given.parent == folder and (given / "manifest.json").exists():
        from ..strategies.checkpoint.reader import Checkpoint

        _check_whole(given)
        with Checkpoint(given) as checkpoint:
            return goes_on(checkpoint.info)
    if inside and create and (given is None or given.exists()):
        raise ConfigError(
            f"Checkpoint(dirpath={str(folder)!r}) holds checkpoints of an earlier run already ({inside[0]} to {inside[-1]}), "
            "which a new one would replace. resume='auto' goes on with them; a new run needs another folder, or an empty one."
        )
    return fresh("") if given is None else _choose(base.parent, base.name, resume, create, None)


def _new(base: Path, create: bool) -> Path:
    """Take a new folder's name: the time, and a number where another run began in the same second.

    A clock that was set back (or summer time that ends) must not make the new run the older one: then it takes the newest's time.
    """
    known = [match[1] for path in base.glob("*") if (match := _RUN.fullmatch(path.name))]
    stamp = max([time.strftime("%Y%m%d-%H%M%S"), *known])
    for n in itertools.count(1):
        path = base / (stamp if n == 1 else f"{stamp}-{n}")
        if not create and not path.exists():
            return path
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)  # fails when another process was faster
            return path
    raise AssertionError("unreachable")


def _newest(base: Path, *, with_checkpoints: bool = False) -> Path | None:
    """Return the newest run that began to train: one that broke off before that has neither config.yaml nor checkpoints."""
    if not base.is_dir():
        return None
    runs = [p for p in base.iterdir() if _has_checkpoints(p) or (not with_checkpoints and (p / "config.yaml").exists())]
    return max(runs, key=_age, default=None)


def _is_finished(run: Path) -> bool:
    return (_here(run, Path("runs").absolute()) / "finished").exists()


def _has_checkpoints(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


def _age(run: Path) -> tuple[str, int, str]:
    """Sort runs by their time, then by their number within the second: -10 comes after -9."""
    day, _, rest = run.name.partition("-")
    clock, _, number = rest.partition("-")
    return f"{day}-{clock}", int(number) if number.isdecimal() else 0, run.name


def _check_whole(path: Path) -> None:
    """Refuse a damaged checkpoint before anything is loaded from it."""
    from ..strategies.checkpoint.reader import Checkpoint

    with Checkpoint(path) as checkpoint:
        faults = checkpoint.faults(full=False)
    if faults:
        raise CheckpointError(
            f"{path} is damaged: {faults[0]}{f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''}"
            f"{_near(path)} Use resume='auto' to take the newest that is whole."
        )


def _latest(folder: Path) -> CheckpointInfo:
    from ..strategies.checkpoint.store import CheckpointStore

    info = CheckpointStore(folder).latest()
    if info is None:
        raise CheckpointError(f"There is no checkpoint in {folder.absolute()}. Use resume=None to start anew.")
    return info


def _best(folder: Path) -> CheckpointInfo:
    """Return the newest checkpoint whose meta says that it was the best when it was saved."""
    from ..strategies.checkpoint.store import CheckpointStore

    infos = CheckpointStore(folder).list()
    best = [i for i in infos if i.meta.get("is_best")]
    if not best:
        raise CheckpointError(
            f"resume='best': no checkpoint in {folder.absolute()} was saved as the best. "
            "Give Checkpoint(monitor=...) to the run, or use 'last'."
        )
    _check_whole(best[-1].path)
    return best[-1]


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = sorted(p.name for p in path.parent.glob("step-*") if p != path)
    return f" In that folder: {', '.join(names[-4:])}." if names else ""


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml: the resolved arguments of the run, for people and for `drivetrain` commands to read."""
    import yaml

    partial = path / ".config.yaml.partial"
    partial.write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(path / "config.yaml")
