"""A step on up to a thousand ranks is tried on one process: bytes held and sent are those counted by hand and of real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract_models import LlamaBlock
from drivetrain.strategies.dry_run import dry_run, dry_world
from drivetrain.strategies.dtensors import local
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.world import World
from torch import Tensor, nn


class Llama(nn.Module):
    """The Llama of contract_models.py, without values of its own choice."""

    def __init__(self, vocabulary: int, dim: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, heads, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        hidden = self.tok_embeddings(x)
        for layer in self.layers:
            hidden = layer(hidden, positions)
        return self.output(self.norm(hidden))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


SMALL = {"vocabulary": 64, "dim": 32, "layers": 2, "heads": 4, "hidden": 64}
SEVEN_B = {"vocabulary": 32000, "dim": 4096, "layers": 32, "heads": 32, "hidden": 11008}


def tried(size: int, strategy: str, config: dict[str, int], length: int = 16, **options: Any) -> dict[str, Any]:
    with dry_world(size) as world:
        with torch.device("meta"):
            model = Llama(**config)
        made = make_strategy(strategy, **options)
        run = dry_run(model, made, torch.zeros(1, length, dtype=torch.long), world, loss_of)
    return {**vars(run), "explained": dict(run.explain())}


def held() -> tuple[int, int]:
    """Bytes of parameters and of AdamW's state that a real rank holds."""
    world = World.start("cpu")
    strategy = make_strategy("fsdp")
    strategy.start(world)
    model = Llama(**SMALL)
    _, (optimizer,) = strategy.prepare({"model": model}, lambda: [torch.optim.AdamW(model.parameters(), fused=True)])
    strategy.backward(loss_of(model, torch.zeros(1, 16, dtype=torch.long)))
    optimizer.step()
    parameters = sum(local(p).nbytes for p in model.parameters())
    state = sum(local(t).nbytes for s in optimizer.state.values() for t in s.values())
    strategy.stop()
    world.stop()
    return parameters, state


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_two_ranks_hold_what_the_dry_run_says(ranks: Any) -> None:
    (run,) = ranks(1, tried, 2, "fsdp", SMALL)
    assert (run["parameters"], run["optimizer"]) == ranks(2, held)[0]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_sixteen_ranks_hold_a_sixteenth_and_send_what_fsdp_sends(ranks: Any) -> None:
    (run,) = ranks(1, tried, 16, "fsdp", SMALL)
    total = sum(p.numel() * 4 for p in Llama(**SMALL).parameters())
    assert run["total"] == total

    assert run["parameters"] == total / 16
    assert run["gradients"] == run["parameters"]
    gathered = run["sent"]["dp_shard"]
    blocks = sum(p.numel() * 4 for p in Llama(**SMALL).layers.parameters())
    # Forward: all units. Backward: the blocks once more; the root stayed gathered.
    assert gathered["allgather_base"][0] == 3 + 2
    assert gathered["allgather_base"][1] == total + blocks
    assert gathered["reduce_scatter_base"][0] == 3
    assert gathered["reduce_scatter_base"][1] == total
    assert "bytes a step: 5 x allgather_base" in run["explained"]["sent on dp_shard"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize(
    ("size", "strategy", "pieces", "axes"),
    [
        (64, "fsdp:8+tp:8", 64, {"dp_shard", "tp"}),
        (1024, "hsdp:8+tp:8", 128, {"dp_replicate", "dp_shard", "tp"}),
        (1024, "fsdp", 1024, {"dp_shard"}),
    ],
)
def test_a_llama_of_seven_billion_is_tried_on_up_to_1024_ranks(
    size: int, strategy: str, pieces: int, axes: set[str], ranks: Any
) -> None:
    """A rank holds what the plan leaves it, in less memory here than one of its 32 layers would take."""
    (run,) = ranks(1, tried, size, strategy, SEVEN_B, 2048, activation_checkpointing="full", timeout=280)
    assert run["total"] == 4 * 6_738_415_616
    assert run["parameters"] == pytest.approx(run["total"] / pieces, rel=0.02)
    assert run["optimizer"] == pytest.approx(2 * run["parameters"], rel=0.01)
    assert run["peak"] > run["parameters"] + run["optimizer"]
    assert set(run["sent"]) == axes


def refusal(strategy: str, on_meta: bool) -> str:
    with dry_world(4) as world:
        with torch.device("meta" if on_meta else "cpu"):
            model = Llama(**SMALL)
        try:
            dry_run(model, strategy, torch.zeros(1, 4, dtype=torch.long), world, loss_of)
        except ConfigError as error:
            return str(error)
    return ""


def test_what_cannot_be_tried_is_refused(ranks: Any) -> None:
    assert "without values" in ranks(1, refusal, "fsdp", False)[0]
