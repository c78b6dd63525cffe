"""`drivetrain estimate`: what the table says is what the model takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from drivetrain.strategies.errors import ConfigError
from drivetrain.trainer.cli.estimate import estimate, main, parser
from safetensors.torch import save_file


def test_the_options_are_pinned() -> None:
    assert parser().option_names() == ["--dtypes", "--help", "--json", "-h"]


def test_files_are_counted_by_their_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(10, 10), "b": torch.zeros(7)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(3)}, tmp_path / "model-00002-of-00002.safetensors")
    assert main([str(tmp_path), "--dtypes", "fp32", "int4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 110
    assert [row["weights"] for row in found["rows"]] == [440, 55]
    assert [row["training"] for row in found["rows"]] == [1760, None]


def test_a_config_builds_the_model_without_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by hand: 3 blocks of 4*16*16 + 3*16*32 + 2*16, a norm, and two tables of 50*16."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers: pip install transformers")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16}
    config |= {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    block = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    found = estimate(tmp_path, ["float32"])
    assert found["parameters"] == 3 * block + 16 + 2 * 50 * 16
    (row,) = found["rows"]
    assert row["block"] == 4 * block
    assert row["from_disk"] == 4 * (2 * block + 16 + 2 * 50 * 16)
    assert main([str(tmp_path / "config.json")]) == 0
    assert "largest block LlamaDecoderLayer" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "told"), [("nothing", "Nothing is downloaded"), ("dtype", "Did you mean 'bfloat16'")])
def test_what_cannot_be_estimated_is_refused(tmp_path: Path, what: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        estimate(tmp_path, ["float32"] if what == "nothing" else ["bfloat61"])
