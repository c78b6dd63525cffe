"""Context parallel as a strategy: the numbers of one plain loop, by the conformance suite, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.context_parallel import ContextParallel, ContextPart
from drivetrain.strategies.contract import CASES, MIXED, Case, cases_of, check_strategy
from drivetrain.strategies.errors import ConfigError, DrivetrainError
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.shared_sequence import sequence_positions
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

DOUBLE = {c.name.removeprefix("float64 "): c for c in cases_of("llama", [c for c in CASES if c.dtype == torch.float64])}
QUICK = [replace(DOUBLE[f"{name} llama"], steps=4) for name in ("sgd window 3, clipped", "adamw num_items, clipped")]
# The first step is verified without gradients, inside of its autocast.
QUICK += [replace(c, steps=4) for c in cases_of("llama", MIXED) if c.name == "bf16-mixed sgd num_items, clipped llama"]
WANTED = ("float64 sgd", "float64 sgd window 3, cut short", "float64 adamw num_items, clipped", "fp32 adamw window 3, clipped")
# Few steps: that many steps stay right is for tests/benchmarks/matrix.py to show.
LONG = [replace(c, steps=4) for c in cases_of("llama", [c for c in CASES if c.name in WANTED])] + QUICK[2:]


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


@pytest.mark.parametrize(("method", "balanced"), [("all-gather", True), ("ring", True), ("ring", False), ("ulysses", True)])
def test_two_ranks_that_share_a_sequence_train_like_one(method: str, balanced: bool, ranks: Any) -> None:
    """In order, a rank's first chunk is arange(T) itself, which code of ours asks for in the backward pass as well."""
    options = {"context_parallel": ContextParallel(method=method, load_balance=balanced)}
    cases = QUICK if method == "all-gather" else QUICK[:1]
    for found in ranks(2, outcomes, "cp:2", options, cases):
        assert [o for _, o, _ in found] == ["pass"] * len(cases), found


class Recomputed(nn.Module):
    """Attention that is run again in the backward pass."""

    def __init__(self, *, recompute: bool, by_import: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(16, 12)
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, 16)
        self.recompute, self.reentrant = recompute, reentrant
        self.by_import = by_import
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 3)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attention = F.scaled_dot_product_attention if not self.by_import else scaled_dot_product_attention
        return attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = checkpoint(self.attend, x, use_reentrant=self.reentrant) if self.recompute else self.attend(x)
        return self.head(x).tanh()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch["x"]).flatten(0, 1), batch["y"].flatten())


def batch_of(seed: int, samples: int = 2, tokens: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 16, (samples, tokens), generator=generator) for name in ("x", "y")}


def gradients_of_recomputed(method: str, options: dict[str, bool], loop: str = "") -> dict[str, Tensor]:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy("cp:2", context_parallel=method)
    strategy.start(world)
    model = Recomputed(recompute=True, **options)
    strategy.prepare({"model": model}, [])
    if not loop:
        strategy.backward(strategy.bind(model, "training_step")(batch_of(1)))
    elif loop == "a step's loss.backward()":
        strategy.bind(model, "training_step")(batch_of(1)).backward()
    else:
        part_of: Any = strategy
        with part_of.parts[0].sharing(batch_of(1)) as part:
            loss = F.cross_entropy(model(part["x"]).flatten(0, 1), part["y"].flatten())
            if loop == "backward inside":
                loss.backward()
        if loop == "backward behind":
            loss.backward()
    assert F.scaled_dot_product_attention is scaled_dot_product_attention
    assert torch.arange(8).tolist() == list(range(8))
    grads: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
    found = {n: g.full_tensor() for n, g in grads.items()}
    world.stop()
    return found


