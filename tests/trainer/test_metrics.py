"""What `self.log` reports is the number that a hand would compute, on any number of ranks, and logging costs next to nothing."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain.strategies.errors import ConfigError, DataError
from drivetrain.strategies.world import World
from drivetrain.trainer.metrics import Metrics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def alone() -> Metrics:
    return Metrics(World.single(), stage="train")


def calls(fn: Callable[[], object]) -> int:
    """Python and C calls of `fn()`, that of fn itself not counted, nor the profiler's own end."""
    counted: list[str] = []
    gc.disable()
    sys.setprofile(lambda frame, event, arg: counted.append(event) if event in ("call", "c_call") else None)
    fn()
    sys.setprofile(None)
    gc.enable()
    return len(counted) - 2


class Reads(TorchDispatchMode):
    """Counts host reads of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "local_scalar_dense" in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


# -- means ----------------------------------------------------------------------------------------------------------------
def test_the_epoch_mean_is_weighted_by_the_real_samples_of_each_batch() -> None:
    metrics = alone()
    for value, samples in ((2.0, 8), (4.0, 8), (10.0, 2)):
        metrics.batch_samples = samples
        metrics.log("loss", torch.tensor(value, requires_grad=True), on_step=False, on_epoch=True)
    assert metrics.flush_epoch() == {"loss": (2 * 8 + 4 * 8 + 10 * 2) / 18}
    assert metrics.flush_epoch() == {}


def test_a_step_reports_the_mean_over_its_own_window_of_micro_batches() -> None:
    metrics = alone()
    for step, micro in enumerate(([(1.0, 4), (3.0, 4)], [(5.0, 4), (8.0, 2)])):
        metrics.window = step
        for value, samples in micro:
            metrics.batch_samples = samples
            metrics.log("loss", torch.tensor(value), on_step=True, on_epoch=True)
    assert metrics.flush_step() == {"loss_step": pytest.approx((5 * 4 + 8 * 2) / 6, rel=1e-15)}
    assert metrics.flush_step() == {}  # nothing was logged since
    assert metrics.flush_epoch() == {"loss_epoch": pytest.approx((4 + 12 + 20 + 16) / 14, rel=1e-15)}


def test_the_weight_given_replaces_the_number_of_samples() -> None:
    metrics = alone()
    metrics.batch_samples = 4
    for tokens, loss in ((100, 2.0), (300, 4.0)):
        metrics.log("a", torch.tensor(loss), on_step=False, on_epoch=True, weight=tokens)
        metrics.log("b", torch.tensor(loss), on_step=False, on_epoch=True, weight=torch.tensor(tokens))
        metrics.log("c", loss, on_step=False, on_epoch=True, weight=tokens)
        metrics.log("d", loss, on_step=True, on_epoch=True, weight=torch.tensor([tokens]))
    assert metrics.flush_step() == {"d_step": 3.5}
    assert metrics.flush_epoch() == {"a": 3.5, "b": 3.5, "c": 3.5, "d_epoch": 3.5}


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0)])
def test_a_value_of_weight_zero_counts_for_nothing_even_when_it_is_nan(weight: float) -> None:
    metrics = alone()
    metrics.log("loss", torch.tensor(3.0), on_step=True, on_epoch=True, weight=2)
    metrics.log("loss", torch.tensor(math.nan), on_step=True, on_epoch=True, weight=weight)
    assert metrics.flush_step() == {"loss_step": 3.0}
    assert metrics.flush_epoch() == {"loss_epoch": 3.0}


def test_a_name_that_is_only_logged_with_weight_zero_is_not_reported() -> None:
    metrics = alone()
    metrics.log("loss", torch.tensor(1.0), on_step=False, on_epoch=True, weight=0)
    metrics.log("other", 1.0, on_step=False, on_epoch=True, weight=torch.tensor(0.0))
    assert metrics.flush_epoch() == {}


def test_numbers_and_tensors_of_one_name_are_one_mean() -> None:
    metrics = alone()
    for value in (1, torch.tensor(2.0), 3.5, torch.tensor([4.0]), torch.tensor(5), torch.tensor(True), True):
        metrics.log("x", value, on_step=True, on_epoch=True)
    assert metrics.flush_step() == {"x_step": pytest.approx(17.5 / 7)}
    assert metrics.flush_epoch() == {"x_epoch": pytest.approx(17.5 / 7)}


def test_half_precision_values_are_added_up_in_float64() -> None:
    metrics = alone()
    for _ in range(1000):
        metrics.log("x", torch.tensor(1.0, dtype=torch.bfloat16), on_step=False, on_epoch=True, weight=3)
    metrics.log("x", torch.tensor(2.0, dtype=torch.float16), on_step=False, on_epoch=True, weight=3)
    assert metrics.flush_epoch()["x"] == pytest.approx(1002 / 1001, rel=1e-14)


def test_a_single_value_comes_back_bit_for_bit() -> None:
    metrics = alone()
    metrics.batch_samples = 7
    value = torch.rand(())
    metrics.log("x", value, on_step=True, on_epoch=False)
    assert metrics.flush_step() == {"x": value.item()}


@pytest.mark.parametrize(("reduce", "expected"), [("sum", 3.0), ("max", 7.0), ("min", -5.0), ("mean", 0.6)])
def test_reductions(reduce: Any, expected: float) -> None:
    metrics = alone()
    for value in (1.0, torch.tensor(-5.0), 7, torch.tensor(2), torch.tensor(-2.0)):
        metrics.log("x", value, on_step=True, on_epoch=True, reduce=reduce)
    assert metrics.flush_step() == {"x_step": pytest.approx(expected)}
    assert metrics.flush_epoch() == {"x_epoch": pytest.approx(expected)}


@pytest.mark.parametrize("reduce", ["sum", "max", "min", "mean"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_nan_is_never_hidden(reduce: Any, first: bool, kind: Any) -> None:
    metrics = alone()
    for value in (math.nan, 1.0) if first else (1.0, math.nan):
        metrics.log("x", kind(value), on_step=False, on_epoch=True, reduce=reduce)
    assert math.isnan(metrics.flush_epoch()["x"])


def test_a_tensor_changed_in_place_after_the_log_is_reported_as_it_was() -> None:
    metrics = alone()
    loss = torch.tensor(8.0)
    for _ in range(2):
        metrics.log("loss", loss, on_step=True, on_epoch=True)
    loss /= 4
    assert metrics.flush_step() == {"loss_step": 8.0}
    assert metrics.flush_epoch() == {"loss_epoch": 8.0}


def test_a_name_may_be_logged_in_inference_mode_first_and_outside_it_later() -> None:
    metrics = alone()
    with torch.inference_mode():
        for value in (1.0, 2.0):
            metrics.log("x", torch.tensor(value), on_step=True, on_epoch=True, weight=torch.tensor(1))
            metrics.log("y", torch.tensor(value), on_step=True, on_epoch=True)
    for name in ("x", "y"):
        metrics.log(name, torch.tensor(6.0, requires_grad=True), on_step=True, on_epoch=True, weight=1)
    assert metrics.flush_epoch() == {"x_epoch": 3.0, "y_epoch": 3.0}


# -- what it costs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("on_step", "on_epoch"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_logging_a_tensor_costs_at_most_six_calls(on_step: bool, on_epoch: bool, accumulate: int) -> None:
    metrics = alone()
    value = torch.tensor(1.0, requires_grad=True) * 2
    counts = []
    for i in range(20):
        metrics.window, metrics.batch_samples = i // accumulate, 8 + i % 3
        counts.append(calls(lambda: metrics.log("x", value, on_step=on_step, on_epoch=on_epoch, prog_bar=True)))
    assert max(counts[1:]) <= 4  # log, detach, and add_ or copy_ for the step and for the epoch


@pytest.mark.parametrize(
    ("value", "options", "most"),
    [
        (torch.tensor(2.0), {"reduce": "sum"}, 4),
        (torch.tensor(2.0), {"weight": 3}, 4),
        (torch.tensor(2.0), {"reduce": "max"}, 13),
        (1.5, {"reduce": "mean"}, 8),
        (1.5, {"reduce": "sum"}, 8),
        (torch.tensor(2.0), {"weight": torch.tensor(100)}, 18),
    ],
)
def test_logging_anything_else_stays_cheap(value: Any, options: dict[str, Any], most: int) -> None:
    metrics = alone()
    counts = []
    for i in range(10):
        metrics.window = i // 3
        counts.append(calls(lambda: metrics.log("x", value, on_step=True, on_epoch=True, **options)))
    assert max(counts[1:]) <= most


def test_logging_reads_no_tensor_and_keeps_none_alive() -> None:
    metrics = alone()
    value = torch.ones(())
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), Tensor)}
    with Reads() as reads:
        for i in range(50):
            metrics.window = i
            value = torch.ones(1000, requires_grad=True).sum()
            metrics.log("a", value, on_step=True, on_epoch=True)
            metrics.log("b", value, on_step=True, on_epoch=True, reduce="max")
            metrics.log("c", value, on_step=True, on_epoch=True, weight=torch.tensor(2))
    assert reads.count == 0
    del value
    gc.collect()
    alive = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.requires_grad and id(x) not in before]
    assert alive == []


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    metrics = alone()

    def tensors(steps: int) -> int:
        for i in range(steps):
            metrics.window += i
            metrics.log("a", torch.ones(()), on_step=True, on_epoch=True)
            metrics.log("b", 1.0, on_step=True, on_epoch=True)
            metrics.log("c", torch.ones(()), on_step=True, on_epoch=True, weight=torch.tensor(1))
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    assert tensors(5) == tensors(500)


# -- wrong use ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3), "shape (3,)"),
        (torch.ones(0), "shape (0,)"),
        (torch.tensor(1j), "complex"),
        ("1.0", "str"),
        (None, "NoneType"),
        ([1.0], "list"),
        ({"a": 1.0}, "log_dict"),
        (1j, "complex"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_a_value_that_is_not_a_number_is_refused_by_name(value: Any, words: str, known: bool) -> None:
    metrics = alone()
    if known:
        metrics.log("my_loss", torch.tensor(1.0), on_step=True, on_epoch=True)
    with pytest.raises(DataError, match="'my_loss'") as error:
        metrics.log("my_loss", value, on_step=True, on_epoch=True)
    assert words in str(error.value)
    if known:
        assert metrics.flush_step() == {"my_loss_step": 1.0}


def test_numpy_numbers_are_numbers() -> None:
    import numpy as np

    metrics = alone()
    for value in (np.float32(1.5), np.float64(2.5), np.int64(2), np.array(2.0), np.array([2.0])[0]):
        metrics.log("x", value, on_step=False, on_epoch=True)
    assert metrics.flush_epoch() == {"x": 2.0}
    with pytest.raises(DataError, match="'y'"):
        metrics.log("y", np.ones(3), on_step=False, on_epoch=True)


def test_a_name_keeps_its_options() -> None:
    metrics = alone()
    metrics.log("loss", 1.0, on_step=True, on_epoch=False)
    for changed in (
        {"on_epoch": True},
        {"prog_bar": True},
        {"reduce": "sum"},
        {"sync": False},
        {"on_step": False, "on_epoch": True},
    ):
        options: dict[str, Any] = {"on_step": True, "on_epoch": False} | changed
        with pytest.raises(ConfigError, match=rf"log\('loss'\) got .*{next(iter(changed))}="):
            metrics.log("loss", 1.0, **options)


def test_options_that_make_no_sense_are_refused() -> None:
    metrics = alone()
    with pytest.raises(ConfigError, match=r"never be reported.*on_step=True"):
        metrics.log("x", 1.0, on_step=False, on_epoch=False)
    with pytest.raises(ConfigError, match="Did you mean 'mean'"):
        metrics.log("x", 1.0, on_step=True, on_epoch=False, reduce="maen")  # pyright: ignore[reportArgumentType]
    for name in ("", None, 3, ["x"]):
        with pytest.raises(ConfigError, match="name"):
            metrics.log(name, 1.0, on_step=True, on_epoch=False)  # pyright: ignore[reportArgumentType]
    for reduce in ("sum", "max", "min"):
        with pytest.raises(ConfigError, match="only a mean has weights"):
            metrics.log(f"x{reduce}", 1.0, on_step=True, on_epoch=False, reduce=reduce, weight=2)
    wrong: list[Any] = [-1, math.nan, math.inf, "2", torch.ones(2)]
    for weight in wrong:
        with pytest.raises(DataError, match="'y'"):
            metrics.log("y", 1.0, on_step=True, on_epoch=False, weight=weight)


def test_two_names_that_would_be_reported_as_one_are_refused() -> None:
    metrics = alone()
    metrics.log("x", 1.0, on_step=True, on_epoch=True)
    with pytest.raises(ConfigError, match="both be reported as 'x_step'"):
        metrics.log("x_step", 1.0, on_step=True, on_epoch=False)


def test_the_progress_bar_names_are_those_reported() -> None:
    metrics = alone()
    metrics.log("a", 1.0, on_step=True, on_epoch=True, prog_bar=True)
    metrics.log("b", 1.0, on_step=True, on_epoch=False, prog_bar=True)
    metrics.log("c", 1.0, on_step=True, on_epoch=False)
    assert metrics.prog_bar_names == {"a_step", "a_epoch", "b"}


# -- state ----------------------------------------------------------------------------------------------------------------
def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint does: tensors beside JSON."""
    values = state["values"].clone()
    return json.loads(json.dumps({key: value for key, value in state.items() if key != "values"}, allow_nan=False)) | {
        "values": values
    }


