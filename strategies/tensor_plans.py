"""Which modules are cut which way: the ready plans of tensor parallel, found in a model by what it says itself or by its names.

    choose_styles(model, degree)       -> Chosen(styles={"layers.0.attention.wq": "colwise", ...}, reason="...")
A matrix pair is cut so that only its end talks: the first by columns (each rank has some heads, or some of the hidden features),
the second by rows (each rank has a part of the sum, and one all-reduce adds them up). Found are
    attention     four Linears in one module: wq wk wv wo, q_proj k_proj v_proj o_proj, query key value proj, ...
                  or queries, keys and values in one: c_attn c_proj, qkv proj, qkv_proj o_proj, ..., cut section by section
    feed-forward  w1 w3 w2, gate_proj up_proj down_proj, fc proj, fc1 fc2, linear1 linear2, gate_up_proj down_proj, ...
    the head and the embedding, cut over the vocabulary, where it can be divided
transformers' models have a plan of their own (`base_model_tp_plan`), which is taken first. What is not found stays whole.
Source: Shoeybi et al. 2019, arXiv:1909.08053.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .errors import ConfigError, suggest
from .tensor_styles import FusedColumns, features_of

__all__ = ["QUERIES", "Chosen", "choose_styles", "copy_heads", "correct_sizes", "heads_of", "match_styles"]

_ATTENTION = (
    ("wq", "wk", "wv", "wo"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("query", "key", "value", "proj"),
    ("query", "key", "value", "out"),
    ("q", "k", "v", "o"),
    ("q", "k", "v", "proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)
_FEED_FORWARD = (  # the columns first, the rows last
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("gate", "up", "down"),
    ("fc", "proj"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
    ("w1", "w2"),
    ("up", "down"),
)
_FUSED_ATTENTION = ("qkv", "c_attn", "qkv_proj", "query_key_value", "wqkv", "Wqkv", "W_pack", "in_proj", "to_qkv")
_FUSED_ENDS = ("c_proj", "proj", "o_proj", "out_proj", "wo", "dense", "out", "to_out", "o")
_FUSED_FEED_FORWARD = (("gate_up_proj", "down_proj"), ("gate_up", "down"), ("w13", "w2"), ("fc1_gate", "fc2"))
_FUSED = (*_FUSED_ATTENTION, "kv_proj", "to_kv", "gate_up_proj")
_EMBEDDINGS = (
    "tok_embeddings",
    "embed_tokens",
    "wte",
    "token_embedding",
    "tok_embedding",
    "tok_emb",
    "embed_in",
    "word_embeddings",
)
QUERIES = frozenset(names[0] for names in _ATTENTION)
"""What the queries of an attention are called."""
_KEYS = frozenset(names[1] for names in _ATTENTION)
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head")
_GROUPS = ("num_key_value_groups", "n_rep", "num_kv_groups", "num_queries_per_kv", "kv_groups")
_HEADS = ("output", "lm_head", "head", "embed_out", "unembed", "output_projection")
_HEAD_NORMS = ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm")
_HEAD_DIMS = ("head_dim", "d_head", "d_kv", "head_size", "attention_head_size")
_HEAD_COUNTS = ("n_heads", "num_heads", "n_head", "heads", "num_attention_heads", "nhead")

# What transformers calls its styles.
_TRANSFORMERS: Mapping[str, str] = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "colwise_rep": "colwise_gather",
    "colwise_gather_output": "colwise_gather",
    "rowwise_rep": "rowwise_split",
    "rowwise_split_input": "rowwise_split",
    "embedding_rowwise": "rowwise",
    "embedding_colwise": "colwise_gather",
    "replicated_with_grad_allreduce": "heads",
    "replicate": "replicate",
    "moe_tp_experts": "replicate",
}


@dataclass
class Chosen:
    """A plan that was found.

    Attributes:
        styles: path of a module -> style.
        reason: in words, for the start-up lines.
        notes: what was left whole, and why.
        heads: path of a fused matrix -> heads of its sections, where that is known.
    """

    styles: dict[str, Any]
    reason: str
    notes: list[str] = field(default_factory=list)
    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)


def choose_styles(model: nn.Module, degree: int) -> Chosen:
    """Find a plan for `model` on `degree` ranks.

    Raises:
        ConfigError: nothing is recognised, or queries, keys and values are in one matrix; the message says how to write a plan.
    """
    chosen = _named_by_model(model) or _by_structure(model, degree)
    if not chosen.styles:
        raise ConfigError(
            f"No tensor parallel plan is known for {type(model).__name__}: no block has Linears by the names of attention "
            "(q_proj k_proj v_proj o_proj, wq wk wv wo, ...) or feed-forward (gate_proj up_proj down_proj, fc1 fc2, ...). Write "
            "one: ParallelStrategy(tensor_parallel={'layers.*.fc1': 'colwise', 'layers.*.fc2': 'rowwise'})."
        )
    return chosen


# -- what a model says itself -----------------------------------------------------------------------------------------------
def _named_by_model(model: nn.Module) -> Chosen | None:
    """The plan of a transformers model, wherever in `model` it is."""
    for path, module in model.named_modules():
        patterns = _transformers_plan(module)
        if patterns:
            styles: dict[str, str] = {}
            experts: dict[str, str] = {}
            for pattern, theirs in patterns.items():
                full = f"{path}.{pattern}" if path else pattern
                found = [p for p in _matching(model, full) if any(True for _ in _get(model, p).parameters(recurse=False))]
                if found and theirs not in _TRANSFORMERS:
                    raise ConfigError(
                        f"The tensor parallel plan of {type(module).__name__} cuts {found[0]} by the style {theirs!r}, which is "
                        f"not there. Known: {', '.join(_TRANSFORMERS)}. Write a plan of your own: tensor_parallel={{...}}."
                    )
                for p in found:
                    styles.setdefault(p, _TRANSFORMERS[theirs])
                    experts.setdefault(p, theirs)
            whole = [p for p, theirs in experts.items() if theirs == "moe_tp_experts"]
            notes = (
                [f"{', '.join(whole[:3])}{', ...' if whole[3:] else ''}: experts stay whole on each rank of tp"] if whole else []
            )
            return Chosen(styles, f"the plan of {type(module).__name__}", notes)
    return None


def _transformers_plan(module: nn.Module) -> dict[str, str]:
    """Pattern -> transformers' style, of a PreTrainedModel; nothing for other modules."""
    config = getattr(module, "config", None)
    base = getattr(config, "base_model_tp_plan", None)
    own = getattr(module, "_tp_plan", None)
    if not isinstance(base, Mapping) and not isinstance(own, Mapping):
        return {}
    prefix = getattr(module, "base_model_prefix", "")
    inside = prefix if prefix and isinstance(getattr(module, prefix, None), nn.Module) else ""
    plan = {f"{inside}.{k}" if inside else k: v for k, v in (base or {}).items()}
    return plan | dict(own or {})


