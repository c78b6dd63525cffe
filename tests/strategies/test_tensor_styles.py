"""Fused matrices and heads that several ranks copy, against one process: losses, checkpoints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract import put_together
from drivetrain.strategies.contract_models import Llama
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.tensor_order import Order
from drivetrain.strategies.tensor_parallel import TensorPlan
from drivetrain.strategies.tensor_styles import FusedColumns
from drivetrain.strategies.world import World
from torch import Tensor, nn

VOCABULARY, DIM, HEAD = 16, 32, 4
TOKENS = torch.randint(0, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(5))


class Conv1D(nn.Module):
    """A Linear whose weight is (in, out), as GPT-2 has them."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    """Attention with queries, keys and values in one matrix, the latter of `kv` heads; a gated feed-forward with both in one."""

    def __init__(self, kv: int, conv: bool, headwise: bool) -> None:
        super().__init__()
        self.head_dim, self.kv, self.headwise = HEAD, kv, headwise
        fused, hidden = DIM + 2 * kv * HEAD, 48
        self.norm, self.norm_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        layer: Callable[[int, int], nn.Module] = (lambda i, o: Conv1D(o, i)) if conv else nn.Linear
        self.c_attn, self.c_proj = layer(DIM, fused), layer(DIM, DIM)
        self.feed = nn.ModuleDict({"gate_up_proj": layer(DIM, 2 * hidden), "down_proj": layer(hidden, DIM)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(self.norm(x))
        batch, length = qkv.shape[:2]  # under sequence parallel x is a part
        if self.headwise:  # as GPT-NeoX: queries, keys and values of a head, then those of the next
            q, k, v = (t.transpose(1, 2) for t in qkv.view(batch, length, -1, 3 * HEAD).chunk(3, -1))
        else:
            groups = DIM // HEAD // self.kv
            unit = qkv.shape[-1] // (groups + 2)
            q, k, v = (t.view(batch, length, -1, HEAD).transpose(1, 2) for t in qkv.split([groups * unit, unit, unit], -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.c_proj(out.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.feed["gate_up_proj"](self.norm_2(x)).chunk(2, -1)
        return x + self.feed["down_proj"](F.silu(gate) * up)


class Fused(nn.Module):
    def __init__(self, kv: int = 8, *, conv: bool = False, headwise: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, DIM)
        self.h = nn.ModuleList(Block(kv, conv, headwise) for _ in range(2))
        self.lm_head = nn.Linear(DIM, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + (0.1 if parameter.dim() == 1 else 0)

    def step(self, x: Tensor) -> Tensor:
        hidden = self.wte(x)
        for block in self.h:
            hidden = block(hidden)
        return F.cross_entropy(self.lm_head(hidden).flatten(0, 1), x.flatten())


MODELS: Mapping[str, Callable[[], Any]] = {
    "linear": Fused,
    "conv": lambda: Fused(conv=True),
    "grouped": lambda: Fused(4),
    "copied": lambda: Copied(),
}


class Copied(Llama):
    """Eight heads of queries to two of keys, of which a rank among four has one."""

    def __init__(self) -> None:
        super().__init__(3, dim=32, heads=8, kv_heads=2, layers=2)

    def step(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.loss(self(x), {"y": x}, False)


def losses_of(model: Any, optimizer: Any, backward: Any, step: Any, tokens: Tensor, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = step(tokens)
        backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def trained(words: str, kind: str, state: Any, count: int, options: Mapping[str, Any]) -> tuple[list[float], Any, Any]:
    """Train on `state` (or from the beginning); return this rank's losses, (tensors, values) whole, and rank 0's export."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words, **options)
    strategy.start(world)
    model = MODELS[kind]().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _, (optimizer,) = strategy.prepare({"model": model}, [optimizer])
    if state is not None:
        strategy.load_state_tensors({"model": model}, {"sgd": optimizer}, list(state[0]), state[0].__getitem__, state[1])
    index, parts = strategy.data_shard
    losses = losses_of(model, optimizer, strategy.backward, strategy.bind(model, "step"), TOKENS.chunk(parts)[index], count)
    held, values = strategy.state_tensors({"model": model}, {"sgd": optimizer})
    whole = put_together(held, world)
    full = strategy.full_state_dict(model)
    world.stop()
    return losses, (whole, values), full


