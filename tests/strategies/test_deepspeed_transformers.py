"""transformers' from_pretrained fills a model that is born in pieces. The model is tiny, and made here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, DeepSpeedStrategy
from drivetrain.strategies.deepspeed_engine import library

pytestmark = [
    pytest.mark.slow,  # importing transformers takes seconds
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOKENS = torch.arange(24).reshape(4, 6)


def tiny(tied: bool) -> Any:
    transformers: Any = pytest.importorskip("transformers", reason="waits for transformers (pip install transformers)")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied))


def stepped(folder: Path) -> tuple[bool, list[int], float, dict[str, list[float]], dict[str, list[float]]]:
    from transformers import AutoModelForCausalLM

    accelerator = Accelerator(strategy=DeepSpeedStrategy(stage=3, stage3_param_persistence_threshold=0))
    with accelerator.strategy.init_context():
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    parameters = list(model.parameters())
    here = [p.ds_tensor.numel() if hasattr(p, "ds_tensor") else -1 for p in parameters]
    fresh: Any = AutoModelForCausalLM.from_pretrained(folder)
    whole = not any(hasattr(p, "ds_id") for p in fresh.parameters())
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = {n: t.flatten().tolist() for n, t in accelerator.get_state_dict(model).items()}
    rows = TOKENS[accelerator.process_index :: accelerator.num_processes]
    loss = model(rows, labels=rows).loss
    accelerator.backward(loss)
    optimizer.step()
    after = {n: t.flatten().tolist() for n, t in accelerator.get_state_dict(model).items()}
    mean = float(accelerator.reduce(loss.detach(), "mean"))
    accelerator.end_training()
    return whole, here, mean, before, after


@pytest.mark.parametrize("tied", [False, True])
def test_a_pretrained_model_is_filled_in_pieces_and_trains(tied: bool, ranks: Any, tmp_path: Path) -> None:
    library(torch.device("cpu"))
    model = tiny(tied)
    model.save_pretrained(tmp_path)
    whole, here, loss, before, after = ranks(2, stepped, tmp_path, timeout=120)[0]
    assert whole, "outside the context models are built whole"
    assert here == [-(-p.numel() // 2) for p in model.parameters()]
    assert before == {n: t.flatten().tolist() for n, t in model.state_dict().items()}
    truth = model(TOKENS, labels=TOKENS).loss
    truth.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert loss == pytest.approx(truth.item(), rel=1e-5)
    for name, weight in model.state_dict().items():
        assert after[name] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-5), name


LATE = """
import torch
from drivetrain import Accelerator, DeepSpeedStrategy
from drivetrain.strategies.errors import ConfigError
accelerator = Accelerator(strategy=DeepSpeedStrategy(stage=3))
try:
    with accelerator.strategy.init_context():
        import transformers.modeling_utils
except ConfigError as error:
    print(error)
accelerator.end_training()
"""


def test_transformers_that_was_imported_too_late_is_said() -> None:
    pytest.importorskip("transformers", reason="waits for transformers (pip install transformers)")
    found = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=200, check=False)
    assert "Import it at the top of the file" in found.stdout, found.stderr[-2000:]
