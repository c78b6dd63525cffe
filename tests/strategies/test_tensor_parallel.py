"""Tensor and sequence parallel against a plain PyTorch loop, by the conformance suite and by cases of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import Strategy, make_strategy
from drivetrain.strategies.contract import CASES, MIXED, Case, cases_of, check_strategy, put_together
from drivetrain.strategies.contract_models import GPT, MLP, VOCABULARY, Llama, MoELlama
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.mesh import ParallelPlan
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.tensor_parallel import TensorPlan
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

BY_NAME = {case.name: case for case in (*CASES, *MIXED)}
MLP_PLAN = {"first": "colwise_gather", "second": "rowwise_split"}


def quick(model: str, *names: str, steps: int = 4) -> list[Case]:
    return cases_of(model, [replace(BY_NAME[name], steps=steps) for name in names])


def outcomes(strategy: str, options: dict[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    world = World.start("cpu", need_group=True)
    results = check_strategy(lambda: make_strategy(strategy, **options), world, cases=cases)
    world.stop()
    return [(r.case.name, r.outcome, r.detail) for r in results]


LOSS_PARALLEL = {"tensor_parallel": TensorPlan(loss_parallel=True)}
FAST = [
    pytest.param("tp:2", 2, {}, quick("llama", "float64 adamw window 3, clipped"), id="tp"),
    pytest.param("tp:2+sp", 2, {}, quick("gpt", "float64 sgd num_items, clipped"), id="sp"),
    pytest.param("tp:2", 2, LOSS_PARALLEL, quick("llama", "float64 sgd window 3, num_items"), id="loss parallel"),
    pytest.param("fsdp:2+tp:2", 4, {}, quick("llama", "float64 sgd window 3, clipped"), id="fsdp and tp"),
]
ALL = [f"{precision} {kind}" for precision in ("float64", "fp32", "bf16-mixed") for kind in (
    "sgd", "sgd window 3, clipped", "adamw window 3, cut short", "adamw num_items, clipped")]  # fmt: skip
SLOW = [
    pytest.param("tp:2", 2, {}, quick("gpt", *ALL, steps=8), id="tp gpt"),
    pytest.param("tp:2", 2, {"tensor_parallel": MLP_PLAN}, quick("mlp", *ALL, steps=50), id="tp mlp over fifty steps"),
    pytest.param("tp:2+sp", 2, {}, quick("llama", *ALL, steps=8), id="sp llama"),
    pytest.param("ddp:2+tp:2", 4, {}, quick("llama", *ALL[:4]), id="ddp and tp"),
    pytest.param("fsdp:2+tp:2+sp", 4, {}, quick("llama", *ALL), id="fsdp, tp and sp"),
    pytest.param("hsdp:2+tp:2", 8, {}, quick("llama", "float64 adamw window 3, clipped"), id="hsdp and tp"),
]


@pytest.mark.parametrize(("strategy", "size", "options", "cases"), FAST)
def test_it_gives_the_numbers_of_a_plain_loop(
    strategy: str, size: int, options: dict[str, Any], cases: list[Case], ranks: Any
) -> None:
    for found in ranks(size, outcomes, strategy, options, cases):
        assert [o for _, o, _ in found] == ["pass"] * len(cases), found


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "size", "options", "cases"), SLOW)
def test_it_gives_the_numbers_of_a_plain_loop_in_all_precisions(
    strategy: str, size: int, options: dict[str, Any], cases: list[Case], ranks: Any
) -> None:
    for found in ranks(size, outcomes, strategy, options, cases, timeout=500):
        assert [o for _, o, _ in found] == ["pass"] * len(cases), found


# -- what moves between strategies ------------------------------------------------------------------------------------------
BATCH = {
    "x": torch.randint(0, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(5)),
    "y": torch.randint(0, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(6)),
}


def build(kind: str) -> Any:
    # 38 hidden features: 19 on a rank of tp, which those of fsdp share as 10 and 9.
    return (Llama(3, hidden=38, layers=2, tied=kind == "tied") if kind != "gpt" else GPT(3)).double()


def steps_of(strategy: Strategy, model: Any, optimizer: Any, count: int) -> list[float]:
    step = strategy.bind(model, "step")
    index, parts = strategy.data_shard
    mine = {k: v.chunk(parts)[index] for k, v in BATCH.items()}
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = step(mine, False)
        strategy.backward(loss)
        strategy.step(optimizer)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def trained(words: str, kind: str, state: Any, count: int, options: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Train on `state` (or from the beginning); return (tensors, values) whole, and the full state dict of rank 0."""
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words, **options)
    strategy.start(world)
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # built before: it is given the new parameters
    _, (optimizer,) = strategy.prepare({"model": model}, [optimizer])
    if state is not None:
        strategy.load_state_tensors({"model": model}, {"adamw": optimizer}, list(state[0]), state[0].__getitem__, state[1])
    steps_of(strategy, model, optimizer, count)
    held, values = strategy.state_tensors({"model": model}, {"adamw": optimizer})
    whole = put_together(held, world)
    full = strategy.full_state_dict(model)
    world.stop()
    return (whole, values), full


