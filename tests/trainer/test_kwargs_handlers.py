"""Accelerate's kwargs_handlers: each option reaches our object, or is refused with what to write instead."""

from __future__ import annotations

import re
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.fsdp import FSDPStrategy
from drivetrain.strategies.precision import _torchao, float8_te, fp8
from drivetrain.strategies.precision.float8_ao import Float8AO
from drivetrain.strategies.precision.float8_te import Float8TE
from drivetrain.strategies.precision.mixed import BF16Mixed, FP16Mixed
from drivetrain.trainer.kwargs_handlers import (
    AORecipeKwargs,
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FP8RecipeKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    MSAMPRecipeKwargs,
    ProfileKwargs,
    TERecipeKwargs,
    apply,
)
from torch import nn

needs_ao = pytest.mark.skipif(find_spec("torchao") is None, reason="waits for torchao: pip install 'drivetrain[ao]'")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))


@needs_ao
def test_a_filter_of_ones_own_says_which_linears_are_float8() -> None:
    """All of them are shown to it, the first and the last too, under their names."""
    seen: list[str] = []

    def chosen(module: nn.Module, name: str) -> bool:
        seen.append(name)
        return name != "1"

    accelerator = Accelerator(device="cpu", mixed_precision="fp8", kwargs_handlers=[AORecipeKwargs(module_filter_func=chosen)])
    accelerator.prepare(model())
    assert isinstance(accelerator.precision, Float8AO)
    assert seen == ["0", "1", "2"]
    assert accelerator.precision.reports[0].converted == ["0", "2"]
    assert accelerator.precision.reports[0].skipped == {"1": "the filter left it out"}


@needs_ao
def test_a_config_of_torchao_is_taken_as_it_is() -> None:
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig.from_recipe_name("rowwise")
    precision = apply([AORecipeKwargs(config=config)], "auto", "fp8").precision
    assert isinstance(precision, Float8AO)
    assert precision.name == "fp8-ao-rowwise"
    gathered = apply([AORecipeKwargs(config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))], "fsdp", "fp8").precision
    assert isinstance(gathered, Float8AO)
    assert gathered.recipe.fsdp_all_gather


def test_options_of_transformer_engine_have_its_names() -> None:
    handler = TERecipeKwargs(fp8_format="e4m3", amax_history_len=16, margin=1, use_autocast_during_eval=True)
    precision = apply([handler], "auto", "fp8").precision
    assert isinstance(precision, Float8TE)
    assert precision.recipe.options == {"fp8_format": "E4M3", "amax_history_len": 16, "margin": 1}
    assert precision.recipe.evaluate_in_fp8
    blocks = apply([TERecipeKwargs(use_mxfp8_block_scaling=True)], "auto", "fp8").precision
    assert isinstance(blocks, Float8TE)
    assert (blocks.name, blocks.recipe.evaluate_in_fp8) == ("mxfp8-te", False)
    assert isinstance(apply([FP8RecipeKwargs(backend="te")], "auto", "fp8").precision, Float8TE)


def test_the_scaler_and_autocast_get_their_options() -> None:
    scaler = GradScalerKwargs(init_scale=1024.0, growth_interval=5)
    accelerator = Accelerator(device="cpu", mixed_precision="fp16", kwargs_handlers=[scaler, AutocastKwargs(cache_enabled=False)])
    assert isinstance(accelerator.precision, FP16Mixed)
    assert accelerator.precision.state_dict()["scale"] == 1024.0
    assert accelerator.precision.state_dict()["growth_interval"] == 5
    with accelerator.autocast():
        assert not torch.is_autocast_cache_enabled()
    bf16 = apply([AutocastKwargs(cache_enabled=False)], "auto", "bf16").precision
    assert isinstance(bf16, BF16Mixed)
    assert bf16.cache_enabled is False


def test_ddp_gets_its_options_on_several_ranks_and_one_rank_has_no_use_for_them(ranks: Any) -> None:
    def one_rank() -> dict[str, Any]:
        handler = DistributedDataParallelKwargs(static_graph=True, bucket_cap_mb=1, comm_hook="bf16", broadcast_buffers=False)
        accelerator = Accelerator(device="cpu", kwargs_handlers=[handler, InitProcessGroupKwargs(timeout=timedelta(seconds=77))])
        made = accelerator.strategy
        assert isinstance(made, DDPStrategy)
        return {"set": (made.static_graph, made.bucket_cap_mb, made.comm_hook, made.broadcast_buffers)}

    assert [r["set"] for r in ranks(2, one_rank)] == [(True, 1, "bf16", False)] * 2
    handled = apply([DistributedDataParallelKwargs(static_graph=True)], "auto", None)
    assert handled.strategy == "auto"
    assert apply([InitProcessGroupKwargs(timeout=timedelta(minutes=2))], "auto", None).world_options() == {"timeout_s": 120.0}


