"""TransformerEngine's adapter without a GPU: real recipes, our calls against the real signatures, the swap with a stand-in.

The real modules need CUDA even to be built; what they compute is tested by those at the end, which wait for a GPU.
"""

from __future__ import annotations

import ast
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain.strategies.base import Strategy, make_precision
from drivetrain.strategies.errors import ConfigError, MissingDependency, UnknownName
from drivetrain.strategies.precision import float8_te
from drivetrain.strategies.precision.float8_te import RECIPES, Float8TE, TERecipe
from drivetrain.strategies.precision.msamp import Float8MSAMP, MSAMPRecipe
from drivetrain.strategies.world import World
from tiny_gpt import StagedGPT, TinyGPT, train
from torch import Tensor, nn

try:
    SOURCES = {str(f): Path(str(f.locate())) for f in files("transformer-engine") or () if str(f).endswith(".py")}
except PackageNotFoundError:
    SOURCES = {}
needs_sources = pytest.mark.skipif(not SOURCES, reason="waits for the sources: pip install transformer-engine (1.2 MB)")
CUDA = torch.device("cuda")


@pytest.fixture
def real_recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real package's recipes, which it hands out without its compiled part only while it is being built."""
    monkeypatch.setenv("NVTE_PROJECT_BUILDING", "1")
    before = set(sys.modules)
    if SOURCES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that its part for torch is missing, which is so
            import transformer_engine.common.recipe  # noqa: F401  # pyright: ignore[reportMissingImports]
    yield
    for name in set(sys.modules) - before:
        if name.startswith("transformer_engine"):
            del sys.modules[name]


# -- a stand-in for transformer_engine.pytorch ----------------------------------------------------------------------------


class TEModule(nn.Module):
    """What our adapter touches of TransformerEngine's base class."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self.fp8_meta_tensors_initialized = False

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        self.fp8_meta_tensors_initialized = True
        for part, count in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            state = types.SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(recipe.amax_history_len, count))
            self.fp8_meta[part] = state

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)  # a pickle, in the real one

    def set_extra_state(self, state: Tensor) -> None: ...


class TELinear(TEModule):
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, params_dtype: Any = None, device: Any = "cuda"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        else:
            self.bias = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if AUTOCAST and AUTOCAST[-1]["enabled"]:
            x = x + (x.to(torch.float8_e4m3fn).to(x.dtype) - x).detach()
        return F.linear(x, self.weight, self.bias if self.bias.numel() else None)


class TELayerNorm(nn.LayerNorm):
    def __init__(self, normalized_shape: Any, eps: float = 1e-5, params_dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(normalized_shape, eps=eps, dtype=params_dtype, **kwargs)


class TERMSNorm(nn.RMSNorm):
    def __init__(self, normalized_shape: Any, eps: float = 1e-5, params_dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(normalized_shape, eps=eps, dtype=params_dtype, **kwargs)


class TELayerNormLinear(TELinear):
    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, normalization: str = "LayerNorm", **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, **kwargs)
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, device="meta"))
        self.layer_norm_bias: Any = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.empty(in_features, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        if self.normalization == "LayerNorm":
            x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(x)


AUTOCAST: list[dict[str, Any]] = []


class TEAutocast:
    def __init__(self, enabled: bool = True, recipe: Any = None, amax_reduction_group: Any = None) -> None:
        self.said = {"enabled": enabled, "recipe": recipe, "group": amax_reduction_group}

    def __enter__(self) -> None:
        AUTOCAST.append(self.said)

    def __exit__(self, *exc: Any) -> None:
        AUTOCAST.pop()


@pytest.fixture
def stand_in(real_recipes: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A transformer_engine.pytorch of the classes above, on a machine that is told to have CUDA."""
    if not SOURCES:
        pytest.skip("waits for the sources: pip install transformer-engine (1.2 MB)")
    te: Any = types.ModuleType("transformer_engine.pytorch")
    te.Linear, te.LayerNorm, te.RMSNorm, te.autocast = TELinear, TELayerNorm, TERMSNorm, TEAutocast
    te.LayerNormLinear = TELayerNormLinear
    for _, question, _ in RECIPES.values():
        setattr(te, question, lambda return_reason: (True, ""))
    compiled = types.ModuleType("transformer_engine_torch")
    compiled.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", compiled)
    monkeypatch.setattr(Float8TE, "available", lambda self, device: None)
    monkeypatch.setattr(Float8TE, "_device", torch.device("cpu"))
    AUTOCAST.clear()
    return te


