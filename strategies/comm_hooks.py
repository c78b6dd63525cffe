"""How DDP sends gradients: compressed to 16 bits, by PowerSGD, or as a function of the user's says.

    "fp16" | "bf16"                     each bucket is cast, divided by the number of ranks, summed, and cast back
    "power_sgd" | "batched_power_sgd"   each bucket becomes two thin matrices; what is lost is added to the next gradient
    a function                          torch's communication hook: fn(state, bucket) -> Future[Tensor]
    wrapper "fp16" | "bf16"             the bucket is cast before any of these, and cast back after

torch's own bf16 hook refuses gloo, by its name; gloo sums bf16 well, so ours is used everywhere. torch 2.13's batched PowerSGD
fails an assertion at the first bucket that it compresses, so that is ours too. PowerSGD's error feedback and its matrices are
state of the run: they are saved and loaded, so that a resumed run goes on exactly.
Source: torch.distributed.algorithms.ddp_comm_hooks; Vogels et al. 2019, arXiv:1905.13727 (PowerSGD).
"""

# No `from __future__ import annotations` here: torch compares a hook's annotations with classes, not with strings.

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint.layout import Shard
from .errors import CheckpointError, ConfigError, MissingDependency, unknown_name

__all__ = ["HOOK_NAMES", "CommHook", "load_state", "make_hook", "state_of"]

HOOK_NAMES = ("fp16", "bf16", "power_sgd", "batched_power_sgd")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

type_of_hook = Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]


@dataclass(frozen=True)
class CommHook:
    """A hook and its state, ready for `register_comm_hook`; `name` is for the start-up lines."""

    name: str
    hook: type_of_hook
    state: Any


def make_hook(
    hook: str | type_of_hook,
    group: dist.ProcessGroup,
    *,
    wrapper: str | Callable[[type_of_hook], type_of_hook] | None = None,
    options: Mapping[str, Any] | None = None,
    state: Any = None,
) -> CommHook:
    """Return the hook that a name or a function stands for.

    Args:
        options: PowerSGD's own: matrix_approximation_rank, start_powerSGD_iter, ... (Accelerate's comm_state_option).
        state: the first argument of a function; the named hooks make their own.
    Raises:
        UnknownName: no such hook, wrapper or option.
        MissingDependency: PowerSGD draws its random matrices with numpy.
    """
    name = hook if isinstance(hook, str) else getattr(hook, "__qualname__", type(hook).__name__)
    if isinstance(hook, str):
        if hook not in HOOK_NAMES:
            raise unknown_name("communication hook", hook, HOOK_NAMES)
        if state is not None:
            raise ConfigError(f"comm_hook={hook!r} makes its own state, but comm_state was given. Use comm_options instead.")
        if hook in _DTYPES:
            if options:
                raise ConfigError(f"comm_hook={hook!r} has no options, got {sorted(options)}. Leave comm_options out.")
            hook, state = compressing(_DTYPES[hook], group), None
        else:
            hook, state = _power_sgd(hook, group, dict(options or {}))
    elif options:
        raise ConfigError(f"comm_options are PowerSGD's and comm_hook is the function {name}. Give it comm_state=... instead.")
    if isinstance(wrapper, str):
        if wrapper not in _DTYPES:
            raise unknown_name("communication wrapper", wrapper, _DTYPES)
        name, hook = f"{name} in {wrapper}", casting(_DTYPES[wrapper], hook)
    elif wrapper is not None:
        name, hook = f"{name} in {getattr(wrapper, '__qualname__', wrapper)}", wrapper(hook)
    return CommHook(name, _annotated(hook, name), state)


