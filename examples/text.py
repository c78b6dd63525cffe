"""Real text that is on every machine: the sources of Python's standard library, as bytes. Shared by the examples."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def standard_library(limit: int | None = None) -> tuple[bytes, str]:
    """Return the standard library's .py files without tests, joined in the order of their names, and the sha256 of that."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    text = b"\n".join(p.read_bytes() for p in files)[:limit]
    return text, hashlib.sha256(text).hexdigest()


def windows(text: bytes, length: int) -> tuple[TensorDataset, TensorDataset]:
    """Cut `text` into windows of `length` + 1 bytes, each a sample (length + 1,) of uint8; every twentieth is for validation."""
    count = len(text) // (length + 1)
    rows: Tensor = torch.frombuffer(bytearray(text[: count * (length + 1)]), dtype=torch.uint8).view(count, length + 1)
    held_out = torch.arange(count) % 20 == 0
    return TensorDataset(rows[~held_out]), TensorDataset(rows[held_out])
