"""A tiny GPT and its training, which the tests of the low precisions share: each is held against bf16 on the same data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain import Callback, Trainer, TrainingModule
from drivetrain.callbacks.checkpoint import Checkpoint
from drivetrain.strategies.precision.base import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, LENGTH, TOKENS = 64, 16, 64


class Block(nn.Module):
    """Attention and a perceptron beside a shortcut. x: (batch, length, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class TinyGPT(TrainingModule):
    """Two blocks; the next token is a function of the last one, so it is learnt in a few dozen steps."""

    def __init__(
        self, optimizer: Callable[[Any], Any] | None = None, compile_blocks: Callable[[nn.Module], None] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
        self.compile_blocks = compile_blocks

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = batch[0]
        return F.cross_entropy(self(ids).flatten(0, 1).float(), ((ids * 7 + 3) % TOKENS).flatten())

    def configure_optimizers(self) -> Any:
        if self.compile_blocks is not None:  # the model is converted by now
            for block in self.blocks:
                self.compile_blocks(block)
        return self.make_optimizer(self.parameters())


class StagedGPT(TinyGPT):
    """The same, as a pipeline wants it: the loss by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.compute_loss(self(batch[0]), batch)

    def compute_loss(self, output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1).float(), ((batch[0] * 7 + 3) % TOKENS).flatten())


def data(batch_size: int = 8) -> DataLoader[Any]:
    ids = torch.randint(0, TOKENS, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(ids), batch_size=batch_size, shuffle=True)


class Losses(Callback):
    """Keeps the loss of every micro-batch, of this rank."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_backward(self, trainer: Any, module: nn.Module, loss: Tensor) -> None:
        self.values.append(loss.item())


@dataclass
class Run:
    """What a training left."""

    losses: list[float]
    weights: dict[str, Tensor]
    checkpoints: dict[int, Path] = field(default_factory=dict)
    model: TinyGPT | None = None


def train(
    precision: str | Precision,
    root: Path,
    *,
    steps: int = 24,
    resume: Path | None = None,
    save_every: int = 0,
    strategy: str = "auto",
    device: str = "cpu",
    batch_size: int = 8,
    callbacks: list[Callback] | None = None,
    model: TinyGPT | None = None,
    log_every: int = 50,
) -> Run:
    """Train a TinyGPT for `steps` steps (in all, a resumed run too); return its losses and weights."""
    losses, model = Losses(), model or TinyGPT()
    given: list[Callback] = [losses, *(callbacks or [])]
    if save_every:
        given.append(Checkpoint(every_n_steps=save_every, save_top_k=-1))
    trainer = Trainer(
        precision=precision,
        strategy=strategy,
        device=device,
        max_steps=steps,
        log_every_n_steps=log_every,
        callbacks=given,
        enable_checkpointing=bool(save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        root=root,
        seed=0,
        resume=resume,
    )
    trainer.fit(model, data(batch_size))
    checkpoints = {info.step: info.path for info in trainer.store.list()} if save_every else {}
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Run(losses.values, weights, checkpoints, model)
