"""Whether a step gives the same numbers on a shared sequence as on a whole one: few tokens through both, compared.

Positions that a model counts by itself, labels that it shifts, kernels that attend to a rank's own tokens alone: each would train
on something else than was asked for, and most losses at the beginning of a training look alike. So what is compared is the
queries and keys of every attention, to which positions are added, its output, and the loss.
Without gradients, in eval mode (no dropout), nothing logged; buffers and random numbers are as before afterwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import ConfigError
from .shared_sequence import SharedSequence, arange_length, context_parallel_attention

__all__ = ["Ambiguous", "verify_step"]

_arange = torch.arange

_Calls = list[tuple[Tensor, Tensor, Tensor, Tensor]]

SAME, UNKNOWN, DIFFERENT = 0, 1, 2
_ELSEWHERE = "on other ranks; their messages say where."
_ADVICE = "ContextParallel(verify=False) goes on without asking."


class Ambiguous(Exception):
    """Another number of tokens has to be tried."""


def verify_step(
    model: nn.Module,
    method: str,
    run: Callable[[Any], Any],
    whole: Any,
    part: Any,
    shared: SharedSequence,
    *,
    tokens: int,
    positions: str,
    agree: Callable[[int], int],
) -> tuple[bool, str, frozenset[int]]:
    """Run the step on `whole` and on this rank's `part` of it.

    Returns:
        Whether all was compared, how positions are found, and the lengths of which torch.arange is something else than
        positions: those that it is asked for whatever the length of the sequence is.

    Collective. All ranks come to the same verdict.
    Args:
        run: the step, given its arguments.
        tokens: the length of `whole`.
        positions: "auto", "arange" or "model"; what is returned is one of the latter two.
        agree: returns the highest of the verdicts of all ranks that run the step.
    Raises:
        Ambiguous: torch.arange(T) would be positions, T the length of the part, and this step asks for it for something else.
        ConfigError: other queries, keys, outputs, or another loss.
    """
    truth: _Calls = []
    tries = ["model", "arange"] if positions == "auto" else [positions]
    fault, local, wanted, others = "", tokens // shared.layout.ranks, set[int](), frozenset[int]()
    with _quiet(model, shared):
        try:
            with _Watch(truth, tokens, wanted):
                expected = run(whole)
            for positions in tries:
                shared.replaces_arange = positions == "arange"
                found: _Calls = []
                if shared.replaces_arange and agree(int(local in wanted)):
                    raise Ambiguous
                shared.begin(local)
                shared.asked = set()
                shared.watch = lambda *call, found=found: found.append(call)
                with shared.entered():
                    got = run(part)
                others = frozenset(wanted & shared.asked)
                verdict, fault = _difference(truth, found, expected, got, shared)
                worst = agree(verdict)  # of other sequences too, or some ranks would try again while others go on
                if worst != DIFFERENT:
                    return worst == SAME, positions, others
        except Ambiguous:
            raise
        except Exception as error:
            error.add_note(f"Context parallel was verifying {method} on {tokens} tokens of the batch. {_ADVICE}")
            raise
    raise ConfigError(
        f"Under context parallel {method} gives other numbers than on whole sequences: {fault or _ELSEWHERE} {_ADVICE}"
    )


@contextmanager
def _quiet(model: nn.Module, shared: SharedSequence) -> Iterator[None]:
    """Leave nothing behind."""
    modes = [m for m in model.modules() if m.training]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = [model_device] if (model_device := _device(model)) is not None else []
    silenced = [name for name in ("log", "log_dict") if callable(getattr(model, name, None)) and name not in vars(model)]
    lengths, stale = set(shared.lengths), shared.stale
    for name in silenced:
        object.__setattr__(model, name, _nothing)
    try:
        for module in modes:
            module.training = False
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"),
        ):
            # Of reentrant activation checkpointing, which finds no gradients here.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            yield
    finally:
        # Weights that autocast has cast and kept were cast without gradients here, and would get none in the step that follows.
        torch.clear_autocast_cache()
        for module in modes:
            module.training = True
        for name in silenced:
            object.__delattr__(model, name)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        shared.watch, shared.asked, shared.lengths, shared.stale = None, None, lengths, stale


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in the place of `log`."""


def _device(model: nn.Module) -> torch.device | None:
    found = next((p.device for p in model.parameters()), None)
    return None if found is None or found.type == "cpu" else found


class _Watch(TorchFunctionMode):
    """Collects what every attention over `tokens` keys was given and returned, and what torch.arange was asked for."""

    def __init__(self, calls: _Calls, tokens: int, asked: set[int]) -> None:
        super().__init__()
        self.calls, self.tokens, self.asked = calls, tokens, asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.nn.functional.scaled_dot_product_attention, context_parallel_attention):
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["key"].shape[-2] == self.tokens:
                self.calls.append((given["query"], given["key"], given["value"], out))
        elif func is _arange and (length := arange_length(args, kwargs)) is not None:
            self.asked.add(length)
        return out


