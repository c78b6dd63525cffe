"""What each precision does to a model: speed, memory, and how far its losses are from those of bf16 and fp32 on the same data.

    rows = run_all("mine.py:make", steps=200)        each in a process of its own, from the same weights, over the same batches
    compare(rows); print(table(rows)); draw(rows, "precision.png")

`drivetrain bench precision` (cli/bench.py) is the command line of it, and says what each number means.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..callbacks.base import Callback
from ..strategies.base import make_precision
from ..strategies.errors import ConfigError, unknown_name
from ..strategies.precision.linears import LinearPrecision, layer_errors
from ..strategies.registry import PRECISIONS
from .trainer import Trainer

__all__ = ["compare", "draw", "machine", "names", "run_all", "run_one", "table"]

WARM_UP = 10  # steps whose time does not count
TAIL = 20  # steps whose mean loss is compared
FIRST = ("fp32", "bf16-mixed", "bf16-true")
# Beside these: name -> (precision, the target of quantization-aware training in the second half, bits of the optimizer)
VARIANTS: dict[str, tuple[str, str | None, int | str | None]] = {
    "QAT int8-int4": ("bf16-mixed", "int8-int4", None),
    "AdamW 8 bits": ("bf16-mixed", None, 8),
    "AdamW 4 bits": ("bf16-mixed", None, 4),
    "AdamW fp8": ("bf16-mixed", None, "fp8"),
}
# No low precisions, no training, or a name that stands for another of the list.
LEFT_OUT = ("fp64", "fp16-mixed", "fp16-true", "fp8", "int8-bnb", "nf4-bnb", "fp4-bnb")


class Watch(Callback):
    """Losses per item, and the times of the steps."""

    def __init__(self, cpu: bool) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []
        self.items = 0
        self.clock = time.process_time if cpu else time.perf_counter

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss, items = (outputs, None) if isinstance(outputs, torch.Tensor) else (outputs["loss"], outputs.get("num_items"))
        self.items = int(items) if items is not None else 0
        self.losses.append(float(loss.detach()) / (self.items or 1))
        self.times.append(self.clock())


def names(only: Sequence[str] = ()) -> list[str]:
    """Return what is compared: all, or `only` these beside fp32 and bf16-mixed.

    Raises:
        UnknownName: one of `only` that there is not.
    """
    known = [*FIRST, *(n for n in PRECISIONS if n not in FIRST + LEFT_OUT), *VARIANTS]
    for name in only:
        if name not in known:
            raise unknown_name("precision", name, known)
    return [n for n in known if not only or n in ("fp32", "bf16-mixed", *only)]


def load_function(target: str) -> Callable[..., Any]:
    """Return the function that `FILE:FUNCTION` (FUNCTION is "make" by default) stands for; the file is run.

    Raises:
        ConfigError: no such file or function.
    """
    path, _, function = target.rpartition(":") if ":" in target else (target, "", "make")
    file, function = Path(path), function or "make"
    if not file.is_file():
        raise ConfigError(f"There is no file {path!r}. Name one that has a function {function}() -> (TrainingModule, loader).")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ConfigError(
            f"{path} has no function {function!r}. Write one that returns (TrainingModule, training loader), or name it: "
            f"{path}:FUNCTION."
        )
    return getattr(module, function)


def run_one(name: str, target: str, steps: int) -> dict[str, Any]:
    """Train once; return what is compared, or what this precision needs. Runs in a process of its own."""
    torch.set_num_threads(1)
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    precision, quantized, bits = VARIANTS.get(name, (name, None, None))
    build = load_function(target)
    if bits is not None and "optimizer_bits" not in inspect.signature(build).parameters:
        return {"name": name, "needs": "a model whose optimizer is LowBitAdamW(bits=...): let your function take optimizer_bits"}
    if reason := make_precision(precision).available(device):
        return {"name": name, "needs": reason}
    torch.manual_seed(0)
    module, loader = build(optimizer_bits=bits) if bits is not None else build()
    watch = Watch(device.type == "cpu")
    callbacks: list[Callback] = [watch]
    if quantized is not None:
        from ..callbacks.quantization import QuantizationAwareTraining

        callbacks.append(QuantizationAwareTraining(quantized, start=steps // 2))
    batch = next(iter(loader))
    if isinstance(made := make_precision(precision), LinearPrecision):
        made.make_matmul(device)  # what importing the backend takes is none of the training's memory
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = Trainer(
        precision=precision,
        strategy="single",
        max_steps=steps,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        root=tempfile.mkdtemp(),
        seed=0,
    )
    trainer.fit(module, loader)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    memory = kib * 1024 if device.type == "cpu" else torch.cuda.max_memory_allocated()
    rate = (len(watch.times) - 1 - WARM_UP) / (watch.times[-1] - watch.times[WARM_UP])
    return {
        "name": name,
        "losses": watch.losses,
        "steps_per_s": rate,
        "tokens_per_s": rate * watch.items if watch.items else None,
        "memory_mib": memory / 2**20,
        "errors": _errors(trainer, module, batch, device),
        "converted": trainer.precision.explain(),
    }


def _errors(trainer: Any, module: Any, batch: Any, device: torch.device) -> dict[str, float]:
    """Return the relative error of each converted Linear's output on a batch."""
    if not isinstance(trainer.precision, LinearPrecision):
        return {}
    from lightning_utilities.core.apply_func import apply_to_collection

    batch = apply_to_collection(batch, torch.Tensor, lambda t: t.to(device))

    def forward() -> None:
        with torch.no_grad(), trainer.accelerator.autocast():
            module.training_step(trainer.precision.convert_input(batch), 0)

    return layer_errors(module, forward)


