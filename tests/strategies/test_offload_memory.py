"""The promise in bytes: a model of many times the limit loads and generates, in a process that is measured from outside.

The children are those of tests/benchmarks/offload.py, which says what each number means.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from drivetrain import init_empty_weights, load_checkpoint_and_dispatch, save_torch_model, weights_of
from torch import nn

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "offload.py"


class Net(nn.Module):
    """100 MB in 24 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def memory(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux: the peak is read from /proc")
@pytest.mark.parametrize("io", ["cached", "direct"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_hundred_megabytes_pass_within_fourteen(ranks: Any, tmp_path: Path, io: str, prefetch: bool) -> None:
    """A fortieth of the big one. Above what the process had: the limit, and 10 MB for what torch sets up."""
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 1024)
    save_torch_model(net, tmp_path, max_shard_size="30MB")
    with torch.no_grad():
        want = net(x)

    def generate() -> tuple[int, int, bool]:
        with init_empty_weights():
            model = Net().eval()
        _ = torch.ones(1, 8) @ torch.ones(8, 8)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        load_checkpoint_and_dispatch(model, tmp_path, "auto", {"cpu": "14MB"}, io=io, prefetch=prefetch)
        with torch.no_grad():
            same = all(torch.equal(model(x), want) for _ in range(3))
        assert weights_of(model).stream.stats.num_bytes > 2 * 80_000_000
        return memory("VmHWM") - before, weights_of(model).held_bytes, same

    ((peak, held, same),) = ranks(1, generate)
    assert same
    assert held <= 14_000_000
    assert peak <= 14_000_000 + 10_000_000


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers: pip install transformers")
    spec = importlib.util.spec_from_file_location("offload_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(benchmark: ModuleType, folder: Path, gigabytes: float, methods: list[str], limit: str) -> tuple[int, Any]:
    """Write the weights, measure each method in a process of its own."""
    total = benchmark.make_weights(folder, gigabytes)
    return total, {r["method"]: r for r in benchmark.measure(folder, methods, limit, rounds=1)}


@pytest.mark.slow
def test_a_fortieth_of_the_model_stays_within_its_limit(benchmark: ModuleType, tmp_path: Path) -> None:
    """100 MB of weights within 14 MB: beside the same process with all in memory, at least 80 MB less at the peak."""
    total, found = run(benchmark, tmp_path, 0.1, ["whole", "disk"], "14MB")
    disk, whole = found["disk"], found["whole"]
    assert disk["held"] <= 14_000_000
    assert disk["passes"] > 0.85 * total
    assert disk["result"] == whole["result"]
    assert disk["resident"] < whole["resident"] - 0.6 * total
    assert disk["missed"] == 0


@pytest.mark.slow
def test_four_gigabytes_generate_within_one(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 GB of bf16 weights; the whole process, transformers included, stays under 1 GB above `import torch`."""
    total, found = run(benchmark, tmp_path, 4.0, ["disk"], "330MB")
    disk = found["disk"]
    with capsys.disabled():
        print("\n" + benchmark.table(list(found.values()), total))
    assert total > 4_000_000_000
    assert disk["peak"] < 1_000_000_000
    assert disk["held"] <= 330_000_000
    assert disk["missed"] == 0
