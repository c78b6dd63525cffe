"""Losses that are NaN, Inf, or far above what they were: end the training, leave the step out, or go back and around them.

    Health()                                                a spike ends the training
    Health(on_spike="rollback", on_nonfinite="rollback")    back to the last checkpoint from before it, and on behind those data
    Health(on_spike="skip")                                 the step is left out

What is detected when. Between log points no value is read and nothing is exchanged: losses are kept on the device. At each log
point (`log_every_n_steps`), and at the end of the training, those since the last one are gathered from all ranks and judged, step
by step; on a CPU also at once when a step was left out as not finite. So every step is judged, a spike is known at the next log
point, and all ranks judge the same numbers and act at the same step.
    raise, rollback     judge the step's loss: the mean over its micro-batches and all ranks
    skip                must know before the weights change: every rank compares each of its micro-batches with the limit of the
                        last log point, on the device; one above it anywhere leaves the whole step out
A spike is a loss above  median + threshold * deviation  of the last `window` losses that were no spikes. The deviation is 1.4826
times the median distance from the median (the standard deviation of a normal distribution, but blind to outliers), and at least
1 % of the median.
Read `_judge` first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.errors import ConfigError, LossSpikeError, NonFiniteError
from ..strategies.gradients import mean_loss
from .base import Callback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ..strategies.checkpoint.store import CheckpointStore
    from .base import TrainerView

__all__ = ["Health"]

_POLICIES = ("raise", "skip", "rollback")
_NORMAL = 1.4826  # from the median distance to the standard deviation of a normal distribution
_LEAST = 0.01  # of the median: a loss that hardly moves does not make every wiggle a spike


class Health(Callback):
    """Watch the loss.

    Attributes:
        rollbacks: what was rolled back so far: dicts of step, to, epoch, loss and reason. Kept over the rollbacks themselves.
        left_out: steps that were left out since the start.
        limit: above which a loss is a spike now; None during the warm-up.
    """

    state_is_required = False
    state_is_per_rank = True  # the losses since the last log point are each rank's own

    def __init__(
        self,
        on_spike: str | None = "raise",
        on_nonfinite: str | None = None,
        *,
        threshold: float = 8.0,
        window: int = 200,
        warmup: int = 50,
        margin: int = 0,
        max_rollbacks: int = 5,
        max_left_out: int = 10,
    ) -> None:
        """Choose what happens.

        Args:
            on_spike: "raise", "skip", "rollback", or None: spikes are not looked for.
            on_nonfinite: the same for a loss or gradient that is NaN or Inf; None: as the Trainer's `nonfinite` says. Under
                "rollback" a gradient that is not finite under a finite loss is rolled back too.
            threshold: in deviations.
            window: of how many losses median and deviation are taken; of steps, or under "skip" of micro-batches of all ranks.
            warmup: losses that must have been seen before any is called a spike.
            margin: a checkpoint less than so many steps before the spike is not trusted.
            max_rollbacks: in a run; one more ends it.
            max_left_out: steps in a row; one more ends the run, because that is no spike.
        Raises:
            ConfigError: a value that makes no sense.
        """
        for name, value in (("on_spike", on_spike), ("on_nonfinite", on_nonfinite)):
            if value not in (*_POLICIES, None):
                raise ConfigError(f"Health({name}={value!r}): expected 'raise', 'skip', 'rollback' or None.")
        if not threshold > 0 or not math.isfinite(threshold):
            raise ConfigError(f"Health(threshold={threshold!r}): expected a number of deviations above 0, such as 8.")
        least = {"window": 2, "warmup": 2, "margin": 0, "max_rollbacks": 0, "max_left_out": 0}
        given = {
            "window": window, "warmup": warmup, "margin": margin, "max_rollbacks": max_rollbacks, "max_left_out": max_left_out
        }  # fmt: skip
        for name, value in given.items():
            if type(value) is not int or value < least[name]:
                raise ConfigError(f"Health({name}={value!r}): expected a whole number of at least {least[name]}.")
        if warmup > window:
            raise ConfigError(f"Health(warmup={warmup}, window={window}): the warm-up must fit into the window.")
        self.on_spike, self.on_nonfinite = on_spike, on_nonfinite
        self.threshold, self.warmup, self.margin = threshold, warmup, margin
        self.max_rollbacks, self.max_left_out = max_rollbacks, max_left_out
        self.rollbacks: list[dict[str, Any]] = []
        self.left_out = 0
        self.limit: float | None = None
        self._seen: deque[float] = deque(maxlen=window)
        self._losses: list[Tensor] = []  # of the micro-batches since the last look, on the device
        self._steps: list[tuple[int, int]] = []  # of the windows among them: (the step's number, where its micro-batches end)
        self._ranks = 1  # that `_losses` were saved by
        self._in_a_row = 0
        self._at = (0, 0)  # progress.global_step and progress.skipped after the last window
        self._nonfinite_steps = 0
        self._saved: list[int] = []  # steps of checkpoints that may be gone back to, oldest first
        self._store: CheckpointStore | None = None
        self._before: str | None = None  # the Trainer's own policy
        self._not_finite = "raise"  # the policy that holds

    @property
    def state_key(self) -> str:
        return "Health"

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": list(self._seen),
            "losses": torch.stack(self._losses).cpu() if self._losses else torch.zeros(0),
            "steps": [list(step) for step in self._steps],
            "ranks": self._ranks,
            "in_a_row": self._in_a_row,
            "saved": list(self._saved),
            "rollbacks": list(self.rollbacks),
            "left_out": self.left_out,
            "limit": self.limit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen.clear()
        self._seen.extend(state["seen"])
        self._losses = list(state["losses"].unbind())
        self._steps = [(step, end) for step, end in state["steps"]]
        if self._store is not None:  # rolled back: what came after that checkpoint is not needed any more
            for step in self._saved:
                self._store.release(step, by="Health")
        self._ranks, self._in_a_row, self._saved = state["ranks"], state["in_a_row"], list(state["saved"])
        # The state of a checkpoint that is rolled back to does not know of that: what was learnt since is kept.
        if len(state["rollbacks"]) > len(self.rollbacks):
            self.rollbacks = list(state["rollbacks"])
        self.left_out, self.limit = max(self.left_out, state["left_out"]), state["limit"]

    # -- moments ------------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._before = own = trainer.nonfinite
        self._not_finite = self.on_nonfinite or own
        if self.on_spike == "skip" and self._not_finite == "ignore":
            raise ConfigError(
                "Health(on_spike='skip') leaves a step out by making its gradient NaN, and Trainer(nonfinite='ignore') would not "
                "look. Leave out nonfinite='ignore', or say Health(on_nonfinite=...)."
            )
        if self._not_finite in ("skip", "rollback") or self.on_spike == "skip":
            trainer.nonfinite = "skip"  # nothing that is not finite reaches the weights; what follows is decided here
        elif self._not_finite == "raise":
            trainer.nonfinite = "raise"
        if self.on_spike == "skip" and not getattr(module, "automatic_optimization", True):
            raise ConfigError(
                f"Health(on_spike='skip') cannot leave out a step of {type(module).__name__}, which optimises manually and may "
                "have several. Use 'rollback' or 'raise'."
            )
        if trainer.log_every_n_steps < 1:
            raise ConfigError("Health looks at log points, and log_every_n_steps=0 has none. Set log_every_n_steps=50, say.")

    def on_train_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._go_on(trainer)

    def on_load_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        self._go_on(trainer)

    def on_train_end(self, trainer: TrainerView, module: nn.Module) -> None:
        if not trainer.leaving:  # nothing more is gone back to: those that only waited for that may go with the last save
            self._release(trainer, list(self._saved))

    def teardown(self, trainer: TrainerView, module: nn.Module, stage: str) -> None:
        if self._before is not None:
            trainer.nonfinite, self._before = self._before, None
            trainer.leave_out_above(None)

    def on_train_batch_end(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss, items = (outputs.get("loss"), outputs.get("num_items")) if isinstance(outputs, dict) else (outputs, None)
        if isinstance(loss, Tensor):
            self._losses.append(mean_loss(loss, items))
        elif outputs is not None or not getattr(module, "automatic_optimization", True):
            raise ConfigError(
                f"Health watches the loss, and training_step returned {type(outputs).__name__}. "
                "Return the loss, or a dict with 'loss' in it."
            )
        progress = trainer.progress
        at = (progress.global_step, progress.skipped)
        if at != self._at:  # the window is complete
            was_left_out = at[1] != self._at[1]
            self._at = at
            self._steps.append((at[0] + was_left_out, len(self._losses)))
            if was_left_out:
                self._look(trainer)

    def on_log(self, trainer: TrainerView, module: nn.Module, metrics: dict[str, float], step: int) -> None:
        # Also called with the values of a validation and of an epoch's end: then there is nothing to look at.
        if self._steps and step % trainer.log_every_n_steps == 0 and self._steps[-1][0] == step:
            self._look(trainer)

    def judge_the_rest(self, trainer: TrainerView) -> None:
        """Judge the steps since the last log point. The loop calls it when it has come to its end, on all ranks."""
        if self._steps:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: TrainerView, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        if "rollback" in (self.on_spike, self._not_finite):
            step = trainer.progress.global_step
            if step not in self._saved:
                self._saved.append(step)
            trainer.store.protect(step, by="Health")  # until a newer one is known to be good

    # -- judging ------------------------------------------------------------------------------------------------------
    def _look(self, trainer: TrainerView) -> None:
        """Gather and judge the losses since the last look, and act. Every rank comes here at the same step."""
        losses, steps = self._losses, self._steps
        self._losses, self._steps = [], []
        device = trainer.world.device
        gathered = trainer.world.all_gather(torch.stack([loss.to(device) for loss in losses])) if losses else torch.zeros(0)
        of_ranks = gathered.reshape(trainer.world.size, -1).tolist()
        begin, good = 0, 0
        unexplained = trainer.nonfinite_steps - self._nonfinite_steps
        self._nonfinite_steps = trainer.nonfinite_steps
        for step, end in steps:
            values = [value for rank in of_ranks for value in rank[begin:end]]
            begin = end
            kind, value = self._judge(values)
            if kind == "nonfinite" or (kind == "spike" and self.on_spike == "skip"):
                unexplained -= 1
            if kind and self._act(trainer, kind, step, value):
                return
            if not kind:
                good, self._in_a_row = step, 0
        for _ in range(unexplained):
            if self._act(trainer, "nonfinite", steps[-1][0] if steps else trainer.progress.global_step, None):
                return
        self._trust(trainer, good)
        if self.on_spike == "skip":
            self._set_limit(trainer)

    def _judge(self, values: Sequence[float]) -> tuple[str, float | None]:
        """Say what a step is, from the mean losses of its micro-batches on all ranks: "nonfinite", "spike" or "" (fine)."""
        if not values:
            return "", None
        if not all(math.isfinite(value) for value in values):
            return "nonfinite", next(value for value in values if not math.isfinite(value))
        if self.on_spike is None:
            return "", None
        if self.on_spike == "skip":  # the limit is that which the device had
            if self.limit is not None and max(values) > self.limit:
                return "spike", max(values)
            self._seen.extend(values)
            return "", None
        mean = sum(values) / len(values)
        self.limit = self._estimate()
        if self.limit is not None and mean > self.limit:
            return "spike", mean
        self._seen.append(mean)
        return "", mean

    def _estimate(self) -> float | None:
        """Return the loss above which one is a spike, None during the warm-up."""
        if len(self._seen) < self.warmup:
            return None
        middle = median(self._seen)
        deviation = max(_NORMAL * median([abs(value - middle) for value in self._seen]), _LEAST * abs(middle))
        return middle + self.threshold * deviation

    def _set_limit(self, trainer: TrainerView) -> None:
        limit = self._estimate()
        # As the device will see it, so that what is judged here is what was left out there.
        self.limit = None if limit is None else torch.tensor(limit, dtype=torch.float32).item()
        trainer.leave_out_above(self.limit)

    # -- acting -------------------------------------------------------------------------------------------------------
    def _act(self, trainer: TrainerView, kind: str, step: int, value: float | None) -> bool:
        """Do what was chosen for a step that is not fine; return whether the others need not be looked at."""
        policy = self.on_spike if kind == "spike" else self._not_finite
        reason = f"a gradient of step {step} is not finite" if value is None else f"the loss of step {step} is {value:.6g}"
        if kind == "spike":
            reason += f", above {self.limit:.6g} (from the last {len(self._seen)} losses)"
        if policy == "raise":
            kept = " The weights hold none of it." if kind == "nonfinite" else ""
            raise _error(kind, f"{reason[0].upper()}{reason[1:]}.{kept} Look at the data and the learning rate, or go around it: "
                         f"Health(on_{kind}='rollback') or 'skip'.")  # fmt: skip
        if policy == "rollback":
            self._roll_back(trainer, kind, step, value, reason)
            return True
        if policy == "skip":
            self.left_out += 1
            self._in_a_row += 1
            trainer.print(f"left out: {reason}")
            if self._in_a_row > self.max_left_out:
                raise _error(kind, f"{self._in_a_row} steps in a row were left out: {reason}. That is no spike. Look at the data "
                             "and the learning rate, or raise max_left_out.")  # fmt: skip
        return False

    def _roll_back(self, trainer: TrainerView, kind: str, step: int, value: float | None, reason: str) -> None:
        if len(self.rollbacks) >= self.max_rollbacks:
            raise _error(kind, f"Rolled back {len(self.rollbacks)} times, and {reason}. "
                         "Look at the data and the learning rate, or raise max_rollbacks.")  # fmt: skip
        to = self._last_good(trainer, step)
        if to is None:
            raise _error(kind, f"{reason[0].upper()}{reason[1:]}, and there is no checkpoint to go back to from before it. "
                         "Save more often: Checkpoint('100step').")  # fmt: skip
        number = len(self.rollbacks) + 1
        entry = {"step": step, "to": to, "epoch": trainer.progress.epoch, "loss": _plain(value), "reason": reason}
        self.rollbacks.append(entry)
        trainer.roll_back(to, f"{reason} (rollback {number} of at most {self.max_rollbacks})")

    def _last_good(self, trainer: TrainerView, step: int) -> int | None:
        """Return the newest checkpoint from before `step` that is whole, the same on all ranks."""
        store = trainer.store
        store.join()  # one may still be being written
        found = None
        if trainer.world.is_main:
            candidates = [saved for saved in sorted(self._saved, reverse=True) if saved < max(step - self.margin, 1)]
            found = next((s for s in candidates if store.path_of(s) is not None and not store.verify(s, full=False)), None)
        return trainer.world.broadcast_json(found)

    def _trust(self, trainer: TrainerView, good: int) -> None:
        """All steps up to `good` were fine: of the checkpoints up to there only the newest is needed."""
        proven = [step for step in sorted(self._saved) if step <= good - self.margin]
        self._release(trainer, proven[:-1])

    def _release(self, trainer: TrainerView, steps: Iterable[int]) -> None:
        for step in steps:
            self._saved.remove(step)
            trainer.store.release(step, by="Health")

    def _go_on(self, trainer: TrainerView) -> None:
        """Take up the counts of the trainer: at the start, and after a rollback."""
        progress = trainer.progress
        if self._ranks != trainer.world.size:  # each rank's losses are gone with the ranks
            self._losses, self._steps = [], []
        self._ranks = trainer.world.size
        self._at = (progress.global_step, progress.skipped)
        self._nonfinite_steps = trainer.nonfinite_steps
        self._store = trainer.store
        for step in self._saved:
            trainer.store.protect(step, by="Health")
        if self.on_spike == "skip":
            trainer.leave_out_above(self.limit)


def _error(kind: str, text: str) -> Exception:
    return NonFiniteError(text) if kind == "nonfinite" else LossSpikeError(text)


def _plain(value: float | None) -> float | str | None:
    """A number as JSON has it."""
    return value if value is None or math.isfinite(value) else str(value)
