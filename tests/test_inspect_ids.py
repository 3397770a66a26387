"""The script on a trained run."""

import sys

import polars as pl
import pytest

import inspect_ids
from data.corpus import Corpus
from data.splits import leave_one_out
from modules.tokenizer.semids import SemanticIds
from tests.pipeline import COLOURS, N_USERS, THINGS


@pytest.fixture
def inspect(monkeypatch, capsys):
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["inspect_ids.py", *map(str, arguments)])
        inspect_ids.main()
        return capsys.readouterr().out

    return run


def test_a_run_gets_its_page_and_the_table_of_ids(trained, inspect, tmp_path):
    printed = inspect(trained / "out" / "decoder", "--out", tmp_path)
    ids = SemanticIds.load(trained / "out" / "rqvae")
    codes = ids.codes.tolist()
    assert sum(line.count(" items  ") for line in printed.splitlines()) == len({row[0] for row in codes})
    for table, cells in (
        (pl.read_parquet(tmp_path / "ids.parquet"), codes),
        (pl.read_csv(tmp_path / "ids.csv"), ["-".join(map(str, row)) for row in codes]),
    ):
        assert table["item"].to_list() == ids.item_keys and table["semantic_id"].to_list() == cells
        assert table["title"][7] == f"{COLOURS[1]} {THINGS[1]}"
    html = (tmp_path / "page.html").read_text()
    corpus = Corpus.load(trained / "processed" / "amazon_beauty")
    assert len(leave_one_out(corpus.interactions).test) == N_USERS
    assert f"{N_USERS:,} held-out histories" in html and "Calibration</h2>" in html


def test_a_pipeline_alone_takes_histories_from_a_file(trained, inspect, tmp_path):
    pipeline = trained / "out" / "decoder" / "pipeline"
    assert "no calibration" in inspect(pipeline, "--out", tmp_path)
    file = tmp_path / "own.csv"
    file.write_text("user,items\na,item01|item08\nb,item02|none\n")
    assert "no calibration" not in inspect(pipeline, "--out", tmp_path, "--histories", file)
    html = (tmp_path / "page.html").read_text()
    assert "1 held-out histories" in html and "1 more histories are unknown" in html


def test_an_item_is_shown_with_its_neighbours(trained, inspect):
    ids = SemanticIds.load(trained / "out" / "rqvae")
    printed = inspect(trained / "out" / "decoder", "--item", "item03", "--k", 50)
    own = ids.codes[3]
    assert f"ID {'-'.join(map(str, own.tolist()))}" in printed
    rows = [line.split() for line in printed.partition("Neighbours")[2].splitlines()[1:]]
    shared = {row[2]: int(row[0]) for row in rows}
    same = (ids.codes == own).long().cumprod(1).sum(1).tolist()
    assert shared == {key: n for key, n in zip(ids.item_keys, same, strict=True) if n and key != "item03"}


def test_bad_input_is_one_line(trained, inspect, capsys, tmp_path):
    (tmp_path / "file").touch()
    for arguments, status, message in (
        (["--item", "nothing"], 1, "error: --item nothing: there is no such key"),
        (["--item", "item03", "--k", 0], 1, "error: --k 0 must be 1 or more."),
        (["--out", tmp_path / "file"], 1, f"error: {tmp_path}/file: there is a file where a folder must be"),
        (["--histories", "h.csv"], 2, "--histories are for the page: give --out"),
    ):
        with pytest.raises(SystemExit) as ended:
            inspect(trained / "out" / "decoder", *arguments)
        assert ended.value.code == status and message in capsys.readouterr().err.splitlines()[-1]
