"""Context parallel through the Trainer: losses of one process, logging, resume, checkpoints that one process reads, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Accelerator, Checkpoint, ParallelPlan, Trainer, TrainingModule
from drivetrain.callbacks.loggers.jsonl import read_metrics
from drivetrain.strategies.context_parallel import ContextParallel
from drivetrain.strategies.contract_models import GPT, TOKENS, VOCABULARY, Llama, MoELlama
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.parallel import ParallelStrategy
from drivetrain.strategies.shared_sequence import sequence_positions
from drivetrain.strategies.world import World
from test_same_numbers import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SAMPLES = 24


class Texts(Dataset[dict[str, Tensor]]):
    """Token sequences of several lengths, padded with label -1; labels are shifted here."""

    def __init__(self, *, padded: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS + 1), generator=generator)
        lengths = torch.randint(2, TOKENS + 1, (SAMPLES, 1), generator=generator)
        self.x, self.y = tokens[:, :-1], tokens[:, 1:].clone()
        if padded:
            self.y[torch.arange(TOKENS).expand(SAMPLES, -1) >= lengths] = -1

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index], "weight": torch.tensor(1.0)}


class Learner(TrainingModule):
    """`kind` says what of a language model's step context parallel has to deal with."""

    table: Tensor

    def __init__(self, kind: str = "sum") -> None:
        super().__init__()
        build: dict[str, Any] = {"gpt": GPT, "moe": lambda: MoELlama(layers=2)}
        self.net = build.get(kind, lambda: Llama(layers=2))().double()
        self.kind = kind
        self.seen: list[int] = []
        if kind == "table":
            self.register_buffer("table", torch.arange(TOKENS))

    def logits(self, x: Tensor) -> Tensor:
        if self.kind == "table":  # positions of its own, which nobody can find
            return self.net(x, self.table[: x.shape[1]])
        return self.net(x, sequence_positions(x.shape[1], x.device)) if self.kind == "named" else self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        x, y = batch["x"], batch["y"]
        logits = self.logits(x)
        if self.kind == "shifts":
            logits, y = logits[:, :-1], y[:, 1:]
        logits, y = logits.flatten(0, 1), y.flatten()
        self.log("accuracy", (logits.argmax(-1) == y).double().mean())
        self.seen.append(x.shape[1])
        if self.kind in ("mean", "shifts"):
            return F.cross_entropy(logits, y, ignore_index=-1)
        if self.kind == "by hand":
            return F.cross_entropy(logits, y, ignore_index=-1, reduction="none")[y != -1].mean()
        return {"loss": F.cross_entropy(logits, y, ignore_index=-1, reduction="sum"), "num_items": (y != -1).sum()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.logits(batch["x"]).flatten(0, 1)
        self.log("val_loss", F.cross_entropy(logits, batch["y"].flatten(), ignore_index=-1, reduction="sum"), reduce="sum")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.logits(batch["x"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(Texts(**options), batch_size=batch_size)


def plain_losses(kind: str = "sum", batch_size: int = 4, *, clipped: bool = True, **options: Any) -> list[float]:
    """One plain PyTorch loop."""
    module = Learner(kind)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    losses = []
    for batch in loader(batch_size, **options):
        logits, y = module.net(batch["x"]).flatten(0, 1), batch["y"].flatten()
        loss = F.cross_entropy(logits, y, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        if clipped:
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(
    root: Path, strategy: Any, kind: str, batch_size: int, *, data: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    world = World.start("cpu", need_group=True)
    strategy = strategy() if callable(strategy) else strategy
    module = Learner(kind)
    settings: dict[str, Any] = {**QUIET, "log_every_n_steps": 1, "gradient_clip_val": 0.5, "max_epochs": 1, **options}
    trainer = Trainer(root=root, strategy=strategy, **settings)
    try:
        trainer.fit(module, loader(batch_size, **(data or {})), loader(batch_size, **(data or {})))
        logged = [x["metrics"] for x in read_metrics(trainer.root)]
        found = {
            "losses": [m["loss"] for m in logged if "loss" in m],
            "accuracy": [m["accuracy"] for m in logged if "accuracy" in m],
            "val_loss": trainer.metrics["val_loss"],
            "weights": {n: t.clone() for n, t in trainer.strategy.full_state_dict(module).items()},
            "lengths": set(module.seen),
            "predicted": torch.cat(trainer.predict(module, loader(batch_size, **(data or {})))),
        }
        trainer.accelerator.end_training()
        return found
    finally:
        world.stop()


def alike(found: list[dict[str, Any]], truth: dict[str, Any]) -> None:
    """Every rank has one process's losses, logged values, predictions; rank 0 its weights."""
    for one in found:
        for key in ("losses", "accuracy", "val_loss"):
            assert one[key] == pytest.approx(truth[key], rel=1e-11), key
        torch.testing.assert_close(one["predicted"], truth["predicted"], rtol=1e-9, atol=1e-11)
    for name, weight in truth["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], weight, rtol=1e-9, atol=1e-11)


def asked() -> Any:
    return ParallelStrategy(plan=ParallelPlan(cp=2), context_parallel=ContextParallel(positions="model"))


@pytest.mark.parametrize("kind", ["sum", "named"])
def test_two_ranks_that_share_sequences_train_as_one_process(kind: str, ranks: Any, tmp_path: Path) -> None:
    """Padded sequences, clipping; the model counts positions with torch.arange, or asks for them."""
    (truth,) = ranks(1, trained, tmp_path / "1", "single", kind, 4)
    found = ranks(2, trained, tmp_path / "2", "cp:2" if kind == "sum" else asked, kind, 4)
    assert truth["losses"] == pytest.approx(plain_losses(kind), rel=1e-12)
    alike(found, truth)
    # The step saw half of each sequence (and in the verification the whole).
    assert found[0]["lengths"] == {TOKENS, TOKENS // 2}


def ring() -> Any:
    return ParallelStrategy(
        plan=ParallelPlan(dp_shard=2, cp=2), context_parallel=ContextParallel(method="ring", positions="arange")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "kind", "size", "batch"),
    [
        ("fsdp:2+cp:2", "sum", 4, 2),
        (ring, "sum", 4, 2),
        ("cp:2", "gpt", 2, 4),
    ],
)
def test_other_models_and_plans_train_as_one_process(
    strategy: Any, kind: str, size: int, batch: int, ranks: Any, tmp_path: Path
) -> None:
    """Learned positions; data parallel beside it."""
    (truth,) = ranks(1, trained, tmp_path / "1", "single", kind, 4)
    found = ranks(size, trained, tmp_path / "2", strategy, kind, batch, timeout=120)
    for one in found:
        assert one["losses"] == pytest.approx(truth["losses"], rel=1e-11)
        assert one["val_loss"] == pytest.approx(truth["val_loss"], rel=1e-11)
    for name, weight in truth["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("padded", [False, True])
def test_a_mean_is_that_of_the_whole_sequence_in_every_step(padded: bool, ranks: Any, tmp_path: Path) -> None:
    """Padded, the parts hold other numbers of labels, and others in each step."""
    found = ranks(2, trained, tmp_path / "2", "cp:2", "mean", 4, data={"padded": padded})
    assert found[0]["losses"] == pytest.approx(plain_losses("mean", padded=padded), rel=1e-11)


def refusal(root: Path, kind: str, options: dict[str, Any], data: dict[str, Any]) -> str:
    try:
        trained(root, ParallelStrategy(plan=ParallelPlan(cp=2), context_parallel=ContextParallel(**options)), kind, 4, data=data)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "options", "data", "says"),
    [
        ("table", {}, {}, "the queries of its attention number 0 are different.*sequence_positions"),
        ("sum", {"positions": "model"}, {}, "the queries of its attention number 0 are different"),
        ("shifts", {}, {"padded": False}, "its attention is the same, and the losses of the parts make .*shifts labels"),
        ("by hand", {}, {}, "its attention is the same, and the losses.*num_items"),
        ("sum", {"keys": ["tokens"]}, {}, "finds no tokens in it"),
        ("sum", {"keys": ["x"]}, {}, ""),
    ],
    ids=[
        "positions from a table",
        "positions by arange, not replaced",
        "labels shifted inside",
        "unequal means by hand",
        "no such key",
        "half",
    ],
)
def test_what_would_train_on_other_numbers_is_refused(
    kind: str, options: dict[str, Any], data: dict[str, Any], says: str, ranks: Any, tmp_path: Path
) -> None:
    """Found at the first step, before anything was trained."""
    if not says:
        with pytest.raises(RuntimeError, match=r"size of tensor a \(16\) must match the size of tensor b \(32\)") as met:
            ranks(2, refusal, tmp_path, kind, options, data)
        assert any("was verifying training_step" in note for note in met.value.__notes__)
        return
    for said in ranks(2, refusal, tmp_path, kind, options, data):
        assert re.search(says, said), said


def resumed(root: Path, strategy: str, kind: str, batch_size: int) -> tuple[list[float], list[float]]:
    """The losses of four steps; and of the last two, after a save at the second."""
    world = World.start("cpu", need_group=True)
    found: list[list[float]] = []
    quiet: dict[str, Any] = {**QUIET, "enable_checkpointing": True}
    try:
        for max_steps, resume, name in ((4, None, "a"), (2, None, "b"), (4, "auto", "b")):
            trainer = Trainer(
                **quiet, callbacks=Checkpoint(every_n_train_steps=2),
                root=root, name=name, strategy=strategy, log_every_n_steps=1, max_steps=max_steps, resume=resume,
            )  # fmt: skip
            trainer.fit(Learner(kind), loader(batch_size))
            logged = [x["metrics"] for x in read_metrics(trainer.root)]
            found.append([m["loss"] for m in logged if "loss" in m])
            trainer.accelerator.end_training()
    finally:
        world.stop()
    return found[0], found[2]


def test_a_resumed_run_goes_on_bit_for_bit_and_one_process_reads_its_checkpoint(ranks: Any, tmp_path: Path) -> None:
    for whole, cut in ranks(2, resumed, tmp_path, "cp:2", "sum", 4, timeout=90):
        assert len(whole) == 4
        assert cut == whole
    (single,) = ranks(1, goes_on, tmp_path, "sum")
    assert single == pytest.approx(plain_losses("sum", clipped=False), rel=1e-11)


def goes_on(root: Path, kind: str) -> list[float]:
    world = World.start("cpu", need_group=True)
    trainer = Trainer(**QUIET, root=root, name="b", strategy="single", log_every_n_steps=1, max_steps=6, resume="auto")
    trainer.fit(Learner(kind), loader(4))
    losses = [x["metrics"].get("loss") for x in read_metrics(trainer.root)]
    trainer.accelerator.end_training()
    world.stop()
    return [x for x in losses if x is not None]


def by_hand(positions: str, outside: bool) -> Any:
    world = World.start("cpu", need_group=True)
    options = ContextParallel(positions=positions, method="ring")
    strategy = ParallelStrategy(plan=ParallelPlan(cp=2), context_parallel=options)
    accelerator = Accelerator(strategy=strategy, world=world)
    net = Llama(layers=2).double()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.01))
    losses: list[float] = []
    try:
        for batch in loader(padded=False):
            x, y = batch["x"], batch["y"]
            whole = x.clone()
            with accelerator.maybe_context_parallel(buffers=[x, y], buffer_seq_dims=[1, 1], no_restore_buffers={y}):
                assert x.shape[1] == TOKENS // 2
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                if not outside:
                    accelerator.backward(loss)
            if outside:
                accelerator.backward(loss)
            assert torch.equal(x, whole)
            assert y.shape[1] == TOKENS // 2
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(world.all_reduce(loss.detach())) / 2)
        return losses
    except (ConfigError, RuntimeError) as error:
        return str(error)
    finally:
        world.stop()


@pytest.mark.parametrize(
    ("positions", "outside", "says"),
    [
        ("arange", False, ""),
        ("auto", False, r"torch.arange\(4\) is asked for while sequences are shared"),
        ("arange", True, "modified by an inplace operation"),  # x is whole again by then
    ],
)
def test_a_loop_with_accelerates_words_trains_as_one_process(positions: str, outside: bool, says: str, ranks: Any) -> None:
    """Accelerate's maybe_context_parallel: buffers are parts inside, and whole again behind unless that is not wanted."""
    for found in ranks(2, by_hand, positions, outside):
        if says:
            assert re.search(says, found), found
        else:
            assert found == pytest.approx(plain_losses("mean", clipped=False, padded=False), rel=1e-11)


def test_what_is_no_buffer_is_refused_and_without_cp_nothing_is_cut() -> None:
    accelerator = Accelerator(strategy="single", device="cpu")
    x = torch.ones(2, 6)
    with accelerator.maybe_context_parallel(buffers=[x], buffer_seq_dims=[1]):
        assert x.shape == (2, 6)
    with accelerator.maybe_context_parallel():
        pass
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"buffers": [x]}, "1 buffers and 0"),
        ({"buffers": [nn.Parameter(x)], "buffer_seq_dims": [1]}, "that is trained"),
        ({"no_restore_buffers": {x}}, "not in buffers"),
    ]
    for options, says in wrong:
        with pytest.raises(ConfigError, match=says):
            accelerator.maybe_context_parallel(**options)