def plain(kind: str, count: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, weights, and momenta of one process."""
    model = MODELS[kind]().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = losses_of(model, optimizer, Tensor.backward, model.step, TOKENS, count)
    momenta = {key: optimizer.state[p]["momentum_buffer"] for key, p in model.named_parameters()}
    return losses, {k: v.detach() for k, v in model.state_dict().items()}, momenta


def near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.allclose(found[k], v, rtol=0, atol=1e-11) for k, v in expected.items())


CASES = [
    pytest.param("conv", [("tp:2", 2), ("fsdp:2+tp:2", 4)], {}, id="conv1d"),
    pytest.param("copied", [("tp:4", 4)], {}, id="copied heads"),
    pytest.param(
        "grouped", [("tp:2+sp", 2), ("fsdp:4", 4), ("tp:4", 4), ("single", 1)], {}, id="grouped", marks=pytest.mark.slow
    ),
    pytest.param("linear", [("fsdp:2+tp:2+sp", 4), ("single", 1), ("tp:2", 2)], {}, id="linear", marks=pytest.mark.slow),
    pytest.param("copied", [("tp:4+sp", 4), ("tp:2", 2), ("single", 1)], {}, id="copied, sp", marks=pytest.mark.slow),
    pytest.param("conv", [("tp:2+sp", 2), ("single", 1), ("fsdp:2+tp:2", 4)], {}, id="conv1d, sp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "star", "options"), CASES)
def test_each_rank_has_its_heads_and_checkpoints_stay_canonical(kind: str, star: Any, options: Any, ranks: Any) -> None:
    """Two steps by each strategy, one going on from the other's state: losses, weights, momentum and the export.

    SGD, for a key's bias has no true gradient, and AdamW would make steps of what rounding leaves.
    """
    state = None
    for number, (words, size) in enumerate(star):
        found = ranks(size, trained, words, kind, state, 2, options)
        _, state, full = found[0]
        losses, weights, momenta = plain(kind, 2 * number + 2)
        if "fsdp" not in words:
            assert found[0][0] == pytest.approx(losses[-2:], rel=1e-12), words
        assert near(full, weights), words
        assert near({k.removeprefix("model/model/"): v for k, v in state[0].items() if k.startswith("model/")}, weights)
        held = {k.split("/", 3)[3].rpartition("/")[0]: v for k, v in state[0].items() if k.endswith("/momentum_buffer")}
        assert near(held, momenta), words


@pytest.mark.parametrize("kind", ["conv", "copied"])
def test_an_export_of_what_was_not_trained_is_the_model_bit_for_bit(kind: str, ranks: Any) -> None:
    """Sections are put in order on the way in and on the way out: no number may change place."""
    own = MODELS[kind]().double().state_dict()
    _, state, full = ranks(4, untrained, "fsdp:2+tp:2" if kind == "conv" else "tp:4", kind)[0]
    assert all(torch.equal(full[key], value) for key, value in own.items())
    assert all(torch.equal(state[0][f"model/model/{key}"], value) for key, value in own.items())


def untrained(words: str, kind: str) -> tuple[list[float], Any, Any]:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words)
    strategy.start(world)
    model = MODELS[kind]().double()
    strategy.prepare({"model": model}, [])
    held, values = strategy.state_tensors({"model": model}, {})
    found: tuple[list[float], Any, Any] = [], (put_together(held, world), values), strategy.full_state_dict(model)
    world.stop()
    return found


# -- plans and refusals -----------------------------------------------------------------------------------------------------
class CountsItself(Fused):
    """Splits by its own sizes, as nanoGPT does."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.h:
            block.__class__ = SplitsItself


class SplitsItself(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.norm(x)).split(DIM, -1)
        return x + self.c_proj(q * k.sigmoid() * v)


class Multiplies(SplitsItself):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_proj(F.scaled_dot_product_attention(*self.c_attn(self.norm(x)).chunk(3, -1)))


HEADWISE = {
    "h.*.c_attn": "colwise",
    "h.*.c_proj": "rowwise",
    "h.*.feed.gate_up_proj": FusedColumns(2),
    "h.*.feed.down_proj": "rowwise",
}


def outcomes() -> list[Any]:
    """What plans come to: the first loss, or what is said."""
    world = World.start("cpu", need_group=True)
    whole_heads = Fused(headwise=True).double()
    own_heads = Fused()
    for block in own_heads.h:
        block.__class__ = Multiplies
    cases: list[tuple[Any, Any]] = [
        (Fused(headwise=True).double(), HEADWISE),
        (Fused(headwise=True), "auto"),
        (CountsItself(), "auto"),
        (own_heads, "auto"),
        (Fused(), {"h.*.c_attn": FusedColumns((32, 32, 16)), "h.*.c_proj": "rowwise"}),
        (Fused(1), "auto"),
        (Fused(), {"h.*.c_attn": "copied_heads", "h.*.c_proj": "rowwise"}),
        (Fused(), {"h.*.c_attn": FusedColumns(3), "h.*.c_proj": "rowwise", "h.*.norm": FusedColumns(3)}),
    ]
    found: list[Any] = [whole_heads.step(TOKENS).item()]
    for model, plan in cases:
        strategy = make_strategy("tp:2", tensor_parallel=TensorPlan(plan))
        strategy.start(world)
        try:
            strategy.prepare({"model": model}, [])
            found.append(strategy.bind(model, "step")(TOKENS).item())
        except (ConfigError, RuntimeError, ValueError) as error:
            found.append("".join([str(error), *getattr(error, "__notes__", ())]))
    world.stop()
    return found


def test_a_plan_that_would_train_something_else_is_refused_at_its_first_forward(ranks: Any) -> None:
    """Fused matrices do not say what their sections are: a wrong guess has valid shapes."""
    single, headwise, *told = ranks(2, outcomes)[0]
    assert headwise == pytest.approx(single, rel=1e-12)
    says = [
        "so that it computes something else than it does whole",
        "each rank has 1/2 of each section of a fused matrix",
        "so that it computes something else than it does whole",
        "it has 96 output features, which these sections are not",
        "its sections are 8, 1, 1 heads, which cannot all be divided by 2",
        "how many heads it has cannot be told",
        "norm of model 'model' is a LayerNorm",
    ]
    for part, text in zip(says, told, strict=True):
        assert part in str(text), (part, text)


def compiled() -> list[list[float]]:
    """Losses of three steps in one process, and of the same model in compiled blocks under tp."""
    world = World.start("cpu", need_group=True)
    found = []
    for kind in ("conv", "copied"):
        strategy = make_strategy("tp:4", compile="aot_eager")
        strategy.start(world)
        model = MODELS[kind]().double()
        _, (optimizer,) = strategy.prepare({"model": model}, [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)])
        found.append(losses_of(model, optimizer, strategy.backward, strategy.bind(model, "step"), TOKENS, 3))
    world.stop()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile
def test_blocks_with_sections_and_copied_heads_are_compiled_as_one_graph(ranks: Any) -> None:
    for kind, losses in zip(("conv", "copied"), ranks(4, compiled, timeout=240)[0], strict=True):
        assert losses == pytest.approx(plain(kind, 3)[0], rel=1e-12)


def test_sections_are_cut_at_every_place_where_a_piece_may_begin() -> None:
    """Rows of a whole tensor against `parts`, for pieces of all sizes (fsdp cuts wherever it falls)."""
    order = Order.of_sections(0, (8, 4, 4), 2)
    whole = torch.arange(16)
    held = order.apply(whole)
    assert held.tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert torch.equal(order.undo(held), whole)
    for offset in range(17):
        for length in range(17 - offset):
            rows = [start + i for at, start, n in order.parts(offset, length) for i in range(n)]
            assert rows == held[offset : offset + length].tolist()
