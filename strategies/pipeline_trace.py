"""A model that is no chain of modules as a chain of stages: its graph, traced by torch.export and cut before given modules.

    traced = trace(model, args, kwargs, before=["layers.2"], device=device)     # as many stages as names, and one
    traced.stages                                                                # a module with pipeline_parts()
What a later stage needs of an earlier one (a mask, a residual, an input) passes through those between. The parameters are the
model's own objects. The graph is that of the example: a chunk must have its very shapes, and branches that depend on values
are refused by torch.export. For inference; training goes by names (pipeline_split.py), which keep the modules themselves.
Source: torch.export, torch.fx; the split is that of torch.distributed.pipelining.pipeline, without its copies of tied weights.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import ConfigError, suggest
from .pipeline_split import cut
from .units import choose_units

__all__ = ["Traced", "choose_splits", "trace"]


@dataclass
class Traced:
    """A model as the stages of its graph.

    Attributes:
        stages: the module whose parts they are.
        splits: the user's modules before which a stage begins.
        samples: of a chunk.
        shapes: of the tensors that the graph was traced for, in the order of the flat inputs; None for what is no tensor.
    """

    stages: nn.Module
    splits: list[str]
    samples: int
    shapes: list[tuple[int, ...] | None]
    in_spec: Any
    out_spec: Any

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the flat inputs of a call.

        Raises:
            ConfigError: other arguments than those of the example.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), {key: kwargs[key] for key in sorted(kwargs)}))
        if spec != self.in_spec:
            raise ConfigError(
                f"The model was traced with the arguments {_words(self.in_spec)} and is called with {_words(spec)}. Call it as "
                "in example_args and example_kwargs."
            )
        for value, shape in zip(leaves, self.shapes, strict=True):
            if isinstance(value, Tensor) and shape is not None and tuple(value.shape[1:]) != shape[1:]:
                raise ConfigError(
                    f"The model was traced for inputs of shape (samples, {', '.join(map(str, shape[1:]))}), and is called with "
                    f"{tuple(value.shape)}. Pad it to that, or prepare the model with examples of the other shape."
                )
        return leaves

    def output(self, flat: Any) -> Any:
        """Return what the model's forward would, of what the last stage returned."""
        return pytree.tree_unflatten(list(flat), self.out_spec)


class _Stages(nn.Module):
    """The stages, one called after the other."""

    def __init__(self, graphs: Sequence[fx.GraphModule]) -> None:
        super().__init__()
        for i, graph in enumerate(graphs):
            self.add_module(f"stage_{i}", graph)

    def pipeline_parts(self) -> list[str]:
        return [name for name, _ in self.named_children()]

    def forward(self, *args: Any) -> Any:
        for stage in self.children():
            args = stage(*args)
        return args


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    before: Sequence[str] | int,
    no_split: Sequence[str] = (),
    device: torch.device,
) -> Traced:
    """Trace `model` with the arguments of one chunk, and cut it.

    Args:
        before: modules at whose first operation a new stage begins, or how many stages there shall be.
        no_split: class names inside of which no stage may begin, where `before` is a number.
        device: where the stages will run.
    Raises:
        ConfigError: torch.export cannot trace it; a module that is never called, or out of order; too few blocks.
    """
    kwargs = {key: kwargs[key] for key in sorted(kwargs)}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own code while it traces
            exported = torch.export.export(model, tuple(args), dict(kwargs))
            graph_module = exported.module(check_guards=False)
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} is no chain of modules, and torch.export cannot trace it ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]:.200}). Give it pipeline_parts(), or take out what depends on values."
        ) from error
    assert isinstance(graph_module, fx.GraphModule)
    nodes = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    first = _first_nodes(nodes)
    splits = choose_splits(model, graph_module, nodes, first, before, no_split) if isinstance(before, int) else list(before)
    for name in splits:
        if name not in first:
            raise ConfigError(
                f"A stage shall begin at {name!r}, which is no module that the forward calls.{suggest(name, first)} Its modules: "
                f"{', '.join(list(first)[:20])}."
            )
    starts = [first[name] for name in splits]
    if sorted(set(starts)) != starts or 0 in starts:
        raise ConfigError(
            f"Stages begin at {', '.join(splits)}, which is not the order of the forward, or leaves the first empty."
        )
    for node in nodes:  # what makes a tensor names the device that it was traced on
        if any(isinstance(value, torch.device) for value in pytree.tree_leaves((node.args, node.kwargs))):
            node.args = pytree.tree_map(lambda v: device if isinstance(v, torch.device) else v, node.args)
            node.kwargs = pytree.tree_map(lambda v: device if isinstance(v, torch.device) else v, dict(node.kwargs))
    graphs = _cut_graph(graph_module, nodes, starts)
    leaves, in_spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else None for v in leaves]
    samples = next((shape[0] for shape in shapes if shape), 0)
    return Traced(_Stages(graphs), splits, samples, shapes, in_spec, exported.call_spec.out_spec)


