"""PipelineStrategy: what the axis `pp` changes in a strategy that shards its models. ParallelStrategy (parallel.py) inherits it.

Each rank prepares its own stages, each as a model of its own; the user's model stays one object, in which placeholders stand
for what other ranks hold. So optimizers are built over the whole model on every rank, with the same parameter groups; a
placeholder never has a gradient, and no optimizer steps it. A checkpoint is written by all stages together, under the names of
the whole model, and checked against all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import dtensors, gradients, named_state
from .errors import ConfigError, suggest
from .fsdp import FSDPStrategy
from .pipeline_answers import stand_in
from .pipeline_split import mark_elsewhere
from .sharded import check_model
from .units import choose_units

if TYPE_CHECKING:
    from .parts import Part
    from .pipeline_parallel import PipelinedModel
    from .sharded import Sharded
    from .world import World

__all__ = ["PipelineStrategy"]


class PipelineStrategy(FSDPStrategy):
    """Stages of the model on the ranks of `pp`; without that axis it changes nothing.

    Args:
        pipeline: a Pipeline, the name of a schedule, or "auto"; see pipeline_parallel.py.
        fsdp: further arguments are those of FSDPStrategy. Under pp parameters stay gathered between the chunks of a batch:
            reshard_after_forward is False there, and refused as anything else.
    """

    def __init__(self, *, pipeline: Any = "auto", **fsdp: Any) -> None:
        fsdp.setdefault("reshard_after_forward", None)
        super().__init__(**fsdp)
        self._asks_reshard: bool | int | None = self.reshard_after_forward
        if self._asks_reshard is None:
            self.reshard_after_forward = True
        self.pipeline = pipeline
        self._pipelines: dict[int, PipelinedModel] = {}  # by id of the user's module
        # While a model is split: option -> (what was asked for, ids of the blocks of the whole model that it is about).
        self._blocks: dict[str, tuple[Any, set[int]]] = {}

    # -- life ---------------------------------------------------------------------------------------------------------
    def start(self, world: World) -> None:
        """Refuse what a pipeline cannot do; say which rank of it has the losses."""
        super().start(world)
        if self.mesh.size("pp") == 1:
            return
        from .pipeline_options import SCHEDULES, make_pipeline

        options = self.pipeline = make_pipeline(self.pipeline)
        options.chunks(self.mesh.size("pp"))
        if self.mesh.size("cp") > 1:
            raise ConfigError(
                f"The plan {self.plan} has both pp and cp: the sequence is cut for the whole model's forward, and a pipeline "
                "calls none. Leave one of them out."
            )
        if self.offload is not None:
            raise ConfigError("offload='cpu' is not combined with pp: parameters stay gathered between chunks. Leave one out.")
        if self.sync_batchnorm:
            raise ConfigError(
                "sync_batchnorm=True is not combined with pp: a rank may have no samples in a chunk. Leave it out; "
                "Pipeline(batch_norm='chunk') takes the statistics of each chunk."
            )
        if self._asks_reshard not in (None, False):
            raise ConfigError(
                f"reshard_after_forward={self._asks_reshard!r} under {self.plan}: parameters would be gathered anew for each "
                "chunk of a batch, forward and backward. Leave it out: with pp they stay gathered until the batch is done."
            )
        self.reshard_after_forward = False
        world.last_stage = 0 if SCHEDULES[options.schedule].v_shaped else -1

    def stop(self) -> None:
        self._pipelines.clear()
        super().stop()

    def pipeline_of(self, model: nn.Module) -> PipelinedModel | None:
        return self._pipelines.get(id(model))

    # -- building -----------------------------------------------------------------------------------------------------
    def prepare_model(self, name: str, model: nn.Module) -> nn.Module:
        """Split `model`, free what other ranks hold, and prepare each of this rank's stages as a model of its own."""
        if self.mesh.size("pp") == 1 or id(model) in self._pipelines:
            return super().prepare_model(name, model)
        from .pipeline_parallel import PipelinedModel

        check_model(name, model)
        if self.inference:
            model.requires_grad_(False)
            model.eval()
        for part in self._parts:
            part.whole(name, model)
        self._blocks = self._blocks_of(model)
        chosen = {id(module) for _, module in choose_units(model, self.units)}
        ignored = _parameters_of(name, model, self.ignored_parameters)
        assert self.precision is not None
        precision, device = self.precision, self.device
        precision.look_at(model)
        autocast = None if precision.autocast_dtype is None else lambda: precision.autocast(device)
        pipe = PipelinedModel(name, model, self.pipeline, self.mesh, self.device, autocast=autocast)
        self._replaced.update((id(old), (old, new)) for old, new in pipe.replaced)
        units, given = self.units, self.ignored_parameters
        self.units = lambda _, module: id(module) in chosen
        averaged: set[int] = set()
        try:
            for stage in pipe.modules:
                self.ignored_parameters = [*ignored, *(model.get_parameter(n) for n in pipe.ties.whole)]
                super().prepare_model(f"{name}, stage {stage.index}", stage)
                # Autocast is entered by the stage itself, which does not widen what goes to the next one.
                vars(stage).pop("forward", None)
                pipe.ties.take(stage, stage.index)
                sharded = self._sharded[id(stage)]  # what two stages of this rank hold whole, one of them averages
                sharded.whole = {key: p for key, p in sharded.whole.items() if id(p) not in averaged}
                averaged.update(map(id, sharded.whole.values()))
        finally:
            self.units, self.ignored_parameters, self._blocks = units, given, {}
        if pipe.ties and self.world.parameter_device.type != "meta":
            pipe.ties.start_equal(values=self.sync_module_states)
        for buffer in _own_buffers(model, pipe):
            buffer.data = buffer.data.to(self.device)
        pipe.attach(
            [self._sharded[id(stage)] for stage in pipe.modules],
            autocast=autocast,
            inside=self.inside_pipeline(),
            after=self._after_backward,
            plain=self._plain,
            advice=lambda error: [text for part in self._parts if (text := part.advice(error))],
        )
        stand_in(pipe.owners)
        mark_elsewhere(model)
        self._pipelines[id(model)] = pipe
        return model

    def _blocks_of(self, model: nn.Module) -> dict[str, tuple[Any, set[int]]]:
        """What is to be computed again and compiled: in a stage of one block nobody could tell that it is a repeated one."""
        from .activation import read_checkpointing
        from .blocks import choose_blocks
        from .compile import read_compile

        asked = {
            "activation_checkpointing": read_checkpointing(self.activation_checkpointing),
            "compile": read_compile(self.compile),
        }
        return {
            option: (how, {id(module) for _, module in choose_blocks(model, how.units)})
            for option, how in asked.items()
            if how is not None
        }

    def shape_blocks(self, name: str, model: nn.Module) -> nn.Module:
        """Let those of the whole model's blocks be computed again and compiled that lie in a stage."""
        given = {option: getattr(self, option) for option in self._blocks}
        for option, (how, blocks) in self._blocks.items():
            here = not blocks or any(id(module) in blocks for module in model.modules())
            own = replace(how, units=lambda _, module, blocks=blocks: id(module) in blocks) if blocks else how
            setattr(self, option, own if here else None)
        try:
            return super().shape_blocks(name, model)
        finally:
            for option, how in given.items():
                setattr(self, option, how)

    @property
    def _parts(self) -> Sequence[Part]:
        return getattr(self, "parts", ())

    def inside_pipeline(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """What makes the context around each run of a pipeline, forward and backward; None for none."""
        parts = self._parts
        if not parts:
            return None

        def inside() -> ExitStack:
            stack = ExitStack()
            for part in parts:
                if (context := part.inside(None)) is not None:
                    stack.enter_context(context)
            return stack

        return inside

    def _plain(self, value: Any) -> Any:
        """What the last stage's step or loss returned, as code that knows nothing of the other axes takes it."""
        for part in self._parts:
            if part.finishes:
                value = part.finish(value)
        return value

    def _stages(self, models: Iterable[nn.Module]) -> list[nn.Module]:
        """The modules that this rank prepared for the user's `models`."""
        found: list[nn.Module] = []
        for model in models:
            pipe = self._pipelines.get(id(model))
            found += [model] if pipe is None else pipe.modules
        return found

    # -- one micro-batch ----------------------------------------------------------------------------------------------
    def _after_backward(self, sharded: Sequence[Sharded]) -> None:
        """After a pipeline's backward passes: average the gradients of what is not cut up; let the other axes look at them."""
        group = self.mesh.group("loss")
        for one in sharded:
            if one.whole and one.syncing and group is not None:
                one.average_whole(group, self.mesh.size("loss"))
        if self._all_sync:
            for part in self._parts:
                part.after_backward()

    # -- one optimizer step -------------------------------------------------------------------------------------------
    def grad_norm(self, parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Return the norm over all pieces of all stages. Collective."""
        group = self.mesh.group("pp")
        if group is None:
            return super().grad_norm(parameters, norm_type)
        # By the parameters of all stages: a rank whose own are frozen has no gradient to tell it by.
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        for pipe in self._pipelines.values():
            parameters = pipe.ties.counted(parameters) if pipe.ties else parameters
        return dtensors.norm(gradients.gradients(parameters), norm_type, group=group, device=self.device, dtype=dtype)

    # -- state --------------------------------------------------------------------------------------------------------
    def sync_buffers(self, models: Iterable[nn.Module]) -> None:
        super().sync_buffers(self._stages(models))

    def state_tensors(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The names of the whole model; each rank has what its stages hold, and the first what no stage does."""
        tensors, values = super().state_tensors(models, optimizers)
        if self.mesh.size("pp") == 1:
            return tensors, values
        for name, value in values.items():
            for parameter, scalars in value.get("scalars", {}).items():
                if any(v is not None for v in scalars.values()):
                    raise ConfigError(
                        f"{name} keeps {', '.join(scalars)} of {parameter} as plain numbers, which are saved by rank 0 alone, "
                        "and under pp each rank has its own. Use an optimizer that keeps its state in tensors, such as AdamW."
                    )
        for name, model in models.items() if self.mesh.index("pp") else ():
            pipe = self._pipelines.get(id(model))
            for key in model.state_dict() if pipe is not None else ():
                if pipe is not None and pipe.stage_of(key) is None:
                    tensors.pop(f"model/{name}/{key}", None)
        return {name: t for name, t in tensors.items() if not (isinstance(t, Tensor) and t.is_meta)}, values

    def load_state_tensors(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        names: Iterable[str],
        read: Callable[[str], Tensor],
        values: Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> list[str]:
        """Load what any strategy saved: names are checked against the whole model, and only this rank's stages are read."""
        skipped = super().load_state_tensors(models, optimizers, names, read, values, strict=strict)
        for optimizer in optimizers.values():
            for parameter in [p for p in optimizer.state if p.is_meta]:
                del optimizer.state[parameter]
        return skipped

    def place(self, own: Tensor, name: str, source: named_state.Source) -> Tensor:
        if own.is_meta:  # another stage's
            return torch.empty(source.shape(name), device="meta")
        return super().place(own, name, source)

    def _whole(self, model: nn.Module, name: str, own: Tensor) -> Tensor:
        """Put one tensor together in its stage, and send it to the first rank of the pipeline."""
        pipe = self._pipelines.get(id(model))
        stage = None if pipe is None else pipe.stage_of(name)
        if pipe is None or stage is None:
            return super()._whole(model, name, own)
        owner = pipe.place[stage]
        if pipe.rank == owner:
            whole = super()._whole(model, name, own).contiguous()
            if owner != 0:
                dist.send(whole, group=pipe.group, group_dst=0)
            return whole
        if pipe.rank == 0:
            whole = torch.empty(own.shape, dtype=own.dtype, device=self.device)
            dist.recv(whole, group=pipe.group, group_src=owner)
            return whole
        return own.detach()

    # -- words --------------------------------------------------------------------------------------------------------
    def _whole_models(self) -> list[tuple[str, nn.Module]]:
        stages = {id(stage) for pipe in self._pipelines.values() for stage in pipe.modules}
        return [
            *((name, model) for name, model in super()._whole_models() if id(model) not in stages),
            *((pipe.name, pipe.model) for pipe in self._pipelines.values()),
        ]

    def _is_here(self, parameter: Tensor) -> bool:
        return not any(id(parameter) in pipe.elsewhere for pipe in self._pipelines.values())

    def explain(self) -> list[tuple[str, str]]:
        rows = [*super().explain(), *(row for pipe in self._pipelines.values() for row in pipe.explain())]
        if self._pipelines:
            rows.append(("reshard_after_forward", "False: parameters stay gathered between the chunks of a batch"))
        return rows


def _own_buffers(model: nn.Module, pipe: PipelinedModel) -> list[Tensor]:
    """The buffers that lie in no stage: every rank keeps its own copy."""
    return [buffer for key, buffer in model.named_buffers() if pipe.stage_of(key) is None]


def _parameters_of(name: str, model: nn.Module, given: Iterable[Any]) -> list[Any]:
    """The parameters that `ignored_parameters` means in the whole model: a stage has only some of the names."""
    own = dict(model.named_parameters())
    found: list[Any] = []
    for one in given:
        if not isinstance(one, str):
            found.append(one)
            continue
        named = [p for key, p in own.items() if key == one or key.startswith(f"{one}.")]
        if not named:
            raise ConfigError(
                f"ignored_parameters: model {name!r} has no parameter or module {one!r}.{suggest(one, own)} Name one of its "
                "parameters, or leave it out."
            )
        found += named
    return found
