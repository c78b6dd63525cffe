"""prepare_pipeline: one model over several processes for inference gives what it gives in one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.contract_models import GPT
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn


def tokens(samples: int) -> Tensor:
    return torch.randint(0, 16, (samples, 8), generator=torch.Generator().manual_seed(samples))


def infer(gather: bool, method: str) -> Any:
    accelerator = Accelerator(device="cpu")
    try:
        model = GPT(layers=4, tied=False).double()
        prepared = getattr(accelerator, method)(model, gather_output=gather, example_args=(tokens(2),))
        held = sum(p.numel() for p in model.parameters() if not p.is_meta)
        return [prepared(tokens(n)) for n in (1, 5, 8)], held, prepared.hf_split_points
    finally:
        accelerator.end_training()


@pytest.mark.parametrize("method", ["prepare_pipeline", "prepare_pippy"])
def test_every_process_has_the_output_of_the_whole_model_and_holds_its_part(method: str, ranks: Any) -> None:
    """Also for fewer samples than there are processes."""
    model = GPT(layers=4, tied=False).double().eval()
    found = ranks(3, infer, True, method)
    for outputs, held, splits in found:
        for output, n in zip(outputs, (1, 5, 8), strict=True):
            torch.testing.assert_close(output, model(tokens(n)).detach(), rtol=1e-12, atol=1e-12)
        assert held < 0.6 * sum(p.numel() for p in model.parameters())
        assert splits == found[0][2]
    assert sum(held for _, held, _ in found) == sum(p.numel() for p in model.parameters())


def test_without_gathering_only_the_last_process_has_it(ranks: Any) -> None:
    first, last = ranks(2, infer, False, "prepare_pipeline")
    assert first[0] == [None, None, None]
    assert [tuple(t.shape) for t in last[0]] == [(n, 8, 16) for n in (1, 5, 8)]


def splits() -> tuple[Any, ...]:
    accelerator = Accelerator(device="cpu")
    try:
        body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        prepared = accelerator.prepare_pipeline(body, ["4"])
        messages = []
        for call in (
            lambda: body(torch.ones(1, 4)),
            lambda: torch.save(body.state_dict(), io.BytesIO()),
            lambda: accelerator.prepare_pipeline(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["nothing"]),
        ):
            with pytest.raises(ConfigError) as error:
                call()
            messages.append(str(error.value))
        return prepared.explain(), *messages
    finally:
        accelerator.end_training()


def test_splits_by_name_and_the_model_itself_is_not_to_be_called(ranks: Any) -> None:
    rows, called, saved, unknown = ranks(2, splits)[0]
    assert ("stage 1", "rank 1 of pp: 4 (1 parts, 20% of the cost)") in rows
    assert "no rank has all of it" in called
    assert "another stage of the pipeline holds" in saved
    assert "'nothing'" in unknown


def test_one_process_is_refused() -> None:
    accelerator = Accelerator(device="cpu")
    with pytest.raises(ConfigError, match="there is one"):
        accelerator.prepare_pipeline(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    accelerator.end_training()
