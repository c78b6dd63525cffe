"""Promise 1: a run gives the losses and weights of one plain PyTorch loop, whatever the number of processes.

The truth is `plain_loop` below: it knows nothing of us but the order of the data, which `Shuffled` documents. Each case is run by
the Trainer and by a raw Accelerator loop, on 1, 2 and 4 ranks with the same global batch. 25 samples in micro-batches of 4 leave
one: a ragged tail in which ranks get nothing but padding, and windows of 3 micro-batches that are cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator, Callback, Trainer, TrainingModule
from drivetrain.strategies.world import World
from drivetrain.trainer.data.randomness import mix
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

SEED = 3
SAMPLES, GLOBAL, LENGTH = 25, 4, 5
QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "seed": SEED,
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        window: micro-batches a step.
        clip: (algorithm, value).
        items: None: the loss is a mean; "lengths": a sum over tokens with num_items; "holes": samples 12 to 23 have no tokens, in
            order, so that one whole window has none, and sample 2 has none, so that a rank with others beside it has none.
        split: 2: two optimizers over halves of the parameters.
        schedule: "step", "epoch" or "plateau" (on the logged value "watched").
    """

    name: str
    dtype: torch.dtype = torch.float64
    optimizer: str = "sgd"
    window: int = 1
    clip: tuple[str, float] | None = None
    items: str | None = None
    split: int = 1
    schedule: str | None = None
    epochs: int = 8


CASES = [
    Case("sgd, 50 steps", epochs=8),
    Case("adamw, windows of 3 cut short, 50 steps", optimizer="adamw", window=3, epochs=17),
    Case("windows of 3, clipped by norm", window=3, clip=("norm", 0.05)),
    Case("clipped by value", clip=("value", 0.01), epochs=4),
    Case("windows of 3, clipped by value", window=3, clip=("value", 0.01), epochs=4),
    Case("num_items, windows of 3, clipped by norm", optimizer="adamw", window=3, clip=("norm", 0.05), items="lengths"),
    Case("num_items, no items on a rank and in a window", optimizer="adamw", window=3, items="holes", schedule="step"),
    Case("two optimizers, clipped, a schedule by steps", window=3, clip=("norm", 0.05), split=2, schedule="step"),
    Case("a schedule by epochs", schedule="epoch", epochs=4),
    Case("a schedule by what is logged", schedule="plateau", epochs=6),
    Case("fp32, windows of 3, clipped by norm", torch.float32, window=3, clip=("norm", 0.05), epochs=17),
]


