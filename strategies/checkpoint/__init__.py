"""Checkpoints: one folder a step, visible only when whole, read without running anything.

store.py       CheckpointStore: save, list, latest, verify, open, prune; the commit protocol is its docstring
background.py  saves that go on beside the training: the copy, the thread, the handle
together.py    what goes wrong on one rank is raised on all
keep.py        which checkpoints a prune leaves
layout.py      what lies on the disk: names, element types, manifest, safe opening of a file
job.py         one save on one rank
writer.py      safetensors and JSON files with their checksums; fsync
reader.py      Checkpoint: values and tensors, checked while they are read
verified.py    files of which no byte is used before its checksum was compared, read in one pass
urls.py        paths behind a URL, by fsspec; url_store.py  checkpoints there: the manifest is put last
divide.py      who writes which piece of which tensor; do pieces cover their tensor
weights.py     bare weights as Hugging Face has them; url_weights.py  behind a URL
lock.py        one process at a time saves in a folder
state.py       trees of tensors and JSON values, to and fro
rng.py         the random states of a process
"""

from .background import SaveHandle
from .keep import Keep
from .layout import CheckpointInfo, Shard
from .reader import Checkpoint
from .store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointInfo", "CheckpointStore", "Keep", "SaveHandle", "Shard"]
