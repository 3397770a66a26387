"""Weights & Biases, which may fail at any time without ending a run."""

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)
INIT_TIMEOUT, FINISH_TIMEOUT = 60.0, 300.0  # seconds


class Wandb:
    """One run on wandb, gone on with when the script resumes. WANDB_MODE=offline keeps it in the run folder. A server
    that does not answer turns the run offline; `wandb sync` sends it later. What fails after that is warned of once,
    and nothing more is sent."""

    def __init__(self, project: str, root: Path) -> None:
        import wandb

        id_file = root / "wandb" / "id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run, run_id = None, id_file.read_text()
        modes: tuple[Literal["offline"] | None, ...] = (None, "offline")  # None: online, or what WANDB_MODE says
        for mode in modes:
            try:
                limits = wandb.Settings(
                    init_timeout=INIT_TIMEOUT, login_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT
                )
                self._run = wandb.init(project=project, dir=root, id=run_id, resume="allow", mode=mode, settings=limits)
                return
            except Exception as error:  # its client raises types of its own, of the network and of the system
                logger.warning(f"wandb can't start{' offline' if mode else ''}: {error}")
                wandb.teardown()  # else the failed run would hold the id

    def _try(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            logger.warning(f"wandb failed and is left alone from here on: {error}")
            self._run = None

    def config(self, values: dict[str, Any]) -> None:
        """What the run was made with."""
        self._try(lambda run: run.config.update(values, allow_val_change=True))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Points of curves. Steps that a resumed run does again are there already, and ignored."""
        self._try(lambda run: run.log(values, step=step))

    def finish(self, summary: dict[str, float], status: int = 0) -> None:
        """summary: the final figures. status: the exit status of the run."""
        self._try(lambda run: run.summary.update(summary))
        self._try(lambda run: run.finish(exit_code=status))