def plain(kind: str, count: int) -> dict[str, Tensor]:
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model.step(BATCH, False).backward()
        optimizer.step()
    return {k: v.detach() for k, v in model.state_dict().items()}


def near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.allclose(found[k], v, rtol=0, atol=1e-12) for k, v in expected.items())


STAR = [("tp:2", 2), ("fsdp:2+tp:2", 4), ("fsdp:4", 4), ("single", 1), ("tp:2+sp", 2)]


@pytest.mark.parametrize(("kind", "star"), [("tied", STAR[:3]), pytest.param("untied", STAR, marks=pytest.mark.slow)])
def test_what_one_strategy_wrote_any_other_goes_on_from(kind: str, star: Any, ranks: Any) -> None:
    """Two steps by each, one after the other: the weights are those of one plain loop, and so is what is exported."""
    state = None
    for number, (words, size) in enumerate(star):
        found = ranks(size, trained, words, kind, state, 2, {})
        state, full = found[0]
        expected = plain(kind, 2 * number + 2)
        assert near(full, expected), words
        assert near({k.removeprefix("model/model/"): v for k, v in state[0].items() if k.startswith("model/")}, expected)


def held() -> dict[str, tuple[int, ...]]:
    """How much of each parameter a rank holds, of a model that was built without memory."""
    world = World.start("cpu")
    strategy = make_strategy("fsdp:2+tp:2")
    strategy.start(world)
    with torch.device("meta"):
        model = Llama(layers=2)
    torch.manual_seed(world.rank)  # rank 0's values count
    strategy.prepare({"model": model}, [])
    shapes = {k: tuple(p._local_tensor.shape) for k, p in model.named_parameters() if isinstance(p, DTensor)}
    full = strategy.full_state_dict(model)
    assert all(torch.isfinite(v).all() for v in full.values())
    world.stop()
    return shapes


def test_matrices_are_cut_both_ways_and_norms_one(ranks: Any) -> None:
    shapes = ranks(4, held)[0]
    assert shapes["layers.0.attention.wq.weight"] == (4, 16)  # 16 rows: 2 ways by heads, 2 ways by fsdp
    assert shapes["layers.0.attention.wo.weight"] == (8, 8)  # 16 columns by heads, 16 rows by fsdp
    assert shapes["tok_embeddings.weight"] == (4, 16)
    assert shapes["layers.0.attention_norm.weight"] == (8,)


# -- refusals ---------------------------------------------------------------------------------------------------------------
class CountsItself(nn.Module):
    """A block that reshapes by its own number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.head_dim = 4, 4
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(*x.shape[:2], self.n_heads, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stack(nn.Sequential):
    def step(self, x: Tensor) -> Tensor:
        return self(x).square().sum()


class Fused(nn.Module):
    """Does not say what its matrix is of: nothing ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(16, 48), nn.Linear(16, 16)


class LosesTokens(CountsItself):
    """As transformers' OPT: where it gets half of the heads, it takes two tokens for one, and its shapes are right."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(x.shape[0], -1, self.n_heads, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))


class NormsHeads(nn.Module):
    """Norms each head's queries, which a rank has some of."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(16, 16) for _ in range(4))
        self.scale = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(self.scale(q), k, v).transpose(1, 2).flatten(2))


