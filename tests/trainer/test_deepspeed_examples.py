"""The examples with several models give the numbers of plain PyTorch loops: distillation, GAN, actor and critic with a reference.

It is the examples' own code that is run, on two processes with half of each batch; the truth is one process with the whole batch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Accelerator, DeepSpeedStrategy, Strategy, Trainer
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.deepspeed_engine import library
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

library(torch.device("cpu"))

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUIET: dict[str, Any] = {"enable_progress_bar": False, "num_sanity_val_steps": 0, "seed": 3}
BATCH = 8


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


distillation, gan, bandit = example("07_distillation"), example("08_gan"), example("09_actor_critic")


def rows(*widths: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(1)
    return [torch.randn(4 * BATCH, width, generator=chance) for width in widths]


def held(kind: str, *, inference: bool = False) -> Strategy:
    """A strategy by its name; ZeRO-3 keeps nothing gathered."""
    if kind == "deepspeed:3":
        return DeepSpeedStrategy(stage=3, stage3_param_persistence_threshold=0, inference=inference)
    return make_strategy(kind, inference=inference)


Weights = dict[str, dict[str, list[float]]]


def whole(accelerator: Accelerator, models: dict[str, nn.Module]) -> Weights:
    return {n: {k: t.flatten().tolist() for k, t in accelerator.get_state_dict(m).items()} for n, m in models.items()}


def trained(
    module: Any, strategies: dict[str, Strategy], root: Path, *widths: int, epochs: int = 2, resume: Any = None
) -> Weights:
    trainer = Trainer(**QUIET, models=strategies, max_epochs=epochs, root=root, name="run", resume=resume)
    batches = DataLoader(TensorDataset(*rows(*widths)), batch_size=BATCH // trainer.world.size)
    trainer.fit(module, batches)
    found = whole(trainer.accelerator, module.models())
    trainer.accelerator.end_training()
    return found


def assert_same(found: Weights, truth: dict[str, nn.Module], *, still: str = "") -> None:
    for name, model in truth.items():
        for key, weight in model.state_dict().items():
            if name == still:
                assert found[name][key] == weight.flatten().tolist(), f"{name} moved: {key}"
            else:
                assert found[name][key] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-5), (name, key)


# -- distillation -------------------------------------------------------------------------------------------------------------
def distilled(student: str, teacher: str, root: Path, epochs: int = 2, resume: Any = None) -> Weights:
    strategies = {"student": held(student), "teacher": held(teacher, inference=True)}
    return trained(distillation.Distillation(), strategies, root, 16, epochs=epochs, resume=resume)


def plain_distillation() -> dict[str, nn.Module]:
    """No Trainer, no teacher in pieces: the loop that a reader of Hinton et al. would write."""
    models = distillation.Distillation().models()
    optimizer = torch.optim.AdamW(models["student"].parameters(), lr=3e-3)
    before = [p.clone() for p in models["student"].parameters()]
    for _ in range(2):
        for x in rows(16)[0].split(BATCH):
            with torch.no_grad():
                answer = models["teacher"](x).log_softmax(-1)
            loss = F.kl_div(models["student"](x).log_softmax(-1), answer, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, models["student"].parameters(), strict=True))
    return models


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("deepspeed:2", "deepspeed:3"),
        pytest.param("ddp", "fsdp", marks=pytest.mark.slow),
        pytest.param("ddp", "deepspeed:3", marks=pytest.mark.slow),
        pytest.param("deepspeed:2", "fsdp", marks=pytest.mark.slow),
        pytest.param("fsdp", "single", marks=pytest.mark.slow),
    ],
)
def test_the_student_is_that_of_a_plain_distillation_and_the_teacher_does_not_move(
    student: str, teacher: str, ranks: Any, tmp_path: Path
) -> None:
    assert_same(ranks(2, distilled, student, teacher, tmp_path)[0], plain_distillation(), still="teacher")


@pytest.mark.slow
def test_a_checkpoint_holds_student_and_teacher(ranks: Any, tmp_path: Path) -> None:
    """The second epoch in fresh processes, from what the first left: the same bits."""
    straight = ranks(2, distilled, "deepspeed:2", "deepspeed:3", tmp_path / "straight")[0]
    ranks(2, distilled, "deepspeed:2", "deepspeed:3", tmp_path / "cut", 1)
    assert ranks(2, distilled, "deepspeed:2", "deepspeed:3", tmp_path / "cut", 2, "auto")[0] == straight


# -- GAN ----------------------------------------------------------------------------------------------------------------------
def played(generator: str, critic: str, root: Path) -> Weights:
    return trained(gan.GAN(), {"generator": held(generator), "critic": held(critic)}, root, 2, 4)


def plain_gan() -> dict[str, nn.Module]:
    models = gan.GAN().models()
    generator, critic = models["generator"], models["critic"]
    for_generator, for_critic = (torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0.5, 0.9)) for m in (generator, critic))
    for _ in range(2):
        for real, noise in zip(*(r.split(BATCH) for r in rows(2, 4)), strict=True):
            for_critic.zero_grad()
            (F.softplus(-critic(real)).mean() + F.softplus(critic(generator(noise).detach())).mean()).backward()
            for_critic.step()
            for_generator.zero_grad()
            F.softplus(-critic(generator(noise))).mean().backward()
            for_generator.step()
    return models


@pytest.mark.parametrize(
    ("generator", "critic"),
    [
        ("deepspeed:1", "deepspeed:2"),
        pytest.param("deepspeed:3", "deepspeed:3", marks=pytest.mark.slow),
        pytest.param("ddp", "deepspeed:2", marks=pytest.mark.slow),
        pytest.param("deepspeed:0", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_gan_is_that_of_a_plain_loop(generator: str, critic: str, ranks: Any, tmp_path: Path) -> None:
    """Alternating optimizers; the generator's loss passes through the critic, which takes nothing of it."""
    assert_same(ranks(2, played, generator, critic, tmp_path)[0], plain_gan())