def _difference(truth: _Calls, found: _Calls, expected: Any, got: Any, shared: SharedSequence) -> tuple[int, str]:
    """Return (SAME, UNKNOWN: there was no loss to compare, or DIFFERENT; what is). The same on the ranks of the group."""
    whole, items = _loss(expected)
    part, part_items = _loss(got)
    # Other calls; 1 + the first attention that differs, its queries before its output; loss; items.
    numbers = torch.zeros(4, dtype=torch.float64)
    numbers[0] = len(truth) != len(found)
    in_16_bits = False
    for index, (right, mine) in enumerate(zip(truth, found, strict=False)):
        for what, (a, b) in enumerate(zip(right, mine, strict=True)):
            worst, limit = _worst(shared.layout.split(a, -2), b)
            in_16_bits |= limit > 1e-2
            if worst > limit and not numbers[1]:
                numbers[1] = 1 + index * 4 + what
    numbers[2] = math.nan if part is None else float(part)
    numbers[3] = math.nan if part_items is None else float(part_items)
    rows = _gather(numbers, shared, found[0][0].device if found else part.device if part is not None else numbers.device)
    if bool(rows[:, 0].any()):
        return DIFFERENT, "the step attends another number of times."
    if bool(rows[:, 1].any()):
        first = int(rows[:, 1][rows[:, 1] > 0].min()) - 1
        return DIFFERENT, _attention_words(*divmod(first, 4))
    if whole is None:
        return SAME, ""
    if not math.isfinite(float(whole)):  # no label counts among these tokens
        return UNKNOWN, ""
    limit = {torch.float64: 1e-9, torch.float32: 2e-5}.get(whole.dtype, 1e-2)
    limit = max(limit, 3e-3) if in_16_bits else limit
    total, mean = float(rows[:, 2].sum()), float(rows[:, 2].mean())
    if items is not None and (held := float(rows[:, 3].sum())) != float(items):
        return DIFFERENT, f"the parts count {held:g} items together, and the whole {float(items):g}. {_LABELS}"
    made = [total] if items is not None else [mean, total]
    if any(abs(m - float(whole)) <= limit * max(abs(float(whole)), 1e-30) for m in made):
        return SAME, ""
    met = f"its attention is the same, and the losses of the parts make {made[0]:.9g} where the whole has {float(whole):.9g}."
    return DIFFERENT, f"{met} {_LABELS}"


def _gather(numbers: Tensor, shared: SharedSequence, device: torch.device) -> Tensor:
    every = [torch.zeros_like(numbers, device=device) for _ in range(shared.layout.ranks)]
    dist.all_gather(every, numbers.to(device), group=shared.group)
    return torch.stack(every).cpu()


_LABELS = (
    "A step that shifts labels by one token loses them at the ends of parts: shift them before, in the data set. A mean over "
    "parts with different numbers of labels is not the mean of the whole, unless F.cross_entropy takes it: let it, or return "
    "{'loss': the sum, 'num_items': how many}. "
    "Anything else that looks at neighbouring tokens (a convolution, a pooling, a kernel of its own) needs whole sequences; "
    "attention can be had by drivetrain.context_parallel_attention."
)


def _attention_words(call: int, what: int) -> str:
    if what < 2:
        return (
            f"the {('queries', 'keys')[what]} of its attention number {call} are different, which is what happens when a model "
            "counts positions by itself. Use drivetrain.sequence_positions(length, device) in the place of "
            "torch.arange(length) or of a slice [:length] of a table, or give the model positions with the batch."
        )
    return f"the {('', '', 'values', 'outputs')[what]} of its attention number {call} are different. {_LABELS}"


def _worst(right: Tensor, mine: Tensor) -> tuple[float, float]:
    """Return (the largest difference beside the largest value, what it may be)."""
    limit = {torch.float64: 1e-9, torch.float32: 1e-3}.get(mine.dtype, 5e-2)
    limit = max(limit, {torch.float64: 1e-9, torch.float32: 1e-3}.get(right.dtype, 5e-2))
    if right.shape != mine.shape:
        return math.inf, limit
    right, mine = right.double(), mine.double()
    both = right.isfinite() & mine.isfinite()
    scale = float(right[both].abs().max()) if bool(both.any()) else 1.0
    return float((right - mine)[both].abs().max()) / max(scale, 1e-30) if bool(both.any()) else 0.0, limit


def _loss(output: Any) -> tuple[Tensor | None, Any]:
    """Return (the loss in a step's output, its num_items), None for what is not there."""
    if isinstance(output, Mapping):
        loss, items = output.get("loss"), output.get("num_items")
    else:
        loss, items = output, None
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None, None
    return loss.detach().reshape(()), items