def refusals() -> list[str]:
    world = World.start("cpu")
    found: list[str] = []

    def expect(action: Callable[[], Any], kind: type[Exception] = ConfigError) -> None:
        with pytest.raises(kind) as told:
            action()
        found.append("".join([str(told.value), *getattr(told.value, "__notes__", ())]))

    def strategy(option: Any = "auto") -> ParallelStrategy:
        made = ParallelStrategy(plan=ParallelPlan(tp=2), tensor_parallel=option)
        made.start(world)
        return made

    def prepare(model: nn.Module, option: Any = "auto") -> tuple[ParallelStrategy, nn.Module]:
        made = strategy(option)
        made.prepare({"model": model}, [])
        return made, model

    def run(model: nn.Module, option: Any = "auto", tokens: int = 7) -> None:
        made, model = prepare(model, option)
        made.backward(made.bind(model, "step")(torch.randn(2, tokens, 16)))

    expect(lambda: prepare(Llama(heads=6, kv_heads=3)))
    expect(lambda: prepare(Llama(hidden=25)))
    expect(lambda: prepare(MLP(0)))
    expect(lambda: prepare(nn.TransformerEncoderLayer(16, 4)))
    expect(lambda: prepare(Fused()))
    expect(lambda: prepare(Llama(), {"layers.*.atention.wq": "colwise"}))
    expect(lambda: prepare(Llama(), {"layers.*.attention.wq": "colums"}))
    expect(lambda: prepare(GPT(), {"lm_head": "rowwise_split"}))
    expect(lambda: prepare(Llama(), {"norm": "colwise"}))
    expect(lambda: prepare(Llama(), TensorPlan({"layers.*.feed_forward.w1": "replicate"}, loss_parallel=True)))
    expect(lambda: prepare(nn.Sequential(CountsItself()), TensorPlan(sequence_parallel=True)))
    expect(lambda: prepare(MoELlama(layers=2), "sequence"))
    expect(lambda: strategy(TensorPlan(async_tp=True)))
    expect(lambda: strategy("sequenc"))
    expect(lambda: run(Stack(CountsItself(), CountsItself())), RuntimeError)
    expect(lambda: run(Stack(LosesTokens(), LosesTokens()), tokens=8))
    expect(lambda: run(Stack(NormsHeads(), NormsHeads())))
    expect(lambda: run(Stack(NormsHeads(), NormsHeads()), "sequence"))
    made, model = prepare(Llama())
    expect(lambda: made.prepare_optimizer(torch.optim.AdamW(model.parameters(), foreach=True)))
    world.stop()
    return found


def test_what_cannot_be_cut_is_refused_by_name(ranks: Any) -> None:
    says = [
        "layers.0.attention.wk of model 'model': its 3 key-value heads cannot be divided by 2, nor divide it",
        "layers.0.feed_forward.w1 of model 'model': its 25 output features cannot be divided by 2",
        "No tensor parallel plan is known for MLP",
        "self_attn.in_proj_weight of TransformerEncoderLayer is several matrices in one",
        "qkv of Fused is several matrices in one",
        "Did you mean 'layers.*.attention.wq'",
        "Did you mean 'colwise'",
        "lm_head shares its weight with wte",
        "norm of model 'model' is a RMSNorm",
        "loss_parallel needs a head",
        "has no repeated blocks",
        "layers.0.feed_forward.experts.w1 of model 'model' is of experts or of a convolution",
        "async_tp=True) needs symmetric memory, which cpu has not",
        "tensor_parallel='sequenc'",
        "each rank has 1/2 of the heads",
        "so that it computes something else than it does whole",
        "scale.weight, 1.scale.weight: held whole on each of 2 ranks of tp, with other gradients",
        "a sequence of 7 cannot be divided over tp=2",
        "some of them are cut over other axes",
    ]
    for part, text in zip(says, ranks(2, refusals)[0], strict=True):
        assert part in text


