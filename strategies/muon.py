"""MuonAdamW: Muon for the matrices of hidden layers and AdamW for all other parameters, one optimizer, on shards too.

    optimizer = MuonAdamW(muon_groups(model), lr=0.02, adamw_lr=3e-4)

Muon orthogonalises the whole momentum of a matrix, of which a rank holds only rows under FSDP; torch.optim.Muon knows no shards.
Here the ranks that share matrices divide them: with n ranks, matrix j of n is put together on rank j, orthogonalised there once,
and its rows go back, in two all-to-alls of bfloat16 (the first thing that the orthogonalisation does is to round to it). The
update is bit-equal to the one on a single device for equal gradients.
Sources: K. Jordan et al. 2024, Muon (kellerjordan.github.io/posts/muon); torch.optim.Muon, whose numbers these are, and whose
private functions are used (`_zeropower_via_newtonschulz`, `_adjust_lr`: tests/strategies/test_muon.py pins them);
Loshchilov and Hutter 2019, arXiv:1711.05101; torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from torch.optim.adamw import adamw

from .dtensors import local
from .errors import ConfigError, suggest

__all__ = ["MuonAdamW", "muon_groups"]


def muon_groups(model: nn.Module, *, adamw: Sequence[str] = ("*head*", "output*")) -> list[dict[str, Any]]:
    """Return two parameter groups: the matrices of hidden layers with use_muon=True, and all other parameters.

    Hidden matrices are the 2-d parameters that belong to no nn.Embedding and whose name, or a part of it between dots, matches no
    pattern of `adamw`: an output layer sees each row rarely, as an embedding does (Jordan et al.).
    """
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    muon: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        outside = any(fnmatch(part, pattern) for pattern in adamw for part in (name, *name.split(".")))
        (others if parameter.dim() != 2 or id(parameter) in embedded or outside else muon).append(parameter)
    return [{"params": group, "use_muon": kind} for group, kind in ((muon, True), (others, False)) if group]


class MuonAdamW(Optimizer):
    """Muon on groups with use_muon=True, AdamW on those with use_muon=False, over plain parameters and DTensors.

    Args:
        params: groups, each with "use_muon"; `muon_groups(model)` makes them. Options in a group go before those below.
        lr, weight_decay, momentum, nesterov, ns_steps, ns_coefficients, eps, adjust_lr_fn: torch.optim.Muon's, for its groups.
        adamw_lr, betas, adamw_eps, adamw_weight_decay: torch.optim.AdamW's, for the others. Each group's rate is its `lr`.
    Raises:
        ConfigError: a group without use_muon, or a parameter of a Muon group that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        adjust_lr_fn: str | None = None,
        adamw_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.1,
    ) -> None:
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            known = ["original", "match_rms_adamw"]
            raise ConfigError(f"adjust_lr_fn={adjust_lr_fn!r} is not known.{suggest(str(adjust_lr_fn), known)} Known: {known}.")
        if not 0 < ns_steps < 100:
            raise ConfigError(f"ns_steps must be from 1 to 99, got {ns_steps}. torch.optim.Muon's default is 5.")
        muon: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        others: dict[str, Any] = {"lr": adamw_lr, "betas": betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        groups: list[dict[str, Any]] = []
        for group in params:
            if not isinstance(group, dict) or "use_muon" not in group:
                raise ConfigError(
                    "MuonAdamW takes parameter groups that say use_muon=True or False, got one that does not. "
                    "Write MuonAdamW(muon_groups(model)), or {'params': [...], 'use_muon': True}."
                )
            groups.append((muon if group["use_muon"] else others) | group)
        super().__init__(groups, {})
        for group in self.param_groups:
            for parameter in group["params"] if group["use_muon"] else ():
                if parameter.dim() != 2:
                    raise ConfigError(
                        f"A group with use_muon=True holds a parameter of shape {tuple(parameter.shape)}, and Muon is for "
                        "matrices. Put it into a group with use_muon=False, as muon_groups(model) does."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all groups; with DTensors a collective of the ranks of their mesh."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if held:
                (self._muon if group["use_muon"] else self._adamw)(group, held)
        return loss

    def _muon(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        updates: list[Tensor] = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            grad, momentum = local(_grad(parameter)), local(state["momentum_buffer"])
            momentum.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)

        def orthogonal(matrix: Tensor) -> Tensor:
            return _zeropower_via_newtonschulz(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])

        for parameter, update in zip(parameters, _whole_by_turns(parameters, updates, orthogonal), strict=True):
            held = local(parameter)
            held.mul_(1 - group["lr"] * group["weight_decay"])
            held.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape))

    def _adamw(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        first, second = group["betas"]
        adamw(
            [local(p) for p in parameters],
            [local(_grad(p)) for p in parameters],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _whole_by_turns(
    parameters: Sequence[nn.Parameter], updates: Sequence[Tensor], function: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return this rank's pieces of `function(whole update)` for each parameter, whose pieces `updates` are. Collective."""
    done: list[Tensor | None] = [None] * len(updates)
    in_rows: dict[tuple[Any, int], list[int]] = {}  # (mesh, axis of it along which rows are cut) -> which parameters
    for i, (parameter, update) in enumerate(zip(parameters, updates, strict=True)):
        if not isinstance(parameter, DTensor):
            done[i] = function(update)
            continue
        cut = [axis for axis, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)]
        if not cut:
            done[i] = function(update)
        elif len(cut) == 1 and type(placement := parameter.placements[cut[0]]) is Shard and placement.dim == 0:
            in_rows.setdefault((parameter.device_mesh, cut[0]), []).append(i)
        else:  # cut twice (fsdp + tp), or by columns: every rank puts the whole together
            whole = DTensor.from_local(
                update,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            ).full_tensor()
            again = DTensor.from_local(function(whole), parameter.device_mesh, run_check=False)
            done[i] = local(again.redistribute(parameter.device_mesh, parameter.placements))
    for (mesh, axis), members in in_rows.items():
        group = mesh.get_group(axis)
        for start in range(0, len(members), dist.get_world_size(group)):
            turn = members[start : start + dist.get_world_size(group)]
            pieces = _exchange([updates[i].bfloat16() for i in turn], [parameters[i].shape for i in turn], function, group)
            for i, piece in zip(turn, pieces, strict=True):
                done[i] = piece
    return [d for d in done if d is not None]


def _exchange(
    pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], function: Callable[[Tensor], Tensor], group: dist.ProcessGroup
) -> list[Tensor]:
    """Return this rank's rows of `function(matrix)` for up to n matrices, of which rank j of n computes the j-th.

    Args:
        pieces: this rank's rows of each, in the order of `shapes`, which are those of the whole matrices.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    pieces = [p.contiguous() for p in pieces]
    mine = [p.numel() for p in pieces] + [0] * (size - len(pieces))
    held: list[int] = [0] * size  # elements of my matrix on each rank
    if rank < len(shapes):
        held = [_rows(shapes[rank][0], r, size) * shapes[rank][1] for r in range(size)]
    buffer = torch.empty(sum(held), dtype=torch.bfloat16, device=pieces[0].device)
    sent = torch.cat([p.reshape(-1) for p in pieces])
    dist.all_to_all_single(buffer, sent, held, mine, group=group)
    if rank < len(shapes):
        buffer = function(buffer.view(tuple(shapes[rank]))).contiguous().view(-1)
    dist.all_to_all_single(sent, buffer, mine, held, group=group)
    return [part.view(p.shape) for part, p in zip(sent.split(mine[: len(pieces)]), pieces, strict=True)]


def _rows(total: int, rank: int, size: int) -> int:
    """How many of `total` rows a rank holds, as torch.chunk cuts: ranks at the end may hold fewer, or none."""
    each = -(-total // size)
    return max(0, min(each, total - rank * each))
