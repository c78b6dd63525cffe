"""What each precision does on this machine, on the GPT of examples/02_gpt.py: `drivetrain bench precision`, with a model.

python tests/benchmarks/precision.py                         200 steps, every precision that runs here
python tests/benchmarks/precision.py --only fp8-ao,int8-ao --steps 50 --json FILE --picture FILE --table FILE
drivetrain bench precision mine.py                           the same on your model; its --help says what each number means
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from drivetrain.trainer.cli.bench import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LENGTH, BATCH = 64, 8


def make(optimizer_bits: int | str | None = None) -> tuple[Any, Any]:
    """The example's GPT and data, with AdamW for everything: int8 weights know its updates and not Muon's."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("gpt", EXAMPLES / "02_gpt.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    class Demo(example.GPT):
        def configure_optimizers(self) -> Any:
            options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95)}
            if optimizer_bits is None:
                optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), **options)
            else:
                from drivetrain.strategies.precision.low_bit_optimizers import LowBitAdamW

                optimizer = LowBitAdamW(self.parameters(), bits=optimizer_bits, **options)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    train, _, _ = example.loaders(LENGTH, batch_size=BATCH, limit=1_000_000)
    return Demo(length=LENGTH), train


if __name__ == "__main__":
    raise SystemExit(main(["precision", f"{__file__}:make", *sys.argv[1:]]))
