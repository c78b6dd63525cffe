"""What the tests of several nodes start on each of them: `python node_jobs.py JOB OUT [key=value ...]`.

    numbers      trains with each strategy that is named, one after the other, and writes losses, weights and the mesh to OUT
    train        trains until it is ended, or for `steps=`; step_s= is how long a step takes, fail=3 the rank that fails
Rank 0 writes OUT; each rank of `train` leaves a file `pid<rank>` in the folder of OUT once it has done six steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from drivetrain import Accelerator, Trainer, TrainingModule
from drivetrain.callbacks.base import Callback
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.callbacks.watchdog import Watchdog
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Net(TrainingModule):
    """A chain of eight layers in float64; SGD with momentum."""

    def __init__(self, *, step_s: float = 0.0, fail: int = -1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(7)), nn.Linear(8, 1)).double()
        self.step_s, self.fail = step_s, fail

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def compute_loss(self, output: Tensor, batch: Any) -> Tensor:
        return ((output - batch[1]) ** 2).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.step_s)
        if self.trainer.progress.global_step == 3 and self.trainer.world.rank == self.fail:
            raise ValueError("boom")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Losses(Callback):
    """Keeps the loss of every step: the mean over all samples of the batch."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_log(self, trainer: Any, module: nn.Module, metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics:
            self.steps.append(metrics["loss"])


class Steps(Callback):
    """Says that this rank trains."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.global_step >= 6:
            path = self.folder / f"pid{trainer.world.rank}"
            if not path.exists():
                path.write_text(str(os.getpid()))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(48, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=2, shuffle=True)


def numbers(out: Path, strategies: str, root: str) -> None:
    """Train with each strategy; then infer with prepare_pipeline."""
    found: dict[str, Any] = {}
    world = None
    for strategy in strategies.split(","):
        losses = Losses()
        module = Net()
        trainer = Trainer(
            strategy=strategy, max_epochs=2, global_batch_size=8, seed=7, root=root, name=strategy.replace(":", "_"),
            callbacks=[losses, Checkpoint("5step")], log_every_n_steps=1, **QUIET,
        )  # fmt: skip
        trainer.fit(module, loader())
        world = trainer.world
        mesh = world.mesh
        axes = {} if mesh is None else {axis: mesh.size(axis) for axis in ("dp_replicate", "dp_shard", "pp")}
        neighbours = []
        if axes.get("dp_shard", 1) > 1:
            assert mesh is not None
            neighbours = dist.get_process_group_ranks(mesh.group("dp_shard"))
        state = trainer.accelerator.get_state_dict(module)
        weight = state["body.0.0.weight"].double().sum().item() if world.is_main else 0.0
        runs = [str(path) for path in Path(root).glob(f"{trainer.run_folder.name if trainer.run_folder else ''}/*/metrics.jsonl")]
        found[strategy] = {
            "losses": losses.steps, "weight": weight, "axes": axes, "shards_with": neighbours, "runs": len(runs),
            "checkpoints": len(list(Path(root).glob(f"{strategy.replace(':', '_')}/*/checkpoints/step-*/manifest.json"))),
        }  # fmt: skip
    if world is not None and world.size > 1:
        accelerator = Accelerator(device="cpu")
        model = Net().body
        prepared = accelerator.prepare_pipeline(model)
        with torch.no_grad():
            x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8)
            found["pipeline"] = {
                "output": prepared(x).flatten().tolist(),
                "expected": Net().body(x).flatten().tolist(),
                "held": accelerator.world.gather_json(sum(p.numel() for p in model.parameters() if not p.is_meta)),
            }
        accelerator.end_training()
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0:
        out.write_text(json.dumps(found))


def train(
    out: Path, *, strategy: str = "ddp", steps: str = "1000000", step_s: str = "0.02", fail: str = "-1", root: str = "runs",
    resume: str = "", watchdog: str = "", checkpoints: str = "yes",
) -> None:  # fmt: skip
    """Train, saving every second step; rank 0 writes the losses to OUT when it comes to the end."""
    losses = Losses()
    callbacks: list[Callback] = [losses, Steps(out.parent)]
    if checkpoints == "yes":
        callbacks.append(Checkpoint("2step"))
    if watchdog:
        callbacks.append(Watchdog(float(watchdog), action="abort", startup=60))
    trainer = Trainer(
        strategy=strategy, max_steps=int(steps), global_batch_size=8, seed=7, root=root, name="job",
        callbacks=callbacks, log_every_n_steps=1, resume=resume or None, enable_checkpointing=checkpoints == "yes", **QUIET,
    )  # fmt: skip
    module = Net(step_s=float(step_s), fail=int(fail))
    trainer.fit(module, loader())
    if trainer.world.is_main:
        out.write_text(json.dumps({"losses": losses.steps}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = dict(option.split("=", 1) for option in sys.argv[3:])
    {"numbers": numbers, "train": train}[sys.argv[1]](Path(sys.argv[2]), **options)