@pytest.mark.parametrize(
    ("method", "options"), [("all-gather", {}), ("ring", {"by_import": True}), ("ulysses", {"reentrant": True})]
)
def test_recomputed_attention_looks_at_all_ranks_too(method: str, options: dict[str, bool], ranks: Any) -> None:
    """Activation checkpointing runs the forward again inside the backward pass, where torch has no modes."""
    truth = Recomputed(recompute=False)
    truth.training_step(batch_of(1)).backward()
    for found in ranks(2, gradients_of_recomputed, method, options):
        for name, parameter in truth.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "options", "loop"),
    [
        ("all-gather", {"reentrant": True}, "a step's loss.backward()"),
        ("all-gather", {}, "backward behind"),
        ("ring", {"reentrant": True}, "backward behind"),
        ("ulysses", {}, "backward inside"),
    ],
)
def test_a_backward_pass_that_nobody_announced_finds_it_too(method: str, options: Any, loop: str, ranks: Any) -> None:
    """Reentrant checkpointing would get gradients of a part's own tokens alone, without a word."""
    truth = Recomputed(recompute=False)
    truth.training_step(batch_of(1)).backward()
    for found in ranks(2, gradients_of_recomputed, method, options, loop):
        for name, parameter in truth.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-11, atol=1e-13)


ONE = [c for c in QUICK if c.clip and c.dtype == torch.float64][:1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation_checkpointing": "full"}, ""),
        ({"activation_checkpointing": "selective"}, ""),
        ({"compile": "aot_eager"}, r"compile=... with context parallel \(cp\)"),
    ],
)
def test_blocks_are_computed_again_and_not_compiled(options: dict[str, Any], says: str, ranks: Any) -> None:
    for found in ranks(2, outcomes, "cp:2", options, [replace(c, steps=3) for c in ONE]):
        assert [o for _, o, _ in found] == ["refused" if says else "pass"], found
        assert re.search(says, found[0][2])


class Indexed(nn.Module):
    """Asks torch.arange for positions, for the number of samples, and for half of a head's features."""

    def __init__(self, width: int = 5, *, samples: bool = True) -> None:
        super().__init__()
        self.samples, self.width = samples, width
        generator = torch.Generator().manual_seed(0)
        self.scale = nn.Parameter(torch.randn(16, 4, generator=generator, dtype=torch.float64))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.scale[batch["x"]] * (1 + torch.arange(batch["x"].shape[1]))[:, None]
        x = x * torch.arange(self.width).square().sum()
        if self.samples:
            x = x + torch.arange(x.shape[0])[:, None, None]
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]).square().mean()


def steps_of_indexed(half: int, samples: bool, batches: list[tuple[int, int]], pad: Any) -> list[Any]:
    world = World.start("cpu", need_group=True)
    strategy: Any = make_strategy("cp:2", context_parallel=ContextParallel(pad=pad))
    strategy.start(world)
    model = Indexed(half, samples=samples)
    strategy.prepare({"model": model}, [])
    step = strategy.bind(model, "training_step")
    found: list[Any] = []
    for n, tokens in batches:
        try:
            loss = step(batch_of(n, n, tokens)).detach()
            found.append(float(world.all_reduce(loss)) / 2)
        except ConfigError as error:
            found.append(str(error))
    world.stop()
    return found


@pytest.mark.parametrize(
    ("half", "samples", "batches", "refused"),
    [
        (5, True, [(2, 40), (3, 20), (10, 20)], {2}),  # a part of 10, and 10 samples
        (5, True, [(10, 20)], {0}),
        (30, True, [(2, 64), (2, 60), (2, 56)], {1}),
        (32, True, [(2, 64), (2, 128)], {0}),
        (32, True, [(2, 128), (2, 64)], {1}),  # the length of a part in the verification, which takes another
        (64, True, [(2, 256), (2, 128)], {1}),  # the length of the whole there
        (5, False, [(10, 20), (10, 40)], set()),  # 10 samples, which nobody asks for
    ],
)
def test_an_arange_of_something_else_is_not_taken_for_positions(
    half: int, samples: bool, batches: list[tuple[int, int]], refused: set[int], ranks: Any
) -> None:
    for found in ranks(2, steps_of_indexed, half, samples, batches, None):
        for index, (n, tokens) in enumerate(batches):
            if index in refused:
                assert re.search(r"tokens long, and the step asks torch.arange\(\d+\) for something else", found[index])
            else:
                truth = Indexed(half, samples=samples).training_step(batch_of(n, n, tokens)).item()
                assert found[index] == pytest.approx(truth, rel=1e-9)


class Summed(Recomputed):
    def training_step(self, batch: dict[str, Tensor]) -> Any:
        logits, y = self(batch["x"]).flatten(0, 1), batch["y"].flatten()
        return {"loss": F.cross_entropy(logits, y, ignore_index=-1, reduction="sum"), "num_items": (y != -1).sum()}