def log_everything(metrics: Metrics, generator: torch.Generator, steps: range) -> None:
    for i in steps:
        metrics.window, metrics.batch_samples = i, 1 + i % 5
        value = torch.rand((), generator=generator)
        metrics.log("mean", value, on_step=True, on_epoch=True, prog_bar=True)
        metrics.log("number", value.item(), on_step=True, on_epoch=True)
        metrics.log("tokens", value, on_step=True, on_epoch=True, weight=torch.tensor(i + 0.3))
        metrics.log("sum", value, on_step=False, on_epoch=True, reduce="sum")
        metrics.log("max", value, on_step=True, on_epoch=True, reduce="max")
        metrics.log("min", value.item(), on_step=False, on_epoch=True, reduce="min")


def test_the_running_means_of_a_resumed_epoch_are_those_of_one_never_stopped_bit_for_bit() -> None:
    whole, before, after = alone(), alone(), alone()
    generator = torch.Generator().manual_seed(1)
    log_everything(whole, generator, range(20))
    generator.manual_seed(1)
    log_everything(before, generator, range(11))
    after.load_state_dict(through_json(before.state_dict()))
    assert after.flush_step() == before.flush_step()  # the log point that was still to come
    log_everything(after, generator, range(11, 20))
    assert after.flush_step() == whole.flush_step()
    assert after.flush_epoch() == whole.flush_epoch()
    assert after.prog_bar_names == whole.prog_bar_names


