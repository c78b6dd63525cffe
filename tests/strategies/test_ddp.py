"""DDPStrategy against a plain PyTorch loop on the concatenated batch, in float64."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.ddp import DDPStrategy
from drivetrain.strategies.errors import ConfigError, DistributedError, UnknownName
from drivetrain.strategies.replica import Replica
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


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


def describe_replica() -> dict[str, Any]:
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net(norm=True)
    model = strategy.prepare_model("model", user)
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("wrapper"))
    user.register_forward_hook(lambda *_: seen.append("model"))
    model(batches(1)[0][0])
    with torch.no_grad():
        model(batches(1)[0][0])
    model.eval()
    result = {
        "isinstance": isinstance(model, nn.Module),
        "unwrap": strategy.unwrap(model) is user and strategy.unwrap(user) is user,
        "module": model.module is user,
        "attribute": model.temperature is user.temperature and model.model is user.model,
        "keys": list(model.state_dict()) == list(user.state_dict()),
        "names": [n for n, _ in model.named_parameters()] == [n for n, _ in user.named_parameters()],
        "buffers": [n for n, _ in model.named_buffers()] == [n for n, _ in user.named_buffers()],
        "load": str(model.load_state_dict(user.state_dict())),
        "eval": user.training,
        "hooks": seen,
        "missing": hasattr(model, "no_such_thing"),
        "class": type(user).__name__,
    }
    strategy.stop()
    world.stop()
    return result


def test_a_replica_has_the_names_state_and_attributes_of_its_module(ranks: Any) -> None:
    assert ranks(2, describe_replica)[1] == {
        "isinstance": True,
        "unwrap": True,
        "module": True,
        "attribute": True,
        "keys": True,
        "names": True,
        "buffers": True,
        "load": "<All keys matched successfully>",
        "eval": False,
        "hooks": ["model", "wrapper"] * 2,
        "missing": False,
        "class": "Net",
    }


def frames_to_the_step() -> tuple[list[str], list[str]]:
    """File names of the frames between a bound step's caller and the step; and the calls of torch's own wrapper."""
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net()
    found: list[str] = []

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not caller:
            found.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
            frame = frame.f_back
        return user(batch[0]).sum()

    user.training_step = training_step  # type: ignore[method-assign]
    strategy.prepare_model("model", user)
    caller = sys._getframe().f_code
    step = strategy.bind(user, "training_step")
    step(batches(1)[0], 0)
    strategy.stop()
    world.stop()
    ours = [f for f in found[1:] if "strategies/" in f and "site-packages" not in f]
    return ours, found


def test_one_frame_of_ours_lies_between_the_caller_and_the_step(ranks: Any) -> None:
    ours, every = ranks(2, frames_to_the_step)[0]
    assert [name.rpartition(":")[2] for name in ours] == ["_run_ddp_forward"]
    assert len(every) == 3, every  # the step, ours, DistributedDataParallel.forward


def test_the_private_names_of_torch_that_this_stands_on_exist() -> None:
    """A new torch without one of them fails here, with its name, and not somewhere in a run."""
    for name in ("_run_ddp_forward", "_build_params_for_reducer", "_set_static_graph", "_active_ddp_module"):
        assert hasattr(DistributedDataParallel, name), name
    for name in ("prepare_for_backward", "_push_all_rebuilt_params", "_rebuild_buckets", "_check_reducer_finalized"):
        assert hasattr(dist.Reducer, name), name
    assert "self._run_ddp_forward(*inputs, **kwargs)" in inspect.getsource(DistributedDataParallel.forward)


# -- exact resume ---------------------------------------------------------------------------------------------------------


def resumable_run(options: dict[str, Any], start: int, stop: int, saved: Any, model_options: dict[str, Any]) -> Any:
    """Train steps [start, stop); return the losses, the weights' bytes, and the state as it was after step 10."""
    world = World.start("cpu")
    strategy = DDPStrategy(**options)
    strategy.start(world)
    user = Net(seed=7, dropout=0.2, **model_options).float()
    _, (opt,) = strategy.prepare({"model": user}, [OPTIMIZERS["adamw"](user)])
    assert all(p.grad is None for p in user.parameters()), "priming left gradients"
    step_fn = strategy.bind(user, "training_step")
    torch.manual_seed(world.rank)
    if saved is not None:
        tensors, values, rng = saved[world.rank]
        strategy.load_state_tensors({"model": user}, {"o": opt}, tensors, lambda n: tensors[n], values)
        torch.set_rng_state(rng)
    losses, state = [], None
    data = [(x.float(), y) for x, y in batches(stop)]
    for i in range(start, stop):
        opt.zero_grad()
        loss = step_fn(slice_of(data[i], *strategy.data_shard), i)
        strategy.backward(loss)
        strategy.step(opt)
        losses.append(loss.item())
        if i == 9:
            tensors, values = strategy.state_tensors({"model": user}, {"o": opt})
            state = (full(tensors, world), copy.deepcopy(values), torch.get_rng_state())
    weights = {k: v.clone() for k, v in user.state_dict().items()}
    strategy.stop()
    world.stop()
    return losses, weights, state


