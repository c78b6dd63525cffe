"""Windows: what each micro-batch's loss is multiplied by, and what remains for the gradients; and when optimizers act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from drivetrain import Accelerator
from drivetrain.strategies.errors import DataError
from drivetrain.strategies.world import World
from drivetrain.trainer.accumulation import Window
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Batches:
    """What a window asks of a loader."""

    num_samples: int
    global_samples: int
    is_last: bool = False
    remaining: int | None = None
    batch_samples: int | None = 4


def run(window: Window, *batches: Batches, world: World | None = None) -> tuple[list[float], Any]:
    """Open a window over `batches`; return the scales, and the factor that is left at its end."""
    scales = []
    for batch in batches:
        window.begin(batch)  # pyright: ignore[reportArgumentType]
        scales.append(window.scale)
    assert window.sync
    return scales, window.settle(world or World.single()) if window.uneven else None


def test_a_full_window_divides_by_its_size() -> None:
    assert run(Window(2), Batches(4, 4, remaining=20), Batches(4, 4, remaining=16)) == ([0.5, 0.5], None)


def test_a_window_cut_short_weighs_by_samples_known_ahead() -> None:
    """6 samples are left for a window of 12: the first micro-batch holds 4 of them, the second 2."""
    assert run(Window(3), Batches(4, 4, remaining=6), Batches(2, 2, True, remaining=2)) == ([4 / 6, 2 / 6], None)


def test_a_window_cut_short_unexpectedly_is_corrected_at_its_end() -> None:
    """The length of an iterable is not known: micro-losses weigh n/12, and the gradient is multiplied by 12/6."""
    scales, factor = run(Window(3), Batches(4, 4), Batches(2, 2, True))
    assert scales == [1 / 3, 2 / 12]
    assert factor == 2.0


def test_ranks_weigh_by_what_they_hold() -> None:
    """Three samples on two ranks, 2 and 1: the mean over ranks of n*W/N times their means is the mean of all three."""
    first, second = Window(1, ranks=2), Window(1, ranks=2)
    (scale,), _ = run(first, Batches(2, 3, True, remaining=3))
    (other,), _ = run(second, Batches(1, 3, True, remaining=3))
    assert (scale, other) == (2 * 2 / 3, 1 * 2 / 3)
    (padded,), _ = run(Window(1, ranks=2), Batches(0, 1, True, remaining=1))
    assert padded == 0.0


def test_without_counts_a_short_window_is_the_mean_of_its_micro_batches() -> None:
    scales, factor = run(Window(4), Batches(1, 1, batch_samples=None), Batches(1, 1, True, batch_samples=None))
    assert scales == [0.25, 0.25]
    assert factor == 2.0


def test_a_loop_left_in_its_last_window_goes_on_in_the_next_epoch_with_the_mean_of_what_it_held() -> None:
    """`break` with 6 samples left: the open window of 3 takes two batches of the next epoch. 12 samples count, each once."""
    window = Window(3)
    window.begin(Batches(4, 4, remaining=6))  # pyright: ignore[reportArgumentType]
    first = window.scale
    scales, factor = run(window, Batches(4, 4, remaining=20), Batches(4, 4, remaining=16))
    assert [scale * factor for scale in (first, *scales)] == pytest.approx([1 / 3] * 3)


def test_the_next_window_knows_nothing_of_the_one_before() -> None:
    window = Window(3)
    run(window, Batches(4, 4, remaining=6), Batches(2, 2, True, remaining=2))
    assert run(window, *[Batches(4, 4, remaining=20 - 4 * i) for i in range(3)]) == ([1 / 3] * 3, None)
    window.begin(None)
    window.close()
    assert run(window, *[Batches(4, 4, remaining=20 - 4 * i) for i in range(3)]) == ([1 / 3] * 3, None)


def test_sums_and_means_in_one_window_are_refused() -> None:
    window, world, loss = Window(2), World.single(), torch.ones(())
    window.begin(None)
    window.weigh_sum(loss, 3, world)
    window.begin(None)
    window.kind = 1
    with pytest.raises(DataError, match="both a loss that is a mean and one that is a sum"):
        window.weigh_sum(loss, 3, world)


@pytest.mark.parametrize("counts", [(3, 5), (0, 5), (1, 1000), (7, 0)])
def test_sums_are_divided_by_all_their_items(counts: tuple[int, int]) -> None:
    """What the weighted losses add up to, times the factor, is the sum over both divided by the number of items."""
    window, world = Window(2), World.single()
    total = torch.zeros((), dtype=torch.float64)
    for count in counts:
        window.begin(None)
        total += window.weigh_sum(torch.tensor(2.0 * count, dtype=torch.float64), count, world)
    factor = window.settle(world)
    assert isinstance(factor, float)
    assert total.item() * factor == pytest.approx(2.0, rel=1e-15)


def test_a_window_without_items_says_so() -> None:
    window, world = Window(1), World.single()
    window.begin(None)
    window.weigh_sum(torch.zeros(()), 0, world)
    assert window.settle(world) == 0.0


# -- through the Accelerator -------------------------------------------------------------------------------------------
def weight_only() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def gradients(accelerator: Accelerator, batches: Any, *, clear: str = "end") -> list[float]:
    """The weight's gradient at every optimizer step, for losses whose gradient is the mean of the inputs."""
    bare: Any = weight_only()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.0)
    model, optimizer, batches = accelerator.prepare(bare, optimizer, batches)
    found: list[float] = []
    for batch in batches:
        with accelerator.accumulate(model):
            if clear == "start":
                optimizer.zero_grad()
            accelerator.backward(model(batch[0]).mean())
            optimizer.step()
            if optimizer.stepped:
                found.append(bare.weight.grad.item())
            if clear == "end":
                optimizer.zero_grad()
    return found


