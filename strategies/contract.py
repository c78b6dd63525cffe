"""The conformance suite: does a strategy (or precision) give the numbers of one plain PyTorch loop? Also for third parties.

    def test_mine(ranks):
        ranks(2, check)                           # any launcher will do: every rank calls it

    def check():
        world = World.start()
        check_strategy(MyStrategy, world)         # raises ContractError with the table of all cases

Each case trains a tiny model for some steps by the strategy's own methods (base.py lists their order) and by `plain_loop`, which
knows nothing of us, on the same global batches. What is compared: the loss of every step, all weights at the end, and the state
taken in the middle, given to a fresh strategy that goes on. The limits are those of the promise: float64 losses 1e-12 and weights
1e-10; fp32 losses 1e-6 and (SGD) weights 1e-5, all relative.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import Strategy, make_precision
from .checkpoint.layout import Shard
from .contract_models import MODELS
from .errors import ConfigError, DrivetrainError

if TYPE_CHECKING:
    from .pipeline_chunks import Chunk
    from .precision.base import Precision
    from .world import World

__all__ = [
    "CASES",
    "MIXED",
    "Case",
    "ContractError",
    "Result",
    "cases_of",
    "check_precision",
    "check_strategy",
    "plain_loop",
    "run_case",
]

_SAMPLES = 8  # of a micro-batch over all ranks


class ContractError(DrivetrainError, AssertionError):
    """A strategy does not give the numbers of a plain loop. The message is the table of cases."""


@dataclass(frozen=True)
class Case:
    """One cell of the suite.

    Attributes:
        window: micro-batches a step. The data end in the middle of the last window, and in the middle of a micro-batch.
        num_items: the loss is a sum over tokens, whose number differs between samples.
        models: 2 trains two models jointly, each with its own optimizer, on the sum of their losses.
        precision: of the strategy, None for its own; losses are within 2 % of the plain loop's in fp32, and not equal to them.
        model: its name in contract_models.MODELS.
    """

    name: str
    dtype: torch.dtype = torch.float64
    optimizer: str = "sgd"
    window: int = 1
    clip: float | None = None
    num_items: bool = False
    models: int = 1
    steps: int = 50
    precision: str | None = None
    model: str = "mlp"

    @property
    def tolerance(self) -> tuple[float, float]:
        """Relative limits of losses and weights; under fp32 AdamW weights are not compared (amplified rounding)."""
        if self.precision is not None:
            return 2e-2, float("inf")
        if self.dtype == torch.float64:
            return 1e-12, 1e-10
        return 1e-6, 1e-5 if self.optimizer == "sgd" else float("inf")


def _cases() -> Iterator[Case]:
    for dtype, tag in ((torch.float64, "float64"), (torch.float32, "fp32")):
        for optimizer in ("sgd", "adamw"):
            base = Case(f"{tag} {optimizer}", dtype, optimizer)
            yield base
            yield replace(base, name=f"{base.name} window 3, cut short", window=3)
            yield replace(base, name=f"{base.name} window 3, clipped", window=3, clip=0.05)
            yield replace(base, name=f"{base.name} window 3, num_items", window=3, num_items=True)
            yield replace(base, name=f"{base.name} num_items, clipped", num_items=True, clip=0.05)
            yield replace(base, name=f"{base.name} two models", models=2)


def cases_of(model: str, cases: Iterable[Case]) -> list[Case]:
    """Return `cases` with another model: those that it has."""
    one_batch = MODELS[model].per_sample
    return [
        replace(case, name=f"{case.name} {model}", model=model)
        for case in cases
        if one_batch or (case.window == 1 and not case.num_items)
    ]


CASES: tuple[Case, ...] = tuple(_cases())
MIXED: tuple[Case, ...] = tuple(
    replace(case, name=case.name.replace("fp32", "bf16-mixed"), precision="bf16-mixed", steps=20)
    for case in CASES
    if case.dtype == torch.float32
)
"""The cases of fp32 under bf16-mixed."""


@dataclass
class Result:
    """What came of a case: "pass", "refused" with the sentence, or "fail" with the figure."""

    case: Case
    outcome: str
    detail: str = ""
    loss_error: float = 0.0
    weight_error: float = 0.0


@dataclass
class Half:
    """What a run saves behind so many steps: whole tensors and values under the names of named_state.py."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass
class Trained:
    """The loss of every step, the weights at the end, and what was saved on the way."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    half: Half | None = None


def micro_batch(index: int, case: Case, samples: int = _SAMPLES) -> dict[str, Tensor]:
    """The global micro-batch of `index`: x (samples, ...), y (samples, length), -1 where there is no token."""
    generator = torch.Generator().manual_seed(1000 + index)
    model = MODELS[case.model]
    batch = model.batch(samples, generator, case.dtype)
    if case.num_items:
        lengths = torch.randint(1, model.length + 1, (samples, 1), generator=generator)
        batch["y"][torch.arange(model.length).expand(samples, -1) >= lengths] = -1
    return batch


def windows(case: Case) -> Iterator[list[dict[str, Tensor]]]:
    """The windows of the case; the last one is cut short, and its last micro-batch holds half the samples."""
    for step in range(case.steps):
        last = step == case.steps - 1
        held = max(1, case.window - 1) if last else case.window
        found = [micro_batch(step * case.window + i, case) for i in range(held)]
        if last:
            found[-1] = {key: value[: _SAMPLES // 2] for key, value in found[-1].items()}
        yield found


def _build(case: Case) -> tuple[dict[str, nn.Module], Callable[[Mapping[str, nn.Module]], list[torch.optim.Optimizer]]]:
    build = MODELS[case.model].build
    models: dict[str, nn.Module] = {("model" if i == 0 else f"model_{i}"): build(i).to(case.dtype) for i in range(case.models)}
    kind: Any = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.AdamW
    options = {"lr": 0.05, "momentum": 0.9} if case.optimizer == "sgd" else {"lr": 2e-3}
    return models, lambda built: [kind(model.parameters(), **options) for model in built.values()]


def plain_loop(case: Case) -> Trained:
    """Train `case` by plain PyTorch in one process, each window as one big batch."""
    models, make_optimizers = _build(case)
    optimizers = make_optimizers(models)
    found = Trained()
    for window in windows(case):
        batch = {key: torch.cat([micro[key] for micro in window]) for key in window[0]}
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = torch.stack([m.step(batch, False) for m in models.values()]).sum()  # pyright: ignore[reportCallIssue]
        loss.backward()
        for model, optimizer in zip(models.values(), optimizers, strict=True):
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
        found.losses.append(loss.item())
    found.weights = {f"{n}/{k}": p.detach() for n, m in models.items() for k, p in m.state_dict().items()}
    return found


def run_case(make: Callable[[], Strategy], world: World, case: Case, *, keep_at: int = 0, after: Half | None = None) -> Trained:
    """Train `case` with the strategy that `make` returns: from the start, or on from the state of another run.

    Args:
        keep_at: keep the state behind so many steps, as `Trained.half`: a save in the middle of the run.
        after: what such a run kept; the steps that are left are done.
    """
    found = Trained()
    strategy = make()
    if case.precision is not None:
        strategy.precision = make_precision(case.precision)
    strategy.start(world)
    models, make_optimizers = _build(case)
    prepared, optimizers = strategy.prepare(models, lambda: make_optimizers(models))
    named = {("optimizer" if i == 0 else f"optimizer_{i}"): o for i, o in enumerate(optimizers)}
    if after is not None:
        strategy.load_state_tensors(models, named, list(after.tensors), after.tensors.__getitem__, copy.deepcopy(after.values))
    steps = [strategy.bind(model, "step") for model in models.values()]
    for step, window in enumerate(windows(case)):
        if after is not None and step < after.step:
            continue
        if keep_at and step == keep_at:
            held, values = strategy.state_tensors(models, named)
            found.half = Half(step, put_together(held, world), copy.deepcopy(values))
        found.losses.append(_one_step(strategy, world, case, window, models, prepared, optimizers, steps))
    held, _ = strategy.state_tensors(models, named)
    found.weights = {n.removeprefix("model/"): t for n, t in put_together(held, world).items() if n.startswith("model/")}
    strategy.stop()
    return found


def put_together(held: Mapping[str, Any], world: World) -> dict[str, Tensor]:
    """Return the whole tensors of what all ranks hold: tensors, which any rank may leave out, and Shards. Collective."""
    pieces: dict[str, list[Any]] = {}
    mine = {
        n: [
            (part.tensor.detach().cpu(), part.offset, part.shape) if isinstance(part, Shard) else part.detach().cpu()
            for part in (t if isinstance(t, tuple) else (t,))
        ]
        for n, t in held.items()
    }
    for rank_holds in world.gather_object(mine):
        for name, some in rank_holds.items():
            pieces.setdefault(name, []).extend(some)
    found: dict[str, Tensor] = {}
    for name, some in pieces.items():
        if isinstance(some[0], Tensor):
            found[name] = some[0].clone()
            continue
        whole = found[name] = torch.zeros(some[0][2], dtype=some[0][0].dtype)
        for tensor, offset, _ in some:
            whole[tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))] = tensor
    return found


def _one_step(
    strategy: Strategy,
    world: World,
    case: Case,
    window: Sequence[dict[str, Tensor]],
    models: Mapping[str, nn.Module],
    prepared: Mapping[str, nn.Module],
    optimizers: Sequence[Any],
    steps: Sequence[Callable[..., Tensor]],
) -> float:
    """One optimizer step: every micro-loss weighted by its share of the window's tokens, over all ranks."""
    rank, count = strategy.data_shard
    for optimizer in optimizers:
        optimizer.zero_grad()
    items = sum(int((micro["y"] != -1).sum()) for micro in window)
    total = torch.zeros((), dtype=torch.float64)
    for i, micro in enumerate(window):
        mine = {key: value.tensor_split(count)[rank].to(strategy.device) for key, value in micro.items()}
        if strategy.reduces_gradients:
            strategy.set_gradient_sync(list(prepared.values()), i == len(window) - 1)
        weight = strategy.loss_ranks / items
        if any(strategy.pipeline_of(model) is not None for model in models.values()):
            total += sum(_pipelined(strategy, model, mine, weight) for model in models.values())
            continue
        with strategy.precision.autocast(strategy.device) if strategy.precision is not None else nullcontext():
            loss = torch.stack([step(mine, True) for step in steps]).sum()
        strategy.backward(loss * weight)
        total += loss.detach().to("cpu", torch.float64)
    for model, optimizer in zip(models.values(), optimizers, strict=True):
        parameters = list(model.parameters())
        if case.clip is not None:
            norm = strategy.grad_norm(parameters)
            strategy.scale_gradients(parameters, (case.clip / (norm + 1e-6)).clamp(max=1.0))
        strategy.step(optimizer)
    if strategy.loss_ranks > 1:
        total = world.all_reduce(total * 0 if world.is_duplicate else total)
    return float(total) / items


