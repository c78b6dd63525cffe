"""A precision of your own: a plain subclass. This one rounds what goes into each Linear; the suite checks it."""

import argparse
from importlib import import_module

import torch
from drivetrain import Trainer
from drivetrain.strategies.contract import check_precision
from drivetrain.strategies.precision.base import Precision
from drivetrain.strategies.world import World
from torch import nn

quickstart = import_module("01_quickstart")


class Noisy(Precision):
    name = "noisy"

    def convert(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Linear):  # eight bits behind the point
                module.register_forward_pre_hook(lambda m, x: (torch.round(x[0] * 256) / 256,))
        return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=60)
    check_precision(Noisy(), World.single())
    trainer = Trainer(precision=Noisy(), max_steps=parser.parse_args().max_steps, name="own_precision")
    trainer.fit(quickstart.Digits(), *quickstart.data())
