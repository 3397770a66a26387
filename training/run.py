"""The folder of a run: its config, its log, its final figures."""

import json
import math
import time
from pathlib import Path

import gin

from data.files import write_file
from training.checkpoint import Checkpoints

# Parameters that change what a run writes or shows, never what it computes.
FREE = {
    "save_dir_root",
    "save_model_every",
    "log_every",
    "eval_batch_size",
    "resume",
    "wandb_logging",
    "wandb_project",
    "dataset_folder",
    "force_dataset_process",
}


class Run:
    """Everything a run leaves under `save_dir_root`. Only the main process writes.

    A folder that holds a run with the same config is continued; one with another config is left alone.
    """

    def __init__(
        self, root: str, inputs: dict[str, str], is_main: bool, wandb_project: str | None, resume: bool
    ) -> None:
        """inputs: what identifies the data and artifacts the run reads. wandb_project: None logs to files only.

        Raises ValueError where the folder holds a run with another config, or any run if `resume` is off.
        """
        self.root, self.is_main = Path(root), is_main
        self.checkpoints = Checkpoints(self.root / "checkpoints")
        self.config = {**bindings(), **inputs}  # what must be the same for a run to be continued
        self.last = self.checkpoints.marked("LAST")
        if self.last is not None:
            self._check_resumable(resume)
        self._wandb = None
        if is_main:
            self.root.mkdir(parents=True, exist_ok=True)
            self._forget_after(-1 if self.last is None else int(self.last.name.split("_")[1]))
            if wandb_project is not None:
                import wandb

                self._wandb = wandb.init(project=wandb_project, dir=str(self.root), config={"gin": gin.config_str()})

    def _check_resumable(self, resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"{self.root} already holds a run. Choose another train.save_dir_root, delete the folder, or "
                "continue it with train.resume = True."
            )
        before = json.loads((self.last / "state.json").read_text())["config"]
        now = self.config
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            lines = "\n".join(f"  {key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}" for key in changed)
            raise ValueError(
                f"{self.root} holds a run with another config:\n{lines}\n"
                "Choose another train.save_dir_root, or delete the folder."
            )

    def _forget_after(self, step: int) -> None:
        """Drops log lines of later steps, which this run will write again."""
        file = self.root / "metrics.jsonl"
        if file.exists():
            lines = file.read_text().split("\n")[:-1]  # what follows the last line end was cut off by a crash
            lines = [line for line in lines if json.loads(line)["step"] <= step]
            write_file(file, "".join(f"{line}\n" for line in lines).encode())

    def save_config(self) -> None:
        """Writes config.gin: every value in force, once all that reads the config has been made."""
        if self.is_main:
            write_file(self.root / "config.gin", gin.operative_config_str().encode())

    def log(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl."""
        if not self.is_main:
            return
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "split": split, "time": round(time.time(), 3), **row}
        with open(self.root / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def finish(self, metrics: dict[str, float]) -> None:
        """Writes metrics.json and the operative config, closes the log."""
        if not self.is_main:
            return
        write_file(self.root / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
        if self._wandb is not None:
            self._wandb.summary.update(metrics)
            self._wandb.finish()


def bindings() -> dict[str, str]:
    """What the config binds, except what changes no result: {"train.batch_size": "64", ..}."""
    lines = gin.config_str(max_line_length=10**6).splitlines()
    pairs = (line.split(" = ", 1) for line in lines if " = " in line and not line.startswith("#"))
    return {key: value for key, value in pairs if key.split(".")[-1] not in FREE}
