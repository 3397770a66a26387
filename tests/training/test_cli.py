import importlib
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from gin.utils import augment_exception_message_and_reraise

from training import cli

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
        (["configs/rqvae_sample.gin", "--gin", 'train.dataset_split = "books"'], "= 'books' must be '' for"),
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


def test_the_log_is_shown_where_a_script_asks_for_it():
    lines = ("log.info('hidden')", "cli.show_log()", "cli.show_log()", "log.info('100 % done')", "log.warning('odd')")
    code = "\n".join(["import logging", "from training import cli", "log = logging.getLogger('data.custom')", *lines])
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("100 % done\n", "warning: odd\n")


@pytest.mark.parametrize("stage", ["rqvae", "decoder"])
def test_every_config_binds_parameters_that_exist(stage):
    """In a process that has only what the script imports."""
    configs = sorted(str(path) for path in (REPOSITORY / "configs").glob(f"{stage}_*.gin"))
    assert len(configs) >= 5
    parse = "gin.clear_config(), gin.parse_config_file(config)"
    code = f"import gin, train_{stage}\nfor config in {configs}: {parse}"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("k = 0"), "error: k = 0"),
        (KeyError("x"), "error: KeyError: 'x' (--traceback shows where)"),
        (RuntimeError("one\ntwo"), "error: RuntimeError: one (--traceback shows where)"),
        (OSError(28, "No space left on device", "a"), "error: a: No space left on device"),
        (OSError(17, "File exists", "a"), "error: a: there is a file where a folder must be"),
        (OSError(20, "Not a directory", "a/b"), "error: a/b: there is a file where a folder must be"),
        (OSError(21, "Is a directory", ".a", None, "a"), "error: a: there is a folder, not a file"),
        (ConnectionError("no network"), "error: no network"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_what_ends_a_script_is_one_line_and_its_traceback_if_asked_for(error, said, tmp_path, capsys):
    def work() -> None:
        try:
            raise error
        except Exception as raised:  # as gin does
            augment_exception_message_and_reraise(raised, "\n  In call to configurable 'train'")

    for part in (None, tmp_path / "none", tmp_path):
        with pytest.raises(SystemExit) as ended:
            cli.guarded(work, False, part)
        assert ended.value.code == (130 if said == "stopped" else 1)
        left = f"What was written so far is in {tmp_path}.\n" if part == tmp_path else ""
        assert capsys.readouterr().err == f"{said}\n{left}"
    with pytest.raises(type(error)):
        cli.guarded(work, True)


@pytest.mark.parametrize(("name", "count"), [("recommend", 7), ("update_catalogue", 0), ("inspect_ids", 3)])
def test_a_wrong_value_of_an_option_is_named(name, count, monkeypatch, capsys):
    script, parsers, wrong = importlib.import_module(name), [], []
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(ArgumentParser, "parse_args", lambda parser: parsers.append(parser) or sys.exit())
        script.parse()
    for action in parsers[0]._actions:
        values = ["many", ""] + ["1.5"] * (action.type is int)
        wrong += [
            (action.option_strings[0], value) for value in values if action.type in (int, float) or action.choices
        ]
    assert len(wrong) == count
    for option, value in wrong:
        monkeypatch.setattr(sys, "argv", [name, option, value])
        with pytest.raises(SystemExit) as ended:
            script.main()
        said = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and f"argument {option}: invalid" in said and repr(value) in said


def test_output_that_nobody_reads_any_more_ends_the_script_in_silence():
    code = "from training.cli import guarded\nguarded(lambda: [print('line', flush=True) for _ in range(10**6)], False)"
    command = f'"{sys.executable}" -c "{code}" | head -n 1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("line\n141\n", "")
