"""State under names that do not depend on how it is held: a round trip is exact, and another model's is refused whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain.strategies import named_state
from drivetrain.strategies.errors import CheckpointError, ConfigError
from torch import Tensor, nn
from torch.optim import Optimizer


class Tied(nn.Module):
    """Tied weights, a buffer that is saved and one that is not."""

    def __init__(self, seed: int, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.8, 0.99), amsgrad=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, centered=True, momentum=0.1),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-2),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=1e-2),
    "groups": lambda m: torch.optim.AdamW(
        [{"params": [p], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(m.parameters())]
    ),
}


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        tokens = torch.randint(0, 6, (8,), generator=torch.Generator().manual_seed(step))

        def closure(tokens: Tensor = tokens) -> Any:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 6)
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
    return losses


def saved(models: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds: copies of the tensors, and JSON that was written and read."""
    tensors, values = named_state.optimizer_state(models, optimizers)
    tensors |= named_state.model_tensors(models)
    return {n: t.detach().clone() for n, t in tensors.items()}, json.loads(json.dumps(values))


def load(models: dict[str, nn.Module], optimizers: dict[str, Optimizer], state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, values = state
    named_state.load_model_tensors(models, tensors, tensors.__getitem__)
    named_state.load_optimizer_state(models, optimizers, tensors, tensors.__getitem__, values)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_round_trip_goes_on_bit_for_bit(kind: str) -> None:
    model = Tied(0)
    optimizer = MAKERS[kind](model)
    train(model, optimizer, 5)
    optimizer.param_groups[0]["lr"] *= 0.5  # what a scheduler did
    state = saved({"model": model}, {"optimizer": optimizer})
    expected = train(model, optimizer, 5, start=5)
    other = Tied(1)
    fresh = MAKERS[kind](other)
    load({"model": other}, {"optimizer": fresh}, state)
    assert train(other, fresh, 5, start=5) == expected
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert {k: type(v) for k, v in fresh.param_groups[0].items()} == {k: type(v) for k, v in optimizer.param_groups[0].items()}


def test_names_are_those_of_the_users_module() -> None:
    model = Tied(0)
    optimizer = MAKERS["momentum"](model)
    train(model, optimizer, 1)
    tensors, values = named_state.optimizer_state({"net": model}, {"sgd": optimizer})
    assert set(named_state.model_tensors({"net": model})) == {
        "model/net/embed.weight",
        "model/net/head.weight",
        "model/net/norm.weight",
        "model/net/norm.bias",
        "model/net/norm.running_mean",
        "model/net/norm.running_var",
        "model/net/norm.num_batches_tracked",
    }
    momentum = "momentum_buffer"
    assert set(tensors) == {f"optimizer/sgd/net/{n}/{momentum}" for n in ("embed.weight", "norm.weight", "norm.bias")}
    assert values["optimizer/sgd"]["class"] == "SGD"
    assert values["optimizer/sgd"]["param_groups"][0]["params"] == ["net/embed.weight", "net/norm.weight", "net/norm.bias"]


def test_two_models_and_two_optimizers_keep_apart() -> None:
    models: dict[str, nn.Module] = {"a": Tied(0), "b": Tied(1)}
    optimizers = {"x": MAKERS["adamw"](models["a"]), "y": MAKERS["momentum"](models["b"])}
    for (_, model), (_, optimizer) in zip(models.items(), optimizers.items(), strict=True):
        train(model, optimizer, 3)
    state = saved(models, optimizers)
    others: dict[str, nn.Module] = {"a": Tied(2), "b": Tied(3)}
    fresh = {"x": MAKERS["adamw"](others["a"]), "y": MAKERS["momentum"](others["b"])}
    load(others, fresh, state)
    for name in models:
        kind = "x" if name == "a" else "y"
        assert train(others[name], fresh[kind], 2) == train(models[name], optimizers[kind], 2)


def test_another_order_of_parameters_in_the_group_is_sorted_out_by_name() -> None:
    """Names, not numbers: torch's own load would give each parameter its neighbour's state."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD([model.bias, model.weight], lr=0.1, momentum=0.9)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    state = saved({"m": model}, {"o": optimizer})
    other = nn.Linear(4, 4)
    fresh = torch.optim.SGD([other.weight, other.bias], lr=0.1, momentum=0.9)
    load({"m": other}, {"o": fresh}, state)
    assert torch.equal(fresh.state[other.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])
    assert torch.equal(fresh.state[other.bias]["momentum_buffer"], optimizer.state[model.bias]["momentum_buffer"])


def untouched(model: nn.Module, action: Callable[[], Any], match: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        action()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed by a load that failed"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model/m/weight"), r"1 missing in the checkpoint \(model/m/weight\)"),
        (lambda t: t.update({"model/m/extra": torch.ones(1)}), r"1 in the checkpoint but not in the model \(model/m/extra\)"),
        (lambda t: t.update({"model/m/weight": torch.ones(9, 4)}), r"of another shape \(model/m/weight \(9, 4\) for \(4, 4\)\)"),
    ],
    ids=["missing", "excess", "shape"],
)
def test_another_model_is_refused_and_nothing_is_loaded(change: Callable[[dict[str, Tensor]], Any], match: str) -> None:
    model = nn.Linear(4, 4)
    tensors = {n: t + 1 for n, t in named_state.model_tensors({"m": model}).items()}
    change(tensors)
    untouched(model, lambda: named_state.load_model_tensors({"m": model}, tensors, tensors.__getitem__), match)


def test_not_strict_takes_what_fits_and_says_what_did_not() -> None:
    model = nn.Linear(4, 4)
    tensors = {"model/m/weight": torch.full((4, 4), 2.0), "model/m/extra": torch.ones(1), "optimizer/o/m/weight/x": torch.ones(1)}
    skipped = named_state.load_model_tensors({"m": model}, tensors, tensors.__getitem__, strict=False)
    assert skipped == ["model/m/bias", "model/m/extra"]
    assert torch.equal(model.weight.data, torch.full((4, 4), 2.0))


def test_a_tensor_of_another_dtype_is_cast_to_the_parameters() -> None:
    model = nn.Linear(2, 2)
    tensors = {n: torch.full(t.shape, 0.5, dtype=torch.float64) for n, t in named_state.model_tensors({"m": model}).items()}
    named_state.load_model_tensors({"m": model}, tensors, tensors.__getitem__)
    assert model.weight.dtype == torch.float32
    assert model.weight.unique().tolist() == [0.5]


def trained() -> tuple[nn.Module, Optimizer, tuple[dict[str, Tensor], dict[str, Any]]]:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer, saved({"m": model}, {"o": optimizer})


@pytest.mark.parametrize(
    ("make", "name", "match"),
    [
        (lambda m: torch.optim.AdamW(m.parameters()), "o", r"was SGD with 1 parameter group\(s\).* and is AdamW with 1 now"),
        (lambda m: torch.optim.SGD([{"params": [m.weight]}, {"params": [m.bias]}], lr=1.0), "o", "is SGD with 2 now"),
        (lambda m: torch.optim.SGD([m.weight], lr=1.0), "o", "had state for parameter 'm/bias'"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=1.0), "other", r"no optimizer 'other'; it holds \['o'\]"),
    ],
    ids=["class", "groups", "parameters", "name"],
)
def test_another_optimizer_is_refused(make: Callable[[Any], Optimizer], name: str, match: str) -> None:
    _, _, (tensors, values) = trained()
    model = nn.Linear(4, 4)
    optimizer = make(model)
    with pytest.raises(CheckpointError, match=match):
        named_state.load_optimizer_state({"m": model}, {name: optimizer}, tensors, tensors.__getitem__, values)
    assert not optimizer.state


def test_a_parameter_of_no_prepared_model_is_told_by_its_shape() -> None:
    model, loose = nn.Linear(4, 4), nn.Parameter(torch.ones(3, 5))
    optimizer = torch.optim.SGD([*model.parameters(), loose], lr=0.1)
    with pytest.raises(ConfigError, match=r"Optimizer 'o' holds a parameter of shape \(3, 5\)"):
        named_state.optimizer_state({"m": model}, {"o": optimizer})