def padded_step(pad: dict[str, int], mean: bool) -> Any:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy("cp:2", context_parallel=ContextParallel(pad=pad))
    strategy.start(world)
    model = (Recomputed if mean else Summed)(recompute=False)
    strategy.prepare({"model": model}, [])
    try:
        found: Any = strategy.bind(model, "training_step")(batch_of(1, tokens=13))
        return [float(world.all_reduce(found[key].detach().double())) for key in ("loss", "num_items")]
    except ConfigError as error:
        return str(error)
    finally:
        world.stop()


@pytest.mark.parametrize(
    ("pad", "mean", "says"),
    [
        ({"x": 0, "y": -1}, False, ""),
        ({"x": 0, "y": 0}, True, "hold different numbers of labels"),
        ({"x": 0}, False, r"does not name y"),
    ],
)
def test_lengths_that_do_not_divide_are_padded_where_it_was_said_how(pad: Any, mean: bool, says: str, ranks: Any) -> None:
    truth = Summed(recompute=False).training_step(batch_of(1, tokens=13))
    for found in ranks(2, padded_step, pad, mean):
        if says:
            assert re.search(says, found), found
        else:
            assert found == pytest.approx([truth["loss"].item(), 26.0], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "size", "options"),
    [
        ("cp:2", 2, {}),
        ("cp:2", 2, {"context_parallel": "ring"}),
        ("cp:2", 2, {"context_parallel": "ulysses"}),
        ("fsdp:2+cp:2", 4, {"context_parallel": ContextParallel(method="ring", load_balance=False, positions="arange")}),
        ("hsdp:2+cp:2", 4, {}),
        ("cp:4", 4, {"context_parallel": "ulysses"}),
        ("cp:2+tp:2", 4, {}),
    ],
)
def test_every_case_of_the_suite_passes(strategy: str, size: int, options: dict[str, Any], ranks: Any) -> None:
    for found in ranks(size, outcomes, strategy, options, LONG if size == 2 else LONG[1::3], timeout=120):
        assert {o for _, o, _ in found} == {"pass"}, found