@pytest.mark.parametrize("size", [1, 2, 3])
def test_states_of_two_ranks_can_be_taken_by_any_number_of_ranks(on_ranks: Any, size: int) -> None:
    def first(world: World) -> Any:
        metrics = Metrics(world, stage="train")
        log_everything(metrics, torch.Generator().manual_seed(world.rank), range(3 + world.rank))
        if world.rank:
            metrics.log("late", 4.0, on_step=False, on_epoch=True)
        return metrics.state_dict(), metrics.flush_epoch()

    saved = on_ranks(2, first)
    states = [state for state, _ in saved]

    def second(world: World) -> dict[str, float]:
        metrics = Metrics(world, stage="train")
        metrics.load_states([through_json(state) for state in states])
        return metrics.flush_epoch()

    for found in on_ranks(size, second):
        assert found == (saved[0][1] if size == 2 else pytest.approx(saved[0][1], rel=1e-14))


# -- ranks ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_uneven_weights_report_what_one_process_would(on_ranks: Any, size: int) -> None:
    """Ten batches dealt out to the ranks in uneven shares; one rank's last batch is only padding."""
    batches = [(float(i * i % 7), 1 + i % 4) for i in range(10)]
    shares = [batches[rank::size] for rank in range(size)]

    def log_all(metrics: Metrics, share: list[tuple[float, int]], pad: bool) -> dict[str, float]:
        for value, samples in share:
            metrics.batch_samples = samples
            metrics.log("mean", torch.tensor(value), on_step=True, on_epoch=True)
            metrics.log("tokens", torch.tensor(value), on_step=True, on_epoch=True, weight=torch.tensor(3 * samples + 1))
            metrics.log("sum", value, on_step=True, on_epoch=True, reduce="sum")
            metrics.log("max", torch.tensor(value), on_step=True, on_epoch=True, reduce="max")
            metrics.log("min", value - 3, on_step=True, on_epoch=True, reduce="min")
        if pad:
            metrics.batch_samples = 0
            metrics.log("mean", torch.tensor(math.nan), on_step=True, on_epoch=True)
            metrics.log("sum", 1e9, on_step=True, on_epoch=True, reduce="sum")
            metrics.log("max", torch.tensor(1e9), on_step=True, on_epoch=True, reduce="max")
        return metrics.flush_step() | metrics.flush_epoch()

    expected = log_all(alone(), batches, pad=False)
    assert len(expected) == 10

    def one_rank(world: World) -> dict[str, float]:
        return log_all(Metrics(world, stage="train"), shares[world.rank], pad=world.is_last)

    found = on_ranks(size, one_rank)
    assert found == [pytest.approx(expected, rel=1e-15)] * size
    assert all(other == found[0] for other in found)


