"""DDPStrategy against a plain PyTorch loop on the concatenated batch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A model whose step uses children and a parameter that it holds itself, and never its own forward."""

    def __init__(self, seed: int = 0, *, dropout: float = 0.0, norm: bool = False, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Dropout(dropout), nn.Linear(24, 8), nn.Tanh())
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.full((3,), 1.5))
        self.model = nn.Identity()  # a name that a wrapper must not hide
        if unused:
            self.spare = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x))) * self.temperature

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.norm(self.body(x))) * self.temperature, y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def batches(n: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3),
}


def flat(model: nn.Module) -> list[float]:
    return torch.cat([v.detach().double().flatten() for v in model.state_dict().values()]).tolist()


def plain_run(optimizer: str, steps: int, accumulate: int, **options: Any) -> tuple[list[float], list[float], list[float]]:
    """Losses, gradient norms, weights of the loop that needs no explanation."""
    model = Net(**options)
    opt = OPTIMIZERS[optimizer](model)
    losses, norms = [], []
    data = batches(steps * accumulate)
    for step in range(steps):
        opt.zero_grad()
        total = 0.0
        for batch in data[step * accumulate : (step + 1) * accumulate]:
            loss = model.training_step(batch, 0) / accumulate
            loss.backward()
            total += loss.item()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        opt.step()
        losses.append(total)
    return losses, norms, flat(model)


def slice_of(batch: tuple[Tensor, Tensor], index: int, count: int) -> tuple[Tensor, Tensor]:
    return batch[0].tensor_split(count)[index], batch[1].tensor_split(count)[index]


def ddp_run(
    optimizer: str, steps: int, accumulate: int, strategy_options: dict[str, Any], *, raw: bool = False, **options: Any
) -> tuple[list[float], list[float], list[float]]:
    world = World.start("cpu")
    strategy = DDPStrategy(**strategy_options)
    strategy.start(world)
    user = Net(seed=world.rank, **options)  # other weights on each rank: rank 0's are to be taken
    prepared, (opt,) = strategy.prepare({"model": user}, lambda: [OPTIMIZERS[optimizer](user)])
    model = prepared["model"]
    step_fn = strategy.bind(user, "training_step")
    losses, norms = [], []
    data = batches(steps * accumulate)
    for step in range(steps):
        opt.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for i in range(accumulate):
            batch = slice_of(data[step * accumulate + i], *strategy.data_shard)
            strategy.set_gradient_sync([model], i == accumulate - 1)
            loss = F.cross_entropy(model(batch[0]), batch[1]) if raw else step_fn(batch, 0)
            strategy.backward(loss / accumulate)
            total += loss.detach() / accumulate
        parameters = list(user.parameters())
        norm = strategy.grad_norm(parameters)
        strategy.scale_gradients(parameters, (0.5 / (norm + 1e-6)).clamp(max=1.0))
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        assert torch.equal(world.broadcast(gradient), gradient), "gradients differ between the ranks"
        strategy.step(opt)
        losses.append(world.all_reduce(total, "mean").item())
        norms.append(norm.item())
    weights = flat(user)
    strategy.stop()
    world.stop()
    return losses, norms, weights


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ranks_train_like_one_process(optimizer: str, accumulate: int, size: int, ranks: Any) -> None:
    """The same global batches give the losses, gradient norms and weights of a plain loop, on every rank."""
    losses, norms, weights = plain_run(optimizer, 50, accumulate)
    for result in ranks(size, ddp_run, optimizer, 50, accumulate, {}):
        assert result[0] == pytest.approx(losses, rel=1e-12, abs=1e-12)
        assert result[1] == pytest.approx(norms, rel=1e-11, abs=1e-12)
        assert result[2] == pytest.approx(weights, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.001},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
        {"static_graph": True, "find_unused_parameters": True},
    ],
    ids=str,
)
def test_options_of_ddp_do_not_change_the_numbers(options: dict[str, Any], ranks: Any) -> None:
    unused = bool(options.get("find_unused_parameters") or options.get("static_graph"))
    losses, _, weights = plain_run("sgd", 6, 2, unused=unused)
    for result in ranks(2, ddp_run, "sgd", 6, 2, options, unused=unused):
        assert result[0] == pytest.approx(losses, rel=1e-12)
        assert result[2] == pytest.approx(weights, rel=1e-10, abs=1e-12)


def test_the_prepared_model_is_called_like_the_model(ranks: Any) -> None:
    """The raw API: prepared(x) runs forward through DDP, and the gradients are averaged."""
    losses, _, weights = plain_run("adamw", 5, 2)
    for result in ranks(2, ddp_run, "adamw", 5, 2, {}, raw=True):
        assert result[0] == pytest.approx(losses, rel=1e-12)
        assert result[2] == pytest.approx(weights, rel=1e-10, abs=1e-12)


# -- several backward passes ----------------------------------------------------------------------------------------------


