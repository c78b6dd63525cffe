"""Synchronised BatchNorm on CPU ranks against torch's own BatchNorm in one process on the concatenated batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from drivetrain.strategies.batch_norm import SynchronizedBatchNorm, convert_sync_batchnorm
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.errors import DataError
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn import functional as F

SHAPES = {"1d": (10, 4), "1d with length": (10, 4, 5), "2d": (10, 4, 3, 3), "3d": (10, 4, 2, 3, 2)}
LAYERS: dict[str, type[nn.Module]] = {
    "1d": nn.BatchNorm1d,
    "1d with length": nn.BatchNorm1d,
    "2d": nn.BatchNorm2d,
    "3d": nn.BatchNorm3d,
}
CPU = torch.device("cpu")


def data(shape: str, steps: int = 3) -> list[Tensor]:
    """The mean is far from 0, where E[x^2] - E[x]^2 would lose its digits."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPES[shape], generator=g, dtype=torch.float64) * 2 + 50 for _ in range(steps)]


def layer(shape: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    new = LAYERS[shape](4, **options).double()
    for parameter in new.parameters():
        nn.init.normal_(parameter)
    return new


def run(model: nn.Module, inputs: list[Tensor]) -> dict[str, list[float]]:
    """Outputs, gradients of inputs and parameters, buffers, after some steps; each loss is a sum over samples."""
    out: dict[str, list[float]] = {"output": [], "input": []}
    for x in inputs:
        x = x.clone().requires_grad_()
        y = model(x)
        (y.sin() * torch.linspace(1, 2, y.shape[1], dtype=y.dtype).view(1, -1, *[1] * (y.dim() - 2))).sum().backward()
        assert x.grad is not None
        out["output"] += y.flatten().tolist()
        out["input"] += x.grad.flatten().tolist()
    out |= {f"grad {n}": p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None}
    return out | {f"buffer {n}": b.flatten().tolist() for n, b in model.named_buffers()}


def on_ranks(shape: str, sizes: list[int], options: dict[str, Any], state: bytes | None = None) -> dict[str, list[float]]:
    world = World.start("cpu")
    model = convert_sync_batchnorm(layer(shape, **options), None, CPU)
    assert type(model) is SynchronizedBatchNorm
    found = run(model, [x.split(sizes)[world.rank] for x in data(shape)])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[f"grad {name}"] = world.all_reduce(parameter.grad).tolist()
    world.stop()
    return found


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.5, "eps": 0.1}], ids=str
)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_uneven_ranks_normalise_like_one_process(shape: str, options: dict[str, Any], ranks: Any) -> None:
    """7 and 3 samples on two ranks; outputs, gradients and running statistics are those of the 10 together."""
    truth = run(layer(shape, **options), data(shape))
    parts = ranks(2, on_ranks, shape, [7, 3], options)
    elements = data(shape)[0][0].numel()
    for kind in ("output", "input"):
        joined: list[float] = []
        for step in range(3):
            for part, size in zip(parts, (7, 3), strict=True):
                joined += part[kind][step * size * elements : (step + 1) * size * elements]
        assert joined == pytest.approx(truth[kind], rel=1e-10, abs=1e-12)
    for name in truth:
        if name not in ("output", "input"):
            assert parts[0][name] == parts[1][name], "the ranks disagree"
            assert parts[0][name] == pytest.approx(truth[name], rel=1e-12, abs=1e-11)


def test_a_rank_without_samples_takes_part(ranks: Any) -> None:
    truth = run(layer("2d"), data("2d"))
    parts = ranks(3, on_ranks, "2d", [6, 0, 4], {})
    for part in parts:
        assert part["buffer running_var"] == pytest.approx(truth["buffer running_var"], rel=1e-12)
        assert part["grad weight"] == pytest.approx(truth["grad weight"], rel=1e-10)