def test_a_flush_is_one_collective_for_any_names_in_any_order(on_ranks: Any) -> None:
    def one_rank(world: Any) -> Any:
        metrics = Metrics(world, stage="train")
        seen: list[str] = []
        plain, agree = world.all_reduce, world.gather_json
        world.all_reduce = lambda *a: seen.append("reduce") or plain(*a)
        world.gather_json = lambda value: seen.append("agree") or agree(value)
        counts, found = [], {}
        for step in range(4):
            metrics.window = step
            names = [f"m{i}" for i in range(30)]
            for name in names if world.rank == 0 else reversed(names):
                reduce: Any = ("mean", "sum", "max", "min")[int(name[1:]) % 4]
                metrics.log(name, torch.tensor(float(world.rank + step)), on_step=True, on_epoch=False, reduce=reduce)
            if world.rank == 1 and step >= 2:
                metrics.log("only_on_1", 5.0, on_step=True, on_epoch=False)
            if world.rank == 0 and step == 0:
                metrics.log("only_on_0", torch.tensor(6.0), on_step=True, on_epoch=False, prog_bar=True)
            found = metrics.flush_step()
            counts.append(list(seen))
            seen.clear()
        return counts, found, metrics.prog_bar_names

    for counts, found, prog_bar in on_ranks(2, one_rank):
        assert counts == [["agree", "reduce"], ["reduce"], ["reduce", "agree", "reduce"], ["reduce"]]
        assert len(found) == 31
        assert [found[f"m{i}"] for i in range(4)] == [3.5, 7.0, 4.0, 3.0]
        assert found["only_on_1"] == 5.0
        assert prog_bar == {"only_on_0"}