def _pipelined(strategy: Strategy, model: Any, batch: Mapping[str, Tensor], weight: float) -> Tensor:
    """Forward and backward of a model in stages, of which the last has the loss; return it, summed."""
    pipe = strategy.pipeline_of(model)
    assert pipe is not None
    kept: list[Tensor] = []

    def loss_of(logits: Tensor, chunk: Chunk) -> Tensor:
        loss = pipe.plain(model.loss(logits, chunk.batch, True)) * (chunk.samples > 0)
        kept.append(loss.detach())
        return loss * weight

    pipe.run(batch, loss_of, backward=True)
    return pipe.share(
        torch.stack(kept).sum().to(torch.float64) if kept else torch.zeros((), dtype=torch.float64, device=strategy.device)
    ).cpu()


def check_strategy(
    make: Callable[[], Strategy],
    world: World,
    *,
    cases: Sequence[Case] = CASES,
    truth: Callable[[Case], Trained] | None = None,
) -> list[Result]:
    """Run every case; return the results. Every rank calls it.

    A ConfigError from the strategy is a refusal: it must say why in a sentence, and counts as an outcome of its own.
    Args:
        truth: returns what is true of a case: `plain_loop`, or what that returned before.
    Raises:
        ContractError: a case fails; the message is the whole table.
    """
    results = [_check_case(make, world, case, (truth or plain_loop)(case)) for case in cases]
    if any(r.outcome == "fail" for r in results):
        raise ContractError("\n" + table(results))
    return results


