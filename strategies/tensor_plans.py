"""Which modules are cut which way: the ready plans of tensor parallel, found in a model by what it says itself or by its names.

    choose_styles(model, degree)       -> Chosen(styles={"layers.0.attention.wq": "colwise", ...}, reason="...")
A matrix pair is cut so that only its end talks: the first by columns (each rank has some heads, or some of the hidden features),
the second by rows (each rank has a part of the sum, and one all-reduce adds them up). Found are
    attention     four Linears in one module: wq wk wv wo, q_proj k_proj v_proj o_proj, query key value proj, ...
    feed-forward  w1 w3 w2, gate_proj up_proj down_proj, fc proj, fc1 fc2, linear1 linear2, ...
    the head and the embedding, cut over the vocabulary, where it can be divided
transformers' models have a plan of their own (`base_model_tp_plan`), which is taken first. What is not found stays whole.
Source: Shoeybi et al. 2019, arXiv:1909.08053.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .errors import ConfigError, suggest

__all__ = ["Chosen", "choose_styles", "heads_of", "match_styles"]

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
_FUSED = (
    "qkv",
    "c_attn",
    "qkv_proj",
    "query_key_value",
    "wqkv",
    "Wqkv",
    "W_pack",
    "in_proj",
    "to_qkv",
    "kv_proj",
    "gate_up_proj",
)
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
}


@dataclass
class Chosen:
    """A plan that was found.

    Attributes:
        styles: path of a module -> style.
        reason: in words, for the start-up lines.
        notes: what was left whole, and why.
    """

    styles: dict[str, Any]
    reason: str
    notes: list[str] = field(default_factory=list)


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
            return Chosen(styles, f"the plan of {type(module).__name__}")
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
    styles: dict[str, Any] = {}
    kinds: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise _fused(path, "in_proj_weight", model)
        children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for name, child in module.named_children():
            if name in _FUSED and any(True for _ in child.parameters(recurse=False)):
                raise _fused(path, name, model)
        attention = next((names for names in _ATTENTION if all(n in children for n in names)), None)
        if attention is not None:
            styles |= {_join(path, n): "colwise" for n in attention[:-1]} | {_join(path, attention[-1]): "rowwise"}
            _add(kinds, f"attention by {' '.join(attention)}")
            styles |= _head_norms(path, module, children[attention[0]])
            continue
        pair = next((names for names in _FEED_FORWARD if _fits(names, children)), None)
        if pair is not None:
            styles |= {_join(path, n): "colwise" for n in pair[:-1]} | {_join(path, pair[-1]): "rowwise"}
            _add(kinds, f"feed-forward by {' '.join(pair)}")
    if not styles:
        return Chosen({}, "")
    ends, notes = _ends(model, styles, degree)
    return Chosen(styles | ends, f"chosen by names: {', '.join(kinds)}", notes)


def _fits(names: tuple[str, ...], children: Mapping[str, nn.Linear]) -> bool:
    if not all(n in children for n in names):
        return False
    last = children[names[-1]]
    return all(children[n].out_features == last.in_features for n in names[:-1])


def _head_norms(path: str, module: nn.Module, query: nn.Linear) -> dict[str, str]:
    """Norms of queries and keys inside an attention module: on this rank's heads, if they norm each head."""
    found: dict[str, str] = {}
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if name in _HEAD_NORMS and isinstance(weight, nn.Parameter):
            if weight.numel() == query.out_features:
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
        f"{where} of {type(model).__name__} is several matrices in one (queries, keys and values, or gate and up). A cut "
        f"through its columns would give a rank parts of some and none of others. Write them as Linears of their own (q_proj, "
        f"k_proj, v_proj), or give a plan without it: tensor_parallel={{'layers.*.w1': 'colwise', 'layers.*.w2': 'rowwise'}}."
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
        if size is None and name in {names[0] for names in _ATTENTION}:
            count = next((v for a in _HEAD_COUNTS if isinstance(v := getattr(place, a, None), int) and v > 0), None)
            if count is not None:
                return count
        if size is not None:
            return module.out_features // size
    return None


def _get(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path) if path else model


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _add(kinds: list[str], kind: str) -> None:
    if kind not in kinds:
        kinds.append(kind)
