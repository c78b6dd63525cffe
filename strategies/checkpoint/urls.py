"""Paths behind a URL, by fsspec: memory://, s3://, gs://, ... A local path and file:// need none of this.

url_store.py saves there. `UrlPath` has what the rest of the library uses of pathlib's Path. s3 and gs need the packages that
fsspec names (s3fs, gcsfs).
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import CheckpointError, ConfigError, MissingDependency

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|memory:")
_turns: dict[int, threading.Lock] = {}


def is_url(path: object) -> bool:
    """Whether `path` is the URL of something that is no local file (a `UrlPath` is)."""
    return isinstance(path, UrlPath) or (isinstance(path, str) and bool(_URL.match(path)) and not path.startswith("file://"))


def path_of(path: str | Path | UrlPath) -> Any:
    """Return a Path, or a `UrlPath` for a URL; file:// is the local path.

    Raises:
        ConfigError: fsspec knows no such protocol;  MissingDependency: it does, and its package is not installed.
    """
    if isinstance(path, UrlPath):
        return path
    if isinstance(path, str) and path.startswith("file://"):
        return Path(unquote(path.removeprefix("file://").removeprefix("localhost")))
    return UrlPath.of(str(path)) if is_url(path) else Path(path)


def local_path(path: str | Path | UrlPath, what: str) -> Path:
    """Return the Path of what can lie on this machine only; `what` it is, for the message.

    Raises:
        ConfigError: it is the URL of another place.
    """
    if is_url(path):
        raise ConfigError(
            f"{what}: {path} is a URL, where only checkpoints can lie; expected a local folder. Give one, and copy it there "
            f"afterwards: fsspec.filesystem({str(path).partition(':')[0]!r}).put(folder, ..., recursive=True)."
        )
    return path_of(path).expanduser()


class UrlPath:
    """A place behind a URL, with the face of a Path."""

    def __init__(self, fs: Any, key: str) -> None:
        self.fs, self.key = fs, key

    @classmethod
    def of(cls, url: str) -> UrlPath:
        try:
            import fsspec
        except ImportError:
            raise MissingDependency(f"{url}: URLs need fsspec, which is not installed. Run pip install fsspec.") from None
        protocol = url.partition(":")[0]
        try:
            fs, key = fsspec.url_to_fs(url)
        except ImportError as error:
            raise MissingDependency(f"{url}: {error}. Install the package that fsspec names for {protocol}://.") from None
        except ValueError as error:
            known = "memory://, file://, s3://, gs://, and what fsspec.available_protocols() lists"
            raise ConfigError(f"{url}: {error}. Expected a path, or a URL that fsspec knows: {known}.") from None
        return cls(fs, key)

    @property
    def name(self) -> str:
        return posixpath.basename(self.key.rstrip("/"))

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> UrlPath:
        return UrlPath(self.fs, posixpath.dirname(self.key.rstrip("/")))

    def __truediv__(self, name: str | Path) -> UrlPath:
        return UrlPath(self.fs, f"{self.key.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.fs.unstrip_protocol(self.key)

    def __repr__(self) -> str:
        return f"UrlPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise ConfigError(f"{self} is no local path. What was to be done with it needs one: give a local folder.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and str(other) == str(self)

    def __lt__(self, other: UrlPath) -> bool:
        return self.key < other.key

    def __hash__(self) -> int:
        return hash(str(self))

    def expanduser(self) -> UrlPath:
        return self

    absolute = resolve = expanduser

    def exists(self) -> bool:
        return self.fs.exists(self.key)

    def is_dir(self) -> bool:
        return self.fs.isdir(self.key)

    def is_file(self) -> bool:
        return self.fs.isfile(self.key)

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[UrlPath]:
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            for found in self.fs.ls(self.key, detail=False):
                yield self / posixpath.basename(found.rstrip("/"))

    def glob(self, pattern: str) -> Iterator[UrlPath]:
        """Only what stands in the folder itself: `pattern` is a name with wildcards."""
        import fnmatch

        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        self.fs.makedirs(self.key, exist_ok=exist_ok)

    def size(self) -> int | None:
        try:
            return int(self.fs.size(self.key))
        except FileNotFoundError:
            return None

    def read_bytes(self) -> bytes:
        return self.fs.cat_file(self.key)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_limited(self, name: str, limit: int) -> bytes:
        """Return the content of the file `name` in this folder.

        Raises:
            CheckpointError: it is not there, or has over `limit` bytes.
        """
        size = (self / name).size()
        if size is None or size > limit:
            what = "is missing" if size is None else f"has {size:,} bytes, more than {limit:,}: refused"
            raise CheckpointError(f"{self}: {name} {what}.")
        return (self / name).read_bytes()

    def write_bytes(self, data: bytes) -> None:
        """Put it with one call: it is there whole, or not at all."""
        self.fs.pipe_file(self.key, data)

    def unlink(self, *, missing_ok: bool = False) -> None:
        try:
            self.fs.rm_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_all(self) -> None:
        """Delete it with everything below; that it is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.key, recursive=True)


class UrlFile:
    """A file behind a URL that is open for reading, by ranges (verified.Handle)."""

    def __init__(self, path: UrlPath) -> None:
        size = path.size()
        if size is None:
            raise CheckpointError(f"{path.parent}: {path.name} is missing.")
        self.size = size
        self._path = path
        # Only fsspec's own async file systems say that several threads may use one.
        alone = not getattr(path.fs, "async_impl", False)
        self._turn: Any = _turns.setdefault(id(path.fs), threading.Lock()) if alone else contextlib.nullcontext()

    def readv(self, position: int, buffers: Sequence[memoryview]) -> int:
        wanted = min(sum(map(len, buffers)), self.size - position)
        with self._turn:
            data = memoryview(self._path.fs.cat_file(self._path.key, start=position, end=position + wanted))
        at = 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return len(data)

    def cached(self, position: int, buffers: Sequence[memoryview]) -> bool:
        return False

    def identity(self) -> None:
        return None

    def close(self) -> None:
        pass


class UrlSink:
    """A new file behind a URL (writer.Sink). Some file systems show it before it is whole: why manifest.json is put last."""

    def __init__(self, path: UrlPath) -> None:
        self._path = path
        self._file = path.fs.open(path.key, "wb")

    def write(self, part: memoryview) -> int:
        self._file.write(part)
        return len(part)

    def written(self, size: int) -> None:
        """Nothing: the file system decides when to send."""

    def finish(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        """Leave nothing that looks finished."""
        discard = getattr(self._file, "discard", None)
        if discard is not None:
            discard()
        self._path.unlink(missing_ok=True)
