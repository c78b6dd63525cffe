"""A strategy of your own: a plain subclass. This one is data parallelism by hand; the conformance suite says whether it is right.

python examples/05_own_strategy.py [--devices 2]
"""

import argparse
from importlib import import_module
from typing import Any

from drivetrain import Strategy, Trainer, launch
from drivetrain.strategies.contract import CASES, check_strategy, table
from drivetrain.strategies.world import World
from torch import Tensor, nn

quickstart = import_module("01_quickstart")


class AverageByHand(Strategy):
    """Every rank trains on its own slice; after the last backward pass of a step, all gradients are averaged."""

    name = "by_hand"
    reduces_gradients = True

    def check_world(self, world: World) -> None:
        self.models: list[nn.Module] = []  # any number of processes will do

    @property
    def data_shard(self) -> tuple[int, int]:
        return self.world.rank, self.world.size

    def prepare_model(self, name: str, model: nn.Module) -> nn.Module:
        self.models.append(super().prepare_model(name, model))
        return self.models[-1]

    def set_gradient_sync(self, models: Any, enabled: bool) -> None:
        self.sync = enabled

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)
        for parameter in (p for model in self.models for p in model.parameters()):
            if self.sync and parameter.grad is not None:
                parameter.grad = self.world.all_reduce(parameter.grad, "mean")


def main(steps: int) -> None:
    """What each rank runs."""
    trainer = Trainer(strategy=AverageByHand(), max_steps=steps, enable_model_summary=False, name="own_strategy", seed=0)
    results = check_strategy(AverageByHand, trainer.world, cases=CASES[:6])
    trainer.print(f"against one plain loop, relative errors on {trainer.world.size} processes:\n{table(results)}\n")
    trainer.fit(quickstart.Digits(), *quickstart.data(trainer.world.size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=60)
    options = parser.parse_args()
    launch(main, options.max_steps, devices=options.devices)
