import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_help_says_how_to_use_the_script():
    done = run("train_decoder.py", "--help")
    assert done.returncode == 0
    assert "python train_decoder.py configs/decoder_sample.gin" in done.stdout
    assert "--gin" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.gin"], "configs/none.gin"),
        (["configs/rqvae_sample.gin", "--gin", "train.iteration = 5"], "doesn't have a parameter named 'iteration'"),
        (["configs/rqvae_sample.gin", "--gin", "RqVae.n_levels = 5"], "doesn't have a parameter named 'n_levels'"),
        (["configs/rqvae_sample.gin", "--gin", "Rqvae.n_layers = 5"], "No configurable matching 'Rqvae'"),
        (["configs/rqvae_sample.gin", "--gin", 'train.dataset_split = "books"'], "must be '', not 'books'"),
        (["configs/rqvae_amazon.gin", "--gin", 'train.dataset_split = "books"'], "'beauty' or 'sports' or 'toys'"),
        (["configs/rqvae_amazon.gin", "--gin", 'train.dataset_folder = "nowhere"'], "nowhere/raw/beauty"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message, tmp_path):
    folder = ["--gin", f'train.save_dir_root = "{tmp_path}/run"']
    if not any("dataset_folder" in argument for argument in arguments):
        folder += ["--gin", f'train.dataset_folder = "{tmp_path}/data"']
    done = run("train_rqvae.py", *arguments, *folder)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert not (REPOSITORY / "nowhere").exists()
