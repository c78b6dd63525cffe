"""Quantization-aware training: it begins when it should, changes no name, resumes bit for bit, and ends in the same outputs."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.callbacks.quantization import TARGETS, QuantizationAwareTraining, load_quantized
from drivetrain.strategies.errors import CheckpointError, ConfigError, UnknownName
from drivetrain.strategies.fsdp import FSDPStrategy
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "strategies" / "precision"))
from tiny_gpt import TinyGPT, data, train  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")


def fake(model: nn.Module) -> int:
    """How many Linears compute as if they were quantized."""
    return sum(type(m).__name__ == "FakeQuantizedLinear" for m in model.modules())


@pytest.mark.parametrize("target", TARGETS)
def test_losses_leave_those_of_plain_training_at_the_start_step_and_stay_near(target: str, tmp_path: Path) -> None:
    plain = train("fp32", tmp_path / "plain").losses
    losses = train("fp32", tmp_path / "qat", callbacks=[QuantizationAwareTraining(target, start=10)]).losses
    assert losses[:10] == plain[:10]
    assert losses[10] != plain[10]
    assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) < 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_the_file_written_at_the_end_gives_the_outputs_of_the_trained_model(precision: str, tmp_path: Path) -> None:
    callback = QuantizationAwareTraining("int8-int4", start=4)
    run = train(precision, tmp_path, steps=8, callbacks=[callback])
    assert run.model is not None
    (path,) = tmp_path.rglob("quantized.safetensors")
    ids = next(iter(data()))[0]
    other = load_quantized(TinyGPT(), path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert torch.equal(other(ids).float(), run.model(ids).float())
    saved = load_file(path)
    assert {t.dtype for n, t in saved.items() if n.endswith("qdata")} == {torch.int8}
    assert callback.converted


def test_what_was_prepared_and_what_is_converted_compute_the_same() -> None:
    callback, model, ids = QuantizationAwareTraining("int8-int4"), TinyGPT(), next(iter(data()))[0]
    callback.prepare(model)
    with torch.no_grad():
        before = model(ids)
        callback.convert(model)
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("saved_at", [5, 10])
def test_a_resumed_run_goes_on_bit_for_bit(saved_at: int, tmp_path: Path) -> None:
    """Saved before the start, and after it."""

    def callbacks() -> list[Any]:
        return [QuantizationAwareTraining(start=8)]

    whole = train("bf16-mixed", tmp_path / "whole", steps=14, save_every=5, callbacks=callbacks())
    resumed = train("bf16-mixed", tmp_path / "resumed", steps=14, resume=whole.checkpoints[saved_at], callbacks=callbacks())
    assert resumed.losses == whole.losses[saved_at:]


def test_checkpoints_hold_the_plain_weights_under_their_names(tmp_path: Path) -> None:
    run = train("fp32", tmp_path, steps=4, save_every=2, callbacks=[QuantizationAwareTraining()])
    saved: dict[str, torch.Tensor] = {}
    for file in run.checkpoints[4].rglob("*.safetensors"):
        saved |= load_file(file)
    names = {n.removeprefix("model/model/"): t.dtype for n, t in saved.items() if n.startswith("model/")}
    assert names == {n: t.dtype for n, t in TinyGPT().state_dict().items()}


def test_two_ranks_train_as_one(ranks: Any, tmp_path: Path) -> None:
    """Weights have their grids, each token its scale. Sums have another order, which now and then rounds to the next number."""
    single = train("fp32", tmp_path / "one", steps=6, callbacks=[QuantizationAwareTraining(start=3, convert=False)]).losses

    def one_rank() -> list[float]:
        callback = QuantizationAwareTraining(start=3, convert=False)
        return train("fp32", tmp_path / "two", steps=6, batch_size=4, callbacks=[callback]).losses

    first, second = ranks(2, one_rank)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(single, abs=0.01)


def test_the_linears_and_the_random_numbers_are_as_asked() -> None:
    model = TinyGPT()
    state = torch.random.get_rng_state()
    callback = QuantizationAwareTraining(skip=("head", "blocks.1.*"))
    callback.prepare(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert callback.report is not None
    assert callback.report.converted == [f"blocks.0.{n}" for n in ("qkv", "out", "up", "down")]
    assert fake(model) == 4
    assert set(callback.report.skipped.values()) == {"as asked"}


def test_without_conversion_the_model_stays_trainable(tmp_path: Path) -> None:
    run = train("fp32", tmp_path, steps=2, callbacks=[QuantizationAwareTraining(convert=False)])
    assert run.model is not None
    assert fake(run.model) == 9
    assert not list(tmp_path.rglob("quantized.safetensors"))


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: QuantizationAwareTraining("int8-int3"), UnknownName, "Did you mean 'int8-int"),
        (lambda: QuantizationAwareTraining(start="10m"), ConfigError, "a time, which ranks measure differently"),
        (lambda: QuantizationAwareTraining(group_size=7).prepare(nn.Linear(64, 64)), ConfigError, "not multiples of 7"),
        (lambda: QuantizationAwareTraining().convert(TinyGPT()), ConfigError, "after prepare"),
    ],
)
def test_wrong_use_is_told(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


def test_another_low_precision_is_refused_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"7 Linears of TinyGPT multiply in a low precision of their own already"):
        train("fp8-ao", tmp_path, steps=1, callbacks=[QuantizationAwareTraining()])


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    train("fp32", tmp_path, steps=1, callbacks=[QuantizationAwareTraining()])
    (path,) = tmp_path.rglob("quantized.safetensors")
    with pytest.raises(CheckpointError, match="is of another model: "):
        load_quantized(nn.Sequential(nn.Linear(64, 64)), path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="says nothing of quantized tensors"):
        load_quantized(TinyGPT(), tmp_path / "plain.safetensors")


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch's own, of any module whose step returns a view
def test_sharded_ranks_train_as_one_and_write_the_same_kind_of_file(ranks: Any, tmp_path: Path) -> None:
    """Each Linear is a unit of its own here, so its class is fsdp's; it is prepared like the others."""
    single = train("fp32", tmp_path / "one", steps=6, callbacks=[QuantizationAwareTraining(start=3)])

    def one_rank() -> tuple[list[float], bool]:
        callback = QuantizationAwareTraining(start=3)
        strategy: Any = FSDPStrategy(units=[nn.Linear])
        run = train("fp32", tmp_path / "two", steps=6, batch_size=4, strategy=strategy, callbacks=[callback])
        assert callback.report is not None
        assert len(callback.report.converted) == 9
        assert run.model is not None
        assert type(run.model.head).__name__ == "FSDPFakeQuantizedLinear"
        return run.losses, callback.converted

    (first, converted), (second, _) = ranks(2, one_rank)
    assert not converted  # the model stays as it is: in pieces
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(single.losses, abs=0.01)
    (path,) = (tmp_path / "two").rglob("quantized.safetensors")
    other, ids = load_quantized(TinyGPT(), path), next(iter(data()))[0]
    assert single.model is not None
    with torch.no_grad():
        assert (other(ids) - single.model(ids)).norm() / single.model(ids).norm() < 0.05


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_sharded_run_resumes_bit_for_bit_after_the_start(ranks: Any, tmp_path: Path) -> None:
    def one_rank() -> tuple[list[float], list[float]]:
        def run(folder: str, **options: Any) -> Any:
            callbacks = [QuantizationAwareTraining(start=2, convert=False)]
            return train("bf16-mixed", tmp_path / folder, steps=6, batch_size=4, strategy="fsdp", callbacks=callbacks, **options)

        whole = run("whole", save_every=3)
        return whole.losses[3:], run("resumed", resume=whole.checkpoints[3]).losses

    for whole, resumed in ranks(2, one_rank):
        assert whole == resumed
