"""A model larger than the memory it may take: weights stay in their files and pass through two buffers, block by block.

python examples/10_big_model.py                    # 100 MB of weights within 16 MB
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from drivetrain import init_empty_weights, load_checkpoint_and_dispatch, save_torch_model, weights_of
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 512, blocks: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.words(text)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def generate(model: nn.Module, text: Tensor, count: int) -> Tensor:
    """Append `count` tokens, each the likeliest."""
    with torch.no_grad():
        for _ in range(count):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-steps", type=int, default=20, help="tokens")
    tokens = parser.parse_args().max_steps
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        whole = Model().eval()
        save_torch_model(whole, folder, max_shard_size="20MB")  # shards and an index, as Hugging Face writes them
        start = torch.tensor([[1, 2, 3]])
        truth = generate(whole, start, tokens)

        with init_empty_weights():  # no memory, no random numbers
            model = Model().eval()
        model = load_checkpoint_and_dispatch(model, folder, device_map="auto", max_memory={"cpu": "16MB"})
        begin = time.perf_counter()
        same = torch.equal(generate(model, start, tokens), truth)
        seconds = time.perf_counter() - begin
        for what, how in weights_of(model).explain():
            print(f"{what:<12} {how}")
        print(f"{tokens} tokens in {seconds:.2f} s, {'the same as' if same else 'NOT those'} of the model in memory")


if __name__ == "__main__":
    main()
