"""Activation checkpointing changes no number, and does what it says: operators run again, and less is kept."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.activation import ActivationCheckpointing, checkpoint_blocks
from drivetrain.strategies.base import Strategy
from drivetrain.strategies.errors import ConfigError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.wide = nn.Linear(size, 4 * size)
        self.narrow = nn.Linear(4 * size, size)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.dropout(self.narrow(nn.functional.gelu(self.wide(self.norm(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x).square().mean() * 1.0


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def measured(options: ActivationCheckpointing | None) -> tuple[float, list[Tensor], Counter[str]]:
    """Loss, gradients and operators of one step with dropout."""
    model = Net()
    if options is not None:
        checkpoint_blocks("model", model, options, torch.device("cpu"))
    torch.manual_seed(1)
    with Count() as count:
        loss = model(torch.randn(6, 8, generator=torch.Generator().manual_seed(2)))
        loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None], count.seen


FULL, SELECTIVE = ActivationCheckpointing(), ActivationCheckpointing("selective")


@pytest.mark.parametrize("options", [FULL, SELECTIVE, ActivationCheckpointing(every=2)], ids=["full", "selective", "every 2"])
def test_no_bit_changes_with_dropout(options: ActivationCheckpointing) -> None:
    loss, gradients, _ = measured(None)
    again, also, _ = measured(options)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, also, strict=True))


def test_full_runs_all_operators_again_and_selective_only_the_cheap_ones() -> None:
    plain, full, selective = (measured(o)[2] for o in (None, FULL, SELECTIVE))
    gelu, matmul = "aten.gelu.default", "aten.addmm.default"
    assert (plain[gelu], full[gelu], selective[gelu]) == (4, 8, 8)
    # The last product of a block is not needed again: torch stops early.
    assert (plain[matmul], selective[matmul]) == (9, 9)
    assert full[matmul] > 9
    assert measured(ActivationCheckpointing(every=2))[2][gelu] == 6


def test_what_is_kept_is_what_the_mode_says() -> None:
    """Elements that the graph of one step holds, counted where torch packs them."""
    kept = {}
    for name, options in (("none", None), ("full", FULL)):
        model = Net()
        if options is not None:
            checkpoint_blocks("model", model, options, torch.device("cpu"))
        sizes: dict[int, int] = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if not isinstance(t, nn.Parameter):
                sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(torch.randn(6, 8))
        kept[name] = sum(sizes.values())
        loss.backward()
    assert kept["full"] < 0.1 * kept["none"]


def test_a_copy_computes_with_its_own_weights_under_the_same_names() -> None:
    model = Net()
    names = list(model.state_dict())
    checkpoint_blocks("model", model, FULL, torch.device("cpu"))
    twin = copy.deepcopy(model).eval()
    assert list(twin.state_dict()) == names
    assert type(model.blocks[0]).__name__ == "Block"
    assert isinstance(model.blocks[0], Block)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(torch.ones(1, 8)).item() == 0.0
    assert model.eval()(torch.ones(1, 8)).item() != 0.0


def trained(strategy: str, checkpointing: Any) -> list[float]:
    accelerator = Accelerator(strategy=strategy, activation_checkpointing=checkpointing)
    model = Net().eval()  # without dropout, whose masks depend on the ranks
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses = []
    for step in range(3):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        index, count = accelerator.strategy.data_shard
        loss = model(x.chunk(count)[index])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss, "mean").item())
    rows = dict(accelerator.strategy.explain())
    assert (f"recomputed (model: {checkpointing})" in rows) == bool(checkpointing)
    accelerator.end_training()
    return losses


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_sharded_and_replicated_trainings_keep_their_losses(strategy: str, mode: str, ranks: Any) -> None:
    assert ranks(2, trained, strategy, mode) == ranks(2, trained, strategy, None)


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'selective'"):
        ActivationCheckpointing("seletive")
    with pytest.raises(ConfigError, match=r"no operator 'aten\.mm\.defualt'"):
        ActivationCheckpointing("selective", kept=["aten.mm.defualt"])
    with pytest.raises(ConfigError, match="they are there"):
        checkpoint_blocks("model", Net(), ActivationCheckpointing("offload"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="no repeated blocks"):
        checkpoint_blocks("model", nn.Linear(2, 2), FULL, torch.device("cpu"))
    with pytest.raises(ConfigError, match="nothing that it could be"):
        Accelerator(activation_checkpointing=3)
    model = Net()
    model.blocks[0].forward = lambda x, scale: x  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="forward of its own"):
        checkpoint_blocks("model", model, FULL, torch.device("cpu"))


def test_a_model_that_is_only_evaluated_computes_nothing_again() -> None:
    strategy = Strategy(inference=True, activation_checkpointing="full")
    accelerator = Accelerator(strategy=strategy)
    model = accelerator.prepare(Net())
    assert type(model.blocks[0]) is Block
