"""Promise 1 with several models: trained in turn by hand, or together, they give the numbers of one plain PyTorch loop.

The truth and the data are those of test_same_numbers.py: 25 samples in micro-batches of 4 over all ranks leave one, so that ranks
get nothing but padding in the tail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Trainer, TrainingModule
from drivetrain.strategies.fsdp import FSDPStrategy
from drivetrain.strategies.world import World
from drivetrain.trainer.data.randomness import mix
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

SEED = 3
SAMPLES, GLOBAL = 25, 4
QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "seed": SEED,
}


def dataset() -> TensorDataset:
    return TensorDataset(torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))


def loader(ranks: int) -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=GLOBAL // ranks, shuffle=True)


# -- manual optimisation: a generator and a critic, each with its own optimizer ------------------------------------------------
class Pair(TrainingModule):
    """Two models trained against each other, the critic twice a batch."""

    automatic_optimization = False

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.losses: list[tuple[float, float, int]] = []
        generator = torch.Generator().manual_seed(2)
        self.generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
        self.double()

    def models(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic} if self.named else {"model": self}

    def critic_loss(self, x: Tensor) -> Tensor:
        return ((self.critic(x) - 1) ** 2 + self.critic(self.generator(x).detach()) ** 2).mean()

    def generator_loss(self, x: Tensor) -> Tensor:
        return ((self.critic(self.generator(x)) - 1) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return {"g": torch.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.5),
                "c": torch.optim.Adam(self.critic.parameters(), lr=0.01)}  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        g, c = self.optimizers()
        critic_loss = torch.zeros(())
        for _ in range(2):
            c.zero_grad()
            critic_loss = self.critic_loss(x)
            self.manual_backward(critic_loss)
            self.clip_gradients(c, 0.5)
            c.step()
        g.zero_grad()
        generator_loss = self.generator_loss(x)
        self.manual_backward(generator_loss)
        g.step()
        self.losses.append((critic_loss.item(), generator_loss.item(), self.trainer.train_loader.num_samples))


def plain_pair(epochs: int) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    pair, data, losses = Pair(False), dataset(), []
    optimizers = pair.configure_optimizers()
    for epoch in range(epochs):
        for indices in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(mix(SEED, epoch))).split(GLOBAL):
            x = data[indices][0]
            critic_loss = torch.zeros(())
            for _ in range(2):
                optimizers["c"].zero_grad()
                critic_loss = pair.critic_loss(x)
                critic_loss.backward()
                nn.utils.clip_grad_norm_(pair.critic.parameters(), 0.5)
                optimizers["c"].step()
            optimizers["g"].zero_grad()
            generator_loss = pair.generator_loss(x)
            generator_loss.backward()
            optimizers["g"].step()
            losses.append((critic_loss.item(), generator_loss.item()))
    return losses, {n: p.detach().clone() for n, p in pair.named_parameters()}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p).detach().clone() for n, p in module.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_manual(
    ranks: int, named: bool, root: Path, strategy: Any = "auto"
) -> tuple[list[tuple[float, float, int]], dict[str, Tensor], int]:
    pair = Pair(named)
    trainer = Trainer(**QUIET, root=root, max_epochs=8, strategy=strategy)
    trainer.fit(pair, loader(ranks))
    found = pair.losses, weights_of(pair), trainer.global_step
    trainer.accelerator.end_training()
    return found


def by_raw_pair(ranks: int, context: bool) -> tuple[list[tuple[float, float, int]], dict[str, Tensor], int]:
    """The same with an Accelerator, with and without `accumulate` around the batch."""
    accelerator = Accelerator(seed=SEED)
    pair = Pair(False)
    made = pair.configure_optimizers()
    generator, critic, g, c, batches = accelerator.prepare(pair.generator, pair.critic, made["g"], made["c"], loader(ranks))
    losses: list[tuple[float, float, int]] = []
    steps = 0
    for _ in range(8):
        for batch in batches:
            x = batch[0]
            critic_loss = generator_loss = torch.zeros(())
            for i in range(3):
                with accelerator.accumulate(critic if i < 2 else generator) if context else accelerator.autocast():
                    if i < 2:
                        c.zero_grad()
                        critic_loss = ((critic(x) - 1) ** 2 + critic(generator(x).detach()) ** 2).mean()
                        accelerator.backward(critic_loss)
                        accelerator.clip_grad_norm_(critic.parameters(), 0.5)
                        c.step()
                    else:
                        g.zero_grad()
                        generator_loss = ((critic(generator(x)) - 1) ** 2).mean()
                        accelerator.backward(generator_loss)
                        g.step()
            steps += g.stepped
            losses.append((critic_loss.item(), generator_loss.item(), batches.num_samples))
    accelerator.end_training()
    return losses, {n: p.detach().clone() for n, p in pair.named_parameters()}, steps


def all_pairs(ranks: int, root: Path) -> list[Any]:
    world = World.start()
    try:
        return [by_manual(ranks, False, root), by_manual(ranks, True, root), by_raw_pair(ranks, True), by_raw_pair(ranks, False)]
    finally:
        world.stop()


@pytest.mark.parametrize("size", [1, 2])
def test_manual_optimisation_gives_the_numbers_of_a_plain_loop(size: int, ranks: Any, tmp_path: Path) -> None:
    """Two models that step in turn, by the module as a whole, by its named children, and raw; a ragged tail in every epoch."""
    truth, weights = plain_pair(8)
    results = ranks(size, all_pairs, size, tmp_path)
    compare(results, truth, weights)


def compare(results: list[list[Any]], truth: list[tuple[float, float]], weights: dict[str, Tensor]) -> None:
    for kind in range(len(results[0])):
        parts = [r[kind] for r in results]
        for i, expected in enumerate(truth):
            for which in (0, 1):
                count = sum(p[0][i][2] for p in parts)
                mean = sum(p[0][i][which] * p[0][i][2] for p in parts) / count
                assert mean == pytest.approx(expected[which], rel=1e-12), f"kind {kind}, batch {i}"
        for name, weight in weights.items():
            torch.testing.assert_close(parts[0][1][name], weight, rtol=1e-10, atol=1e-11)
        assert parts[0][2] == len(truth)


def sharded_pairs(ranks: int, root: Path, named: list[bool]) -> list[Any]:
    world = World.start("cpu", need_group=True)
    whole = FSDPStrategy(units=None)
    blocks = FSDPStrategy(units=lambda name, module: name == "generator")
    try:
        return [by_manual(ranks, n, root, strategy) for n in named for strategy in (whole, blocks)]
    finally:
        world.stop()


def test_manual_optimisation_of_sharded_models_gives_the_numbers_of_a_plain_loop(ranks: Any, tmp_path: Path) -> None:
    """The critic's parameters lie in the root, whose gradients no unit's hook reduces: not where all does, not beside a unit."""
    truth, weights = plain_pair(8)
    compare(ranks(2, sharded_pairs, 2, tmp_path, [False]), truth, weights)


# -- several named models in automatic mode --------------------------------------------------------------------------------
class Named(TrainingModule):
    """Two children prepared one by one, each with its own optimizer, under one loss."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def models(self) -> dict[str, nn.Module]:
        return {"one": self.one, "two": self.two}

    def loss(self, batch: Any) -> Tensor:
        return self.two(torch.tanh(self.one(batch[0]))).pow(2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return {
            "one": torch.optim.SGD(self.one.parameters(), lr=0.1),
            "two": torch.optim.Adam(self.two.parameters(), lr=0.01),
        }


def by_named(window: int, ranks: int, root: Path) -> dict[str, Tensor]:
    module = Named()
    trainer = Trainer(**QUIET, root=root, max_epochs=3, accumulate_grad_batches=window, gradient_clip_val=0.1)
    trainer.fit(module, loader(ranks))
    trainer.accelerator.end_training()
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_named_children_train_as_in_a_plain_loop(window: int, size: int, ranks: Any, tmp_path: Path) -> None:
    """Each optimizer's gradients are clipped by their own norm."""
    module, data = Named(), dataset()
    optimizers = module.configure_optimizers().values()
    for epoch in range(3):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(mix(SEED, epoch)))
        for indices in order.split(GLOBAL * window):
            for optimizer in optimizers:
                optimizer.zero_grad()
            module.loss(data[indices]).backward()
            for optimizer in optimizers:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
                optimizer.step()
    for found in ranks(size, by_named, window, size, tmp_path):
        for name, weight in module.named_parameters():
            torch.testing.assert_close(found[name], weight.detach(), rtol=1e-10, atol=1e-12)


