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


def whole_weights(net: nn.Module) -> dict[str, Tensor]:
    """All weights; put together where the strategy cut them up."""
    held: dict[str, Any] = {n: p.detach() for n, p in net.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for n, p in held.items()}


def by_trainer(case: Case, ranks: int, root: Path, **options: Any) -> Found:
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
        **options,
    )
    trainer.fit(net, loader(case, ranks))
    assert trainer.global_step == net.found.steps
    net.found.weights = whole_weights(net)
    trainer.accelerator.end_training()
    return net.found


def by_accelerator(case: Case, ranks: int, **options: Any) -> Found:
    """The loop that a user of Accelerate writes."""
    accelerator = Accelerator(gradient_accumulation_steps=case.window, seed=SEED, **options)
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
    found.weights = whole_weights(net)
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
