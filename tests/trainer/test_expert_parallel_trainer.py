"""Expert parallel through the Trainer: losses of one process, resume, checkpoints that one process reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_context_parallel_trainer import goes_on, plain_losses, resumed, trained


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "batch"), [("cp:2+ep:2", 4), ("fsdp:2+ep:2", 2)])
def test_experts_over_two_ranks_train_as_one_process(strategy: str, batch: int, ranks: Any, tmp_path: Path) -> None:
    """Beside data parallel, and over ranks that share a sequence."""
    (truth,) = ranks(1, trained, tmp_path / "1", "single", "moe", 4)
    found = ranks(2, trained, tmp_path / "2", strategy, "moe", batch, timeout=120)
    for one in found:
        assert one["losses"] == pytest.approx(truth["losses"], rel=1e-11)
        assert one["val_loss"] == pytest.approx(truth["val_loss"], rel=1e-11)
    for name, weight in truth["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], weight, rtol=1e-9, atol=1e-11)


def test_a_resumed_run_goes_on_bit_for_bit_and_one_process_reads_its_checkpoint(ranks: Any, tmp_path: Path) -> None:
    for whole, cut in ranks(2, resumed, tmp_path, "fsdp:2+ep:2", "moe", 2, timeout=90):
        assert len(whole) == 4
        assert cut == whole
    (single,) = ranks(1, goes_on, tmp_path, "moe")
    assert single == pytest.approx(plain_losses("moe", clipped=False), rel=1e-11)
