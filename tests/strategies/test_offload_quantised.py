"""Quantised weights that pass through the buffers: their parts are read, and they are put together where a block computes."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import dispatch_model, init_empty_weights, load_checkpoint_and_dispatch, save_torch_model, weights_of
from drivetrain.strategies.errors import CheckpointError, ConfigError
from drivetrain.strategies.offload.blocks import StreamedModule
from drivetrain.strategies.offload.sizes import compute_module_sizes
from drivetrain.strategies.placement import infer_auto_device_map
from offload_models import MIXED, WHOLE, Net
from torch import Tensor, nn

if importlib.util.find_spec("torchao") is None:
    pytest.skip("needs torchao: pip install torchao", allow_module_level=True)

FORMATS = ["int8", "int8 x int8", "float8", "int4", "int8 x int4"]


def config(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization as ao
        from torchao.quantization.granularity import PerGroup

        # torchao's "int4" for CPUs and its packed formats need packages of their own; this one keeps 4 bits in a byte each.
        made: dict[str, Callable[[], Any]] = {
            "int8": ao.Int8WeightOnlyConfig,
            "int8 x int8": ao.Int8DynamicActivationInt8WeightConfig,
            "float8": lambda: ao.Float8WeightOnlyConfig(),
            "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),  # type: ignore[attr-defined]
            "int8 x int4": lambda: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                weight_granularity=PerGroup(32),
            ),
        }
        return made[name]()


def quantised(net: nn.Module, name: str = "int8") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import quantize_

        quantize_(net, config(name), filter_fn=lambda m, n: isinstance(m, nn.Linear) and n.startswith("layers"))
    return net.requires_grad_(False)


def gradient(model: Any, words: Tensor) -> tuple[Tensor, Tensor]:
    """A forward and the gradient of its input, for which the backward pass needs every weight once more."""
    soft = torch.zeros(1, 1, 64, dtype=model.norm.weight.dtype, requires_grad=True)
    x = model.embed(words) * model.scale + soft
    for layer in model.layers:
        x = layer(x)
    y = model.head(model.norm(x))
    return y.detach(), torch.autograd.grad(y.float().square().sum(), soft)[0]


@pytest.mark.parametrize("device_map", [WHOLE, MIXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_model_on_the_disk_computes_what_it_computes_in_memory(
    net: Net, words: Tensor, name: str, dtype: torch.dtype, device_map: Any, tmp_path: Path
) -> None:
    """Output and gradients, bit for bit; and less passes than in the plain type."""
    plain = net.to(dtype)
    truth = quantised(copy.deepcopy(plain), name)
    model = quantised(copy.deepcopy(plain), name)
    kept = model.layers[2].up.weight
    dispatch_model(model, device_map, offload_dir=tmp_path)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradient(model, words), gradient(truth, words), strict=True))
    with torch.no_grad():
        assert torch.equal(model(words), truth(words))
        assert not torch.equal(model(words), plain(words))
    if device_map is MIXED:  # what is resident is not copied
        assert model.layers[2].up.weight is kept
    weights = weights_of(model)
    assert type(weights.tensor("layers.0.up.weight")) is type(truth.layers[0].up.weight)
    with pytest.raises(ConfigError, match=r"layers\.0\.up\.weight is not in memory"):
        model.layers[0].up.weight.sum()
    whole = sum(p.numel() * p.element_size() for layer in plain.layers for p in layer.parameters())
    assert weights.streamed_bytes < whole * (0.4 if dtype == torch.float32 else 0.75)
    assert weights.held_bytes < sum(t.numel() * t.element_size() for t in plain.parameters())


def test_it_is_saved_as_its_parts_and_read_by_a_model_that_has_none(net: Net, words: Tensor, tmp_path: Path) -> None:
    """Dispatched or not, the same bytes; an empty model, quantised alike, is filled from them, whole or in buffers."""
    truth = quantised(copy.deepcopy(net))
    save_torch_model(truth, tmp_path / "whole")
    model = dispatch_model(quantised(copy.deepcopy(net)), WHOLE, offload_dir=tmp_path / "away")
    save_torch_model(model, tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for device_map in (WHOLE, MIXED, {"": "cpu"}):
        with init_empty_weights():
            empty = Net().eval()
        quantised(empty)
        load_checkpoint_and_dispatch(empty, tmp_path / "whole", device_map, strict=True)
        with torch.no_grad():
            assert torch.equal(empty(words), truth(words))
    with init_empty_weights():
        empty = Net().eval()
    with pytest.raises(CheckpointError, match=r"10 missing \(layers\.0\.up\.weight, "):
        load_checkpoint_and_dispatch(empty, tmp_path / "whole", WHOLE)


class Product(torch.autograd.Function):
    """Keeps the quantised weight itself for the backward pass; torchao's own product keeps its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.dequantize().T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.saved_tensors[0].dequantize(), None


