"""Several processes give the result of one: tests.several has the runs."""

import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from data.shuffle import Shuffler
from tests.pipeline import REPOSITORY, lines, write_raw
from training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    write_raw(folder)
    shutil.copytree(trained / "out" / "rqvae" / "tokenizer", folder / "out" / "rqvae" / "tokenizer")
    command = [sys.executable, "-m", "tests.several", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stderr").write_text(done.stderr)
    return folder


def difference(one, two, last_step: int) -> float:
    """The largest of a loss, relative, between two logs of the same steps up to last_step."""
    pairs = list(zip(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"), strict=True))
    assert all((a["step"], a["split"], a.keys()) == (b["step"], b["split"], b.keys()) for a, b in pairs)
    pairs = [pair for pair in pairs if pair[0]["step"] <= last_step]
    return max(abs(a[name] / b[name] - 1) for a, b in pairs for name in a if "loss" in name)


@pytest.mark.parametrize("stage", ["decoder", "rqvae"])
@pytest.mark.parametrize("name", ["two", "accumulated"])
def test_the_losses_are_those_of_one_process_and_one_batch(folder, stage, name):
    one, other = (folder / f"{stage}_{kind}" / "0" / "run" for kind in ("one", name))
    assert 0 < difference(one, other, 10) < 2e-6
    assert difference(one, other, 20) < 1e-4  # Adam and ReLU make rounding grow, faster on some processors


def test_two_processes_rank_every_user_once_and_exactly_as_one(folder):
    one, two = (folder / f"decoder_{kind}" / "0" / "run" for kind in ("one", "two"))
    assert (one / "metrics.json").read_bytes() == (two / "metrics.json").read_bytes()


def test_only_the_main_process_writes(folder):
    assert [path.name for path in (folder / "decoder_two" / "1").iterdir()] == []
    assert [path.name for path in (folder / "rqvae_two" / "1").iterdir()] == []


def test_a_signal_to_one_process_stops_both_and_they_go_on_from_the_main_ones_disk(folder):
    stopped, straight = folder / "stopped" / "0" / "run", folder / "decoder_two" / "0" / "run"
    assert lines(stopped / "metrics.jsonl") == lines(straight / "metrics.jsonl")
    one, two = (load_file(root / "pipeline" / "model.safetensors") for root in (stopped, straight))
    assert all(one[name].equal(two[name]) for name in one)
    assert list((folder / "stopped" / "1").iterdir()) == []


def test_a_loss_that_is_not_finite_in_one_process_stops_both_and_reaches_no_checkpoint(folder):
    message = (folder / "stderr").read_text()
    index, _ = Shuffler(400, 30, seed=0).draw(6)
    samples = " ".join(map(str, index[:10].tolist()))
    expected = f"not finite in step 7. Its batch has the 30 training samples {samples} ... (data.shuffle: "
    assert message.count(expected + "Shuffler(400, 30, 0).draw(6)). The last checkpoint is run/") == 2
    newest = Checkpoints(folder / "not_finite" / "0" / "run" / "checkpoints").newest()
    assert newest.name == "step_00000004"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())
