"""A precision of your own: a plain subclass. This one rounds what goes into each Linear to the 256 numbers of float8.

python examples/06_own_precision.py
"""

import argparse
from importlib import import_module

import torch
from drivetrain import Precision, Trainer
from drivetrain.strategies.contract import check_precision
from drivetrain.strategies.world import World
from torch import Tensor, nn

quickstart = import_module("01_quickstart")


class Rounded(Precision):
    """Computes in fp32 with inputs of eight bits. The gradient passes as if nothing had been rounded."""

    name = "rounded-8"

    def convert(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
        return model


def rounded(x: Tensor) -> Tensor:
    return x + (x.to(torch.float8_e4m3fn).to(x.dtype) - x).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=300)
    options = parser.parse_args()
    check_precision(Rounded(), World.single())  # raises unless it is near fp32, and not equal to it
    accuracy: dict[str, float] = {}
    for precision in (Precision(), Rounded()):
        trainer = Trainer(
            precision=precision, max_steps=options.max_steps, enable_progress_bar=False, name="own_precision", seed=0
        )
        trainer.fit(quickstart.Digits(), *quickstart.data())
        accuracy[precision.name] = trainer.metrics.get("val_accuracy", float("nan"))
    print("  ".join(f"{name}: {value:.3f}" for name, value in accuracy.items()) + "  of the digits it has not seen are right")


if __name__ == "__main__":
    main()
