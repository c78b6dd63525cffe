"""What a committed checkpoint consists of, and whether it is whole: all that can be said of it without torch.

reader.py adds the tensors themselves. Nothing is believed before it is checked: names in the manifest are plain file names, files
are opened without following links, sizes are compared before memory is taken. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..errors import CheckpointError, suggest
from .layout import MAX_JSON, check_cover, close_folder, info_of, open_folder, read_manifest, stored_shape
from .together import Alone, Ranks
from .urls import UrlFile, UrlPath, path_of
from .values import join
from .verified import LocalFile, VerifiedFile

VALUE_TENSORS = "value/"
"""Before the names of the tensors that were met inside values."""


class Contents:
    """A committed checkpoint, open for looking at. Use `with`, or call `close`; one thread at a time.

    Raises:
        CheckpointError: (from any method) a file is missing or differs from the manifest; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = path_of(path)
        self.manifest = read_manifest(self.path)
        self.info = info_of(self.path, self.manifest)
        self.step: int = self.info.step
        self.meta: Mapping[str, Any] = self.info.meta
        self.world_size: int = self.info.world_size
        self._tensors: dict[str, Any] = self.manifest["tensors"]
        self._aliases: dict[str, str] = self.manifest["aliases"]
        self._files: dict[str, VerifiedFile] = {}
        self._json: dict[str, Any] = {}
        self._folder = open_folder(self.path)
        self._closed = False

    # -- values -------------------------------------------------------------------------------------------------------
    def value_names(self) -> list[str]:
        return list(self._values(self.manifest["values"]))

    def value(self, name: str) -> Any:
        """Return a shared value, with the tensors that were in it."""
        return join(self._pick(self._values(self.manifest["values"]), name, "value"), self._value_tensor)

    def rank_value_names(self, rank: int) -> list[str]:
        return list(self._values(self._of_rank("rank_values", rank)))

    def rank_value(self, name: str, rank: int) -> Any:
        """Return what `rank` saved under `name` for itself alone."""
        values = self._values(self._of_rank("rank_values", rank))
        return join(self._pick(values, name, f"value of rank {rank}"), lambda tensor: self._rank_value_tensor(tensor, rank))

    # -- tensors ------------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """Return the names of the shared tensors, aliases too."""
        return [n for n in (*self._tensors, *self._aliases) if not n.startswith(VALUE_TENSORS)]

    @property
    def aliases(self) -> Mapping[str, str]:
        """Name -> the name under which the same memory was saved (tied weights)."""
        return self._aliases

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype_name(self, name: str) -> str:
        """Return the element type of a shared tensor by torch's name: "float32"."""
        return self._entry(name)["dtype"]

    def rank_names(self, rank: int) -> list[str]:
        return [n for n in self._of_rank("rank_tensors", rank) if not n.startswith(VALUE_TENSORS)]

    # -- checking -----------------------------------------------------------------------------------------------------
    def faults(self, *, files: Sequence[str] | None = None, full: bool = True) -> list[str]:
        """Read `files` (default: all) and return what is wrong with them, one sentence each; never raises for damage.

        Args:
            full: compare sha256 as well as crc32, where a file has one.
        """
        found: list[str] = []
        for name in self.manifest["files"] if files is None else files:
            try:
                self._file(name).verify(full=full)
                if name.endswith(".json"):
                    self._values(name)
            except CheckpointError as error:
                found.append(str(error))
        damaged = bool(found)
        for table in (self._tensors, *self.manifest["rank_tensors"]):
            for name, entry in table.items():
                if files is not None and entry["pieces"][0]["file"] not in files:
                    continue  # somebody else's share
                try:
                    if not damaged:  # the cause was said already
                        self._check_pieces(name, entry)
                except CheckpointError as error:
                    found.append(str(error))
        return found

    def require_whole(self, ranks: Ranks | None = None) -> None:
        """Read every file that this process has not yet found whole, before anything is loaded (together: each rank a share).

        Raises:
            CheckpointError: damage, on all ranks.
        """
        ranks = ranks or Alone()
        own = list(self.manifest["files"])[ranks.rank :: ranks.size]
        try:
            found = self.faults(files=[name for name in own if not self._file(name).known_whole()], full=False)
        except CheckpointError as error:
            found = [str(error)]
        faults = [fault for faults in ranks.gather_json(found) for fault in faults]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise CheckpointError(f"{faults[0]}{more} Nothing was loaded.")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if not self._closed:
            close_folder(self._folder)
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end what `close` calls may be gone already; the system closes files too.
        if hasattr(self, "_closed") and not ending():
            self.close()

    # -- inside -------------------------------------------------------------------------------------------------------
    def _value_tensor(self, name: str) -> Any:
        raise CheckpointError(f"{self.path}: a value holds the tensor {name!r}: open it as a Checkpoint to read that.")

    def _rank_value_tensor(self, name: str, rank: int) -> Any:
        return self._value_tensor(name)

    def _entry(self, name: str) -> dict[str, Any]:
        name = self._aliases.get(name, name)
        entry = self._tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}.{suggest(name, self.names())}")
        return entry

    def _of_rank(self, table: str, rank: int) -> Any:
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"{self.path} was saved by {self.world_size} ranks: there is nothing of rank {rank}.")
        return self.manifest[table][rank]

    def _pick(self, table: Mapping[str, Any], name: str, kind: str) -> Any:
        if name not in table:
            raise CheckpointError(f"{self.path} holds no {kind} {name!r}.{suggest(name, table)}")
        return table[name]

    def _values(self, file: str | None) -> dict[str, Any]:
        if file is None:
            return {}
        if file not in self._json:
            try:
                content = json.loads(self._file(file).read_all(MAX_JSON))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{self.path}: {file} is not JSON: {error}.") from None
            if not isinstance(content, dict):
                raise CheckpointError(f"{self.path}: {file} holds no object.")
            self._json[file] = content
        return self._json[file]

    def _file(self, name: str) -> VerifiedFile:
        if name not in self._files:
            if self._closed:
                raise CheckpointError(f"{self.path} was closed; open it again to read from it.")
            handle = UrlFile(self.path / name) if isinstance(self.path, UrlPath) else LocalFile(self._folder, name, self.path)
            self._files[name] = VerifiedFile(handle, name, self.manifest["files"][name], self.path)
        return self._files[name]

    def _check_pieces(self, name: str, entry: Mapping[str, Any]) -> None:
        """Check that the pieces tile the tensor and are in their files as the manifest says, before memory is taken."""
        fault = check_cover(name, entry["shape"], [(p["offset"], p["shape"]) for p in entry["pieces"]])
        if fault:
            raise CheckpointError(f"{self.path}: {fault}.")
        if len({(piece["file"], piece["key"]) for piece in entry["pieces"]}) != len(entry["pieces"]):
            raise CheckpointError(f"{self.path}: tensor {name!r}: two of its pieces are the same bytes of a file.")
        for piece in entry["pieces"]:
            span = self._file(piece["file"]).header().get(piece["key"])
            if span is None or (span.code, span.shape) != stored_shape(entry["dtype"], piece["shape"]):
                there = "nothing" if span is None else f"{span.code} {span.shape}"
                raise CheckpointError(
                    f"{self.path}: {piece['file']} has {there} under {piece['key']!r}, the manifest says {entry['dtype']} "
                    f"{piece['shape']}."
                )
