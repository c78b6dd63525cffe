"""The main job, `make demo`: a small GPT on real text, on two processes in bf16: validated, checkpointed, resumed.

    phase 1   trains to step 450, validating every 150 steps; its checkpoint is committed
    phase 2   a new model and a new trainer go on from that checkpoint to step 500: the loss goes on where it stood
    then      the loss curve is drawn, and the model writes some Python

It takes under three minutes on two cores. The first process starts the other: this is a plain script.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from drivetrain import Trainer
from drivetrain.callbacks.loggers.jsonl import read_metrics

gpt = import_module("02_gpt")  # the example beside this file; its name starts with its number


def train(steps: int, total: int, devices: int, resume: str | None) -> tuple[Trainer, torch.nn.Module]:
    """Train to step `steps` of a schedule over `total`, from scratch or from the newest checkpoint."""
    torch.manual_seed(0)
    model = gpt.GPT(steps=total)
    train_loader, held_out, note = gpt.loaders(model.length, batch_size=32 // devices)
    trainer = Trainer(
        devices=devices,
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        val_check_interval=max(1, total * 3 // 10),
        limit_val_batches=15,
        log_every_n_steps=10 if total >= 50 else 1,
        name="demo",
        seed=0,
        resume=resume,
    )
    trainer.fit(model, train_loader, held_out)
    trainer.print(f"text: {note}")
    return trainer, model


def draw(rows: list[dict[str, Any]], resumed_at: int, path: Path) -> None:
    """Draw training and validation loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, style in (("loss", "-"), ("val_loss", "o")):
        found = [(r["step"], r["metrics"][name]) for r in rows if name in r["metrics"]]
        axes.plot([s for s, _ in found], [v for _, v in found], style, label=name)
    axes.axvline(resumed_at, linestyle=":", color="grey", label="resumed here")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("nats per byte")
    axes.legend()
    axes.set_title("byte-level GPT on the standard library's sources")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--devices", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    total = options.max_steps
    first = max(1, total * 9 // 10)

    train(first, total, options.devices, resume=None)
    trainer, model = train(total, total, options.devices, resume="auto")

    if trainer.accelerator.is_main_process:
        rows = read_metrics(trainer.root / "metrics.jsonl")
        losses = {int(r["step"]): r["metrics"]["loss"] for r in rows if "loss" in r["metrics"]}
        before = [s for s in losses if s <= first][-3:]
        after = [s for s in losses if s > first][:3]
        print(f"resumed at step {first}; the losses around it:")
        print("   before  " + "  ".join(f"{s}: {losses[s]:.3f}" for s in before))
        print("   after   " + "  ".join(f"{s}: {losses[s]:.3f}" for s in after))
        picture = trainer.root / "loss.png"
        draw(rows, first, picture)
        print(f"loss curve: {picture}")
        prompt = b"def read_lines(path):\n"
        text = model.generate(prompt, count=300 if total >= 50 else 5)
        print("the model writes:\n" + "\n".join("    " + line for line in text.decode("utf-8", "replace").splitlines()))
        print(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