def _first_nodes(nodes: Sequence[fx.Node]) -> dict[str, int]:
    """Name of a module -> the index of the first operation inside it, in the order of the forward."""
    first: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if path:
                first.setdefault(path, i)
    return first


def choose_splits(
    model: nn.Module,
    graph_module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    first: Mapping[str, int],
    stages: int,
    no_split: Sequence[str],
) -> list[str]:
    """Return the blocks at which stages begin, so that the one with most parameters has fewest.

    Raises:
        ConfigError: fewer blocks than stages.
    """
    blocks = [path for path, _ in choose_units(model, list(no_split) or "auto") if path in first]
    blocks = sorted(dict.fromkeys(blocks), key=lambda path: first[path])
    if len(blocks) < stages - 1 or not blocks:
        raise ConfigError(
            f"{type(model).__name__} has {len(blocks)} repeated block(s), and the pipeline {stages} stages. Say where they "
            "begin: split_points=[names of modules], or name the classes of its blocks in no_split_module_classes."
        )
    starts = [0, *(first[path] for path in blocks)]
    seen: set[int] = set()
    costs: list[float] = []
    for begin, end in zip(starts, [*starts[1:], len(nodes)], strict=True):
        cost = 0
        for node in nodes[begin:end]:
            for used in node.all_input_nodes if "embedding" not in str(node.target) else ():
                if used.op == "get_attr":
                    held = operator.attrgetter(str(used.target))(graph_module)
                    if isinstance(held, nn.Parameter) and id(held) not in seen:
                        seen.add(id(held))
                        cost += held.numel()
        costs.append(float(cost))
    if len(blocks) >= stages:  # what comes before the first block goes with it
        costs[1] += costs[0]
        return [blocks[i] for i in cut(costs[1:], stages)[1:]]
    return [blocks[i - 1] for i in cut(costs, stages)[1:]]


def _cut_graph(whole: fx.GraphModule, nodes: Sequence[fx.Node], starts: Sequence[int]) -> list[fx.GraphModule]:
    """The graph in pieces: each takes what the one before returned, and returns what any after it needs."""
    stage: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        stage[node] = sum(start <= i for start in starts)
        if node.target is operator.getitem:  # an item goes from stage to stage, and not the list that it is of
            stage[node] = stage.get(node.args[0], 0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    number = len(starts) + 1
    inputs = [node for node in whole.graph.nodes if node.op == "placeholder"]
    (output,) = [node for node in whole.graph.nodes if node.op == "output"]
    results = list(pytree.tree_leaves(output.args))
    # The last stage that needs a value; what is computed in stage a and needed in b passes through those between.
    needed: dict[fx.Node, int] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            needed[used] = max(needed.get(used, 0), stage[node])
    for value in results:
        if isinstance(value, fx.Node):
            needed[value] = number - 1
    made = {**dict.fromkeys(inputs, 0), **stage}
    found: list[fx.GraphModule] = []
    coming = inputs
    for i in range(number):
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in coming}

        def copy(node: fx.Node, copies: dict[fx.Node, fx.Node] = copies, graph: fx.Graph = graph) -> fx.Node:
            if node not in copies:
                assert node.op == "get_attr", node
                copies[node] = graph.node_copy(node)
            return copies[node]

        for node in nodes:
            if stage[node] == i:
                copies[node] = graph.node_copy(node, copy)
        if i == number - 1:
            graph.output(tuple(fx.map_arg(value, copy) if isinstance(value, fx.Node) else value for value in results))
        else:
            coming = [node for node, at in made.items() if at <= i and needed.get(node, 0) > i and node.op != "get_attr"]
            graph.output(tuple(copies[node] for node in coming))
        found.append(fx.GraphModule(whole, graph))
    return found


def _words(spec: Any) -> str:
    args, kwargs = (spec.child(0), spec.child(1)) if hasattr(spec, "child") else spec.children_specs
    named = [str(key) for key in (kwargs.context or [])]
    return f"({', '.join([f'{args.num_children} by position', *named])})"
