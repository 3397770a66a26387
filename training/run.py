"""The folder of a run: its config, its log, its checkpoints, its final figures."""

import ast
import json
import math
import time
from pathlib import Path
from typing import Any

import gin
import torch
from accelerate import Accelerator
from torch import nn

from data.files import write_file
from training.checkpoint import Checkpoints, load_optimizer, load_weights
from training.distributed import content_from_main, from_main, tensors_from_main
from training.tracking import Wandb

# Parameters that change what a run writes or shows, never what it computes.
FREE = {
    "save_dir_root",
    "save_model_every",
    "keep_checkpoints",
    "log_every",
    "eval_batch_size",
    "resume",
    "wandb_logging",
    "wandb_project",
    "dataset_folder",
    "force_dataset_process",
    "min_usage",
    "collapse_is_error",
    "push_vae_to_hf",
    "vae_hf_model_name",
    "mirrors",  # of `Downloads`, and where the tables of `CustomData` lie: the corpus is known by its hash
    "attempts",
    "interactions",
    "items",
    "text_model",
}


class Run:
    """Everything a run leaves under `save_dir_root`. Only the main process reads or writes there.

    A folder that holds a run with the same config is continued; one with another config is left alone.
    """

    def __init__(
        self,
        root: str,
        inputs: dict[str, str],
        accelerator: Accelerator,
        keep_checkpoints: int,
        wandb_project: str | None,
        resume: bool,
    ) -> None:
        """inputs: what identifies the data and artifacts the run reads. wandb_project: None logs to files only.

        Raises ValueError where the folder holds a run with another config, any run if `resume` is off, or damaged
        checkpoints only; or where the processes of a launch don't read the same inputs.
        """
        if keep_checkpoints < 1:
            raise ValueError(f"train.keep_checkpoints is {keep_checkpoints}; at least 1 must be kept to go on from.")
        self.root, self._accelerator = Path(root), accelerator
        self.is_main = accelerator.is_main_process
        self.checkpoints = Checkpoints(self.root / "checkpoints", keep_checkpoints)
        self.config = {**bindings(), **inputs}  # what must be the same for a run to be continued
        if self.config != from_main(self.config):
            raise ValueError(
                f"Process {accelerator.process_index} has another config or other inputs than the main process "
                f"({inputs}): copy the dataset folder and the semantic IDs from one machine to the others."
            )
        self._last, self._wandb = None, None  # the content of the newest checkpoint, until `restore`
        if not self.is_main:
            return
        last = self.checkpoints.newest()
        if last is not None:
            self._check_resumable(last, resume)
            self._last = self.checkpoints.resume(last)
        self.root.mkdir(parents=True, exist_ok=True)
        self._forget_after(-1 if self._last is None else self._last.state["step"])
        if wandb_project is not None:
            self._wandb = Wandb(wandb_project, self.root)

    def _check_resumable(self, last: Path, resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"{self.root} already holds a run. Choose another train.save_dir_root, delete the folder, or "
                "continue it with train.resume = True."
            )
        before = json.loads((last / "state.json").read_text())["config"]
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

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Continues from the newest checkpoint: model, optimizer and loss scale are those of then.

        Returns its state: "step", how many are done (0: a new run), and "best", the metrics of the best checkpoint.
        """
        content, self._last = content_from_main(self._last, self._accelerator), None
        if content is None:
            return {"step": 0, "best": {}}
        model.load_state_dict(content.weights)
        load_optimizer(optimizer, content)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(content.state["scaler"])
        return content.state

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, float], improved: bool
    ) -> None:
        """Writes a checkpoint. best: metrics of the best one, which is this one if `improved`."""
        if self.is_main:
            scaler = self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else None
            state = {"config": self.config, "scaler": scaler, "best": best}
            self.checkpoints.save(step, model, optimizer, state, improved)

    def load_best(self, model: nn.Module) -> None:
        """Puts the weights of the best checkpoint into the model."""
        weights = load_weights(self.checkpoints.best()) if self.is_main else None
        model.load_state_dict(tensors_from_main(weights, self._accelerator))

    def save_config(self) -> None:
        """Writes config.gin: every value in force, once all that reads the config has been made."""
        if self.is_main:
            write_file(self.root / "config.gin", gin.operative_config_str().encode())
        if self._wandb is not None:
            self._wandb.config({**values_in_force(), "gin": gin.operative_config_str()})

    def log(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl."""
        if not self.is_main:
            return
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "split": split, "time": round(time.time(), 3), **row}
        with open(self.root / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(step, {f"{split}/{name}": value for name, value in metrics.items()})

    def finish(self, metrics: dict[str, float]) -> None:
        """Writes metrics.json and closes the log."""
        if not self.is_main:
            return
        write_file(self.root / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
        self.close(metrics)

    def close(self, summary: dict[str, float] | None = None, status: int = 0) -> None:
        """Ends the wandb run. summary: its final table; status: the exit status, 0 if all went well."""
        if self._wandb is not None:
            self._wandb.finish(summary or {}, status)


def bindings() -> dict[str, str]:
    """What the config binds, except what changes no result: {"train.batch_size": "64", ..}."""
    pairs = _pairs(gin.config_str(max_line_length=10**6))
    return {key: value for key, value in pairs.items() if key.split(".")[-1] not in FREE}


def values_in_force() -> dict[str, Any]:
    """All parameters that were read, defaults as well: {"train.batch_size": 64, ..}; references stay text."""
    result = {}
    for key, value in _pairs(gin.operative_config_str(max_line_length=10**6)).items():
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = value
    return result


def _pairs(config: str) -> dict[str, str]:
    lines = (line.split(" = ", 1) for line in config.splitlines() if " = " in line and not line.startswith("#"))
    return dict(lines)
