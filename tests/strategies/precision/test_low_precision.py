"""Every low precision that a CPU can do, against bf16 on the same data: near it, not equal to it, and resumed bit for bit."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Callback
from drivetrain.strategies.base import Strategy, make_precision
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.precision.float8_ao import Float8AO, Float8Recipe
from drivetrain.strategies.precision.linears import LinearPrecision, LowPrecisionLinear, restore
from drivetrain.strategies.registry import PRECISIONS
from drivetrain.strategies.world import World
from safetensors.torch import load_file
from tiny_gpt import StagedGPT, TinyGPT, data, train

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")

# name -> how far a loss may be from bf16's, in the first 24 steps, in which it falls from 4.3 to 1.9 or so.
TOLERANCE = {
    "fp8-ao": 0.05,
    "fp8-ao-rowwise": 0.05,
    "fp8-ao-rowwise-gw-hp": 0.05,
    "mxfp8-ao": 0.05,
    "int8-ao": 0.03,
    "int8-weights-ao": 0.15,
    "bitnet-ao": 1.0,
}
NAMES = sorted(TOLERANCE)
PLAIN = [n for n in NAMES if n != "int8-weights-ao"]  # what keeps plain weights


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train("bf16-mixed", tmp_path_factory.mktemp("bf16")).losses


def test_every_backend_of_torchao_is_in_this_table() -> None:
    """nvfp4-ao is the one that trains nowhere yet."""
    assert {n for n in PRECISIONS if n.partition(":")[0].endswith("-ao") or "-ao-" in n} - {"nvfp4-ao"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_near_those_of_bf16_and_not_equal_to_them(name: str, bf16: list[float], tmp_path: Path) -> None:
    """Equal losses would mean that the backend does nothing."""
    losses = train(name, tmp_path).losses
    assert losses != bf16
    assert max(abs(a - b) for a, b in zip(losses, bf16, strict=True)) < TOLERANCE[name]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = train(name, tmp_path / "whole", save_every=10)
    resumed = train(name, tmp_path / "resumed", resume=whole.checkpoints[10])
    assert resumed.losses == whole.losses[10:]
    assert all(torch.equal(resumed.weights[n], w) for n, w in whole.weights.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_plain_tensors_under_the_names_of_the_model(name: str, tmp_path: Path) -> None:
    """Int8 weights are two tensors each; every other backend leaves what is saved as it is."""
    run = train(name, tmp_path, steps=1, save_every=1)
    saved: dict[str, torch.Tensor] = {}
    for file in run.checkpoints[1].rglob("*.safetensors"):
        saved |= load_file(file)
    names = {n.removeprefix("model/model/") for n in saved if n.startswith("model/")}
    plain = set(TinyGPT().state_dict())
    if name == "int8-weights-ao":
        split = {n.removesuffix(".int8") for n in names if n.endswith(".int8")}
        assert len(split) == 7
        assert names == plain - split | {f"{n}.{part}" for n in split for part in ("int8", "scale")}
        assert {saved[f"model/model/{n}.int8"].dtype for n in split} == {torch.int8}
    else:
        assert names == plain
    assert {type(t) for t in saved.values()} == {torch.Tensor}
    json.loads((run.checkpoints[1] / "manifest.json").read_text())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch's own, of any module whose step returns a view
@pytest.mark.parametrize(
    ("name", "strategy"), [(n, s) for n in NAMES for s in ("ddp", "fsdp") if (n, s) != ("int8-weights-ao", "fsdp")]
)
def test_two_ranks_train_near_one_and_resume_bit_for_bit(name: str, strategy: str, ranks: Any, tmp_path: Path) -> None:
    """Each rank scales by its own half of the batch, so the losses are near, not equal: the limit is that against bf16."""
    single = train(name, tmp_path / "single", steps=8)

    def one_rank() -> tuple[list[float], list[float]]:
        run = train(name, tmp_path / "two", steps=8, batch_size=4, strategy=strategy, save_every=4)
        resumed = train(name, tmp_path / "resumed", steps=8, batch_size=4, strategy=strategy, resume=run.checkpoints[4])
        return run.losses, resumed.losses

    (first, resumed_first), (second, resumed_second) = ranks(2, one_rank, timeout=120)
    assert (resumed_first, resumed_second) == (first[4:], second[4:])
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert max(abs(a - b) for a, b in zip(mean, single.losses, strict=True)) < TOLERANCE[name]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("skip", [(), ("head",), ("blocks.1.*", "head")])
def test_stages_of_a_pipeline_convert_what_the_whole_model_converts(skip: tuple[str, ...], ranks: Any, tmp_path: Path) -> None:
    """The first and last Linear of a stage are none of the model's, a pattern need not meet a Linear of each stage."""

    def make() -> Float8AO:
        return Float8AO(Float8Recipe(skip=skip))

    def one_rank(strategy: str) -> tuple[list[float], list[str]]:
        precision = make()
        losses = train(precision, tmp_path, steps=4, strategy=strategy, model=StagedGPT()).losses
        return losses, [n for report in precision.reports for n in report.converted]

    truth, wanted = one_rank("single")
    found = ranks(2, one_rank, "pp:2", timeout=120)
    assert sorted(n for _, names in found for n in names) == sorted(wanted)
    assert all(losses == pytest.approx(truth, abs=0.02) for losses, _ in found)  # each chunk of a batch has scales of its own


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_of_ddp_hold_the_same_weights(name: str, ranks: Any, tmp_path: Path) -> None:
    def one_rank() -> float:
        run = train(name, tmp_path, steps=4, batch_size=4)
        return float(sum(w.double().abs().sum() for w in run.weights.values()))

    first, second = ranks(2, one_rank)
    assert first == second


