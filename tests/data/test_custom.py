import datetime
import json
import re
import tempfile
from pathlib import Path

import gin
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.custom import CustomData
from data.processed import RecDataset, load_corpus

HEAD = "user,item,timestamp\n"
SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")


def read(folder: Path, rows: str | bytes, items: str | None = None, **options):
    """The corpus of CSV files without their interactions' header."""
    rows = rows.encode() if isinstance(rows, str) else rows
    (folder / "events.csv").write_bytes(HEAD.encode() + rows)
    if items is not None:
        (folder / "items.csv").write_text(items)
        options["items"] = str(folder / "items.csv")
    return CustomData("mine", str(folder / "events.csv"), **options).read()


def histories(corpus) -> dict[str, list[str]]:
    items, offsets = corpus.interactions.items.tolist(), corpus.interactions.offsets.tolist()
    rows = [items[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    return {user: [corpus.item_keys[n] for n in row] for user, row in zip(corpus.user_keys, rows, strict=True)}


def write(path: Path, rows: list[dict]) -> None:
    frame = pl.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        frame.write_csv(path, separator="," if path.suffix == ".csv" else "\t")


ids = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=3)
events = st.lists(
    st.tuples(ids | st.sampled_from(["u", "007"]), st.integers(0, 5), st.integers(-5, 5)), min_size=1, max_size=40
)


@settings(max_examples=25)
@given(events, st.booleans())
def test_every_kind_of_file_gives_the_sequences_of_sorting_by_time(drawn, drop_duplicates):
    rows = [{"who": user, "what": f"i,{item}", "when": time} for user, item, time in drawn]
    expected = {}
    for row in list({tuple(row.items()): row for row in rows}.values()) if drop_duplicates else rows:
        expected.setdefault(row["who"], []).append((row["when"], row["what"]))
    columns = {"user_column": "who", "item_column": "what", "time_column": "when", "drop_duplicates": drop_duplicates}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path = Path(folder) / f"events{suffix}"
            write(path, rows)
            corpus = CustomData("mine", str(path), **columns).read()
            times = [time for user in expected for time, _ in sorted(expected[user], key=lambda pair: pair[0])]
            assert histories(corpus) == {
                user: [item for _, item in sorted(pairs, key=lambda pair: pair[0])] for user, pairs in expected.items()
            }
            assert corpus.user_keys == list(expected) and corpus.interactions.timestamps.tolist() == times
            assert corpus.item_keys == list(dict.fromkeys(row["what"] for row in rows))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40), st.integers(2, 4))
def test_the_k_core_is_what_removing_row_by_row_leaves(pairs, k):
    left = list(pairs)
    while True:
        users, items = [user for user, _ in left], [item for _, item in left]
        bad = next((n for n, (u, i) in enumerate(left) if users.count(u) < k or items.count(i) < k), None)
        if bad is None:
            break
        left.pop(bad)
    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(f"u{user},i{item},{time}\n" for time, (user, item) in enumerate(pairs))
        if not left:
            with pytest.raises(ValueError, match=f"no interaction is left of {len(pairs)}"):
                read(Path(folder), rows, k_core=k)
            return
        expected = {}
        for user, item in left:
            expected.setdefault(f"u{user}", []).append(f"i{item}")
        assert histories(read(Path(folder), rows, k_core=k)) == expected


def test_ids_stay_strings_and_users_with_one_item_and_items_without_any_stay(tmp_path):
    items = "item,title\n007,Bond\n7,Seven\n1e3,Thousand\nnew,Never seen\n"
    corpus = read(tmp_path, "01,7,5\n1,007,1\n01,1e3,2\n", items, text_columns=("title",))
    assert histories(corpus) == {"01": ["1e3", "7"], "1": ["007"]}
    assert corpus.item_keys == ["007", "7", "1e3", "new"] and corpus.texts()[3] == "Never seen."


def test_texts_and_categories(tmp_path):
    items = 'item,title,brand,genres\na,Blue  shoe,Acme,x|y| x\nb,,,\nc,Done!,"B, C",y\nd, ,D.,\n'
    options = {"text_columns": ("title", "brand"), "category_column": "genres"}
    corpus = read(tmp_path, "u,a,1\n", items, **options)
    assert corpus.texts() == ["Blue shoe. Brand: Acme.", "Unknown item.", "Done! Brand: B, C.", "Brand: D."]
    assert corpus.categories() == [["x", "y"], [], ["y"], []]
    rows = [{"item": "a", "tags": ["p", "q", None, ""], "n": 3}, {"item": "b", "tags": [], "n": None}]
    for suffix in (".jsonl", ".parquet"):
        write(tmp_path / f"items{suffix}", rows)
        data = {"items": str(tmp_path / f"items{suffix}"), "text_columns": ("tags", "n"), "category_column": "tags"}
        corpus = CustomData("mine", str(tmp_path / "events.csv"), **data).read()
        assert corpus.categories() == [["p", "q"], []]
        assert corpus.texts() == ["p, q. N: 3.", "Unknown item."]


