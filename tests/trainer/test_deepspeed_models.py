"""Several models with DeepSpeed and with a mix of strategies: teacher and student, disjoint models, one loss through two.

The truth is a plain PyTorch loop in one process over the global batches, in fp32.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain import Accelerator, DeepSpeedPlugin, DeepSpeedStrategy, get_active_deepspeed_plugin
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.deepspeed_engine import library
from drivetrain.strategies.errors import ConfigError, UnknownName
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

deepspeed = library(torch.device("cpu"))

from deepspeed.runtime import lr_schedules  # noqa: E402  # by `library`, quietly

SAMPLES, GLOBAL = 24, 4
ZERO2 = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": 2}}
ZERO3 = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 1e6,
    },
    "train_micro_batch_size_per_gpu": 2,
}


def net(seed: int, hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 5))


def loader(ranks: int) -> DataLoader[Any]:
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(x), batch_size=GLOBAL // ranks)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


def plain_distillation() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of student and teacher after two epochs."""
    student, teacher = net(0), net(1, 16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    for _ in range(2):
        for (x,) in loader(1):
            optimizer.zero_grad()
            distance(student(x), teacher(x).detach()).backward()
            optimizer.step()
            scheduler.step()
    return student.state_dict(), teacher.state_dict()


def whole(accelerator: Accelerator, *models: nn.Module) -> list[dict[str, list[float]]]:
    found = [{n: t.flatten().tolist() for n, t in accelerator.get_state_dict(m).items()} for m in models]
    accelerator.end_training()
    return found


def by_plugins(size: int) -> list[dict[str, list[float]]]:
    """Accelerate's first use case, in its words."""
    zero2_plugin = DeepSpeedPlugin(hf_ds_config=ZERO2)
    zero3_plugin = DeepSpeedPlugin(hf_ds_config=ZERO3)
    deepspeed_plugins = {"student": zero2_plugin, "teacher": zero3_plugin}
    accelerator = Accelerator(deepspeed_plugins=deepspeed_plugins)
    assert accelerator.deepspeed_plugin is accelerator.state.get_deepspeed_plugin("student")

    student_model = net(0)
    optimizer = torch.optim.AdamW(student_model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    student_model, optimizer, scheduler, train_dataloader = accelerator.prepare(student_model, optimizer, scheduler, loader(size))
    accelerator.state.select_deepspeed_plugin("teacher")
    assert accelerator.deepspeed_plugin is get_active_deepspeed_plugin(accelerator.state) is zero3_plugin
    teacher_model = accelerator.prepare(net(1, 16))
    assert all(hasattr(p, "ds_id") for p in teacher_model.parameters())

    teacher_model.eval()
    student_model.train()
    for _ in range(2):
        for (x,) in train_dataloader:
            with torch.no_grad():
                output_teacher = teacher_model(x)
            output_student = student_model(x)
            loss = distance(output_student, output_teacher)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    with pytest.raises(UnknownName, match="Did you mean 'teacher'"):
        accelerator.state.select_deepspeed_plugin("teachr")
    return whole(accelerator, student_model, teacher_model)


def by_strategies(size: int, student_strategy: str, teacher_strategy: Any) -> list[dict[str, list[float]]]:
    """The same with a strategy for each named model."""
    kind, options = teacher_strategy
    teacher_held = DeepSpeedStrategy(inference=True, **options) if kind == "deepspeed" else make_strategy(kind, inference=True)
    accelerator = Accelerator(models={"student": student_strategy, "teacher": teacher_held})
    student = net(0)
    teacher = net(1, 16)
    prepared, (optimizer,) = accelerator.prepare_models(
        {"student": student, "teacher": teacher},
        lambda: {"student": torch.optim.AdamW(student.parameters(), lr=1e-2)},
    )
    scheduler = accelerator.prepare_scheduler(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 3, gamma=0.5))
    batches = accelerator.prepare_data_loader(loader(size))
    for _ in range(2):
        for (x,) in batches:
            with torch.no_grad():
                target = prepared["teacher"](x)
            accelerator.backward(distance(prepared["student"](x), target))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return whole(accelerator, student, teacher)


def assert_distilled(found: list[dict[str, list[float]]]) -> None:
    student, teacher = plain_distillation()
    for name, weight in student.items():
        assert found[0][name] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-5), name
    for name, weight in teacher.items():
        assert found[1][name] == weight.flatten().tolist(), f"the teacher moved: {name}"


@pytest.mark.parametrize("size", [1, 2])
def test_the_words_of_accelerate_for_teacher_and_student(size: int, ranks: Any) -> None:
    """ZeRO-2 for the student that is trained, ZeRO-3 for the teacher that is not: only the import was changed."""
    assert_distilled(ranks(size, by_plugins, size)[0])


