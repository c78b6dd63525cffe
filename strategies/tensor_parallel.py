"""Tensor parallel: the matrices of a model cut over the axis `tp`, by a plan of module names; sequence and loss parallel with it.

    ParallelStrategy(plan=ParallelPlan(dp_shard=-1, tp=2))                            a ready plan (tensor_plans.py)
    ParallelStrategy(plan=..., tensor_parallel={"layers.*.fc1": "colwise", "layers.*.fc2": "rowwise"})
    ParallelStrategy(plan=..., tensor_parallel=TensorPlan(sequence_parallel=True, loss_parallel=True))
A model needs one thing: its attention must not ask how many heads there are, but take what it gets.
    q = self.wq(x).view(batch, length, -1, self.head_dim)      # not self.n_heads
    q, k, v = self.c_attn(x).chunk(3, dim=-1)                  # not .split(self.n_embd)
Styles, each a word, a FusedColumns(sections) (tensor_styles.py), or a ParallelStyle of torch.distributed.tensor.parallel:
    colwise         output features are cut: each rank has some heads, or some hidden features
    rowwise         input features are cut: each rank has a part of the sum, and one all-reduce adds them; an Embedding's rows are
    colwise_gather  colwise, with the output whole on each rank: the head. Under loss_parallel the logits stay cut
    rowwise_split   rowwise, of an input that is whole on each rank
    copied_heads    fewer heads of keys and values than ranks: held whole, each rank computes the heads that its queries attend
                    to; 'colwise' becomes this by itself. Its gradient is summed over tp
    heads           held whole, runs on this rank's heads (a norm of queries): its gradient is summed over tp
    sequence        held whole, runs on this rank's part of the sequence: its gradient is summed over tp
    replicate       held whole, runs on everything: as modules without a style do
Sequence parallel cuts what lies between the matrices, too: from the first block's input to the last block's output each rank has
a part of the sequence; it is gathered before the columns, and reduce-scattered after the rows, in the place of the all-reduce.
What is held whole must get equal gradients on all ranks of tp. That is looked at once, after the first backward pass. And a
block is tried on whole weights once, before its first forward (tensor_check.py).
Source: torch.distributed.tensor.parallel; Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from . import dtensors
from .blocks import choose_blocks
from .compile import read_compile
from .errors import ConfigError, UnknownName, suggest
from .parts import Part
from .precision.linears import LowPrecisionLinear
from .precision.split_linears import Split
from .sequence_styles import Gathered, HeldWhole, SequenceBlocks, blocks_of
from .tensor_check import Trial, trials_of
from .tensor_plans import QUERIES, Chosen, choose_styles, copy_heads, correct_sizes, heads_of, match_styles
from .tensor_styles import (
    Conv1DColumns,
    Conv1DRows,
    CopiedHeads,
    FusedColumns,
    FusedColwise,
    features_of,
    is_conv1d,
    mark,
    wait_for_inputs,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .parallel import ParallelStrategy

__all__ = ["STYLES", "FusedColumns", "TensorParallel", "TensorPlan", "make_part"]

STYLES = ("colwise", "rowwise", "colwise_gather", "rowwise_split", "copied_heads", "heads", "sequence", "replicate")
"""The words for a style; the module's docstring says what they do."""


@dataclass(frozen=True)
class TensorPlan:
    """How a model is cut over tp.

    Attributes:
        styles: pattern of module names -> style; "auto" finds them. See `tensor_plans.match_styles` and the module's docstring.
        sequence_parallel: norms, dropouts and residuals on a part of the sequence, dim `sequence_dim` of what blocks are given.
            Styles that are objects are taken as they are; those that are words follow.
        loss_parallel: the logits stay cut over the vocabulary, and cross_entropy is computed on the pieces. Steps see a DTensor.
        async_tp: overlap the communication with the products, on symmetric memory: in compiled blocks, on CUDA.
        sequence_dim: the dimension of the sequence; 1 for (batch, length, features).
        verify: try a block of each stack on whole weights once, and refuse other outputs.
    """

    styles: str | Mapping[str, str | FusedColumns | ParallelStyle] = "auto"
    sequence_parallel: bool = False
    loss_parallel: bool = False
    async_tp: bool = False
    sequence_dim: int = 1
    verify: bool = True

    def __post_init__(self) -> None:
        if self.styles != "auto" and not isinstance(self.styles, Mapping):
            raise ConfigError(
                f"TensorPlan(styles={self.styles!r}): expected 'auto' or a mapping of module patterns to styles, such as "
                "{'layers.*.fc1': 'colwise', 'layers.*.fc2': 'rowwise'}. Write one of them."
            )
        for pattern, style in self.styles.items() if isinstance(self.styles, Mapping) else ():
            if not isinstance(style, ParallelStyle | FusedColumns) and style not in STYLES:
                raise UnknownName(
                    f"TensorPlan: {pattern!r} has the style {style!r}.{suggest(str(style), STYLES)} Known: {', '.join(STYLES)}, "
                    "FusedColumns(sections), or a ParallelStyle of torch.distributed.tensor.parallel."
                )