class Toggling(TrainingModule):
    """Each loss reaches both halves; only the toggled half may take its gradient."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(1, 2), nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, other in zip(self.optimizers(), (self.b, self.a), strict=True):
            optimizer.zero_grad()
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.b(self.a(batch[0])).pow(2).mean())
            assert all(
                p.grad is not None for p in optimizer.param_groups[0]["params"]
            )  # pieces, under fsdp: not what it computes with
            assert not any(p.requires_grad for p in other.parameters())
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            assert all(p.requires_grad for p in self.parameters())

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(half.parameters(), lr=0.01) for half in (self.a, self.b)]


def toggled(root: Path, strategy: str = "auto") -> list[list[float]]:
    module = Toggling()
    options: dict[str, Any] = QUIET | {"seed": None}
    trainer = Trainer(**options, root=root, max_epochs=2, strategy=strategy)
    data = TensorDataset(torch.arange(8.0).reshape(8, 1) / 8)
    trainer.fit(module, DataLoader(data, batch_size=4 // trainer.world.size))
    return [p.flatten().tolist() for p in weights_of(module).values()]


def test_a_toggled_optimizer_trains_alone_and_the_same_on_two_ranks(ranks: Any, tmp_path: Path) -> None:
    one = toggled(tmp_path)
    for rank in [*ranks(2, toggled, tmp_path), *ranks(2, toggled, tmp_path, "fsdp")]:
        assert [pytest.approx(p, abs=1e-6) for p in one] == rank
