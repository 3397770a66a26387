"""Runs of one and of two processes: python -m tests.several FOLDER runs them into FOLDER/<name>/<rank>.

The processes of a run have different working directories, as on machines that share no disk.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed

import train_decoder
import train_rqvae
from modules.model import EncoderDecoderRetrievalModel
from tests.children import in_step, several
from tests.pipeline import run

COMMON = ("train.log_every = 1", 'train.save_dir_root = "run"')
DECODER = (
    *COMMON,
    "train.iterations = 20",
    "train.batch_size = 30",
    "train.learning_rate = 1e-3",
    "train.partial_eval_every = 10",
    "train.full_eval_every = 10",
    "train.eval_batch_size = 64",  # 7 batches of the 400 users, the last of 16
)
RQVAE = (*COMMON, "train.iterations = 20", "train.batch_size = 15", "train.refit_every = 10")
HALVES = {"decoder": "train.batch_size = 15", "rqvae": "train.batch_size = 8"}


def main(folder: Path) -> None:
    def outcome(name: str, n: int, stage: str, *extra: str, before=lambda rank: None) -> list[int]:
        def task(rank: int) -> None:
            here = folder / name / str(rank)
            here.mkdir(parents=True, exist_ok=True)
            os.chdir(here)
            before(rank)
            run(folder, stage, *{"decoder": DECODER, "rqvae": RQVAE}[stage], *extra)

        return several(n, task)

    def other_weights(rank: int) -> None:  # at the start of one process: the main one's count
        if rank == 1:
            for stage in (train_decoder, train_rqvae):
                stage.set_seed = lambda seed: set_seed(seed + 1)

    def stopped(rank: int) -> None:  # one process of two gets the signal
        if rank == 1:
            in_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def not_finite(rank: int) -> None:  # in one process of two
        if rank == 1:
            in_step(6, lambda: spoil_losses())

    for stage in ("decoder", "rqvae"):
        accumulated = (HALVES[stage], "train.gradient_accumulate_every = 2")
        extra = ("train.batch_size = 16",) if stage == "rqvae" else ()
        assert outcome(f"{stage}_one", 1, stage, *extra) == [0]
        assert outcome(f"{stage}_two", 2, stage, *extra, before=other_weights) == [0, 0]
        assert outcome(f"{stage}_accumulated", 1, stage, *accumulated) == [0]
    save = ("train.save_model_every = 3",)
    assert outcome("stopped", 2, "decoder", *save, before=stopped) == [143, 143]
    assert outcome("stopped", 2, "decoder", *save) == [0, 0]
    slow = ("train.log_every = 10", "train.save_model_every = 4")
    assert outcome("not_finite", 2, "decoder", *slow, before=not_finite) == [1, 1]


def spoil_losses() -> None:
    """Every loss from here on is not a number."""
    forward = EncoderDecoderRetrievalModel.forward

    def spoiled(self, *args):
        losses = forward(self, *args)
        return type(losses)(losses.loss * float("nan"), losses.items, losses.levels)

    EncoderDecoderRetrievalModel.forward = spoiled


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