def full(tensors: dict[str, Any], world: World) -> dict[str, Tensor]:
    """What a checkpoint would hold: pieces put together in order of rank, and what only one rank has, that rank's."""
    found: dict[str, Tensor] = {}
    own = {n: t.detach() if isinstance(t, Tensor) else (t.tensor, t.shape) for n, t in tensors.items()}
    for others in reversed(world.gather_object(own)):
        for name, value in others.items():
            if isinstance(value, Tensor):
                found[name] = value
            else:
                piece, shape = value
                found[name] = torch.cat([piece, found[name]]) if name in found else piece
                assert len(found[name]) <= shape[0]
    return found


@pytest.mark.parametrize(
    ("options", "model_options"),
    [
        ({}, {}),
        ({"bucket_cap_mb": 0.0005}, {"norm": True}),
        ({"static_graph": True}, {"unused": True}),
        ({"find_unused_parameters": True}, {"unused": True}),
        ({"broadcast_buffers": False}, {"norm": True}),
        ({"comm_hook": "bf16"}, {}),
        ({"comm_hook": "power_sgd", "comm_options": {"start_powerSGD_iter": 3, "min_compression_rate": 0.5}}, {}),
        ({"comm_hook": "batched_power_sgd", "comm_options": {"start_powerSGD_iter": 3}}, {}),
        ({"comm_hook": "power_sgd", "comm_options": {"start_powerSGD_iter": 3, "warm_start": False}}, {}),
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_equal(options: dict[str, Any], model_options: dict[str, Any], ranks: Any) -> None:
    """4 ranks, 20 steps, against 10 steps, a fresh start from the state and 10 more: torch's DDP alone does not do this."""
    whole = ranks(4, resumable_run, options, 0, 20, None, model_options)
    saved = [state for _, _, state in whole]
    resumed = ranks(4, resumable_run, options, 10, 20, saved, model_options)
    for (losses, weights, _), (losses_after, weights_after, _) in zip(whole, resumed, strict=True):
        assert losses[10:] == losses_after
        for name, value in weights.items():
            assert torch.equal(value, weights_after[name]), name


def draws_and_buffers() -> tuple[bool, bool, list[float]]:
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net(norm=True)
    fired: list[int] = []
    user.head.weight.register_hook(lambda g: fired.append(1))
    user.head.weight.register_post_accumulate_grad_hook(lambda p: fired.append(2))
    buffers = [b.clone() for b in user.buffers()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    strategy.prepare_model("model", user)
    same = all(torch.equal(a, b) for a, b in zip(buffers, user.buffers(), strict=True))
    drawn = not torch.equal(before, torch.get_rng_state())
    strategy.stop()
    world.stop()
    return same, drawn, [float(f) for f in fired]


def test_priming_touches_no_buffer_no_random_state_and_fires_no_hook(ranks: Any) -> None:
    assert ranks(2, draws_and_buffers) == [(True, False, [])] * 2


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


# -- errors ---------------------------------------------------------------------------------------------------------------


def train_once(
    build: Callable[[int], nn.Module], options: dict[str, Any], change: Callable[[nn.Module], None] | None = None
) -> None:
    world = World.start("cpu")
    strategy = DDPStrategy(**options)
    strategy.start(world)
    user = build(world.rank)
    strategy.prepare_model("model", user)
    step = strategy.bind(user, "training_step")
    if change is not None:
        change(user)
    strategy.backward(step(batches(1)[0], 0))
    strategy.stop()
    world.stop()


def test_parameters_without_a_gradient_are_named_before_the_optimizer_steps(ranks: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"2 parameter\(s\).*'model'.*: spare\.bias, spare\.weight\. .*find_unused_parameters=True"
    ):
        ranks(2, train_once, lambda rank: Net(unused=True), {})


def test_unused_parameters_are_allowed_where_asked(ranks: Any) -> None:
    ranks(2, train_once, lambda rank: Net(unused=True), {"find_unused_parameters": True})


class Reentrant(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6).double()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = self.stem(batch[0])
        twice = checkpoint(self.body, x, use_reentrant=True) + checkpoint(self.body, 2 * x, use_reentrant=True)
        return F.cross_entropy(self.head(twice) * self.temperature, batch[1])


def test_a_parameter_that_is_ready_twice_is_explained_and_static_graph_takes_it(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"body\..* got its gradient twice.*use_reentrant=False.*static_graph=True"):
        ranks(2, train_once, lambda rank: Reentrant(), {})
    ranks(2, train_once, lambda rank: Reentrant(), {"static_graph": True})


class Odd(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, width)


def test_other_shapes_on_another_rank_are_an_error_of_all(ranks: Any) -> None:
    with pytest.raises(DistributedError, match="model 'model' is not the same on all ranks"):
        ranks(2, train_once, lambda rank: Odd(3 + rank), {})


def unfreeze(model: nn.Module) -> None:
    assert isinstance(model, Net)
    model.temperature.requires_grad_(True)


def frozen_in_part(rank: int) -> Net:
    net = Net()
    net.temperature.requires_grad_(False)
    return net


def test_a_parameter_unfrozen_too_late_is_named(ranks: Any) -> None:
    """DDP would not average its gradient, and the ranks would drift apart without a word."""
    ranks(2, train_once, frozen_in_part, {})
    with pytest.raises(ConfigError, match="Parameter temperature of model 'model' was frozen when the model was prepared"):
        ranks(2, train_once, frozen_in_part, {}, unfreeze)


def freed_and_prepared_again() -> bool:
    world = World.start("cpu")
    user = frozen_in_part(0)
    strategy = first = DDPStrategy()
    for strategy in (first, DDPStrategy()):
        strategy.start(world)
        strategy.prepare_model("model", user)
        strategy.backward(strategy.bind(user, "training_step")(batches(1)[0], 0))
        user.temperature.requires_grad_(True)
    strategy.backward(user.training_step(batches(1)[0], 0))
    strategy.stop()
    user.training_step(batches(1)[0], 0).backward()
    world.stop()
    return user.temperature.grad is not None


def test_a_model_may_be_prepared_again(ranks: Any) -> None:
    assert ranks(2, freed_and_prepared_again) == [True, True]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"find_unused_parameter": True}, UnknownName, "Did you mean 'find_unused_parameters'"),
        ({"timeout": 5}, UnknownName, r"World\.start\(timeout_s"),
        ({"bucket_cap_mb": 0}, ConfigError, "more than 0 MiB"),
        ({"comm_wrapper": "fp16"}, ConfigError, "belong to a comm_hook"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        DDPStrategy(**options)


def test_the_peers_spellings_are_accepted() -> None:
    strategy = DDPStrategy(ddp_comm_hook="fp16", comm_state_option=None, ddp_comm_wrapper="no")
    assert (strategy.comm_hook, strategy.comm_wrapper) == ("fp16", None)
    assert isinstance(make_strategy("ddp", bucket_cap_mb=5), DDPStrategy)


def test_a_hook_needs_a_process_group_even_for_one_process() -> None:
    strategy = DDPStrategy(comm_hook="fp16")
    assert strategy.needs_group
    with pytest.raises(ConfigError, match="need_group=True"):
        strategy.start(World.single())


def lazy_model(rank: int) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def test_a_lazy_module_is_named(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"0\.(weight|bias) of model 'model' has no shape yet"):
        ranks(2, train_once, lazy_model, {})


def calls_of_a_step(kind: str, steps: int = 20) -> float:
    """Python and C calls of one step, as sys.setprofile counts them."""
    world = World.start("cpu")
    strategy = DDPStrategy()
    strategy.start(world)
    user = Net()
    if kind == "ours":
        model = strategy.prepare_model("model", user)
        forward, backward = model, strategy.backward
    else:
        forward, backward = DistributedDataParallel(user), Tensor.backward
    x, y = batches(1)[0]

    def step() -> None:
        backward(F.cross_entropy(forward(x), y))

    for _ in range(12):  # torch logs its statistics in the first ten
        step()
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    for _ in range(steps):
        step()
    sys.setprofile(None)
    strategy.stop()
    world.stop()
    return count / steps


def test_a_step_costs_no_more_calls_than_torch_ddp(ranks: Any) -> None:
    ours, torchs = ranks(2, calls_of_a_step, "ours")[0], ranks(2, calls_of_a_step, "torch")[0]
    assert ours <= torchs + 2, (ours, torchs)


def test_replica_is_torchs_ddp() -> None:
    """So that what asks for DistributedDataParallel (torch.compile, state_dict helpers) knows it."""
    assert issubclass(Replica, DistributedDataParallel)