def _annotated(hook: type_of_hook, name: str) -> type_of_hook:
    """Hand `hook` to torch with the annotations that it checks, whatever those of the user's function are."""

    def call(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return hook(state, bucket)

    call.__qualname__ = name
    return call


def compressing(dtype: torch.dtype, group: dist.ProcessGroup) -> type_of_hook:
    """Return a hook that averages buckets over `group` in `dtype`. Divided first: a sum of many ranks would overflow fp16."""
    size = group.size()

    def compress(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        small = buffer.to(dtype).div_(size)
        work = dist.all_reduce(small, group=group, async_op=True)
        assert work is not None

        def widen(future: torch.futures.Future[Any]) -> Tensor:
            return buffer.copy_(future.value()[0])

        return work.get_future().then(widen)

    return compress


def casting(dtype: torch.dtype, hook: type_of_hook) -> type_of_hook:
    """Return a hook that gives `hook` its bucket in `dtype`."""

    def cast(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        bucket.set_buffer(buffer.to(dtype))

        def widen(future: torch.futures.Future[Any]) -> Tensor:
            value = future.value()
            return buffer.copy_(value[0] if isinstance(value, list | tuple) else value)

        return hook(state, bucket).then(widen)

    return cast


def _power_sgd(name: str, group: dist.ProcessGroup, options: dict[str, Any]) -> tuple[type_of_hook, Any]:
    if importlib.util.find_spec("numpy") is None:
        raise MissingDependency(f"comm_hook={name!r} needs numpy, which its matrices are drawn with: pip install numpy.")
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd

    known = [n for n in power_sgd.PowerSGDState.__slots__ if n not in _POWER_SGD_STATE] + ["random_seed"]
    for option in options:
        if option not in known:
            raise unknown_name("option", option, known, where=f"of comm_hook={name!r}")
    # torch starts it at 1000 since it could not start before step 2; the buckets are rebuilt before the first step here,
    # but a gradient is best left alone at the start, so torch's default stays.
    try:
        state = power_sgd.PowerSGDState(process_group=group, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"comm_options={options} of comm_hook={name!r} were refused: {error}. Change them.") from error
    return (power_sgd.powerSGD_hook if name == "power_sgd" else batched_power_sgd), state


def batched_power_sgd(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average one bucket as one square matrix, by the product of two thin ones: M ~ P Q^T.

    Faster than matrix by matrix, and less exact. `state` is torch's PowerSGDState.
    """
    group, buffer, index = state.process_group, bucket.buffer(), bucket.index()
    size = group.size()
    if state.iter < state.start_powerSGD_iter:
        dist.all_reduce(buffer.div_(size), group=group)
        return _done(state, bucket, buffer)
    if state.use_error_feedback and index in state.error_dict:
        buffer.add_(state.error_dict[index])
    side = math.ceil(math.sqrt(buffer.numel()))
    matrix = torch.cat([buffer, buffer.new_zeros(side * side - buffer.numel())]).view(side, side)
    q = state.q_memory_dict.get(index)
    if q is None:
        generator = torch.Generator().manual_seed(int(state.rng.randint(1_000_000_000)))  # the same on all ranks
        q = torch.randn(side, min(side, state.matrix_approximation_rank), generator=generator).to(buffer)
    p = matrix @ _orthogonal(q)
    dist.all_reduce(p, group=group)
    p = _orthogonal(p)
    q = matrix.t() @ p
    dist.all_reduce(q.div_(size), group=group)
    average = (p @ q.t()).view(-1)[: buffer.numel()]
    if state.use_error_feedback:
        # What this rank's gradient has that the product has not is added to its next one.
        state.error_dict[index] = buffer - average
    if state.warm_start:
        state.q_memory_dict[index] = q
    return _done(state, bucket, buffer.copy_(average))


def _done(state: Any, bucket: dist.GradBucket, buffer: Tensor) -> torch.futures.Future[torch.Tensor]:
    state.maybe_increase_iter(bucket)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


def _orthogonal(matrix: Tensor) -> Tensor:
    """Orthonormal columns with the span of `matrix`; in fp32 at least, which QR wants."""
    return torch.linalg.qr(matrix.to(torch.promote_types(matrix.dtype, torch.float32))).Q.to(matrix.dtype)


_COUNTERS = ("iter", "total_numel_before_compression", "total_numel_after_compression", "next_stats_report")
_POWER_SGD_STATE = frozenset(("process_group", "rng", "error_dict", "p_memory_dict", "q_memory_dict", *_COUNTERS))


def _is_power_sgd(state: Any) -> bool:
    return type(state).__name__ == "PowerSGDState"


def state_of(hook: CommHook, prefix: str, rank: int, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (tensors, JSON values) of a hook's state under names that start with `prefix`; equal names on all ranks.

    Every rank's error lies in one row of a tensor of shape (ranks, elements of the bucket). A state of the user's is asked for
    its `state_dict()`, which must be JSON; without one, it is taken to hold nothing that matters to a resumed run.
    """
    state = hook.state
    if not _is_power_sgd(state):
        own = getattr(state, "state_dict", None)
        return {}, {} if own is None else {prefix: {"hook": hook.name, "state": own()}}
    tensors: dict[str, Any] = {}
    for bucket, error in state.error_dict.items():
        tensors[f"{prefix}/error/{bucket}"] = Shard(error[None], (rank, 0), (size, error.numel()))
    for kind, memory in (("p", state.p_memory_dict), ("q", state.q_memory_dict)):
        tensors |= {f"{prefix}/{kind}/{bucket}": _tensor(value).clone() for bucket, value in memory.items()}
    algorithm, keys, position, has_gauss, cached = state.rng.get_state()
    values = {name: getattr(state, name) for name in _COUNTERS}
    values["rng"] = [algorithm, [int(k) for k in keys], int(position), int(has_gauss), float(cached)]
    return tensors, {prefix: {"hook": hook.name, "state": values}}


def load_state(
    hook: CommHook,
    prefix: str,
    rank: int,
    size: int,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    values: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Give a hook's state back. On another number of ranks each starts with the mean of all errors: their sum is what counts.

    Raises:
        CheckpointError: the state of another hook. A checkpoint without any starts the hook anew.
    """
    saved = values.get(prefix)
    if saved is None:
        return
    if saved["hook"] != hook.name:
        raise CheckpointError(
            f"The checkpoint was saved under comm_hook {saved['hook']!r}, and this run has {hook.name!r}, which cannot go on "
            "from its state. Use the same comm_hook, or load the models and optimizers only."
        )
    state = hook.state
    if not _is_power_sgd(state):
        state.load_state_dict(saved["state"])
        return
    state.error_dict.clear()
    state.p_memory_dict.clear()
    state.q_memory_dict.clear()
    for name in names:
        if not name.startswith(f"{prefix}/"):
            continue
        kind, _, bucket = name.removeprefix(f"{prefix}/").partition("/")
        tensor = read(name).to(device)
        if kind == "error":
            state.error_dict[int(bucket)] = tensor[rank].clone() if len(tensor) == size else tensor.mean(0)
        elif kind in ("p", "q"):
            getattr(state, f"{kind}_memory_dict")[int(bucket)] = tensor
    rng = saved["state"]["rng"]
    state.rng.set_state((rng[0], rng[1], rng[2], rng[3], rng[4]))
    for name in _COUNTERS:
        setattr(state, name, saved["state"][name])


def _tensor(value: Any) -> Tensor:
    # torch keeps what a future gave it, which is a list of one tensor in one of the two algorithms.
    return value[0] if isinstance(value, list | tuple) else value