def ones(*values: float, batch: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.tensor(values, dtype=torch.float64).reshape(-1, 1)), batch_size=batch)


def test_a_last_window_that_is_shorter_has_the_gradient_of_what_it_held() -> None:
    """Accelerate 1.15 gives [1.0, 0.5] here: unit gradients, 3 micro-batches in windows of 2."""
    assert gradients(Accelerator(gradient_accumulation_steps=2), ones(1, 1, 1)) == [1.0, 1.0]


@pytest.mark.parametrize("clear", ["start", "end"])
def test_zero_grad_at_the_start_of_the_block_is_as_good_as_at_its_end(clear: str) -> None:
    """2, 4 and 6 in windows of two: (2+4)/2 and 6."""
    assert gradients(Accelerator(gradient_accumulation_steps=2), ones(2, 4, 6), clear=clear) == [3.0, 6.0]


def test_a_list_of_batches_and_an_iterable_are_accumulated_too() -> None:
    batches = [(torch.full((1, 1), v, dtype=torch.float64),) for v in (2.0, 4.0, 6.0)]
    assert gradients(Accelerator(gradient_accumulation_steps=2), batches) == [3.0, 6.0]
    assert gradients(Accelerator(gradient_accumulation_steps=5), batches) == pytest.approx([4.0], rel=1e-15)


def test_batches_of_different_sizes_weigh_by_their_samples() -> None:
    """A batch sampler of its own gives 1, 3 and 2 samples in windows of two: the mean over samples, not over batches."""
    data = TensorDataset(torch.tensor([[4.0], [1.0], [1.0], [1.0], [3.0], [5.0]], dtype=torch.float64))
    batches = DataLoader(data, batch_sampler=[[0], [1, 2, 3], [4, 5]])
    assert gradients(Accelerator(gradient_accumulation_steps=2), batches) == pytest.approx([7 / 4, 4.0], rel=1e-15)


def test_a_second_accelerator_does_not_change_the_first() -> None:
    """Accelerate 1.15: the second resets the first one's accumulation."""
    first = Accelerator(gradient_accumulation_steps=4)
    second = Accelerator(gradient_accumulation_steps=8)
    assert (first.gradient_accumulation_steps, second.gradient_accumulation_steps) == (4, 8)
    assert gradients(second, ones(*[1.0] * 8)) == [1.0]
    assert gradients(first, ones(*[1.0] * 8)) == [1.0, 1.0]


