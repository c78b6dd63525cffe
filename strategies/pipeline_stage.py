"""What one rank runs of a pipeline: the links of a stage as one module, and torch's stage around it.

    StageModule    the user's modules of one stage under the user's names, called one after the other
    Stage          receives, runs, sends; torch's schedules (torch.distributed.pipelining.schedules) tell it when
Differences from torch's PipelineStage:
  * Chunks may have any shapes, another one each: the last batch of an epoch, sequences of other lengths. The first time that
    chunks of some shape come, the sender puts a header before its activations; after that both sides know. All ranks of a
    pipeline have the same batch, so they agree on what is known without a word.
  * Nothing is run to find shapes: no extra forward, no extra call of the loss, no statistics counted twice.
  * Gradients are reduced over data parallel ranks at the end of the last schedule of an accumulation window only.
It stands on these names of torch that are not documented: _PipelineStageBase with what is overridden here and its _stage_meta,
and _RecvInfo; tests/strategies/test_pipeline_stage.py pins them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo  # pyright: ignore[reportPrivateUsage]
from torch.distributed.tensor import DTensor

from .errors import ConfigError
from .pipeline_options import keeps_statistics
from .pipeline_split import Link

__all__ = ["Stage", "StageModule"]

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
)
_HEADER = 128
"""Numbers in a header: how many tensors; of each its dtype, how many dimensions, and their sizes."""
_HEADER_TAG = 7


_Shape = tuple[torch.dtype, tuple[int, ...]]


class StageModule(nn.Module):
    """The links of one stage. Its tree of modules has the user's names, and the user's own modules at their ends.

    Attributes:
        autocast: the context in which the links run; a factory, or None.
        finish: what the last stage does with the output of its last link: the loss is made here, inside of what FSDP hooks.
    """

    def __init__(self, model: nn.Module, links: Sequence[Link], *, index: int, is_last: bool) -> None:
        super().__init__()
        self.index, self.is_last = index, is_last
        self.links = tuple(links)
        self.autocast: Callable[[], Any] | None = None
        self.finish: Callable[[Any], Any] | None = None
        for name in dict.fromkeys(name for link in links for name in link.names):
            *containers, leaf = name.split(".")
            parent: nn.Module = self
            for container in containers:
                if container not in parent._modules:
                    parent.add_module(container, nn.ModuleDict())
                parent = parent.get_submodule(container)
            parent.add_module(leaf, model.get_submodule(name))
        # How modules of transformers say what must not be split, and how they are initialised.
        for key in ("_no_split_modules", "_init_weights", "config"):
            if (value := getattr(model, key, None)) is not None:
                object.__setattr__(self, key, value)

    def forward(self, *args: Any) -> Any:
        """Return what the last link returned, or what `finish` makes of it."""
        with nullcontext() if self.autocast is None else self.autocast():
            for link in self.links:
                call = self.get_submodule(link.names[0]) if link.call is None else link.call
                output = call(*link.arguments(args))
                args = output if isinstance(output, tuple) and link is not self.links[-1] else (output,)
            (output,) = args
            if self.finish is not None:
                output = self.finish(output)
        if self.is_last or not torch.is_grad_enabled():
            return output
        # FSDP warns of views, since it would lose sight of one that is changed in place. This one is sent away.
        outputs = tuple(t.clone() if isinstance(t, Tensor) and t._base is not None else t for t in _as_tuple(output))
        return outputs if isinstance(output, tuple | list) else outputs[0]


class _Known:
    """Shapes of what goes from one stage to the next, by the shape of the chunk."""

    def __init__(self) -> None:
        self.received: dict[Hashable, list[_Shape]] = {}
        self.sent: set[Hashable] = set()


class Stage(_PipelineStageBase):
    """One stage on this rank.

    Attributes:
        keys: of each chunk of the running batch, what its shapes depend on; the same on all ranks of the pipeline.
        sync: whether gradients are reduced at the end of the schedule.
        loss_of: (output, chunk) -> the loss, where this is the last stage and gradients are taken.
    """

    def __init__(
        self,
        module: StageModule,
        index: int,
        num_stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        stage_to_rank: dict[int, int],
    ) -> None:
        super().__init__(module, index, num_stages, device, group)
        self.module = module
        self.stage_index_to_group_rank = stage_to_rank
        self.keys: Sequence[Hashable] = ()
        self.sync = True
        self.loss_of: Callable[[Any, int], Tensor] | None = None
        self._known = _Known()
        self._fillers: frozenset[int] = frozenset()
        self._keeps_statistics = any(map(keeps_statistics, module.modules()))
        self._outputs: dict[int, list[_Shape]] = {}
        self._headers: list[tuple[Any, Tensor]] = []

    # -- what torch's schedules ask of a stage ------------------------------------------------------------------------
    def _prepare_forward_infra(
        self, num_microbatches: int, args: Any = None, kwargs: Any = None, has_backward: bool = False
    ) -> None:
        self.chunks = num_microbatches
        self.args_recv_info[0] = ()

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> None:
        self.chunks = num_microbatches

    def _create_grad_recv_info(self, act_send_info: dict[Any, Any]) -> tuple[Any, ...]:
        return ()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def begin(self, keys: Sequence[Hashable], *, backward: bool, sync: bool, fillers: frozenset[int] = frozenset()) -> None:
        """Start a batch of chunks whose shapes depend on `keys`; `fillers` are those that are run for nothing."""
        self.clear_runtime_states()
        self._fillers = fillers if self.module.training and self._keeps_statistics else frozenset()
        self.has_backward, self.sync, self.keys = backward, sync, keys
        self.chunks = len(keys)
        self._outputs.clear()

    def end(self) -> None:
        """Let go of the batch."""
        for work, _ in self._headers:
            work.wait()
        self._headers.clear()
        self._let_go()
        for kept in (self.fwd_cache, self.bwd_cache, self.args_recv_info, self.grad_recv_info, self._outputs):
            kept.clear()

    def forget(self) -> None:
        """Drop everything after a batch that was broken off."""
        self._headers.clear()
        self._let_go()
        self._known = _Known()
        for kept in (self.fwd_cache, self.bwd_cache, self.backward_state, self.dw_runner, self.args_recv_info):
            kept.clear()

    def _let_go(self) -> None:
        self.loss_of = None
        self.module.finish = None

    # -- forward ------------------------------------------------------------------------------------------------------
    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Make room for the activations of a chunk, whose shapes are known or come in a header, and receive them."""
        if self.is_first:
            return []
        peer = self._resolve_peer_global_rank(self.stage_index - 1)
        key = self.keys[fwd_chunk_id]
        if key not in self._known.received:
            header = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
            work = dist.irecv(header, peer, self.group, tag=_HEADER_TAG + self.stage_index)
            assert work is not None
            work.wait()
            self._known.received[key] = _read_header(header.tolist())
        buffers = [torch.empty(shape, dtype=dtype, device=self.device) for dtype, shape in self._known.received[key]]
        self._take(fwd_chunk_id, buffers)
        return [dist.P2POp(dist.irecv, buffer, peer, self.group) for buffer in buffers]

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Take the activations of a stage on this same rank."""
        self._take(mb_index, [t.detach() for t in _as_tuple(prev_stage_outputs)])

    def _take(self, chunk: int, buffers: Sequence[Tensor]) -> None:
        self.args_recv_info[chunk] = tuple(
            _RecvInfo(f"input {i} of stage {self.stage_index}", self.stage_index - 1, buffer, None)
            for i, buffer in enumerate(buffers)
        )
        # Whatever can take a gradient does, also where all stages before are frozen: both sides know it without asking, and
        # parameters may be frozen and thawed during a run.
        for buffer in buffers if self.has_backward else ():
            buffer.requires_grad_(buffer.is_floating_point() or buffer.is_complex())

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        return tuple(info.buffer for info in self.args_recv_info[fwd_chunk_id])  # pyright: ignore[reportReturnType]

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, save_forward_output: bool = True
    ) -> Any:
        """Run the stage on a chunk. Unlike torch's, an error in the model is raised as it is."""
        inputs = args if self.is_first else self._retrieve_recv_activations(fwd_chunk_id)
        loss_of = self.loss_of
        if loss_of is not None:
            self.module.finish = lambda output: loss_of(output, fwd_chunk_id)
        buffers = [*self.module.buffers()] if fwd_chunk_id in self._fillers else []
        before = [buffer.clone() for buffer in buffers]
        output = self.submod(*inputs)
        for buffer, values in zip(buffers, before, strict=True):  # no statistics of samples that were counted already
            buffer.data.copy_(values)  # autograd, which does not see BatchNorm write them, must not see this either
        outputs = _as_tuple(output)
        if not self.is_last:
            for value in outputs:
                _check_activation(value, self.stage_index)
            self._outputs[fwd_chunk_id] = [(t.dtype, tuple(t.shape)) for t in outputs]
        self.fwd_cache[fwd_chunk_id] = (outputs, [t for t in inputs if isinstance(t, Tensor)])
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the activations of a chunk, and a header before the first of their shape."""
        if self.is_last:
            return []
        outputs, _ = self.fwd_cache[fwd_chunk_id]
        peer = self._resolve_peer_global_rank(self.stage_index + 1)
        key = self.keys[fwd_chunk_id]
        if key not in self._known.sent:
            self._known.sent.add(key)
            header = torch.tensor(_header(self._outputs[fwd_chunk_id]), dtype=torch.int64, device=self.device)
            self._headers.append((dist.isend(header, peer, self.group, tag=_HEADER_TAG + self.stage_index + 1), header))
        return [dist.P2POp(dist.isend, t.detach().contiguous(), peer, self.group) for t in outputs]

    # -- backward -----------------------------------------------------------------------------------------------------
    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive a gradient for each output that takes one."""
        if not self.has_backward or self.is_last:
            return []
        peer = self._resolve_peer_global_rank(self.stage_index + 1)
        buffers = [
            torch.empty(shape, dtype=dtype, device=self.device) if dtype.is_floating_point or dtype.is_complex else None
            for dtype, shape in self._outputs[bwd_chunk_id]
        ]
        self._take_grads(bwd_chunk_id, buffers)
        return [dist.P2POp(dist.irecv, buffer, peer, self.group) for buffer in buffers if buffer is not None]

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take the gradients of a stage on this same rank."""
        shapes = self._outputs[mb_index]
        self._take_grads(
            mb_index,
            [
                torch.zeros(shape, dtype=dtype, device=self.device) if grad is None and dtype.is_floating_point else grad
                for grad, (dtype, shape) in zip(next_stage_bwd_outputs, shapes, strict=True)
            ],
        )

    def _take_grads(self, chunk: int, grads: Sequence[Tensor | None]) -> None:
        self.grad_recv_info[chunk] = tuple(
            _RecvInfo(f"gradient {i} of stage {self.stage_index}", self.stage_index + 1, grad, None)
            for i, grad in enumerate(grads)
        )

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        return tuple(info.buffer for info in self.grad_recv_info[bwd_chunk_id])

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False):
        """Run the backward pass of a chunk; of torch's own, with the number of inputs that this chunk has."""
        outputs = (loss,) if self.is_last else self.fwd_cache[bwd_chunk_id][0]
        if not any(t.requires_grad for t in outputs):  # all of the stage is frozen, and all before it
            self.fwd_cache.pop(bwd_chunk_id)
            self.bwd_cache[bwd_chunk_id] = (None,) * len(self.args_recv_info.get(bwd_chunk_id, ()))
            self.dw_runner[bwd_chunk_id] = _nothing
            return
        self._stage_meta.inputs = (None,) * len(self.args_recv_info.get(bwd_chunk_id, ()))  # pyright: ignore[reportAttributeAccessIssue]
        self._runtime_validate = False
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if self.dw_runner.get(bwd_chunk_id) is _nothing:
            del self.dw_runner[bwd_chunk_id]
            return
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the gradients of the inputs that take one; zeros where the stage did not use an input."""
        if not self.has_backward or self.is_first:
            return []
        peer = self._resolve_peer_global_rank(self.stage_index - 1)
        ops: list[dist.P2POp] = []
        grads = self.bwd_cache.pop(bwd_chunk_id)
        for info, grad in zip(self.args_recv_info[bwd_chunk_id], grads, strict=True):
            assert info.buffer is not None
            if info.buffer.requires_grad:
                sent = torch.zeros_like(info.buffer) if grad is None else grad.to(info.buffer.dtype).contiguous()
                ops.append(dist.P2POp(dist.isend, sent.detach(), peer, self.group))
        return ops

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce the gradients over the data parallel ranks, at the end of a window."""
        if self.sync:
            super().perform_reduce_grad(grad_scale_factor)


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _check_activation(value: Any, stage: int) -> None:
    if isinstance(value, DTensor):
        raise ConfigError(
            f"The output of pipeline stage {stage} is a DTensor ({value.placements}). Let the tensor parallel plan return local "
            "tensors there (use_local_output=True)."
        )
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"The output of pipeline stage {stage} holds a {type(value).__name__}, and only tensors go from stage to stage. "
            "Choose other splits, or return tensors only."
        )


def _nothing() -> None: ...


def _header(shapes: Sequence[_Shape]) -> list[int]:
    numbers = [len(shapes)]
    for dtype, shape in shapes:
        numbers += [_DTYPES.index(dtype), len(shape), *shape]
    if len(numbers) > _HEADER:
        raise ConfigError(
            f"A pipeline stage hands on {len(shapes)} tensors, too many to describe in {_HEADER} numbers. Hand on fewer."
        )
    return numbers + [0] * (_HEADER - len(numbers))


def _read_header(numbers: Sequence[int]) -> list[_Shape]:
    found: list[_Shape] = []
    at = 1
    for _ in range(numbers[0]):
        dtype, dims = numbers[at : at + 2]
        found.append((_DTYPES[dtype], tuple(numbers[at + 2 : at + 2 + dims])))
        at += 2 + dims
    return found
