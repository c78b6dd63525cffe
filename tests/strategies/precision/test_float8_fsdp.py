"""Weights that fsdp gathers in float8: the numbers of gathering them whole, fewer bytes, plain tensors everywhere."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.fsdp import FSDPStrategy
from drivetrain.strategies.precision.float8_ao import Float8AO, Float8Recipe
from drivetrain.strategies.world import World
from safetensors.torch import load_file
from tiny_gpt import TinyGPT, train
from torch import nn
from torch.distributed.tensor import DTensor

pytestmark = [
    pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),  # torch's own, of any module whose step returns a view
]


def gathering(**options: Any) -> Float8AO:
    return Float8AO(Float8Recipe(fsdp_all_gather=True, **options))


def pieces(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p._local_tensor.clone() for n, p in model.named_parameters() if isinstance(p, DTensor)}


def test_losses_and_weights_are_those_of_gathering_whole_and_a_resumed_run_goes_on_bit_for_bit(
    ranks: Any, tmp_path: Path
) -> None:
    """Each weight is cast by the scale of its whole either way. Saved plainly, and loaded over scales of other weights."""

    def one_rank() -> tuple[Any, ...]:
        def run(folder: str, precision: Float8AO, **options: Any) -> Any:
            return train(precision, tmp_path / folder, steps=6, batch_size=4, strategy="fsdp", **options)

        whole, precision = run("whole", Float8AO()), gathering()
        found = run("float8", precision, save_every=3)
        resumed = run("resumed", gathering(), resume=found.checkpoints[3])
        same = [torch.equal(a, pieces(found.model)[n]) for n, a in pieces(whole.model).items()]
        return whole.losses, found.losses, resumed.losses, all(same), precision.explain(), str(found.checkpoints[3])

    for whole, found, resumed, same, explained, checkpoint in ranks(2, one_rank, timeout=120):
        assert found == whole
        assert same
        assert resumed == whole[3:]
        assert "7 weights gathered in float8" in explained
        saved = {n: t.dtype for f in Path(checkpoint).rglob("*.safetensors") for n, t in load_file(f).items()}
        assert {n.removeprefix("model/model/") for n in saved if n.startswith("model/")} == set(TinyGPT().state_dict())
        assert {dtype for n, dtype in saved.items() if n.startswith(("model/", "optimizer/"))} == {torch.float32}


HALF = 64 * 64 // 2  # numbers of a weight on each of two ranks


def gathered_bytes(precision: Any) -> tuple[int, int, int]:
    """What this rank gives to the gathers of one forward and backward pass; all-reduces in these, and with the optimizer step."""
    import torch.distributed as dist
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    world = World.start("cpu", need_group=True)
    strategy = FSDPStrategy(precision=precision, units=[nn.Linear])
    strategy.start(world)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    (prepared,) = strategy.prepare({"model": model}, [])[0].values()
    optimizer = strategy.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    sent, reduced, before, in_step = [0], [0], (0, 0), 0
    gather, reduce = collectives.DefaultAllGather.__call__, dist.all_reduce

    def counting(self: Any, output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent[0] += input_tensor.numel() * input_tensor.element_size()
        return gather(self, output_tensor, input_tensor, *args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> Any:
        reduced[0] += 1
        return reduce(*args, **kwargs)

    collectives.DefaultAllGather.__call__ = counting
    dist.all_reduce = counted
    try:
        for _ in range(2):
            before = (sent[0], reduced[0])
            prepared(torch.ones(16, 64)).sum().backward()
            in_step = reduced[0] - before[1]
            strategy.step(optimizer)
        return sent[0] - before[0], in_step, reduced[0] - before[1]
    finally:
        collectives.DefaultAllGather.__call__ = gather
        dist.all_reduce = reduce
        strategy.stop()
        world.stop()


def test_fewer_bytes_and_one_all_reduce_a_step(ranks: Any) -> None:
    """Of four weights the two in the middle are sent in one byte a number instead of four; nothing else is reduced for it."""
    plain = ranks(2, gathered_bytes, Float8AO())
    cast = ranks(2, gathered_bytes, gathering())
    for (sent, in_step, reduced), (less, in_step_too, one_more) in zip(plain, cast, strict=True):
        # Four weights, each for the forward and for the backward pass.
        assert sent == 8 * HALF * 4
        assert less == 4 * HALF * 4 + 4 * HALF
        assert (in_step, reduced) == (0, 0)
        assert (in_step_too, one_more) == (0, 1)


def test_unevenly_cut_weights_have_the_same_numbers_too(ranks: Any, tmp_path: Path) -> None:
    """Three ranks do not divide 64 rows: the last piece is padded."""

    def one_rank() -> tuple[list[float], list[float]]:
        def run(folder: str, precision: Float8AO) -> list[float]:
            return train(precision, tmp_path / folder, steps=3, batch_size=2, strategy="fsdp").losses

        return run("whole", Float8AO()), run("float8", gathering())

    for whole, found in ranks(3, one_rank, timeout=120):
        assert found == whole


def test_a_weight_that_something_else_uses_is_gathered_as_it_is(ranks: Any) -> None:
    """The embedding that is tied to a Linear reads its rows in fp32."""

    def one_rank() -> str:
        world = World.start("cpu", need_group=True)
        precision = gathering(skip_first_and_last=False)
        strategy = FSDPStrategy(precision=precision, units=None)
        strategy.start(world)
        model = TinyGPT()
        model.head.weight = model.tokens.weight
        (prepared,) = strategy.prepare({"model": model}, [])[0].values()
        prepared(torch.arange(32).view(2, 16)).sum().backward()
        return precision.explain()

    for explained in ranks(2, one_rank):
        assert "9 of 9 Linears" in explained
        assert "8 weights gathered in float8" in explained


def test_what_does_not_go_together_is_refused(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"fsdp_all_gather was asked for with scaling='rowwise'.*Use scaling='tensorwise'"):
        Float8Recipe("rowwise", fsdp_all_gather=True)

    def one_rank() -> str:
        world = World.start("cpu", need_group=True)
        strategy = FSDPStrategy(precision=gathering(), gather_in_16_bits=True)
        strategy.start(world)
        with pytest.raises(ConfigError) as refusal:
            strategy.prepare({"model": TinyGPT()}, [])
        return str(refusal.value)

    (told,) = ranks(1, one_rank)
    assert "both say what weights are gathered in" in told