@dataclass
class Found:
    """What a run gave: the loss of every micro-batch, the learning rates after every step, the weights at the end."""

    losses: list[tuple[float, float]] = field(default_factory=list)  # (sum over samples or items, how many)
    rates: list[tuple[float, ...]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    logged: list[float] = field(default_factory=list)  # the loss of every step, as the Trainer logs it

    def means(self) -> list[float]:
        return [total / count if count else 0.0 for total, count in self.losses]


class Logged(Callback):
    """Keeps the loss of every log point."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def on_log(self, trainer: Any, module: Any, metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics:
            self.found.logged.append(metrics["loss"])


class Net(TrainingModule):
    """Two layers, and a 0-d parameter that the module holds itself."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.found = Found()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 1)
        self.gain = nn.Parameter(torch.tensor(0.3))
        generator = torch.Generator().manual_seed(11)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
        self.to(case.dtype)

    def total(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of squared errors over what counts, and how much that is (samples, or tokens)."""
        x, y, mask = batch
        error = (self.second(torch.tanh(self.first(x))).squeeze(-1) * self.gain.exp() - y) ** 2
        if self.case.items is None:
            return error.mean(1).sum(), torch.tensor(len(x))
        return (error * mask).sum(), mask.sum()

    def forward(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.total(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        total, count = self.total(batch)
        real = bool(self.trainer.train_loader.num_samples)
        self.found.losses.append((total.item() * real, count.item() * real))
        if self.case.schedule == "plateau":
            self.log("watched", total.detach() / count, on_step=False, on_epoch=True)
        return total / count if self.case.items is None else {"loss": total, "num_items": count}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        steps = self.trainer.global_step
        if steps > self.found.steps:
            self.found.steps = steps
            self.found.rates.append(rates_of(list(self.trainer.optimizers.values())))

    def configure_optimizers(self) -> Any:
        optimizers, schedulers = build_optimizers(self)
        interval = "step" if self.case.schedule == "step" else "epoch"
        configs = [{"scheduler": s, "interval": interval, "monitor": "watched" if self.case.schedule == "plateau" else None}
                   for s in schedulers]  # fmt: skip
        return optimizers, configs


def build_optimizers(net: Net) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    parameters = list(net.parameters())
    groups = [parameters] if net.case.split == 1 else [parameters[:2], parameters[2:]]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(group, lr=0.05 / (i + 1), momentum=0.9)
        if net.case.optimizer == "sgd"
        else torch.optim.AdamW(group, lr=0.02)
        for i, group in enumerate(groups)
    ]
    make: dict[str | None, Callable[[Any], Any]] = {
        "step": lambda o: LambdaLR(o, lambda step: 1.0 / (1 + 0.1 * step)),
        "epoch": lambda o: StepLR(o, 2, 0.5),
        "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.2),
    }
    return optimizers, [make[net.case.schedule](o) for o in optimizers] if net.case.schedule else []


def rates_of(optimizers: Sequence[Any]) -> tuple[float, ...]:
    return tuple(group["lr"] for o in optimizers for group in o.param_groups)


def dataset(case: Case) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, LENGTH, 3, generator=generator, dtype=torch.float64).to(case.dtype)
    y = torch.randn(SAMPLES, LENGTH, generator=generator, dtype=torch.float64).to(case.dtype)
    lengths = torch.randint(1, LENGTH + 1, (SAMPLES, 1), generator=generator)
    if case.items == "holes":
        lengths[12:24] = 0
        lengths[2] = 0
    return TensorDataset(x, y, (torch.arange(LENGTH) < lengths).to(case.dtype))


def plain_loop(case: Case) -> Found:
    """One process, one batch at a time, no library but torch."""
    net, data = Net(case), dataset(case)
    optimizers, schedulers = build_optimizers(net)
    found = Found()
    for epoch in range(case.epochs):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(mix(SEED, epoch)))
        if case.items == "holes":
            order = torch.arange(SAMPLES)
        micro_batches = order.split(GLOBAL)
        epoch_total = epoch_count = 0.0
        for start in range(0, len(micro_batches), case.window):
            window = [net.total(data[indices]) for indices in micro_batches[start : start + case.window]]
            found.losses += [(total.item(), count.item()) for total, count in window]
            epoch_total += sum(total.item() for total, _ in window)
            epoch_count += sum(count.item() for _, count in window)
            count = sum(count for _, count in window)
            if not count:
                continue
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = sum(total for total, _ in window) / count
            loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
            found.logged.append(loss.item())  # pyright: ignore[reportAttributeAccessIssue]
            for optimizer in optimizers:
                parameters = optimizer.param_groups[0]["params"]
                if case.clip is not None:
                    clip = nn.utils.clip_grad_norm_ if case.clip[0] == "norm" else nn.utils.clip_grad_value_
                    clip(parameters, case.clip[1])
                optimizer.step()
            if case.schedule == "step":
                for scheduler in schedulers:
                    scheduler.step()
            found.rates.append(rates_of(optimizers))
            found.steps += 1
        for scheduler in schedulers if case.schedule in ("epoch", "plateau") else ():
            scheduler.step(*([epoch_total / epoch_count] if case.schedule == "plateau" else []))
    found.weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    return found


def loader(case: Case, ranks: int) -> DataLoader[Any]:
    return DataLoader(dataset(case), batch_size=GLOBAL // ranks, shuffle=case.items != "holes")


def by_trainer(case: Case, ranks: int, root: Path) -> Found:
    net = Net(case)
    algorithm, value = case.clip or ("norm", None)
    trainer = Trainer(
        **QUIET,
        root=root,
        callbacks=Logged(net.found),
        log_every_n_steps=1,
        max_epochs=case.epochs,
        accumulate_grad_batches=case.window,
        gradient_clip_val=value,
        gradient_clip_algorithm=algorithm,
    )
    trainer.fit(net, loader(case, ranks))
    assert trainer.global_step == net.found.steps
    net.found.weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    trainer.accelerator.end_training()
    return net.found


def by_accelerator(case: Case, ranks: int) -> Found:
    """The loop that a user of Accelerate writes."""
    accelerator = Accelerator(gradient_accumulation_steps=case.window, seed=SEED)
    net = Net(case)
    found = Found()
    optimizers, schedulers = build_optimizers(net)
    model, batches, *rest = accelerator.prepare(net, loader(case, ranks), *optimizers, *schedulers)
    optimizers, schedulers = rest[: len(optimizers)], rest[len(optimizers) :]
    for _ in range(case.epochs):
        epoch = [0.0, 0.0]
        for batch in batches:
            with accelerator.accumulate(model):
                total, count = model(batch)
                real = bool(batches.num_samples)
                found.losses.append((total.item() * real, count.item() * real))
                epoch = [epoch[0] + found.losses[-1][0], epoch[1] + found.losses[-1][1]]
                if case.items is None:
                    accelerator.backward(total / count)
                else:
                    accelerator.backward(total, num_items=count)
                for optimizer in optimizers:
                    parameters = optimizer.param_groups[0]["params"]
                    if case.clip is not None and accelerator.sync_gradients:
                        clip = accelerator.clip_grad_norm_ if case.clip[0] == "norm" else accelerator.clip_grad_value_
                        clip(parameters, case.clip[1])
                for optimizer in optimizers:
                    optimizer.step()
                if case.schedule == "step":
                    for scheduler in schedulers:
                        scheduler.step()
                if any(o.stepped for o in optimizers):
                    found.rates.append(rates_of(optimizers))
                    found.steps += 1
                for optimizer in optimizers:
                    optimizer.zero_grad()
        together = accelerator.reduce(torch.tensor(epoch, dtype=torch.float64))
        for scheduler in schedulers if case.schedule in ("epoch", "plateau") else ():
            scheduler.step(*([float(together[0] / together[1])] if case.schedule == "plateau" else []))
    found.weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    accelerator.end_training()
    return found


def cases_on(ranks: int) -> list[Case]:
    """All of them on one and two ranks; on four those in which ranks differ in what they hold."""
    return CASES if ranks < 4 else [case for case in CASES if case.window == 3 and case.clip != ("value", 0.01)]


def all_cases(ranks: int, root: Path) -> dict[str, tuple[Found, Found]]:
    world = World.start()  # one group for all runs: theirs join it
    try:
        return {case.name: (by_trainer(case, ranks, root), by_accelerator(case, ranks)) for case in cases_on(ranks)}
    finally:
        world.stop()


def merged(founds: Sequence[Found]) -> Found:
    """One run's findings, from those of its ranks; what must be the same on all of them is checked."""
    first = founds[0]
    for other in founds[1:]:
        assert other.rates == first.rates
        assert other.steps == first.steps
        assert other.logged == first.logged
        assert all(torch.equal(other.weights[n], w) for n, w in first.weights.items())
    losses = [
        (sum((t for t, _ in parts), 0.0), sum((c for _, c in parts), 0.0))
        for parts in zip(*(f.losses for f in founds), strict=True)
    ]
    return Found(losses, first.rates, first.weights, first.steps, first.logged)


def compare(case: Case, found: Found, truth: Found) -> None:
    loss_limit, weight_limit = (1e-12, 1e-10) if case.dtype == torch.float64 else (1e-6, 1e-5)
    assert found.steps == truth.steps
    assert found.rates == truth.rates
    assert found.means() == pytest.approx(truth.means(), rel=loss_limit, abs=loss_limit * 1e-3)
    if found.logged:
        assert found.logged == pytest.approx(truth.logged, rel=1e-5)
    for name, weight in truth.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=weight_limit, atol=weight_limit * 0.1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_trainer_and_raw_loop_give_the_numbers_of_a_plain_loop(size: int, ranks: Any, tmp_path: Path) -> None:
    """Losses of every micro-batch, learning rates after every step, and all weights at the end."""
    results = ranks(size, all_cases, size, tmp_path, timeout=150)
    for case in cases_on(size):
        truth = plain_loop(case)
        for i, kind in enumerate(("trainer", "accelerator")):
            try:
                compare(case, merged([r[case.name][i] for r in results]), truth)
            except AssertionError as error:
                error.add_note(f"in the case {case.name!r}, by the {kind}, on {size} ranks")
                raise


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
        x = batch[0][:, 0]
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
    pair, data, losses = Pair(False), dataset(CASES[0]), []
    optimizers = pair.configure_optimizers()
    for epoch in range(epochs):
        for indices in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(mix(SEED, epoch))).split(GLOBAL):
            x = data[indices][0][:, 0]
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


def by_manual(ranks: int, named: bool, root: Path) -> tuple[list[tuple[float, float, int]], dict[str, Tensor], int]:
    pair = Pair(named)
    trainer = Trainer(**QUIET, root=root, max_epochs=8)
    trainer.fit(pair, loader(CASES[0], ranks))
    trainer.accelerator.end_training()
    return pair.losses, {n: p.detach().clone() for n, p in pair.named_parameters()}, trainer.global_step


def by_raw_pair(ranks: int, context: bool) -> tuple[list[tuple[float, float, int]], dict[str, Tensor], int]:
    """The same with an Accelerator, with and without `accumulate` around the batch."""
    accelerator = Accelerator(seed=SEED)
    pair = Pair(False)
    made = pair.configure_optimizers()
    generator, critic, g, c, batches = accelerator.prepare(
        pair.generator, pair.critic, made["g"], made["c"], loader(CASES[0], ranks)
    )
    losses: list[tuple[float, float, int]] = []
    steps = 0
    for _ in range(8):
        for batch in batches:
            x = batch[0][:, 0]
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
    for kind in range(4):
        parts = [r[kind] for r in results]
        for i, expected in enumerate(truth):
            for which in (0, 1):
                count = sum(p[0][i][2] for p in parts)
                mean = sum(p[0][i][which] * p[0][i][2] for p in parts) / count
                assert mean == pytest.approx(expected[which], rel=1e-12), f"kind {kind}, batch {i}"
        for name, weight in weights.items():
            torch.testing.assert_close(parts[0][1][name], weight, rtol=1e-10, atol=1e-11)
        assert parts[0][2] == len(truth)


# -- the global batch ----------------------------------------------------------------------------------------------------------
def by_global_batch(root: Path) -> Found:
    net = Net(CASES[0])
    trainer = Trainer(**QUIET, root=root, max_epochs=3, global_batch_size=8)
    trainer.fit(net, DataLoader(dataset(CASES[0]), batch_size=2, shuffle=True))
    trainer.accelerator.end_training()
    net.found.weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    return net.found


def test_a_global_batch_size_gives_the_same_run_on_any_number_of_ranks(ranks: Any, tmp_path: Path) -> None:
    """8 samples a step: windows of 4, 2 and 1 micro-batches. The truth has micro-batches of 8 in one process."""
    net, data = Net(CASES[0]), dataset(CASES[0])
    optimizers, _ = build_optimizers(net)
    for epoch in range(3):
        for indices in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(mix(SEED, epoch))).split(8):
            optimizers[0].zero_grad()
            total, count = net.total(data[indices])
            (total / count).backward()
            optimizers[0].step()
    for size in (1, 2, 4):
        found = merged(ranks(size, by_global_batch, tmp_path / str(size)))
        assert found.steps == 12
        for name, weight in net.named_parameters():
            torch.testing.assert_close(found.weights[name], weight.detach(), rtol=1e-10, atol=1e-12)


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
        return self.two(torch.tanh(self.one(batch[0][:, 0]))).pow(2).mean()

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
    trainer.fit(module, loader(CASES[0], ranks))
    trainer.accelerator.end_training()
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_named_children_train_as_in_a_plain_loop(window: int, size: int, ranks: Any, tmp_path: Path) -> None:
    """Each optimizer's gradients are clipped by their own norm."""
    module, data = Named(), dataset(CASES[0])
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
