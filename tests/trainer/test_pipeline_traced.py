"""prepare_pipeline for models that are no chain: traced by torch.export; and every option of Accelerate's prepare_pippy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Accelerator
from drivetrain.strategies.contract_models import GPT
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> None:
    """What torch.export imports at its first use takes seconds: here once, and not in every process of every test."""
    torch.export.export(nn.Linear(1, 1), (torch.ones(1, 1),))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        return x + self.down(F.gelu(self.up(x))) * mask[..., None] * scale


class Crossing(nn.Module):
    """Each block takes the mask; the first embedding comes back at the end, and so does its table as the head."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(8))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Any]:
        if mask is None:
            mask = torch.ones(tokens.shape, device=tokens.device)
        first = self.embed(tokens)
        x = first + self.offset
        for layer in self.layers:
            x = layer(x, mask, scale)
        low, high = (x + first).chunk(2, dim=-1)
        return {"logits": self.head(torch.cat([high, low], -1)), "rest": (low.sum(-1), None)}


def inputs(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 11, (n, 6), generator=generator), torch.rand(n, 6, generator=generator)


def infer(**options: Any) -> Any:
    accelerator = Accelerator(device="cpu")
    try:
        model = Crossing()
        tokens, mask = inputs(4)
        options = {"example_args": (tokens,), "example_kwargs": {"mask": mask, "scale": 0.5}, **options}
        prepared = accelerator.prepare_pipeline(model, **options)
        held = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values() if p.numel() and not p.is_meta)
        outputs = [prepared(a, mask=b, scale=0.5) for a, b in map(inputs, (4, 1, 7, 12))]
        said = []
        for call in (
            lambda: model(tokens, mask),
            lambda: prepared(tokens, mask),
            lambda: prepared(torch.ones(2, 9).long(), mask=torch.ones(2, 9), scale=0.5),
        ):
            with pytest.raises(ConfigError) as error:
                call()
            said.append(str(error.value))
        return outputs, held, prepared.hf_split_points, prepared.explain(), said
    except ConfigError as refusal:
        return str(refusal)
    finally:
        accelerator.end_training()


def test_a_model_that_is_no_chain_gives_what_it_gives_in_one_process(ranks: Any) -> None:
    """A mask for every block, a residual over all stages, a tied head; batches that the chunks do not divide are padded."""
    model = Crossing().eval()
    total = sum(p.numel() for p in model.parameters())
    for outputs, held, splits, rows, said in ranks(2, infer):
        for output, n in zip(outputs, (4, 1, 7, 12), strict=True):
            tokens, mask = inputs(n)
            with torch.no_grad():
                truth = model(tokens, mask, scale=0.5)
            torch.testing.assert_close(output["logits"], truth["logits"], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(output["rest"][0], truth["rest"][0], rtol=1e-6, atol=1e-6)
            assert output["rest"][1] is None
        assert held < 0.75 * total
        assert splits in (["layers.2"], ["layers.3"])
        assert any(key == "traced" and splits[0] in value for key, value in rows)
        called, other, shape = said
        assert "no rank has all of it" in called
        assert "traced with the arguments" in other
        assert "(samples, 6)" in shape


@pytest.mark.slow
def test_named_splits_are_taken_and_only_the_last_process_has_the_output(ranks: Any) -> None:
    first, second, third = ranks(3, infer, split_points=["layers.1", "layers.4"], gather_output=False, num_chunks=4)
    assert first[0] == second[0] == [None] * 4
    assert first[2] == ["layers.1", "layers.4"]
    model = Crossing().eval()
    for output, n in zip(third[0], (4, 1, 7, 12), strict=True):
        tokens, mask = inputs(n)
        torch.testing.assert_close(output["logits"], model(tokens, mask, scale=0.5)["logits"].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"split_points": ["layers.9"]}, "Did you mean 'layers."),
        *(
            pytest.param(options, why, marks=pytest.mark.slow)
            for options, why in (
                ({"split_points": ["layers.1", "layers.2"]}, "Name 1, or say 'auto'"),
                ({"split_points": ["embed"]}, "leaves the first empty"),
                ({"split_points": "measure"}, "no chain"),
                ({"example_args": (), "example_kwargs": None}, "example_args"),
                ({"no_split_module_classes": ["Blok"]}, "Blok"),
            )
        ),
    ],
)
def test_what_cannot_be_traced_or_cut_is_refused_by_name(options: dict[str, Any], why: str, ranks: Any) -> None:
    for said in ranks(2, infer, **options):
        assert isinstance(said, str)
        assert why in said