class Net(nn.Module):
    """No bias before a BatchNorm: its true gradient is 0, and AdamW blows rounding up to whole steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv, linear = nn.Conv2d(1, 4, 3, bias=False), nn.Linear(64, 8, bias=False)
        self.body = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), linear, nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)
        self.double()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        (torch.randn(12, 1, 6, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (12,), generator=g))
        for _ in range(steps)
    ]


def ddp_run(steps: int) -> tuple[list[float], list[float], list[str]]:
    world = World.start("cpu")
    strategy = DDPStrategy(sync_batchnorm=True)
    strategy.start(world)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)  # built before the layers are replaced
    names = [n for n, _ in net.named_parameters()]
    strategy.prepare({"model": net}, [optimizer])
    assert names == [n for n, _ in net.named_parameters()]
    step = strategy.bind(net, "training_step")
    losses = []
    for i, (x, y) in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = step((x.tensor_split(world.size)[world.rank], y.tensor_split(world.size)[world.rank]), i)
        strategy.backward(loss)
        strategy.step(optimizer)
        losses.append(world.all_reduce(loss.detach(), "mean").item())
    weights = torch.cat([v.flatten().double() for v in net.state_dict().values()]).tolist()
    strategy.stop()
    world.stop()
    return losses, weights, list(net.state_dict())


@pytest.mark.parametrize("size", [2, 4])
def test_ddp_with_synchronised_batch_norm_trains_like_one_process(size: int, ranks: Any) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for i, batch in enumerate(batches(50)):
        optimizer.zero_grad()
        loss = net.training_step(batch, i)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.cat([v.flatten().double() for v in net.state_dict().values()]).tolist()
    for result in ranks(size, ddp_run, 50):
        assert result[0] == pytest.approx(losses, rel=1e-12, abs=1e-12)
        assert result[1] == pytest.approx(weights, rel=1e-10, abs=1e-10)
        assert result[2] == list(net.state_dict())


def half_precision() -> tuple[str, float]:
    world = World.start("cpu")
    norm = convert_sync_batchnorm(nn.BatchNorm1d(4), None, CPU)
    x = (torch.randn(8, 4) + 3).bfloat16().requires_grad_()
    y = norm(x)
    y.float().square().sum().backward()
    world.stop()
    return str(y.dtype), float(y.float().mean().detach())


def test_bf16_inputs_stay_bf16_and_are_normalised_in_fp32(ranks: Any) -> None:
    for dtype, mean in ranks(2, half_precision):
        assert dtype == "torch.bfloat16"
        assert abs(mean) < 0.02


def one_value_each() -> None:
    world = World.start("cpu")
    convert_sync_batchnorm(nn.BatchNorm1d(4), None, CPU)(torch.randn(1 if world.rank == 0 else 0, 4))


def test_one_value_in_all_has_no_variance(ranks: Any) -> None:
    with pytest.raises(DataError, match=r"1 value\(s\) per feature over all ranks"):
        ranks(2, one_value_each)


def test_evaluation_and_copies_need_no_process_group() -> None:
    """An average of weights copies the model; a copy that was pickled is a plain layer in evaluation."""
    norm = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), None, CPU).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = nn.BatchNorm2d(4).eval()(x)
    assert torch.equal(norm(x), expected)
    assert torch.equal(copy.deepcopy(norm)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), expected)


def test_the_wrong_shape_is_told() -> None:
    norm = convert_sync_batchnorm(nn.BatchNorm1d(4), None, CPU)
    with pytest.raises(DataError, match=r"over 4 features got a tensor of shape \(2, 5\)"):
        norm(torch.randn(2, 5))


def test_parameters_buffers_and_mode_are_taken_over() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.SyncBatchNorm(4)).eval()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = convert_sync_batchnorm(model, None, CPU)
    after = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert list(before) == list(after)
    assert all(before[n] is after[n] for n in before)
    assert converted is model
    assert type(model[1]) is type(model[2]) is SynchronizedBatchNorm
    assert not model[1].training
    assert model[1].momentum is None
    assert convert_sync_batchnorm(model, None, CPU).get_submodule("1") is model[1]
