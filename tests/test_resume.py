"""What a run survives, for both stages."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from modules.model import EncoderDecoderRetrievalModel
from tests.pipeline import REPOSITORY, lines, run, write_raw
from training import distributed


@pytest.mark.parametrize("stage", ["rqvae", "decoder"])
def test_a_run_killed_twenty_times_is_the_run_that_was_not(trained, tmp_path, stage):
    write_raw(tmp_path)
    shutil.copytree(trained / "out" / "rqvae" / "tokenizer", tmp_path / "out" / "rqvae" / "tokenizer")
    command = [sys.executable, "-m", "tests.kills", str(tmp_path), stage]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    straight, killed = tmp_path / "straight" / stage, tmp_path / "killed" / stage
    log = lines(killed / "metrics.jsonl")
    assert log == lines(straight / "metrics.jsonl")
    assert sum(row["split"] == "train" for row in log) == 200
    assert (killed / "metrics.json").read_bytes() == (straight / "metrics.json").read_bytes()
    for file in ("model.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step_00000200/{file}"
        assert (killed / path).read_bytes() == (straight / path).read_bytes()


def test_an_overflow_in_half_precision_skips_the_step_and_the_scale_is_resumed(trained, tmp_path, monkeypatch):
    """The scaler of fp16 on the CPU, begun at 2^127, of losses times 2^10: gradients overflow at first."""
    start, forward = distributed.start, EncoderDecoderRetrievalModel.forward

    def large(self, *arguments):
        losses = forward(self, *arguments)
        return type(losses)(losses.loss * 2**10, losses.items, losses.levels)

    def with_scaler(*arguments):
        accelerator = start(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    monkeypatch.setattr(distributed, "start", with_scaler)
    monkeypatch.setattr(EncoderDecoderRetrievalModel, "forward", large)
    common = ("train.log_every = 1", "train.save_model_every = 1", "train.keep_checkpoints = 200")
    common += ("train.full_eval_every = 0", "train.warmup_steps = 4")
    run(trained, "decoder", *common, "train.iterations = 20", f'train.save_dir_root = "{tmp_path}/straight"')
    root = tmp_path / "straight"
    rows = [row for row in lines(root / "metrics.jsonl") if row["split"] == "train"]
    scales = [math.log2(row["loss_scale"]) for row in rows]
    skipped = [before - after for before, after in zip([127, *scales], scales, strict=False)]
    assert set(skipped) == {0, 1} and skipped[0] == 1 and skipped[-1] == 0
    weights = [load_file(root / f"checkpoints/step_{n:08d}/model.safetensors") for n in range(1, 21)]
    for step, (one, two) in enumerate(zip(weights, weights[1:], strict=False), start=1):
        assert all(one[name].equal(two[name]) for name in one) == (skipped[step] == 1)
    assert [row["learning_rate"] for row in rows[:4]] == [0.0025, 0.005, 0.0075, 0.01]  # as if none were skipped

    root = tmp_path / "stopped"
    shutil.copytree(tmp_path / "straight", root)
    for step in range(8, 21):
        shutil.rmtree(root / f"checkpoints/step_{step:08d}")
    run(trained, "decoder", *common, "train.iterations = 20", f'train.save_dir_root = "{root}"')
    assert lines(root / "metrics.jsonl") == lines(tmp_path / "straight" / "metrics.jsonl")


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_gone_on_from(trained, tmp_path, monkeypatch):
    root, fsync = tmp_path / "run", os.fsync
    common = ("train.iterations = 20", "train.save_model_every = 5", f'train.save_dir_root = "{root}"')

    def full(descriptor: int) -> None:
        if (root / "checkpoints" / ".step_00000015").exists():
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(trained, "decoder", *common)
    monkeypatch.undo()
    assert (root / "checkpoints" / "LAST").read_text() == "step_00000010\n"
    run(trained, "decoder", *common)
    assert json.loads((root / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20


def test_a_damaged_newest_checkpoint_is_done_again(trained, tmp_path, capsys):
    root = tmp_path / "run"
    common = ("train.iterations = 40", "train.save_model_every = 10", f'train.save_dir_root = "{root}"')
    metrics = run(trained, "decoder", *common)
    file = root / "checkpoints" / "step_00000040" / "optimizer.safetensors"
    whole, log = file.read_bytes(), lines(root / "metrics.jsonl")
    file.write_bytes(whole[: len(whole) // 2])
    assert run(trained, "decoder", *common) == metrics
    assert "step_00000040 is damaged" in capsys.readouterr().err
    assert file.read_bytes() == whole and lines(root / "metrics.jsonl") == log


def test_the_number_of_checkpoints_must_be_positive(trained, tmp_path):
    with pytest.raises(ValueError, match="train.keep_checkpoints = 0: Input should be greater than 0"):
        run(trained, "decoder", "train.keep_checkpoints = 0", f'train.save_dir_root = "{tmp_path}/run"')
    assert not (tmp_path / "run").exists()
