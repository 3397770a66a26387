"""The folder of a run: its config, its log, its checkpoints, its final figures."""

import json
import math
import time
from pathlib import Path
from typing import Any, cast

import gin
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from common.files import in_turn, lock, naming, write_file
from data.corpus import Corpus
from data.processed import RecDataset, load_corpus
from data.splits import Splits, draw_splits
from training.checkpoint import MODEL, STATE, CheckpointData, Checkpoints, load_optimizer
from training.distributed import checkpoint_from_main, from_main, tensors_from_main
from training.tracking import Wandb

ABSENT = "not there"
# Arguments of `train` with which a run can be continued whatever they were: what they name is known by its content,
# or they change what a run writes or shows, never what its steps compute.
RESUME_MAY_CHANGE = set(
    "dataset dataset_folder dataset_split split features categories pretrained_rqvae_path pretrained_rqvae_revision "
    "encode_catalogue text_model save_dir_root save_model_every keep_checkpoints log_every eval_batch_size resume "
    "wandb_logging wandb_project force_dataset_process min_usage collapse_is_error sasrec_baseline item_columns "
    "push_vae_to_hf vae_hf_model_name push_to_hf hf_model_name".split()
)


def load_splits(
    dataset: RecDataset,
    folder: str,
    name: str,
    split: str,
    force: bool,
    accelerator: Accelerator,
    as_cached: bool = False,
) -> tuple[Corpus, Splits]:
    """The corpus of `load_corpus` as one to train on, and its splits; force: process it anew."""
    with in_turn():
        corpus = load_corpus(dataset, folder, name, force and accelerator.is_local_main_process, as_cached)
    splits = draw_splits(split, corpus.interactions)
    corpus.apply_split(splits)
    return corpus, splits


class Run:
    """Everything a run leaves under `save_dir_root`. Only the main process reads or writes there, and no other run. A
    folder that holds a run of equal values is continued; one with others is left alone."""

    def __init__(self, root: str, settings: dict[str, Any], inputs: dict[str, str], accelerator: Accelerator) -> None:
        """settings: the arguments of `train`. inputs: what identifies the data and artifacts the run reads. Raises
        ValueError where another process is at work in the folder, or where it holds any run if `resume` is off, or
        damaged checkpoints only."""
        self.root, self.accelerator = Path(root), accelerator
        self.settings, self._inputs = settings, inputs
        self._wandb: Wandb | None = None
        self.is_main = accelerator.is_main_process
        self.checkpoints = Checkpoints(self.root / "checkpoints", settings["keep_checkpoints"])
        if not self.is_main:
            return
        self._lock = lock(self.root / ".lock", "Wait until it has ended, or choose another train.save_dir_root.").lock
        self._last = self.checkpoints.newest()
        if self._last is not None and not settings["resume"]:
            raise ValueError(
                f"{self.root} already holds a run. Choose another train.save_dir_root, delete the folder, or "
                "continue it with train.resume = True."
            )

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Continues from the newest checkpoint: model, optimizer and loss scale are those of then. Returns its state:
        "step", how many are done (0: a new run), and "best", the metrics of the best checkpoint. Raises ValueError
        where it was made with other values or inputs, or where the processes of a launch differ."""
        values = {f"train.{name}": value for name, value in self.settings.items() if name not in RESUME_MAY_CHANGE}
        of_model = cast(dict[str, Any], model.config)
        values |= {f"{type(model).__name__}.{name}": value for name, value in of_model.items()}
        self.config = json.loads(json.dumps(values | self._inputs))  # what must be the same for a run to be continued
        if self.config != from_main(self.config):
            raise ValueError(
                f"Process {self.accelerator.process_index} has another config or other inputs than the main process "
                f"({self._inputs}): copy the dataset folder and the semantic IDs from one machine to the others."
            )
        content = checkpoint_from_main(self._continued(model) if self.is_main else None, self.accelerator)
        if content is None:
            return {"step": 0, "best": {}}
        model.load_state_dict(content.weights)
        load_optimizer(optimizer, content)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content.state["scaler"])
        return content.state

    def _continued(self, model: nn.Module) -> CheckpointData | None:
        """The checkpoint to go on from, and the log up to its step; None in a new run. Raises as `restore` does."""
        content = None
        if self._last is not None:
            before, now = json.loads((self._last / STATE).read_text())["config"], self.config
            names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            if names:
                lines = "\n".join(f"  {name}: {before.get(name, ABSENT)} -> {now.get(name, ABSENT)}" for name in names)
                raise ValueError(
                    f"{self.root} holds a run with another config:\n{lines}\n"
                    "Choose another train.save_dir_root, or delete the folder."
                )
            content = self.checkpoints.resume(self._last)
            if other := sorted(content.weights.keys() ^ model.state_dict().keys()):
                raise ValueError(
                    f"{self.root} holds a run of an earlier version, whose weights differ in {other[0]}. Choose "
                    "another train.save_dir_root, or delete the folder."
                )
        if (file := self.root / "metrics.jsonl").exists():  # later steps will be written again
            step = -1 if content is None else content.state["step"]
            lines = [line for line in file.read_text(errors="replace").split("\n") if step_of(line) <= step]
            write_file(file, "".join(f"{line}\n" for line in lines).encode())
        return content

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, float], improved: bool
    ) -> None:
        """Writes a checkpoint. best: metrics of the best one, which is this one if `improved`."""
        optimizer_state = optimizer.state_dict()  # on every process, of which each may hold a part
        if self.is_main:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            state = {"config": self.config, "scaler": scaler, "best": best}
            self.checkpoints.save(step, model, optimizer_state, state, improved)

    def load_best(self, model: nn.Module) -> None:
        """Puts the weights of the best checkpoint into the model."""
        weights = load_file(self.checkpoints.best() / MODEL) if self.is_main else None
        model.load_state_dict(tensors_from_main(weights, self.accelerator))

    def save_config(self) -> None:
        """Writes config.gin: every value in force, once all that reads the config has been made."""
        if self.is_main:
            write_file(self.root / "config.gin", gin.operative_config_str().encode())
            if self.settings["wandb_logging"]:
                self._wandb = Wandb(self.settings["wandb_project"], self.root)
                self._wandb.config({**self.config, "gin": gin.operative_config_str()})

    def log(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl. On a GPU it says the most memory of it that this process has had so far:
        of tensors, and all that torch held for them."""
        if not self.is_main:
            return
        if self.accelerator.device.type == "cuda":
            tensors, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            metrics = metrics | {"gpu_memory_gib": tensors / 2**30, "gpu_held_gib": held / 2**30}
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "split": split, "time": round(time.time(), 3), **row}
        with naming(file := self.root / "metrics.jsonl"), open(file, "a") as file:
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
        """Ends the wandb run and leaves the folder. summary: its final table; status: exit status, 0 if all is well."""
        if self._wandb is not None:
            self._wandb.finish(summary or {}, status)
        if self.is_main:
            self._lock.release(force=True)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity where a crash has cut or spoilt it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
