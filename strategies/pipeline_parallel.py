"""Pipeline parallel: the model's layers in stages, one or more on each rank of the axis `pp`, for training and inference.

    Trainer(strategy="pp:2")                        1F1B; splits by cost; "fsdp:2+pp:2", "tp:2+pp:2" and so on
    ParallelStrategy(plan=ParallelPlan(pp=4), pipeline=Pipeline(schedule="interleaved", microbatches=8))
A batch is cut along its samples into `microbatches` chunks (not to be confused with the micro-batches of an accumulation window,
each of which is one such batch). The schedule says who runs what when; all give the same gradients:
    name         stages a rank   who holds what     source
    gpipe        1               rank r: stage r    Huang et al. 2018, arXiv:1811.06965
    1f1b         1               rank r: stage r    Narayanan et al. 2019, PipeDream; 2021, arXiv:2104.04473
    looped-bfs   2 or more       r, r+pp, ...       Lamy-Poirier 2022, arXiv:2211.05953
    interleaved  2 or more       r, r+pp, ...       arXiv:2104.04473
    zero-bubble  2 or more       r, r+pp, ...       Qi et al. 2023, arXiv:2401.10241
    zbv          2               r and 2pp-1-r      the same, section 6
    dualpipev    2               r and 2pp-1-r      DeepSeek-V3, arXiv:2412.19437
The loss is weighted chunk by chunk, by the samples of each, so that gradients are those of the whole batch. Where a batch has
fewer samples than there are chunks, a sample is run again with the weight 0: every rank always runs the same number.
Read `PipelinedModel.run` first; how a model is split is in pipeline_split.py, a stage in pipeline_stage.py.
Source: torch.distributed.pipelining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigError, DataError
from .pipeline_answers import Answering, owners_of
from .pipeline_chunks import Chunk, count_samples, cut_batch, each_tensor, first_input, key_of
from .pipeline_options import SCHEDULES, Pipeline, keeps_statistics, make_pipeline
from .pipeline_split import cost_of, cut, find_chain, free, split_at
from .pipeline_ties import Ties, find_ties

if TYPE_CHECKING:
    from .mesh import Mesh
    from .pipeline_split import Link
    from .pipeline_stage import Stage
    from .sharded import Sharded

__all__ = ["SCHEDULES", "Chunk", "Pipeline", "PipelinedModel", "first_input", "make_pipeline"]


@dataclass
class _Running:
    """What the runs of a prepared model need."""

    stages: list[Stage]
    sharded: list[Sharded]
    schedule: Any = None
    inside: Callable[[], AbstractContextManager[Any]] | None = None
    after: Callable[[Sequence[Sharded]], None] | None = None
    advice: Callable[[Exception], Sequence[str]] | None = None
    failed: bool = False


class PipelinedModel:
    """A model of which this rank holds some stages. Making it frees what other ranks hold.

    Attributes:
        modules: this rank's stages, in order.
        names: the parts' names by stage.
        last_rank: the place on pp of the rank that holds the last stage.
        replaced: (old, placeholder) of the parameters that other ranks hold; `elsewhere` has the ids of the placeholders.
        owners: the modules whose forward is the whole chain: the model, and what it only wraps.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        options: Pipeline,
        mesh: Mesh,
        device: torch.device,
        *,
        own_inputs: bool = True,
        autocast: Callable[[], Any] | None = None,
    ) -> None:
        """Split `model`, and free what other ranks hold.

        Args:
            own_inputs: a batch is what the model's pipeline_input takes; otherwise it is the tuple of forward's arguments.
            autocast: makes the context in which parts are measured, where that was asked for.
        """
        from .pipeline_stage import StageModule

        self.own_inputs = own_inputs
        self.name, self.model, self.options, self.device = name, model, options, device
        group = mesh.group("pp")
        assert group is not None
        self.group: dist.ProcessGroup = group
        self.ranks, self.rank = mesh.size("pp"), mesh.index("pp")
        self.num_stages, self.num_chunks = options.stages(self.ranks), options.chunks(self.ranks)
        _check_model(name, model, options)
        chain = find_chain(model)
        costs, by = self._costs(chain, mesh, autocast)
        named = not isinstance(options.splits, str)
        self.starts = split_at(chain, list(options.splits), self.num_stages) if named else cut(costs, self.num_stages)
        self.reason = "as asked for" if named else f"chosen: {by}"
        links = [chain[a:b] for a, b in zip(self.starts, [*self.starts[1:], len(chain)], strict=True)]
        self.names = [list(dict.fromkeys(name for link in some for name in link.names)) for some in links]
        total = sum(costs) or 1.0
        self.shares = [sum(costs[a : a + len(k)]) / total for a, k in zip(self.starts, links, strict=True)]
        self.place = {stage: self._rank_of(stage) for stage in range(self.num_stages)}
        self.last_rank = self.place[self.num_stages - 1]
        mine = [stage for stage, rank in self.place.items() if rank == self.rank]
        axes = {axis: mesh.size(axis) for axis in ("tp", "ep")}
        self.ties = Ties(model, find_ties(model, chain, self.starts), self.place, group, self.rank, axes=axes)
        others = [n for stage, some in enumerate(self.names) if stage not in mine for n in some]
        self.replaced = free(model, others, keep=[n for stage in mine for n in self.names[stage]])
        self.elsewhere = {id(new) for _, new in self.replaced}
        self.modules = [StageModule(model, links[stage], index=stage, is_last=stage == self.num_stages - 1) for stage in mine]
        self.last = next((module for module in self.modules if module.is_last), None)
        self.owners = owners_of(model, [name for some in self.names for name in some])
        self.plain: Callable[[Any], Any] = _as_it_is
        """Makes of what a step or a loss returned something that knows nothing of tp: call it before anything is done with it."""
        self.has_beside = False
        """Whether what gives the loss returns something beside it, which then is sent to all ranks; see trainer/pipelining.py."""
        self._running: _Running | None = None

    def _costs(self, chain: Sequence[Link], mesh: Mesh, autocast: Callable[[], Any] | None) -> tuple[list[float], str]:
        """What each link costs, and how that is known. Collective where it is measured."""
        model, given = self.model, self.options.cost
        if self.options.splits == "measure":
            from .pipeline_measure import measure

            seconds: list[float] | None = None
            if mesh.world.rank == 0:
                inputs = self.chunks(self.options.example)[0].inputs
                seconds = measure(model, chain, inputs, self.device, autocast=autocast)
            costs: list[float] = mesh.world.broadcast_json(seconds)
            return costs, f"by measured time, {sum(costs) * 1e3:.3g} ms for a chunk"
        if given is not None:
            return [sum(given(part, model.get_submodule(part)) for part in link.names) for link in chain], "by the cost given"
        return [cost_of(model, link) for link in chain], "by parameters"

    def _rank_of(self, stage: int) -> int:
        place, lap = stage % self.ranks, stage // self.ranks
        return self.ranks - 1 - place if SCHEDULES[self.options.schedule].v_shaped and lap % 2 else place

    def stage_of(self, name: str) -> int | None:
        """Return the stage that holds the parameter or buffer `name`; None where every rank does."""
        for stage, parts in enumerate(self.names):
            if any(name.startswith(f"{part}.") for part in parts):
                return stage
        return None

    def attach(
        self,
        sharded: Sequence[Sharded],
        *,
        autocast: Callable[[], Any] | None = None,
        inside: Callable[[], AbstractContextManager[Any]] | None = None,
        after: Callable[[Sequence[Sharded]], None] | None = None,
        plain: Callable[[Any], Any] | None = None,
        advice: Callable[[Exception], Sequence[str]] | None = None,
    ) -> None:
        """Take the stages as they were sharded, in the order of `modules`, and make the schedule.

        Args:
            autocast: makes the context in which stages and the loss run.
            inside: makes a context around each run, backward passes too.
            after: called with the stages when the backward passes of a batch are done.
            plain: see `plain`.
            advice: what may help with an error of a stage.
        """
        import torch.distributed.pipelining.schedules as torchs

        from .pipeline_stage import Stage

        for module in self.modules:
            module.autocast = autocast
            for path in self.names[module.index]:  # the precision may have put another module in the place of one
                self.model.set_submodule(path, module.get_submodule(path))
        self.autocast = autocast
        self.plain = plain if plain is not None else self.plain
        stages = [
            Stage(module, module.index, self.num_stages, self.device, self.group, dict(self.place)) for module in self.modules
        ]
        running = self._running = _Running(stages, list(sharded), inside=inside, after=after, advice=advice)
        for one in running.sharded:
            one.root._get_fsdp_state()._lazy_init()  # torch's looped schedules gather before the first forward
        if any(p.requires_grad for p in self.model.parameters()):
            kind = SCHEDULES[self.options.schedule]
            running.schedule = getattr(torchs, kind.torch_name)(
                stages if kind.looped else stages[0], self.num_chunks, loss_fn=_made_already, scale_grads=False
            )

    def hold(self, device: torch.device) -> None:
        """Bring this rank's stages to the device as they are, without sharding them; fill what is on the meta device.

        Raises:
            ConfigError: a module on the meta device that does not say how it is initialised.
        """
        from . import materialize

        def fill(name: str, module: nn.Module) -> None:
            materialize.fill(self.model, name, module, device)

        for module in self.modules:
            materialize.walk(module, fill, lambda name, one: None)
            module.to(device)
            self.ties.take(module, module.index)
        if self.ties:
            self.ties.start_equal(values=True)
        for buffer in [b for key, b in self.model.named_buffers() if self.stage_of(key) is None]:
            buffer.data = buffer.data.to(device)

    # -- running ------------------------------------------------------------------------------------------------------
    def inputs_of(self, batch: Any) -> tuple[Any, ...]:
        """Return what the first stage is called with for `batch`: the model's `pipeline_input`, or `first_input`."""
        if not self.own_inputs:
            return tuple(batch)
        own = getattr(self.model, "pipeline_input", None)
        found = own(batch) if callable(own) else first_input(batch)
        return found if isinstance(found, tuple) else (found,)

    def num_samples(self, batch: Any) -> int:
        """Return how many samples a batch has."""
        return count_samples(self.inputs_of(batch))

    def chunks(self, batch: Any) -> list[Chunk]:
        """Cut a batch into the chunks of the schedule."""
        return cut_batch(batch, self.inputs_of, self.num_chunks)

    def run(
        self,
        batch: Any,
        loss_of: Callable[[Any, Chunk], Any] | None = None,
        *,
        backward: bool,
    ) -> list[Any]:
        """Run `batch` through the pipeline; every rank of it calls this with the same batch. Collective.

        Args:
            loss_of: (output, chunk) -> the loss, weighted as it shall be, whose gradient is taken; called where the last stage
                is, once for each chunk. Without `backward` what it returns is kept instead.
            backward: run the schedule with its backward passes; otherwise forward passes only, without gradients.
        Returns: what `loss_of` returned (without one: the output) for each chunk, where the last stage is; else nothing.
        """
        running = self._running
        assert running is not None, "attach comes first"
        if running.failed:
            raise DataError("A batch of this pipeline failed before, and its ranks are no longer in step. Start the run again.")
        chunks = self.chunks(batch)
        keys = [key_of(chunk.inputs, backward) for chunk in chunks]
        sync = all(s.syncing for s in running.sharded)
        fillers = frozenset(i for i, chunk in enumerate(chunks) if not chunk.samples)
        for stage in running.stages:
            stage.begin(keys, backward=backward, sync=sync, fillers=fillers)
        if backward and self.ties:
            self.ties.set_aside(sync=sync)
        results: list[Any] = []
        try:
            without = _NO_CONTEXT if backward else torch.no_grad()
            with without, _Steps(running.sharded), running.inside() if running.inside is not None else _NO_CONTEXT:
                if backward:
                    assert running.schedule is not None
                    assert loss_of is not None
                    if not torch.is_grad_enabled():
                        raise ConfigError("A pipeline was to train under no_grad. Call it where gradients are enabled.")
                    for stage in running.stages if self.last is not None else ():
                        if stage.is_last:
                            stage.loss_of = lambda output, i: _kept(results, loss_of(output, chunks[i]))
                    running.schedule._step_microbatches(
                        [chunk.inputs for chunk in chunks], None, chunks, None, return_outputs=False
                    )
                else:
                    self._forward_only(running, chunks, loss_of, results)
                if backward and self.ties:
                    self.ties.add_up(sync=sync)
                if backward and running.after is not None:
                    running.after(running.sharded)
            for stage in running.stages:
                stage.end()
        except BaseException as error:
            running.failed = True
            for text in running.advice(error) if running.advice is not None and isinstance(error, Exception) else ():
                error.add_note(text)
            for stage in running.stages:
                stage.forget()
            for one in running.sharded:
                one.root.reset_iter_state()
            raise
        finally:
            if running.schedule is not None:
                running.schedule._internal_losses.clear()
        return results

    def _forward_only(
        self, running: _Running, chunks: Sequence[Chunk], loss_of: Callable[[Any, Chunk], Any] | None, results: list[Any]
    ) -> None:
        """Run all chunks through each stage in turn. torch's own schedules of the V shape cannot leave out the backward."""
        here = {stage.stage_index: stage for stage in running.stages}
        sends: list[Any] = []
        for index, stage in sorted(here.items()):
            for i, chunk in enumerate(chunks):
                if index - 1 not in here:
                    for work in [op.op(op.tensor, op.peer, op.group) for op in stage.get_fwd_recv_ops(i)]:
                        work.wait()
                output = stage.forward_one_chunk(i, chunk.inputs, None, save_forward_output=False)
                if stage.is_last:
                    with _NO_CONTEXT if self.autocast is None else self.autocast():
                        results.append(output if loss_of is None else loss_of(output, chunk))
                elif index + 1 in here:
                    here[index + 1].set_local_fwd_input(output, i)
                else:
                    sends += [(op.op(op.tensor, op.peer, op.group), op.tensor) for op in stage.get_fwd_send_ops(i)]
                stage.fwd_cache.clear()
        for work, _ in sends:
            work.wait()

    def answering(self, chunk: Chunk, output: Any) -> Answering:
        """A context in which the model, called with the chunk's input, returns `output`."""
        return Answering(self.owners, chunk.inputs, output)

    # -- between the ranks of the pipeline ----------------------------------------------------------------------------
    def share(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the rank that holds the last stage; every rank passes one of that shape and dtype."""
        dist.broadcast(tensor, group=self.group, group_src=self.last_rank)
        return tensor

    def share_tree(self, value: Any) -> Any:
        """Return on every rank the tree of tensors and plain objects that the rank with the last stage has."""
        is_source = self.rank == self.last_rank
        tensors: list[Tensor] = []
        box: list[Any] = [each_tensor(value, lambda t: _Slot(t, tensors)) if is_source else None]
        dist.broadcast_object_list(box, group=self.group, group_src=self.last_rank, device=self.device)

        def receive(slot: _Slot) -> Tensor:
            own = tensors[slot.index] if is_source else torch.empty(slot.shape, dtype=slot.dtype, device=self.device)
            return self.share(own.detach().contiguous())

        return each_tensor(box[0], receive, kind=_Slot)

    # -- words --------------------------------------------------------------------------------------------------------
    def explain(self) -> list[tuple[str, str]]:
        """Return rows: the schedule, and what each stage holds."""
        rows = [
            (
                "pipeline",
                f"{self.options.schedule}, {self.num_stages} stages on {self.ranks} ranks, {self.num_chunks} chunks a batch",
            ),
            ("splits", self.reason),
        ]
        automatic = getattr(self.model, "automatic_optimization", True)
        if automatic and _is_own(self.model, "training_step") and _is_own(self.model, "compute_loss"):
            rows.append(("training_step", "not called: the last stage calls compute_loss for each chunk of a batch"))
        for stage, names in enumerate(self.names):
            what = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}" if names else "functions only"
            rows.append(
                (
                    f"stage {stage}",
                    f"rank {self.place[stage]} of pp: {what} ({len(names)} parts, {self.shares[stage]:.0%} of the cost)",
                )
            )
        if self.options.batch_norm and any(keeps_statistics(module) for module in self.model.modules()):
            rows.append(("batch norm", f"by the statistics of each chunk, {self.num_chunks} of a batch, as asked for"))
        return rows + self.ties.explain()


class _Slot:
    """The place of a tensor in a tree that is sent without them."""

    def __init__(self, tensor: Tensor, found: list[Tensor]) -> None:
        self.index, self.dtype, self.shape = len(found), tensor.dtype, tuple(tensor.shape)
        found.append(tensor)


class _NoContext:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


_NO_CONTEXT: AbstractContextManager[Any] = _NoContext()  # pyright: ignore[reportAssignmentType]


class _Steps:
    """A batch as one step of each sharded stage: buffers are sent once, and nothing is left gathered without a backward."""

    def __init__(self, sharded: Sequence[Sharded]) -> None:
        self._sharded = sharded

    def __enter__(self) -> None:
        for one in self._sharded:
            if not one.depth:
                one._begin_step()
            one.depth += 1

    def __exit__(self, *error: object) -> None:
        for one in self._sharded:
            one.depth -= 1
            if not one.depth and not torch.is_grad_enabled():
                one.free()


def _kept(results: list[Any], loss: Tensor) -> Tensor:
    results.append(loss.detach())
    return loss


def _is_own(model: nn.Module, method: str) -> bool:
    """Whether the model's class defines the method: not TrainingModule's own, which stands for one that is not there."""
    found = getattr(type(model), method, None)
    return found is not None and not getattr(found, "__qualname__", "").startswith("TrainingModule.")


def _as_it_is(value: Any) -> Any:
    return value


def _made_already(loss: Tensor, chunk: Chunk) -> Tensor:
    """The loss function for torch's schedules: the last stage returns its loss."""
    return loss


def _check_model(name: str, model: nn.Module, options: Pipeline) -> None:
    """Refuse what a pipeline would compute differently, where that was not asked for."""
    for path, module in model.named_modules():
        if options.batch_norm is None and keeps_statistics(module):
            raise ConfigError(
                f"{path} of model {name!r} is a {type(module).__name__}: in a pipeline its statistics would be those of a chunk, "
                "not of the batch. Use GroupNorm or LayerNorm, take Pipeline(batch_norm='chunk') for what it is, or leave pp out."
            )
