"""What save_model writes is read by transformers, and the other way round. The model is tiny, and made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator

pytestmark = [
    pytest.mark.slow,  # importing transformers takes seconds
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def tiny(*, tied: bool) -> tuple[Any, Any]:
    """Return (transformers, a causal Llama of two layers, initialised at random)."""
    transformers: Any = pytest.importorskip("transformers", reason="waits for transformers (pip install transformers)")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers, transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_transformers_reads_what_save_model_wrote(size: str, tied: bool, tmp_path: Path) -> None:
    transformers, model = tiny(tied=tied)
    accelerator = Accelerator(device="cpu")
    prepared = accelerator.prepare(model)
    accelerator.save_model(prepared, tmp_path, max_shard_size=size)
    model.config.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
    assert ("model.safetensors.index.json" in files) == (size == "20KB")
    if size == "20KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {f for f in files if f.endswith(".safetensors")}
        assert ("lm_head.weight" in index["weight_map"]) == (not tied)
    read, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = model.state_dict(), read.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body.embed_tokens.weight, model.model.embed_tokens.weight)
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(read(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_load_model_reads_what_save_pretrained_wrote(size: str, tied: bool, tmp_path: Path) -> None:
    _, model = tiny(tied=tied)
    model.save_pretrained(tmp_path, max_shard_size=size)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator = Accelerator(device="cpu")
    prepared = accelerator.prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert accelerator.load_model(prepared, tmp_path) == []
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
