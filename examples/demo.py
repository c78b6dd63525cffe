"""The main job, `make demo`: a small GPT on real text, on two processes in bf16: validated, checkpointed, resumed.

    phase 1   trains to step 1750 of 2000, validating every 250 steps; its checkpoint is committed
    phase 2   a new model in a new trainer: validated from the checkpoint, then trained on from it to step 2000
    then      the loss curve is drawn, and the model writes some Python

It takes under three minutes on two cores. The first process starts the others: this is a plain script.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

from drivetrain import Trainer
from drivetrain.callbacks.loggers.jsonl import read_metrics

gpt = import_module("02_gpt")  # the example beside this file; its name starts with its number


def make(steps: int, total: int, devices: int) -> tuple[Trainer, Any, Any, Any]:
    """A trainer to step `steps`, a new model whose schedule is over `total` steps, and the loaders."""
    trainer = Trainer(
        devices=devices,
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        val_check_interval=max(1, total // 8),
        limit_val_batches=60,
        log_every_n_steps=20 if total >= 100 else 1,
        name="demo",
        seed=0,
    )
    model = gpt.GPT(steps=total)
    train_loader, held_out, note = gpt.loaders(model.length, batch_size=16 // devices)
    if steps != total:
        trainer.print(note)
    return trainer, model, train_loader, held_out


def draw(rows: list[dict[str, Any]], resumed_at: int, path: Path) -> None:
    """Draw training and validation loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, style, label in (("loss", "-", "training, one batch"), ("val_loss", "o-", "validation")):
        found = [(row["step"], row["metrics"][name]) for row in rows if name in row["metrics"]]
        axes.plot([step for step, _ in found], [value for _, value in found], style, linewidth=1, markersize=4, label=label)
    axes.axvline(resumed_at, linestyle=":", color="grey", label="a new model and trainer resumed here")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("nats per byte")
    axes.legend()
    axes.set_title("byte-level GPT on the standard library's sources")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def report(rows: list[dict[str, Any]], first: int) -> str:
    """How the loss went on around the resume."""
    losses = [(row["step"], row["metrics"]["loss"]) for row in rows if "loss" in row["metrics"]]
    before, after = [v for s, v in losses if s <= first][-10:], [v for s, v in losses if s > first][:10]
    lines = [f"training loss at the {len(before)} log points before the resume: {mean(before):.3f} on average"]
    lines += [f"training loss at the {len(after)} log points after it:          {mean(after):.3f}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--devices", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    total = options.max_steps
    first = max(1, total // 8 * 7)

    trainer, model, train_loader, held_out = make(first, total, options.devices)
    trainer.fit(model, train_loader, held_out)
    saved = trainer.metrics["val_loss"]

    trainer, model, train_loader, held_out = make(total, total, options.devices)
    (loaded,) = trainer.validate(model, held_out, ckpt_path="last")
    trainer.fit(model, train_loader, held_out, resume="last")

    if not trainer.accelerator.is_main_process:
        return
    rows = read_metrics(trainer.root / "metrics.jsonl")
    print(f"\nvalidation loss at step {first}: {saved:.6f}; of its checkpoint, loaded into a new model: {loaded['val_loss']:.6f}")
    print(report(rows, first))
    draw(rows, first, trainer.root / "loss.png")
    print(f"loss curve: {trainer.root / 'loss.png'}\n\nthe model writes:\n")
    prompt = b"import os\n\n\nclass Reader:\n"
    print(model.generate(prompt, count=500 if total >= 100 else 5, temperature=0.6))
    print(f"\ndone in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
