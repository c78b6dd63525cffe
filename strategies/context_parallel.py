"""Context parallel: the ranks of `cp` share every sequence, each computes its tokens, and attention looks at all of them.

    Trainer(strategy="fsdp:2+cp:2")            ParallelStrategy(plan=..., context_parallel=ContextParallel(method="ring"))
All ranks of `cp` read the same samples. At the beginning of a step the tensors of its batch are cut along the sequence, and
until its end (and in its backward pass) F.scaled_dot_product_attention is answered with the keys of all ranks: the model's code
stays as it is. Everything that treats each token alone needs nothing; what looks at neighbours does:
    attention             answered (shared_sequence.py); kernels called by name: use `context_parallel_attention`
    positions             `sequence_positions(length, device)`, or a batch that has them; torch.arange(length) is found
    labels                have to be shifted before the step: a step that shifts them loses those at its part's ends
    the loss              a sum with its num_items is exact; a mean is, when all parts have as many labels that count
So the first step is verified: a few tokens of its batch go through it whole and shared, and the queries, keys and outputs of
every attention, and the loss, have to be the same (context_check.py); where they are not, the run is refused with the reason.
A prediction is not shared: each rank of `cp` computes it whole, so that outputs are whole.
Source: the recipe of torchtitan and of torch.distributed.tensor.experimental.context_parallel, which has no CPU kernels.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .context_check import verify_step
from .errors import ConfigError, unknown_name
from .parts import Part
from .sequence_attention import METHODS
from .sequence_layout import SequenceLayout
from .shared_sequence import SharedSequence, context_parallel_attention, imported_names, sequence_positions

if TYPE_CHECKING:
    from .parallel import ParallelStrategy

__all__ = ["ContextParallel", "ContextPart", "context_parallel_attention", "sequence_positions"]

POSITIONS = ("auto", "arange", "model")


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """How sequences are shared.

    Args:
        method: "all-gather" (any mask, torch's own kernels), "ring" (nobody holds all keys) or "ulysses" (heads divided by cp);
            "auto" is "all-gather". See sequence_attention.py.
        load_balance: each rank holds an early and a late chunk, so that causal attention is as much work for each.
        sequence_dim: the dimension of the batch's tensors that is cut.
        keys: the tensors that are cut, by the name under which they stand in the batch; by default those that are as long in
            `sequence_dim` as the longest.
        positions: "arange" answers torch.arange(T), T the length of a part, with the positions of its tokens; "model" leaves it
            alone: the model uses `sequence_positions`, or takes positions from the batch. "auto": what the verification finds.
        verify: compare the first step with the same step on whole sequences. It calls the step's code twice more, on few tokens.
        whole_steps: steps that are not shared.
    """

    method: str = "auto"
    load_balance: bool = True
    sequence_dim: int = 1
    keys: Sequence[str] | None = None
    positions: str = "auto"
    verify: bool = True
    whole_steps: Sequence[str] = ("predict_step",)

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, "auto"):
            raise unknown_name("method of context parallel", self.method, [*METHODS, "auto"])
        if self.positions not in POSITIONS:
            raise unknown_name("positions of context parallel", self.positions, POSITIONS)
        if self.sequence_dim < 0:
            raise ConfigError(
                f"ContextParallel(sequence_dim={self.sequence_dim}): tensors of several numbers of dimensions are cut in the "
                "same one, so it is counted from the front: 1 where the batch is dimension 0."
            )


def make_part(option: Any) -> ContextPart:
    """Return the part of ParallelStrategy(context_parallel=option)."""
    if option == "auto":
        option = ContextParallel()
    elif isinstance(option, str):
        option = ContextParallel(method=option)
    if not isinstance(option, ContextParallel):
        raise ConfigError(
            f"context_parallel={option!r}: expected 'auto', a method ({', '.join(METHODS)}) or a ContextParallel object. "
            "For example ContextParallel(method='ring')."
        )
    return ContextPart(option)


class ContextPart(Part):
    """What ParallelStrategy does for `cp`."""

    axis = "cp"

    def __init__(self, options: ContextParallel) -> None:
        self.options = options
        self.method = "all-gather" if options.method == "auto" else options.method
        self.found_positions = options.positions  # "auto" until a step was verified
        self._names: list[tuple[dict[str, Any], str]] = []
        self._verified: set[tuple[int, str]] = set()

    def start(self, strategy: ParallelStrategy) -> None:
        super().start(strategy)
        group = self.mesh.group("cp")
        assert group is not None, "a part is made for an axis of several ranks"
        layout = SequenceLayout(self.mesh.size("cp"), self.mesh.index("cp"), self.options.load_balance)
        self.shared = SharedSequence(group, layout, self.method)
        self.shared.replaces_arange = self.options.positions == "arange"

    def prepare_model(self, name: str, model: nn.Module) -> None:
        self._names += [n for n in imported_names(model) if not any(n[0] is m[0] and n[1] == m[1] for m in self._names)]

    # -- a step -------------------------------------------------------------------------------------------------------
    def enter(
        self, model: nn.Module, method: str, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut the batch; before the first step of a kind, verify it."""
        if method in self.options.whole_steps:
            return args, kwargs
        length = self.length_of((args, kwargs))
        self.shared.layout.check_length(length, "The sequence of this batch")
        if self.options.verify and (id(model), method) not in self._verified:
            self._verify(model, method, step, args, kwargs, length)
        self.shared.begin(length // self.shared.layout.ranks)
        return self._cut((args, kwargs), length)

    def inside(self, method: str | None) -> AbstractContextManager[Any] | None:
        if method is None:
            self.shared.stale = True
            return self.shared.answering_backward(self._names)
        return None if method in self.options.whole_steps else self.shared.entered()

    @contextmanager
    def sharing(self, batch: Any) -> Iterator[Any]:
        """Yield this rank's part of `batch`; inside, attention is answered as in a step. For loops of one's own."""
        length = self.length_of(batch)
        self.shared.layout.check_length(length, "The sequence of this batch")
        self.shared.begin(length // self.shared.layout.ranks)
        with self.shared.entered():
            yield self._cut(batch, length)

    def _verify(
        self,
        model: nn.Module,
        method: str,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        length: int,
    ) -> None:
        if not getattr(model, "automatic_optimization", True) and method == "training_step":
            raise ConfigError(
                "Context parallel verifies a step by running it on a few tokens, and a step under manual optimisation would "
                "train on them. Say ContextParallel(verify=False, positions='model')."
            )
        tokens = min(length, self.shared.layout.multiple * 16)
        whole = _each((args, kwargs), lambda t, _: t.narrow(self.options.sequence_dim, 0, tokens), self._is_shared(length))
        done, positions = verify_step(
            model,
            method,
            lambda tree: step(*tree[0], **tree[1]),
            whole,
            self._cut(whole, tokens),
            self.shared,
            tokens=tokens,
            positions=self.found_positions,
            agree=self._agree,
        )
        self.found_positions = positions
        self.shared.replaces_arange = positions == "arange"
        if done:
            self._verified.add((id(model), method))

    def _agree(self, verdict: int) -> int:
        """Return the highest verdict of all ranks that run the step together. Collective."""
        device = self.strategy.device
        found = torch.tensor(verdict, dtype=torch.int32, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.mesh.group("stage"))
        return int(found.item())

    # -- batches ------------------------------------------------------------------------------------------------------
    def length_of(self, batch: Any) -> int:
        """Return how long the sequences of a whole batch are.

        Raises:
            ConfigError: nothing in the batch has such a dimension, or what `keys` names differs.
        """
        dim, keys = self.options.sequence_dim, self.options.keys
        found: dict[str, int] = {}

        def look(tensor: Tensor, name: str) -> Tensor:
            if tensor.dim() > dim and (keys is None or name in keys):
                found[name or f"tensor {len(found)}"] = tensor.shape[dim]
            return tensor

        _each(batch, look)
        missing = [k for k in keys or () if k not in found]
        if not found or missing:
            raise ConfigError(
                f"Context parallel cuts the batch's tensors in dimension {dim}, and "
                + (f"finds no {', '.join(missing)} in it." if missing else "none has so many dimensions.")
                + " Say ContextParallel(sequence_dim=..., keys=[...]), or leave cp out."
            )
        if keys is not None and len(set(found.values())) > 1:
            raise ConfigError(
                f"ContextParallel(keys={list(keys)}): these are of different lengths, {found}. Name those of one length."
            )
        return max(found.values())

    def _is_shared(self, length: int) -> Callable[[Tensor, str], bool]:
        dim, keys = self.options.sequence_dim, self.options.keys
        return lambda t, name: t.dim() > dim and t.shape[dim] == length and (keys is None or name in keys)

    def _cut(self, batch: Any, length: int) -> Any:
        return _each(batch, lambda t, _: self.shared.layout.split(t, self.options.sequence_dim), self._is_shared(length))

    # -- words --------------------------------------------------------------------------------------------------------
    def explain(self) -> list[tuple[str, str]]:
        layout = self.shared.layout
        chosen = "   chosen: any mask, torch's own kernels" if self.options.method == "auto" else ""
        held = "an early and a late chunk each" if layout.pieces == 2 else "one chunk each"
        return [("context parallel", f"{layout.ranks} ranks share a sequence, {held}; attention: {self.method}{chosen}")]


def _each(
    tree: Any, change: Callable[[Tensor, str], Any], which: Callable[[Tensor, str], bool] | None = None, name: str = ""
) -> Any:
    """Return `tree` with `change(tensor, name)` of the tensors for which `which` is true; a name is the last key on the way."""
    if isinstance(tree, Tensor):
        return change(tree, name) if which is None or which(tree, name) else tree
    if isinstance(tree, Mapping):
        found = {key: _each(value, change, which, str(key)) for key, value in tree.items()}
        if type(tree) is dict:
            return found
        other = copy.copy(tree)
        for key, value in found.items():
            other[key] = value  # pyright: ignore[reportIndexIssue]
        return other
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_each(v, change, which, f) for v, f in zip(tree, tree._fields, strict=True)))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(tree, list | tuple):
        return type(tree)(_each(value, change, which, name) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        other = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(other, field.name, _each(getattr(tree, field.name), change, which, field.name))
        return other
    return tree
