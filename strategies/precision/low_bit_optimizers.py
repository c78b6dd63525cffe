"""AdamW whose state takes 8 or 4 bits a number, by torchao: a quarter or an eighth of the memory of fp32 state.

    LowBitAdamW(model.parameters(), lr=1e-3)              8-bit state, one scale for each 256 numbers
    LowBitAdamW(..., bits=4)   LowBitAdamW(..., bits="fp8")

The arithmetic and the formats are torchao's. Its own classes keep the state in tensor classes of theirs and the learning rate in
a tensor, and compile their step always, which takes a minute on a CPU. Here the state is plain tensors (`exp_avg.codes`,
`exp_avg.scale`), so it is saved like any other, schedulers find a number, and the step is compiled only where that pays.
Works with any precision, under `single`, `ddp`, `fsdp` and `hsdp`. Under the last two each rank updates its rows, in the very
blocks that one process has: which tensors are quantised does not depend on the number of ranks, and neither does a checkpoint.
Where a rank's rows would end within a block, that number of ranks is refused, with those that fit.

A second moment of few bits becomes 0 where it is far below the largest of its block (for float8 a 4e-6 of it), and the first
moment does not: a row of an embedding table whose token is rare is then divided by eps alone. With "fp8" and an eps of 1e-8 the
tables of the demo GPT grew to 200 within 120 steps (torchao's own AdamWFp8 did the same), and its loss to 2e7 within 200. So eps
is 1e-5 for "fp8", and embedding tables are best kept in a group of their own, with fp32 state:
    LowBitAdamW([{"params": tables, "bits": 32}, {"params": others}], lr=1e-3)
Source: torchao.optim (0.18); Dettmers et al. 2022, arXiv:2110.02861; Li et al. 2023, arXiv:2309.01507.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from .. import dtensors, tensor_order
from ..errors import ConfigError
from . import _torchao

__all__ = ["LowBitAdamW"]

# bits -> (torchao's module and class of a state, its default block, whether it tells signed from unsigned)
_FORMATS: Mapping[int | str, tuple[str, str, int, bool]] = {
    8: ("optim.subclass_8bit", "OptimState8bit", 256, True),
    4: ("optim.subclass_4bit", "OptimState4bit", 128, True),
    "fp8": ("optim.subclass_fp8", "OptimStateFp8", 256, False),
    32: ("", "", 256, False),  # plain fp32
}
_SMALLEST = 4096  # numbers: smaller tensors keep fp32 state, as in bitsandbytes and torchao
_WANTED_BY = "LowBitAdamW"


class LowBitAdamW(Optimizer):
    """AdamW with low-bit moments.

    Args:
        eps: by default 1e-8, and 1e-5 for "fp8" (see above).
        bits: 8, 4, "fp8" or 32 (fp32 state); a parameter group may say its own.
        block_size: how many numbers share a scale; by default 256, for 4 bits 128.
        compile: whether torch.compile makes one kernel of each tensor's step. None: on accelerators.
        bf16_stochastic_round: round updates of bf16 weights at random, so that small ones are not lost on average.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 1e-2,
        *,
        bits: int | str = 8,
        block_size: int | None = None,
        compile: bool | None = None,
        bf16_stochastic_round: bool = False,
    ) -> None:
        self._update: Callable[..., None] = _torchao.load("optim.adam", wanted_by=_WANTED_BY).single_param_adam
        self._compiled: Callable[..., None] | None = None
        self._compile = compile
        self.block_size = block_size
        self.bf16_stochastic_round = bf16_stochastic_round
        if eps is None:
            eps = 1e-5 if bits == "fp8" else 1e-8
        self._held: dict[tuple[Tensor, str], tuple[Tensor, Any]] = {}  # (our codes, torchao's tensor around them and the scales)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with `bits` of its own or those of the optimizer."""
        bits = param_group.get("bits", self.defaults["bits"])
        if bits not in _FORMATS:
            raise ConfigError(f"bits={bits!r} is no format of LowBitAdamW. Use one of {', '.join(map(repr, _FORMATS))}.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._start(p, state, group["bits"])
                state["step"] += 1
                own = dtensors.local(p).detach()
                if not own.numel():  # a rank that holds no rows of it
                    continue
                rate = torch.tensor(float(group["lr"]), device=p.device)
                # (p, grad, step, exp_avg, exp_avg_sq, max_exp_avg_sq, lr, beta1, beta2, weight_decay, eps, IS_ADAMW, ...)
                self._function(p.device)(
                    own,
                    dtensors.local(p.grad),
                    state["step"],
                    self._moment(p, state, "exp_avg", group["bits"]),
                    self._moment(p, state, "exp_avg_sq", group["bits"]),
                    None,
                    rate,
                    beta_1,
                    beta_2,
                    group["weight_decay"],
                    group["eps"],
                    True,
                    self.bf16_stochastic_round and p.dtype is torch.bfloat16,
                )
        return loss

    def _function(self, device: torch.device) -> Callable[..., None]:
        if not (self._compile if self._compile is not None else device.type != "cpu"):
            return self._update
        if self._compiled is None:
            self._compiled = torch.compile(self._update, fullgraph=True, dynamic=False)
        return self._compiled

    def _start(self, p: Tensor, state: dict[str, Any], bits: int | str) -> None:
        if p.grad is not None and p.grad.is_sparse:
            raise ConfigError(
                "LowBitAdamW steps dense gradients, and one is sparse. Use torch.optim.SparseAdam for that parameter."
            )
        state["step"] = torch.tensor(0.0)
        for name in ("exp_avg", "exp_avg_sq"):
            if bits != 32 and p.numel() >= _SMALLEST and p.numel() % self._block(bits) == 0:
                self._check_cut(p, bits)
                own = dtensors.local(p)
                zeros = self._zeros(own if own.numel() else own.new_empty(self._block(bits)), name, bits)
                for part in ("codes", "scale"):
                    held = getattr(zeros, part)
                    state[f"{name}.{part}"] = self._cut(p, bits, part, held if own.numel() else held[:0])
            else:
                state[name] = torch.zeros_like(p)

    # -- parameters that are cut up -----------------------------------------------------------------------------------
    def _shape(self, p: Tensor, bits: int | str, part: str) -> torch.Size:
        """The shape of the codes or scales of all of `p`: row by row where rows are whole blocks, else flat."""
        if part == "codes" and bits != 4:
            return p.shape
        per_row = p.numel() // p.shape[0]
        of_one = self._block(bits) if part == "scale" else 2
        by_rows = per_row % self._block(bits) == 0
        return torch.Size((p.shape[0], per_row // of_one) if by_rows else (p.numel() // of_one,))

    def _check_cut(self, p: Tensor, bits: int | str) -> None:
        """Refuse parameters that are cut through blocks.

        Raises:
            ConfigError: with the numbers of ranks that fit.
        """
        if not isinstance(p, DTensor):
            return
        cuts = [(size, by) for size, by in zip(p.device_mesh.shape, p.placements, strict=True) if not isinstance(by, Replicate)]
        size = " x ".join(map(str, p.shape))
        what = f"LowBitAdamW keeps a parameter of {size} in blocks of {self._block(bits)} numbers"
        by_rows = all(type(by) is Shard and by.dim == 0 for _, by in cuts)
        if len(cuts) > 1 or not by_rows or tensor_order.order_of(p) is not None:
            raise ConfigError(
                f"{what}, row after row, and it is cut by columns, by sections or over several axes. Use 'fsdp', 'hsdp', 'ddp' "
                "or 'single', or give such parameters a group with bits=32."
            )
        if cuts and not self._fits(p, bits, cuts[0][0]):
            fitting = [str(n) for n in range(1, 65) if self._fits(p, bits, n)]
            raise ConfigError(
                f"{what}, and {cuts[0][0]} ranks would cut through some. "
                f"Use {', '.join(fitting[:8])} ranks, a smaller block_size, or give it a group with bits=32."
            )

    def _fits(self, p: Tensor, bits: int | str, ranks: int) -> bool:
        """Whether the codes and scales of `p`, cut as DTensors are, belong to the rows that each of `ranks` ranks has."""
        rows = p.shape[0]
        held = -(-rows // ranks) * (p.numel() // rows)  # numbers of a rank that has as many as any
        for shape in (self._shape(p, bits, "codes"), self._shape(p, bits, "scale")):
            of_one = p.numel() // math.prod(shape)
            if len(shape) == 1 and shape != p.shape and (held % of_one or -(-shape[0] // ranks) != held // of_one):
                return False
        return held % self._block(bits) == 0

    def _cut(self, p: Tensor, bits: int | str, part: str, own: Tensor) -> Tensor:
        """Return this rank's codes or scales as state of `p`: a DTensor that is cut like it, where it is one."""
        shape = self._shape(p, bits, part)
        if not isinstance(p, DTensor):
            return own.view(shape)
        numbers = dtensors.local(p).numel() * math.prod(shape) // p.numel()
        own = own.view(numbers // math.prod(shape[1:]), *shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)

    def _taken(self, p: Tensor, bits: int | str, part: str, value: Tensor) -> Tensor:
        """Return codes or scales that were read, whole or in pieces, as state of `p`. They are copied."""
        if isinstance(value, DTensor) and value.placements == getattr(p, "placements", None):
            own = dtensors.local(value)
        else:
            own = dtensors.local(value).reshape(-1)  # of all ranks
            if isinstance(p, DTensor):
                first = min(dtensors.box(p)[0][0], p.shape[0]) * (p.numel() // p.shape[0])
                of_one = p.numel() // own.numel()
                own = own[first // of_one :][: dtensors.local(p).numel() // of_one]
        return self._cut(p, bits, part, own.to(p.device, copy=True).contiguous())

    def _block(self, bits: int | str) -> int:
        return self.block_size if self.block_size is not None else _FORMATS[bits][2]

    def _zeros(self, p: Tensor, name: str, bits: int | str) -> Any:
        """Return torchao's tensor for one moment of `p`."""
        module, state_class, _, has_sign = _FORMATS[bits]
        made: Any = getattr(_torchao.load(module, wanted_by=_WANTED_BY), state_class)
        sign = {"signed": name == "exp_avg"} if has_sign else {}
        return made.zeros(p.shape, block_size=self._block(bits), device=p.device, dtype=p.dtype, **sign)

    def _moment(self, p: Tensor, state: dict[str, Any], name: str, bits: int | str) -> Any:
        """Return a moment as torchao's function takes it: around the plain tensors of `state`, which it writes into."""
        codes = state.get(f"{name}.codes")
        if codes is None:
            return dtensors.local(state[name])
        before, held = self._held.get((p, name), (None, None))
        if before is not codes:  # the first step, or a state that was loaded
            made = self._zeros(dtensors.local(p), name, bits)
            names, context = made.__tensor_flatten__()
            parts = {n: getattr(made, n) for n in names}
            parts["codes"] = dtensors.local(codes).view(made.codes.shape)
            parts["scale"] = dtensors.local(state[f"{name}.scale"]).view(-1)
            held = type(made).__tensor_unflatten__(parts, context)
            self._held[p, name] = codes, held
        return held

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back a state. torch casts it to the dtype of the parameters, which low-bit state must not be: that is undone."""
        super().load_state_dict(dict(state_dict))
        parameters = [(p, group["bits"]) for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (p, bits) in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                part = key.partition(".")[2]
                if part:
                    self._check_cut(p, bits)
                    self.state[p][key] = self._taken(p, bits, part, value)
                elif isinstance(value, Tensor):
                    self.state[p][key] = value.to("cpu" if key == "step" else p.device, copy=True)
        self._held.clear()
