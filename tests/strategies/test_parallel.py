"""ParallelStrategy: what a string or a plan says, the order of its parts, the axes of its mesh, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain import Accelerator, ParallelPlan
from drivetrain.strategies.base import make_strategy
from drivetrain.strategies.contract_models import Llama, MoELlama
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.parallel import PARTS, ParallelStrategy
from drivetrain.strategies.parts import Part
from drivetrain.strategies.world import World
from torch.distributed.tensor import DTensor

# -- words ------------------------------------------------------------------------------------------------------------------
STRINGS = [
    ("tp", ParallelPlan(tp=-1)),
    ("tp:2", ParallelPlan(tp=2)),
    ("fsdp:2+tp:2", ParallelPlan(dp_shard=2, tp=2)),
    ("fsdp+tp:2", ParallelPlan(dp_shard=-1, tp=2)),
    ("hsdp:2+tp:2", ParallelPlan(dp_replicate=2, dp_shard=-1, tp=2)),
    ("ddp:2+pp:2", ParallelPlan(dp_replicate=2, pp=2)),
    ("fsdp:2+tp:2+pp:2", ParallelPlan(dp_shard=2, tp=2, pp=2)),
    ("fsdp+cp:2", ParallelPlan(dp_shard=-1, cp=2)),
    ("fsdp:4+ep:2", ParallelPlan(dp_shard=4, ep=2)),
    ("ep:2", ParallelPlan(dp_shard=-1, ep=2)),
]


@pytest.mark.parametrize(("words", "plan"), STRINGS, ids=[words for words, _ in STRINGS])
def test_a_string_is_a_plan(words: str, plan: ParallelPlan) -> None:
    strategy = make_strategy(words)
    assert isinstance(strategy, ParallelStrategy)
    assert strategy.plan == plan


def test_sp_is_an_option_of_tp() -> None:
    strategy = make_strategy("tp:2+sp")
    assert isinstance(strategy, ParallelStrategy)
    assert (strategy.plan, strategy.tensor_parallel) == (ParallelPlan(tp=2), "sequence")


BAD_STRINGS = [
    ("fsdp:2+sp", "needs tp beside it. Say 'tp:2"),
    ("hsdp+tp:2", "needs the number of its replicas. Say 'hsdp:2"),
    ("tp:2+sp:2", "has no degree. Say 'tp:2"),
    ("fsdp:2+ddp:2+tp:2", "names two strategies"),
    ("ep", "nothing is left for it. Say how many"),
]


@pytest.mark.parametrize(("words", "says"), BAD_STRINGS, ids=[words for words, _ in BAD_STRINGS])
def test_words_that_do_not_go_together_are_refused(words: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy(words)
    assert says in str(caught.value)


# -- plan=... ---------------------------------------------------------------------------------------------------------------
def chosen_by_plan() -> tuple[str, str]:
    accelerator: Any = Accelerator(plan=ParallelPlan(dp_shard=-1, tp=2))
    found = type(accelerator.strategy).__name__, str(accelerator.strategy.mesh.plan)
    accelerator.end_training()
    return found


def test_a_plan_alone_chooses_the_strategy(ranks: Any) -> None:
    for found in ranks(4, chosen_by_plan):
        assert found == ("ParallelStrategy", str(ParallelPlan(dp_shard=2, tp=2)))


# -- parts ------------------------------------------------------------------------------------------------------------------
def calls_of_parts(words: str) -> list[str]:
    """Which part is asked what, in order: two parts that note it, in the place of those of the axes."""
    world = World.start("cpu", need_group=True)
    strategy: Any = make_strategy(words)
    strategy.start(world)
    seen: list[str] = []

    class Noting(Part):
        def __init__(self, axis: str) -> None:
            self.axis = axis

        def prepare_model(self, name: str, model: Any) -> None:
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            seen.append(f"{self.axis} prepare")

        def wants(self, name: str, model: Any, path: str, module: Any) -> bool:
            return path == "layers.0.attention.wq"

        def cut(self, name: str, model: Any, path: str, module: Any) -> None:
            seen.append(f"{self.axis} cut")

        def unit(self, path: str, module: Any) -> None:
            if path in ("layers.0", ""):
                own = {"layers.0": "attention.wq.weight", "": "norm.weight"}[path]
                assert not isinstance(module.get_parameter(own), DTensor)
                seen.append(f"{self.axis} unit {path}")

        def sharded(self, name: str, model: Any) -> None:
            assert all(isinstance(p, DTensor) for p in model.parameters())
            seen.append(f"{self.axis} sharded")

    strategy.parts = [Noting(axis) for axis in PARTS]
    strategy.prepare({"model": Llama(layers=2)}, [])
    world.stop()
    return seen


def test_parts_prepare_first_then_cut_each_module_before_its_unit_is_sharded(ranks: Any) -> None:
    order = [*PARTS]
    assert order == ["ep", "tp", "cp"]
    for seen in ranks(1, calls_of_parts, "tp:1"):
        assert seen == [f"{axis} {what}" for what in ("prepare", "cut", "unit layers.0", "unit ", "sharded") for axis in order]


def test_the_parts_are_those_of_the_axes_in_use(ranks: Any) -> None:
    def axes(words: str) -> list[str]:
        world = World.start("cpu", need_group=True)
        strategy: Any = make_strategy(words)
        strategy.start(world)
        found = [part.axis for part in strategy.parts]
        world.stop()
        return found

    assert ranks(4, axes, "fsdp:2+tp:2")[0] == ["tp"]
    assert ranks(4, axes, "cp:2+tp:2")[0] == ["tp", "cp"]
    assert ranks(2, axes, "ep:2")[0] == ["ep"]


# -- the mesh ---------------------------------------------------------------------------------------------------------------
def places(words: str, axes: list[str]) -> list[tuple[int, int]]:
    """(index, size) of this rank on each axis."""
    world = World.start("cpu", need_group=True)
    strategy: Any = make_strategy(words)
    strategy.start(world)
    found = [(strategy.mesh.index(axis), strategy.mesh.size(axis)) for axis in axes]
    world.stop()
    return found


def test_stages_are_those_who_share_layers(ranks: Any) -> None:
    """pp is outermost: ranks 0 and 1 are the first stage, and tp in it."""
    assert ranks(4, places, "tp:2+pp:2", ["pp", "stage", "tp"]) == [
        [(0, 2), (0, 2), (0, 2)],
        [(0, 2), (1, 2), (1, 2)],
        [(1, 2), (0, 2), (0, 2)],
        [(1, 2), (1, 2), (1, 2)],
    ]


def test_experts_share_out_the_ranks_of_fsdp(ranks: Any) -> None:
    assert ranks(4, places, "fsdp:4+ep:2", ["fsdp", "expert_fsdp", "ep"]) == [
        [(0, 4), (0, 2), (0, 2)],
        [(1, 4), (0, 2), (1, 2)],
        [(2, 4), (1, 2), (0, 2)],
        [(3, 4), (1, 2), (1, 2)],
    ]


# -- what does not go together -------------------------------------------------------------------------------------------------
def prepared(words: str, build: Any, options: dict[str, Any]) -> None:
    world = World.start("cpu", need_group=True)
    strategy = make_strategy(words, **options)
    strategy.start(world)
    strategy.prepare({"model": build()}, [])


def odd_heads() -> Llama:
    return Llama(heads=6, kv_heads=3)


REFUSED = [
    pytest.param(4, "cp:2+pp:2", Llama, {}, "both pp and cp.*Leave one of them out", id="pp and cp"),
    pytest.param(4, "fsdp:2+tp:2+sp+ep:2", MoELlama, {}, "ep beside sequence parallel.*Leave sp out", id="ep and sp"),
    pytest.param(2, "pp:2", Llama, {"offload": "cpu"}, "offload='cpu' is not combined with pp", id="pp and offload"),
    pytest.param(2, "pp:2", Llama, {"reshard_after_forward": True}, "reshard_after_forward=True under", id="pp and resharding"),
    pytest.param(2, "tp:2", odd_heads, {}, "3 key-value heads cannot be divided by 2.*Choose a tp that divides 3", id="kv heads"),
    pytest.param(2, "ep:2", Llama, {}, r"ep=2 spreads experts, and model 'model' has no", id="ep without experts"),
    pytest.param(4, "tp:3", Llama, {}, "4 processes|== 4|world size", id="a wrong product"),
]


@pytest.mark.parametrize(("n", "words", "build", "options", "says"), REFUSED)
def test_combinations_that_do_not_work_are_refused_by_name(
    n: int, words: str, build: Any, options: dict[str, Any], says: str, ranks: Any
) -> None:
    with pytest.raises(ConfigError, match=says):
        ranks(n, prepared, words, build, options)


def test_a_strategy_without_a_plan_says_how_to_give_one(ranks: Any) -> None:
    with pytest.raises(ConfigError, match=r"strategy='parallel' needs a plan.*strategy='fsdp\+tp:2'"):
        ranks(1, prepared, "parallel", Llama, {})


def test_every_parameter_is_cut_by_fsdp_also_where_that_is_one_rank(ranks: Any) -> None:
    """One way of data parallel beside all axes: norms, state and checkpoints are those of fsdp."""

    def kinds() -> set[tuple[str, ...]]:
        world = World.start("cpu", need_group=True)
        strategy = make_strategy("tp:2")
        strategy.start(world)
        model = Llama(layers=2)
        strategy.prepare({"model": model}, lambda: [torch.optim.SGD(model.parameters(), lr=0.1)])
        found = {tuple(p.device_mesh.mesh_dim_names or ()) for p in model.parameters() if isinstance(p, DTensor)}
        assert all(isinstance(p, DTensor) for p in model.parameters())
        world.stop()
        return found

    (found, _) = ranks(2, kinds)
    assert {names[-1] for names in found} == {"tp", "dp_shard"}
    assert all(names[0] == "dp_shard" for names in found)
