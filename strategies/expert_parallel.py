"""Expert parallel: each rank of `ep` holds some of the experts, and tokens travel to the rank that holds theirs, and back.

    Trainer(strategy="fsdp:2+ep:2")          with an MoE of ours (experts.py), or ExpertParallel(modules=["*.experts"]) for yours
A module of experts is one with `forward(tokens, counts)`, tokens (N, D) sorted by expert, counts (E,), all of whose parameters
are stacked over the experts: (E, ...). Nothing in it knows of ranks. Under `ep` its forward is
    counts exchanged -> tokens to their experts (all-to-all) -> sorted by expert again -> the module's own forward -> back
with its own E / ep experts. No token is dropped, whatever the router says.
Beside tp, whose ranks hold the same tokens, each of them sends its share of these, and all get the outputs of all: an expert's
gradient is summed over tp then.
The ranks of ep are taken from those that parameters are sharded over (fsdp = expert_fsdp x ep, mesh.py): an expert's parameters
are sharded over expert_fsdp, and their gradients, to which the tokens of all ranks have contributed already, are divided by as
many ranks as those of all other parameters.
Source: Lepikhin et al. 2020, arXiv:2006.16668; the axes are those of torchtitan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from .activation import read_checkpointing
from .autograd_collectives import all_to_all, exchange
from .compile import read_compile
from .errors import ConfigError
from .experts import Experts
from .parts import Part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .parallel import ParallelStrategy

__all__ = ["ExpertParallel", "ExpertPart", "dispatched"]


@dataclass(frozen=True)
class ExpertParallel:
    """Which modules hold experts.

    Args:
        modules: patterns of names, such as "*.experts"; by default all `Experts` of ours.
    """

    modules: Sequence[str] | None = None


def make_part(option: Any) -> ExpertPart:
    """Return the part of ParallelStrategy(expert_parallel=option)."""
    if option == "auto":
        option = ExpertParallel()
    if not isinstance(option, ExpertParallel):
        raise ConfigError(
            f"expert_parallel={option!r}: expected 'auto' or an ExpertParallel object. For example "
            "ExpertParallel(modules=['*.experts'])."
        )
    return ExpertPart(option)


class ExpertPart(Part):
    """What ParallelStrategy does for `ep`."""

    axis = "ep"

    def __init__(self, options: ExpertParallel) -> None:
        self.options = options
        self._experts: dict[int, tuple[str, nn.Module]] = {}  # by id of the module; kept, so that no other gets its id

    def start(self, strategy: ParallelStrategy) -> None:
        super().start(strategy)
        option = self.strategy.tensor_parallel
        if self.mesh.size("tp") > 1 and (option == "sequence" or getattr(option, "sequence_parallel", False)):
            raise ConfigError(
                f"The plan {self.mesh.plan} has ep beside sequence parallel, where a rank of tp has a part of the tokens between "
                "the matrices, and the router would be cut with them. Leave sp out ('tp:2' in the place of 'tp:2+sp'): experts "
                "are given each rank's share of the tokens all the same. Or leave ep out."
            )

    # -- building -----------------------------------------------------------------------------------------------------
    def prepare_model(self, name: str, model: nn.Module) -> None:
        """Find the modules of experts, check them, and let their forward send tokens."""
        self._check_shaping()
        patterns, ranks = self.options.modules, self.mesh.size("ep")
        found = [
            (path, module)
            for path, module in model.named_modules()
            if (isinstance(module, Experts) if patterns is None else any(fnmatch(path, p) for p in patterns))
        ]
        if not found:
            what = "Experts (drivetrain.strategies.experts)" if patterns is None else f"module named {', '.join(patterns)}"
            raise ConfigError(
                f"ep={ranks} spreads experts, and model {name!r} has no {what}. Name yours: "
                "ParallelStrategy(expert_parallel=ExpertParallel(modules=['*.experts'])), or leave ep out."
            )
        group = self.mesh.group("ep")
        assert group is not None, "a part is made for an axis of several ranks"
        alike = self.mesh.group("tp")
        for path, module in found:
            self._check(path, module, ranks, self.mesh.size("expert_fsdp"))
            self._experts[id(module)] = (path, module)
            module.forward = functools.partial(_forward, module, module.forward, group, alike)

    def _check_shaping(self) -> None:
        """Experts are units of fully_shard inside of blocks: gathered in the middle of what would be one graph."""
        again = read_checkpointing(self.strategy.activation_checkpointing)
        if again is not None and again.mode == "selective":
            raise ConfigError(
                "activation_checkpointing='selective' with expert parallel (ep): torch cannot tell which results were kept where "
                "experts are gathered inside of a block that is computed again. Use activation_checkpointing='full', or leave "
                "ep out."
            )
        if read_compile(self.strategy.compile) is not None:
            raise ConfigError(
                "compile=... with expert parallel (ep): experts are gathered and tokens sent in the middle of a block, which "
                "torch.compile cannot take into one graph. Leave compile out, or ep."
            )

    def _check(self, path: str, module: nn.Module, ranks: int, shards: int) -> None:
        sizes = {key: tuple(p.shape) for key, p in module.named_parameters()}
        experts = {shape[0] if shape else 0 for shape in sizes.values()}
        if len(experts) != 1 or type(module).forward is nn.Module.forward:
            raise ConfigError(
                f"{path} ({type(module).__name__}) cannot be spread over ep: its parameters are not stacked over one number of "
                f"experts, {sizes}. Stack them, (experts, ...) each, and give it forward(tokens, counts)."
            )
        number = experts.pop()
        if number % (ranks * shards):
            more = f" times the {shards} ranks that shard each" if shards > 1 else ""
            raise ConfigError(
                f"{path} has {number} experts, which ep={ranks}{more} does not divide. Choose "
                + (f"ep={ranks * shards}" if number % (ranks * shards) == 0 or shards > 1 else "an ep")
                + " that divides them, or another number of experts."
            )

    def wants(self, name: str, model: nn.Module, path: str, module: nn.Module) -> bool:
        return id(module) in self._experts

    def cut(self, name: str, model: nn.Module, path: str, module: nn.Module) -> None:
        """Keep this rank's experts."""
        mesh, ranks, rank = self.mesh.sub("ep"), self.mesh.size("ep"), self.mesh.index("ep")
        for owner in module.modules():
            for key, parameter in list(owner.named_parameters(recurse=False)):
                own = parameter.data.chunk(ranks)[rank].clone()
                whole = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
                owner.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))

    def mesh_of(self, path: str, module: nn.Module) -> DeviceMesh | None:
        if id(module) not in self._experts:
            return None
        mesh = self.mesh
        return mesh.sub("dp_replicate", "expert_fsdp") if mesh.size("dp_replicate") > 1 else mesh.sub("expert_fsdp")

    def units(self, name: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
        inside = {id(m) for m in model.modules()}
        return [(path, module) for key, (path, module) in self._experts.items() if key in inside]

    # -- words --------------------------------------------------------------------------------------------------------
    def explain(self) -> list[tuple[str, str]]:
        ranks, shards = self.mesh.size("ep"), self.mesh.size("expert_fsdp")
        names = ", ".join(path for path, _ in self._experts.values())
        return [("expert parallel", f"experts over {ranks} ranks, each one's parameters over {shards}: {names}")]


def _forward(
    module: nn.Module,
    own: Callable[..., Tensor],
    group: dist.ProcessGroup,
    alike: dist.ProcessGroup | None,
    tokens: Tensor,
    counts: Tensor,
) -> Tensor:
    """What the module's forward is under ep; the ranks of `alike`, those of tp, have the same tokens."""

    def share(grad: Tensor) -> Tensor:
        grad = grad * (1 / group.size())
        if alike is not None:
            dist.all_reduce(grad, group=alike)
        return grad

    def local(received: Tensor, counts_here: Tensor) -> Tensor:
        # Its parameters are DTensors over ep while they are gathered; its code is given this rank's experts as plain tensors.
        held = [(o, k, p) for o in module.modules() for k, p in o._parameters.items() if isinstance(p, DTensor)]
        for owner, key, parameter in held:
            here: Any = parameter.to_local()
            if here.requires_grad:
                # The tokens of all ranks of ep are in this gradient, and fully_shard averages it over the others only. (Its own
                # set_gradient_divide_factor divides twice on a mesh of one rank: torch 2.13, foreach_reduce.)
                here.register_hook(share)
            owner._parameters[key] = here
        try:
            return own(received, counts_here)
        finally:
            for owner, key, parameter in held:
                owner._parameters[key] = parameter

    if alike is None:
        return dispatched(local, tokens, counts, group)
    first, share_of, total = alike.rank(), -(-tokens.shape[0] // alike.size()), tokens.shape[0]
    begin, end = min(first * share_of, total), min((first + 1) * share_of, total)
    ends = counts.cumsum(0).clamp(begin, end)
    mine = ends - torch.cat([ends.new_full((1,), begin), ends[:-1]])
    made = dispatched(local, _Taken.apply(tokens, begin, end, share_of, alike), mine, group)  # pyright: ignore[reportArgumentType]
    return _Joined.apply(made, begin, end, share_of, total, alike)  # pyright: ignore[reportReturnType]


class _Taken(torch.autograd.Function):
    """Rows `begin` to `end` of what all ranks of a group have alike. The gradient is that of all rows, on all ranks."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, begin: int, end: int, share: int, group: dist.ProcessGroup) -> Tensor:
        ctx.of = share, tokens.shape[0], group
        return tokens[begin:end].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _join(grad, *ctx.of), None, None, None, None


class _Joined(torch.autograd.Function):
    """The rows of all ranks of a group, on all of them; what follows is the same on all, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, begin: int, end: int, share: int, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.of = begin, end
        return _join(made, share, total, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        begin, end = ctx.of
        return grad[begin:end], None, None, None, None, None


def _join(part: Tensor, share: int, total: int, group: dist.ProcessGroup) -> Tensor:
    """Return (total, D) of each rank's rows, `share` each but for the last ones."""
    padded = part.new_zeros((share, *part.shape[1:]))
    padded[: part.shape[0]] = part
    whole = part.new_empty((share * group.size(), *part.shape[1:]))
    dist.all_gather_single(whole, padded, group=group)
    return whole[:total]


def dispatched(experts: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return what the experts of all ranks of `group` make of `tokens` (N, D), which are sorted by expert. Collective.

    Args:
        experts: this rank's, called with the tokens of all ranks that are theirs, sorted by expert, and their counts.
        counts: (E,) of `tokens`, over all experts; rank i holds the i-th part of them.
    """
    ranks = group.size()
    by_rank = counts.view(ranks, -1)
    coming = exchange(by_rank, [1] * ranks, [1] * ranks, group)
    sizes = torch.stack([by_rank.sum(1), coming.sum(1)]).tolist()
    received = all_to_all(tokens, sizes[1], sizes[0], group)
    # They lie by the rank that sent them, then by expert.
    here = coming.shape[1]
    numbers = coming.new_ones(here).cumsum(0) - 1  # no torch.arange, which context parallel may take for positions
    expert = numbers.repeat(ranks).repeat_interleave(coming.flatten())
    order = expert.argsort(stable=True)
    made = experts(received[order], coming.sum(0))
    return all_to_all(made[order.argsort()], sizes[0], sizes[1], group)
