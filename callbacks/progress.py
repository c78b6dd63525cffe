"""How far the training is: a bar on a terminal and in a notebook, one plain line for each log point in a pipe. Rank 0 only.

    step 100/500  epoch 1  loss 2.31  lr 3.0e-04  1234 samples/s  ETA 0:12
Both show the values of the last log point, so nothing is ever read from a device in between. On a terminal a micro-batch costs
one call and a comparison, and at most every 16th looks at the clock: the bar is drawn about ten times a second. In a pipe a
batch costs nothing.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from .base import Callback
from .learning_rate import learning_rates

if TYPE_CHECKING:
    from torch import nn

    from .base import TrainerView

__all__ = ["ProgressBar", "draws_bars"]

_NEVER = 1 << 62
_INTERVAL_S = 0.1
_MOST_VALUES = 8


class ProgressBar(Callback):
    """Show progress, rate and the metrics that were logged with `prog_bar=True`.

    Args:
        bar: draw a bar; False prints lines; None: a bar on a terminal and in a notebook.
        file: where to write; default: stderr for a bar, stdout for lines.
        leave: keep the finished bar on the screen.
    """

    def __init__(self, *, bar: bool | None = None, file: IO[str] | None = None, leave: bool = True) -> None:
        self.file = file
        self.leave = leave
        self.draws = draws_bars(file or sys.stderr) if bar is None else bar
        self._bar: Any = None
        self._evaluation: Any = None
        self._count = self._drawn = 0  # micro-batches since the start of the bar, and when it was drawn last
        self._next = _NEVER
        self._drawn_at = self._paused_at = 0.0
        self._total: int | None = None
        self._start = self._last = (0.0, 0, 0)  # time, step, samples
        self._values: dict[str, float] = {}
        if self.draws:  # in a pipe these hooks do not exist, and cost nothing: the runner calls what an instance has
            vars(self)["on_train_batch_end"] = self._on_batch
            for stage in ("validation", "test", "predict"):
                vars(self)[f"on_{stage}_batch_end"] = self._on_evaluation_batch

    # -- training -----------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: TrainerView, module: nn.Module) -> None:
        progress = trainer.progress
        self._total = _total_steps(trainer)
        self._start = self._last = (time.perf_counter(), progress.global_step, progress.samples)
        self._values = {}
        if self.draws and trainer.world.is_main:
            self._bar = _make_bar(self.file, total=self._total, initial=progress.global_step, unit="step", leave=self.leave)
            self._count = self._drawn = 0
            self._next, self._drawn_at = 1, self._start[0]

    def _on_batch(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._count += 1
        if self._count >= self._next:
            seconds = time.perf_counter() - self._drawn_at
            self._next = self._count + _stride(self._count - self._drawn, seconds)
            if seconds >= _INTERVAL_S:
                self._draw(trainer)

    def _draw(self, trainer: TrainerView) -> None:
        self._drawn, self._drawn_at = self._count, time.perf_counter()
        bar, progress = self._bar, trainer.progress
        if bar is not None:
            epochs = f"/{trainer.max_epochs}" if trainer.max_epochs is not None else ""
            bar.set_description_str(f"epoch {_running_epoch(trainer)}{epochs}", refresh=False)
            bar.set_postfix_str("  ".join(_values(self._values)), refresh=False)
            bar.n = progress.global_step
            bar.refresh()

    def on_log(self, trainer: TrainerView, module: nn.Module, metrics: dict[str, float], step: int) -> None:
        if not trainer.world.is_main:
            return
        shown = _chosen(metrics, module)
        self._values |= shown
        if not self.draws:
            self._print_line(trainer, shown, step)

    def _print_line(self, trainer: TrainerView, shown: dict[str, float], step: int) -> None:
        """One line. The first one of a step also has the learning rate, the speed and the time to go."""
        total = f"/{self._total}" if self._total is not None else ""
        parts = [f"step {step}{total}", f"epoch {_running_epoch(trainer)}", *_values(shown)]
        if step > self._last[1]:
            now = (time.perf_counter(), step, trainer.progress.samples)
            parts += [f"{name} {rate:.1e}" for name, rate in learning_rates(trainer.optimizers).items() if name not in shown][:2]
            parts += _speed(self._last, now)
            if self._total is not None and step < self._total:
                a_step = (now[0] - self._start[0]) / (step - self._start[1])
                parts.append(f"ETA {_clock(a_step * (self._total - step))}")
            self._last = now
        elif not shown:
            return
        self._write("  ".join(parts))

    def on_train_end(self, trainer: TrainerView, module: nn.Module) -> None:
        if not trainer.world.is_main:
            return
        if self._bar is not None:
            self._draw(trainer)
        self._close()
        progress, (start, step, samples) = trainer.progress, self._start
        now = (time.perf_counter(), progress.global_step, progress.samples)
        steps = now[1] - step
        parts = [f"trained {steps} step{'' if steps == 1 else 's'} in {_clock(now[0] - start)}"]
        if steps:
            parts += _speed((start, step, samples), now)
        if progress.global_step != steps:
            parts.append(f"now at step {progress.global_step}")
        self._write("  ".join([*parts, *_values(self._values)]))

    def on_exception(self, trainer: TrainerView, module: nn.Module, exception: BaseException) -> None:
        self._close()

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def on_validation_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._paused_at = time.perf_counter()
        self._start_evaluation(trainer, "validate", "val_loaders")

    def on_validation_end(self, trainer: TrainerView, module: nn.Module) -> None:
        since, step, samples = self._last
        self._last = (since + time.perf_counter() - self._paused_at, step, samples)  # no part of the training's speed
        self._end_evaluation(trainer)

    def on_test_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._start_evaluation(trainer, "test", "test_loaders")

    def on_test_end(self, trainer: TrainerView, module: nn.Module) -> None:
        self._end_evaluation(trainer)

    def on_predict_start(self, trainer: TrainerView, module: nn.Module) -> None:
        self._start_evaluation(trainer, "predict", "predict_loaders")

    def on_predict_end(self, trainer: TrainerView, module: nn.Module) -> None:
        self._end_evaluation(trainer)

    def _start_evaluation(self, trainer: TrainerView, name: str, loaders: str) -> None:
        if not (self.draws and trainer.world.is_main):
            return
        if self._bar is not None:
            self._draw(trainer)
        total = _num_batches(getattr(trainer, loaders, None))
        self._evaluation = _make_bar(self.file, total=total, unit="batch", leave=False, desc=name)
        self._evaluated = self._evaluation_drawn = 0
        self._evaluation_next, self._evaluation_drawn_at = 1, time.perf_counter()

    def _on_evaluation_batch(self, trainer: TrainerView, module: nn.Module, outputs: Any, batch: Any, *index: int) -> None:
        if self._evaluation is None:
            return
        self._evaluated += 1
        if self._evaluated >= self._evaluation_next:
            seconds = time.perf_counter() - self._evaluation_drawn_at
            self._evaluation_next = self._evaluated + _stride(self._evaluated - self._evaluation_drawn, seconds)
            if seconds >= _INTERVAL_S:
                self._evaluation_drawn, self._evaluation_drawn_at = self._evaluated, time.perf_counter()
                self._evaluation.n = self._evaluated
                self._evaluation.refresh()

    def _end_evaluation(self, trainer: TrainerView) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
            if self._bar is not None:
                self._drawn_at = time.perf_counter()
                self._drawn = self._count

    # -- the screen ---------------------------------------------------------------------------------------------------
    def _close(self) -> None:
        for bar in (self._evaluation, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._evaluation = None
        self._next = _NEVER

    def _write(self, line: str) -> None:
        print(line, file=self.file or (sys.stderr if self.draws else sys.stdout), flush=True)


def draws_bars(file: IO[str]) -> bool:
    """Whether a bar makes sense: `file` is a terminal that can move its cursor, or this is a notebook."""
    shell = sys.modules.get("IPython")
    kernel = shell.get_ipython() if shell is not None else None
    if kernel is not None and type(kernel).__name__ == "ZMQInteractiveShell":
        return True
    return file.isatty() and os.environ.get("TERM") != "dumb"


def _make_bar(file: IO[str] | None, **options: Any) -> Any:
    """A tqdm bar that never draws by itself and has no monitor thread (a thread beside forked loader workers is a hazard)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets the text bar
        from tqdm.auto import tqdm

    class Bar(tqdm):
        monitor_interval = 0

    screen = file or sys.stderr
    options |= {"ncols": 80, "nrows": 24} if _has_no_width(screen) else {"dynamic_ncols": True}
    if options.get("total"):  # a short bar: on 80 columns the values are worth more than a long one
        options["bar_format"] = (
            "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        )
    colour = None if os.environ.get("NO_COLOR") else "green"
    return Bar(file=screen, colour=colour, mininterval=0, miniters=_NEVER, **options)


def _has_no_width(file: IO[str]) -> bool:
    """A terminal that says it has 0 columns (`docker run -t`, `script`): tqdm would draw nothing at all."""
    try:
        return os.get_terminal_size(file.fileno()).columns == 0
    except (OSError, ValueError):
        return False


def _stride(batches: int, seconds: float) -> int:
    """After how many batches to look at the clock again, going by the speed of the last ones.

    At most 16, so that batches which become slow do not leave an old bar on the screen.
    """
    return min(16, max(1, int(batches * _INTERVAL_S / 2 / max(seconds, 1e-9))))


def _running_epoch(trainer: TrainerView) -> int:
    """The epoch that runs, counted from 1; behind the last one, that one."""
    number = trainer.progress.epoch + 1
    return number if trainer.max_epochs is None else min(number, max(1, trainer.max_epochs))


def _total_steps(trainer: TrainerView) -> int | None:
    """The optimizer step at which the training will end, where that is known."""
    by_epochs: int | None = None
    if trainer.max_epochs is not None and trainer.num_training_batches is not None:
        window = getattr(getattr(trainer, "accelerator", None), "gradient_accumulation_steps", 1)
        by_epochs = trainer.max_epochs * -(-trainer.num_training_batches // window)
    limits = [limit for limit in (trainer.max_steps, by_epochs) if limit is not None]
    return min(limits, default=None)


def _num_batches(loaders: Any) -> int | None:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    try:
        return sum(len(loader) for loader in loaders)
    except TypeError:  # none given, or of unknown length
        return None


def _chosen(metrics: Mapping[str, float], module: nn.Module) -> dict[str, float]:
    """The metrics to show: those logged with prog_bar=True; where none was, the first few."""
    names = getattr(getattr(module, "_metrics", None), "prog_bar_names", ())
    marked = {name: value for name, value in metrics.items() if name in names}
    return dict(list((marked or dict(metrics)).items())[:_MOST_VALUES])


def _values(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.items()]


def _speed(before: tuple[float, int, int], now: tuple[float, int, int]) -> list[str]:
    seconds = now[0] - before[0]
    if seconds <= 0:
        return []
    samples, steps = now[2] - before[2], now[1] - before[1]
    rate, unit = (samples / seconds, "samples/s") if samples else (steps / seconds, "steps/s")
    return [f"{rate:.0f} {unit}" if rate >= 100 else f"{rate:.3g} {unit}"]


def _clock(seconds: float) -> str:
    """1:02:03, or 0:12."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
