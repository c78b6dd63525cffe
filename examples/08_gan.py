"""A GAN: a generator and a critic, trained in turn, each with its own strategy and optimizer.

python examples/08_gan.py [--devices 2] [--strategy deepspeed:1]
The data are points on a ring; the generator turns noise into such points.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import Trainer, TrainingModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class GAN(TrainingModule):
    """Manual optimisation: two losses a batch, each for one of the two models."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def models(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, noise = batch
        for_generator, for_critic = self.optimizers()
        for_critic.zero_grad()
        with torch.no_grad():
            made = self.generator(noise)
        critic_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(made)).mean()
        self.manual_backward(critic_loss)
        for_critic.step()

        for_generator.zero_grad()
        self.toggle_optimizer(for_generator)  # the critic judges, and takes no gradient
        generator_loss = F.softplus(-self.critic(self.generator(noise))).mean()
        self.manual_backward(generator_loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)
        self.log("critic_loss", critic_loss, prog_bar=True)
        self.log("generator_loss", generator_loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0.5, 0.9)) for m in (self.generator, self.critic)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--strategy", default="auto")
    options = parser.parse_args()
    both = {"generator": options.strategy, "critic": options.strategy}
    held: dict[str, Any] = {} if options.strategy == "auto" else {"models": both}
    trainer = Trainer(max_steps=2 * options.max_steps, devices=options.devices, name="gan", seed=0, **held)
    chance = torch.Generator().manual_seed(1)
    angle = 2 * math.pi * torch.rand(2560, 1, generator=chance)
    data = TensorDataset(torch.cat([angle.cos(), angle.sin()], dim=1), torch.randn(2560, 4, generator=chance))
    module = GAN()
    trainer.fit(module, DataLoader(data, batch_size=64 // options.devices, shuffle=True))
    with torch.no_grad():
        radius = module.generator(torch.randn(1000, 4)).norm(dim=1)
    trainer.print(f"made points lie at a radius of {float(radius.mean()):.2f}; the ring's is 1")


if __name__ == "__main__":
    main()