def test_profiling_takes_its_options_from_the_handler(tmp_path: Path) -> None:
    handler = ProfileKwargs(activities=["cpu"], record_shapes=True, output_trace_dir=str(tmp_path))
    accelerator = Accelerator(device="cpu", kwargs_handlers=[handler])
    with accelerator.profile() as profiler:
        torch.ones(3, 5) @ torch.ones(5, 2)
    shapes = [event.input_shapes for event in profiler.key_averages(group_by_input_shape=True) if event.key == "aten::mm"]
    assert shapes == [[[3, 5], [5, 2]]]
    assert [p.name for p in tmp_path.iterdir()] == ["profile_rank0.json"]
    with pytest.raises(ConfigError, match="no activity 'gpu'"):
        ProfileKwargs(activities=["gpu"]).options()


@pytest.mark.parametrize(
    ("handlers", "strategy", "precision", "told"),
    [
        ([GradScalerKwargs()], "auto", "bf16", "'bf16-mixed' scales no loss"),
        ([GradScalerKwargs(enabled=False)], "auto", "fp16", "Say mixed_precision='bf16'"),
        ([AutocastKwargs(enabled=False)], "auto", "bf16", "for a whole run is precision='fp32'"),
        ([AutocastKwargs(cache_enabled=True)], "auto", None, "precision 'fp32' has no autocast"),
        ([AORecipeKwargs()], "auto", "bf16", "the run's precision is 'bf16'. Say mixed_precision='fp8'"),
        ([AORecipeKwargs(), TERecipeKwargs()], "auto", "fp8", "a run has one precision"),
        ([MSAMPRecipeKwargs(), MSAMPRecipeKwargs()], "auto", "fp8", "two MSAMPRecipeKwargs"),
        ([TERecipeKwargs(interval=4)], "auto", "fp8", "TransformerEngine 2 has none any more"),
        ([TERecipeKwargs(override_linear_precision=(False, False, True))], "auto", "fp8", "backward_override"),
        ([TERecipeKwargs(use_mxfp8_block_scaling=True, amax_history_len=8)], "auto", "fp8", "MXFP8 has no history"),
        ([FP8RecipeKwargs(backend="mps")], "auto", "fp8", "expected 'TE' or 'MSAMP'"),
        ([DistributedDataParallelKwargs()], "fsdp", None, "the run's strategy is 'fsdp'"),
        ([DistributedDataParallelKwargs()], FSDPStrategy(), None, "the run's strategy is 'fsdp'"),
        ([DistributedDataParallelKwargs(dim=1)], "ddp", None, "batches are cut by the loader"),
        ([InitProcessGroupKwargs(init_method="tcp://x:1")], "auto", None, "ranks meet as the launcher says"),
        ([object()], "auto", None, "is no handler"),
        ([GradScalerKwargs], "auto", "fp16", "is no handler. Did you mean 'GradScalerKwargs'"),
    ],
)
def test_what_would_be_ignored_is_refused_with_what_to_write(handlers: Any, strategy: Any, precision: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        apply(handlers, strategy, precision)


def test_msamp_is_refused_when_the_run_starts() -> None:
    with pytest.raises(ConfigError, match=r"fp8-msamp' \(O1\).*unmaintained"):
        Accelerator(device="cpu", mixed_precision="fp8", kwargs_handlers=[MSAMPRecipeKwargs("O1")])


@needs_ao
def test_fp8_alone_prints_what_it_chose_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator(device="cpu", mixed_precision="fp8")
    assert accelerator.precision.name == "fp8-ao"
    assert capsys.readouterr().out == "precision fp8-ao: chosen for fp8: torchao is installed, and runs on CPU and CUDA\n"


def test_fp8_without_torchao_is_transformer_engine_and_without_both_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torchao, "missing", lambda wanted_by: "no torchao")
    monkeypatch.setattr(float8_te, "missing", lambda name: None)
    made = fp8.chosen()
    assert (type(made), made.reason) == (Float8TE, "chosen for fp8: TransformerEngine is installed, torchao is not")
    monkeypatch.setattr(float8_te, "missing", lambda name: "no te")
    with pytest.raises(ConfigError, match=r"neither is installed.*drivetrain\[ao\].*drivetrain\[te\]"):
        fp8.chosen()


@pytest.mark.skipif(find_spec("accelerate") is None, reason="waits for accelerate")
def test_accelerates_own_objects_are_taken_too() -> None:
    from accelerate.utils import DistributedDataParallelKwargs as TheirDDP
    from accelerate.utils import GradScalerKwargs as TheirScaler
    from accelerate.utils import InitProcessGroupKwargs as TheirGroup

    handled = apply([TheirScaler(init_scale=8.0), TheirGroup()], "auto", "fp16")
    assert isinstance(handled.precision, FP16Mixed)
    assert handled.precision.state_dict()["scale"] == 8.0
    assert (handled.timeout_s, handled.backend) == (None, None)
    assert apply([TheirGroup(timeout=timedelta(seconds=9))], "auto", None).timeout_s == 9
    ddp = apply([TheirDDP(static_graph=True)], "ddp", None).strategy
    assert isinstance(ddp, DDPStrategy)
    assert ddp.static_graph
