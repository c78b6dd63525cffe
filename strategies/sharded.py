"""Sharded: one model that fully_shard cut up, with what `fsdp.py` needs of it; the counterpart of replica.py.

    Sharded(name, model, ...)       which parameters are held whole
    cut_up(...)                     unit by unit: values, device, rank 0's values, fully_shard; never more than a unit is whole
    run_as_forward(method)          a step between torch's hooks around a forward
The module stays the user's own object under its own names; its class gains FSDPModule, its parameters become DTensors.
It stands on these names of torch that are not documented: `_non_persistent_buffers_set` of nn.Module; FSDPModule._get_fsdp_state,
FSDPState._fsdp_param_groups and _register_root_post_backward_final_callback,
FSDPParamGroup._sharded_state and fsdp_params, FSDPParam._unsharded_param and .sharded_param; tests/strategies/test_fsdp.py and
tests/trainer/test_several_models.py pin them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import gradients, materialize
from .composite import is_composite
from .errors import ConfigError, suggest
from .precision.forward import widened
from .replica import broadcast_buffers_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CUT_UP = ShardedState.SHARDED

__all__ = ["CUT_UP", "Shape", "Sharded", "check_model", "own_outputs", "persistent_buffers"]


class Shape(Protocol):
    """What cuts modules over other axes than "fsdp", module by module: parts.py has such."""

    def wants(self, path: str, module: nn.Module) -> bool:
        """Whether `cut` is to be called for this module; asked when all inside it is done."""
        ...

    def cut(self, path: str, module: nn.Module) -> None:
        """Give the module other parameters. Those it has are on the device, with rank 0's values."""
        ...

    def unit(self, path: str, module: nn.Module) -> None:
        """Called just before a unit is sharded."""
        ...


