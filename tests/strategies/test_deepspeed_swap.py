"""Stage 3 with its optimizer, its parameters or both on a disk has the numbers, checkpoints and weights of a plain loop.

What is below a MiB stays in memory, so the models have a layer that is larger, and one that is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, DeepSpeedStrategy
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn

deepspeed = library(torch.device("cpu"))

WIDE = 9000
"""Not a multiple of what the disk is read in: where DeepSpeed itself goes wrong (see deepspeed_swap.py)."""
X = torch.randn(6, 8, 64, generator=torch.Generator().manual_seed(1))
PLACES: dict[str, dict[str, Any]] = {
    "optimizer": {"offload_optimizer": "nvme"},
    "parameters": {"offload_parameters": "nvme"},
    "both": {"offload_optimizer": "nvme", "offload_parameters": "nvme"},
}


@pytest.fixture(scope="module")
def async_io() -> None:
    """DeepSpeed's extension, loaded once for all ranks. Its build takes minutes, and no test is to wait for that."""
    if not deepspeed.ops.__compatible_ops__["async_io"]:
        pytest.skip("waits for libaio-dev: DeepSpeed's async_io cannot be built without its headers")
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("async_io", verbose=False))
    sources = str(Path(deepspeed.__file__).parent)
    if not (folder / "async_io.so").is_file() or sources not in (folder / "build.ninja").read_text():
        pytest.skip(f"waits for DeepSpeed's async_io in {folder}: AsyncIOBuilder().load() builds it, in minutes")
    AsyncIOBuilder().load(verbose=False)


class Net(nn.Module):
    """`seldom` takes part in every other step only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Sequential(nn.Linear(64, WIDE), nn.Tanh(), nn.Linear(WIDE, 64))
        self.seldom = nn.Linear(64, 64)
        self.frozen = nn.Linear(64, WIDE, bias=False).requires_grad_(False)

    def forward(self, x: Tensor, step: int) -> Tensor:
        h = self.wide(x)
        h = h + self.seldom(x) if step % 2 == 0 else h
        return h + self.frozen(x).mean(dim=1, keepdim=True)


def plain(steps: int = 6) -> tuple[list[float], dict[str, Tensor]]:
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    losses = []
    for i in range(steps):
        for x in X[i].chunk(2):
            loss = model(x, i).pow(2).mean()
            (loss / 2).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for parameter in model.seldom.parameters():  # ZeRO steps a piece as a whole, with zeros where nothing came
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


def trained(
    options: dict[str, Any], folder: Path, steps: range, save: Path | None = None, load: Path | None = None
) -> tuple[list[float], dict[str, Tensor], list[str]]:
    options = {"nvme_path": folder, "stage3_param_persistence_threshold": 0} | options
    accelerator = Accelerator(strategy=DeepSpeedStrategy(stage=3, **options), gradient_accumulation_steps=2)
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    if load is not None:
        accelerator.load_state(load)
    losses = []
    for i in steps:
        for x in X[i].chunk(2):
            with accelerator.accumulate(model):
                loss = model(x[accelerator.process_index :: accelerator.num_processes], i).pow(2).mean()
                accelerator.backward(loss)
                losses.append(float(accelerator.reduce(loss.detach(), "mean")))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    weights = accelerator.get_state_dict(model)
    files = [str(p.relative_to(folder)) for p in folder.rglob("*.swp")]
    accelerator.end_training()
    return losses, weights, files


def assert_same(found: tuple[list[float], dict[str, Tensor], list[str]], losses: list[float], weights: dict[str, Tensor]) -> None:
    assert found[0] == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("place", list(PLACES))
def test_on_a_disk_the_numbers_are_those_of_a_plain_loop(
    place: str, size: int, ranks: Any, tmp_path: Path, async_io: None
) -> None:
    """Windows, clipping, momentum, a layer that rests in every other step, and a frozen one; in fp32 no bit is rounded away."""
    found = ranks(size, trained, PLACES[place], tmp_path, range(6))
    assert_same(found[0], *plain())
    kinds = {"optimizer": ["optimizer"], "parameters": ["float32params"], "both": ["float32params", "optimizer"]}[place]
    assert sorted({name.split("/")[1] for name in found[0][2]}) == kinds  # something did lie there


@pytest.mark.slow
@pytest.mark.parametrize("place", list(PLACES))
def test_a_run_on_a_disk_is_saved_and_goes_on_in_memory_and_back(place: str, ranks: Any, tmp_path: Path, async_io: None) -> None:
    """From the disk of two ranks to the memory of one, and to the disk of two again."""
    first = ranks(2, trained, PLACES[place], tmp_path / "a", range(2), tmp_path / "one")[0]
    memory = ranks(1, trained, {}, tmp_path / "b", range(2, 4), tmp_path / "two", tmp_path / "one")[0]
    last = ranks(2, trained, PLACES[place], tmp_path / "c", range(4, 6), None, tmp_path / "two")[0]
    losses, weights = plain()
    assert_same((first[0] + memory[0] + last[0], last[1], []), losses, weights)


def evaluated(folder: Path) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A model that is only evaluated; other weights are loaded into it."""
    strategy = DeepSpeedStrategy(
        stage=3, inference=True, offload_parameters="nvme", nvme_path=folder, stage3_param_persistence_threshold=0
    )
    accelerator = Accelerator(strategy=strategy)
    model = accelerator.prepare(Net())
    before = accelerator.get_state_dict(model)
    model.load_state_dict({k: v * 2 for k, v in Net().state_dict().items()})
    with torch.no_grad():
        answer = model(X[0], 0)
    after = accelerator.get_state_dict(model)
    accelerator.end_training()
    return answer, before, after


@pytest.mark.slow
def test_a_model_on_a_disk_is_evaluated_and_filled_anew(ranks: Any, tmp_path: Path, async_io: None) -> None:
    answer, before, after = ranks(2, evaluated, tmp_path)[0]
    truth = Net()
    for name, weight in truth.state_dict().items():
        assert torch.equal(before[name], weight), name
        assert torch.equal(after[name], weight * 2), name
    truth.load_state_dict(after)
    torch.testing.assert_close(answer, truth(X[0], 0).detach())


def refused(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "async_io", False)
    with pytest.raises(ConfigError) as caught:
        Accelerator(strategy=DeepSpeedStrategy(stage=3, offload_optimizer="nvme", nvme_path="/nowhere"))
    return str(caught.value)


def test_without_libaio_it_is_refused_before_anything_is_built(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ranks(1, refused, monkeypatch)[0]
    assert "cannot be built here: libaio's headers (apt install libaio-dev) or a C++ compiler are missing" in said