# -- what its names say -----------------------------------------------------------------------------------------------------
def _by_structure(model: nn.Module, degree: int) -> Chosen:
    chosen = Chosen({}, "")
    styles, kinds = chosen.styles, list[str]()
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise _fused(path, "in_proj_weight", model)
        children = {name: child for name, child in module.named_children() if features_of(child) is not None}
        if _fused_sections(path, module, children, chosen, kinds):
            continue
        for name, child in module.named_children():
            if name in _FUSED and any(True for _ in child.parameters(recurse=False)):
                raise _fused(path, name, model)
        attention = next((names for names in _ATTENTION if all(n in children for n in names)), None)
        if attention is not None:
            styles |= {_join(path, n): "colwise" for n in attention[:-1]} | {_join(path, attention[-1]): "rowwise"}
            _add(kinds, f"attention by {' '.join(attention)}")
            styles |= _head_norms(path, module, _outputs(children[attention[0]]))
            continue
        pair = next((names for names in _FEED_FORWARD if _fits(names, children)), None)
        if pair is not None:
            styles |= {_join(path, n): "colwise" for n in pair[:-1]} | {_join(path, pair[-1]): "rowwise"}
            _add(kinds, f"feed-forward by {' '.join(pair)}")
    if not styles:
        return chosen
    ends, chosen.notes = _ends(model, styles, degree)
    styles |= ends
    chosen.reason = f"chosen by names: {', '.join(kinds)}"
    return chosen


