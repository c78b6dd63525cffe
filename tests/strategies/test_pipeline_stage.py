"""One stage alone, against plain autograd; and the names of torch that it stands on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.pipelining.schedules as torchs
from drivetrain.strategies.errors import ConfigError
from drivetrain.strategies.pipeline_options import SCHEDULES
from drivetrain.strategies.pipeline_split import Link
from drivetrain.strategies.pipeline_stage import Stage, StageModule, _header, _read_header
from drivetrain.strategies.world import World
from torch import Tensor, nn
from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo

OVERRIDDEN = {
    *("_prepare_forward_infra", "_prepare_backward_infra", "_create_grad_recv_info", "_get_init_p2p_neighbors_ops"),
    *("get_fwd_recv_ops", "set_local_fwd_input", "_retrieve_recv_activations", "forward_one_chunk", "get_fwd_send_ops"),
    *("get_bwd_recv_ops", "set_local_bwd_input", "_retrieve_recv_grads", "backward_one_chunk", "backward_weight_one_chunk"),
    *("get_bwd_send_ops", "perform_reduce_grad"),
}
OWN = {"begin", "end", "forget", "_let_go", "_take", "_take_grads"}


# -- torch's names ----------------------------------------------------------------------------------------------------
def test_what_a_stage_overrides_is_what_torch_calls() -> None:
    """A method that torch renames would be ours alone, and never run; one with other arguments would fail in a step."""
    functions = {name for name, value in vars(Stage).items() if inspect.isfunction(value) and not name.startswith("__")}
    assert functions == OVERRIDDEN | OWN
    for name in OVERRIDDEN:
        theirs = inspect.signature(getattr(_PipelineStageBase, name)).parameters
        ours = inspect.signature(getattr(Stage, name)).parameters
        takes_any = {p.kind for p in ours.values()} >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        assert takes_any or list(ours) == list(theirs), name
    assert not OWN & set(dir(_PipelineStageBase))


def test_the_schedules_have_what_a_run_calls() -> None:
    assert list(inspect.signature(_RecvInfo).parameters)[:4] == ["input_name", "source", "buffer", "tensor_meta"]
    for kind in SCHEDULES.values():
        schedule = getattr(torchs, kind.torch_name)
        assert {"loss_fn", "scale_grads"} <= set(inspect.signature(schedule).parameters), kind.torch_name
        called = list(inspect.signature(schedule._step_microbatches).parameters)
        assert called[1:] == ["arg_mbs", "kwarg_mbs", "target_mbs", "losses", "return_outputs", "loss_kwargs"]
    assert "self._internal_losses.clear()" in inspect.getsource(torchs._PipelineSchedule)


# -- one stage, alone -------------------------------------------------------------------------------------------------
class Middle(nn.Module):
    """Takes two tensors and a whole number beside them, of which it does not use all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def run(self, x: Tensor, unused: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(torch.tanh(self.first(x))) * marks[:, None], marks


def made(model: nn.Module, links: list[Link], *, index: int, stages: int = 3) -> tuple[Stage, World]:
    world = World.start("cpu", need_group=True)
    group = world.group()
    assert group is not None
    module = StageModule(model, links, index=index, is_last=index == stages - 1)
    return Stage(module, index, stages, world.device, group, dict.fromkeys(range(stages), 0)), world


def inputs(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    x, unused = torch.randn(2, samples, 4, generator=generator, dtype=torch.float64)
    return x, unused, torch.arange(samples)


def middle_stage(full: bool) -> dict[str, Any]:
    """Two batches of two chunks of other sizes, forward and backward, in the order of a schedule with both in flight."""
    torch.manual_seed(0)
    model = Middle().double()
    stage, world = made(model, [Link(("first", "second"), model.run)], index=1)
    sent: list[tuple[Tensor | None, ...]] = []
    for sizes in ((3, 2), (2, 1)):
        stage.begin([(n,) for n in sizes], backward=True, sync=True)
        for i, n in enumerate(sizes):
            stage.set_local_fwd_input(inputs(n), i)
            output, _ = stage.forward_one_chunk(i, (), None)
            assert output.shape == (n, 3)
        for i, n in enumerate(sizes):
            stage.set_local_bwd_input((torch.full((n, 3), 0.5, dtype=torch.float64), None), i)
            stage.backward_one_chunk(i, full_backward=full)
            sent.append(stage.get_local_bwd_output(i))
        for i in range(0 if full else len(sizes)):
            stage.backward_weight_one_chunk(i)
        stage.end()
    world.stop()
    return {"sent": sent, "grads": {name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("full", [True, False], ids=["whole backward", "input and weight apart"])
def test_a_stage_alone_has_the_gradients_of_plain_autograd(full: bool, ranks: Any) -> None:
    """An input that is not used, or has no gradient, sends none; what is sent is the gradient of the chunk alone."""
    torch.manual_seed(0)
    model = Middle().double()
    (found,) = ranks(1, middle_stage, full)
    for n, (x_grad, unused, marks) in zip((3, 2, 2, 1), found["sent"], strict=True):
        x, *others = inputs(n)
        x.requires_grad_()
        (model.run(x, *others)[0] * 0.5).sum().backward()
        torch.testing.assert_close(x_grad, x.grad, rtol=1e-14, atol=1e-15)
        assert unused is None or not unused.any()
        assert marks is None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["grads"][name], parameter.grad, rtol=1e-13, atol=1e-14)


def last_stage() -> tuple[list[float], Tensor, Tensor]:
    linear = nn.Linear(4, 2)
    model = nn.Sequential(linear, nn.Tanh()).double()
    nn.init.constant_(linear.weight, 0.25)
    nn.init.zeros_(linear.bias)
    stage, world = made(model, [Link(("0",)), Link(("1",))], index=2)
    stage.begin([0], backward=True, sync=True)
    seen: list[float] = []

    def loss_of(output: Tensor, chunk: int) -> Tensor:
        seen.append(float(output.detach().sum()))
        return output.square().sum() * (chunk + 2)

    stage.loss_of = loss_of
    x = inputs(3)[0]
    stage.set_local_fwd_input((x,), 0)
    loss = stage.forward_one_chunk(0, (), None)
    stage.backward_one_chunk(0, loss=loss)
    (grad,) = stage.get_local_bwd_output(0)
    stage.end()
    assert stage.module.finish is None
    world.stop()
    assert grad is not None
    assert linear.weight.grad is not None
    return seen, grad, linear.weight.grad


def test_the_last_stage_makes_the_loss_of_a_chunk_once(ranks: Any) -> None:
    ((seen, grad, weight_grad),) = ranks(1, last_stage)
    x = inputs(3)[0].requires_grad_()
    weight = torch.full((2, 4), 0.25, dtype=torch.float64, requires_grad=True)
    output = torch.tanh(x @ weight.T)
    (output.square().sum() * 2).backward()
    assert seen == [pytest.approx(float(output.detach().sum()), rel=1e-14)]
    torch.testing.assert_close(grad, x.grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(weight_grad, weight.grad, rtol=1e-13, atol=1e-15)


# -- what it hands on -------------------------------------------------------------------------------------------------
def test_outputs_are_no_views_where_gradients_are_taken() -> None:
    """fully_shard warns of a view, whose hook an operation in place would drop."""
    stage = StageModule(nn.Sequential(nn.Flatten()), [Link(("0",))], index=0, is_last=False)
    x = torch.ones(2, 3, 4, requires_grad=True)
    assert not stage(x)._is_view()
    with torch.no_grad():
        assert stage(x)._is_view()


def test_a_header_tells_any_shapes() -> None:
    shapes = [(torch.float32, (2, 3)), (torch.bfloat16, ()), (torch.int64, (7,)), (torch.bool, (1, 0, 5)), (torch.float64, (9,))]
    assert _read_header(_header(shapes)) == shapes
    assert len(_header([])) == len(_header(shapes))
    with pytest.raises(ConfigError, match="too many"):
        _header([(torch.float32, (1, 2, 3))] * 40)


def hands_on(function: Callable[[Tensor], Any]) -> str:
    model = nn.Sequential(nn.Linear(4, 4))
    stage, world = made(model, [Link(("0",), function)], index=0)
    stage.begin([0], backward=True, sync=True)
    try:
        stage.forward_one_chunk(0, (torch.ones(1, 4),), None)
    except (ConfigError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        world.stop()
    return ""


def test_what_cannot_go_to_the_next_stage_is_refused_by_name(ranks: Any) -> None:
    assert "stage 0 holds a dict, and only tensors go" in ranks(1, hands_on, lambda x: {"x": x})[0]
    assert "stage 0 holds a NoneType" in ranks(1, hands_on, lambda x: (x, None))[0]


def test_an_error_in_the_model_is_told_as_it_is(ranks: Any) -> None:
    """torch's stage would wrap it in a RuntimeError with the shapes."""
    assert ranks(1, hands_on, lambda x: 1 / 0) == ["ZeroDivisionError: division by zero"]