class Layer(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return Product.apply(input, self.weight)  # type: ignore[return-value]


def test_a_quantised_weight_that_is_kept_for_the_backward_pass_is_read_again(tmp_path: Path) -> None:
    """Its memory holds another block by then."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"layers": nn.Sequential(*(Layer(64, 64, bias=False) for _ in range(5)))})
    whole: Any = quantised(layers)["layers"]
    model: Any = dispatch_model(copy.deepcopy(whole), WHOLE, offload_dir=tmp_path)
    found = []
    for one in (whole, model):
        x = torch.ones(3, 64, requires_grad=True)
        found += torch.autograd.grad(one(x).square().sum(), x)
    assert torch.equal(*found)


def test_sizes_and_maps_count_the_parts(net: Net) -> None:
    model = quantised(copy.deepcopy(net))
    weight: Any = model.layers[0].up.weight
    parts = [weight.qdata, weight.scale, weight.zero_point]
    sizes = compute_module_sizes(model, "bfloat16")
    assert sizes["layers.0.up.weight"] == sum(t.numel() * t.element_size() for t in parts) < weight.numel() * 1.1
    maps = [infer_auto_device_map(m, {"cpu": "230KB"}, num_buffers=1, clean_result=False) for m in (net, model)]
    assert [sum(p == "cpu" for n, p in places.items() if "layers." in n) for places in maps] == [1, 5]


def test_blocks_with_quantised_weights_are_compiled_as_one_graph(net: Net, words: Tensor, tmp_path: Path) -> None:
    truth = quantised(copy.deepcopy(net))
    model = dispatch_model(quantised(net), WHOLE, offload_dir=tmp_path)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    weights_of(model).compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(model(words), truth(words))
        assert torch.equal(model(words), truth(words))
    assert 1 <= len(graphs) <= 4  # a block, and the modules beside it


class Pair(Tensor):
    """A weight with a part of its own that nobody can see: what bitsandbytes' Params4bit is."""


class Turned(Tensor):
    """A weight whose part lies column by column."""

    part: Tensor

    @staticmethod
    def __new__(cls, part: Tensor) -> Turned:
        self: Any = Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype, device=part.device)  # type: ignore[attr-defined]
        self.part = part
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["part"], None

    @staticmethod
    def __tensor_unflatten__(parts: Any, context: None, size: Any, stride: Any) -> Turned:
        return Turned(parts["part"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Turned(args[0].part)
        raise NotImplementedError(str(func))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda w: w.as_subclass(Pair), "is of the type Pair, which cannot be taken apart into plain tensors"),
        (lambda w: Turned(w.t()), "is of the type Turned, whose part part is not contiguous"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_before_anything_is_written(
    net: Net, make: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    layer: Any = net.layers[1]
    layer.up.weight = nn.Parameter(make(layer.up.weight.detach()), requires_grad=False)
    with pytest.raises(ConfigError, match=rf"layers\.1\.up\.weight {said}"):
        dispatch_model(net, WHOLE, offload_dir=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_values_of_a_state_dict_win_over_those_of_the_model(net: Net, words: Tensor, tmp_path: Path) -> None:
    """Also for what stays in memory, which is where it belongs already."""
    torch.manual_seed(5)
    other = Net().eval()
    for device_map in ({"": "cpu"}, MIXED):
        model = copy.deepcopy(net)
        dispatch_model(model, device_map, state_dict=other.state_dict(), offload_dir=tmp_path)
        with torch.no_grad():
            assert torch.equal(model(words), other(words))
        assert all(isinstance(s, StreamedModule) for s in weights_of(model).streamed)