TEACHERS = {
    "deepspeed:2 and deepspeed:3": ("deepspeed:2", ("deepspeed", {"stage": 3, "stage3_param_persistence_threshold": 0})),
    "ddp and deepspeed:3": ("ddp", ("deepspeed", {"stage": 3})),
    "deepspeed:1 and single": ("deepspeed:1", ("single", {})),
    "deepspeed:2 and fsdp": ("deepspeed:2", ("fsdp", {})),
}


@pytest.mark.parametrize("mix", [next(iter(TEACHERS)), *(pytest.param(m, marks=pytest.mark.slow) for m in list(TEACHERS)[1:])])
def test_each_model_has_its_own_strategy(mix: str, ranks: Any) -> None:
    assert_distilled(ranks(2, by_strategies, 2, *TEACHERS[mix])[0])


def plain_disjoint() -> list[dict[str, Tensor]]:
    models = [net(0), net(1, 16)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    for (x,) in loader(1):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
    return [m.state_dict() for m in models]


def by_two_accelerators(size: int) -> list[dict[str, list[float]]]:
    """Accelerate's second use case: a second Accelerator() finds the plugins of the first."""
    plugins = {"model1": DeepSpeedPlugin(hf_ds_config=ZERO2), "model2": DeepSpeedPlugin(zero_stage=3)}
    accelerator_0 = Accelerator(deepspeed_plugin=plugins)
    accelerator_1 = Accelerator()
    accelerator_0.state.enable_deepspeed_plugin("model1")
    model_0 = net(0)
    optimizer_0 = torch.optim.AdamW(model_0.parameters(), lr=1e-2)
    model_0, optimizer_0, dl = accelerator_0.prepare(model_0, optimizer_0, loader(size))
    accelerator_1.state.enable_deepspeed_plugin("model2")
    model_1 = net(1, 16)
    optimizer_1 = torch.optim.AdamW(model_1.parameters(), lr=1e-2)
    model_1, optimizer_1 = accelerator_1.prepare(model_1, optimizer_1)
    for (x,) in dl:
        accelerator_0.backward(model_0(x).pow(2).mean())
        optimizer_0.step()
        optimizer_0.zero_grad()
        accelerator_1.backward(model_1(x).pow(2).mean())
        optimizer_1.step()
        optimizer_1.zero_grad()
    second = whole(accelerator_1, model_1)
    return whole(accelerator_0, model_0) + second


def test_disjoint_models_with_their_own_accelerators(ranks: Any) -> None:
    found = ranks(2, by_two_accelerators, 2)[0]
    for weights, truth in zip(found, plain_disjoint(), strict=True):
        for name, weight in truth.items():
            assert weights[name] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-5), name


def jointly(size: int, one: str, two: str) -> list[dict[str, list[float]]]:
    """One loss through two trained models, SGD: the weights' change is the gradient."""
    accelerator = Accelerator(models={"one": one, "two": two})
    models: dict[str, nn.Module] = {"one": net(0), "two": net(1, 16)}
    prepared, optimizers = accelerator.prepare_models(
        models, lambda: {n: torch.optim.SGD(m.parameters(), lr=0.1) for n, m in models.items()}
    )
    for (x,) in accelerator.prepare_data_loader(loader(size)):
        accelerator.backward((prepared["one"](x) + prepared["two"](x)).pow(2).mean())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return whole(accelerator, *models.values())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("deepspeed:2", "deepspeed:3"),
        pytest.param("deepspeed:0", "deepspeed:1", marks=pytest.mark.slow),
        pytest.param("ddp", "deepspeed:2", marks=pytest.mark.slow),
        pytest.param("fsdp", "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_joint_loss_gives_both_models_the_gradients_of_a_plain_backward_pass(one: str, two: str, ranks: Any) -> None:
    models = [net(0), net(1, 16)]
    for (x,) in loader(1):
        (models[0](x) + models[1](x)).pow(2).mean().backward()
        with torch.no_grad():
            for parameter in (p for m in models for p in m.parameters()):
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    found = ranks(2, jointly, 2, one, two)[0]
    for weights, truth in zip(found, models, strict=True):
        for name, weight in truth.state_dict().items():
            assert weights[name] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-5), name


def test_what_is_no_plugin_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"zero3_init_flag=True\) .* build inside `with accelerator.strategy.init_context"):
        DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True)
    with pytest.raises(ConfigError, match="must be a DeepSpeedPlugin"):
        Accelerator(deepspeed_plugins={"a": 3})