# -- plans ------------------------------------------------------------------------------------------------------------------
def own_plan() -> tuple[list[float], list[float]]:
    """A plan of torch's own objects and of words, with a norm on a rank's heads; beside the losses of one process."""
    world = World.start("cpu")
    torch.manual_seed(0)
    single = nn.Sequential(NormsHeads(), NormsHeads()).double()
    torch.manual_seed(0)
    model = nn.Sequential(NormsHeads(), NormsHeads()).double()
    plan: dict[str, Any] = {"0.w[qkv]": "colwise", "*.w?": "replicate"}
    plan = {f"*.{n}": ColwiseParallel() for n in ("wq", "wk")} | {
        "*.wv": "colwise",
        "*.wo": RowwiseParallel(),
        "**.scale": "heads",
    }
    strategy = ParallelStrategy(plan=ParallelPlan(tp=2), tensor_parallel=plan)
    strategy.start(world)
    strategy.prepare({"model": model}, [])
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found: list[list[float]] = []
    for built, backward in ((single, torch.Tensor.backward), (model, strategy.backward)):
        optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = built(x).square().mean()
            backward(loss)
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    rows = dict(strategy.explain())
    assert "asked for" in rows["tensor parallel"], rows
    assert "heads" in rows["tensor parallel"]
    world.stop()
    return found[0], found[1]


def test_a_plan_of_ones_own_gives_the_losses_of_one_process(ranks: Any) -> None:
    for single, parallel in ranks(2, own_plan):
        assert parallel == pytest.approx(single, rel=1e-12)


COMMON: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16}  # fmt: skip
GPT2_SIZES: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
THEIRS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (COMMON, "the plan of LlamaForCausalLM"),
    "qwen3": (COMMON | {"head_dim": 4, "tie_word_embeddings": True}, "the plan of Qwen3ForCausalLM"),
    "gemma": (COMMON | {"head_dim": 4}, "the plan of GemmaForCausalLM"),  # its embedding has a buffer
    "phi3": (COMMON | {"pad_token_id": 0}, "the plan of Phi3ForCausalLM"),  # fused, and computed whole
    "mixtral": (COMMON | {"num_local_experts": 4}, "experts stay whole on each rank of tp"),
    "gpt2": (GPT2_SIZES | STILL, "attention by c_attn c_proj"),
    "gptj": (GPT2_SIZES | STILL | {"rotary_dim": 4}, "chosen by names"),  # counts its heads
    "opt": (COMMON | {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}, "chosen by names"),  # the same
}


def transformers_models(names: list[str], words: str, option: str) -> list[tuple[str, list[float], list[float], str]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    world = World.start("cpu")
    found = []
    for name in names:
        losses = []
        for kind in (None, words):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **THEIRS[name][0])).train()
            model = model if name == "mixtral" else model.double()  # whose grouped product has no float64
            strategy = make_strategy(kind, tensor_parallel=option) if kind else Strategy()
            if kind:
                strategy.start(world)
                strategy.prepare({"model": model}, [])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            some = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = model(input_ids=BATCH["x"], labels=BATCH["x"]).loss
                strategy.backward(loss)
                optimizer.step()
                some.append(loss.item())
            losses.append(some)
        said = "; ".join(text for row, text in strategy.explain() if row == "tensor parallel")
        found.append((name, losses[0], losses[1], said))
    world.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "words", "size", "option"),
    [
        (list(THEIRS), "fsdp:1+tp:2", 2, "auto"),
        (["llama", "qwen3", "gpt2"], "tp:2", 2, "sequence"),
        (["llama", "qwen3", "gemma"], "tp:4", 4, "auto"),  # of two heads of keys and values each rank has one
    ],
    ids=["auto", "sequence", "copied heads"],
)
def test_transformers_models_are_cut(names: list[str], words: str, size: int, option: str, ranks: Any) -> None:
    """By their own plan, or by names where they have none. The cache of keys that they make in training too stays as it was."""
    pytest.importorskip("transformers", reason="waits for transformers")
    for name, single, parallel, said in ranks(size, transformers_models, names, words, option, timeout=240)[0]:
        assert parallel == pytest.approx(single, rel=1e-6), name
        assert THEIRS[name][1] in said, name
