"""What a run survives, for both stages."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.pipeline import REPOSITORY, lines, write_raw


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
