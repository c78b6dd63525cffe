"""Every low precision with a CPU path x {single, ddp, fsdp} x {eager, compiled}: near bf16, not equal to it, resumed bit for bit.

    python tests/benchmarks/precision_matrix.py                       the whole table, 200 steps a cell
    python tests/benchmarks/precision_matrix.py --steps 40 --only fp8-ao,int8-ao --strategies fsdp --json FILE

The model is a small GPT of examples/02_gpt.py on its data; ddp and fsdp are two processes over gloo, compiled is torch.compile
(aot_eager, fullgraph) of each block. A cell trains all steps, saving half-way, and once more from that checkpoint:
    gap     the mean loss of the last 20 steps, less that of bf16-mixed under the same strategy; its tolerance is in `BACKENDS`
    ok      the gap is within the tolerance, the losses are not bf16's, the resumed half has the same losses bit for bit, and no
            file of the checkpoint but safetensors and JSON
What a backend refuses there stands below the table with its sentence. The exit code is 1 if any cell fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from drivetrain import Callback, Checkpoint, Trainer
from drivetrain.callbacks.quantization import QuantizationAwareTraining
from drivetrain.strategies.environment import read_environment
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.precision.low_bit_optimizers import LowBitAdamW

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LENGTH, WIDTH, LAYERS, BATCH = 32, 64, 2, 16  # the batch is that of all processes
TAIL = 20


@dataclass(frozen=True)
class Backend:
    """A row: a precision, or bf16-mixed with QAT or a low-bit optimizer; and how far its loss may end from bf16's."""

    tolerance: float
    precision: str = "bf16-mixed"
    target: str | None = None
    bits: int | str | None = None


BACKENDS = {
    "fp8-ao": Backend(0.06, "fp8-ao"),
    "fp8-ao-rowwise": Backend(0.06, "fp8-ao-rowwise"),
    "fp8-ao-rowwise-gw-hp": Backend(0.06, "fp8-ao-rowwise-gw-hp"),
    "mxfp8-ao": Backend(0.06, "mxfp8-ao"),
    "int8-ao": Backend(0.06, "int8-ao"),
    "int8-weights-ao": Backend(0.06, "int8-weights-ao"),
    "bitnet-ao": Backend(0.15, "bitnet-ao"),
    "QAT int8-int4": Backend(0.06, target="int8-int4"),
    "AdamW 8 bits": Backend(0.06, bits=8),
    "AdamW 4 bits": Backend(0.06, bits=4),
    "AdamW fp8": Backend(0.06, bits="fp8"),
}
STRATEGIES = {"single": 1, "ddp": 2, "fsdp": 2}
REFERENCE = Backend(0.0)


