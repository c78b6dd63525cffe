"""The folder of a run: runs/<name>/<id>/ with config.yaml, metrics.jsonl, logs/ and checkpoints/; and which run a resume means.

`resume=None` makes a new folder; "auto" goes on in the newest folder of that name that has checkpoints; a path names a
checkpoint, a run folder, or a checkpoints folder, and is taken just as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..strategies.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ..strategies.checkpoint.layout import CheckpointInfo
    from ..strategies.world import World

__all__ = ["RunFolder", "open_run"]


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

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def open_run(root: Path, name: str | None, resume: str | Path | None, world: World, *, create: bool = True) -> RunFolder:
    """Choose the run's folder on rank 0 and tell all ranks; create it unless `create` is False.

    Raises:
        CheckpointError: `resume` is a path and there is nothing whole, or "auto" found checkpoints and none of them is whole.
    """
    name = name or "default"
    if any(c in name for c in "\n\0") or name in (".", "..") or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"A run's name is a plain folder name, got {name!r}.")
    found: dict[str, Any] | None = None
    if world.is_main:
        try:
            found = _choose(root.expanduser(), name, resume)
            if create:
                (Path(found["path"]) / "checkpoints").mkdir(parents=True, exist_ok=True)
        except (CheckpointError, OSError) as error:
            found = {"error": str(error), "checkpoint": isinstance(error, CheckpointError)}
    found = world.broadcast_json(found)
    assert found is not None
    if "error" in found:
        kind = CheckpointError if found["checkpoint"] else ConfigError
        raise kind(
            found["error"]
            if found["checkpoint"]
            else f"The run folder cannot be made: {found['error']}. Pass root= another folder."
        )
    resume_from = Path(found["resume_from"]) if found["resume_from"] else None
    return RunFolder(name, found["id"], Path(found["path"]), resume_from, found["notes"])


def _choose(root: Path, name: str, resume: str | Path | None) -> dict[str, Any]:
    base = root / name
    notes: list[str] = []
    if resume is None:
        path, run_id = _new(base)
        unfinished = _newest_with_checkpoints(base)
        if unfinished is not None and not (unfinished / "finished").exists():
            notes.append(f"starting anew; an unfinished run lies in {unfinished} (resume='auto' goes on with it)")
        return {"id": run_id, "path": str(path), "resume_from": None, "notes": notes}
    if str(resume) == "auto":
        path = _newest_with_checkpoints(base)
        if path is None:
            path, run_id = _new(base)
            return {"id": run_id, "path": str(path), "resume_from": None, "notes": [f"no checkpoint in {base}: starting anew"]}
        info = _latest(path / "checkpoints")
        notes.extend(info.notes)
        return {"id": path.name, "path": str(path), "resume_from": str(info.path), "notes": notes}
    if str(resume) in ("last", "best"):
        path = _newest_with_checkpoints(base)
        if path is None:
            raise CheckpointError(
                f"resume={str(resume)!r}: there is no checkpoint in {base.absolute()}. Use resume=None to start anew."
            )
        checkpoint = _best(path / "checkpoints") if str(resume) == "best" else _latest(path / "checkpoints").path
        return {"id": path.name, "path": str(path), "resume_from": str(checkpoint), "notes": notes}
    given = Path(resume).expanduser()
    if not given.exists():
        raise CheckpointError(f"There is no checkpoint {given.absolute()}.{_near(given)} Use resume='auto' to take the newest.")
    if given.is_file():
        raise CheckpointError(
            f"{given.absolute()} is a file; a checkpoint is a folder with a manifest.json. Files that were pickled are not read."
        )
    if (given / "manifest.json").exists():
        run = given.parent.parent if given.parent.name == "checkpoints" else None
        if run is not None and run.parent == base:
            return {"id": run.name, "path": str(run), "resume_from": str(given), "notes": notes}
        path, run_id = _new(base)
        return {"id": run_id, "path": str(path), "resume_from": str(given), "notes": notes}
    folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    info = _latest(folder)
    path = given if folder != given else _new(base)[0]
    return {"id": path.name, "path": str(path), "resume_from": str(info.path), "notes": [*notes, *info.notes]}


def _new(base: Path) -> tuple[Path, str]:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_id, n = stamp, 1
    while (base / run_id).exists():
        run_id, n = f"{stamp}-{n}", n + 1
    return base / run_id, run_id


def _newest_with_checkpoints(base: Path) -> Path | None:
    if not base.is_dir():
        return None
    runs = [p for p in base.iterdir() if (p / "checkpoints").is_dir() and any((p / "checkpoints").glob("step-*"))]
    return max(runs, key=lambda p: p.name, default=None)


def _latest(folder: Path) -> CheckpointInfo:
    from ..strategies.checkpoint.store import CheckpointStore

    info = CheckpointStore(folder).latest()
    if info is None:
        raise CheckpointError(f"There is no checkpoint in {folder.absolute()}. Use resume=None to start anew.")
    return info


def _best(folder: Path) -> Path:
    """The newest checkpoint whose meta says that it was the best when it was saved."""
    from ..strategies.checkpoint.store import CheckpointStore

    infos = CheckpointStore(folder).list()
    best = [i for i in infos if i.meta.get("is_best")]
    if not best:
        raise CheckpointError(
            f"resume='best': no checkpoint in {folder.absolute()} was saved as the best. "
            "Give Checkpoint(monitor=...) to the run, or use 'last'."
        )
    return best[-1].path


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = sorted(p.name for p in path.parent.glob("step-*"))
    return f" In that folder: {', '.join(names[-4:])}." if names else ""


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml: the resolved arguments of the run, for people and for `drivetrain` commands to read."""
    import yaml

    partial = path / ".config.yaml.partial"
    partial.write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(path / "config.yaml")
