"""The reader of an offloaded model and the life of its process: forks while it reads, and the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import init_empty_weights, load_checkpoint_and_dispatch, save_torch_model, weights_of
from torch import Tensor, nn

WIDTH, LAYERS = 256, 6

END = """
import sys, torch
from torch import nn
from drivetrain import init_empty_weights, load_checkpoint_and_dispatch

with init_empty_weights():
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6))).eval()
model = load_checkpoint_and_dispatch(model, sys.argv[1], {"": "disk"}, dtype="bfloat16")
with torch.no_grad():
    model(torch.randn(2, 1024, dtype=torch.bfloat16))
"""


def net(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS))).eval()


def dispatched(folder: Path) -> nn.Module:
    """A model whose parts take a while to be read."""
    with init_empty_weights():
        empty = net()
    model = load_checkpoint_and_dispatch(empty, folder, {"": "disk"}, dtype="float64")
    source = weights_of(model).source
    parts = source.parts

    def slowly(*args: Any) -> list[Callable[[], None]]:
        def slow(part: Callable[[], None]) -> None:
            part()
            time.sleep(0.002)

        return [partial(slow, part) for part in parts(*args)]

    source.parts = slowly  # type: ignore[method-assign]
    return model


def all_equal(model: nn.Module, x: Tensor, want: Tensor, times: int) -> bool:
    with torch.no_grad():
        return all(torch.equal(model(x), want) for _ in range(times))


def forked(folder: str) -> list[bool]:
    """Fork several times in the middle of reading; parent and child compute at once. Return whose results were right."""
    torch.manual_seed(0)
    whole = net().double()
    model, x = dispatched(Path(folder)), torch.randn(2, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        want = whole(x)
    right = [all_equal(model, x, want, 2)]
    for _ in range(6):
        with torch.no_grad():
            model[0](x)  # type: ignore[index]  # the reader goes on with the next block
        stream = weights_of(model).stream
        for _ in range(1000):
            if any(s.reading for s in stream.slots):
                break
            time.sleep(0.0005)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if all_equal(model, x, want, 15) else 9)
        right.append(all_equal(model, x, want, 15))
        right.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0)
    reader: Any = weights_of(model).stream._reader
    return [*right, reader[0] == os.getpid() and reader[1].is_alive()]


def test_a_fork_while_the_reader_reads_leaves_both_with_their_own_buffers(ranks: Any, tmp_path: Path) -> None:
    """Before, parent and child shared the buffers' memory, and a part that was being read never ended in the child."""
    torch.manual_seed(0)
    save_torch_model(net(), tmp_path)
    assert ranks(1, forked, str(tmp_path), timeout=120)[0] == [True] * 14


@pytest.mark.slow
def test_a_process_may_end_while_the_reader_converts(tmp_path: Path) -> None:
    """A daemon thread within torch's C++ at that moment aborted it: exit code 134, one time in four."""
    save_torch_model(net(1024), tmp_path)
    for _ in range(6):
        done = subprocess.run([sys.executable, "-c", END, str(tmp_path)], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
