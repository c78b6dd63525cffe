"""Checkpoints: one folder a step, visible only when whole, read without running anything.

store.py   CheckpointStore: save, list, latest, verify, open, prune; the commit protocol is its docstring
layout.py  what lies on the disk: names, element types, manifest, safe opening of a file
job.py     one save on one rank
writer.py  safetensors and JSON files with their checksums; fsync
reader.py  Checkpoint: values and tensors, checked while they are read
divide.py  who writes which piece of which tensor; do pieces cover their tensor
lock.py    one process at a time saves in a folder
state.py   trees of tensors and JSON values, to and fro
rng.py     the random states of a process
"""

from .layout import CheckpointInfo, Shard
from .reader import Checkpoint
from .store import CheckpointStore, Keep

__all__ = ["Checkpoint", "CheckpointInfo", "CheckpointStore", "Keep", "Shard"]
