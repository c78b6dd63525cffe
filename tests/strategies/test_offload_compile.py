"""An offloaded model is compiled block by block: no graph breaks inside of a block, and the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import init_empty_weights, load_checkpoint_and_dispatch, save_torch_model, weights_of
from torch import Tensor, nn

LAYERS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Net, Any]:
    torch.manual_seed(0)
    net = Net().eval()
    save_torch_model(net, tmp_path)
    with init_empty_weights():
        empty = Net().eval()
    return net, load_checkpoint_and_dispatch(empty, tmp_path, {"": "cpu", "layers": "disk"})


class Graphs:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.found.append(copy.copy(graph))
        return graph.forward

    def products(self) -> list[int]:
        """How many matrix products each graph holds."""
        return [sum("linear" in str(n.target) for n in g.graph.nodes if n.op == "call_function") for g in self.found]


def test_each_block_is_one_graph_that_all_blocks_share(models: tuple[Net, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Regional: one compilation for all blocks, whichever buffer they are in; `fullgraph` would raise at a break."""
    net, model = models
    torch._dynamo.reset()
    graphs, x = Graphs(), torch.randn(3, 8)
    weights_of(model).compile(backend=graphs, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), net(x))
    assert graphs.products() == [2]
    with capsys.disabled():
        print(f"\ngraph breaks inside blocks: 0 in {LAYERS} blocks; graphs compiled: {len(graphs.found)}")


def test_compiling_the_whole_model_breaks_between_blocks_and_never_inside(
    models: tuple[Net, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    net, model = models
    torch._dynamo.reset()
    graphs, x = Graphs(), torch.randn(3, 8)
    compiled = torch.compile(model, backend=graphs)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), net(x))
    # A block's two products are in one graph; first and last have one each, where Dynamo compiles them at all.
    assert set(graphs.products()) <= {0, 1, 2}
    assert graphs.products().count(2) == 1
    with capsys.disabled():
        print(f"\nwhole model compiled: {len(graphs.found)} graphs with {graphs.products()} products; none splits a block")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch, of its own looking at it
def test_gradients_flow_through_compiled_blocks_that_are_read_again(models: tuple[Net, Any]) -> None:
    net, model = models
    torch._dynamo.reset()
    weights_of(model).compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8)
    found = []
    for one in (net, model):
        one.requires_grad_(False)
        one.first.weight.requires_grad_(True)
        for _ in range(2):
            one.first.weight.grad = None
            one(x).square().sum().backward()
        found.append(one.first.weight.grad)
    assert torch.equal(found[0], found[1])
