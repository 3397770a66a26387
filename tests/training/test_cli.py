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
        (["configs/rqvae_sample.gin", "--gin", "RqVae.n_layers = 0"], "RqVae.n_layers = 0: Input should be greater"),
        (["configs/rqvae_sample.gin", "--gin", 'train.dataset_split = "books"'], "must be '', not 'books'"),
        (["configs/rqvae_amazon.gin", "--gin", 'train.dataset_split = "books"'], "'beauty' or 'sports' or 'toys'"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message, tmp_path):
    folder = ["--gin", f'train.save_dir_root = "{tmp_path}/run"', "--gin", f'train.dataset_folder = "{tmp_path}/data"']
    done = run("train_rqvae.py", *arguments, *folder)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_connection_it_says_which_files_to_put_where(tmp_path):
    names = ("P5_data.zip", "reviews_Beauty_5.json.gz", "meta_Beauty.json.gz")
    bindings = [f"Downloads.mirrors = { {name: ['http://no.invalid/'] for name in names} }"]
    bindings += [f'train.dataset_folder = "{tmp_path}/data"', f'train.save_dir_root = "{tmp_path}/run"']
    done = run("train_rqvae.py", "configs/rqvae_amazon.gin", *(part for one in bindings for part in ("--gin", one)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path}/data/raw/beauty/meta.json.gz" in done.stderr and "or meta_Beauty" not in done.stderr
    assert f"or reviews_Beauty_5.json.gz, meta_Beauty.json.gz into {tmp_path}/data/raw/beauty." in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["rqvae", "decoder"])
def test_every_config_binds_parameters_that_exist(stage):
    """In a process that has only what the script imports."""
    configs = sorted(str(path) for path in (REPOSITORY / "configs").glob(f"{stage}_*.gin"))
    assert len(configs) >= 5
    parse = "gin.clear_config(), gin.parse_config_file(config)"
    code = f"import gin, train_{stage}\nfor config in {configs}: {parse}"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
