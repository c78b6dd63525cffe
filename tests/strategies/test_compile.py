"""compile= compiles blocks once for all of them, keeps the numbers, and is an error where nothing was compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Trainer, TrainingModule
from drivetrain.strategies.compile import Compile, compile_blocks, read_compile
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# torch.compile looks at the .grad of what it is given, which torch warns about.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.wide = nn.Linear(size, size)
        self.narrow = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.nn.functional.gelu(self.wide(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(8, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)).square().mean() * 1.0


def trained(strategy: str, compile: Any, checkpointing: Any = None) -> tuple[list[float], int]:
    """Losses of three steps, and how many graphs were compiled."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    accelerator = Accelerator(strategy=strategy, compile=compile, activation_checkpointing=checkpointing)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses = []
    for step in range(3):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        index, count = accelerator.strategy.data_shard
        # Of an input without a gradient the first block would be a graph of its own.
        loss = model(x.chunk(count)[index].requires_grad_())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss, "mean").item())
    accelerator.end_training()
    return losses, counters["stats"]["unique_graphs"]


def run(*cases: tuple[Any, ...]) -> list[tuple[list[float], int]]:
    return [trained(*case) for case in cases]


def test_three_blocks_are_one_graph_and_the_losses_stay(ranks: Any) -> None:
    ((plain, none), (compiled, graphs), (both, _)) = ranks(
        1, run, ("single", None), ("single", "aot_eager"), ("single", "aot_eager", "full"), timeout=120
    )[0]
    assert none == 0
    assert graphs == 1
    assert compiled == pytest.approx(plain, rel=1e-6)
    assert both == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_blocks_are_compiled_under_strategies_with_and_without_recomputation(strategy: str, ranks: Any) -> None:
    for (plain, _), (compiled, graphs), (both, _) in ranks(
        2, run, (strategy, None), (strategy, "aot_eager"), (strategy, "aot_eager", "selective"), timeout=240
    ):
        assert graphs >= 1
        assert compiled == pytest.approx(plain, rel=1e-6)
        assert both == pytest.approx(plain, rel=1e-6)


class Asks(TrainingModule):
    """Its step calls a child's child, past the forward of the model."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.net, self.past = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), past

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return (self.net[0](x) if self.past else self.net(x)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(past: bool, root: Any) -> str:
    data = DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2)
    trainer = Trainer(max_steps=2, compile="aot_eager", root=root, enable_progress_bar=False, enable_model_summary=False)
    try:
        trainer.fit(Asks(past), data)
    except ConfigError as refusal:
        return str(refusal)
    return "trained"


def test_a_compile_that_compiled_nothing_is_an_error(ranks: Any, tmp_path: Any) -> None:
    assert ranks(1, fitted, False, tmp_path, timeout=120) == ["trained"]
    (refusal,) = ranks(1, fitted, True, tmp_path, timeout=120)
    assert "has compiled nothing of model 'model': net did not run" in refusal


def test_a_copy_runs_its_own_weights() -> None:
    model = Net()
    compile_blocks("model", model, Compile(backend="eager"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(torch.ones(1, 8)).item() == 0.0
        assert model(torch.ones(1, 8)).item() != 0.0


def test_words_of_the_peers_and_refusals() -> None:
    class Plugin:
        backend, mode, dynamic, options, fullgraph, use_regional_compilation = "INDUCTOR", None, None, None, None, True

    assert read_compile("no") is None
    assert read_compile(True) == Compile()
    assert read_compile(Plugin()) == Compile()
    assert read_compile({"mode": "default", "units": None}) == Compile(mode="default", units=None)
    with pytest.raises(ConfigError, match="Did you mean 'inductor'"):
        read_compile("inducto")
    with pytest.raises(ConfigError, match="no option 'fulgraph'"):
        read_compile({"fulgraph": True})
    with pytest.raises(ConfigError, match="one of the two"):
        read_compile(Compile(mode="default", options={}))
    with pytest.raises(ConfigError, match="no module with a forward and parameters"):
        compile_blocks("model", nn.ReLU(), Compile())