# -- recipes, of the real package -----------------------------------------------------------------------------------------


@needs_sources
@pytest.mark.parametrize("scaling", RECIPES)
def test_each_recipe_is_built_by_the_real_package(scaling: str, real_recipes: None) -> None:
    assert type(TERecipe(scaling=scaling).build()).__name__ == RECIPES[scaling][0]


@needs_sources
def test_options_reach_the_real_recipe(real_recipes: None) -> None:
    built = TERecipe(scaling="delayed", options={"amax_history_len": 16, "fp8_format": "E4M3", "margin": 1}).build()
    assert (built.amax_history_len, built.fp8_format.name, built.margin) == (16, "E4M3", 1)


@needs_sources
def test_an_option_that_the_real_recipe_would_silently_take_is_refused(real_recipes: None) -> None:
    with pytest.raises(UnknownName, match=r"DelayedScaling has no option 'amax_histori_len'. Did you mean 'amax_history_len'"):
        TERecipe(options={"amax_histori_len": 16}).build()


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'delayed'"):
        TERecipe(scaling="delay")


# -- the contract: our calls against the real sources ---------------------------------------------------------------------


def signature(path: str, name: str, method: str = "__init__") -> list[str]:
    """The arguments of a method (or of a function) in the real sources, which are not imported."""
    tree = ast.parse(SOURCES[f"transformer_engine/{path}"].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == method:
                    return [a.arg for a in (*inner.args.args, *inner.args.kwonlyargs) if a.arg != "self"]
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
    raise KeyError((path, name, method))


@needs_sources
@pytest.mark.parametrize(
    ("path", "name", "ours"),
    [
        ("pytorch/module/linear.py", "Linear", ["in_features", "out_features", "bias", "params_dtype", "device"]),
        (
            "pytorch/module/layernorm_linear.py",
            "LayerNormLinear",
            ["in_features", "out_features", "eps", "bias", "normalization", "params_dtype", "device"],
        ),
        ("pytorch/module/layernorm.py", "LayerNorm", ["normalized_shape", "eps", "params_dtype"]),
        ("pytorch/module/rmsnorm.py", "RMSNorm", ["normalized_shape", "eps", "params_dtype"]),
        ("pytorch/quantization.py", "autocast", ["enabled", "recipe", "amax_reduction_group"]),
        *[("pytorch/quantization.py", question, ["return_reason"]) for _, question, _ in RECIPES.values()],
    ],
)
def test_every_argument_that_we_give_exists_in_the_real_package(path: str, name: str, ours: list[str]) -> None:
    assert not set(ours) - set(signature(path, name))


@needs_sources
def test_what_we_touch_of_the_real_modules_is_there() -> None:
    base = SOURCES["transformer_engine/pytorch/module/base.py"].read_text()
    assert signature("pytorch/module/base.py", "TransformerEngineBaseModule", "init_fp8_meta_tensors") == ["recipe"]
    for used in ("self.fp8_meta_tensors_initialized = False", "self.fp8_meta[", '"scaling_fwd"', '"scaling_bwd"'):
        assert used in base
    quantization = SOURCES["transformer_engine/pytorch/quantization.py"].read_text()
    assert '_persistent_state_buffers = ("scale", "amax_history")' in quantization
    exported = (
        SOURCES["transformer_engine/pytorch/__init__.py"].read_text()
        + SOURCES["transformer_engine/pytorch/module/__init__.py"].read_text()
    )
    fused = SOURCES["transformer_engine/pytorch/module/layernorm_linear.py"].read_text()
    assert '"layer_norm_weight",' in fused
    assert '"layer_norm_bias", layer_norm_bias' in fused
    for name in (
        "Linear",
        "LayerNorm",
        "LayerNormLinear",
        "RMSNorm",
        "autocast",
        *(question for _, question, _ in RECIPES.values()),
    ):
        assert name in exported


# -- the swap, with the stand-in ------------------------------------------------------------------------------------------


def model_with_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.LayerNorm(64, eps=1e-3), nn.Linear(64, 64, bias=False), nn.RMSNorm(64), nn.Linear(64, 32)
    )


