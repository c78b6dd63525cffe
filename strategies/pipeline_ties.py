"""A parameter that several stages of a pipeline use: an embedding that is the output head as well (GPT-2, small Llamas).

Each rank that holds one of its stages keeps a copy, sharded like the rest of the stage; others keep a placeholder. Copies stay
equal, bit for bit: they start from the first one's values, their gradients are added up in the order of the stages after each
batch, and each rank's optimizer makes the same step of them. They count once in norms, and are one tensor in a checkpoint.
Where two of its stages lie on one rank (a schedule in the shape of a V has the first and the last there), that rank has one
parameter for both. It is held whole then: two stages cannot both gather it.
Source: Narayanan et al. 2021, arXiv:2104.04473, section 4 (the embeddings of the first and the last stage).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import dtensors
from .errors import ConfigError
from .pipeline_split import Link

__all__ = ["Tie", "Ties", "find_ties"]


@dataclass(frozen=True)
class Tie:
    """One parameter of several stages.

    Attributes:
        names: under which the model has it, in the model's order.
        stages: of each name.
    """

    names: tuple[str, ...]
    stages: tuple[int, ...]


def find_ties(model: nn.Module, chain: Sequence[Link], starts: Sequence[int]) -> list[Tie]:
    """Return the parameters that lie in several of the stages that begin at `starts`, in the model's order."""
    places: dict[int, dict[str, int]] = {}
    for i, link in enumerate(chain):
        stage = sum(start <= i for start in starts) - 1
        for part in link.names:
            for name, parameter in model.get_submodule(part).named_parameters(part, remove_duplicate=False):
                places.setdefault(id(parameter), {}).setdefault(f"{stage}:{name}", stage)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    found: list[Tie] = []
    for held in places.values():
        if len(set(held.values())) > 1:
            pairs = sorted(
                ((key.partition(":")[2], stage) for key, stage in held.items()), key=lambda p: (order.get(p[0], 0), p[1])
            )
            found.append(Tie(tuple(name for name, _ in pairs), tuple(stage for _, stage in pairs)))
    return sorted(found, key=lambda tie: order.get(tie.names[0], 0))


