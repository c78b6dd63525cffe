"""SharedSequence: what a model's code meets while its sequences are shared by the ranks of `cp`.

    with SharedSequence(...).entered():             attention, positions and torch.arange are answered for this rank's tokens
    with SharedSequence(...).answering_backward():  the same in a backward pass, where activation checkpointing runs them again
The first is a TorchFunctionMode: it sees the calls of torch's functions of its thread, and nothing else. torch has no modes in a
backward pass (pytorch#147995), so there the names are exchanged; they answer inside of the autograd engine only. They are
F.scaled_dot_product_attention, torch.arange, and what the modules of the model's classes imported of them. What is answered:
    F.scaled_dot_product_attention          of this rank's queries: all keys of all ranks (sequence_attention.py)
    context_parallel_attention              the same by name, for code that would call a kernel of its own
    sequence_positions, and torch.arange(T) where `replaces_arange`
    F.cross_entropy and its like                means over the labels of all parts (sequence_losses.py)
Two names for models: `context_parallel_attention` and `sequence_positions`. Outside of a shared sequence they are torch's own
attention and torch.arange.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from .errors import ConfigError
from .sequence_attention import attention_over_ranks
from .sequence_layout import SequenceLayout
from .sequence_losses import MEANS, mean_over_parts

__all__ = ["SharedSequence", "arange_length", "context_parallel_attention", "imported_names", "sequence_positions"]

_sdpa, _arange = F.scaled_dot_product_attention, torch.arange


def sequence_positions(length: int, device: torch.device | str | None = None) -> Tensor:
    """Return the places in the whole sequence of the `length` tokens that this rank holds: (length,), int64.

    For models that count positions themselves (RoPE, learned positions). Under context parallel a rank's tokens are not the
    first ones; otherwise this is torch.arange(length).
    """
    if has_torch_function((None,)):  # of anything: a mode is asked whatever the arguments are
        return handle_torch_function(sequence_positions, (), length, device)
    if (shared := _in_backward()) is not None:
        return shared.positions(length, device)
    return torch.arange(length, device=device)


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as torch's scaled_dot_product_attention does, to the keys of all ranks that share the sequence.

    For models that call a kernel of their own in the place of F.scaled_dot_product_attention, which is found by itself.
    Tensors are (..., heads, tokens, features); see sequence_attention.py about masks. Without context parallel it is torch's.
    """
    if has_torch_function((query, key, value)):
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return handle_torch_function(context_parallel_attention, (), *given)
    if (shared := _in_backward()) is not None:
        with _torchs_own():
            return shared.attend_by_name(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


_answering: list[SharedSequence] = []
"""Whose backward pass runs: at most one."""


def _in_backward() -> SharedSequence | None:
    """Whose sequence it is, in code that the autograd engine runs."""
    # Private, and what torch's own multi-gradient hooks ask.
    return _answering[-1] if _answering and torch._C._current_graph_task_id() != -1 else None


class SharedSequence:
    """The ranks that share sequences, and how long the parts are that are on their way.

    Attributes:
        lengths: of this rank's parts of sequences whose backward pass has not run yet.
        replaces_arange: answer torch.arange(T), T one of `lengths`, with the positions.
        watch: called with (q, k, v, output) of every attention, for who compares.
        asked: the lengths that torch.arange was asked for, where somebody wants to know.
        unsure: nobody has said what torch.arange(T) is in this model, so it is refused.
        names: (namespace, name): where torch's attention stands under a name of its own.
    """

    def __init__(self, group: dist.ProcessGroup, layout: SequenceLayout, method: str) -> None:
        self.group, self.layout, self.method = group, layout, method
        self.lengths: set[int] = set()
        self.stale = False
        self.replaces_arange = self.unsure = False
        self.asked: set[int] | None = None
        self.names: list[tuple[dict[str, Any], str]] = []
        self._open: ExitStack | None = None
        self.watch: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None

    def begin(self, length: int) -> None:
        """Say that a step begins whose parts are `length` long."""
        self._close()  # of a backward pass that failed
        if self.stale:
            self.lengths.clear()
            self.stale = False
        self.lengths.add(length)

    def entered(self) -> TorchFunctionMode:
        return _Mode(self)

    @contextmanager
    def answering_backward(self) -> Iterator[None]:
        """Answer forward passes that run again inside of a backward pass."""
        exchanged = [(vars(F), "scaled_dot_product_attention"), (vars(torch), "arange"), *self.names]
        exchanged += [(vars(F), func.__name__) for func in MEANS]
        before = [namespace[name] for namespace, name in exchanged]
        _answering.append(self)
        try:
            for (namespace, name), own in zip(exchanged, before, strict=True):
                namespace[name] = _OURS.get(own, _sdpa_or_ours)
            yield
        finally:
            for (namespace, name), own in zip(exchanged, before, strict=True):
                namespace[name] = own
            _answering.pop()

    def answer_backward_of(self, output: Tensor) -> None:
        """Answer the backward pass that comes through `output`, whoever begins it: loss.backward() too."""
        output.register_hook(self._backward_begins)

    def _backward_begins(self, grad: Tensor) -> None:
        if self._open is None and self not in _answering:
            self._open = ExitStack()
            self._open.enter_context(self.answering_backward())
            # What FSDP and DDP use: called when this backward pass ends.
            torch.autograd.Variable._execution_engine.queue_callback(self._close)  # pyright: ignore[reportAttributeAccessIssue]

    def _close(self) -> None:
        if self._open is not None:
            opened, self._open, self.stale = self._open, None, True
            opened.close()

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Answer F.scaled_dot_product_attention."""
        return self._attend(False, *args, **kwargs)

    def attend_by_name(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._attend(True, *args, **kwargs)

    def _attend(
        self,
        by_name: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        device = query.device.type
        if torch.is_autocast_enabled(device):  # here and not later: half as much to send
            dtype = torch.get_autocast_dtype(device)
            query, key, value = (t.to(dtype) if t.dtype != torch.float64 else t for t in (query, key, value))
        if not by_name and key.shape[-2] not in self.lengths:
            # Not over the sequence: patches of an image, a memory that every rank has whole.
            return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.shape[-2] not in self.lengths:
            raise ConfigError(
                f"Attention of {query.shape[-2]} queries to the {key.shape[-2]} keys of a rank's part of a sequence: under "
                "context parallel the queries are shared in the same way. Attend with the sequence's own queries."
            )
        out = attention_over_ranks(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            method=self.method, group=self.group, layout=self.layout,
        )  # fmt: skip
        if self.watch is not None:
            self.watch(query, key, value, out)
        return out

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """Answer `sequence_positions`."""
        return self.layout.positions(length, torch.device(device) if isinstance(device, str) else device)

    def arange(self, *args: Any, **kwargs: Any) -> Tensor:
        """Answer torch.arange: arange(T) and arange(0, T) over a part of a sequence are its positions."""
        if self.replaces_arange or self.unsure or self.asked is not None:
            length = arange_length(args, kwargs)
            if length is not None and self.asked is not None:
                self.asked.add(length)
            if length in self.lengths and self.unsure:
                raise ConfigError(
                    f"torch.arange({length}) is asked for while sequences are shared, {length} tokens to a rank, and no step was "
                    "verified that would say whether it means positions. Say ContextParallel(positions='arange') if it does, "
                    "or use drivetrain.sequence_positions(length, device) and say positions='model'."
                )
            if length in self.lengths and self.replaces_arange:
                found = self.layout.positions(length, kwargs.get("device"))
                return found.to(kwargs.get("dtype") or torch.int64)
        return _arange(*args, **kwargs)

    def mean_loss(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Answer F.cross_entropy and its like."""
        return mean_over_parts(func, args, kwargs, self.lengths, self.group)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Answer Tensor.backward inside of a loop's `sharing`."""
        with nullcontext() if self in _answering else self.answering_backward():
            Tensor.backward(*args, **kwargs)

    def refuse_multihead(self, *args: Any, **kwargs: Any) -> Any:
        """torch's nn.MultiheadAttention holds masks against the length that it sees, which is that of a part."""
        query = args[0] if args else kwargs["query"]
        if query.shape[0] in self.lengths:
            raise ConfigError(
                "nn.MultiheadAttention (and nn.TransformerEncoderLayer, which has one) cannot attend to keys of other ranks. "
                "Call F.scaled_dot_product_attention, or drivetrain.context_parallel_attention, in a module of your own, or "
                "leave cp out."
            )
        return F.multi_head_attention_forward(*args, **kwargs)


def arange_length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return T where these are the arguments of torch.arange(T) or arange(0, T), which positions could be; else None."""
    numbers = list(args) + [kwargs[name] for name in ("start", "end", "step") if name in kwargs]
    numbers = [0, *numbers] if len(numbers) == 1 else numbers
    plain = not kwargs.get("requires_grad") and numbers[0] == 0 and numbers[2:] in ([], [1])
    return int(numbers[1]) if plain and numbers[1] == int(numbers[1]) else None


class _Mode(TorchFunctionMode):
    """Sees every call of a torch function while it is entered."""

    def __init__(self, shared: SharedSequence) -> None:
        super().__init__()
        self.shared = shared
        self.answers: Mapping[Any, Callable[..., Any]] = {
            _sdpa: shared.attend,
            context_parallel_attention: shared.attend_by_name,
            sequence_positions: shared.positions,
            _arange: shared.arange,
            F.multi_head_attention_forward: shared.refuse_multihead,
            Tensor.backward: shared.backward,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MEANS:
            return self.shared.mean_loss(func, *args, **(kwargs or {}))
        answer = self.answers.get(func)
        return (func if answer is None else answer)(*args, **(kwargs or {}))


@contextmanager
def _torchs_own() -> Iterator[None]:
    """Let torch's attention stand under its name again, for torch: its masks ask whether it is the function that they know."""
    F.scaled_dot_product_attention = _sdpa
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _sdpa_or_ours


def _sdpa_or_ours(*args: Any, **kwargs: Any) -> Tensor:
    shared = _in_backward()
    if shared is None:
        return _sdpa(*args, **kwargs)
    with _torchs_own():
        return shared.attend(*args, **kwargs)


def _arange_or_ours(*args: Any, **kwargs: Any) -> Tensor:
    shared = _in_backward()
    return _arange(*args, **kwargs) if shared is None else shared.arange(*args, **kwargs)


def _mean_or_ours(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def answer(*args: Any, **kwargs: Any) -> Tensor:
        shared = _in_backward()
        return func(*args, **kwargs) if shared is None else shared.mean_loss(func, *args, **kwargs)

    return answer


_OURS: Mapping[Any, Callable[..., Tensor]] = {
    _arange: _arange_or_ours,
    **{func: _mean_or_ours(func) for func in MEANS},
}
"""What stands in a backward pass in the place of what; in that of torch's attention, by whichever name, `_sdpa_or_ours`."""


def imported_names(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return (namespace, name) of torch's attention wherever the modules of the model's classes imported it."""
    files = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    spaces = [vars(sys.modules[f]) for f in files if f in sys.modules and not f.startswith("torch.") and f != __name__]
    return [(space, name) for space in spaces for name, value in list(space.items()) if value is _sdpa]
