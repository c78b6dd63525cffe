"""Context parallel: the ranks of `cp` share every sequence, each computes its tokens, and attention looks at all of them.

    Trainer(strategy="fsdp:2+cp:2")            ParallelStrategy(plan=..., context_parallel=ContextParallel(method="ring"))
All ranks of `cp` read the same samples. At the beginning of a step the tensors of its batch are cut along the sequence, and
until its end (and in its backward pass) F.scaled_dot_product_attention is answered with the keys of all ranks: the model's code
stays as it is. Everything that treats each token alone needs nothing; what looks at neighbours does:
    attention             answered (shared_sequence.py); kernels called by name: use `context_parallel_attention`
    positions             `sequence_positions(length, device)`, or a batch that has them; torch.arange(length) is found
    labels                have to be shifted before the step: a step that shifts them loses those at its part's ends
    the loss              a sum with its num_items is exact, and so is a mean by F.cross_entropy or its like: sequence_losses.py;
                          a mean taken by hand is, when all parts have as many labels that count
So the first step is verified: a few tokens of its batch go through it whole and shared, and the queries, keys and outputs of
every attention, and the loss, have to be the same (context_check.py); where they are not, the run is refused with the reason.
What the first step cannot show: a mean taken by hand (losses[mask].mean()) over parts that hold other numbers of labels in a
later step. It is the mean of the parts' means then: use F.cross_entropy, or return the sum and its num_items.
A model called by itself, outside of a step and of `sharing(batch)` (Accelerator.maybe_context_parallel), is not shared: every
rank of `cp` computes the whole sequences, with the right gradients, and nothing is saved.
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

from .compile import read_compile
from .context_check import Ambiguous, verify_step
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
        pad: {name in the batch: value}: sequences whose length cannot be shared equally are made longer with these values, for
            causal attention or one with a mask: {"tokens": 0, "labels": -100}. The step has to return the sum of its losses and
            num_items then. Without it such a length is refused.
        verify: compare the first step with the same step on whole sequences. It calls the step's code twice more, on few tokens.
        whole_steps: steps that are not shared.
    """

    method: str = "auto"
    load_balance: bool = True
    sequence_dim: int = 1
    keys: Sequence[str] | None = None
    positions: str = "auto"
    pad: Mapping[str, Any] | None = None
    verify: bool = True
    whole_steps: Sequence[str] = ("predict_step",)

    def __post_init__(self) -> None:
        if self.method == "torch":
            raise ConfigError(
                "ContextParallel(method='torch'): torch's own ring (torch.distributed.tensor.experimental.context_parallel) has "
                "no kernels for the CPU, and is not taken over. Use method='ring', the same algorithm on every device."
            )
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
    finishes = True

    def __init__(self, options: ContextParallel) -> None:
        self.options = options
        self.method = "all-gather" if options.method == "auto" else options.method
        self.found_positions = options.positions  # "auto" until a step was verified
        self._verified: set[tuple[int, str]] = set()
        self._others: set[int] = set()  # what torch.arange means besides positions
        self._sizes: set[tuple[str, int]] = set()  # which sizes of the batch are among these: (name, dimension)
        self._padded = False

    def start(self, strategy: ParallelStrategy) -> None:
        super().start(strategy)
        group = self.mesh.group("cp")
        assert group is not None, "a part is made for an axis of several ranks"
        layout = SequenceLayout(self.mesh.size("cp"), self.mesh.index("cp"), self.options.load_balance)
        self.shared = SharedSequence(group, layout, self.method)
        self.shared.replaces_arange = self.options.positions == "arange"

    def prepare_model(self, name: str, model: nn.Module) -> None:
        if read_compile(self.strategy.compile) is not None:
            raise ConfigError(
                "compile=... with context parallel (cp): attention over several ranks is no code that torch.compile can take "
                "into the graph of a block. Leave compile out, or cp. activation_checkpointing works with cp."
            )
        names = self.shared.names
        names += [n for n in imported_names(model) if not any(n[0] is m[0] and n[1] == m[1] for m in names)]
        model.register_forward_hook(self._answer)  # for loops that call the model, and loss.backward() behind it

    # -- a step -------------------------------------------------------------------------------------------------------
    def enter(
        self, model: nn.Module, method: str, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut the batch; before the first step of a kind, verify it."""
        if method in self.options.whole_steps:
            return args, kwargs
        (args, kwargs), length = self._fitting((args, kwargs))
        if self.options.verify and (id(model), method) not in self._verified:
            self._verify(model, method, step, args, kwargs, length)
        local = length // self.shared.layout.ranks
        if self.shared.replaces_arange and (self._others or self._sizes):
            self._check_others(local, (args, kwargs))
        self.shared.begin(local)
        return self._cut((args, kwargs), length)

    def inside(self, method: str | None) -> AbstractContextManager[Any] | None:
        if method is None:
            self.shared.stale = True
            return self.shared.answering_backward()
        return None if method in self.options.whole_steps else self.shared.entered()

    @contextmanager
    def sharing(self, batch: Any) -> Iterator[Any]:
        """Yield this rank's part of `batch`; inside, attention is answered as in a step. For loops of one's own."""
        batch, length = self._fitting(batch)
        with self._shared(length):
            yield self._cut(batch, length)

    @contextmanager
    def sharing_buffers(self, tensors: Sequence[Tensor], dims: Sequence[int], kept: Sequence[Tensor] = ()) -> Iterator[None]:
        """Inside, `tensors` are this rank's parts of themselves along `dims`; those in `kept` stay so. See `Strategy.sharing`."""
        layout = self.shared.layout
        lengths = {t.shape[d] for t, d in zip(tensors, dims, strict=True)}
        if len(lengths) != 1:
            raise ConfigError(f"Buffers of one sequence have one length in their sequence's dimension, got {sorted(lengths)}.")
        (length,) = lengths
        layout.check_length(length, "The sequence of these buffers")
        whole = [t.data for t in tensors]
        for tensor, data, dim in zip(tensors, whole, dims, strict=True):
            tensor.data = layout.split(data, dim)
        try:
            with self._shared(length):
                yield
        finally:
            for tensor, data in zip(tensors, whole, strict=True):
                if not any(tensor is k for k in kept):
                    tensor.data = data
                    torch.autograd.graph.increment_version(tensor)  # a backward pass that comes now is refused by torch

    @contextmanager
    def _shared(self, length: int) -> Iterator[None]:
        """A loop of one's own: nothing was verified, so what torch.arange(T) means has to be said."""
        self.shared.begin(length // self.shared.layout.ranks)
        self.shared.unsure = self.found_positions == "auto"
        try:
            with self.shared.entered():
                yield
        finally:
            self.shared.unsure = False

    def finish(self, output: Any) -> Any:
        """Let the backward pass of a step's output find its attention, whoever begins it."""
        padded, self._padded = self._padded, False
        if padded and isinstance(output, Tensor) and output.requires_grad:
            raise ConfigError(
                "ContextParallel(pad=...) has made this batch's sequences longer, so the parts hold different numbers of labels "
                "and the mean of their means is not the mean. Return {'loss': the sum of the losses, 'num_items': how many}."
            )
        return self._answer(None, None, output)

    def _answer(self, module: Any, args: Any, output: Any) -> Any:
        def answer(tensor: Tensor, name: str) -> Tensor:
            if tensor.requires_grad and self.shared.lengths and not self.shared.stale:
                self.shared.answer_backward_of(tensor)
            return tensor

        if torch.is_grad_enabled():
            _each(output, answer)
        return output

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
        multiple = self.shared.layout.multiple
        for chunk in (16, 15, 13, 11, 17, 9, 7):  # tokens; others where a part is as long as something that is no sequence
            tokens = min(length, multiple * chunk)
            whole = _each((args, kwargs), lambda t, _: t.narrow(self.options.sequence_dim, 0, tokens), self._is_shared(length))  # noqa: B023 (called here)
            try:
                done, positions, others = verify_step(
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
                break
            except Ambiguous:
                others = {tokens // self.shared.layout.ranks}
        else:
            raise self._ambiguous(min(others))
        self.found_positions = positions
        self.shared.replaces_arange = positions == "arange"
        # A size of this batch may be another in the next.
        self._sizes |= {where for where, size in self._sizes_of((args, kwargs)).items() if size in others}
        self._others |= others
        if done:
            self._verified.add((id(model), method))

    def _sizes_of(self, batch: Any) -> dict[tuple[str, int], int]:
        """Return (name, dimension) -> size of the tensors of a batch, but for that of the sequence."""
        found: dict[tuple[str, int], int] = {}

        def look(tensor: Tensor, name: str) -> Tensor:
            found.update({(name, i): n for i, n in enumerate(tensor.shape) if i != self.options.sequence_dim})
            return tensor

        _each(batch, look)
        return found

    def _check_others(self, local: int, batch: Any) -> None:
        """Refuse a part that is as long as something else that torch.arange is asked for: one answer would be wrong.

        Raises:
            ConfigError: names the length.
        """
        now = self._sizes_of(batch) if self._sizes else {}
        if local in self._others or any(now.get(where) == local for where in self._sizes):
            raise self._ambiguous(local)

    def _ambiguous(self, local: int) -> ConfigError:
        return ConfigError(
            f"A rank's part of this batch's sequences is {local} tokens long, and the step asks torch.arange({local}) for "
            "something else than positions too (the number of samples, half of a head's features): one answer would be wrong. "
            "Use drivetrain.sequence_positions(length, device) for positions with ContextParallel(positions='model'), or another "
            "length or batch size."
        )

    def _agree(self, verdict: int) -> int:
        """Return the highest verdict of all ranks that run the step together. Collective."""
        device = self.strategy.device
        found = torch.tensor(verdict, dtype=torch.int32, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.mesh.group("stage"))
        return int(found.item())

    def _fitting(self, batch: Any) -> tuple[Any, int]:
        """Return a batch whose sequences can be shared equally, and their length.

        Raises:
            ConfigError: they cannot, and `pad` does not say how to make them longer.
        """
        length, pad = self.length_of(batch), self.options.pad
        missing = -length % self.shared.layout.multiple
        self._padded = bool(missing) and pad is not None
        if not self._padded or pad is None:
            self.shared.layout.check_length(length, "The sequence of this batch")
            return batch, length
        dim = self.options.sequence_dim

        def longer(tensor: Tensor, name: str) -> Tensor:
            if name not in pad:
                raise ConfigError(
                    f"ContextParallel(pad={dict(pad)}) has to make sequences of {length} tokens {missing} longer, and does not "
                    f"name {name or 'a tensor without a name'}. Say with what: pad={{{name!r}: ...}}."
                )
            more = tensor.new_full((*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :]), pad[name])
            return torch.cat([tensor, more], dim)

        return _each(batch, longer, self._is_shared(length)), length + missing

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