def test_times_may_be_dates_fractions_or_the_order_of_the_rows(tmp_path):
    dates = "u,a,2020-03-01\nu,b,2020-02-29 23:59:59.5\nu,c,2020-03-01T00:30:00+01:00\nu,d,2020-02-29T10:00\n"
    corpus = read(tmp_path, dates)
    assert histories(corpus) == {"u": ["d", "c", "b", "a"]}
    assert corpus.interactions.timestamps.diff().tolist() == [48_600, 1_799, 1]
    corpus = read(tmp_path, "u,a,1.75\nu,b,1.25\nu,c,-0.5\n")
    assert histories(corpus) == {"u": ["c", "b", "a"]} and corpus.interactions.timestamps.tolist() == [-1, 1, 1]
    corpus = read(tmp_path, "u,b,x\nv,a,\nu,a,x\nu,b,x\n", time_column="")
    assert histories(corpus) == {"u": ["b", "a", "b"], "v": ["a"]} and corpus.interactions.timestamps is None
    frame = pl.DataFrame({"user": ["u"] * 2, "item": ["a", "b"], "timestamp": [5, 4]})
    berlin = pl.col("timestamp").cast(pl.Datetime("ms")).dt.replace_time_zone("Europe/Berlin")
    frame.with_columns(berlin).write_parquet(tmp_path / "events.parquet")
    corpus = CustomData("mine", str(tmp_path / "events.parquet")).read()
    assert histories(corpus) == {"u": ["b", "a"]} and corpus.interactions.timestamps.tolist() == [-3600, -3600]


def test_recboles_atomic_files_are_read_as_they_are(tmp_path):
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (tmp_path / "a.inter").write_text(inter + "7\t2\t3\t30\n7\t10\t1\t20.5\n007\t2\tnan\t5\n")
    titles = ["10\tNew York New York\t1977\tDrama Musical", '2\t"Q&A\tnan\tnan', "3\t\t\tDrama"]
    head = "item_id:token\ttitle:token_seq\tyear:token\tclass:token_seq"
    (tmp_path / "a.item").write_text("\n".join([head, *titles]) + "\n")
    names = {"user_column": "user_id", "item_column": "item_id", "items": f"{tmp_path}/a.item"}
    texts = {"text_columns": ("title", "year", "class"), "category_column": "class"}
    corpus = CustomData("mine", f"{tmp_path}/a.inter", **names, **texts).read()
    assert histories(corpus) == {"7": ["10", "2"], "007": ["2"]} and corpus.item_keys == ["10", "2", "3"]
    expected = ["New York New York. Year: 1977. Class: Drama Musical.", '"Q&A.', "Class: Drama."]
    assert corpus.texts() == expected and corpus.interactions.timestamps.tolist() == [20, 30, 5]
    assert corpus.categories() == [["Drama", "Musical"], [], ["Drama"]]
    for content, message in (
        ("user_id\titem_id:token\ttimestamp:float\n", "column 'user_id' must be a name with a type (token, token_seq"),
        (inter.replace("item_id", "item"), "has no column 'item_id'; its columns are user_id, item, rating, timestamp"),
        (inter.replace("\trating:float", "") + '7\t"2\t3\t4\n', "line 2, row 1: 4 fields where the header has 3"),
        (inter + "7\tnan\t3\t4\n", "row 1: 'item_id' is empty"),
    ):
        (tmp_path / "a.inter").write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            CustomData("mine", f"{tmp_path}/a.inter", **names).read()
        assert str(raised.value).startswith(f"{tmp_path}/a.inter")