FULL = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.0, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto", "total_num_steps": "auto", "warmup_type": "linear"},
    },
    **ZERO2,
}
# The guide's first use case with `optimizer` and `scheduler` in the JSON, a teacher built under zero.Init by hand, batches that
# are dicts and models that return their loss. It is run with the first word of its imports changed.
SCRIPT = """
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, get_active_deepspeed_plugin

plugins = {"student": DeepSpeedPlugin(hf_ds_config="full.json"), "teacher": DeepSpeedPlugin(hf_ds_config="zero3.json")}
accelerator = Accelerator(deepspeed_plugin=plugins)
assert get_active_deepspeed_plugin(accelerator.state) is plugins["student"] is accelerator.deepspeed_plugin
assert accelerator.deepspeed_config["zero_optimization"]["stage"] == 2
student = build(0, 8)
has_optimizer = "optimizer" in accelerator.state.deepspeed_plugin.deepspeed_config
optimizer = (DummyOptim if has_optimizer else torch.optim.AdamW)(student.parameters(), lr=1e-2)
scheduler = DummyScheduler(optimizer, total_num_steps=12, warmup_num_steps=4)
student, optimizer, scheduler, batches = accelerator.prepare(student, optimizer, scheduler, batches)
accelerator.state.enable_deepspeed_plugin("teacher")
with deepspeed.zero.Init(config_dict_or_path=accelerator.deepspeed_plugin.config):
    teacher = build(1, 16)
teacher = accelerator.prepare(teacher)
student.train()
teacher.eval()
for epoch in range(2):
    for batch in batches:
        with torch.no_grad():
            output_teacher = teacher(**batch)
        output_student = student(**batch)
        accelerator.backward(output_teacher["loss"] + output_student["loss"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
"""


class Answers(nn.Module):
    """Returns its loss beside its answer, as models of transformers do."""

    def __init__(self, seed: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(3, hidden), nn.Linear(hidden, 5)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.last(self.first(x).tanh()), labels)}


def labelled(ranks: int) -> DataLoader[Any]:
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(5))
    rows: Any = [{"x": row, "labels": row.sum().expand(5)} for row in x]
    return DataLoader(rows, batch_size=GLOBAL // ranks)


def scripted(size: int, folder: Path) -> list[dict[str, list[float]]]:
    os.chdir(folder)
    names: dict[str, Any] = {"build": Answers, "batches": labelled(size), "deepspeed": deepspeed}
    exec(SCRIPT.replace("accelerate.utils", "drivetrain").replace("accelerate import", "drivetrain import"), names)
    assert all(hasattr(p, "ds_id") for p in names["teacher"].parameters())
    return whole(names["accelerator"], names["student"], names["teacher"])


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_script_with_optimizer_and_scheduler_in_the_json_runs_by_its_imports_alone(
    size: int, ranks: Any, tmp_path: Path
) -> None:
    """Warm-up to 1e-2 in four steps, and down to nothing at the twelfth, which is the last."""
    (tmp_path / "full.json").write_text(json.dumps(FULL))
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    student = Answers(0, 8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = lr_schedules.WarmupDecayLR(optimizer, 12, 0.0, 1e-2, 4, "linear")
    for _ in range(2):
        for batch in labelled(1):
            optimizer.zero_grad()
            student(**batch)["loss"].backward()
            optimizer.step()
            scheduler.step()
    found = ranks(size, scripted, size, tmp_path)[0]
    for name, weight in student.state_dict().items():
        assert found[0][name] == pytest.approx(weight.flatten().tolist(), rel=1e-4, abs=1e-5), name


PLUGINS: dict[str, tuple[dict[str, Any], str]] = {
    "two stages": ({"hf_ds_config": ZERO3, "zero_stage": 2}, r"zero_stage=2\) and its JSON's zero_optimization.stage=3 differ"),
    "two places": (
        {"hf_ds_config": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param_device": "nvme"},
        "'nvme'.* and its JSON's offload_param.device='cpu' differ",
    ),
    "MS-AMP": ({"enable_msamp": True}, "MS-AMP is not maintained any more"),
    "a misspelt key": ({"hf_ds_config": {"zero_optimisation": {}}}, "Did you mean 'zero_optimization'"),
}


@pytest.mark.parametrize("case", list(PLUGINS))
def test_what_a_plugin_and_its_json_say_differently_is_named(case: str) -> None:
    given, words = PLUGINS[case]
    with pytest.raises(ConfigError, match=words):
        DeepSpeedPlugin(**given)


def test_a_plugin_is_asked_as_accelerates_is() -> None:
    plugin = DeepSpeedPlugin(
        hf_ds_config={"zero_optimization": {"stage": "auto", "offload_param": {"device": "auto", "pin_memory": True}}},
        zero_stage=3,
        offload_param_device="cpu",
        offload_optimizer_device="none",
        gradient_clipping=0.5,
        gradient_accumulation_steps=4,
    )
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.gradient_accumulation_steps) == (3, 0.5, 4)
    assert plugin.get_value("zero_optimization.offload_param") == {"device": "cpu", "pin_memory": True}
    assert not plugin.is_auto("zero_optimization.stage")
    assert DeepSpeedPlugin(hf_ds_config={"bf16": {"enabled": "auto"}}).is_auto("bf16.enabled")
    assert "bf16" not in DeepSpeedPlugin(hf_ds_config={"train_batch_size": "auto"}).config
