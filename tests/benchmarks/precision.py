"""What each precision does on this machine: speed, memory, and how far its losses are from those of bf16 and fp32.

    python tests/benchmarks/precision.py                         the demo GPT, 200 steps, every precision that runs here
    python tests/benchmarks/precision.py --only fp8-ao,int8-ao --steps 50
    python tests/benchmarks/precision.py --model mine.py:make    your model: make() -> (TrainingModule, training loader)
    ... --json FILE --picture FILE --table FILE

Each runs in a process of its own, from the same weights, over the same data in the same order.
steps/s   without the first ten steps. On a CPU in CPU time of one thread, so that what else runs does not count; else wall time.
memory    on a CPU the most that the process held, less what it held before the training; else the most that was allocated.
gap       mean loss of the last 20 steps, less that of bf16-mixed (and of fp32). furthest: the largest distance of one step.
error     relative error of the output of each converted Linear, on a batch, after the training: the mean and the worst.
Every step's loss is that of other weights: fp32 and bf16 themselves come apart by a tenth at single steps. The gap says more.
What does not run here is listed with what it needs. The losses of two runs that agree bit for bit would mean that one of the
precisions did nothing; that is said.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from drivetrain import Callback, Trainer
from drivetrain.strategies.base import make_precision
from drivetrain.strategies.precision.linears import LinearPrecision, layer_errors
from drivetrain.strategies.registry import PRECISIONS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LENGTH, BATCH = 64, 8  # of the demo
WARM_UP = 10  # steps whose time does not count
TAIL = 20  # steps whose mean loss is compared
FIRST = ("fp32", "bf16-mixed", "bf16-true")
# name -> (precision, the target of quantization-aware training in the second half, bits of the optimizer's state)
VARIANTS: dict[str, tuple[str, str | None, int | str | None]] = {
    "bf16-mixed, QAT int8-int4": ("bf16-mixed", "int8-int4", None),
    "bf16-mixed, AdamW 8 bits": ("bf16-mixed", None, 8),
    "bf16-mixed, AdamW 4 bits": ("bf16-mixed", None, 4),
    "bf16-mixed, AdamW fp8": ("bf16-mixed", None, "fp8"),
}
LEFT_OUT = ("fp64", "fp16-mixed", "fp16-true")  # no low precisions


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


def demo(steps: int, bits: int | str | None) -> tuple[Any, Any]:
    """The GPT of examples/02_gpt.py, with AdamW for everything: int8 weights know its updates and not Muon's."""
    sys.path.insert(0, str(EXAMPLES))
    example: Any = _module(EXAMPLES / "02_gpt.py")

    class Demo(example.GPT):
        def configure_optimizers(self) -> Any:
            options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95)}
            if bits is None:
                optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), **options)
            else:
                from drivetrain.strategies.precision.low_bit_optimizers import LowBitAdamW

                optimizer = LowBitAdamW(self.parameters(), bits=bits, **options)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    train, _, _ = example.loaders(LENGTH, batch_size=BATCH, limit=1_000_000)
    return Demo(length=LENGTH, steps=steps), train


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_one(name: str, steps: int, model: str | None) -> dict[str, Any]:
    """Train once; return what is compared. Runs in a process of its own."""
    torch.set_num_threads(1)
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    precision, target, bits = VARIANTS.get(name, (name, None, None))
    if model is not None and bits is not None:
        return {"name": name, "needs": "a model whose optimizer is LowBitAdamW; yours brings its own"}
    if reason := make_precision(precision).available(device):
        return {"name": name, "needs": reason}
    build: Callable[[], tuple[Any, Any]] = lambda: demo(steps, bits)  # noqa: E731
    if model is not None:
        path, _, function = model.partition(":")
        build = getattr(_module(Path(path)), function or "make")
    watch = Watch(device.type == "cpu")
    callbacks: list[Callback] = [watch]
    if target is not None:
        from drivetrain.callbacks.quantization import QuantizationAwareTraining

        callbacks.append(QuantizationAwareTraining(target, start=steps // 2))
    module, loader = build()
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
    errors: dict[str, float] = {}
    if hasattr(trainer.precision, "reports"):
        batch = [t.to(device) for t in batch] if isinstance(batch, list | tuple) else batch.to(device)

        def forward() -> None:
            with torch.no_grad(), trainer.accelerator.autocast():
                module.training_step(trainer.precision.convert_input(batch), 0)

        errors = layer_errors(module, forward)
    rate = (len(watch.times) - 1 - WARM_UP) / (watch.times[-1] - watch.times[WARM_UP])
    return {
        "name": name,
        "losses": watch.losses,
        "steps_per_s": rate,
        "tokens_per_s": rate * watch.items if watch.items else None,
        "memory_mib": memory / 2**20,
        "errors": errors,
        "converted": trainer.precision.explain(),
    }


def in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Call `run_one` in a new process; what goes wrong there is a row of the table, not the end of the others."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--one", name, "--steps", str(options.steps), "--json", str(answer)]
        command += ["--model", options.model] if options.model else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if answer.exists():
            return json.loads(answer.read_text())
        return {"name": name, "needs": "it failed: " + " ".join(done.stderr.strip().splitlines()[-3:])[-400:]}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", help="names, with commas; bf16-mixed and fp32 always run")
    parser.add_argument("--model", help="FILE:FUNCTION that returns (TrainingModule, training loader)")
    parser.add_argument("--json")
    parser.add_argument("--table")
    parser.add_argument("--picture")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        Path(options.json).write_text(json.dumps(run_one(options.one, options.steps, options.model)))
        return
    if options.steps < WARM_UP + 2:
        parser.error(f"--steps {options.steps}: at least {WARM_UP + 2}, since {WARM_UP} do not count")
    names = [*FIRST, *(n for n in PRECISIONS if n not in FIRST + LEFT_OUT), *VARIANTS]
    if options.only:
        names = [n for n in names if n in ("fp32", "bf16-mixed", *options.only.split(","))]
    rows = []
    for name in names:
        rows.append(in_process(name, options))
        print(f"{name}: {'done' if 'losses' in rows[-1] else 'not here'}", file=sys.stderr, flush=True)
    compare(rows)
    about = machine()
    text = f"{', '.join(f'{k} {v}' for k, v in about.items())}; {options.steps} steps\n\n{table(rows)}"
    print(text)
    if options.table:
        Path(options.table).write_text(text + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, "steps": options.steps, "rows": rows}))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
