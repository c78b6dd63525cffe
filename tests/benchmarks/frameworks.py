"""The same tiny training in every framework, one function each: what overhead.py measures.

    @framework("mine", needs="my_package")
    def mine(job): ...          # train over job.loader() with job.model(), job.optimizer(...), job.loss(out, y)

The clock sits in the model's forward, so that every framework is measured by the same code at the same place. Everything that a
framework offers beside the loop is switched off, except where the name says otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

BATCH = 8


class Net(nn.Module):
    """32 -> 32 -> 1; calls `tick` at the start of each forward."""

    def __init__(self, tick: Callable[[], None], layers: int) -> None:
        super().__init__()
        inner = [m for _ in range(layers) for m in (nn.Linear(32, 32), nn.ReLU())]
        self.net = nn.Sequential(*inner, nn.Linear(32, 1))
        self.__dict__["tick"] = tick

    def forward(self, x: Tensor) -> Tensor:
        self.tick()  # pyright: ignore[reportCallIssue]
        return self.net(x)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """The same rows as the TensorDataset, read one by one: nobody can fetch them in batches."""

    def __init__(self, rows: TensorDataset) -> None:
        self.x, self.y = rows.tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


@dataclass
class Job:
    """One training of `steps` steps. `logs` scalars are logged in each of them; `batched`: rows may be fetched in batches."""

    tick: Callable[[], None]
    steps: int
    logs: int = 0
    layers: int = 1
    ranks: int = 1
    batched: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="overhead-")))

    def model(self) -> Net:
        torch.manual_seed(0)
        return Net(self.tick, self.layers)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3)

    def dataset(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.steps * BATCH * self.ranks, 32, generator=generator)
        rows = TensorDataset(x, (x[:, :1] > 0).float())
        return rows if self.batched else Rows(rows)

    def loader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=BATCH)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output, y)


FRAMEWORKS: dict[str, Callable[[Job], None]] = {}


def framework(name: str, *, needs: str = "torch") -> Callable[[Callable[[Job], None]], Callable[[Job], None]]:
    """Register a function, if the package that it needs is installed."""

    def register(function: Callable[[Job], None]) -> Callable[[Job], None]:
        if importlib.util.find_spec(needs) is not None:
            FRAMEWORKS[name] = function
        return function

    return register


@framework("raw")
def raw(job: Job) -> None:
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    for x, y in job.loader():
        optimizer.zero_grad()
        loss = job.loss(model(x), y)
        loss.backward()
        optimizer.step()


@framework("raw ddp")
def raw_ddp(job: Job) -> None:
    from torch.utils.data.distributed import DistributedSampler

    model = nn.parallel.DistributedDataParallel(job.model())
    optimizer = job.optimizer(model.parameters())
    sampler = DistributedSampler(job.dataset(), shuffle=False)
    for x, y in DataLoader(job.dataset(), batch_size=BATCH, sampler=sampler):
        optimizer.zero_grad()
        loss = job.loss(model(x), y)
        loss.backward()
        optimizer.step()


@framework("drivetrain loader", needs="drivetrain")
def loader(job: Job) -> None:
    """The raw loop over a prepared loader: same samples, same order."""
    from drivetrain import Accelerator

    model = job.model()
    optimizer = job.optimizer(model.parameters())
    for x, y in Accelerator().prepare(job.loader()):
        optimizer.zero_grad()
        loss = job.loss(model(x), y)
        loss.backward()
        optimizer.step()


@framework("drivetrain Accelerator", needs="drivetrain")
def accelerator(job: Job) -> None:
    from drivetrain import Accelerator

    ours = Accelerator()
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    model, optimizer, loader = ours.prepare(model, optimizer, job.loader())
    for x, y in loader:
        with ours.accumulate(model):
            loss = job.loss(model(x), y)
            ours.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def _trainer(job: Job, **options: Any) -> None:
    from drivetrain import Trainer, TrainingModule

    class Module(TrainingModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = job.loss(self.model(x), y)
            for i in range(job.logs):
                self.log(f"value_{i}", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self.parameters())

    Trainer(max_epochs=1, root=job.folder, **options).fit(Module(), job.loader())


@framework("drivetrain Trainer, all off", needs="drivetrain")
def trainer_off(job: Job) -> None:
    _trainer(
        job,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=50 if job.logs else 0,
        nonfinite="ignore",
    )


@framework("drivetrain Trainer, defaults", needs="drivetrain")
def trainer_default(job: Job) -> None:
    _trainer(job)


@framework("ignite", needs="ignite")
def ignite(job: Job) -> None:
    from ignite.engine import Engine, Events  # pyright: ignore[reportMissingImports]

    model = job.model()
    optimizer = job.optimizer(model.parameters())

    def step(engine: Any, batch: Any) -> Tensor:
        x, y = batch
        optimizer.zero_grad()
        loss = job.loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    engine = Engine(step)
    for i in range(job.logs):
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e, i=i: e.state.metrics.__setitem__(str(i), e.state.output))
    engine.run(job.loader(), max_epochs=1)


@framework("Fabric", needs="lightning_fabric")
def fabric(job: Job) -> None:
    from lightning_fabric import Fabric  # pyright: ignore[reportMissingImports]

    fabric = Fabric(accelerator="cpu", devices=1)
    model = job.model()
    model, optimizer = fabric.setup(model, job.optimizer(model.parameters()))
    for x, y in fabric.setup_dataloaders(job.loader()):
        optimizer.zero_grad()
        loss = job.loss(model(x), y)
        fabric.backward(loss)
        optimizer.step()


@framework("accelerate", needs="accelerate")
def accelerate(job: Job) -> None:
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    theirs = Accelerator(cpu=True)
    model = job.model()
    model, optimizer, loader = theirs.prepare(model, job.optimizer(model.parameters()), job.loader())
    for x, y in loader:
        with theirs.accumulate(model):
            loss = job.loss(model(x), y)
            theirs.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def _lightning(job: Job, **options: Any) -> None:
    import pytorch_lightning as lightning  # pyright: ignore[reportMissingImports]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = job.loss(self.model(x), y)
            for i in range(job.logs):
                self.log(f"value_{i}", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self.parameters())

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "default_root_dir": str(job.folder), **options}
    lightning.Trainer(**options).fit(Module(), job.loader())


@framework("Lightning, all off", needs="pytorch_lightning")
def lightning_off(job: Job) -> None:
    _lightning(job, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


@framework("Lightning, defaults", needs="pytorch_lightning")
def lightning_default(job: Job) -> None:
    _lightning(job)


@framework("HF Trainer", needs="transformers")
def transformers(job: Job) -> None:
    from transformers import Trainer, TrainingArguments  # pyright: ignore[reportMissingImports]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": job.loss(self.model(x), y)}

    class Named(Dataset[dict[str, Tensor]]):
        def __init__(self) -> None:
            self.rows = job.dataset()

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            x, y = self.rows[i]
            return {"x": x, "y": y}

    arguments = TrainingArguments(
        output_dir=str(job.folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    model = Wrapped()
    Trainer(model=model, args=arguments, train_dataset=Named(), optimizers=(job.optimizer(model.parameters()), None)).train()


@contextlib.contextmanager
def quiet() -> Any:
    """Run without the screen: what a framework prints goes to a pipe's worth of nothing, as in a batch job."""
    import io

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
