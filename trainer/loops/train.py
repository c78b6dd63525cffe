"""The training loop: epochs over batches, windows over steps. What one batch does is `_epoch`, and nothing else.

    for batch in loader:
        with accelerator.accumulate():
            (first micro-batch of a window)  zero_grad
            accelerator.forward_backward(training_step, batch, batch_idx)
            (last micro-batch of a window)   clip, step, schedule            `_finish_window`
        (after a step)  log point, validation, checkpoint moment, stop       `_after_step`, only when one of them is due

Everything that is due at some later step is known ahead as one number, `_next_event`, so that a step on which nothing happens
costs one comparison. A hook that nobody overrode is an empty tuple and costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...callbacks.base import Callback
from ...callbacks.runner import is_overridden
from ...strategies.errors import DataError
from ..accumulation import SUM
from ..boundary import EPOCH, STEP
from ..rollback import go_on, restore

if TYPE_CHECKING:
    from ..rollback import RollBack
    from ..trainer import Trainer

__all__ = ["TrainLoop"]

_NEVER = 1 << 62


class TrainLoop:
    """Runs `Trainer.fit` from the position in `trainer.progress` to its end."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.progress = trainer.progress
        self.accelerator = trainer.accelerator
        self.module = trainer.module
        self.loader = trainer.train_loader
        self.hooks = trainer.hooks
        self.metrics = trainer.train_metrics
        self.automatic = self.module.automatic_optimization
        self.step = self.module.training_step if self.automatic else self.accelerator.bind(self.module, "training_step")
        self._next_event = 0
        self._log_due = False
        self._own_loss: bool | None = None  # whether "loss" is the loop's to log; the first log point tells
        # Only a checkpoint on an exception needs the state before the step that failed: to note it costs what a save collects.
        trainer.notes_steps = any(getattr(c, "save_on_exception", False) for c in trainer.callbacks)

    def run(self) -> None:
        """Train until an epoch, step or time limit, a stop request, or the end of what the loader gives."""
        trainer, progress = self.trainer, self.progress
        if trainer.reached_limit():
            trainer.print(f"nothing to train: epoch {progress.epoch} and step {progress.global_step} are at the limit already")
        self._plan_events()
        trainer.clock.start()
        trainer.in_window = True
        self._do_what_is_due()
        self._note()
        while self._goes_on():
            if not trainer.resumed_mid_epoch:
                self.loader.set_epoch(progress.epoch)
                self.hooks.call("on_train_epoch_start")
            trainer.log_into(self.metrics, True, False)
            ended = self._epoch(trainer.take_resumed_mid_epoch())
            trainer.log_into(self.metrics, False, True)  # what the hooks around epochs log goes out at the epoch's end
            if trainer.rolling_back is not None:
                self._roll_back(trainer.rolling_back)
            elif ended:
                self._end_epoch()
                self._note()

    def _goes_on(self) -> bool:
        """Whether there is more to train; at the end, whether a callback that judges the last steps goes back before them."""
        trainer = self.trainer
        if not trainer.should_stop and not trainer.reached_limit():
            return True
        if trainer.leaving:
            return False  # the resumed run judges them
        for callback in trainer.callbacks:
            judge = getattr(callback, "judge_the_rest", None)  # callbacks/health.py has it
            if judge is not None:
                judge(trainer)
        if trainer.rolling_back is None:
            return False
        self._roll_back(trainer.rolling_back)
        return self._goes_on()

    def _do_what_is_due(self) -> None:
        """Begin a resumed run with what the saved one had still to do after its last step."""
        trainer = self.trainer
        due, trainer.due = trainer.due, ()
        if STEP in due:
            self._validate_and_save()
            self._plan_events()
        if EPOCH in due and not trainer.should_stop:
            trainer.take_resumed_mid_epoch()
            self._end_epoch()

    def _roll_back(self, back: RollBack) -> None:
        """Go on from an older checkpoint with the data that come now: what that one had still to do comes first."""
        trainer, progress = self.trainer, self.progress
        restore(trainer, back)
        self._do_what_is_due()
        while progress.epoch < back.epoch and not trainer.should_stop:  # its epoch ended meanwhile: it ends again, without them
            if not progress.batch_in_epoch:
                self.hooks.call("on_train_epoch_start")
            self._end_epoch()
        if not trainer.should_stop and not trainer.reached_limit():
            if not progress.batch_in_epoch:
                self.hooks.call("on_train_epoch_start")
            go_on(trainer, back)
        self._plan_events()
        self._note()

    def _note(self) -> None:
        if self.trainer.notes_steps:
            self.trainer.note(buffers=True)

    def _epoch(self, resumed: bool) -> bool:
        """Train over the rest of the epoch; return False when it was broken off by a limit or a stop."""
        trainer, progress, accelerator, module = self.trainer, self.progress, self.accelerator, self.module
        loader, hooks, metrics, window = self.loader, self.hooks, self.metrics, accelerator.window
        optimizers, step, control = list(accelerator.optimizers.values()), module.training_step, accelerator.world.control
        batch_start, batch_end, automatic = hooks.on_train_batch_start, hooks.on_train_batch_end, self.automatic
        log_every, several, checks_time = trainer.log_every_n_steps, accelerator.world.size > 1, trainer.clock.limit is not None
        max_steps = _NEVER if trainer.max_steps is None else trainer.max_steps
        before, notes = progress.batches, trainer.notes_steps
        for batch in loader:
            batch_idx = progress.batch_in_epoch
            if batch_start and self._any_skips(batch_start, batch, batch_idx):
                window.close()
                return True
            with accelerator.accumulate():
                if window.index == 1:
                    self._log_due = log_every > 0 and (progress.global_step + 1) % log_every == 0
                    metrics.window = progress.global_step
                    accelerator.wants_norm = self._log_due and trainer.logs_loss
                    if automatic:
                        for optimizer in optimizers:
                            for hook in hooks.on_before_zero_grad:
                                hook(optimizer)
                            optimizer.optimizer.zero_grad()
                metrics.batch_samples = loader.num_samples
                output = (
                    accelerator.forward_backward(step, batch, batch_idx) if automatic else self._manual_step(batch, batch_idx)
                )
                progress.batches += 1
                progress.batch_in_epoch += 1
                progress.samples += loader.global_samples
                if self._log_due:
                    self._log_loss(output)
                if window.sync:
                    self._finish_window(optimizers)
            for hook in batch_end:
                hook(output, batch, batch_idx)
            if window.sync:
                if progress.global_step >= self._next_event:
                    self._after_step()
                    if trainer.leaving:
                        return False
                if trainer.rolling_back is not None:
                    return False
                if checks_time:
                    trainer.clock.check(control)
                if trainer.save_failed:
                    trainer.tell_of_failed_save()
                code = control.tick(progress.batches) if several or control.requested else 0
                if code:
                    trainer.obey(code)
                if trainer.pending_saves:
                    trainer.write_pending_saves()
                if notes:
                    trainer.note(buffers=True)
                if trainer.should_stop or progress.global_step >= max_steps:
                    return loader.is_last and not trainer.leaving
        if progress.batches == before and not resumed:
            raise DataError(
                f"The training loader gave no batch in epoch {progress.epoch}. Expected at least one. Is the data set empty, "
                "smaller than one batch with drop_last=True, or an iterator that was used up in the epoch before?"
            )
        return True

    def _any_skips(self, hooks: Any, batch: Any, batch_idx: int) -> bool:
        """Call the batch-start hooks; True when one returned -1, which ends the epoch (as in Lightning)."""
        skip = False
        for hook in hooks:
            skip = hook(batch, batch_idx) == -1 or skip
        return skip

    def _manual_step(self, batch: Any, batch_idx: int) -> Any:
        """Run a step that does its own backward and optimizer steps."""
        accelerator = self.accelerator
        for optimizer in accelerator.optimizers.values():
            optimizer.stepped = False
        accelerator.window.uneven = False  # `manual_backward` weights each loss by itself
        with accelerator.autocast():
            return self.step(accelerator.precision.convert_input(batch), batch_idx)

    def _log_loss(self, output: Any) -> None:
        """Log what the step returned as "loss", unless the step does so itself, in its own way."""
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, Tensor) and self.trainer.logs_loss:
            if self._own_loss is None:
                self._own_loss = not self.metrics.holds("loss")
            if not self._own_loss:
                return
            items = output.get("num_items") if isinstance(output, dict) else None
            if items is not None:  # a sum over items: its mean, weighted by them
                loss = loss.detach() / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1))
            self.metrics.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, weight=items)

    def _finish_window(self, optimizers: list[Any]) -> None:
        """Clip, step and schedule: the window is complete."""
        trainer, progress = self.trainer, self.progress
        stepped = False
        accelerator = self.accelerator
        if self.automatic:
            if not accelerator.window.backwards:  # every step of the window returned None
                progress.skipped += 1
                return
            before_step = self.hooks.on_before_optimizer_step
            clip_norm, clip_value, own_clipping = trainer.clip_norm, trainer.clip_value, trainer.module_clips
            for optimizer in optimizers:
                if before_step or own_clipping:
                    accelerator.settle_gradients(optimizer)
                    for hook in before_step:
                        hook(optimizer)
                if own_clipping:  # in place of the trainer's
                    self.module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
                    stepped = accelerator.step(optimizer) or stepped
                else:
                    stepped = accelerator.step(optimizer, max_norm=clip_norm, clip_value=clip_value) or stepped
        else:
            for optimizer in optimizers:
                stepped = optimizer.stepped or stepped
        if not stepped:
            progress.skipped += 1
            return
        progress.global_step += 1
        if accelerator.window.kind == SUM and self.automatic:
            trainer.count_tokens(accelerator.window.total)
        if trainer.step_schedulers and self.automatic:
            trainer.run_schedulers(trainer.step_schedulers, progress.global_step)

    # -- what is due after a step -------------------------------------------------------------------------------------
    def _plan_events(self) -> None:
        """Find the next step after which anything is due besides training."""
        trainer, step = self.trainer, self.progress.global_step
        due = [_NEVER]
        if trainer.log_every_n_steps > 0:
            due.append((step // trainer.log_every_n_steps + 1) * trainer.log_every_n_steps)
        if trainer.val_every_steps:
            due.append((step // trainer.val_every_steps + 1) * trainer.val_every_steps)
        if self.hooks.on_checkpoint_step:
            # A callback that knows when it has something to do next says so (callbacks/checkpoint.py does); inf is never.
            own = [c for c in trainer.callbacks if is_overridden(c, "on_checkpoint_step", Callback)]
            due.append(max(step + 1, min(getattr(c, "next_step", step + 1) for c in own)))
        self._next_event = min(due)

    def _after_step(self) -> None:
        trainer, step = self.trainer, self.progress.global_step
        if trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0:
            trainer.log_point(self.metrics)
            if trainer.rolling_back is not None:
                return
        self._validate_and_save()
        self._plan_events()

    def _validate_and_save(self) -> None:
        trainer = self.trainer
        if trainer.val_every_steps and self.progress.global_step % trainer.val_every_steps == 0 and trainer.epoch_validates():
            trainer.validate_in_fit((STEP, *trainer.due_now()))
            if trainer.leaving:
                return
        if self.hooks.on_checkpoint_step:
            trainer.in_window = False
            for hook in self.hooks.on_checkpoint_step:
                hook()
            trainer.in_window = True

    def _end_epoch(self) -> None:
        """The epoch's validation, values, hooks and schedulers; then the counters stand at the next epoch's start."""
        trainer, progress = self.trainer, self.progress
        if not trainer.val_every_steps and trainer.epoch_validates():
            trainer.validate_in_fit((EPOCH,))
            if trainer.leaving:
                return
        trainer.report_epoch(self.metrics)
        schedulers = trainer.epoch_schedulers if self.automatic else ()
        trainer.run_schedulers([c for c in schedulers if c.monitor is None], progress.epoch + 1)
        self.hooks.call("on_train_epoch_end")
        trainer.report_epoch(self.metrics)  # what the hooks above logged
        trainer.run_schedulers([c for c in schedulers if c.monitor is not None], progress.epoch + 1)
        progress.epoch += 1
        progress.batch_in_epoch = 0
        self.loader.set_epoch(progress.epoch)
        trainer.in_window = False
        self.hooks.call("on_checkpoint_epoch")
        trainer.in_window = True
        if trainer.pending_saves:
            trainer.write_pending_saves()
        if trainer.world.size > 1 or trainer.world.control.requested:  # or a step of the next epoch would be trained
            trainer.agree()