class GAN(nn.Module):
    """Two networks in one module, each with its optimizer, both stepped in one step."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.double()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.discriminator.parameters(), lr=3e-3, betas=(0.5, 0.9)),
            torch.optim.SGD(self.generator.parameters(), lr=3e-2),
        ]

    def play(self, x: Tensor, opts: list[torch.optim.Optimizer], backward: Callable[..., None]) -> list[Tensor]:
        opt_d, opt_g = opts
        fake = self.generator(x)
        opt_d.zero_grad()
        d_loss = F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        backward(d_loss)
        opt_d.step()
        opt_g.zero_grad()
        g_loss = F.softplus(-self.discriminator(fake)).mean()
        backward(g_loss)
        opt_g.step()
        return [d_loss.detach(), g_loss.detach()]


def plain_gan(steps: int) -> tuple[list[float], list[float]]:
    gan = GAN()
    opts = gan.optimizers()
    losses = [x.item() for batch in batches(steps) for x in gan.play(batch[0], opts, lambda loss: loss.backward())]
    return losses, flat(gan)


def ddp_gan(steps: int, kind: str) -> tuple[list[float], list[float]]:
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    gan = GAN()
    opts = gan.optimizers()
    if kind == "one module":
        strategy.prepare({"model": gan}, opts)
        gan.training_step = lambda x: gan.play(x, opts, strategy.manual_backward)  # type: ignore[assignment]
        step = strategy.bind(gan, "training_step")
    else:  # each network prepared on its own
        prepared, _ = strategy.prepare({"g": gan.generator, "d": gan.discriminator}, opts)
        if kind == "raw":
            gan.generator, gan.discriminator = prepared["g"], prepared["d"]  # type: ignore[assignment]

        def step(x: Tensor) -> list[Tensor]:
            return gan.play(x, opts, strategy.backward if kind == "raw" else strategy.manual_backward)

    losses = []
    for x, _ in batches(steps):
        losses += [world.all_reduce(v, "mean").item() for v in step(x.tensor_split(world.size)[world.rank])]
    weights = flat(gan)
    strategy.stop()
    world.stop()
    return losses, weights


@pytest.mark.parametrize("kind", ["one module", "named children", "raw"])
def test_two_backward_passes_in_one_step_train_like_one_process(kind: str, ranks: Any) -> None:
    """A GAN under manual optimisation: torch's DDP would crash, or (find_unused_parameters) be silently wrong."""
    losses, weights = plain_gan(20)
    for result in ranks(2, ddp_gan, 20, kind):
        assert result[0] == pytest.approx(losses, rel=1e-12, abs=1e-12)
        assert result[1] == pytest.approx(weights, rel=1e-10, abs=1e-12)


def two_losses_of_bare_model(steps: int) -> list[float]:
    """Two forwards before two backward passes, one of them on the module itself."""
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net()
    model = strategy.prepare_model("model", user)
    opt = torch.optim.SGD(user.parameters(), lr=0.1)
    for batch in batches(steps):
        x, y = slice_of(batch, world.rank, world.size)
        opt.zero_grad()
        first, second = F.cross_entropy(model(x), y), F.cross_entropy(user(2 * x), y)
        strategy.backward(first)
        strategy.backward(second)
        opt.step()
    weights = flat(user)
    strategy.stop()
    world.stop()
    return weights


def test_a_second_loss_is_averaged_too(ranks: Any) -> None:
    """torch's DDP leaves the gradients of the second backward pass as they are on each rank, without a word."""
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(5):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(2 * x), y).backward()
        opt.step()
    for result in ranks(2, two_losses_of_bare_model, 5):
        assert result == pytest.approx(flat(model), rel=1e-10, abs=1e-12)


# -- what is not wrapped, and evaluation ----------------------------------------------------------------------------------


def kinds_of_prepared() -> list[Any]:
    world = World.start("cpu")
    strategy, judge = DDPStrategy(), DDPStrategy(inference=True)
    strategy.start(world)
    judge.start(world)
    frozen, teacher = Net(seed=world.rank).requires_grad_(False), Net(seed=world.rank)
    same = [strategy.prepare_model("frozen", frozen) is frozen, judge.prepare_model("teacher", teacher) is teacher]
    equal = [torch.equal(world.broadcast(p), p) for m in (frozen, teacher) for p in m.head.parameters()]
    result = [*same, *equal, judge.reduces_gradients, any(p.requires_grad for p in teacher.parameters())]
    judge.stop()
    strategy.stop()
    world.stop()
    return result


def test_frozen_and_inference_models_are_not_wrapped_and_equal_on_all_ranks(ranks: Any) -> None:
    assert ranks(2, kinds_of_prepared) == [[True] * 6 + [False, False]] * 2


def uneven_evaluation() -> list[float]:
    """Rank 1 evaluates one batch more than rank 0: a collective in the forward would hang or mix up the ranks."""
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net(norm=True)
    model = strategy.prepare_model("model", user)
    step = strategy.bind(user, "training_step")
    evaluate = strategy.bind(user, "validation_step")
    for batch in batches(3):
        strategy.backward(step(slice_of(batch, world.rank, world.size), 0))
    mean = user.norm.get_buffer("running_mean")
    parted = not torch.equal(world.broadcast(mean), mean)
    strategy.sync_buffers([model])
    model.eval()
    with torch.no_grad():
        losses = [evaluate(batches(1)[0], i).item() for i in range(1 + world.rank)]
        losses.append(F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).item())
    world.barrier()
    strategy.stop()
    world.stop()
    return [float(parted or world.rank == 0), *losses]


def test_evaluation_runs_the_bare_module_with_the_buffers_of_rank_0(ranks: Any) -> None:
    zero, one = ranks(2, uneven_evaluation)
    assert zero[0] == one[0] == 1.0
    assert set(zero[1:]) == set(one[1:]), "the ranks evaluated different models"
    assert len(one) == len(zero) + 1


def alone() -> list[Any]:
    world = World.single()
    strategy = make_strategy("ddp")
    strategy.start(world)
    user = Net()
    return [
        strategy.prepare_model("model", user) is user,
        strategy.data_shard,
        strategy.bind(user, "training_step") == user.training_step,
    ]


def test_one_process_is_not_wrapped() -> None:
    assert alone() == [True, (0, 1), True]
