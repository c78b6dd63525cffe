"""A callback of your own: a plain subclass. This one keeps the largest gradient norm that it has seen, across resumes."""

import argparse
from importlib import import_module
from typing import Any

from drivetrain import Callback, Trainer

quickstart = import_module("01_quickstart")


class LargestGradient(Callback):
    largest = 0.0

    def on_log(self, trainer: Any, module: Any, metrics: dict[str, float], step: int) -> None:
        self.largest = max(self.largest, metrics.get("grad_norm", 0.0))

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self.largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.largest = state["largest"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=60)
    callback = LargestGradient()
    trainer = Trainer(max_steps=parser.parse_args().max_steps, log_every_n_steps=2, callbacks=[callback], name="own_callback")
    trainer.fit(quickstart.Digits(), quickstart.data()[0])
    print(f"the largest gradient norm: {callback.largest:.3f}")