class Pair(nn.Sequential):
    """Two layers that belong together."""


def kept_together(**options: Any) -> Any:
    accelerator = Accelerator(device="cpu")
    try:
        torch.manual_seed(0)
        sizes = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)]
        model = nn.Sequential(*sizes, Pair(nn.Linear(8, 8), nn.Linear(8, 8)))
        prepared = accelerator.prepare_pipeline(model, **options)
        return prepared.hf_split_points, prepared(torch.ones(2, 8))
    except ConfigError as refusal:
        return str(refusal)
    finally:
        accelerator.end_training()


def test_no_stage_begins_inside_of_a_class_that_shall_not_be_split(ranks: Any) -> None:
    splits, _ = ranks(3, kept_together, split_points="auto", no_split_module_classes="Pair")[0]
    assert not any(name.startswith("3.") and name != "3.0" for name in splits)
    assert len(splits) == 2
    assert "Did you mean 'Pair'" in ranks(2, kept_together, no_split_module_classes=["Pairs"])[0]


def by_name() -> Any:
    accelerator = Accelerator(device="cpu")
    model = GPT(layers=4, tied=True).double()
    tokens = torch.randint(0, 16, (5, 8), generator=torch.Generator().manual_seed(1))
    prepared = accelerator.prepare_pipeline(model, "measure", example_kwargs={"x": tokens})
    output = prepared(x=tokens)
    with pytest.raises(ConfigError) as error:
        prepared(y=tokens)
    accelerator.end_training()
    return output, str(error.value), prepared.explain()


def test_a_chain_is_called_by_name_too_and_cut_by_measured_time(ranks: Any) -> None:
    tokens = torch.randint(0, 16, (5, 8), generator=torch.Generator().manual_seed(1))
    truth = GPT(layers=4, tied=True).double()(tokens).detach()
    for output, said, rows in ranks(2, by_name):
        torch.testing.assert_close(output, truth, rtol=1e-12, atol=1e-12)
        assert "unexpected keyword argument 'y'" in said or "missing a required argument: 'x'" in said
        assert any(key == "splits" and "measured time" in value for key, value in rows)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False, tie_word_embeddings=True))


def transformers_model(gather: bool) -> Any:
    accelerator = Accelerator(device="cpu")
    tokens = torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    words = {"gather_output": True} if gather else {}
    prepared = accelerator.prepare_pippy(llama(), "auto", None, (), {"input_ids": tokens, "attention_mask": mask}, **words)
    output = prepared(input_ids=tokens, attention_mask=mask)
    accelerator.end_training()
    return None if output is None else (type(output).__name__, output.logits, prepared.hf_split_points)


@pytest.mark.slow
@pytest.mark.parametrize("gather", [False, True])
def test_a_model_of_transformers_is_cut_and_answers_with_its_own_class(gather: bool, ranks: Any) -> None:
    """As from accelerate.inference, the last process alone has the output if nothing was said."""
    pytest.importorskip("transformers")
    tokens = torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(1))
    truth = llama().eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.detach()
    found = ranks(2, transformers_model, gather, timeout=120)
    assert [one is not None for one in found] == [gather, True]
    for name, logits, splits in filter(None, found):
        assert name == "CausalLMOutputWithPast"
        torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-5)
        assert splits[0].startswith("model.layers.")