def test_modules_are_swapped_and_had_back_with_the_same_parameters(stand_in: Any) -> None:
    model = model_with_norms()
    parameters, names, before = list(model.parameters()), list(model.state_dict()), [type(m) for m in model]
    precision = Float8TE()
    precision.convert(model)
    assert [type(m) for m in model] == [nn.Linear, TELayerNorm, TELinear, TERMSNorm, nn.Linear]
    assert model[1].eps == 1e-3
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names  # no pickle beside them
    assert precision.reports[0].skipped == {"0": "first and last", "4": "first and last"}
    assert precision.restore(model) == 3
    assert [type(m) for m in model] == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_it_is_proved_on_each_shape_that_something_was_converted(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault is an adapter that does nothing, silently; the next is one that does something else."""
    precision, model = Float8TE(), model_with_norms()
    model.append(nn.Linear(32, 32))
    precision.convert(model)
    assert list(precision.reports[0].errors) == ["2", "4"]
    assert all(0.01 < error < 0.05 for error in precision.reports[0].errors.values())
    assert "output off by" in precision.explain()
    assert not AUTOCAST
    monkeypatch.setattr(TEAutocast, "__enter__", lambda self: AUTOCAST.append({"enabled": False}))
    with pytest.raises(ConfigError, match="2 of Sequential, 64x64, gives the output of bf16 bit for bit: Transformer"):
        Float8TE().convert(model_with_norms())


def test_an_output_that_is_too_far_off_is_found_out(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TELinear, "forward", lambda self, x: 1.2 * F.linear(x, self.weight))
    with pytest.raises(ConfigError, match=r"has a relative error of 0\.2\d* in its output where at most 0\.08 was expected"):
        Float8TE("current").convert(model_with_norms())


def test_a_step_runs_under_both_autocasts_and_an_evaluation_as_asked(stand_in: Any) -> None:
    for evaluate in (True, False):
        precision = Float8TE(TERecipe(scaling="current", evaluate_in_fp8=evaluate))
        precision.convert(model_with_norms())
        context = precision.autocast(torch.device("cpu"))
        with context:
            assert torch.is_autocast_enabled("cpu")
            assert AUTOCAST[-1]["enabled"]
            assert type(AUTOCAST[-1]["recipe"]).__name__ == "Float8CurrentScaling"
            with torch.no_grad(), context:
                assert AUTOCAST[-1]["enabled"] == evaluate
        assert not AUTOCAST
        assert not torch.is_autocast_enabled("cpu")


def test_a_model_trains_and_resumes_through_the_adapter(stand_in: Any, tmp_path: Path) -> None:
    whole = train(Float8TE(), tmp_path / "whole", steps=8, save_every=4)
    assert sum(isinstance(m, TELinear) for m in (whole.model or nn.Module()).modules()) == 7
    assert whole.losses != train("bf16-mixed", tmp_path / "bf16", steps=8).losses
    resumed = train(Float8TE(), tmp_path / "resumed", steps=8, resume=whole.checkpoints[4])
    assert resumed.losses == whole.losses[4:]


def test_the_scales_of_delayed_scaling_are_saved_as_plain_tensors(stand_in: Any) -> None:
    first, second = Float8TE(TERecipe(options={"amax_history_len": 4})), Float8TE(TERecipe(options={"amax_history_len": 4}))
    model, other = model_with_norms(), model_with_norms()
    first.convert(model)
    second.convert(other)
    assert first.state_dict() == {}  # no step yet
    linear: Any = model[2]
    linear.init_fp8_meta_tensors(first.recipe.build())
    linear.fp8_meta["scaling_fwd"].scale.fill_(7.0)
    linear.fp8_meta["scaling_bwd"].amax_history.fill_(3.0)
    state = first.state_dict()
    assert sorted(state) == ["0/2/scaling_bwd", "0/2/scaling_fwd"]
    second.load_state_dict(state)
    taken: Any = other[2]
    assert taken.fp8_meta["scaling_fwd"].scale.tolist() == [7.0] * 3
    assert taken.fp8_meta["scaling_bwd"].amax_history.shape == (4, 2)
    with pytest.raises(ConfigError, match="the state is of 0/9, which was not converted"):
        second.load_state_dict({"0/9/scaling_fwd": {}})


FUSE = {"blocks.*.norm_1": "blocks.*.qkv", "blocks.*.norm_2": "blocks.*.up"}


def test_a_norm_and_the_linear_behind_it_become_one_and_nothing_else_changes(stand_in: Any, tmp_path: Path) -> None:
    """The names and values in a checkpoint, the output (in bf16 here), and the losses of a run that is resumed."""
    recipe = TERecipe(fuse=FUSE, skip_first_and_last=False)
    plain, model = TinyGPT(), TinyGPT()
    precision = Float8TE(recipe)
    precision.convert(model)
    assert [type(b.qkv) for b in model.blocks] == [TELayerNormLinear] * 2  # pyright: ignore[reportAttributeAccessIssue]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(model.state_dict()[n], t) for n, t in plain.state_dict().items())
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(model(ids), plain(ids))
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert precision.reports[0].fused == ["blocks.0.qkv", "blocks.1.qkv", "blocks.0.up", "blocks.1.up"]
    whole = train(Float8TE(recipe), tmp_path / "whole", steps=6, save_every=3)
    resumed = train(Float8TE(recipe), tmp_path / "resumed", steps=6, resume=whole.checkpoints[3])
    assert resumed.losses == whole.losses[3:]
    for wrong, told in (({"norms": "head"}, "meets no norm"), ({"norm": "heads"}, "there is no such Linear")):
        with pytest.raises(ConfigError, match=told):
            Float8TE(TERecipe(fuse=wrong)).convert(TinyGPT())


def test_modules_of_transformer_engine_that_the_user_built_are_taken_as_they_are(stand_in: Any) -> None:
    """Their pickle is left out of checkpoints, and their scales are saved, as with those that were swapped."""
    model = nn.Sequential(TELayerNormLinear(32, 32, device="cpu"), nn.GELU())
    precision = Float8TE(TERecipe(options={"amax_history_len": 4}))
    precision.convert(model)
    assert not [n for n in model.state_dict() if "extra_state" in n]
    model[0].init_fp8_meta_tensors(precision.recipe.build())  # pyright: ignore[reportCallIssue]
    assert sorted(precision.state_dict()) == ["0/0/scaling_bwd", "0/0/scaling_fwd"]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch's own, of any module whose step returns a view
@pytest.mark.parametrize(
    ("strategy", "groups"),
    [
        ("fsdp", [[0, 1], [0, 1]]),
        ("pp:2", [[0], [1]]),  # the stages have other layers: their values are none of each other's
        pytest.param("ddp:2+pp:2", [[0, 1], [0, 1], [2, 3], [2, 3]], marks=pytest.mark.slow),
        pytest.param("hsdp:2", [[0, 1, 2, 3]] * 4, marks=pytest.mark.slow),
    ],
)
def test_largest_values_are_reduced_over_the_ranks_that_have_the_same_layers(
    stand_in: Any, strategy: str, groups: list[list[int]], ranks: Any, tmp_path: Path
) -> None:
    def one_rank() -> tuple[list[float], list[int], list[str]]:
        precision = Float8TE()
        losses = train(precision, tmp_path, steps=2, batch_size=4, strategy=strategy, model=StagedGPT()).losses
        assert precision._context is not None
        converted = [n for report in precision.reports for n in report.converted]
        return losses, torch.distributed.get_process_group_ranks(precision._context.group), converted

    found = ranks(len(groups), one_rank)
    assert [group for _, group, _ in found] == groups
    assert all(losses[1] < losses[0] for losses, _, _ in found)
    whole = Float8TE()
    whole.convert(TinyGPT())
    assert sorted({n for _, _, names in found for n in names}) == sorted(whole.reports[0].converted)


def test_primary_weights_in_float8_are_refused_with_what_saves_memory() -> None:
    with pytest.raises(ConfigError, match=r"primary_weights=True.*fsdp_all_gather"):
        TERecipe(primary_weights=True)


def test_a_package_with_other_parameters_is_noticed(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(TELinear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.weight_2 = nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(stand_in, "Linear", Renamed)
    with pytest.raises(ConfigError, match=r"Renamed has other parameters than 2: weight_2"):
        Float8TE().convert(model_with_norms())


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ours for _, _, ours in RECIPES.values()])
def test_a_cpu_is_refused_with_the_nearest_that_runs_there(name: str) -> None:
    precision = make_precision(name)
    assert precision.name == name
    with pytest.raises(ConfigError, match=rf"precision='{name}' was asked for on cpu.*Use precision='fp8-ao'"):
        Strategy(precision=precision).start(World.single())


def test_what_is_missing_on_a_machine_with_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, object | None] = {"transformer_engine": None, "transformer_engine_torch": None}
    monkeypatch.setattr(float8_te.importlib.util, "find_spec", lambda name: found[name])
    assert "needs transformer-engine, which is not installed: pip install 'drivetrain[te]'" in str(Float8TE().available(CUDA))
    found["transformer_engine"] = object()
    assert "only its Python sources are installed" in str(Float8TE().available(CUDA))


@needs_sources
def test_the_sources_alone_are_told_as_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVTE_PROJECT_BUILDING", raising=False)
    with pytest.raises(MissingDependency, match=r"TransformerEngine cannot be used here"):
        TERecipe().build()


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_msamp_is_refused_with_its_successors(level: str) -> None:
    with pytest.raises(ConfigError, match=rf"fp8-msamp' \({level}\).*unmaintained since 2024.*'fp8-te' on CUDA, or 'fp8-ao'"):
        Strategy(precision=Float8MSAMP(MSAMPRecipe(level))).start(World.single())
    with pytest.raises(UnknownName, match="Known: O1, O2"):
        MSAMPRecipe("O3")


# -- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("scaling", RECIPES)
def test_on_a_gpu_two_hundred_steps_end_near_bf16_and_resume_bit_for_bit(scaling: str, strategy: str, tmp_path: Path) -> None:
    """What precision_matrix.py shows of torchao's backends on a CPU, on one process. Never run yet, as the one below."""
    if not torch.cuda.is_available():
        pytest.skip("waits for CUDA")
    if reason := Float8TE(scaling).available(CUDA):
        pytest.skip(f"waits for what it needs: {reason}")
    options: dict[str, Any] = {"steps": 200, "device": "cuda", "strategy": strategy}
    bf16 = train("bf16-mixed", tmp_path / "bf16", **options).losses
    whole = train(Float8TE(scaling), tmp_path / "whole", save_every=100, **options)
    assert whole.losses != bf16
    assert abs(sum(whole.losses[-20:]) - sum(bf16[-20:])) / 20 < (0.3 if scaling == "nvfp4" else 0.06)
    resumed = train(Float8TE(scaling), tmp_path / "resumed", resume=whole.checkpoints[100], **options)
    assert resumed.losses == whole.losses[100:]
    assert {f.suffix for f in whole.checkpoints[100].rglob("*") if f.is_file()} == {".json", ".safetensors"}


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", RECIPES)
def test_on_a_gpu_losses_are_near_bf16_not_equal_and_resumed_bit_for_bit(scaling: str, tmp_path: Path) -> None:
    """The same assertions as for torchao's backends on a CPU. Never run yet: no machine with TransformerEngine was at hand."""
    if not torch.cuda.is_available():
        pytest.skip("waits for CUDA")
    if reason := Float8TE(scaling).available(CUDA):
        pytest.skip(f"waits for what it needs: {reason}")
    bf16 = train("bf16-mixed", tmp_path / "bf16", device="cuda").losses
    whole = train(Float8TE(scaling), tmp_path / "whole", device="cuda", save_every=10)
    assert whole.losses != bf16
    assert max(abs(a - b) for a, b in zip(whole.losses, bf16, strict=True)) < (0.3 if scaling == "nvfp4" else 0.05)
    resumed = train(Float8TE(scaling), tmp_path / "resumed", device="cuda", resume=whole.checkpoints[10])
    assert resumed.losses == whole.losses[10:]
    assert TinyGPT().state_dict().keys() == whole.weights.keys()