class Ties:
    """The tied parameters of a model in stages, on this rank.

    Args:
        place: stage -> rank of pp.
        axes: the sizes of the mesh's other axes that cut parameters module by module (tp, ep).
    Raises:
        ConfigError: a whole module that two stages of one rank call; or a rank with two copies where others axes cut them.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Tie],
        place: Mapping[int, int],
        group: dist.ProcessGroup,
        rank: int,
        *,
        axes: Mapping[str, int],
    ) -> None:
        self._model, self._found, self._group, self._rank = model, found, group, rank
        self._holders = [tuple(dict.fromkeys(place[stage] for stage in sorted(set(tie.stages)))) for tie in found]
        # On each rank that holds it, the stage that is its own: the first of the rank's.
        self._own = [min((s for s in tie.stages if place[s] == rank), default=None) for tie in found]
        self._copies: dict[int, nn.Parameter] = {}  # as the optimizers know them: while a stage runs, others stand in its modules
        self._settled: dict[int, Tensor] = {}
        for tie, holders in self._each():
            if len(holders) == len(set(tie.stages)):
                continue
            met = f"{tie.names[0]} is used by the stages {', '.join(map(str, sorted(set(tie.stages))))}"
            if len({id(model.get_submodule(name.rpartition(".")[0])) for name in tie.names}) < len(set(tie.stages)):
                raise ConfigError(
                    f"{met}, of which one rank has two that call the same module. Use schedule='1f1b' or 'gpipe', which have one "
                    "stage on each rank, or choose splits that keep them in one stage."
                )
            for axis, size in axes.items():
                if size > 1:
                    raise ConfigError(
                        f"{met}, of which one rank has two: it would be held whole there, and {axis}={size} cuts it. Use "
                        f"schedule='1f1b' or 'interleaved', where they are on different ranks, or leave {axis} out."
                    )

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def whole(self) -> list[str]:
        """The names of those that are held whole."""
        return [name for tie, holders in self._each() if len(holders) < len(set(tie.stages)) for name in tie.names]

    def take(self, stage: nn.Module, index: int) -> None:
        """Let the whole model have the parameters of a stage that was prepared, wherever they are tied to it."""
        for i, (tie, own) in enumerate(zip(self._found, self._own, strict=True)):
            if own != index:
                continue
            mine = next(name for name, where in zip(tie.names, tie.stages, strict=True) if where == index)
            parameter = self._copies[i] = _get(stage, mine)
            for name in tie.names:
                owner, _, key = name.rpartition(".")
                self._model.get_submodule(owner)._parameters[key] = parameter

    def start_equal(self, *, values: bool) -> None:
        """Check that all copies are cut alike, and (`values`) give them the first one's. Collective over the pipeline.

        Raises:
            ConfigError: another axis cuts them in different ways.
        """
        mine = [_described(self._copies[i]) if i in self._copies else None for i in range(len(self._found))]
        described: list[list[str | None]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(described, mine, group=self._group)
        for i, (tie, holders) in enumerate(self._each()):
            kinds = {described[place][i] for place in holders}
            if len(kinds) > 1:
                raise ConfigError(
                    f"{', '.join(dict.fromkeys(tie.names))} is one parameter, which the stages cut in different ways "
                    f"({', '.join(sorted(filter(None, kinds)))}). Let the plan of tensor parallel cut both alike."
                )
            if values and i in self._copies and len(holders) > 1:
                held = dtensors.local(self._copies[i].detach()).contiguous()
                if self._rank == holders[0]:
                    for place in holders[1:]:
                        dist.send(held, group=self._group, group_dst=place)
                else:
                    dist.recv(held, group=self._group, group_src=holders[0])
                    dtensors.local(self._copies[i].detach()).copy_(held)

    # -- gradients ----------------------------------------------------------------------------------------------------
    def set_aside(self, *, sync: bool) -> None:
        """Before a batch: put away the gradients that hold all stages' sums already, so that only new ones are added up."""
        self._settled.clear()
        for i, parameter in self._shared(sync=sync):
            if parameter.grad is not None:
                self._settled[i] = parameter.grad
                parameter.grad = None

    def add_up(self, *, sync: bool) -> None:
        """After the backward passes of a batch: add up the stages' gradients. Collective among the ranks that hold copies."""
        for i, parameter in self._shared(sync=sync):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own = dtensors.local(parameter.grad)
            holders = self._holders[i]
            sent = own.detach().contiguous()
            theirs = {place: sent if place == self._rank else torch.empty_like(sent) for place in holders}
            ops = [
                dist.P2POp(kind, sent if kind is dist.isend else theirs[place], group=self._group, group_peer=place)
                for place in holders
                for kind in (dist.isend, dist.irecv)
                if place != self._rank
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            # In one order on all ranks: the copies shall stay equal, bit for bit.
            total = theirs[holders[0]].clone()
            for place in holders[1:]:
                total += theirs[place]
            own.copy_(total)
            if (before := self._settled.pop(i, None)) is not None:
                dtensors.local(before).add_(own)
                parameter.grad = before

    def counted(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of `parameters` that this rank counts in a norm: of a tied one, the first rank's copy."""
        copies: set[int] = {id(p) for i, p in self._copies.items() if self._holders[i][0] != self._rank}
        return [p for p in parameters if id(p) not in copies]

    def _each(self) -> Iterable[tuple[Tie, tuple[int, ...]]]:
        return zip(self._found, self._holders, strict=True)

    def _shared(self, *, sync: bool) -> Iterable[tuple[int, nn.Parameter]]:
        """Those that other ranks hold too, and whose gradients are to be added up: what is sharded, once it was reduced."""
        for i, parameter in self._copies.items():
            if len(self._holders[i]) > 1 and parameter.requires_grad and (sync or not isinstance(parameter, DTensor)):
                yield i, parameter

    def explain(self) -> list[tuple[str, str]]:
        """Return a row for each."""
        rows: list[tuple[str, str]] = []
        for tie, holders in self._each():
            where = ", ".join(map(str, holders))
            how = "one, held whole on rank" if len(holders) == 1 else "a copy, and the sum of all gradients, on each of the ranks"
            rows.append(("tied over stages", f"{' = '.join(dict.fromkeys(tie.names))}: {how} {where} of pp"))
        return rows


def _get(module: nn.Module, name: str) -> nn.Parameter:
    owner, _, key = name.rpartition(".")
    parameter = module.get_submodule(owner)._parameters[key]
    assert parameter is not None
    return parameter


def _described(parameter: Tensor) -> str:
    held = dtensors.local(parameter)
    cut = [str(p) for p in parameter.placements] if isinstance(parameter, DTensor) else "whole"
    return f"{tuple(held.shape)} {held.dtype} {cut}"