class Sharded:
    """A model in pieces.

    Attributes:
        units: the names of the modules in `modules`; the root, which is the last, has the empty name.
        whole: the parameters that every rank holds whole, by name.
        sends_buffers: whether buffers are rank 0's at each forward.
        depth: how many bound steps of it are running, one inside the other.
        around: given (method, step), returns what runs in the step's place, between torch's hooks and ours.
        syncing: whether a backward pass reduces gradients.
        warm: whether the memory that parameters are gathered into was made outside of inference mode.
    """

    def __init__(
        self, name: str, model: nn.Module, *, ignored: Iterable[Any], device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        if made := {key: type(p).__name__ for key, p in model.named_parameters() if is_composite(p)}:
            key = next(iter(made))
            raise ConfigError(
                f"{key} of model {name!r} is quantised ({made[key]}), which fsdp cannot cut into rows. Use strategy='ddp' or "
                "'single', a precision whose weights are plain, such as 'int8-ao', or quantise later."
            )
        self.name, self.model, self.device = name, model, device
        self.is_dry = device.type == "meta"  # a dry run: parameters stay without values
        self.group = None if self.is_dry else group  # of all ranks that hold pieces of it; None where this one is alone
        self.units: list[str] = []
        self.modules: list[FSDPModule] = []
        self.sends_buffers = False
        self.depth = 0
        self.syncing = True
        self.warm = False
        self._leaving: Any = None  # the hook behind a forward without gradients
        self.root_groups: list[Any] = []
        self._state: Any = None  # torch's, of the root
        self.around: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None
        self.whole = self._held_whole(ignored)

    @property
    def root(self) -> FSDPModule:
        return self.modules[-1]

    # -- building -----------------------------------------------------------------------------------------------------
    def _held_whole(self, ignored: Iterable[Any]) -> dict[str, nn.Parameter]:
        """Those ignored by the user, and those that have no dimension to cut."""
        own = dict(self.model.named_parameters())
        ids: set[int] = set()
        for given in ignored:
            if isinstance(given, nn.Module):
                ids.update(id(p) for p in given.parameters())
            elif isinstance(given, nn.Parameter):
                ids.add(id(given))
            else:
                found = [p for key, p in own.items() if key == given or key.startswith(f"{given}.")]
                if not found:
                    raise ConfigError(
                        f"ignored_parameters: model {self.name!r} has no parameter or module {given!r}."
                        f"{suggest(str(given), own)} Name one of its parameters, or leave it out."
                    )
                ids.update(map(id, found))
        return {key: p for key, p in own.items() if id(p) in ids or p.dim() == 0}

    def cut_up(
        self,
        units: Mapping[int, str],
        *,
        policy: Callable[[bool], MixedPrecisionPolicy],
        reshard: bool | int,
        synced: bool,
        mesh: Callable[[str, nn.Module], DeviceMesh],
        shape: Shape | None = None,
        **options: Any,
    ) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Cut the model up, module by module; return (old, new) of the parameters that took another's place.

        The old ones lose their memory, or a unit that is cut up would still take it all.

        Args:
            units: id(module) -> its name.
            policy: called with whether the module is the root.
            synced: start from rank 0's values.
            mesh: of a unit, called with its name and the module.
            shape: cuts modules over other axes before their unit is sharded, such as tp.
            options: of every call of fully_shard.
        """
        model = self.model
        group = self.group if synced else None
        replaced: list[tuple[nn.Parameter, nn.Parameter]] = []
        # By id of a parameter that `shape` made: it, and the one whose place it took. Held, so that no other gets their ids.
        first: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        done: set[int] = set()  # what fully_shard made

        def visit(name: str, module: nn.Module) -> None:
            if not self.is_dry and materialize.fill(model, name, module, self.device):  # which makes new parameters
                own = dict(model.named_parameters())
                self.whole = {key: own[key] for key in self.whole}

        def leave(name: str, module: nn.Module) -> None:
            if shape is not None and shape.wants(name, module):
                first.update((id(new), (new, old)) for old, new in self._shape(shape, name, module, group))
            root = module is model
            if not root and id(module) not in units:
                return
            whole = {id(p) for p in self.whole.values()}
            own = {k: p for k, p in module.named_parameters(remove_duplicate=False) if id(p) not in done}
            for parameter in {id(p): p for p in own.values() if not isinstance(p, DTensor)}.values():
                self._begin(parameter, group)
            if shape is not None:
                shape.unit(name, module)
            own_outputs(module)  # before torch's hook, which takes no views
            fully_shard(
                module,
                mp_policy=policy(root),
                # None: torch keeps the root gathered until the backward pass, which starts with it.
                reshard_after_forward=None if root else reshard,
                ignored_params=set(self.whole.values()) or None,
                mesh=mesh(name, module),
                **options,
            )
            new = dict(module.named_parameters(remove_duplicate=False))
            for key, old in own.items():
                if id(old) not in whole:
                    done.add(id(new[key]))
                    replaced.append((first[id(old)][1] if id(old) in first else old, new[key]))
                    if not isinstance(old, DTensor):
                        old.data = old.data.new_empty(0)
            for old in own.values():  # or what was cut over tp alone would live on, whole units of it
                first.pop(id(old), None)
            assert isinstance(module, FSDPModule)
            self.units.append("" if root else units[id(module)])
            self.modules.append(module)

        materialize.walk(model, visit, leave)
        self._state = self.root._get_fsdp_state()
        self.root_groups = self._state._fsdp_param_groups
        for buffer in () if self.is_dry else model.buffers():
            buffer.data = buffer.data.to(self.device)
        if group is not None:
            broadcast_buffers_(model, group)
        return replaced

    def _shape(
        self, shape: Shape, name: str, module: nn.Module, group: dist.ProcessGroup | None
    ) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Let `shape` cut the module; return (old, new) of its parameters, the old ones without their memory."""
        before = dict(module.named_parameters(remove_duplicate=False))
        for parameter in {id(p): p for p in before.values() if not isinstance(p, DTensor)}.values():
            self._begin(parameter, group)
        shape.cut(name, module)
        after = dict(module.named_parameters(remove_duplicate=False))
        pairs = [(old, after[key]) for key, old in before.items() if after[key] is not old]
        for old, _ in pairs:
            old.data = old.data.new_empty(0)
        return pairs

    def _begin(self, parameter: nn.Parameter, group: dist.ProcessGroup | None) -> None:
        """Move a parameter that is still whole to the device, its rows in order, with rank 0's values."""
        if self.is_dry:
            return
        held = parameter.data.to(self.device)
        parameter.data = held if held.is_contiguous() else held.contiguous()
        if group is not None:
            dist.broadcast(parameter.data, group=group, group_src=0)

    def prefetch(self, forward: int, backward: int) -> None:
        """Gather so many units ahead, said explicitly; 0 leaves it to torch."""
        units = self.modules[:-1]
        for i, unit in enumerate(units):
            if forward:
                unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + forward])
            if backward:
                unit.set_modules_to_backward_prefetch(units[max(0, i - backward) : i][::-1])

    def hook_forward(self, context: Any) -> None:
        """Let the model that is called bare do what a bound step does; `context` is what its forward runs in, or None."""
        model = self.model
        if context is not None:
            # Where the model is called bare, its gathered 16-bit parameters meet 32-bit inputs.
            model.forward = _inside(context, model.forward, self.device.type)
        model.register_forward_pre_hook(self._before_forward, prepend=True)  # before torch's, which gathers

    # -- running ------------------------------------------------------------------------------------------------------
    def run_as_forward(self, method: str) -> None:
        """Let `model.<method>` run as a forward, however it is called."""
        model = self.model
        if not callable(getattr(model, method, None)):
            raise ConfigError(
                f"{type(model).__name__.removeprefix('FSDP')} has no method {method!r} that could run as its forward. "
                "Name one that it has."
            )
        if isinstance(vars(model).get(method), _Step):
            return
        register_fsdp_forward_method(model, method)
        step = vars(model)[method]
        setattr(model, method, _Step(self._run, step if self.around is None else self.around(method, step)))

    def _run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step between torch's hooks. This frame is the only one of ours on the way to it."""
        if not self.depth:
            if self._leaving is not None and torch.is_grad_enabled():  # a bare forward without gradients failed
                self.forget()
            self._begin_step()
        self.depth += 1
        try:
            return step(*args, **kwargs)
        except Exception:
            if self.depth == 1:  # or the next step would find half of this one
                self.forget()
            raise
        finally:
            self.depth -= 1
            if not self.depth and self._leaving is None and not torch.is_grad_enabled():  # else it is in a bare forward
                self.root.reshard()

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            if self.sends_buffers and not self.depth:
                self.send_buffers()
        elif not self.depth:
            self._begin_step()
            self._stay()  # one that failed left it
            self._leaving = model.register_forward_hook(self._after_forward)

    def _begin_step(self) -> None:
        if torch.is_grad_enabled():
            if self.sends_buffers:
                self.send_buffers()
        elif not self.warm and torch.is_inference_mode_enabled():
            # torch keeps the memory that it gathers into. Made in inference mode, it could never be written outside of it, and
            # the first training step after an evaluation would fail.
            self.warm = True
            with torch.inference_mode(False), torch.no_grad():
                for module in self.modules:
                    module.unshard()
                    module.reshard()

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        # Without a backward pass nobody else would free the root's parameters, and what is written into them would be lost.
        self._stay()
        self.root.reshard()

    def _stay(self) -> None:
        """Take away the hook behind a forward without gradients."""
        if self._leaving is not None:
            self._leaving.remove()
            self._leaving = None

    def send_buffers(self) -> None:
        """Give rank 0's persistent buffers to all ranks. Collective."""
        if self.group is not None:
            with torch.no_grad():
                for buffer in persistent_buffers(self.model):
                    dist.broadcast(buffer, group=self.group, group_src=0)

    def reduce_behind(self, loss: Tensor) -> None:
        """Let the backward pass of `loss`, which is called inside of a step, end with the reduction of all gradients.

        torch queues that behind it in a hook of each unit's output. The root has given none yet while its step runs, and a loss
        that depends on its parameters only passes no unit.
        """

        def begin(grad: Tensor) -> None:
            self._state._register_root_post_backward_final_callback()

        loss.register_hook(begin)

    def follow_requires_grad(self) -> None:
        """Let parameters that are gathered right now require gradients as the pieces do: torch looks only when it gathers."""
        for module in self.modules:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    gathered = getattr(parameter, "_unsharded_param", None)
                    if gathered is not None:
                        gathered.requires_grad_(parameter.sharded_param.requires_grad)

    def set_sync(self, enabled: bool) -> None:
        if self.syncing is not enabled:
            self.root.set_requires_gradient_sync(enabled)
            self.syncing = enabled

    def average_whole(self, group: dist.ProcessGroup, count: int) -> None:
        """Make the gradients of the parameters that are held whole the mean over `group`. Collective: one all-reduce."""
        grads = gradients.gradients(self.whole.values())
        if not grads:
            return
        wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        flat = torch.cat([g.reshape(-1).to(wide) for g in grads])
        dist.all_reduce(flat, group=group)
        flat /= count
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view(grad.shape))

    def renew(self) -> None:
        """Free the root's parameters; inside of a step, gather them again: the step may go on to use them."""
        self.root.reshard()
        if self.depth:
            self.root.unshard()

    def forget(self) -> None:
        """Forget a step that was broken off, wherever it was. Before the first forward there is nothing to forget."""
        self._stay()
        if self._state._is_root is not None:
            self.root.reset_iter_state()

    def free(self) -> None:
        """Free whatever is gathered: a step may have been broken off."""
        for module in self.modules:
            module.reshard()