def test_a_break_on_the_last_batch_leaves_nothing_behind() -> None:
    """Accelerate 1.15 then steps on every micro-batch of what follows."""
    accelerator = Accelerator(gradient_accumulation_steps=4)
    batches = accelerator.prepare(ones(1, 2, 3, 4))
    for _ in batches:
        with accelerator.accumulate():
            pass
        if batches.is_last:
            break
    assert accelerator.active_loader is None
    synced = []
    for _ in range(8):
        with accelerator.accumulate():
            synced.append(accelerator.sync_gradients)
    assert synced == [False, False, False, True] * 2


def test_a_loader_inside_the_loop_does_not_hide_the_end_of_the_outer_one() -> None:
    """A validation in the middle of an epoch: the training loader is active again afterwards, and its last window is seen."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    outer, inner = accelerator.prepare(ones(1, 2, 3), ones(1, 2))
    synced = []
    for i, _ in enumerate(outer):
        with accelerator.accumulate():
            synced.append(accelerator.sync_gradients)
        if i == 1:
            for _ in inner:
                assert accelerator.active_loader is inner
            for _ in inner:
                break
        assert accelerator.active_loader is outer
    assert synced == [False, True, True]
    assert accelerator.active_loader is None


def test_changing_the_steps_takes_effect_with_the_next_window() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    synced = []
    for i in range(7):
        if i == 3:
            accelerator.gradient_accumulation_steps = 3
        with accelerator.accumulate():
            synced.append(accelerator.sync_gradients)
    assert synced == [False, True, False, True, False, False, True]


def test_without_accumulate_every_backward_counts_and_the_caller_steps() -> None:
    """The commonest raw loop; with gradient_accumulation_steps the loss is divided, as Accelerate does."""
    for steps, expected in ((1, [2.0, 4.0, 6.0]), (2, [3.0])):
        accelerator = Accelerator(gradient_accumulation_steps=steps)
        model = weight_only()
        model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), ones(2, 4, 6))
        found = []
        for i, batch in enumerate(batches):
            accelerator.backward(model(batch[0]).mean())
            if (i + 1) % steps == 0:
                optimizer.step()
                assert optimizer.stepped
                found.append(model.weight.grad.item())
                optimizer.zero_grad()
        assert found == expected


def test_clipping_within_a_window_does_nothing_and_at_its_end_clips_the_whole() -> None:
    """Clip to 1: the partial gradient of the first micro-batch is left alone, the window's (10+20)/2 is clipped."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = weight_only()
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), ones(10, 20, 7))
    norms: list[Tensor | None] = []
    clipped = []
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch[0]).mean())
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            if accelerator.sync_gradients:
                clipped.append(model.weight.grad.item())
            optimizer.step()
            optimizer.zero_grad()
    assert norms[0] is None
    assert [n.item() for n in norms[1:] if n is not None] == pytest.approx([15.0, 7.0], rel=1e-15)
    assert clipped == pytest.approx([1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16-mixed"])
def test_clipping_one_models_gradients_leaves_the_others_for_their_own_backward(precision: str) -> None:
    """Two models that step in turn inside one window: the second's gradients come after the first was clipped and stepped."""
    accelerator = Accelerator(gradient_accumulation_steps=2, precision=precision)
    one, two = weight_only(), weight_only()
    made = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (one, two)]
    one, two, first, second, batches = accelerator.prepare(one, two, *made, ones(2, 4, 6))
    found = []
    for batch in batches:
        with accelerator.accumulate(one, two):
            for model, optimizer in ((one, first), (two, second)):
                accelerator.backward(model(batch[0]).mean())
                accelerator.clip_grad_norm_(model.parameters(), 100.0)
                if accelerator.sync_gradients and model is two:
                    found.append(model.weight.grad.item())
                optimizer.step()
                optimizer.zero_grad()
    assert found == pytest.approx([3.0, 6.0], rel=1e-6)


def test_two_sums_in_one_micro_batch_are_refused() -> None:
    """Their counts would be added up, and neither loss be divided by its own."""
    accelerator = Accelerator()
    model = accelerator.prepare(weight_only())
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(2, 1, dtype=torch.float64)).sum(), num_items=2)
        with pytest.raises(DataError, match="two losses with num_items"):
            accelerator.backward(model(torch.ones(3, 1, dtype=torch.float64)).sum(), num_items=3)