# -- actor, critic, reference -------------------------------------------------------------------------------------------------
class Best:
    """In place of a draw, which depends on the rank: the arm with the best chance."""

    def __call__(self, chances: Tensor, count: int) -> Tensor:
        return chances.argmax(-1, keepdim=True)


def acted(actor: str, critic: str, reference: str) -> Weights:
    bandit.torch.multinomial = Best()
    accelerator = Accelerator(models={"actor": held(actor), "critic": held(critic), "reference": held(reference, inference=True)})
    mine = [b[accelerator.process_index :: accelerator.num_processes] for b in rows(4)[0].split(BATCH)]
    models, _ = bandit.train(accelerator, mine)
    found = whole(accelerator, models)
    accelerator.end_training()
    return found


def plain_bandit(monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    monkeypatch.setattr(torch, "multinomial", Best())
    torch.manual_seed(0)
    models = {"actor": bandit.net(4), "critic": bandit.net(1), "reference": bandit.net(4)}
    models["reference"].load_state_dict(models["actor"].state_dict())
    optimizers = [torch.optim.Adam(models[n].parameters(), lr=3e-3) for n in ("actor", "critic")]
    for seen in rows(4)[0].split(BATCH):
        bandit.joint_loss(*models.values(), seen)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return models


@pytest.mark.parametrize(
    ("actor", "critic", "reference"),
    [
        ("deepspeed:2", "deepspeed:2", "single"),
        pytest.param("deepspeed:3", "deepspeed:1", "deepspeed:3", marks=pytest.mark.slow),
        pytest.param("deepspeed:2", "ddp", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_one_joint_loss_trains_actor_and_critic_and_leaves_the_reference(
    actor: str, critic: str, reference: str, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ranks(2, acted, actor, critic, reference)[0]
    assert_same(found, plain_bandit(monkeypatch), still="reference")