def test_json_objects_are_histories_by_user_and_rows_by_item(tmp_path):
    inter, item = tmp_path / "a.inter.json", tmp_path / "a.item.json"
    inter.write_text('{"5": [2, 10, 2],\n "a": ["10"], "none": []}')
    corpus = CustomData("mine", str(inter)).read()
    assert histories(corpus) == {"5": ["2", "10", "2"], "a": ["10"]} and corpus.item_keys == ["2", "10"]
    assert corpus.interactions.timestamps is None
    item.write_text('{"10": {"title": "Ten", "tags": ["x", "y"]}, "2": {"title": "Two", "price": 3}, "3": {}}')
    corpus = CustomData("mine", str(inter), str(item), text_columns=("title", "price"), category_column="tags").read()
    assert corpus.item_keys == ["10", "2", "3"] and corpus.texts() == ["Ten.", "Two. Price: 3.", "Unknown item."]
    assert corpus.categories() == [["x", "y"], [], []]
    for content, message in (
        ('{"5": [2, null]}', ", row 2: 'item' is empty"),
        ('{"5": [2, 4]}', ", row 2: item '4' is not in "),
        ('{"5": {"title": "x"}}', " has no column 'item'"),
        (
            '{"5": [2], "6": {}}',
            ' must hold an object of lists, {"user": ["item", ...], ...}, or of objects, {"item": ',
        ),
        ('{"5": []}', " must hold an object of lists"),
        ("[[2]]", " must hold an object of lists"),
        ('{"5": [2', " can't be read as JSON: "),
        ('{"5": ' + "[" * 100_000, " can't be read as JSON: "),
        ('{"5": [2], "5": [10]}', " can't be read as JSON: '5' is in it twice"),
        ('{"5": [2, [10]]}', ", row 2: 'item' must be a text or number, not a list"),
        ('{"5": [2, {"id": 10}]}', ", row 2: 'item' must be a text or number, not an object"),
        ('{"5": ["\\ud800"]}', ": "),
    ):
        inter.write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"{inter}{message}")):
            CustomData("mine", str(inter), str(item)).read()