def test_a_rank_that_logged_nothing_takes_part(on_ranks: Any) -> None:
    def one_rank(world: World) -> Any:
        metrics = Metrics(world, stage="train")
        empty = metrics.flush_step()
        if world.rank == 1:
            metrics.log("x", torch.tensor(2.0), on_step=True, on_epoch=False)
        return empty, metrics.flush_step(), metrics.flush_epoch()

    assert on_ranks(2, one_rank) == [({}, {"x": 2.0}, {})] * 2


def test_a_metric_without_sync_is_each_rank_s_own(on_ranks: Any) -> None:
    def one_rank(world: World) -> Any:
        metrics = Metrics(world, stage="train")
        metrics.log("own", torch.tensor(float(world.rank)), on_step=True, on_epoch=False, sync=False)
        metrics.log("shared", torch.tensor(float(world.rank)), on_step=True, on_epoch=False)
        return metrics.flush_step()

    assert on_ranks(2, one_rank) == [{"own": 0.0, "shared": 0.5}, {"own": 1.0, "shared": 0.5}]


def test_ranks_that_log_a_name_with_other_options_are_all_told(on_ranks: Any) -> None:
    def one_rank(world: World) -> str:
        metrics = Metrics(world, stage="train")
        metrics.log("loss", 1.0, on_step=True, on_epoch=False, reduce="sum" if world.rank == 2 else "mean")
        with pytest.raises(ConfigError) as error:
            metrics.flush_step()
        return str(error.value)

    for message in on_ranks(3, one_rank):
        assert "'loss'" in message
        assert "reduce=" in message
