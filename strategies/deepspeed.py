"""DeepSpeed's ZeRO, stages 0 to 3: optimizer state, gradients and parameters in pieces, one on each process.

    stage 0   the gradients are averaged, nothing is cut up          stage 2   gradients too
    stage 1   fp32 masters and optimizer state are cut up            stage 3   parameters too, gathered module by module
The model stays the user's own object under its own names; an engine of DeepSpeed is attached to it when its optimizer comes.
What is done once, and by whom:
  * Accumulation and clipping are the run's. DeepSpeed is told of one micro-batch a step and no clipping; its gradients are put
    together when the optimizer first asks for them (`managed_gradient_accumulation: false`), after any number of backward passes.
  * The user's optimizer keeps his parameters and options (a scheduler holds it); a twin of it steps ZeRO's flat fp32 partitions.
  * Under bf16-mixed the parameters that the model computes with are bf16, the masters fp32, and the step runs under autocast.
  * State has full names and is saved in pieces (deepspeed_state.py), so that any strategy on any number of ranks reads it.
The JSON is read in deepspeed_config.py, DeepSpeed itself met in deepspeed_engine.py.
Read `DeepSpeedStrategy._build` first.   Source: Rajbhandari et al. 2020, arXiv:1910.02054; deepspeed.ai/docs/config-json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import deepspeed_config, deepspeed_engine, deepspeed_io, deepspeed_native, deepspeed_weights, gradients, materialize
from .base import make_precision
from .deepspeed_held import Held, twin_of
from .deepspeed_options import DeepSpeedOptions
from .deepspeed_schedule import DummyOptim, DummyScheduler, check_fixed, checked_section, filled_scheduler
from .errors import ConfigError

if TYPE_CHECKING:
    from .named_state import Source
    from .whole_tensors import WholeTensors
    from .world import World

__all__ = ["DeepSpeedStrategy", "DummyOptim", "DummyScheduler"]

_PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")


class DeepSpeedStrategy(DeepSpeedOptions):
    """ZeRO by DeepSpeed; each process reads its slice of the batch.

    Args:
        stage: 0 to 3; 2 where neither it nor the JSON says.
        config: DeepSpeed's JSON, as a path or a dict. `auto` values are filled; contradictions with the run are one error.
        offload_optimizer, offload_parameters: "cpu" or "nvme" (with `nvme_path`); parameters under stage 3 only.
        pin_memory: of what is offloaded to the CPU; None pins where there is an accelerator.
        weights_in_16_bits: under bf16-mixed and fp16-mixed the model computes with 16-bit parameters, beside cut-up fp32 masters.
            False keeps fp32 parameters under autocast, with the numbers of ddp. None: 16 bits, unless the model has BatchNorm, or
            the device no fp16. Stage 0 has always fp32 parameters.
        moe_leaf_modules: classes (or names) of modules that stage 3 gathers as a whole: experts that not every rank uses.
        shared_memory: on CPU, let DeepSpeed compile its own shared-memory collectives. Minutes at the first use.
        activation_checkpointing, compile: as in every strategy; see activation.py and compile.py.
        zero: further keys of zero_optimization; they may also be given as arguments of their own, as may the peers' spellings.
    """

    reduces_gradients = True
    needs_group = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._held: dict[int, Held] = {}  # by id of the user's module

    # -- life ---------------------------------------------------------------------------------------------------------
    def start(self, world: World) -> None:
        """Let DeepSpeed join the processes. Collective."""
        if self.precision is None:
            self.precision = make_precision("fp32")
        if self.precision.name not in _PRECISIONS:
            instead = "expected fp32, bf16-mixed or fp16-mixed"
            if self.precision.name.endswith("-true"):
                instead = f"it keeps fp32 masters, so what it has is {self.precision.name.replace('true', 'mixed')}"
            raise ConfigError(f"strategy='deepspeed' cannot train in precision {self.precision.name!r}: {instead}.")
        super().start(world)
        self._choose_weights()
        if self.inference and self.stage in (1, 2):
            raise ConfigError(
                f"DeepSpeedStrategy(inference=True, stage={self.stage}): stages 1 and 2 cut up gradients and optimizer state, of "
                "which a model that is only evaluated has none. Take stage 3, which cuts up its parameters, or stage 0."
            )
        if "nvme" in (self._section(k).get("device") for k in ("offload_optimizer", "offload_param")):
            deepspeed_engine.load_async_io(world)
        self._check_kernels(world.device)
        deepspeed_engine.join(world, shared_memory=self.shared_memory)
        if self.precision.scales_loss:
            self.precision.agree = self._agree  # pyright: ignore[reportAttributeAccessIssue]
        if "activation_checkpointing" in self.config:
            deepspeed_engine.configure_activation_checkpointing(world.device, self._filled(1, 1))

    def check_world(self, world: World) -> None:
        """Any number of processes will do, if there is a process group."""
        if world.group() is None:
            raise ConfigError(
                "strategy='deepspeed' needs a process group also on one process, and this World has none. Start it with "
                "World.start(need_group=True), which Trainer and Accelerator do by themselves."
            )

    def stop(self) -> None:
        """Take the engines off their models. What stage 3 cut up stays so."""
        for held in self._held.values():
            held.release()
        self._held.clear()
        if self.precision is not None and getattr(self.precision, "agree", None) is not None:
            self.precision.agree = None  # pyright: ignore[reportAttributeAccessIssue]
        super().stop()

    @property
    def data_shard(self) -> tuple[int, int]:
        """Every rank reads its own slice."""
        return self.world.rank, self.world.size

    # -- building -----------------------------------------------------------------------------------------------------
    def init_context(self) -> AbstractContextManager[Any]:
        """Under stage 3, the context in which a model is cut up while it is built: deepspeed.zero.Init.

        transformers' from_pretrained fills the pieces there (deepspeed_transformers.py). Collective.
        """
        if self.stage != 3:
            return super().init_context()
        return deepspeed_engine.zero_init(self.world, self._filled(500_000_000, 1))

    def gathered(self, parameters: Iterable[nn.Parameter], *, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        """A context in which these parameters are whole (deepspeed.zero.GatheredParameters). Collective.

        What `modifier_rank` writes is kept, in every stage: all ranks have it after, and so have the fp32 masters of a trained
        model. What is written without it is lost in stage 3.
        """
        return deepspeed_weights.Gathered(self._held.values(), parameters, self.device, modifier_rank)

    def prepare_model(self, name: str, model: nn.Module) -> nn.Module:
        """Take `model`; it is cut up when its optimizer is prepared, or now where it is only evaluated. Returns it.

        Raises:
            ConfigError: a dtype that ZeRO's masters cannot hold, or parameters without values that do not fill themselves.
        """
        assert self.precision is not None
        if id(model) in self._held:
            return model
        if wide := [k for k, p in model.named_parameters() if p.dtype == torch.float64]:
            raise ConfigError(
                f"{wide[0]} of model {name!r} is float64, which DeepSpeed does not average, and its masters are fp32. Use "
                "strategy='fsdp' or 'ddp', or model.float()."
            )
        if materialize.has_meta(model):
            materialize.walk(model, lambda key, module: _note(materialize.fill(model, key, module, self.device)), lambda *_: None)
        if self.inference:
            model.requires_grad_(False)
            model.eval()
        model = self.shape_blocks(name, self.precision.convert(model))
        held = self._held[id(model)] = Held(name, model, self.stage)
        deepspeed_weights.watch(held)
        if not held.born_cut_up:
            model.to(self.device)
        if self.moe_leaf_modules:
            deepspeed_engine.set_leaf_modules(model, self.moe_leaf_modules)
        if self.precision.autocast_dtype is not None:
            from .precision.forward import run_inside

            run_inside(model, self.precision.autocast(self.device), self.device)
        if self.inference:
            self._place_for_inference(held)
        elif held.born_cut_up:
            held.wait_for_optimizer(lambda: self._build(held, None))
        return model

    def _place_for_inference(self, held: Held) -> None:
        if self.stage == 3:
            self._build(held, None)
            return
        from .replica import broadcast_

        if (weights := self._weights_in(held.model)) is not None:
            held.model.to(dtype=torch.bfloat16 if weights == "bf16" else torch.float16)
        if self.world.size > 1 and (group := self.world.group()) is not None:
            broadcast_(held.model, group)

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Build the engine of the model whose parameters `optimizer` holds; return it. Collective.

        Raises:
            ConfigError: parameters of several models, a model that has an optimizer, an optimizer that looks at whole tensors, or
                contradictions between the JSON and the run.
        """
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        owners = [h for h in self._held.values() if any(id(p) in ids for p in h.model.parameters())]
        if not owners:
            return optimizer
        names = ", ".join(repr(h.name) for h in owners)
        if len(owners) > 1:
            raise ConfigError(
                f"An optimizer holds parameters of the models {names}. DeepSpeed gives each model its own: make one for each."
            )
        held = owners[0]
        if held.front is not None:
            raise ConfigError(
                f"The model {names} has an optimizer already. DeepSpeed gives a model one, which steps all of its pieces: use "
                "its parameter groups, or name the parts as models of their own."
            )
        if held.engine is not None and not self.inference:
            raise ConfigError(f"The model {names} was evaluated before its optimizer was prepared. Prepare the optimizer first.")
        self._build(held, optimizer)
        return optimizer

    def _build(self, held: Held, front: Optimizer | None) -> None:
        """Attach an engine to a model: its twin of the user's optimizer, the configuration, the pieces."""
        model = held.model
        dummy = front if isinstance(front, DummyOptim) else None
        section = self.config.get("optimizer") if dummy is not None else None
        found = deepspeed_config.contradictions(
            self.config,
            self.run | {"precision": self.precision.name if self.precision else None},
            self.world.size,
            has_optimizer=front is not None and dummy is None,
        )
        found += check_fixed(dummy, section) if dummy is not None and section else []
        if found:
            raise ConfigError(
                f"The DeepSpeed JSON contradicts the run: {'; '.join(found)}. Write 'auto' there, or say the same in both places."
            )
        sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters()]
        options: dict[str, Any] = {}
        config = self._filled(sum(sizes), max(sizes, default=1), model)
        config.pop("optimizer", None)
        if dummy is not None:
            section = checked_section(section, self.stage)
            deepspeed_engine.check_locks()
            config["optimizer"] = dummy.fill(section)
            options["model_parameters"] = dummy.asked()
        elif front is not None:
            options["optimizer"] = twin_of(
                front, allowed=self.config.get("zero_allow_untested_optimizer") is True, stage=self.stage
            )
        held.attach(deepspeed_engine.build(self.world, model, config, **options), front)
        if dummy is not None and section and held.parts is not None:
            dummy.take(held.parts.inner, section)
        if front is not None and (waiting := self.config.get("scheduler")):
            held.awaits = str(waiting.get("type"))

    def _refuse_stand_in(self, found: Any) -> None:
        """Stand-ins are for this strategy."""

    def take_scheduler(self, scheduler: Any, optimizer: Optimizer) -> None:
        """Fill a DummyScheduler from the JSON's section "scheduler", or by its callable; others are the run's own.

        Raises:
            ConfigError: a scheduler of the run's own beside that of the JSON, or a DummyScheduler that stands for none.
        """
        held = self._of(optimizer)
        made = filled_scheduler(scheduler, optimizer, self.config.get("scheduler"), self.run.get("total_num_steps"))
        if held is not None and made is not None:
            held.awaits = ""
            held.engine.lr_scheduler = made  # for DeepSpeed's native checkpoints, which hold its state

    def configured_optimizer(self, model: nn.Module) -> Any:
        """Return stand-ins for the optimizer and the scheduler that the JSON has; None where it has no optimizer."""
        if "optimizer" not in self.config or self.inference:
            return None
        optimizer = DummyOptim(model.parameters())
        return {"optimizer": optimizer} | ({"lr_scheduler": DummyScheduler(optimizer)} if self.config.get("scheduler") else {})

    def bind(self, model: nn.Module, method: str) -> Callable[..., Any]:
        """Return `model.<method>`; under stage 3 it runs as the model's forward, with its own parameters gathered."""
        held = self._held.get(id(model))
        if held is None or self.stage != 3:
            return super().bind(model, method)
        return held.bound(method)

    # -- one micro-batch ----------------------------------------------------------------------------------------------
    def set_gradient_sync(self, models: Iterable[nn.Module], enabled: bool) -> None:
        """Nothing to say: gradients are put together when the optimizer asks. Stages 2 and 3 reduce after each micro-batch."""

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass of `loss`; ZeRO's hooks take the gradients as they come."""
        self.begin_backward(loss)
        try:
            loss.backward(**kwargs)
        except Exception:
            self.break_backward()
            raise
        self.end_backward()

    def begin_backward(self, loss: Tensor) -> None:
        """Make the engines ready for a backward pass, whoever runs it."""
        for held in self._held.values():
            held.begin_backward()

    def end_backward(self) -> None:
        for held in self._held.values():
            held.end_backward()

    def break_backward(self) -> None:
        for held in self._held.values():
            held.break_backward()

    # -- one optimizer step -------------------------------------------------------------------------------------------
    def _pieces(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """Return (this rank's pieces, gradients that all ranks hold alike) of the averages. Collective the first time."""
        cut: list[Tensor] = []
        alike: list[Tensor] = []
        rest = list(parameters)
        for held in self._held.values():
            own = [p for p in rest if id(p) in held.ids]
            if not own or held.engine is None:
                continue
            rest = [p for p in rest if id(p) not in held.ids]
            if held.settle():
                (alike if held.parts is None else cut).extend(held.gradients(own))
        alike.extend(gradients.gradients(rest))
        return cut, alike

    def grad_norm(self, parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Return the norm over all pieces on all ranks. Collective: one number."""
        cut, alike = self._pieces(parameters)
        kind = torch.float64 if any(g.dtype == torch.float64 for g in (*cut, *alike)) else torch.float32
        if self.stage == 0:
            return gradients.grad_norm(alike, norm_type)
        infinite = norm_type == float("inf")
        power = gradients.grad_norm(cut, norm_type).to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
        power = power.nan_to_num(nan=torch.inf, posinf=torch.inf) if infinite else power**norm_type
        if self.world.size > 1:
            dist.all_reduce(power, dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=self.world.group())
        if alike:
            other = gradients.grad_norm(alike, norm_type).to(power)
            power = torch.maximum(power, other) if infinite else power + other**norm_type
        return (power if infinite else power ** (1.0 / norm_type)).to(kind)

    def gradients_finite(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether the gradients' pieces are finite on all ranks. Collective: one number."""
        cut, alike = self._pieces(parameters)
        own = gradients.all_finite([*cut, *alike])
        if self.world.size == 1:
            return own
        flag = torch.tensor(float(own), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.world.group())
        return bool(flag.item())

    def scale_gradients(self, parameters: Sequence[nn.Parameter], factor: Tensor | float) -> None:
        cut, alike = self._pieces(parameters)
        gradients.scale_([*cut, *alike], factor)

    def clip_values(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        cut, alike = self._pieces(parameters)
        gradients.clip_values_([*cut, *alike], limit)

    def unscale_(self, optimizer: Optimizer) -> None:
        assert self.precision is not None
        self.precision.unscale_(self._view(optimizer))

    def _view(self, optimizer: Optimizer) -> Any:
        """Return what the precision scales and steps: the pieces of the gradients in the optimizer's place."""
        held = self._of(optimizer)
        if held is None or held.parts is None:
            if held is not None:
                held.settle()
            return optimizer
        return held.view(lambda: self._step(held))

    def step(self, optimizer: Optimizer) -> bool:
        """Step the twin of `optimizer` with the options that it has now; return whether it stepped."""
        assert self.precision is not None
        held = self._of(optimizer)
        if held is None:
            return super().step(optimizer)
        clip = self.config.get("gradient_clipping", deepspeed_config.AUTO)
        if clip not in (deepspeed_config.AUTO, 0, 0.0) and "gradient_clipping" not in self.run:  # nobody else clips
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.scale_gradients(parameters, (float(clip) / (self.grad_norm(parameters) + 1e-6)).clamp_(max=1.0))
        if self.precision.scales_loss:
            return self.precision.step(self._view(optimizer))
        return self._step(held)

    def _step(self, held: Held) -> bool:
        if held.awaits:
            raise ConfigError(
                f"The DeepSpeed JSON has a scheduler ({held.awaits}), and none was prepared, so that the learning rate would "
                "stay. Prepare DummyScheduler(optimizer), return it from configure_optimizers, or take the section out."
            )
        held.settle()
        with deepspeed_engine.explained("The optimizer's step"):
            return held.step()

    def _of(self, optimizer: Optimizer) -> Held | None:
        return next((h for h in self._held.values() if h.front is optimizer), None)

    def _agree(self, flag: Tensor) -> None:
        if self.world.size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.group())

    # -- state: deepspeed_io.py ---------------------------------------------------------------------------------------
    def sync_buffers(self, models: Iterable[nn.Module]) -> None:
        """Give rank 0's buffers to all ranks. Collective."""
        from .replica import broadcast_buffers_

        group = self.world.group()
        for model in models if self.world.size > 1 else ():
            if id(model) in self._held and group is not None:
                broadcast_buffers_(model, group)

    def state_tensors(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same names as on one device; each rank has its stretches of what is cut up. Buffers are rank 0's."""
        return deepspeed_io.state_tensors(self._held, models, optimizers, self.world.rank)

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
        """Load what any strategy saved; of what is cut up here each rank reads its own stretch only. Collective."""
        return deepspeed_io.load_state_tensors(self._held, models, optimizers, list(names), read, values, strict=strict)

    def place(self, own: Tensor, name: str, source: Source) -> Tensor:
        return source(name)

    def load_weights(self, model: nn.Module, folder: Path, *, strict: bool = True) -> list[str]:
        """Copy bare weights into `model`: the fp32 masters too. Collective."""
        held = self._held.get(id(model))
        return (
            super().load_weights(model, folder, strict=strict)
            if held is None
            else deepspeed_weights.load_weights(held, model, folder, strict=strict)
        )

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all tensors, whole, in host memory on rank 0; nothing on the others: trained ones in fp32. Collective."""
        return self.whole_tensors(model).all()

    def whole_tensors(self, model: nn.Module) -> WholeTensors:
        """Return the tensors of `model`, each put together when it is read: trained ones in fp32. Collective."""
        return deepspeed_io.whole_tensors(self._held.get(id(model)), model, self.world)

    def save_native(self, model: nn.Module, folder: str | Path, tag: str = "step") -> None:
        """Write DeepSpeed's own checkpoint of `model` and its optimizer. Collective."""
        deepspeed_native.save_native(self._trained(model), folder, tag)

    def load_native(self, model: nn.Module, folder: str | Path, tag: str | None = None) -> None:
        """Load DeepSpeed's own checkpoint, a pickle: of those that you trust. Collective.

        Raises:
            CheckpointError: of another number of processes or another stage, which DeepSpeed's own format cannot be read with.
        """
        deepspeed_native.load_native(self._trained(model), folder, tag, self.world)

    def save_universal(self, model: nn.Module, folder: str | Path, tag: str = "universal") -> None:
        """Write DeepSpeed's universal checkpoint of `model` and its Adam: for DeepSpeed elsewhere. Collective."""
        deepspeed_native.save_universal(self._trained(model), folder, tag, self.world)

    def load_universal(self, model: nn.Module, folder: str | Path, tag: str | None = None) -> None:
        """Load a universal checkpoint of any stage and number of processes; weights and optimizer state. Collective."""
        held = self._trained(model)
        assert held.front is not None
        names, source, values = deepspeed_native.read_universal(folder, tag, held.name, model, held.front)
        self.load_state_tensors({held.name: model}, {"optimizer": held.front}, names, source, values)

    @staticmethod
    def fp32_weights(folder: str | Path, tag: str | None = None) -> dict[str, Tensor]:
        """Return the whole fp32 weights that a native checkpoint of DeepSpeed holds, in host memory (its zero_to_fp32)."""
        return deepspeed_native.fp32_weights(folder, tag)

    def engine(self, model: nn.Module) -> Any:
        """Return DeepSpeed's engine of a prepared `model`, for what has no words here."""
        return self._trained(model).engine

    def _trained(self, model: nn.Module) -> Held:
        held = self._held.get(id(model))
        if held is None or held.engine is None:
            raise ConfigError(f"{type(model).__name__} has no engine of DeepSpeed: it gets one with its optimizer. Prepare both.")
        return held

    # -- words --------------------------------------------------------------------------------------------------------
    def explain(self) -> list[tuple[str, str]]:
        """Return what is cut up, what is offloaded, and the bytes on this rank."""
        cut = {0: "nothing", 1: "optimizer state", 2: "optimizer state, gradients", 3: "optimizer state, gradients, parameters"}
        rows = [*super().explain(), ("ZeRO stage", f"{self.stage}   in pieces: {cut[self.stage]}")]
        for key in ("offload_optimizer", "offload_param"):
            if section := self._section(key):
                rows.append((key.replace("_", " "), f"{section['device']} {section.get('nvme_path', '')}".rstrip()))
        for held in self._held.values():
            prefix = f"{held.name}: " if len(self._held) > 1 else ""
            if self.precision is not None and self.precision.autocast_dtype is not None:
                weights, reason = self._choose_weights(held.model)
                kept = f"{weights}, with fp32 masters" if weights and not self.inference else weights or "fp32, under autocast"
                rows.append((f"{prefix}weights", f"{kept}   {reason}"))
            rows.extend((prefix + what, how) for what, how in held.explain())
        return rows


def _note(_: bool) -> None:
    """What materialize.walk's visitor returns is nothing."""