def make_part(option: Any) -> TensorParallel:
    """Return the part for what `ParallelStrategy(tensor_parallel=...)` was given."""
    if option == "auto":
        return TensorParallel(TensorPlan())
    if option == "sequence":
        return TensorParallel(TensorPlan(sequence_parallel=True))
    if isinstance(option, TensorPlan):
        return TensorParallel(option)
    if isinstance(option, Mapping):
        return TensorParallel(TensorPlan(option))
    raise ConfigError(
        f"tensor_parallel={option!r:.80}: expected 'auto', 'sequence' (auto, with sequence parallel), a TensorPlan, or a "
        "mapping of module patterns to styles. Write one of them."
    )


class TensorParallel(Part):
    """The part of a ParallelStrategy that is about tp."""

    axis = "tp"

    def __init__(self, plan: TensorPlan) -> None:
        self.plan = plan
        self.finishes = plan.loss_parallel
        self._chosen: dict[str, Chosen] = {}  # by the model's name
        self._styles: dict[int, dict[str, list[ParallelStyle]]] = {}  # by id of the model, by path
        self._tied: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # id of a shared parameter -> (it, what took its place)
        # (id of a module, key) of the shared ones: by place, since a parameter without values is another once it has them.
        self._shared: set[tuple[int, str]] = set()
        self._unchecked: list[nn.Module] = []
        self._trials: list[Trial] = []
        self._copied: dict[str, int] = {}  # path -> heads

    def start(self, strategy: ParallelStrategy) -> None:
        super().start(strategy)
        if self.plan.async_tp:
            if strategy.device.type != "cuda":
                raise ConfigError(
                    f"TensorPlan(async_tp=True) needs symmetric memory, which {strategy.device.type} has not (CUDA has). "
                    "Leave async_tp out."
                )
            from torch._inductor import config
            from torch.distributed._symmetric_memory import enable_symm_mem_for_group

            config._micro_pipeline_tp = True
            enable_symm_mem_for_group(self.tp_mesh.get_group().group_name)

    @property
    def tp_mesh(self) -> DeviceMesh:
        return self.mesh.sub("tp")

    @property
    def degree(self) -> int:
        return self.mesh.size("tp")

    # -- before anything is cut -----------------------------------------------------------------------------------------
    def whole(self, name: str, model: nn.Module) -> None:
        """Refuse a pattern that fits nothing: of a stage's names it may miss some."""
        if isinstance(self.plan.styles, Mapping):
            match_styles(model, self.plan.styles)

    def prepare_model(self, name: str, model: nn.Module) -> None:
        """Decide the style of each module, and check that it can be cut so.

        Raises:
            ConfigError: no plan is known, or a module cannot be cut; the message names it.
        """
        plan = self.plan
        if plan.styles == "auto":
            chosen = choose_styles(model, self.degree)
        else:
            assert isinstance(plan.styles, Mapping)
            whole = self.mesh.size("pp") == 1
            chosen = Chosen(match_styles(model, plan.styles, all_match=whole), "asked for")
        self._follow_ties(model, chosen)
        self._copied |= copy_heads(model, chosen, self.degree)
        words = {path: style for path, style in chosen.styles.items() if style != "replicate"}
        for path, style in words.items():
            self._check(name, model, path, style, chosen)
        if plan.loss_parallel and "colwise_gather" not in words.values() and self.mesh.size("pp") == 1:
            raise ConfigError(
                f"loss_parallel needs a head that is cut over the vocabulary, and the plan of model {name!r} has none with the "
                "style 'colwise_gather'. Add it, such as {'lm_head': 'colwise_gather'}, or leave loss_parallel out."
            )
        made = {path: [self._make(path, style, model.get_submodule(path))] for path, style in words.items()}
        if plan.sequence_parallel:
            self._cut_sequence(name, model, words, made)
        uncommon = [path for path, style in words.items() if isinstance(style, FusedColumns) or style == "copied_heads"]
        objects = any(isinstance(style, ParallelStyle) for style in words.values())
        shared = self.mesh.size("cp") > 1 and not getattr(
            self.strategy.context_parallel, "verify", True
        )  # from the first step on
        dry = self.strategy.world.parameter_device.type == "meta"
        if plan.verify and not dry and not shared and not (objects and plan.sequence_parallel):
            dim = plan.sequence_dim if plan.sequence_parallel else None
            ep = self.mesh.size("ep") > 1
            self._trials += (trials := trials_of(name, model, words, uncommon, self.tp_mesh, dim, ep=ep))
            for trial in trials:
                trial.advice = self.advice
        for path in [p for p, style in words.items() if style in ("colwise", "copied_heads") or isinstance(style, FusedColumns)]:
            correct_sizes(model, path, words[path], self.degree)
        if (compiled := read_compile(self.strategy.compile)) is not None:
            for _, block in choose_blocks(model, compiled.units):
                block.register_forward_pre_hook(wait_for_inputs, with_kwargs=True)
        self._chosen[name] = chosen
        self._styles[id(model)] = made
        used: dict[int, list[tuple[int, str]]] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    used.setdefault(id(parameter), []).append((id(module), key))
        self._shared = {place for places in used.values() if places[1:] for place in places}

    def _make(self, path: str, style: Any, module: nn.Module, input: Any = None, output: Any = None) -> ParallelStyle:
        """Make the style of a word; of a module's input and output placements where those are not the style's own."""
        sequence = Shard(self.plan.sequence_dim)
        conv = is_conv1d(module)
        _, features = features_of(module) or (0, 0)
        if isinstance(style, ParallelStyle):
            return style
        if isinstance(style, FusedColumns):
            return (Conv1DColumns if conv else FusedColwise)(style.sizes(path, features), input_layouts=input)
        if style == "copied_heads":
            return CopiedHeads(self._copied[path], input_layouts=input)
        if conv and style.startswith("colwise"):
            return Conv1DColumns((features,), input_layouts=input, gather=style == "colwise_gather")
        if conv and style.startswith("rowwise"):
            return Conv1DRows(input_layouts=Replicate() if style == "rowwise_split" else None, output_layouts=output)
        if style == "colwise":
            return ColwiseParallel(input_layouts=input)
        if style == "rowwise" and isinstance(module, nn.Linear):
            return RowwiseParallel(output_layouts=output)
        if style == "colwise_gather" and self.plan.loss_parallel:
            return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        if style == "colwise_gather":
            return ColwiseParallel(input_layouts=input, output_layouts=Replicate())
        if style in ("rowwise", "rowwise_split"):
            return RowwiseParallel(input_layouts=Replicate(), output_layouts=output)
        # Heads: whichever dimension but the last; the module works on each head alone.
        return HeldWhole(Shard(0) if style == "heads" else sequence)

    def _cut_sequence(self, name: str, model: nn.Module, words: Mapping[str, Any], made: dict[str, list[ParallelStyle]]) -> None:
        """Change the styles of blocks so that a part of the sequence goes from one to the next."""
        dim = self.plan.sequence_dim
        blocks = blocks_of(name, model, words)
        for path in blocks.rows:
            made[path] = [self._make(path, words[path], model.get_submodule(path), output=Shard(dim))]
        for path in blocks.columns:
            made[path] = [self._make(path, words[path], model.get_submodule(path), input=Shard(dim))]
        for path in blocks.gathered:
            made.setdefault(path, []).append(Gathered(dim))
        for path in blocks.between:
            made[path] = [HeldWhole(Shard(dim))]
        for path in {*blocks.first, *blocks.last}:
            made.setdefault(path, []).append(SequenceBlocks(dim, enters=path in blocks.first, leaves=path in blocks.last))

    def _follow_ties(self, model: nn.Module, chosen: Chosen) -> None:
        """Cut both of two modules that share a weight, over the same rows of it; or neither, where that was left to us."""
        by_weight: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
                by_weight.setdefault(id(weight), []).append(path)
        for paths in by_weight.values():
            styled = [p for p in paths if chosen.styles.get(p, "replicate") != "replicate"]
            if not styled or len(styled) == len(paths):
                continue
            for path in (p for p in paths if p not in styled):
                vocabulary = str(chosen.styles[styled[0]]).startswith("colwise")
                if isinstance(model.get_submodule(path), nn.Embedding) and vocabulary:
                    chosen.styles[path] = "rowwise"
                    chosen.notes.append(f"{path} is cut over its rows like {styled[0]}, whose weight it shares")
                elif chosen.reason != "asked for":
                    for other in styled:
                        chosen.styles.pop(other, None)
                    chosen.notes.append(f"{', '.join(styled)} stays whole like {path}, whose weight it shares")
                else:
                    raise ConfigError(
                        f"{styled[0]} shares its weight with {path}, which has no style in the plan: one would be cut and the "
                        f"other not. Give both one: 'colwise_gather' for a head and 'rowwise' for its embedding; or neither."
                    )

    def _check(self, name: str, model: nn.Module, path: str, style: Any, chosen: Chosen) -> None:
        """Refuse what cannot be cut by `style` on this many ranks."""
        module, n = model.get_submodule(path), self.degree
        if style in ("heads", "sequence"):
            return
        if isinstance(module, LowPrecisionLinear):
            self._check_low_precision(name, path, module, style)
        if isinstance(style, ParallelStyle):
            return
        ours = type(module).__module__.startswith(__package__ or "drivetrain") and type(module) is not LowPrecisionLinear
        features = features_of(module)
        embeds = isinstance(module, nn.Embedding) and style in ("rowwise", "rowwise_split", "colwise", "colwise_gather")
        if (features is None and not embeds) or ours:
            raise ConfigError(
                f"{path} of model {name!r} is a {type(module).__name__}, and {style!r} cuts Linear and Embedding as they are in "
                "torch. Give it a ParallelStyle of its own, leave it out of the plan, or take a precision that changes none."
            )
        if isinstance(style, FusedColumns):
            self._check_sections(name, path, style.sizes(path, features[1] if features else 0), chosen.heads.get(path, ()))
            return
        if style == "copied_heads":
            if path not in self._copied:
                raise ConfigError(
                    f"{path} of model {name!r} has the style 'copied_heads', and how many heads it has cannot be told: what is "
                    "around it says neither head_dim nor num_heads, or there are no queries beside it. Give it a head_dim."
                )
            return
        rows = style.startswith("rowwise")
        if features is not None:
            size, what = (features[0], "input features") if rows else (features[1], "output features")
        else:
            assert isinstance(module, nn.Embedding)
            size, what = (module.num_embeddings, "rows") if rows else (module.embedding_dim, "features")
        if size % n:
            raise ConfigError(
                f"tp={n} cannot cut {path} of model {name!r}: its {size} {what} cannot be divided by {n}. Choose a tp that "
                f"divides {size}, make them {-(-size // n) * n}, or leave {path} out of the plan."
            )
        heads = heads_of(model, path, module) if isinstance(module, nn.Linear) and style == "colwise" else None
        if heads is not None and heads % n:
            kv = path.rpartition(".")[2] not in QUERIES
            raise ConfigError(
                f"tp={n} cannot cut {path} of model {name!r}: its {heads} {'key-value heads' if kv else 'heads'} cannot be "
                f"divided by {n}{', nor divide it,' if kv else ','} and a head is not cut through. Choose a tp that divides "
                f"{heads}{', or that it divides' if kv else ''}."
            )

    def _check_sections(self, name: str, path: str, sizes: tuple[int, ...], heads: tuple[int, ...]) -> None:
        """Refuse sections of a fused matrix that cannot be divided, or heads that would be cut through."""
        n = self.degree
        for what, counts in (("output features", sizes), ("heads", heads)):
            if any(count % n for count in counts):
                raise ConfigError(
                    f"tp={n} cannot cut {path} of model {name!r}: its sections are {', '.join(map(str, counts))} {what}, which "
                    f"cannot all be divided by {n}. Choose a tp that divides them, or cut the matrices alone, each rank "
                    f"computing the whole attention: {{{path!r}: 'colwise_gather'}}, and 'rowwise_split' for what ends it."
                )

    def _check_low_precision(self, name: str, path: str, module: LowPrecisionLinear, style: Any) -> None:
        """Refuse a product that has no way to multiply parts of a matrix by the scales of the whole."""
        over = getattr(module.matmul, "over", None)
        found = "it has no product of matrices that are cut over tp" if over is None else over(self.tp_mesh)
        if isinstance(style, ParallelStyle) and not isinstance(style, ColwiseParallel | RowwiseParallel):
            found = f"it does not know the style {type(style).__name__}"
        multiple = module.matmul.multiple
        rows = isinstance(style, RowwiseParallel) or str(style).startswith("rowwise")
        cut = module.in_features if rows else module.out_features
        if not isinstance(found, str) and (cut // self.degree) % multiple:
            found = f"of {cut} features each of {self.degree} ranks would have {cut / self.degree:g}, no multiple of {multiple}"
        if isinstance(found, str):
            raise ConfigError(
                f"tp={self.degree} cannot cut {path} of model {name!r}, which multiplies in {module.matmul!r}: {found}. Use "
                "precision='fp8-ao' (one scale a tensor) or 'bf16-mixed', skip this Linear in the precision's recipe, or leave "
                "it out of the tensor plan."
            )

    # -- cutting ----------------------------------------------------------------------------------------------------------
    def wants(self, name: str, model: nn.Module, path: str, module: nn.Module) -> bool:
        return path in self._styles[id(model)]

    def cut(self, name: str, model: nn.Module, path: str, module: nn.Module) -> None:
        """Apply the module's styles. A weight that is shared becomes one DTensor, shared as it was."""
        before, buffers = dict(module.named_parameters(recurse=False)), dict(module._buffers)
        for key, parameter in before.items():
            if id(parameter) in self._tied:
                module._parameters[key] = self._tied[id(parameter)][1]
        for style in self._styles[id(model)][path]:
            try:
                # None: all ranks have rank 0's values already, and nothing is sent.
                parallelize_module(module, self.tp_mesh, style, src_data_rank=None)
            except (ValueError, NotImplementedError) as error:
                raise ConfigError(
                    f"{path} of model {name!r}, a {type(module).__name__}, cannot be cut by {style}: {error} Give it another "
                    "style, the same as a module that it shares its weight with, or leave it out of the plan."
                ) from error
        if isinstance(module, LowPrecisionLinear) and (own := _columns(self._styles[id(model)][path])) is not None:
            module.split, module.matmul = Split(self.tp_mesh, own), cast("Any", module.matmul).over(self.tp_mesh)
        module._buffers.update(buffers)  # torch's styles make DTensors of them, which nothing else here expects
        for key, parameter in before.items():
            new = module._parameters[key]
            if id(parameter) in self._tied:
                module._parameters[key] = self._tied[id(parameter)][1]
            elif new is not parameter and isinstance(new, DTensor):
                # torch's is a view of the whole, and would keep all of it in memory.
                new._local_tensor = new._local_tensor.detach().clone()
                if (id(module), key) in self._shared:
                    assert isinstance(new, nn.Parameter)
                    self._tied[id(parameter)] = (parameter, new)

    def sharded(self, name: str, model: nn.Module) -> None:
        for path, styles in self._styles[id(model)].items():
            for style in styles:
                if isinstance(style, FusedColwise | Conv1DColumns):
                    module = model.get_submodule(path)
                    mark(module, orders := style.orders(module, self.degree))
                    for trial in self._trials:
                        trial.take_orders(name, path, orders)
        if self.strategy.world.parameter_device.type != "meta":  # a dry run has no values to look at
            self._unchecked.append(model)

    # -- running ----------------------------------------------------------------------------------------------------------
    def inside(self, method: str | None) -> AbstractContextManager[Any] | None:
        return loss_parallel() if self.plan.loss_parallel else None

    def finish(self, output: Any) -> Any:
        """A loss that was computed on cut logits, plain: it is the same on all ranks of tp."""
        if isinstance(output, DTensor):
            return output.full_tensor()
        if isinstance(output, dict):
            return {key: self.finish(value) for key, value in output.items()}
        return output

    def after_backward(self) -> None:
        """Look, once for each model, whether what is held whole has equal gradients on all ranks of tp. Collective.

        Raises:
            ConfigError: it has not; the parameters are named.
        """
        if not self._unchecked:
            return
        models, self._unchecked = self._unchecked, []
        for model in models:
            axes = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None and not _on_tp(p)]
            sums = [dtensors.local(g).detach().to(torch.float64) for _, g in axes]
            if not sums:
                continue
            mine = torch.stack([torch.stack([s.norm(), s.sum()]) for s in sums])
            every = [torch.empty_like(mine) for _ in range(self.degree)]
            dist.all_gather(every, mine, group=self.tp_mesh.get_group())
            scale = torch.stack([e[:, 0] for e in every]).amax(0)
            apart = torch.stack([(e - every[0]).abs().amax(1) for e in every]).amax(0) > 1e-2 * scale + 1e-30
            if names := [n for (n, _), bad in zip(axes, apart.tolist(), strict=True) if bad]:
                more = f" and {len(names) - 5} more" if names[5:] else ""
                raise ConfigError(
                    f"{', '.join(names[:5])}{more}: held whole on each of {self.degree} ranks of tp, with other gradients on "
                    "each. They would drift apart. What runs on a rank's own heads needs the style 'heads', on its own part of "
                    "the sequence 'sequence'; what follows a 'colwise' needs a 'rowwise' that ends it. Correct the plan."
                )

    def advice(self, error: Exception) -> str | None:
        """What to say beside an error of a step, once: the usual fault of a model is to count its heads itself."""
        found = self._advice(error)
        return None if found in getattr(error, "__notes__", ()) else found

    def _advice(self, error: Exception) -> str | None:
        fused = any(isinstance(style, FusedColumns) for chosen in self._chosen.values() for style in chosen.styles.values())
        if fused and ("values to unpack" in str(error) or "split_with_sizes" in str(error)):
            return (
                f"tensor parallel: each rank has 1/{self.degree} of each section of a fused matrix. A model that splits by its "
                "own sizes fails so: write .chunk(3, dim=-1), or sizes that follow those of the tensor."
            )
        if isinstance(error, RuntimeError) and "is invalid for input of size" in str(error):
            return (
                f"tensor parallel: each rank has 1/{self.degree} of the heads. A model that reshapes by its own number of heads "
                "fails so: write .view(batch, length, -1, self.head_dim)."
            )
        if isinstance(error, RuntimeError) and "must match" in str(error) and self.plan.sequence_parallel:
            return (
                "sequence parallel: what goes from block to block is a part of the sequence, and so is its length. A function "
                "between them (in pipeline_parts, say) that needs positions must be handed them by the first part."
            )
        return None

    def explain(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        for name, chosen in self._chosen.items():
            prefix = f"{name}: " if len(self._chosen) > 1 else ""
            kinds: dict[str, int] = {}
            for style in chosen.styles.values():
                word = style if isinstance(style, str) else type(style).__name__
                kinds[word] = kinds.get(word, 0) + 1
            options = [word for word in ("sequence_parallel", "loss_parallel", "async_tp") if getattr(self.plan, word)]
            cut = ", ".join([*(f"{n} x {kind}" for kind, n in kinds.items()), *options])
            rows.append((f"{prefix}tensor parallel", f"{cut}   {chosen.reason}"))
            rows += [(f"{prefix}tensor parallel", note) for note in chosen.notes]
        return rows


def _columns(styles: list[ParallelStyle]) -> bool | None:
    """Whether a Linear's columns are cut, or its rows; None where it is held whole."""
    return next((isinstance(s, ColwiseParallel) for s in styles if isinstance(s, ColwiseParallel | RowwiseParallel)), None)


def _on_tp(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())
