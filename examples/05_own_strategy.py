"""A strategy of your own: a plain subclass. This one rounds the gradients to bfloat16 before each step."""

import argparse
from collections.abc import Sequence
from importlib import import_module

import torch
from drivetrain import Strategy, Trainer
from torch import Tensor, nn

quickstart = import_module("01_quickstart")


class RoundedGradients(Strategy):
    name = "rounded"

    def grad_norm(self, parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.to(torch.bfloat16))
        return super().grad_norm(parameters, norm_type)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=60)
    trainer = Trainer(strategy=RoundedGradients(), max_steps=parser.parse_args().max_steps, name="own_strategy")
    trainer.fit(quickstart.Digits(), *quickstart.data())