def test_what_is_left_out_is_counted(tmp_path, capsys):
    rows = "u,a,1\nu,a,1\nu,z,2\nu,b,3\nv,a,1\nv,a,2\n"
    corpus = read(tmp_path, rows, "item\na\nb\n", drop_unknown=True, k_core=2)
    assert histories(corpus) == {"v": ["a", "a"]} and corpus.item_keys == ["a", "b"]
    output = capsys.readouterr().out
    for count, why in ((1, "with items that are not in the catalogue"), (1, "that repeat another"), (2, "outside")):
        assert f"left out {count} of 6 rows {why}" in output


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name, content in (
        ("a.csv", HEAD + "u,a,1\n"),
        ("a.inter", "user:token\titem:token\ttimestamp:float\nu\ta\t1\n"),
        ("a.jsonl", '{"user": "u", "item": "a", "timestamp": 1}\n'),
        ("a.json", '{"u": ["a"]}'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert histories(CustomData("mine", str(tmp_path / name)).read()) == {"u": ["a"]}


def test_a_history_of_ten_thousand_items(tmp_path):
    rows = "".join(f"u,i{n % 3000},{10_000 - n}\n" for n in range(10_000))
    assert histories(read(tmp_path, rows))["u"] == [f"i{n % 3000}" for n in reversed(range(10_000))]


BAD = [
    ("u,a,1\n,b,2\n", "row 2: 'user' is empty"),
    ("u,a,1\nu, ,2\n", "row 2: 'item' is empty"),
    ("u,a,1\nu,b,\n", "row 2: 'timestamp' must be a number or an ISO date, not None"),
    ("u,a,1\nu,b\n", "row 2: 'timestamp' must be"),
    ("u,a,1\nu,b,soon\n", "row 2: 'timestamp' must be a number or an ISO date, not 'soon'"),
    ("u,a,1.5\nu,b,nan\n", "row 2: 'timestamp' must be"),
    ("u,a,1.5\nu,b,inf\n", "row 2: 'timestamp' must be"),
    ("u,a,1\nu,z,2\nv,z,1\n", "row 2: item 'z' is not in "),
    ("u,a,1\nu,b,2,3\n", "line 3, row 2: 4 fields where the header has 3"),
    (b"u,a,1\nu,\xe9,2\n", "line 3, row 2: 'item': the bytes are not UTF-8"),
    ('u,a,1\nu,"b,2\n', "line 3, row 2: 'item': quotes must"),
    ("", "no interaction is left of 0"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_odd_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(tmp_path, rows, "item\na\nb\n")
    assert str(tmp_path / "events.csv") in str(raised.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("timestamp", [datetime.time(11)], "'timestamp' must hold numbers or dates, not Time"),
        ("timestamp", [[1]], "'timestamp' must hold numbers or dates, not List"),
        ("timestamp", [None], "'timestamp' must hold numbers or dates, not Null"),
        ("user", [[1]], "'user' must hold ids, not List"),
        ("item", [{"id": 1}], "'item' must hold ids, not Struct"),
    ],
)
def test_columns_of_another_type_are_named(tmp_path, column, values, message):
    frame = pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": [1], column: values})
    frame.write_parquet(tmp_path / "events.parquet")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'events.parquet'}: {message}")):
        CustomData("mine", str(tmp_path / "events.parquet")).read()


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ("item\na\nb\na\n", {}, "row 3: item 'a' has a row already"),
        ('item\na\n""\n', {}, "row 2: 'item' is empty"),
        ("item\n", {}, "there must be an item"),
        ("id\na\n", {}, "has no column 'item'; its columns are id"),
        ("item\na\n", {"text_columns": ("title",)}, "has no column 'title'"),
    ],
)
def test_odd_catalogues_are_named(tmp_path, items, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(tmp_path, "u,a,1\n", items, **options)
    assert str(tmp_path / "items.csv") in str(raised.value)


def test_other_files_and_parameters_are_refused(tmp_path):
    for name, content, message in (
        ("events.xls", b"x", "must end with one of .csv"),
        ("events.jsonl", b'{"user": "u"\n', "line 1, row 1: no JSON"),
        ("events.jsonl", b'{"user": "\xff"}\n', "line 1, row 1: the bytes are not UTF-8"),
        ("events.parquet", b"PAR1", "can't be read as parquet"),
        ("events.jsonl", b"\n", "holds no row"),
        (
            "events.jsonl",
            b'{"user": "u\\u0000", "item": "a", "timestamp": "\\ud800"}\n',
            "a text holds half a surrogate pair",
        ),
        ("events.csv", HEAD.encode("utf-16"), "line 1, the header: the bytes are not UTF-8"),
        ("events.inter", b"a:token\n".decode().encode("utf-16"), "line 1, the header: the bytes are not UTF-8"),
        ("events.csv", b"user,item,timestamp\ru,a,1\r", "line 1, the header: lines must end with"),
        ("events.csv", b"user, item,timestamp\n", "has no column 'item'; its columns are user, ' item', timestamp"),
        ("events.csv", b"user,item,timestamp,item\nu,a,1,b\n", "two columns are called 'item'"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            CustomData("mine", str(tmp_path / name)).read()
    (tmp_path / "events.csv").write_text(HEAD + "u,a,1\n")
    pl.DataFrame({"item": ["a"], "title": [{"en": "A"}]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="items.parquet: 'title' must hold texts, numbers or lists"):
        CustomData("mine", f"{tmp_path}/events.csv", f"{tmp_path}/items.parquet", category_column="title").read()
    with pytest.raises(FileNotFoundError, match="nowhere.csv is missing"):
        CustomData("mine", str(tmp_path / "nowhere.csv")).read()
    with pytest.raises(ValueError, match="'user' can't be the column of two things, of user, user, timestamp"):
        CustomData("mine", str(tmp_path / "events.csv"), item_column="user").read()
    for name in ("", "a/b", "..", ".x", "a\0", "x" * 101):
        with pytest.raises(ValueError, match="must do as a folder's name"):
            CustomData(name)
    (tmp_path / "events.csv").write_text(HEAD + "u,a,1\n")
    with pytest.raises(ValueError, match="columns of CustomData.items"):
        CustomData("mine", str(tmp_path / "events.csv"), text_columns=("title",)).read()


def test_the_second_stage_needs_the_name_alone_and_changes_are_noticed(tmp_path, capsys):
    """Stage 1 binds everything, stage 2 the name; other columns are another corpus."""
    (tmp_path / "events.csv").write_text(HEAD.replace("\n", ",when\n") + "u,a,1,2\nu,b,2,1\n")

    def load(*bindings: str, stage: int = 1):
        gin.parse_config(["CustomData.name = 'mine'", *bindings])
        try:
            return load_corpus(RecDataset.CUSTOM, str(tmp_path), as_cached=stage == 2)
        finally:
            gin.clear_config()

    whole = f"CustomData.interactions = '{tmp_path}/events.csv'"
    with pytest.raises(ValueError, match="run train_rqvae.py with it first"):
        load()
    built = load(whole)
    assert built.name == "mine" and load().hash == load(whole).hash == built.hash
    assert capsys.readouterr().out == ""
    changed = load(whole, "CustomData.time_column = 'when'")
    assert changed.hash != built.hash == load(whole).hash
    assert capsys.readouterr().out.count("built anew, because time_column changed") == 2  # there and back
    core = load(whole, "CustomData.k_core = 1", "CustomData.user_column = 'user'")
    for bindings in ((), (whole,), (whole, "CustomData.k_core = 1"), ("CustomData.time_column = 'timestamp'",)):
        assert load(*bindings, stage=2).hash == core.hash, "what is not bound is as in stage 1"
    for name, here, there in (("k_core", 0, 1), ("time_column", "when", "timestamp"), ("items", "x.csv", None)):
        message = f"CustomData.{name} = {here!r}, but the corpus in {tmp_path}.* was made with {there!r}: leave it out"
        with pytest.raises(ValueError, match=message):
            load(whole, f"CustomData.{name} = {here!r}", stage=2)
    capsys.readouterr()
    (tmp_path / "events.csv").write_text(HEAD + "u,a,1\n")
    with pytest.raises(ValueError, match="run train_rqvae.py with it first"):
        load()
    changed = load(stage=2)
    assert changed.hash != built.hash and capsys.readouterr().out.count("built anew, because ") == 1
    (tmp_path / "events.csv").unlink()
    assert load().hash == load(stage=2).hash == changed.hash