class Losses(Callback):
    """The mean loss of each step, of this rank."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"].detach()) / int(outputs["num_items"]))


def _example() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("gpt", EXAMPLES / "02_gpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(
    backend: Backend, strategy: str, compiled: bool, steps: int, root: Path, resume: Path | None = None
) -> tuple[list[float], Path]:
    """Train once; return this rank's losses and the folder of the checkpoint of the middle."""
    example = _example()

    class Demo(example.GPT):
        def configure_optimizers(self) -> Any:
            for block in self.blocks if compiled else ():
                # The forward only: fsdp's hooks around it gather, and are no part of the graph.
                block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
            options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95)}
            if backend.bits is None:
                return torch.optim.AdamW(self.parameters(), **options)
            return LowBitAdamW(self.parameters(), bits=backend.bits, **options)

    torch.manual_seed(0)
    loader, _, _ = example.loaders(LENGTH, BATCH // STRATEGIES[strategy], limit=500_000)
    model = Demo(width=WIDTH, layers=LAYERS, length=LENGTH, steps=steps)
    losses = Losses()
    callbacks: list[Callback] = [losses]
    if resume is None:
        callbacks.append(Checkpoint(every_n_steps=steps // 2, save_top_k=-1))
    if backend.target is not None:
        callbacks.append(QuantizationAwareTraining(backend.target, start=steps // 4, convert=False))
    trainer = Trainer(
        precision=backend.precision,
        strategy=strategy,
        device="cpu",
        max_steps=steps,
        callbacks=callbacks,
        enable_checkpointing=resume is None,
        enable_progress_bar=False,
        enable_model_summary=False,
        root=root,
        seed=0,
        resume=resume,
    )
    trainer.fit(model, loader)
    saved = {info.step: info.path for info in trainer.store.list()} if resume is None else {}
    return losses.values, saved.get(steps // 2, root)


def run_cell(backend: Backend, strategy: str, compiled: bool, steps: int, root: Path, reference: list[float]) -> dict[str, Any]:
    """Train, resume, and compare; a refusal is a cell too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        losses, checkpoint = train(backend, strategy, compiled, steps, root / "whole")
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        resumed, _ = train(backend, strategy, compiled, steps, root / "resumed", resume=checkpoint)
    except ConfigError as refusal:
        return {"refused": str(refusal)}
    gap = sum(losses[-TAIL:]) / TAIL - sum(reference[-TAIL:]) / TAIL
    others = [
        str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file() and f.suffix not in (".safetensors", ".json")
    ]
    checks = {
        "the gap is above the tolerance": abs(gap) <= backend.tolerance,
        "the losses are bf16's": losses != reference,
        "the resumed run parted": resumed == losses[steps // 2 :],
        f"files of another kind: {others}": not others,
        "nothing was compiled": graphs > 0 or not compiled,
    }
    return {"gap": gap, "final": sum(losses[-TAIL:]) / TAIL, "faults": [what for what, ok in checks.items() if not ok]}


def run_strategy(strategy: str, names: list[str], steps: int, answer: Path) -> None:
    """Run one column of the table on this rank; rank 0 writes what was found, cell by cell."""
    torch.set_num_threads(1)
    root = answer.parent
    reference, _ = train(REFERENCE, strategy, False, steps, root / "bf16")
    found: dict[str, Any] = {"bf16": sum(reference[-TAIL:]) / TAIL}
    for name in names:
        for compiled in (False, True):
            cell = run_cell(BACKENDS[name], strategy, compiled, steps, root / f"{name}-{compiled}", reference)
            found[f"{name}|{'compiled' if compiled else 'eager'}"] = cell
            if "refused" in cell and not compiled:
                found[f"{name}|compiled"] = cell
            if read_environment().rank == 0:
                answer.write_text(json.dumps(found))
            if "refused" in cell:
                break


def table(found: dict[str, dict[str, Any]], names: list[str]) -> tuple[str, bool]:
    """Return the table as Markdown, and whether every cell is right."""
    columns = [(s, how) for s in found for how in ("eager", "compiled")]
    lines = [["backend", "tolerance", *(f"{s}, {how}" for s, how in columns)]]
    below: list[str] = []
    right = True
    for name in names:
        line = [name, f"{BACKENDS[name].tolerance:g}"]
        for strategy, how in columns:
            cell = found[strategy].get(f"{name}|{how}", {"faults": ["it ended"], "gap": float("nan")})
            if "refused" in cell:
                line.append("refused")
                text = f"refused: {name} under {strategy}: {cell['refused']}"
                below += [text] if text not in below else []
            elif cell["faults"]:
                line.append("FAILED")
                below.append(f"FAILED: {name} under {strategy}, {how}: {'; '.join(cell['faults'])} (gap {cell['gap']:+.4f})")
                right = False
            else:
                line.append(f"ok {cell['gap']:+.4f}")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    losses = ", ".join(f"{s} {f['bf16']:.4f}" for s, f in found.items() if "bf16" in f)
    return "\n".join([*text, "", f"bf16-mixed ends at: {losses}", *below]), right


def machine() -> dict[str, str]:
    """What it ran on."""
    versions = {name: version(name) for name in ("torch", "torchao")}
    return {"date": date.today().isoformat(), "machine": platform.machine(), "python": platform.python_version(), **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", help="backends, with commas")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [n for n in BACKENDS if not options.only or n in options.only.split(",")]
    if options.one:
        run_strategy(options.one, names, options.steps, options.answer)
        return 0
    found: dict[str, dict[str, Any]] = {}
    for strategy in options.strategies.split(","):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, "-m", "drivetrain", "run", "-n", str(STRATEGIES[strategy]), __file__, "--one", strategy]
            command += ["--steps", str(options.steps), "--only", ",".join(names), "--answer", str(answer)]
            done = subprocess.run(command, capture_output=True, text=True)
            found[strategy] = json.loads(answer.read_text()) if answer.exists() else {}
            if done.returncode:
                print(done.stderr[-3000:], file=sys.stderr)
        print(f"{strategy}: {len(found[strategy])} cells", file=sys.stderr, flush=True)
    text, right = table(found, names)
    text = f"{', '.join(f'{k} {v}' for k, v in machine().items())}; {options.steps} steps\n\n{text}"
    print(text)
    if options.table:
        options.table.write_text(text + "\n")
    if options.json:
        options.json.write_text(json.dumps(found))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
