"""The raw API: your own loop, with `Accelerator`; the same numbers as the Trainer's.

python examples/03_raw_loop.py

Everything is in sight: what `prepare` returned, the window of micro-batches, backward, clipping and the step. The last lines
train the same model with the Trainer and compare every loss, bit for bit.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import Accelerator, Callback, Trainer

quickstart = import_module("01_quickstart")


def raw_loop(steps: int) -> list[float]:
    """Train for `steps` optimizer steps of two micro-batches each; return the loss of every micro-batch."""
    accelerator = Accelerator(gradient_accumulation_steps=2, seed=0)
    torch.manual_seed(0)
    model = quickstart.Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, quickstart.data()[0])
    losses: list[float] = []
    while True:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model.net(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == 2 * steps:
                return losses


class Losses(Callback):
    """Keeps the loss of every micro-batch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(outputs.item())


def with_trainer(steps: int) -> list[float]:
    """The same training, by the Trainer."""
    losses = Losses()
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[losses],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        name="raw_loop",
        seed=0,
    )
    trainer.fit(quickstart.Digits(), quickstart.data()[0])
    return losses.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=40)
    options = parser.parse_args()
    raw, trained = raw_loop(options.max_steps), with_trainer(options.max_steps)
    print("micro-batch  raw loop            trainer")
    for i in range(0, len(raw), max(1, len(raw) // 8)):
        print(f"{i:11}  {raw[i]:<18}  {trained[i]:<18}")
    assert raw == trained
    print(f"all {len(raw)} losses are equal, bit for bit")


if __name__ == "__main__":
    main()
