"""Checkpoints behind a URL (urls.py): what the store does on a disk by renaming, done by putting the manifest last.

An object store has no rename, and no folder: a key is there once its single put is over. So the commit is another one:
    1  the files are written under the name of the checkpoint, step-00000042/, which nobody takes for one yet
    2  manifest.json is put last; a folder without it is no checkpoint
    3  what is deleted loses its manifest first; folders without one are cleared by the next save of a run
There is no lock either: two runs that save in one folder are not refused. Give each its own. What the files hold is the same, and
so is the checking.
"""

from __future__ import annotations

from typing import Any

from .layout import MANIFEST, TEMPORARY, folder_name, parse_folder
from .store import CheckpointStore


class UrlStore(CheckpointStore):
    """A CheckpointStore behind a URL: what that one does by renaming, this one does by putting the manifest last."""

    root: Any

    def _take(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def _clear(self, unfinished: set[Any]) -> None:
        for path in self.root.iterdir():
            left = parse_folder(path.name) is not None and not (path / MANIFEST).exists()
            if (left or path.name.startswith(TEMPORARY)) and path not in unfinished:
                path.remove_all()

    def _check_space(self, needed: int) -> None:
        """Nobody can say how much there is."""

    def _name_of_temporary(self, step: int) -> str:
        """Under its own name: nothing can be renamed later."""
        return folder_name(step, self._next(step)[1])

    def _see(self, folder: Any) -> Any:
        return folder

    def _size(self, path: Any) -> int | None:
        return path.size()

    def _drop(self, folder: Any) -> None:
        folder.remove_all()

    def _publish(self, temporary: Any, final: str, manifest: bytes) -> str:
        # Last: until this one put is over, there is no checkpoint.
        (temporary / MANIFEST).write_bytes(manifest)
        return temporary.name

    def _folders(self) -> list[Any]:
        found = [p for p in self.root.iterdir() if parse_folder(p.name) and (p / MANIFEST).exists()]
        return sorted(found, key=lambda path: parse_folder(path.name) or (0, 0))

    def _delete(self, path: Any) -> bool:
        self._whole.discard(path)
        try:
            (path / MANIFEST).unlink(missing_ok=True)
            path.remove_all()
        except OSError:
            return not (path / MANIFEST).exists()
        return True