def run_all(target: str, steps: int, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Train with each precision in a process of its own; yield each row. What goes wrong there is a row too.

    Raises:
        ConfigError: too few steps, or no such file, function or precision.
    """
    if steps < WARM_UP + 2:
        raise ConfigError(f"steps={steps}: the first {WARM_UP} do not count. Use {WARM_UP + 2} or more; 200 say something.")
    chosen = names(only)
    load_function(target)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, "-m", "drivetrain", "bench", "precision", target]
            command += ["--one", name, "--steps", str(steps), "--json", str(answer)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if answer.exists():
                yield json.loads(answer.read_text())
            else:
                yield {"name": name, "needs": "it failed: " + " ".join(done.stderr.strip().splitlines()[-3:])[-400:]}


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its distances from bf16-mixed and fp32."""
    by_name = {r["name"]: r for r in rows if "losses" in r}
    for row in by_name.values():
        losses = row["losses"]
        row["final_loss"] = sum(losses[-TAIL:]) / len(losses[-TAIL:])
        for short, reference in (("bf16", by_name.get("bf16-mixed")), ("fp32", by_name.get("fp32"))):
            if reference is not None and reference is not row:
                theirs = reference["losses"]
                row[f"gap_{short}"] = row["final_loss"] - sum(theirs[-TAIL:]) / len(theirs[-TAIL:])
                row[f"furthest_{short}"] = max(abs(a - b) for a, b in zip(losses, theirs, strict=True))
                row[f"equals_{short}"] = losses == theirs


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table, as Markdown."""
    head = ("precision", "steps/s", "tokens/s", "MiB", "loss", "gap bf16", "gap fp32", "furthest bf16", "error mean", "worst")
    lines = [[*head]]
    for row in (r for r in rows if "losses" in r):
        errors = list(row["errors"].values())
        lines.append(
            [
                row["name"],
                f"{row['steps_per_s']:.1f}",
                f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "",
                f"{row['memory_mib']:.0f}",
                f"{row['final_loss']:.4f}",
                _signed(row.get("gap_bf16")),
                _signed(row.get("gap_fp32")),
                f"{row['furthest_bf16']:.4f}" if "furthest_bf16" in row else "",
                f"{sum(errors) / len(errors):.2%}" if errors else "",
                f"{max(errors):.2%}" if errors else "",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for line in lines:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text.append(f"| {' | '.join(cells)} |")
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    text += ["", *(f"{r['name']}: {r['converted']}" for r in rows if r.get("converted"))]
    text += [f"{r['name']}: THE SAME LOSSES AS {s}, bit for bit" for r in rows for s in ("bf16", "fp32") if r.get(f"equals_{s}")]
    text += [f"{r['name']}: DIVERGED" for r in rows if r.get("final_loss", 0) > r.get("losses", [0])[0]]
    return "\n".join([*text, "", *(f"not here: {r['name']}: {r['needs']}" for r in rows if "needs" in r)])


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def machine() -> Mapping[str, str]:
    """What the numbers were taken on."""
    cpu = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    found = {"date": date.today().isoformat(), "cpu": cpu, "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if importlib.util.find_spec("torchao") is not None:
        from importlib.metadata import version

        found["torchao"] = version("torchao")
    return found


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Loss curves, and their distance from bf16's, smoothed over ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trained = [r for r in rows if "losses" in r]
    reference = next((r for r in trained if r["name"] == "bf16-mixed"), trained[0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    for i, row in enumerate(trained):
        style = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--", "lw": 1.2}
        left.plot(_smooth(row["losses"]), label=row["name"], **style)
        if row is not reference:
            apart = [a - b for a, b in zip(row["losses"], reference["losses"], strict=True)]
            right.plot(_smooth(apart), label=row["name"], **style)
    left.set(xlabel="step", ylabel="loss", title="loss, mean of ten steps")
    right.set(xlabel="step", ylabel="loss difference", title=f"less that of {reference['name']}")
    right.set_yscale("symlog", linthresh=0.01)
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _smooth(values: list[float]) -> list[float]:
    return [sum(values[max(0, i - 9) : i + 1]) / (i + 1 - max(0, i - 9)) for i in range(len(values))]
