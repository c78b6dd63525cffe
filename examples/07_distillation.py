"""Distillation: a small student learns a teacher's answers. Two models, each with its own strategy, in one Trainer.

python examples/07_distillation.py [--devices 2] [--student ddp] [--teacher fsdp]
The student is trained under ZeRO-2; the teacher is only evaluated, its parameters cut up over the processes by ZeRO-3.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import DeepSpeedStrategy, FSDPStrategy, Strategy, Trainer, TrainingModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Distillation(TrainingModule):
    """`models` names both, so that each is prepared by the strategy of its name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.teacher = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 10))
        self.student = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))

    def models(self) -> dict[str, nn.Module]:
        return {"student": self.student, "teacher": self.teacher}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        with torch.no_grad():
            answer = self.teacher(x).log_softmax(-1)
        loss = F.kl_div(self.student(x).log_softmax(-1), answer, log_target=True, reduction="batchmean")
        self.log("distance", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=3e-3)


TEACHERS: dict[str, type[Strategy]] = {"deepspeed": DeepSpeedStrategy, "fsdp": FSDPStrategy, "single": Strategy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--student", default="deepspeed:2", help="any strategy")
    parser.add_argument("--teacher", default="deepspeed", choices=sorted(TEACHERS))
    options = parser.parse_args()
    stage: dict[str, Any] = {"stage": 3} if options.teacher == "deepspeed" else {}
    trainer = Trainer(
        max_steps=options.max_steps,
        devices=options.devices,
        models={"student": options.student, "teacher": TEACHERS[options.teacher](inference=True, **stage)},
        name="distillation",
        seed=0,
    )
    x = torch.randn(3200, 16, generator=torch.Generator().manual_seed(1))
    trainer.fit(Distillation(), DataLoader(TensorDataset(x), batch_size=32 // options.devices, shuffle=True))
    trainer.print(f"distance to the teacher: {trainer.metrics['distance']:.4f}" if "distance" in trainer.metrics else "done")


if __name__ == "__main__":
    main()
