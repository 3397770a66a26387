"""A run that is killed 20 times: python -m tests.kills FOLDER STAGE runs STAGE there twice, into FOLDER/killed/STAGE
and, without kills, into FOLDER/straight/STAGE."""

import os
import random
import signal
import sys
from pathlib import Path

import torch

from tests.children import in_step, start, status
from tests.pipeline import run
from training.checkpoint import Checkpoints

STEPS, KILLS = 200, 20
EXTRA = {
    "rqvae": ("train.refit_every = 45", "RqVae.codebook_mode = %modules.quantize.QuantizeMode.GUMBEL_SOFTMAX"),
    "decoder": ("train.partial_eval_every = 30", "EncoderDecoderRetrievalModel.dropout = 0.1"),
}


def outcome(folder: Path, stage: str, root: Path, kill_at: int = 0, signum: int = 0) -> int:
    """Runs the stage in a child that sends itself the signal in its step number `kill_at`; its exit status."""

    def task() -> None:
        in_step(kill_at, lambda: os.kill(os.getpid(), signum))
        common = (f"train.iterations = {STEPS}", "train.save_model_every = 5", "train.log_every = 1")
        run(folder, stage, *common, *EXTRA[stage], f'train.save_dir_root = "{root}"')

    return status(start(task))


def main(folder: Path, stage: str) -> None:
    assert outcome(folder, stage, folder / "straight" / stage) == 0
    root = folder / "killed" / stage
    checkpoints = Checkpoints(root / "checkpoints")
    draw = random.Random(stage)
    for step in sorted(draw.sample(range(1, STEPS), KILLS)):
        newest = checkpoints.newest()
        first = int(newest.name.split("_")[1]) if newest else 0
        signum = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        ended = outcome(folder, stage, root, step - first, signum)
        assert ended == (-signum if signum == signal.SIGKILL else 128 + signum), (step, signum, ended)
        if signum != signal.SIGKILL:
            assert checkpoints.newest().name == f"step_{step:08d}"
    assert outcome(folder, stage, root) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
