"""Weights & Biases. Without a network, a key or the package the training goes on, after one warning.

    no package         nothing is recorded there (metrics.jsonl is)
    no key             recorded offline in <run folder>/wandb: `wandb sync` sends it later
    no answer          of the server at the start: offline too; later on the client keeps there what it could not send
A resumed run goes on under the same id, which is in the checkpoint. Never stored: the environment, the command line, the
code, the console, the list of packages; of the configuration only what `redacted` leaves.   Source: wandb 0.31, wandb.Settings.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from ...strategies.errors import ConfigError, MissingDependency
from .base import Logger, RunInfo, redacted

__all__ = ["WandbLogger"]


class WandbLogger(Logger):
    """Sends metrics to wandb, from a thread of its own. `run` is wandb's Run, once it has started.

    wandb forgets nothing. When a training is rolled back (Health), its curve goes on behind what was left out: `rolled_back_to`
    marks the place, wandb's own step runs ahead from there, and the training's is the metric `global_step`. metrics.jsonl, csv
    and tensorboard show the one curve that counts.

    Args:
        project: where the run appears; default: the run's name.
        mode: "online", "offline" or "disabled"; default: what WANDB_MODE says, else online.
        id: wandb's id of the run; default: one of our own making, kept in the checkpoint.
        options: more of what wandb.init takes, such as `entity`, `group`, `tags`.
        init_timeout_s: how long wandb.init may take to reach the server.
        required: the training does not start unless the run does.
    """

    name: ClassVar[str] = "wandb"
    remote: ClassVar[bool] = True

    def __init__(
        self,
        project: str | None = None,
        *,
        name: str | None = None,
        mode: str | None = None,
        id: str | None = None,
        init_timeout_s: float = 60.0,
        close_timeout_s: float = 60.0,
        required: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(required=required)
        if mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(f"WandbLogger(mode={mode!r}): it is 'online', 'offline' or 'disabled'.")
        for fixed in ("config", "settings", "dir", "resume"):
            if fixed in options:
                raise ConfigError(f"WandbLogger({fixed}=...) is set by the run itself. Leave it out.")
        self.project, self.run_name, self.mode = project, name, mode
        self.id = id or secrets.token_hex(4)
        self.init_timeout_s, self.close_timeout_s = init_timeout_s, close_timeout_s
        self.options = options
        self.run: Any = None
        self._last = self._ahead = 0  # the last step told to wandb, and how far its steps are ahead of ours after rollbacks

    def start(self, run: RunInfo) -> None:
        mode = self.mode or os.environ.get("WANDB_MODE") or "online"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its own and its dependencies' deprecations are not the user's
                import wandb
        except ImportError as error:
            raise MissingDependency(
                "The logger 'wandb' needs the package wandb, which is not installed. "
                "Run: pip install 'drivetrain[wandb]', or take it out of loggers=."
            ) from error
        if mode == "online" and not _has_key(wandb):
            missing = "wandb has no API key here (neither WANDB_API_KEY nor `wandb login`)"
            if self.required:
                raise ConfigError(f"{missing}, and the logger was made with required=True. Log in, or use mode='offline'.")
            # Asking for it would wait for an answer that nobody gives.
            self.notice = f"{missing}: this run is recorded offline in {run.root / 'wandb'}; `wandb sync` sends it later"
            mode = "offline"
        settings = wandb.Settings(
            init_timeout=self.init_timeout_s,
            finish_timeout=0.8 * self.close_timeout_s,  # so that it gives up by itself, before Tracking does
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            silent=True,
            x_disable_meta=True,  # host, user, command line, executable
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        arguments: dict[str, Any] = {
            "project": self.project or run.name,
            "name": self.run_name or run.name,
            "id": self.id,
            "resume": "allow" if run.resumed else None,
            "dir": str(run.root),
            "config": redacted(run.config),
            "settings": settings,
        } | self.options
        try:
            self.run = wandb.init(mode=mode, **arguments)  # pyright: ignore[reportArgumentType]
        except Exception as error:
            if self.required or mode != "online":
                raise
            line = (str(error).strip().splitlines() or [""])[0]
            self.notice = (
                f"wandb's server could not be used ({type(error).__name__}: {line}): this run is recorded offline in "
                f"{run.root / 'wandb'}; `wandb sync` sends it later"
            )
            self.run = wandb.init(mode="offline", **arguments)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        values = dict(metrics)
        if self._ahead:
            values["global_step"] = step
        self._last = max(self._last, step + self._ahead)
        self.run.log(values, step=step + self._ahead)

    def roll_back(self, state: Mapping[str, Any], step: int) -> None:
        # wandb forgets nothing, and drops what comes with a smaller step than it has seen.
        self._ahead = max(self._ahead, self._last - step)
        self.run.log({"rolled_back_to": step}, step=self._last)

    def close(self, status: str) -> None:
        if self.run is not None:
            self.run.finish(exit_code=1 if status == "failed" else 0)
            self.run = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self.id, "ahead": self._ahead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.id = str(state.get("id", self.id))
        self._ahead = int(state.get("ahead", 0))


def _has_key(wandb: Any) -> bool:
    """Whether wandb would find a key without asking: in the environment, its session, or netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # before 0.2x it had no such argument
        return bool(wandb.api.api_key)
