"""MuonAdamW is torch.optim.Muon and AdamW on one device, and the same, bit for bit, where parameters are cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.muon import MuonAdamW, muon_groups
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import AdamW, Muon


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.wide = nn.Linear(6, 9)
        self.head = nn.Linear(9, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = torch.tanh(block(h))
        return self.head(torch.tanh(self.wide(h)))


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for n, p in model.named_parameters()}


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    model = Net()
    names = {id(p): n for n, p in model.named_parameters()}
    muon, others = muon_groups(model)
    assert [names[id(p)] for p in muon["params"]] == ["blocks.0.weight", "blocks.1.weight", "wide.weight"]
    assert {"embedding.weight", "head.weight", "head.bias", "wide.bias"} <= {names[id(p)] for p in others["params"]}


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_it_is_torchs_muon_and_adamw_bit_for_bit(adjust: str | None) -> None:
    ours, theirs = Net(), Net()
    optimizer = MuonAdamW(muon_groups(ours), lr=0.02, adamw_lr=1e-2, weight_decay=0.1, adjust_lr_fn=adjust)
    hidden, others = muon_groups(theirs)
    references = [
        Muon(hidden["params"], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust),
        AdamW(others["params"], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(4):
        for model in (ours, theirs):
            for name, grad in gradients(model, step).items():
                model.get_parameter(name).grad = grad
        optimizer.step()
        for reference in references:
            reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def stepped(shape: tuple[int, ...], placements: list[Any]) -> dict[str, list[Any]]:
    """Weights after four steps with the same gradients as on one device, where parameters are cut as `placements` say."""
    accelerator = Accelerator()
    mesh = init_device_mesh("cpu", shape)
    model = Net()
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            cut = [p if not isinstance(p, Shard) or p.dim < parameter.dim() else Replicate() for p in placements]
            setattr(module, key, nn.Parameter(distribute_tensor(parameter.data, mesh, cut)))
    optimizer = MuonAdamW(muon_groups(model), lr=0.02, adamw_lr=1e-2)
    for step in range(4):
        for name, grad in gradients(model, step).items():
            parameter = model.get_parameter(name)
            assert isinstance(parameter, DTensor)
            parameter.grad = distribute_tensor(grad, mesh, parameter.placements)
        optimizer.step()
    found = {n: p.full_tensor().tolist() for n, p in model.named_parameters() if isinstance(p, DTensor)}
    accelerator.end_training()
    return found


CUTS = {
    "rows": ((2,), [Shard(0)]),
    "rows of four, some ranks with none": ((4,), [Shard(0)]),
    "replicas of rows": ((2, 2), [Replicate(), Shard(0)]),
    "columns": ((2,), [Shard(1)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_parameters_that_are_cut_up_get_the_same_bits(cut: str, ranks: Any) -> None:
    shape, placements = CUTS[cut]
    model = Net()
    optimizer = MuonAdamW(muon_groups(model), lr=0.02, adamw_lr=1e-2)
    for step in range(4):
        for name, grad in gradients(model, step).items():
            model.get_parameter(name).grad = grad
        optimizer.step()
    for found in ranks(2 if len(shape) == 1 and shape[0] == 2 else 4, stepped, shape, placements):
        for name, parameter in model.named_parameters():
            assert torch.equal(torch.tensor(found[name]), parameter.data), name


def trained(strategy: str, folder: str | None = None) -> list[float]:
    """Losses of twelve steps in float64; with `folder`, the last six after a save and a load into a new model."""
    accelerator = Accelerator(strategy=strategy)
    losses: list[float] = []
    model: Any = None
    optimizer: Any = None
    for part in range(2):
        if part == 0 or folder:
            model = Net(torch.float64)
            model, optimizer = accelerator.prepare(model, MuonAdamW(muon_groups(model), adamw_lr=1e-2))
            if part:
                accelerator.load_state(f"{folder}/saved")
        for step in range(6 * part, 6 * part + 6):
            generator = torch.Generator().manual_seed(step)
            x = torch.randint(0, 11, (8, 4), generator=generator)
            index, count = accelerator.strategy.data_shard
            mine = x.chunk(count)[index]
            loss = nn.functional.cross_entropy(model(mine).flatten(0, 1), (mine % 3).flatten())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss, "mean").item())
        if folder and not part:
            accelerator.save_state(f"{folder}/saved")
            accelerator.free_memory()
    accelerator.end_training()
    return losses


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_a_sharded_training_has_the_losses_of_one_process_and_resumes_bit_for_bit(ranks: Any, tmp_path: Any) -> None:
    (alone,) = ranks(1, trained, "single")
    straight = ranks(2, trained, "fsdp")[0]
    resumed = ranks(2, trained, "fsdp", str(tmp_path))[0]
    assert straight == pytest.approx(alone, rel=1e-9)
    assert straight[-1] < straight[0]
    assert resumed == straight


def test_a_vector_in_a_muon_group_and_a_group_that_does_not_say_are_refused() -> None:
    with pytest.raises(ConfigError, match="Muon is for matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "use_muon": True}])
    with pytest.raises(ConfigError, match="muon_groups"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3, 3))]}])
