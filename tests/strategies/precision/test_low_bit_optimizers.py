"""AdamW with 8-bit, 4-bit and float8 state: near torch's AdamW, a fraction of its state, saved as plain tensors."""

from __future__ import annotations

import copy
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.precision.low_bit_optimizers import LowBitAdamW
from drivetrain.strategies.world import World
from tiny_gpt import TinyGPT, train
from torch import nn

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")
# bits -> (how far a loss may be from that of torch's AdamW, bytes of state for each number and moment, at most)
FORMATS = {8: (0.02, 1.05), 4: (0.3, 0.55), "fp8": (0.05, 1.05)}
ADAMW = partial(torch.optim.AdamW, lr=3e-3)


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train("fp32", tmp_path_factory.mktemp("adamw"), model=TinyGPT(ADAMW)).losses


@pytest.mark.parametrize("bits", FORMATS)
def test_losses_are_near_those_of_adamw_and_not_equal(bits: int | str, adamw: list[float], tmp_path: Path) -> None:
    losses = train("fp32", tmp_path, model=TinyGPT(partial(LowBitAdamW, lr=3e-3, bits=bits))).losses
    assert losses[0] == adamw[0]
    assert losses != adamw
    assert max(abs(a - b) for a, b in zip(losses, adamw, strict=True)) < FORMATS[bits][0]


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("precision", ["fp32", "bf16-true", "fp8-ao"])
def test_a_resumed_run_goes_on_bit_for_bit(bits: int | str, precision: str, tmp_path: Path) -> None:
    """Under bf16-true too, where torch would round the fp32 scales to the dtype of the weights."""
    make = partial(LowBitAdamW, lr=3e-3, bits=bits)
    whole = train(precision, tmp_path / "whole", steps=12, save_every=6, model=TinyGPT(make))
    resumed = train(precision, tmp_path / "resumed", steps=12, resume=whole.checkpoints[6], model=TinyGPT(make))
    assert resumed.losses == whole.losses[6:]
    assert all(torch.equal(resumed.weights[n], w) for n, w in whole.weights.items())


