"""Checkpoints behind a URL (urls.py): what the store does on a disk by renaming, done by putting the manifest last.

An object store has no rename, and no folder: a key is there once its single put is over. So the commit is another one:
    1  the files are written under the name of the checkpoint, step-00000042/, which nobody takes for one yet
    2  manifest.json is put last; a folder without it is no checkpoint
    3  what is deleted loses its manifest first; folders without one are cleared by the next save of a run
There is no lock either. Instead the run that saves there says so in `.owner.json`, and looks before it writes and again before it
puts the manifest: another name there means that another run has taken the folder since, and this one is refused. So the last who
came goes on (a job that was started again need not wait for anything that died), and the one before it is told at its next save.
On one machine it is as with a lock: a process that is still alive keeps the folder, and the newcomer is refused.
Not guaranteed, since a look and a put are two: two runs that save at the very same instant may both commit, perhaps into one
another's files; then the checksums say so, and the checkpoint before is used.

What the files hold is the same as on a disk, and so is the checking.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .layout import MANIFEST, TEMPORARY, folder_name, parse_folder
from .store import CheckpointStore

OWNER = ".owner.json"
_taken: dict[Any, str] = {}
"""Folder -> the word by which this process took it."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_taken.clear)


class UrlStore(CheckpointStore):
    """A CheckpointStore behind a URL: what that one does by renaming, this one does by putting the manifest last."""

    root: Any

    def claim(self) -> None:
        _taken.pop(self.root, None)  # asked for by name: whoever had it meanwhile is told
        super().claim()

    def unclaim(self) -> None:
        super().unclaim()
        word = _taken.pop(self.root, None)
        if word is not None:
            with contextlib.suppress(Exception):  # nobody waits for it
                owner = self._owner()
                if owner is not None and owner.get("word") == word:
                    self._write_owner(owner | {"ended": True})

    def _take(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        owner = self._owner()
        if owner is not None and self.root in _taken:
            self._check_owner(owner)
            return
        if owner is not None and _is_alive(owner):
            raise CheckpointError(f"{_named(owner)} is saving checkpoints in {self.root}. End it, or give this run another name.")
        word = secrets.token_hex(8)
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        host, process = socket.gethostname(), os.getpid()
        self._write_owner({"word": word, "process": process, "began": _began(process), "host": host, "time": now})
        _taken[self.root] = word

    def _check_owner(self, owner: dict[str, Any] | None) -> None:
        if owner is None or owner.get("word") != _taken.get(self.root):
            who = "nobody" if owner is None else _named(owner)
            raise CheckpointError(
                f"{self.root} belongs to {who} now, who took it while this run was saving there. Two runs in one folder would "
                "delete each other's checkpoints: end one of them, or give it another name."
            )

    def _write_owner(self, owner: dict[str, Any]) -> None:
        (self.root / OWNER).write_bytes(json.dumps(owner).encode())

    def _owner(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.root / OWNER).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

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
        self._check_owner(
            self._owner()
        )  # a run that slept for long while another one went on in its place must not commit any more
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


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown machine')} (since {owner.get('time', '?')})"


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process is one of this machine, another one than this, and still there: no later one of the same number."""
    process = owner.get("process")
    if (
        owner.get("ended")
        or owner.get("host") != socket.gethostname()
        or not isinstance(process, int)
        or process in (0, os.getpid())
    ):
        return False
    began = _began(process)
    return began is not None and began == owner.get("began")


def _began(process: int) -> str | None:
    """Return when a process began, in ticks since the machine started; None where there is none, or nobody can say."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