def _fused_sections(path: str, module: nn.Module, children: Mapping[str, nn.Module], chosen: Chosen, kinds: list[str]) -> bool:
    """Give a module with a fused matrix and the one that ends it their styles, the sections by the sizes of both."""
    pair = next(((a, b) for a in _FUSED_ATTENTION for b in _FUSED_ENDS if a in children and b in children), None)
    gated = next((names for names in _FUSED_FEED_FORWARD if all(n in children for n in names)), None)
    if pair is not None:
        first, last = pair
        total, queries = _outputs(children[first]), _inputs(children[last])
        keys, odd = divmod(total - queries, 2)
        if odd or not 0 < keys <= queries:
            return False
        # GPT-NeoX, Bloom and Falcon name theirs so, and have the queries, keys and values of one head side by side.
        by_heads = first == "query_key_value" and keys == queries
        style = "colwise" if by_heads else FusedColumns((queries, keys, keys))
        chosen.styles |= {_join(path, first): style, _join(path, last): "rowwise"}
        size = next((v for v in _numbers(module, _HEAD_DIMS)), None)
        count = next((v for v in _numbers(module, _HEAD_COUNTS)), None)
        size = queries // count if size is None and count is not None else size
        if size is not None:
            chosen.heads[_join(path, first)] = (queries // size, keys // size, keys // size)
        chosen.styles |= _head_norms(path, module, queries)
        _add(kinds, f"attention by {first} {last}")
        return True
    if gated is not None and _outputs(children[gated[0]]) == 2 * _inputs(children[gated[1]]):
        chosen.styles |= {_join(path, gated[0]): FusedColumns(2), _join(path, gated[1]): "rowwise"}
        _add(kinds, f"feed-forward by {' '.join(gated)}")
        return True
    return False


def _numbers(module: nn.Module, names: Iterable[str]) -> Iterator[int]:
    """The attributes of these names that are numbers, of a module and of its config."""
    for place in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(place, name, None), int) and not isinstance(value, bool) and value > 0:
                yield value


def _inputs(module: nn.Module) -> int:
    return (features_of(module) or (0, 0))[0]


def _outputs(module: nn.Module) -> int:
    return (features_of(module) or (0, 0))[1]


def _fits(names: tuple[str, ...], children: Mapping[str, nn.Module]) -> bool:
    if not all(n in children for n in names):
        return False
    return all(_outputs(children[n]) == _inputs(children[names[-1]]) for n in names[:-1])


def _head_norms(path: str, module: nn.Module, queries: int) -> dict[str, str]:
    """Norms of queries and keys inside an attention module: on this rank's heads, if they norm each head."""
    found: dict[str, str] = {}
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if name in _HEAD_NORMS and isinstance(weight, nn.Parameter):
            if weight.numel() == queries:
                raise ConfigError(
                    f"{_join(path, name)} norms all heads together ({weight.numel()} features), and under tensor parallel no "
                    "rank has them all. Write a plan that leaves it whole: tensor_parallel={'layers.*.w1': 'colwise', ...}."
                )
            found[_join(path, name)] = "heads"
    return found


def _ends(model: nn.Module, styles: Mapping[str, Any], degree: int) -> tuple[dict[str, str], list[str]]:
    """The embedding and the head, over the vocabulary, where both of a tied pair can be divided."""
    found: dict[str, str] = {}
    notes: list[str] = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if re.search(r"\.\d+(\.|$)", path) or path in styles:
            continue  # of a block
        if isinstance(module, nn.Embedding) and name in _EMBEDDINGS:
            size, style = module.num_embeddings, "rowwise"
        elif isinstance(module, nn.Linear) and name in _HEADS:
            size, style = module.out_features, "colwise_gather"
        else:
            continue
        if size % degree:
            notes.append(f"{path} stays whole: {size} cannot be divided by {degree}")
        else:
            found[path] = style
    return found, notes


def _fused(path: str, name: str, model: nn.Module) -> ConfigError:
    where = _join(path, name)
    return ConfigError(
        f"{where} of {type(model).__name__} is several matrices in one, and what its sections are cannot be told. A cut straight "
        "through its columns would give a rank parts of some and none of others. Say them: tensor_parallel={'layers.*.qkv': "
        "FusedColumns((queries, keys, values)), 'layers.*.proj': 'rowwise', ...}, sizes in output features; or write Linears of "
        "their own (q_proj, k_proj, v_proj). nn.MultiheadAttention cannot be cut: call F.scaled_dot_product_attention."
    )


# -- what users write -------------------------------------------------------------------------------------------------------
def match_styles(model: nn.Module, patterns: Mapping[str, Any], *, all_match: bool = True) -> dict[str, Any]:
    """Return path -> style of the modules that the patterns name; the first pattern that fits a module counts.

    In a pattern `*` stands for one part of a path ("layers.*.attention.wq"), and `**` for any number of them.
    Args:
        all_match: a pattern without a module is an error. False where the model is a stage of a pipeline, which has a part only.
    Raises:
        ConfigError: a pattern that fits nothing; the nearest path is named.
    """
    found: dict[str, Any] = {}
    for pattern, style in patterns.items():
        paths = list(_matching(model, pattern))
        if not paths and all_match:
            known = [re.sub(r"\b\d+\b", "*", p) for p, _ in model.named_modules() if p]
            raise ConfigError(
                f"tensor_parallel: no module of {type(model).__name__} is called {pattern!r}.{suggest(pattern, known)} `*` "
                "stands for one part of a name, `**` for several. Correct it, or leave it out."
            )
        for path in paths:
            found.setdefault(path, style)
    return found


