"""What several tests of this folder share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from drivetrain import save_torch_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for offload_models

from offload_models import WORDS, Net


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def words() -> Tensor:
    return torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(net: Net, tmp_path: Path) -> Path:
    save_torch_model(net, tmp_path / "weights", max_shard_size="100KB")
    assert (tmp_path / "weights" / "model.safetensors.index.json").exists()
    return tmp_path / "weights"
