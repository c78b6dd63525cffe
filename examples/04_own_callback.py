"""A callback of your own: a plain subclass. This one draws the loss as a line of blocks; a resumed run goes on drawing.

python examples/04_own_callback.py
"""

import argparse
from importlib import import_module
from typing import Any

from drivetrain import Callback, Trainer

quickstart = import_module("01_quickstart")


class Sparkline(Callback):
    """Collects the loss of every log point; `state_dict` goes into each checkpoint."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, trainer: Any, module: Any, metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics:
            self.losses.append(metrics["loss"])

    def on_train_end(self, trainer: Any, module: Any) -> None:
        line = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * loss / self.losses[0]))] for loss in self.losses)
        trainer.print(f"{line}  {self.losses[0]:.2f} -> {self.losses[-1]:.2f}")

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]


def train(steps: int, every: int, resume: str | None = None) -> None:
    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=steps, log_every_n_steps=every, callbacks=[Sparkline()], resume=resume, name="own_callback", seed=0, **quiet
    )
    trainer.fit(quickstart.Digits(), quickstart.data()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=120)
    steps = parser.parse_args().max_steps
    every = max(1, steps // 60)
    train(steps // 2, every)
    train(steps, every, resume="auto")  # another trainer, another callback: the line goes on where it stood