def _check_case(make: Callable[[], Strategy], world: World, case: Case, truth: Trained) -> Result:
    half = case.steps // 2
    try:
        straight = run_case(make, world, case, keep_at=half)
        resumed = run_case(make, world, case, after=straight.half)
    except ConfigError as refusal:
        return Result(case, "refused", str(refusal))
    loss_limit, weight_limit = case.tolerance
    losses = max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(straight.losses, truth.losses, strict=True))
    weights = max(_distance(straight.weights[n], truth.weights[n]) for n in truth.weights)
    result = Result(case, "pass", "", losses, weights)
    if losses > loss_limit or weights > weight_limit:
        result.outcome, result.detail = "fail", f"limits {loss_limit:g} and {weight_limit:g}"
    elif case.precision is not None and straight.losses == truth.losses:
        result.outcome, result.detail = "fail", f"all losses equal fp32's, bit for bit: {case.precision} does nothing"
    elif resumed.losses != straight.losses[half:] or any(
        not torch.equal(resumed.weights[n], w) for n, w in straight.weights.items()
    ):
        result.outcome, result.detail = "fail", "a run that was saved and loaded half-way gives other numbers, bit for bit"
    return result


def _distance(a: Tensor, b: Tensor) -> float:
    scale = max(float(b.double().abs().max()), 1e-30)
    return float((a.to(b.device, torch.float64) - b.double()).abs().max()) / scale


def check_precision(precision: Precision, world: World, *, steps: int = 20, tolerance: float = 0.05) -> Trained:
    """Train with a low `precision` on one device: near fp32 within `tolerance` (relative, every step), and not equal to it.

    Equal losses mean that the precision does nothing, which is the classic fault of such a backend.
    Raises:
        ContractError: too far, or equal.
    """
    case = Case(precision.name, torch.float32, "adamw", steps=steps)
    truth = plain_loop(case)
    strategy = Strategy(precision=precision)
    strategy.start(world)
    models, make_optimizers = _build(case)
    _, optimizers = strategy.prepare(models, lambda: make_optimizers(models))
    found = Trained()
    step = strategy.bind(models["model"], "step")
    for window in windows(case):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with precision.autocast(world.device):
            loss = step(
                {k: v.to(precision.param_dtype or v.dtype) if v.is_floating_point() else v for k, v in window[0].items()}, False
            )
        strategy.backward(precision.scale(loss))
        for optimizer in optimizers:
            strategy.unscale_(optimizer)
            strategy.step(optimizer)
        found.losses.append(float(loss.detach()))
    strategy.stop()
    worst = max(abs(a - b) / abs(b) for a, b in zip(found.losses, truth.losses, strict=True))
    if worst > tolerance:
        raise ContractError(f"{precision.name}: a loss is {worst:.3g} away from fp32's, relative; the limit is {tolerance:g}.")
    if found.losses == truth.losses and precision.name != "fp32":
        raise ContractError(f"{precision.name}: all {steps} losses equal fp32's, bit for bit: the precision does nothing.")
    return found


def table(results: Sequence[Result]) -> str:
    """Return one line a case."""
    width = max(len(r.case.name) for r in results)
    return "\n".join(
        f"{r.case.name:<{width}}  {r.outcome:<8} loss {r.loss_error:.1e}  weights {r.weight_error:.1e}  {r.detail}"
        for r in results
    )
