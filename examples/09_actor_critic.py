"""Actor and critic beside a frozen reference: three models in one loop of your own, two trained by one joint loss.

python examples/09_actor_critic.py [--strategy deepspeed:2]
The actor chooses one of four arms of a bandit whose pay depends on what it sees; the critic guesses the pay; a penalty keeps the
actor near the reference, which is evaluated only. One backward pass reaches both engines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from drivetrain import Accelerator, Strategy
from torch import Tensor, nn


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, width))


def joint_loss(actor: nn.Module, critic: nn.Module, reference: nn.Module, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Policy gradient with the critic as baseline, the critic's error, the distance to the reference; and the mean pay."""
    log_chances = actor(seen).log_softmax(-1)
    with torch.no_grad():
        before = reference(seen).log_softmax(-1)
        arm = torch.multinomial(log_chances.exp(), 1)
        pay = seen.gather(1, arm)
    guess = critic(seen)
    gain = (pay - guess).detach() * log_chances.gather(1, arm)
    distance = (log_chances.exp() * (log_chances - before)).sum(-1)
    return -gain.mean() + (guess - pay).pow(2).mean() + 0.05 * distance.mean(), pay.mean()


def train(accelerator: Accelerator, batches: Iterable[Tensor]) -> tuple[dict[str, nn.Module], float]:
    """Return the three models and a running mean of the pay. `accelerator` has a strategy for each of them."""
    torch.manual_seed(0)
    actor, critic, reference = net(4), net(1), net(4)
    reference.load_state_dict(actor.state_dict())
    trained: dict[str, nn.Module] = {"actor": actor, "critic": critic}
    models = trained | {"reference": reference}
    prepared, optimizers = accelerator.prepare_models(
        models, lambda: {n: torch.optim.Adam(m.parameters(), lr=3e-3) for n, m in trained.items()}
    )
    mean = 0.0
    for seen in batches:
        loss, pay = joint_loss(prepared["actor"], prepared["critic"], prepared["reference"], seen)
        accelerator.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean += 0.05 * (float(pay) - mean)
    return models, mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--strategy", default="deepspeed:2", help="of actor and critic")
    options = parser.parse_args()
    held = {"actor": options.strategy, "critic": options.strategy, "reference": Strategy(inference=True)}
    accelerator = Accelerator(models=held)
    mean = train(accelerator, (torch.randn(64, 4) for _ in range(options.max_steps)))[1]
    accelerator.print(f"mean pay: {mean:.2f}; the best arm pays about 1.03, a blind choice 0")
    accelerator.end_training()


if __name__ == "__main__":
    main()
