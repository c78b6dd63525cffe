"""Pipelines through the Trainer: the losses, logged values, validations and checkpoints are those of one process."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.errors import ConfigError, DrivetrainError, NonFiniteError
from drivetrain.strategies.mesh import ParallelPlan
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}
WORDS, DIM = 11, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Words(TrainingModule):
    """Forward and compute_loss: the default training_step is made of them."""

    def __init__(self, *, summed: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Net().to(dtype)
        self.summed = summed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def compute_loss(self, output: Tensor, batch: Any) -> Any:
        _, y = batch
        right = (output.argmax(-1) == y).to(output.dtype)
        self.log("accuracy", right.mean(), on_step=True, on_epoch=True)
        self.log("right", right.sum(), reduce="sum", on_step=True)
        loss = F.cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum" if self.summed else "mean")
        return {"loss": loss, "num_items": (y != -1).sum()} if self.summed else loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        self.log("val_loss", loss)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        small = [p for p in self.parameters() if p.dim() < 2]
        large = [p for p in self.parameters() if p.dim() >= 2]
        optimizer = torch.optim.AdamW([{"params": large, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}], lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


def data(samples: int = 38, *, masked: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, WORDS, (samples, 5), generator=generator)
    y = torch.randint(0, WORDS, (samples, 5), generator=generator)
    if masked:
        y[torch.rand(y.shape, generator=generator) < 0.4] = -1
    return TensorDataset(x, y)


def fit(
    root: Path,
    strategy: Any,
    *,
    summed: bool = False,
    resume: Any = None,
    make: Callable[[], Words] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train 38 samples in global batches of 8 for two epochs; return what was logged, and the predictions at the end."""
    world = World.start("cpu", need_group=True)
    try:
        trainer = Trainer(
            **{"max_epochs": 2, "global_batch_size": 8, "gradient_clip_val": 0.5, "seed": 1, **QUIET, **options},
            strategy=strategy,
            root=root,
            name="run",
            devices=1 if world.size == 1 else "auto",
        )
        shards = trainer.accelerator.strategy.data_shard[1]
        train = DataLoader(data(masked=summed), batch_size=options.pop("batch_size", 8) // shards, shuffle=True)
        module = (make or (lambda: Words(summed=summed)))()
        trainer.fit(module, train, DataLoader(data(13), batch_size=4), resume=resume)
        tokens = [p.tolist() for p in trainer.predict(module, DataLoader(data(6), batch_size=4))]
        rows = read_metrics(trainer.root) if world.is_main else []
        logged: dict[str, list[float]] = {}
        for row in rows:
            for key, value in row["metrics"].items():
                if not key.startswith(("time", "samples", "seconds")):
                    logged.setdefault(key, []).append(value)
        return {"logged": logged, "predicted": tokens, "metrics": dict(trainer.metrics)}
    finally:
        world.stop()


def close(found: dict[str, list[float]], truth: dict[str, list[float]], rel: float = 1e-11) -> None:
    for name in ("loss", "accuracy_step", "accuracy_epoch", "right", "val_loss", "grad_norm"):
        assert name in truth
        assert found[name] == pytest.approx(truth[name], rel=rel), name


@pytest.mark.parametrize(
    ("strategy", "size"),
    [("pp:2", 2), ("fsdp:2+pp:2", 4)],
)
def test_losses_logged_values_and_validations_are_those_of_one_process(
    strategy: str, size: int, ranks: Any, tmp_path: Path
) -> None:
    """38 samples in batches of 8: the last batch of an epoch has fewer samples than the pipeline chunks, a rank none at all."""
    (truth,) = ranks(1, fit, tmp_path / "one", "single")
    found = ranks(size, fit, tmp_path / "many", strategy)
    close(found[0]["logged"], truth["logged"])
    for rank in found:  # what schedulers and early stopping look at
        assert rank["metrics"]["val_loss"] == pytest.approx(truth["metrics"]["val_loss"], rel=1e-11)
    predicted = [t for rank in ([0] if size == 2 else [0, 1]) for batch in found[rank]["predicted"] for t in batch]
    assert sorted(predicted) == sorted(t for batch in truth["predicted"] for t in batch)
    assert found[0]["predicted"] == found[size // 2]["predicted"]  # all ranks of a pipeline have them


CUT = {"max_steps": 3, "max_epochs": 2, "callbacks": [Checkpoint(save_last=True)]}


def cut_and_resumed(root: Path, strategy: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that is never stopped, and one that is stopped after 3 steps, in the middle of the first epoch, and goes on."""
    whole = fit(root / "whole", strategy, **options)
    fit(root / "cut", strategy, **(options | CUT))
    return whole, fit(root / "cut", strategy, resume="auto", **options)


@pytest.mark.parametrize(
    ("strategy", "size", "options"),
    [
        ("pp:2", 2, {"summed": True, "accumulate_grad_batches": 2, "global_batch_size": None, "precision": "bf16-mixed"}),
        pytest.param("fsdp:2+pp:2", 4, {}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_in_the_middle_of_an_epoch_is_bit_for_bit_the_same(
    strategy: str, size: int, options: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    for whole, resumed in ranks(size, cut_and_resumed, tmp_path, strategy, timeout=120, **options):
        assert resumed == whole


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("pp:2", 2), ("single", 1)),
        pytest.param(("single", 1), ("pp:2", 2), marks=pytest.mark.slow),
        pytest.param(("ddp", 2), ("pp:2", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp:2+pp:2", 4), ("pp:2", 2), marks=pytest.mark.slow),
        pytest.param(("pp:2", 2), ("ddp", 2), marks=pytest.mark.slow),
        pytest.param(("pp:2", 2), ("fsdp", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp", 2), ("pp:2", 2), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_crosses_to_and_from_other_strategies(
    before: tuple[str, int], after: tuple[str, int], ranks: Any, tmp_path: Path
) -> None:
    """Weights, AdamW's state, the schedule and the data's position."""
    (truth,) = ranks(1, fit, tmp_path / "whole", "single")
    ranks(before[1], fit, tmp_path / "cut", before[0], **CUT)
    found = ranks(after[1], fit, tmp_path / "cut", after[0], resume="auto")
    close(found[0]["logged"], truth["logged"])


def test_sums_with_their_counts_over_windows_are_those_of_one_process(ranks: Any, tmp_path: Path) -> None:
    """Padded tokens: no two chunks have the same number of items."""
    options: dict[str, Any] = {"summed": True, "accumulate_grad_batches": 2, "global_batch_size": None}
    (truth,) = ranks(1, fit, tmp_path / "one", "single", **options)
    found = ranks(2, fit, tmp_path / "many", "pp:2", **options)
    close(found[0]["logged"], truth["logged"])


def start_up_lines(root: Path) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        fit(root, "pp:2", max_steps=1)
    return text.getvalue()


def test_the_start_up_lines_say_what_a_rank_has_of_the_whole(ranks: Any, tmp_path: Path) -> None:
    """Ranks of a pipeline read the same samples, and hold their own stages."""
    said, _ = ranks(2, start_up_lines, tmp_path)
    total = 8 * sum(p.numel() for p in Words().parameters())
    assert "1 micro-batch x 1 rank\n" in said
    for what, number in (("parameters", total), ("gradients", total), ("optimizer state", 2 * total)):
        found = re.search(rf"^{what} held +([\d,]+) of ([\d,]+) bytes", said, re.M)
        assert found is not None
        here, whole = (int(number.replace(",", "")) for number in found.groups())
        assert whole == number
        assert 0.3 * whole < here < 0.7 * whole


class Averages(Callback):
    """Keeps weights of its own, and saves them as they come."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        return {name: tensor for name, tensor in self.module.state_dict().items() if tensor.is_meta}


def saves_placeholders(root: Path) -> str:
    try:
        fit(root, "pp:2", max_steps=1, callbacks=[Averages(), Checkpoint("1step", wait=True)])
    except DrivetrainError as error:
        return str(error)
    return ""


def test_a_callback_that_saves_what_another_stage_holds_is_refused_by_name(ranks: Any, tmp_path: Path) -> None:
    assert "Averages" in (said := ranks(2, saves_placeholders, tmp_path)[0])
    assert "on this stage of a pipeline" in said


class Exploding(Words):
    """The loss of the third step is not finite."""

    def compute_loss(self, output: Tensor, batch: Any) -> Any:
        loss = super().compute_loss(output, batch)
        return loss * (float("nan") if self.global_step == 2 else 1.0)


class Once(Words):
    """The loss of the third batch is not finite."""

    def compute_loss(self, output: Tensor, batch: Any) -> Any:
        loss = super().compute_loss(output, batch)
        return loss * (float("nan") if self.trainer.progress.batches == 2 else 1.0)


class Spiking(Words):
    """The loss of the third batch is far above the others."""

    def compute_loss(self, output: Tensor, batch: Any) -> Any:
        loss = super().compute_loss(output, batch)
        return loss * (1000.0 if self.trainer.progress.batches == 2 else 1.0)


def explode(root: Path, **options: Any) -> Any:
    try:
        return fit(root, "pp:2", make=Exploding, max_epochs=1, **options)["logged"]["loss"]
    except NonFiniteError as error:
        return str(error)


def test_a_loss_that_is_not_finite_raises_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2, explode, tmp_path)
    assert "The loss is nan" in first
    assert "The loss is nan" in second


class Limited(Spiking):
    """Leaves out a step whose loss is above 100, as rollbacks do, and counts what was left out."""

    def on_train_start(self) -> None:
        self.trainer.accelerator.loss_limit = torch.tensor(100.0)

    def on_train_end(self) -> None:
        self.left_out = self.trainer.accelerator.nonfinite_steps


def left_out(root: Path, strategy: str, make: Callable[[], Words], **options: Any) -> tuple[dict[str, Any], int]:
    """What was logged in one epoch, and how many steps were left out."""
    made: list[Words] = []

    def keep() -> Words:
        made.append(make())
        return made[0]

    found = fit(root, strategy, make=keep, nonfinite="skip", max_epochs=1, **options)
    return found["logged"], made[0].__dict__.get("left_out", -1)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_steps_over_a_limit_of_the_loss_are_left_out_as_on_one_process(accumulate: int, ranks: Any, tmp_path: Path) -> None:
    """Also where only one micro-batch of a window is above it, whose gradients are on their way when that is known."""
    options = {"accumulate_grad_batches": accumulate, "global_batch_size": None}
    ((truth, skipped),) = ranks(1, left_out, tmp_path / "one", "single", Limited, **options)
    assert skipped == 1
    for logged, count in ranks(2, left_out, tmp_path / "many", "pp:2", Limited, **options):
        assert count == skipped
        if logged:
            assert logged["loss"] == pytest.approx(truth["loss"], rel=1e-11)
            assert logged["val_loss"] == pytest.approx(truth["val_loss"], rel=1e-11)


def test_steps_without_a_finite_loss_are_left_out_as_on_one_process(ranks: Any, tmp_path: Path) -> None:
    ((truth, _),) = ranks(1, left_out, tmp_path / "one", "single", Once)
    (logged, _), _ = ranks(2, left_out, tmp_path / "many", "pp:2", Once)
    assert [math.isnan(loss) for loss in truth["loss"]] == [i == 2 for i in range(len(truth["loss"]))]
    assert logged["loss"] == pytest.approx(truth["loss"], rel=1e-11, nan_ok=True)
    assert logged["val_loss"] == pytest.approx(truth["val_loss"], rel=1e-11)


class Noisy(nn.Module):
    """Notes what it would drop."""

    def __init__(self, drawn: list[float]) -> None:
        super().__init__()
        self.linear, self.drawn = nn.Linear(DIM, DIM), drawn

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return x + self.linear(x)


class Dropping(Words):
    def __init__(self, drawn: list[float]) -> None:
        super().__init__()
        self.net.layers = nn.ModuleList(Noisy(drawn).double() for _ in range(4))


def drawn(root: Path, strategy: Any) -> list[float]:
    numbers: list[float] = []
    fit(root, strategy, make=lambda: Dropping(numbers), max_epochs=1)
    return numbers


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_no_two_stages_draw_the_same_random_numbers(schedule: str, ranks: Any, tmp_path: Path) -> None:
    """Masks of dropout would repeat from stage to stage."""
    strategy = ParallelStrategy(plan=ParallelPlan(pp=2), pipeline=schedule)
    first, second = ranks(2, drawn, tmp_path, strategy)
    assert len(first) >= 20
    assert len(second) >= 20
    assert len({*first, *second}) == len(first) + len(second)


class NoLoss(Words):
    compute_loss = TrainingModule.compute_loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum()


class Manual(Words):
    automatic_optimization = False


class Elsewhere(Words):
    """Evaluates on other data than the pipeline ran."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0] * 0).sum()


def refusal(root: Path, make: Callable[[], Words]) -> str:
    try:
        fit(root, "pp:2", make=make, global_batch_size=None, gradient_clip_val=None)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("make", "why"),
    [(NoLoss, "defines no compute_loss"), (Manual, "defines no training_step")],
)
def test_modules_that_cannot_train_in_stages_are_refused(make: type[Words], why: str, ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2, refusal, tmp_path, make):
        assert why in message


def test_an_evaluation_of_something_else_than_the_pipeline_ran_is_refused(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="something else than the input of the pipeline"):
        ranks(2, fit, tmp_path, "pp:2", make=Elsewhere, max_epochs=1)


def test_the_default_training_step_is_forward_and_compute_loss(tmp_path: Path) -> None:
    """Without a pipeline too."""
    module = Words()
    module._metrics = None
    assert type(module).training_step is TrainingModule.training_step
    x, y = data().tensors
    module.log = lambda *args, **kwargs: None  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(module.training_step((x, y), 0), module.compute_loss(module(x), (x, y)))


class Beside(Words):
    """Returns more than the loss, and keeps what the hook of each batch gets."""

    def compute_loss(self, output: Tensor, batch: Any) -> Any:
        found = super().compute_loss(output, batch)
        loss = found if isinstance(found, dict) else {"loss": found}
        return {**loss, "chosen": output.argmax(-1), "scores": {"mean": output.mean()}, "word": "same"}

    def on_train_start(self) -> None:
        self.kept: list[Any] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        mean, loss = outputs["scores"]["mean"].detach().item(), outputs["loss"].detach().item()
        self.kept.append((outputs["chosen"].tolist(), mean, outputs["word"], loss))


def beside(root: Path, strategy: Any, summed: bool) -> Any:
    made: list[Beside] = []
    options: dict[str, Any] = {"max_epochs": 1}
    fit(root, strategy, make=lambda: made.append(Beside(summed=summed)) or made[0], **options)
    return made[0].kept


@pytest.mark.parametrize("summed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_compute_loss_returns_beside_the_loss_reaches_the_hooks_of_all_ranks(
    summed: bool, ranks: Any, tmp_path: Path
) -> None:
    """Tensors of samples are put together, single values are means by samples: those of one process."""
    (truth,) = ranks(1, beside, tmp_path / "one", "single", summed)
    for kept in ranks(2, beside, tmp_path / "many", "pp:2", summed):
        assert [(chosen, word) for chosen, _, word, _ in kept] == [(chosen, word) for chosen, _, word, _ in truth]
        for at in (1, 3):
            assert [one[at] for one in kept] == pytest.approx([one[at] for one in truth], rel=1e-10)
