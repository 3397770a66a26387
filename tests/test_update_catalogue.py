"""Items into and out of a trained pipeline, by the script."""

import json
import sys

import polars as pl
import pytest
from huggingface_hub import ModelCard

import update_catalogue
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from tests.pipeline import N_ITEMS


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs update_catalogue.py in this process: exit status or message, standard output."""

    def run(*arguments) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["update_catalogue.py", *map(str, arguments)])
        try:
            status = update_catalogue.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_items_come_and_go(suffix, trained, tmp_path, script):
    rows = [{"sku": "901", "name": "red ball", "colour": "red"}, {"sku": "902", "name": "blue lamp", "colour": "blue"}]
    items, gone, out = tmp_path / f"items{suffix}", tmp_path / "gone.txt", tmp_path / "new"
    if suffix == ".jsonl":
        items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        getattr(pl.DataFrame(rows), f"write_{suffix[1:]}")(items)
    gone.write_text("item04\n\nitem29\n")
    columns = ["--key", "sku", "--text", "name", "colour", "--categories", "colour"]
    status, printed, _ = script(trained / "out" / "decoder", "--add", items, "--remove", gone, "--out", out, *columns)
    assert status is None, status
    assert printed == f"{N_ITEMS} items - 2 + 2 = {N_ITEMS} -> {out}\n"
    [found] = Recommender.from_pretrained(out).recommend([["item01", "901"]], k=N_ITEMS, exclude_seen=False)
    titles = {item.key: item.title for item in found.items}
    assert not found.unknown and len(titles) == N_ITEMS and not {"item04", "item29"} & set(titles)
    assert (titles["901"], titles["902"]) == ("red ball", "blue lamp")
    assert (out / "config.gin").read_bytes() == (trained / "out" / "decoder" / "config.gin").read_bytes()


def test_a_folder_without_a_tokenizer_can_only_remove(trained, tmp_path, script):
    """And the new folder has a card of its own, and the terms."""
    folder, out = tmp_path / "old", tmp_path / "new"
    Pipeline.load(trained / "out" / "decoder").save(folder)
    (folder / "GROUPLENS.txt").write_text("terms")
    (items := tmp_path / "items.csv").write_text("key,text\n901,red ball\n")
    status, _, error = script(folder, "--add", items, "--out", out)
    assert status == 1 and error.startswith(
        f"error: {folder} holds no tokenizer/, which gives new items their IDs, so it"
    )
    (gone := tmp_path / "gone.txt").write_text("item04\nitem29\n")
    assert script(folder, "--remove", gone, "--out", out)[0] is None
    card = ModelCard.load(out / "README.md")
    assert f"the next of {N_ITEMS - 2} items of amazon_beauty" in card.text and "## Metrics" not in card.text
    assert card.data.eval_results is None and card.data.datasets == ["amazon_beauty"]
    assert (out / "GROUPLENS.txt").read_text() == "terms" and not (out / "config.gin").exists()


def test_bad_input_is_one_line(trained, tmp_path, script):
    pipeline, items = trained / "out" / "decoder", tmp_path / "items.csv"
    items.write_text("key,text\nitem01,red ball\n")
    (tmp_path / "gone.txt").write_text("nothing")
    for arguments, message in (
        (["--add", items, "--out", tmp_path / "new"], "'item01' is in the catalogue already"),
        (["--add", items, "--out", tmp_path / "new", "--key", "id"], "items.csv has no column 'id'"),
        (["--remove", tmp_path / "gone.txt", "--out", tmp_path / "new"], "1 keys to remove are not in the catalogue"),
        (["--remove", tmp_path / "none.txt", "--out", tmp_path / "new"], "none.txt is missing"),
        (["--add", items, "--out", tmp_path], "is there already: name a new folder"),
    ):
        status, _, error = script(pipeline, *arguments)
        assert status == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert script(pipeline, "--out", tmp_path / "new")[0] == 2