def _matching(model: nn.Module, pattern: str) -> Iterator[str]:
    parts = [{"*": r"[^.]+", "**": r".+"}.get(part) or re.escape(part).replace(r"\*", r"[^.]*") for part in pattern.split(".")]
    expression = re.compile(r"\.".join(parts))
    return (path for path, _ in model.named_modules() if expression.fullmatch(path))


# -- heads ------------------------------------------------------------------------------------------------------------------
def heads_of(model: nn.Module, path: str, module: nn.Linear) -> int | None:
    """Return how many heads the columns of a query, key or value matrix are, as its attention says; None if it does not."""
    name = path.rpartition(".")[2]
    if not any(name in names[:3] for names in _ATTENTION):
        return None
    owner = _get(model, path.rpartition(".")[0])
    for place in (owner, getattr(owner, "config", None)):
        size = next((v for a in _HEAD_DIMS if isinstance(v := getattr(place, a, None), int) and v > 0), None)
        if size is None and name in QUERIES:
            count = next((v for a in _HEAD_COUNTS if isinstance(v := getattr(place, a, None), int) and v > 0), None)
            if count is not None:
                return count
        if size is not None:
            return module.out_features // size
    return None


def copy_heads(model: nn.Module, chosen: Chosen, ranks: int) -> dict[str, int]:
    """Let keys and values of fewer heads than there are ranks be copied: each rank has those that its queries attend to.

    Returns:
        Path -> heads, of the modules whose style is "copied_heads" now.
    Raises:
        ConfigError: the style was asked for where heads and ranks do not go together.
    """
    copied: dict[str, int] = {}
    for path, style in list(chosen.styles.items()):
        query = _query_of(path)
        if style not in ("colwise", "copied_heads") or query not in chosen.styles:
            continue
        module, queries = model.get_submodule(path), model.get_submodule(query)
        if (
            not isinstance(module, nn.Linear)
            or not isinstance(queries, nn.Linear)
            or not (count := heads_of(model, query, queries))
        ):
            continue
        heads = module.out_features * count // queries.out_features
        fits = 0 < heads < ranks and ranks % heads == 0 and count % ranks == 0
        if fits:
            chosen.styles[path] = "copied_heads"
            copied[path] = heads
            note = f"{heads} heads of keys and values are held whole, and computed by {ranks // heads} ranks each"
            chosen.notes += [] if note in chosen.notes else [note]
        elif style == "copied_heads":
            raise ConfigError(
                f"{path}: 'copied_heads' copies fewer heads than there are ranks, a number that divides them. Here {heads} heads "
                f"of keys and {count} of queries meet tp={ranks}. Use 'colwise', or another tp."
            )
    return copied


def _query_of(path: str) -> str:
    """The path of the queries beside the keys or values at `path`, by the names of one attention; "" where it is none."""
    owner, _, name = path.rpartition(".")
    return next((_join(owner, names[0]) for names in _ATTENTION if name in names[1:3]), "")


def correct_sizes(model: nn.Module, path: str, style: Any, ranks: int) -> None:
    """Correct what the attention around `path` keeps of its own sizes, where the name is known: a forward asks it for its rank's.

    Those of transformers count their heads (OPT, GPT-J, Bloom) or split by `split_size` (GPT-2); groups of queries to a head of
    keys are fewer where those are copied. Whether that was all is seen when the block is tried.
    """
    owner = _get(model, path.rpartition(".")[0])
    key = path.rpartition(".")[2]
    first = key in QUERIES or key in _FUSED_ATTENTION  # once for each attention
    if first and type(owner).__module__.startswith("transformers."):
        for name in _COUNTS:
            if isinstance(count := getattr(owner, name, None), int) and count % ranks == 0:
                setattr(owner, name, count // ranks)
    if isinstance(style, FusedColumns):
        sizes = style.sizes(path, _outputs(_get(model, path)))
        if getattr(owner, "split_size", None) in sizes:
            owner.split_size //= ranks  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
    elif style == "copied_heads" and key in _KEYS:
        heads = _outputs(_get(model, path)), _outputs(_get(model, _query_of(path)))
        for name in _GROUPS:
            if getattr(owner, name, None) == heads[1] // heads[0] and heads[0]:
                size = next(_numbers(owner, _HEAD_DIMS), 1)
                setattr(owner, name, heads[1] // size // ranks)


def _get(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path) if path else model


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _add(kinds: list[str], kind: str) -> None:
    if kind not in kinds:
        kinds.append(kind)
