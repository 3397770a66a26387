"""Checkpoints: a folder a step, written aside and renamed, nothing in it a pickle."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data.files import write_file
from modules.pretrained import to_cpu


@dataclass(frozen=True)
class Checkpoints:
    """The folder `checkpoints` of a run.

    Each checkpoint is `step_00012345/` with model.safetensors, optimizer.safetensors and state.json. The files
    LAST and BEST hold the name of one each; all others are removed.
    """

    folder: Path

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, best: bool = False
    ) -> None:
        """state: whatever JSON the training needs to go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step:08d}"
        aside = self.folder / f".{name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        tensors, groups = _flatten(optimizer.state_dict())
        write_file(aside / "model.safetensors", save(to_cpu(model.state_dict())))
        write_file(aside / "optimizer.safetensors", save(tensors))
        state = {"step": step, "param_groups": groups, **state}
        write_file(aside / "state.json", (json.dumps(state, indent=2) + "\n").encode())
        if (self.folder / name).exists():
            shutil.rmtree(self.folder / name)
        os.rename(aside, self.folder / name)
        for mark in ("BEST", "LAST") if best else ("LAST",):
            write_file(self.folder / mark, f"{name}\n".encode())
        self._remove_unmarked()

    def _remove_unmarked(self) -> None:
        kept = {self.marked("LAST"), self.marked("BEST")}
        for path in self.folder.glob("step_*"):
            if path not in kept:
                shutil.rmtree(path)

    def marked(self, mark: str) -> Path | None:
        """The checkpoint that LAST or BEST names; None where there is none."""
        file = self.folder / mark
        if not file.is_file():
            return None
        path = self.folder / file.read_text().strip()
        return path if path.is_dir() else None

    def best(self) -> Path:
        """The checkpoint that BEST names. FileNotFoundError where there is none."""
        path = self.marked("BEST")
        if path is None:
            raise FileNotFoundError(f"{self.folder} names no best checkpoint: was train.iterations 0?")
        return path


def load_model(path: Path, model: nn.Module) -> None:
    """Puts a checkpoint's weights into the model."""
    model.load_state_dict(load_file(path / "model.safetensors"))


def load_state(path: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Puts a checkpoint's optimizer state into the optimizer and returns its state.json."""
    state = json.loads((path / "state.json").read_text())
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        moments.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
    return state


def _flatten(state: dict) -> tuple[dict[str, Tensor], list[dict]]:
    tensors = {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, moments in state["state"].items()
        for name, value in moments.items()
    }
    return tensors, state["param_groups"]
