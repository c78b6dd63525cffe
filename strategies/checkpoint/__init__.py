"""Checkpoints: one folder a step, visible only when whole, read without running anything.

store.py       CheckpointStore: save, list, latest, verify, open, prune; the commit protocol is its docstring
background.py  saves that go on beside the training: the copy, the thread, the handle
together.py    what goes wrong on one rank is raised on all
keep.py        which checkpoints a prune leaves
layout.py      what lies on the disk: names, element types (dtypes.py: torch's), manifest, safe opening of a file
job.py         one save on one rank
writer.py      safetensors and JSON files with their checksums; fsync
contents.py    Contents: what a checkpoint consists of, is it whole; without torch, as layout, values, verified, urls
reader.py      Checkpoint: the tensors too, checked while they are read
verified.py    files of which no byte is used before its checksum was compared, read in one pass
urls.py        paths behind a URL, by fsspec; url_store.py  checkpoints there: the manifest is put last
divide.py      who writes which piece of which tensor
weights.py     bare weights as Hugging Face has them; url_weights.py  behind a URL
lock.py        one process at a time saves in a folder
state.py       trees of tensors and JSON values, taken apart; values.py  put together
rng.py         the random states of a process
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .background import SaveHandle
    from .keep import Keep
    from .layout import CheckpointInfo, Shard
    from .reader import Checkpoint
    from .store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointInfo", "CheckpointStore", "Keep", "SaveHandle", "Shard"]


def __getattr__(name: str) -> Any:
    # When first used: what lists and checks checkpoints starts without torch.
    if name == "Checkpoint":
        from .reader import Checkpoint as found
    elif name == "CheckpointStore":
        from .store import CheckpointStore as found
    elif name == "SaveHandle":
        from .background import SaveHandle as found
    elif name == "Keep":
        from .keep import Keep as found
    elif name == "CheckpointInfo":
        from .layout import CheckpointInfo as found
    elif name == "Shard":
        from .layout import Shard as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