class _Step(functools.partial[Any]):
    """What stands on a module in the place of a step: a class of its own, to be known again."""


def check_model(name: str, model: nn.Module) -> None:
    """Refuse a model that cannot be cut up.

    Raises:
        ConfigError: a parameter without a shape, or one that is cut up already.
    """
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ConfigError(
                f"{key} of model {name!r} has no shape yet (a lazy module), so it cannot be cut up. Run one batch through the "
                "model before it is prepared."
            )
        if isinstance(tensor, DTensor):
            raise ConfigError(
                f"{key} of model {name!r} is cut up already, by another strategy or an earlier run. Build the model again, or "
                "prepare it once."
            )


def persistent_buffers(model: nn.Module) -> Iterable[Tensor]:
    """The buffers that are part of the state: what is not can be derived, and need not be sent."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _inside(context: Any, forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        outermost = not torch.is_autocast_enabled(device_type)
        with context:
            output = forward(*args, **kwargs)
        return widened(output) if outermost else output

    return run


class _Own(torch.autograd.Function):
    """The same memory, as a tensor that is no view. An nn.Linear and `to_local` return views, and where one is the output of a
    unit of fully_shard, an operation in place on it (`logits /= temperature`) would drop the hook that gathers the unit again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def own_outputs(module: nn.Module) -> None:
    """Let a unit return tensors that are no views. One whose first outputs are none is not looked at again."""

    def own(part: Tensor) -> Tensor:
        return _Own.apply(part) if part.requires_grad and part._is_view() and not isinstance(part, DTensor) else part

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        owned = tree_map_only(Tensor, own, output)  # in whatever transformers' models return
        if all(a is b for a, b in zip(tree_leaves(owned), tree_leaves(output), strict=True)):
            handle.remove()
        return owned

    handle = module.register_forward_hook(leave)