class Several(nn.Module):
    """Attention over the sequence, over something else, and by torch's layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(16, 8)
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.latent = nn.Parameter(torch.randn(1, 3, 8))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embed(batch["x"])
        if self.kind == "layer":
            x = self.layer(x, x, x, need_weights=False)[0]
        elif self.kind == "latents look":
            x = F.scaled_dot_product_attention(self.latent.expand(x.shape[0], -1, -1), x, x)
        elif self.kind == "memory":  # every token looks at three vectors that all ranks have
            memory = self.latent.expand(x.shape[0], -1, -1)
            x = x + F.scaled_dot_product_attention(x, memory, memory)
        elif self.kind == "square mask":
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]
        elif self.kind == "dropout":
            q = x[:, None]
            x = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)[:, 0]
        elif self.kind == "odd heads":
            q = torch.stack([x, x, x], 1)
            x = F.scaled_dot_product_attention(q, q, q).mean(1)
        return x.square().mean()


def first_step(kind: str, options: dict[str, Any], tokens: int) -> tuple[str, float, float]:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy("cp:2", context_parallel=ContextParallel(**options))
    strategy.start(world)
    model = Several(kind)
    truth = float(model.training_step(batch_of(1, tokens=tokens)).detach())
    strategy.prepare({"model": model}, [])
    try:
        loss = strategy.bind(model, "training_step")(batch_of(1, tokens=tokens))
        return "", truth, float(world.all_reduce(loss.detach())) / 2
    except ConfigError as error:
        return str(error), truth, 0.0
    finally:
        world.stop()


@pytest.mark.parametrize(
    ("kind", "options", "tokens", "says"),
    [
        ("layer", {}, 16, "nn.MultiheadAttention .* cannot attend to keys of other ranks"),
        ("latents look", {}, 16, "Attention of 3 queries to the 8 keys"),
        ("square mask", {}, 16, r"attn_mask has the shape \(8, 8\).*Give it all columns: \(..., 8, 16\)"),
        ("dropout", {"method": "ring"}, 16, "dropout_p=0.1: ring attention"),
        ("odd heads", {"method": "ulysses"}, 16, "2 ranks some of the 3 heads"),
        ("memory", {}, 18, "18 tokens long, which 2 ranks cannot share in 4 equal chunks. Pad the sequences"),
        ("memory", {"load_balance": False}, 18, ""),
        ("memory", {}, 16, ""),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(kind: str, options: dict[str, Any], tokens: int, says: str, ranks: Any) -> None:
    """And what looks at no other token is left alone."""
    for said, truth, loss in ranks(2, first_step, kind, options, tokens):
        if says:
            assert re.search(says, said), said
        else:
            assert not said
            assert loss == pytest.approx(truth, rel=1e-5)


def in_a_loop_of_ones_own() -> list[Any]:
    world = World.start("cpu", need_group=True)
    strategy: Any = make_strategy("cp:2")
    strategy.start(world)
    model = Recomputed(recompute=False)
    strategy.prepare({"model": model}, [])
    with strategy.parts[0].sharing(batch_of(1)) as part:
        positions = sequence_positions(8).tolist()
        loss = F.cross_entropy(model(part["x"]).flatten(0, 1), part["y"].flatten())
    strategy.backward(loss)
    found = [float(world.all_reduce(loss.detach())) / 2, positions, sequence_positions(3).tolist()]
    found.append(model.qkv.weight.grad.full_tensor())  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    world.stop()
    return found


def test_a_loop_of_ones_own_shares_its_batch(ranks: Any) -> None:
    truth = Recomputed(recompute=False)
    loss = truth.training_step(batch_of(1))
    loss.backward()
    first, second = ranks(2, in_a_loop_of_ones_own)
    assert first[0] == second[0] == pytest.approx(loss.item(), rel=1e-12)
    assert (first[1], second[1]) == ([0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11])
    assert first[2] == [0, 1, 2]
    torch.testing.assert_close(first[3], truth.qkv.weight.grad)


@pytest.mark.parametrize("wrong", [{"method": "rings"}, {"method": "torch"}, {"positions": "rope"}, {"sequence_dim": -1}])
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DrivetrainError, match=r"method|positions|sequence_dim"):
        ContextParallel(**wrong)


def means(kind: str) -> list[float]:
    """Two means of one rank's part, as a model may take them, added over the ranks and divided by their number."""
    world = World.start("cpu")
    strategy = make_strategy("cp:2", context_parallel=ContextParallel(positions="model"))
    strategy.start(world)
    model = nn.Linear(1, 1).double()
    strategy.prepare({"model": model}, [])
    assert isinstance(strategy, ParallelStrategy)
    (part,) = strategy.parts
    assert isinstance(part, ContextPart)
    batch = labelled(kind)
    with part.sharing(batch) as mine:
        losses = [f(mine) for f in MEANS_OF]
    found = [float(world.all_reduce(loss.detach())) / 2 for loss in losses]
    world.stop()
    return found


def labelled(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 5, (3, 8), generator=generator)
    if kind == "few":
        labels[:, 5:] = -100
    else:  # the first rank's tokens are the first and the last ones
        labels[:, :2] = labels[:, 6:] = -100
    return {"x": torch.randn(3, 8, 5, generator=generator, dtype=torch.float64), "y": labels}


MEANS_OF: list[Callable[[dict[str, Tensor]], Tensor]] = [
    lambda b: F.cross_entropy(b["x"].flatten(0, 1), b["y"].flatten()),
    lambda b: F.cross_entropy(b["x"].mT, b["y"], weight=torch.arange(1.0, 6.0).double(), label_smoothing=0.1),
    lambda b: nn.NLLLoss()(b["x"].flatten(0, 1).log_softmax(-1), b["y"].flatten()),
    lambda b: nn.CrossEntropyLoss(ignore_index=1)(b["x"].flatten(0, 1), b["y"].flatten().clamp(min=0)),
]


@pytest.mark.parametrize("kind", ["few", "one rank's"])
def test_a_mean_is_divided_by_the_labels_of_all_parts(kind: str, ranks: Any) -> None:
    """Class weights, smoothing and other ignored labels too; a rank may have none at all, whose own mean would be NaN."""
    truth = [f(labelled(kind)).item() for f in MEANS_OF]
    for found in ranks(2, means, kind):
        assert found == pytest.approx(truth, rel=1e-12)