@pytest.mark.parametrize("strategy", ["fsdp", "tp:2"])
def test_int8_weights_are_not_cut_up(strategy: str, ranks: Any, tmp_path: Path) -> None:
    def one_rank() -> str:
        with pytest.raises(ConfigError) as refusal:
            train("int8-weights-ao", tmp_path, steps=1, strategy=strategy)
        return str(refusal.value)

    for told in ranks(2, one_rank):
        assert "blocks.0.out.weight of model 'model' is quantised (Int8QuantizedTrainingLinearWeight)" in told
        assert "'int8-ao'" in told


class Draws(Callback):
    """Random numbers of each rank, as dropout draws them."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(1 + trainer.world.rank)


def test_int8_weights_of_ranks_that_began_apart_are_those_of_rank_0(ranks: Any, tmp_path: Path) -> None:
    """And they are rounded alike, whatever the ranks draw."""

    def one_rank() -> list[str]:
        rank = World.start().rank
        model = TinyGPT()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * rank)
        run = train("int8-weights-ao", tmp_path, steps=3, batch_size=4, strategy="ddp", model=model, callbacks=[Draws()])
        return [hashlib.sha256(w.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for w in run.weights.values()]

    first, second = ranks(2, one_rank)
    assert first == second


def test_linears_that_are_cut_by_tensor_parallel_are_refused(ranks: Any, tmp_path: Path) -> None:
    """One scale for each row: a rank has rows of its own, or parts of rows. One for the whole matrix: test_split_linears.py."""
    from drivetrain.strategies.mesh import ParallelPlan
    from drivetrain.strategies.parallel import ParallelStrategy

    def one_rank() -> str:
        plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
        strategy: Any = ParallelStrategy(plan=ParallelPlan(tp=2), tensor_parallel=plan)
        with pytest.raises(ConfigError) as refusal:
            train("fp8-ao-rowwise", tmp_path, steps=1, strategy=strategy)
        return str(refusal.value)

    for told in ranks(2, one_rank):
        assert "blocks.0.up" in told
        assert "one scale a tensor" in told


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at each input,
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # and makes one of every autograd.Function
@pytest.mark.parametrize("name", PLAIN)
def test_compiled_blocks_give_the_losses_of_eager_ones(name: str, tmp_path: Path) -> None:
    """The converted Linears are inside the graphs, whole: no break, and at least one frame was compiled."""
    torch._dynamo.reset()  # pyright: ignore[reportAttributeAccessIssue]
    torch._dynamo.utils.counters.clear()  # pyright: ignore[reportAttributeAccessIssue]
    eager = train(name, tmp_path / "eager", steps=3).losses

    def compiled(block: torch.nn.Module) -> None:
        block.compile(backend="aot_eager", fullgraph=True)

    losses = train(name, tmp_path / "compiled", steps=3, model=TinyGPT(compile_blocks=compiled)).losses
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # pyright: ignore[reportAttributeAccessIssue]
    assert losses == pytest.approx(eager, abs=0.01)


class Nothing:
    """A product that was silently not replaced."""

    def __init__(self, instead_of: Any) -> None:
        self.multiple, self.formats = instead_of.multiple, instead_of.formats

    def __call__(self, input: Any, weight: Any) -> Any:
        return torch.nn.functional.linear(input, weight.to(input.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_of_torchao_that_does_nothing_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    precision: Any = make_precision(name)
    monkeypatch.setattr(precision, "make_matmul", lambda device: Nothing(type(precision).make_matmul(precision, device)))
    with pytest.raises(
        ConfigError, match=r"blocks\.0\.out of TinyGPT, 64x64, gives the output and gradients of bf16 bit for bit"
    ):
        precision.convert(TinyGPT())


@pytest.mark.parametrize("factor", [None, 2.0])
def test_int8_weights_that_are_stored_wrongly_are_found_out(factor: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before the weights are replaced multiplies rounded ones; this one what was stored."""
    from drivetrain.strategies.precision import quantized

    def wrong(matmul: Any, input: Any, weight: Any) -> Any:
        if not isinstance(weight, matmul.weight_class):
            return real(matmul, input, weight)
        return input @ plain.to(input.dtype).T if factor is None else real(matmul, input, weight) * factor

    real, model = quantized.Int8WeightMatmul.__call__, TinyGPT()
    plain: Any = model.blocks[0].out.weight.detach().clone()  # type: ignore[union-attr]
    monkeypatch.setattr(quantized.Int8WeightMatmul, "__call__", wrong)
    says = "gives the output of bf16 bit for bit" if factor is None else "is off by .* once its weight is stored"
    with pytest.raises(ConfigError, match=says):
        make_precision("int8-weights-ao").convert(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_last_batch_is_padded_without_a_change_of_the_others(name: str) -> None:
    """Rows of zeros change no scale and no product: a batch gives the same output with and without another that pads it."""
    torch.manual_seed(0)
    model = converted(name, torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)), skip_first_and_last=False)
    linear = model[0]
    assert isinstance(linear, LowPrecisionLinear)
    x = torch.randn(5, 64)
    full = torch.cat([x, torch.zeros(-5 % linear.matmul.multiple, 64)])
    assert torch.equal(linear(x), linear(full)[:5])
    assert linear(x[0]).shape == (32,)
    assert linear(x.view(1, 5, 64)).shape == (1, 5, 32)


def converted(name: str, model: torch.nn.Module, **choice: Any) -> Any:
    precision = make_precision(name)
    assert isinstance(precision, LinearPrecision)
    options = type(precision.choice)(**choice)
    precision = type(precision)(options)  # pyright: ignore[reportCallIssue]
    strategy = Strategy(precision=precision)
    strategy.start(World.single())
    return strategy.prepare_model("model", model)


@pytest.mark.parametrize("name", PLAIN)
def test_the_model_can_be_had_back(name: str) -> None:
    model = converted(name, TinyGPT())
    before = {n: type(m) for n, m in TinyGPT().named_modules()}
    assert restore(model) == 7
    assert {n: type(m) for n, m in model.named_modules()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_steps_end_near_bf16(name: str, tmp_path: Path) -> None:
    reference = train("bf16-mixed", tmp_path / "bf16", steps=200).losses
    losses = train(name, tmp_path / name, steps=200).losses
    assert sum(losses[-20:]) / 20 == pytest.approx(sum(reference[-20:]) / 20, abs=TOLERANCE[name])
    assert len(data()) == 8
