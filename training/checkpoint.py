"""Checkpoints: a folder per step, written aside and renamed, with checksums, nothing in it a pickle."""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.files import file_sha256, flush, folder_aside, write_file, write_tensors

logger = logging.getLogger(__name__)
MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"


class CheckpointData(NamedTuple):
    """What a checkpoint holds. moments: the optimizer's state, "<number of the parameter>.<name>" to tensor."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict


@dataclass(frozen=True)
class Checkpoints:
    """The folder `checkpoints` of a run.

    Each checkpoint is `step_00012345/` with model.safetensors, optimizer.safetensors, state.json and SHA256SUMS,
    which `sha256sum -c` reads too. A checkpoint exists once its folder has that name. The newest `keep` stay, and
    with each the best one of its time; the files LAST and BEST say which is which.
    """

    folder: Path
    keep: int = 3

    def save(self, step: int, model: nn.Module, optimizer: dict, state: dict, best: bool = False) -> None:
        """optimizer: its `state_dict`. state: whatever JSON the training needs to go on. best: later ones, too, name
        this one as the best.

        Raises OSError where the disk is full or fails; the checkpoints before stay as they are.
        """
        best_path = self.marked("BEST")
        best_step = step if best else _step(best_path) if best_path else None
        moments = {
            f"{number}.{name}": torch.as_tensor(value)
            for number, own in optimizer["state"].items()
            for name, value in own.items()
        }
        state = {"step": step, "best_step": best_step, **state, "param_groups": optimizer["param_groups"]}

        self._clear()
        path = self._path(step)
        with folder_aside(path) as part:  # in place of one of the step, if that was damaged
            write_tensors(part / MODEL, model.state_dict())
            write_tensors(part / OPTIMIZER, moments)
            write_file(part / STATE, (json.dumps(state, indent=2) + "\n").encode())
            sums = [f"{file_sha256(part / name)}  {name}\n" for name in (MODEL, OPTIMIZER, STATE)]
            write_file(part / SUMS, "".join(sums).encode())
        self.mark(path, best_step)
        flush(self.folder)
        self._remove_old(step)

    def mark(self, last: Path, best_step: int | None) -> None:
        """Writes LAST and BEST."""
        write_file(self.folder / "LAST", f"{last.name}\n".encode())
        if best_step is None:
            (self.folder / "BEST").unlink(missing_ok=True)
        else:
            write_file(self.folder / "BEST", f"{self._path(best_step).name}\n".encode())

    def marked(self, name: str) -> Path | None:
        """The checkpoint that LAST or BEST names; None where there is none."""
        file = self.folder / name
        path = self.folder / file.read_text().strip() if file.is_file() else None
        return path if path is not None and path.is_dir() else None

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, with a warning where newer ones are not; None where there are none.
        Raises ValueError where all are damaged."""
        paths = sorted(self.folder.glob("step_*"), reverse=True)
        problems: list[str] = []
        for path in paths:
            problem = damage(path)
            if problem is None:
                for line in problems:
                    logger.warning(f"{line}; going on from {path.name}, the one before.")
                return path
            problems.append(problem)
        if problems:
            raise ValueError("No checkpoint is whole; delete the folder to start anew:\n  " + "\n  ".join(problems))
        return None

    def resume(self, path: Path) -> CheckpointData:
        """Reads a checkpoint to go on from, and makes LAST and BEST those of its time. A best checkpoint that is
        damaged or gone is forgotten, with a warning: best_step None, best {}."""
        content = load(path)
        best_step = content.state["best_step"]
        problem = None if best_step is None else damage(self._path(best_step))
        if problem is not None:
            logger.warning(f"{problem}; it was the best one, which is now chosen among the evaluations to come.")
            best_step = None
            content.state.update(best_step=None, best={})
        self.mark(path, best_step)
        return content

    def best(self) -> Path:
        """The best checkpoint. FileNotFoundError where there is none, ValueError where it is damaged."""
        path = self.marked("BEST")
        if path is None:
            raise FileNotFoundError(f"{self.folder} names no best checkpoint: was train.iterations 0?")
        problem = damage(path)
        if problem is not None:
            raise ValueError(f"{problem}; it is the best checkpoint, and the run is over.")
        return path

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _remove_old(self, step: int) -> None:
        """Of the checkpoints up to `step` the newest and their best ones stay; later ones were damaged."""
        paths = {_step(path): path for path in self.folder.glob("step_*")}
        newest = sorted(number for number in paths if number <= step)[-self.keep :]
        kept = {*newest, *(_best_step(paths[number]) for number in newest)}
        for number, path in paths.items():
            if number not in kept:  # first the name goes, so that no folder of that name is ever half there
                os.rename(path, path.with_name(f".removed_{path.name}"))
        self._clear()

    def _clear(self) -> None:
        """Deletes what is removed, and what a process that was killed left aside."""
        for path in [*self.folder.glob(".step_*"), *self.folder.glob(".removed_*")]:
            shutil.rmtree(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    try:
        written = (path / SUMS).read_bytes()
        sums = []
        for name in (MODEL, OPTIMIZER, STATE):
            sums.append(f"{file_sha256(path / name)}  {name}\n".encode())
            if sums[-1] not in written:
                return f"Checkpoint {path} is damaged ({name} does not have the checksum in {SUMS})"
    except OSError as error:
        return f"Checkpoint {path} is damaged ({error})"
    return None if written == b"".join(sums) else f"Checkpoint {path} is damaged ({SUMS} is cut off or changed)"


def load(path: Path) -> CheckpointData:
    """Reads a checkpoint, onto the CPU."""
    return CheckpointData(load_file(path / MODEL), load_file(path / OPTIMIZER), json.loads((path / STATE).read_text()))


def load_optimizer(optimizer: torch.optim.Optimizer, content: CheckpointData) -> None:
    """Puts the optimizer's state into the optimizer. ValueError where it is of other parameters."""
    written, present = (
        [len(group["params"]) for group in groups] for groups in (content.state["param_groups"], optimizer.param_groups)
    )
    if written != present:
        raise ValueError(
            f"The optimizer in the checkpoint has groups of {written} parameters, that of this code of {present}: "
            "another version wrote it. Choose another train.save_dir_root, or delete the folder."
        )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in content.moments.items():
        number, name = key.split(".", 1)
        moments.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": content.state["param_groups"]})


def _step(path: Path) -> int:
    return int(path.name.split("_")[1])


def _best_step(path: Path) -> int | None:
    """The best step of a checkpoint's time; None where there is none, or the checkpoint is damaged."""
    try:
        return json.loads((path / STATE).read_text())["best_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