def stepped(bits: int | str, **options: Any) -> tuple[nn.Linear, LowBitAdamW]:
    torch.manual_seed(0)
    model = nn.Linear(128, 64)
    optimizer = LowBitAdamW(model.parameters(), bits=bits, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("bits", FORMATS)
def test_the_state_is_plain_tensors_of_few_bits(bits: int | str) -> None:
    model, optimizer = stepped(bits)
    state = optimizer.state[model.weight]
    assert {type(t) for t in state.values()} == {torch.Tensor}
    num_bytes = sum(t.numel() * t.element_size() for n, t in state.items() if n != "step")
    assert num_bytes / model.weight.numel() / 2 < FORMATS[bits][1]
    assert set(optimizer.state[model.bias]) == {"step", "exp_avg", "exp_avg_sq"}  # too small to be worth it


def test_it_computes_what_the_class_of_torchao_does() -> None:
    """The same function over the same formats; torchao's own class compiles it, so it is called here as it is there."""
    from drivetrain.strategies.precision import _torchao

    adam: Any = _torchao.load("optim.adam", wanted_by="the test")
    model, _ = stepped(8, lr=1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    other = nn.Linear(128, 64)
    theirs = adam.AdamW8bit(other.parameters(), lr=1e-2, weight_decay=0.1)
    states: dict[Any, Any] = {p: (theirs._new_buffer(p, True), theirs._new_buffer(p, False)) for p in other.parameters()}
    for step in (1, 2, 3):
        other.zero_grad()
        other(torch.randn(8, 128)).square().mean().backward()
        for p in other.parameters():
            moments, rate = states[p], torch.tensor(1e-2)
            with torch.no_grad():
                adam.single_param_adam(
                    p, p.grad, torch.tensor(float(step)), *moments, None, rate, 0.9, 0.999, 0.1, 1e-8, True, False
                )
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize(
    ("bits", "eps", "bounded"), [(32, None, True), ("fp8", None, True), ("fp8", 1e-8, False), (8, None, False)]
)
def test_a_rare_row_of_an_embedding_needs_a_larger_eps_or_fp32_state(bits: int | str, eps: float | None, bounded: bool) -> None:
    """Beside a frequent row its second moment is rounded to 0; once it has no gradient, only eps is left to divide by."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = LowBitAdamW([weight], lr=1.0, weight_decay=0.0, bits=bits, eps=eps)
    weight.grad = torch.ones(64, 64)
    weight.grad[1] = 1e-4
    optimizer.step()
    before = weight[1].detach().clone()
    weight.grad[1] = 0.0
    optimizer.step()
    assert ((weight[1] - before).abs().max().item() < 10) == bounded  # in units of the learning rate; unbounded, thousands


def test_a_group_may_have_bits_of_its_own() -> None:
    tables, others = nn.Embedding(128, 64), nn.Linear(64, 64)
    optimizer = LowBitAdamW([{"params": tables.parameters(), "bits": 32}, {"params": others.parameters()}])
    others(tables(torch.arange(8))).sum().backward()
    optimizer.step()
    assert set(optimizer.state[tables.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[others.weight]["exp_avg.codes"].dtype == torch.uint8


def test_a_copied_state_goes_on_as_the_original() -> None:
    model, optimizer = stepped(8)
    optimizer.zero_grad()
    other = copy.deepcopy(model)
    taken = LowBitAdamW(other.parameters(), bits=8)
    taken.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, taken)):
        m(torch.ones(8, 128)).square().mean().backward()
        o.step()
    assert torch.equal(model.weight, other.weight)


def test_two_ranks_train_near_one(ranks: Any, tmp_path: Path) -> None:
    """The gradients differ in their last bits, which now and then rounds a moment to the next of its 256 values."""
    make = partial(LowBitAdamW, lr=3e-3)
    single = train("fp32", tmp_path / "one", steps=6, model=TinyGPT(make)).losses

    def one_rank() -> list[float]:
        return train("fp32", tmp_path / "two", steps=6, batch_size=4, model=TinyGPT(make)).losses

    first, second = ranks(2, one_rank)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(single, abs=5e-3)


FSDP = "ignore:FSDP2-wrapped module"  # torch's own, of any module whose step returns a view


@pytest.mark.filterwarnings(FSDP)
@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow), pytest.param("fp8", marks=pytest.mark.slow)])
def test_two_ranks_of_fsdp_train_near_one_and_resume_bit_for_bit(bits: int | str, ranks: Any, tmp_path: Path) -> None:
    """Each updates its rows in the blocks that one process has; their checkpoint is read by two, by one and by ddp."""
    make = partial(LowBitAdamW, lr=3e-3, bits=bits)
    single = train("fp32", tmp_path / "one", steps=8, save_every=4, model=TinyGPT(make))

    def one_rank() -> tuple[list[float], list[float], list[float], dict[str, Any]]:
        options: dict[str, Any] = {"steps": 8, "batch_size": 4, "strategy": "fsdp"}
        whole = train("fp32", tmp_path / "two", save_every=4, model=TinyGPT(make), **options)
        again = train("fp32", tmp_path / "again", resume=whole.checkpoints[4], model=TinyGPT(make), **options)
        from_one = train("fp32", tmp_path / "from", resume=single.checkpoints[4], model=TinyGPT(make), **options)
        same = all(torch.equal(again.weights[n].full_tensor(), w.full_tensor()) for n, w in whole.weights.items())  # type: ignore[attr-defined]
        return whole.losses, again.losses, from_one.losses, {"same": same, "at": str(whole.checkpoints[4])}

    first, second = ranks(2, one_rank, timeout=180)
    for losses, again, _, more in (first, second):
        assert again == losses[4:]
        assert more["same"]
    mean = [(a + b) / 2 for a, b in zip(first[0], second[0], strict=True)]
    assert mean == pytest.approx(single.losses, abs=FORMATS[bits][0])
    # The bytes of its blocks are those of one process, so one goes on where two were, and two where one was.
    to_one = train("fp32", tmp_path / "to", steps=8, resume=Path(first[3]["at"]), model=TinyGPT(make)).losses
    assert to_one == pytest.approx(mean[4:], abs=FORMATS[bits][0])
    assert [(a + b) / 2 for a, b in zip(first[2], second[2], strict=True)] == pytest.approx(
        single.losses[4:], abs=FORMATS[bits][0]
    )


SHAPES = [(64, 64), (10, 512), (9, 1024), (128, 96), (8192,), (32, 8, 4, 8), (3, 2048)]


@pytest.mark.parametrize("bits", FORMATS)
def test_the_blocks_of_four_ranks_are_those_of_one(bits: int | str, ranks: Any, tmp_path: Path) -> None:
    """Given the same gradients, weights and state equal one process's bit for bit: uneven rows, empty pieces, four dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    def values(seed: int) -> list[torch.Tensor]:
        own = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=own) for shape in SHAPES]

    def steps(parameters: list[nn.Parameter], cut: Any) -> LowBitAdamW:
        optimizer = LowBitAdamW(parameters, lr=1e-2, bits=bits)
        for step in (1, 2, 3):
            for p, grad in zip(parameters, values(step), strict=True):
                p.grad = cut(grad)
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return optimizer

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        # gloo gathers no float8
        if not isinstance(tensor, DTensor):
            return tensor
        local = tensor.to_local()
        narrow = local.dtype.itemsize == 1
        made: Any = DTensor.from_local(
            local.view(torch.uint8) if narrow else local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return made.full_tensor().view(local.dtype)

    def one_rank() -> list[str]:
        World.start()
        mesh = init_device_mesh("cpu", (4,))
        cut = lambda t: distribute_tensor(t, mesh, [Shard(0)])  # noqa: E731
        truth = [nn.Parameter(v) for v in values(0)]
        pieces = [nn.Parameter(cut(v)) for v in values(0)]
        a, b = steps(truth, lambda t: t), steps(pieces, cut)
        wrong = []
        for p, q in zip(truth, pieces, strict=True):
            pairs = {"weight": (p.detach(), q.detach())} | {k: (t, b.state[q][k]) for k, t in a.state[p].items()}
            wrong += [f"{tuple(p.shape)} {k}" for k, (x, y) in pairs.items() if not torch.equal(x, whole(y))]
        return wrong

    assert ranks(4, one_rank, timeout=120) == [[]] * 4


@pytest.mark.filterwarnings(FSDP)
def test_ranks_that_would_cut_through_blocks_are_refused_with_the_numbers_that_fit(ranks: Any, tmp_path: Path) -> None:
    make = partial(LowBitAdamW, lr=3e-3, block_size=2048)

    def one_rank() -> str:
        with pytest.raises(ConfigError) as refusal:
            train("fp32", tmp_path, steps=1, batch_size=4, strategy="fsdp", model=TinyGPT(make))
        return str(refusal.value)

    says = r"64 x 64 in blocks of 2048 numbers, and 4 ranks would cut through some\. Use 1, 2 ranks, .*bits=32"
    for told in ranks(4, one_rank):
        assert re.search(says, told), told


def test_parameters_that_are_cut_by_columns_are_refused(ranks: Any) -> None:
    """As tp cuts every second matrix."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def one_rank() -> str:
        World.start()
        p = nn.Parameter(distribute_tensor(torch.ones(64, 64), init_device_mesh("cpu", (2,)), [Shard(1)]))
        p.grad = torch.ones_like(p)
        with pytest.raises(ConfigError) as refusal:
            LowBitAdamW([p]).step()
        return str(refusal.value)

    assert all("64 x 64 in blocks of 256 numbers, row after row, and it is cut by columns" in told for told in ranks(2, one_rank))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bits=2 is no format.*8, 4, 'fp8', 32"):
        LowBitAdamW(nn.Linear(2, 2).parameters(), bits=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_the_compiled_step_computes_nearly_the_same() -> None:
    """It fuses the arithmetic, which rounds otherwise. Compiling takes half a minute."""
    eager, _ = stepped(8)
    compiled, _ = stepped(8, compile=True)
    assert torch.allclose(eager.weight, compiled.weight, atol=1e-4)
