"""Exports and bare weights of models in pieces: who reads and writes what, and what happens when it goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies import named_state, placement
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.checkpoint import verified, weights
from drivetrain.strategies.checkpoint.reader import Checkpoint
from drivetrain.strategies.errors import CheckpointError
from drivetrain.strategies.world import World
from torch import Tensor, nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 65))


def write(folder: Path) -> None:
    accelerator = Accelerator(strategy="single")
    accelerator.save_model(accelerator.prepare(net()), folder)
    accelerator.end_training()


def bytes_taken(words: str, folder: Path) -> tuple[int, int, float]:
    """(bytes of the model, bytes that this rank took of its file, the largest difference from the model that was written)."""
    accelerator = Accelerator(strategy=words)
    model = net()
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model = accelerator.prepare(model)
    taken = 0
    source_of = weights._source

    def counted(file: Any) -> named_state.Source:
        source = source_of(file)

        def read(name: str, *, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
            nonlocal taken
            found = source(name, offset=offset, shape=shape)
            taken += found.numel() * found.element_size()
            return found

        return named_state.Source(read, shape=source.shape, sliced=True)

    weights._source = counted
    assert accelerator.load_model(model, folder) == []
    whole = accelerator.get_state_dict(model)
    wrong = max((float((whole[n].double() - t.double()).abs().max()) for n, t in expected.items() if whole), default=0.0)
    accelerator.end_training()
    return sum(t.numel() * t.element_size() for t in expected.values()), taken, wrong


@pytest.mark.parametrize("words", ["fsdp", "ddp"])
def test_load_model_takes_of_a_file_what_the_rank_holds(ranks: Any, tmp_path: Path, words: str) -> None:
    """Half of it, but for the three buffers and what has an odd number of rows; under ddp all."""
    ranks(1, write, tmp_path)
    for whole, taken, wrong in ranks(2, bytes_taken, words, tmp_path):
        assert wrong == 0
        if words == "ddp":
            assert taken == whole
        else:
            assert 0.45 * whole < taken < 0.55 * whole


def write_large(folder: Path) -> None:
    accelerator = Accelerator(strategy="single")
    torch.manual_seed(0)
    accelerator.prepare(nn.Linear(2048, 4096, bias=False))
    accelerator.save_state(folder, step=1)
    accelerator.end_training()


def bytes_read(words: str, folder: Path) -> int:
    """Bytes that this rank reads of the one large tensor of a checkpoint."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words)
    strategy.start(world)
    model = nn.Linear(2048, 4096, bias=False)
    strategy.prepare({"model": model}, [])
    read = 0
    readv = verified.LocalFile.readv

    def counted(self: verified.LocalFile, position: int, buffers: Sequence[memoryview]) -> int:
        nonlocal read
        found = readv(self, position, buffers)
        read += found
        return found

    with Checkpoint(folder / "step-00000001") as saved:
        (name,) = saved.names()
        source = named_state.Source(lambda _, **box: saved.tensor(name, **box), shape=lambda _: saved.shape(name), sliced=True)
        verified.LocalFile.readv = counted  # pyright: ignore[reportAttributeAccessIssue]
        strategy.load_state_tensors({"model": model}, {}, ["model/model/weight"], source, {})
    world.stop()
    return read


def test_of_a_checkpoint_each_rank_reads_its_rows(ranks: Any, tmp_path: Path) -> None:
    """32 MiB in two halves: each reads its own, the header, and the rest of the chunks of 1 MiB, which are checked whole."""
    ranks(1, write_large, tmp_path)
    for read in ranks(2, bytes_read, "fsdp", tmp_path):
        assert 16 * 2**20 <= read <= 20 * 2**20


def fail_to_write(folder: Path, middle: bool) -> str:
    """What a rank is told when rank 0 cannot write; all ranks go on."""
    accelerator = Accelerator(strategy="fsdp")
    model = accelerator.prepare(net())
    try:
        accelerator.save_model(model, folder, max_shard_size=1000)
    except CheckpointError as error:
        found = str(error)
    else:
        found = "nothing"
    assert accelerator.get_state_dict(model) or not accelerator.is_main_process
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return found


@pytest.mark.parametrize("middle", [False, True])
def test_what_rank_0_cannot_write_is_an_error_on_all_ranks(ranks: Any, tmp_path: Path, middle: bool) -> None:
    """At once (the folder is a file), or after some tensors were put together (the name of a file is taken by a folder)."""
    folder = tmp_path / "out"
    if middle:
        (folder / ".model-00004-of-00008.safetensors.partial").mkdir(parents=True)
    else:
        folder.write_text("")
    first, second = ranks(2, fail_to_write, folder, middle)
    assert first == second
    assert f"[rank 0/2] Writing the weights in {folder} failed: " in first
    assert not list(folder.glob("model*")) if middle else folder.is_file()


def warned() -> tuple[str, list[str]]:
    accelerator = Accelerator(strategy="fsdp")
    model = accelerator.prepare(nn.Linear(512, 512))
    placement.free_host_memory = lambda: 2**20
    if accelerator.is_main_process:
        with pytest.warns(UserWarning, match="whole model") as caught:
            names = list(accelerator.get_state_dict(model))
        text = str(caught[0].message)
    else:
        text, names = "", list(accelerator.get_state_dict(model))
    accelerator.end_training()
    return text, names


def test_a_whole_state_dict_says_what_it_takes_where_that_is_not_free(ranks: Any) -> None:
    (text, names), (_, others) = ranks(2, warned)
    assert "1.0 MiB, where 1.0 MiB are free" in text
    assert "save_model writes the same tensors one by one" in text
    assert (names, others) == (["weight", "bias"], [])
