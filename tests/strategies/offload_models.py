"""The model that the tests of offload share, and maps of where it lies; the fixtures over it are in conftest.py."""

from __future__ import annotations

import torch
from drivetrain import init_empty_weights
from torch import Tensor, nn

WIDTH, WORDS, LAYERS = 64, 50, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A transformer's outline: embedding, blocks, norm, a head that is tied to the embedding, and a buffer in no file."""

    scale: Tensor

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def empty() -> Net:
    with init_empty_weights():
        return Net().eval()


WHOLE = {"": "disk"}
MIXED = {"embed": "cpu", "head": "cpu", "scale": "cpu", "norm": "disk", "layers": "disk", "layers.2": "cpu"}
