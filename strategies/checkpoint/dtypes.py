"""The element types that a checkpoint can hold, as torch's (layout.TYPES has their sizes and codes)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .layout import TYPES

DTYPES: Mapping[str, tuple[torch.dtype, str | None]] = {
    name: (getattr(torch, name), code) for name, (_, code) in TYPES.items() if hasattr(torch, name)
}
"""Name in the manifest -> (torch's type, code in the safetensors header or None: stored as bytes)."""
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, (dtype, _) in DTYPES.items()}
