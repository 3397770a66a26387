"""Histories from every kind of file."""

import json
import logging
from pathlib import Path

import polars as pl
import pytest
import torch

from common.schemas import Interactions
from data import histories
from data.corpus import Corpus
from data.histories import read_histories

ROWS = {"a": ["item01", "item08"], "b": [], "7": ["item03", "nothing", "item03"]}


def write_histories(folder: Path, kind: str) -> Path:
    """ROWS as lists, or one interaction a row, not in the order of time, where 'b' has none."""
    form, suffix = kind.split()
    path = folder / f"histories{suffix}"
    users, lists = [*ROWS][:2] + [7], list(ROWS.values())
    if form == "lists" and suffix == ".parquet":
        pl.DataFrame({"user": [*ROWS], "items": lists}, schema_overrides={"items": pl.List(pl.String)}).write_parquet(
            path
        )
    elif form == "lists" and suffix == ".jsonl":
        path.write_text("".join(json.dumps({"user": u, "items": i}) + "\n" for u, i in zip(users, lists, strict=True)))
    elif form == "lists":
        separator = "\t" if suffix == ".tsv" else ","
        lines = [separator.join([user, " | ".join(items)]) for user, items in ROWS.items()]
        path.write_text("\ufeff" + "\r\n".join([separator.join(["user", "items"]), *lines]))
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        events = [(time, user, item) for user, items in ROWS.items() for time, item in enumerate(items)]
        frame = pl.DataFrame(sorted(events, reverse=True), schema=["timestamp", "user", "item"], orient="row")
        {".csv": frame.write_csv, ".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}[suffix](path)
    return path


def all_rows(path: Path, **options) -> dict[str, list[str]]:
    """{user: keys} of all chunks, in which no user is twice."""
    found = [pair for users, items in read_histories(path, **options) for pair in zip(users, items, strict=True)]
    assert len(dict(found)) == len(found)
    return {user: list(items) if items is not None else [] for user, items in found}


KINDS = ["lists .csv", "lists .tsv", "lists .jsonl", "lists .parquet"]
KINDS += ["rows .csv", "rows .jsonl", "rows .parquet", "rows .json"]


@pytest.mark.parametrize("kind", KINDS)
def test_histories_come_from_every_kind_of_file(kind, tmp_path):
    path = write_histories(tmp_path, kind)
    expected = {user: items for user, items in ROWS.items() if items or kind.startswith("lists")}
    assert all_rows(path) == all_rows(path, size=1) == expected
    assert all_rows(path, only={"7", "none"}) == {"7": ROWS["7"]}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_chunk_has_so_many_histories_and_keys(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(histories, "MAX_KEYS", 20)
    path, frame = tmp_path / f"h{suffix}", pl.DataFrame({"user": range(9), "items": [[1] * 50, *[[2]] * 8]})
    frame.write_parquet(path) if suffix == ".parquet" else frame.write_ndjson(path)
    sizes = [(len(users), sum(map(len, items))) for users, items in read_histories(path, size=3)]
    assert sum(users for users, _ in sizes) == 9 and max(users for users, _ in sizes) <= 3
    assert sizes[0] == (1, 50)


def test_numbers_are_keys_as_text_has_them(tmp_path):
    frame = pl.DataFrame({"user": [1.0, 2.5], "items": [[1.0, 2.0], [0.5]]})
    frame.write_parquet(path := tmp_path / "h.parquet")
    assert all_rows(path) == {"1": ["1", "2"], "2.5": ["0.5"]}
    frame[:1].cast({"user": pl.Int64, "items": pl.Array(pl.Int64, 2)}).write_parquet(path)
    assert all_rows(path) == {"1": ["1", "2"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("h.csv", "", "empty CSV"),
        ("h.csv", "user,items\n", "holds no history"),
        ("h.csv", "user,thing\na,1\n", "has no column 'items', .* its columns are user, thing"),
        ("h.csv", "user,items\na,1,2\n", "line 2, row 1: 3 fields where the header has 2"),
        ("h.csv", "user,items\na,1\n,2\n", "row 2: there is no 'user'"),
        ("h.csv", "user,item,timestamp\na,1,never\n", "row 1: 'timestamp' must be a number"),
        ("h.tsv", "items\n1\n", "has no column 'user'; its columns are items"),
        ("h.jsonl", '{"user": 1, "items": ["a"]}\n{"user"\n', "row 2: "),
        ("h.jsonl", '{"user": 1, "items": ["a"]}\n{"user": 2}\n', "row 2: there is no 'items'"),
        ("h.jsonl", '{"user": 1, "items": 5}\n', "row 1: 'items' must be a list"),
        ("h.jsonl", '{"user": 1, "items": [["a"]]}\n', "row 1: 'items' must be a list"),
        ("h.jsonl", '{"user": [1], "items": ["a"]}\n', "row 1: 'user' must be a key"),
        ("h.jsonl", '{"user": 1, "thing": 5}\n', "has no column 'item'"),
        ("h.jsonl", "\n", "holds no history"),
        ("h.jsonl", '{"user": 1, "items": ["a"]}\n{"user": "\\ud800"}\n', "line 2, row 2: a text holds half a"),
        ("h.jsonl", '{"user": 1, "items": ["a"]}\n{"user": %s}\n' % ("9" * 5000), "line 2, row 2: no JSON: Exceeds"),
        ("h.csv", "user,items,user\na,1,b\n", "two columns are called 'user'"),
        ("h.csv", "user,items\ra,1\r", "line 1, the header: lines must end with"),
        ("h.jsonl", "[1]\n", "row 1: must be an object"),
        ("h.csv", "user,items\na,1\nb,[1 260]\n", r"line 3, row 2: 'items' must be keys with \| .* not '\[1 260\]'"),
        ("h.csv", "user,items\nb,['a' 'b']\n", r"row 1: 'items' must be keys .* or a list such as \[1, 260\]"),
        ("h.csv", 'user,items\nb,"[[1], 2]"\n', "row 1: 'items' must be keys"),
        ("h.jsonl", '{"user": 1, "items": "[NaN]"}\n', "row 1: 'items' must be keys"),
        ("h.parquet", "text", "can't be read as parquet"),
        ("h.txt", "text", "must end with one of"),
    ],
)
def test_bad_histories_are_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_histories(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_text_may_be_a_list_as_json_and_pandas_write_it(suffix, tmp_path):
    texts = {
        "a": "[1, 260]",
        "b": "['b c', \"it's\", 7.0]",
        "c": '["\\u00e9|"]',
        "d": "[]",
        "e": "1 260",
        "f": "x | [y]",
    }
    frame = pl.DataFrame({"user": [*texts], "items": [*texts.values()]})
    path = tmp_path / f"h{suffix}"
    frame.write_csv(path) if suffix == ".csv" else frame.write_ndjson(path)
    expected = {"a": ["1", "260"], "b": ["b c", "it's", "7"], "c": ["é|"], "d": [], "e": ["1 260"], "f": ["x", "[y]"]}
    assert all_rows(path) == expected


def test_a_cached_corpus_has_the_histories_of_its_users(tmp_path):
    made = Interactions(torch.tensor([2, 0, 1], dtype=torch.int32), torch.tensor([0, 2, 3]), None)
    for name in ("one", "two"):
        corpus = Corpus.build(name, made, ["x", "y", "z"], ["7", "b"], ["text"] * 3, [[]] * 3)
        corpus.save(tmp_path / "processed" / name)
        expected = {"7": ["z", "x"], "b": ["y"]}
        folders = [tmp_path / "processed" / name, *[tmp_path] * (name == "one")]
        for folder in folders:
            assert all_rows(folder) == all_rows(folder, size=1) == expected
            assert all_rows(folder, only={"b"}) == {"b": ["y"]}
    for folder, columns, message in (
        (tmp_path, histories.COLUMNS, "holds several corpora: name one of .*one, .*two"),
        (tmp_path / "processed", histories.COLUMNS, "processed holds no cached corpus: name a file"),
        (folders[0], ("u", "i", "t"), "two is a corpus, whose columns have no names: leave out u i t"),
    ):
        with pytest.raises(ValueError, match=message):
            all_rows(folder, columns=columns)


def test_a_column_of_times_that_is_named_must_be_there(tmp_path, caplog):
    (path := tmp_path / "h.csv").write_text("user,item,when\na,1,2\na,2,1\n")
    assert all_rows(path, columns=("user", "item", "when")) == {"a": ["2", "1"]}
    with caplog.at_level(logging.WARNING, "data"):
        assert all_rows(path) == {"a": ["1", "2"]}
    [told] = caplog.messages
    assert told == f"{path} has no column 'timestamp': each user's rows are taken to be in time order"
    with pytest.raises(ValueError, match="has no column 'time'; its columns are user, item, when"):
        all_rows(path, columns=("user", "item", "time"))


def test_a_column_that_holds_no_lists_is_named(tmp_path):
    for items, kind in (([5], "Int64"), ([[{"key": 1}]], "List.Struct")):
        pl.DataFrame({"user": ["a"], "items": items}).write_parquet(path := tmp_path / "h.parquet")
        with pytest.raises(ValueError, match=f"h.parquet: 'items' must be a list of item keys, not {kind}"):
            list(read_histories(path))
