"""One process at a time saves in a folder: two would delete each other's unfinished saves."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from ..errors import CheckpointError


class FolderLock:
    """Held until the process ends or the object goes. Where the file system has no locks, nothing is locked.

    A record lock (lockf), not flock: the children of a process, such as loader workers, must not hold it after its death.

    Raises:
        CheckpointError: another process still holds it after `patience_s`.
    """

    def __init__(self, path: Path, patience_s: float) -> None:
        self._descriptor: int | None = None
        if os.name == "nt":
            return
        import fcntl

        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break
                if time.monotonic() > deadline:
                    owner = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
                    raise CheckpointError(
                        f"another process ({owner or 'unknown'}) is saving checkpoints in {path.parent}. "
                        "End it, or give this run another name."
                    ) from None
                time.sleep(0.1)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()}\n".encode(), 0)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
