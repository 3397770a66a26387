"""One row of a table gets one defect; its line, row and column must be named, whatever stands in the others."""

import gzip
import json
import tempfile
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.amazon import read_amazon, read_reviews
from data.custom import CustomData
from data.lines import place
from data.ml1m import read_ml1m
from data.ml32m import read_movielens

COLUMNS = ("user", "item", "note", "title", "timestamp")
titles = st.sampled_from(["plain", "", "é", "a, b", 'say "x"', "two\nlines", 'all, "of"\n\nit', '"', "x" * 200_000])
tables = st.lists(titles, min_size=4, max_size=12)


def encoded(value: str, separator: str) -> bytes:
    """A field by RFC 4180."""
    quoted = any(mark in value for mark in (separator, '"', "\n"))
    return ('"' + value.replace('"', '""') + '"' if quoted else value).encode()


def message(path: Path, content: bytes, items: bool) -> str:
    """What reading the table says. items: its titles are asked for, too."""
    path.write_bytes(content)
    data = {"items": str(path), "text_columns": ("title",), "item_key_column": "item"} if items else {}
    with pytest.raises(ValueError) as raised:
        CustomData("mine", str(path), **data).read()
    return str(raised.value)


# Column, what stands there and what is said; None: after all fields.
FIELDS = {
    "quote": ("title", b'15" TV', "'title': quotes must stand around the whole field"),
    "text after quotes": ("title", b'"TV" big', "'title': quotes must stand around the whole field"),
    "quotes never closed": ("title", b'"TV', "'title': quotes must stand around the whole field"),
    "bytes": ("title", b"caf\xe9", "'title': the bytes are not UTF-8"),
    "long": (None, b"more", "6 fields where the header has 5"),
    "no key": ("user", b" ", "'user' is empty"),
    "no time": ("timestamp", b"", "'timestamp' must be a number or an ISO date, not None"),
    "text": ("timestamp", b"soon", "'timestamp' must be a number or an ISO date, not 'soon'"),
    "number": ("timestamp", b"5", "'timestamp' must be an ISO date, as in most rows, not '5'"),
    "date": ("timestamp", b"2024-01-01", "'timestamp' must be a number, as in most rows, not '2024-01-01'"),
}


@settings(max_examples=120)
@given(tables, st.data(), st.sampled_from([*FIELDS]), st.sampled_from([",", "\t"]), st.booleans())
def test_the_line_of_a_bad_row_of_csv_is_named(drawn, data, defect, separator, items):
    column, bad, expected = FIELDS[defect]
    chosen = data.draw(st.integers(0, len(drawn) - 1))
    dates = defect == "number" or (defect != "date" and data.draw(st.booleans()))
    content, line, comma = separator.join(COLUMNS).encode() + b"\n", None, separator.encode()
    for number, title in enumerate(drawn):
        time = str(date(2024, 1, 1) + timedelta(number)) if dates else str(number)
        row = {"user": "u", "item": str(number), "note": drawn[number - 1], "title": title, "timestamp": time}
        fields = {name: encoded(value, separator) for name, value in row.items()}
        if number == chosen:
            fields[column] = bad
            before = comma.join([*fields.values()][: [*fields].index(column)])
            line = 1 + content.count(b"\n") + (before.count(b"\n") if column in ("title", None) else 0)
        content += comma.join(fields.values()) + b"\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("t.csv" if separator == "," else "t.tsv")
        assert message(path, content, items).startswith(f"{path}, line {line}, row {chosen + 1}: {expected}")


OBJECTS = {
    "bytes": (b'{"user": "\xe9", "item": "1", "timestamp": 1}', "the bytes are not UTF-8"),
    "cut": (b'{"user": "u", "item": "1", "timest', "no JSON: "),
    "two in a line": (b'{"user": "u", "item": "z", "timestamp": 1}' * 2, "no JSON: "),
    "no object": (b'["u", "z", 1]', "must be an object"),
    "object": (
        b'{"user": "u", "item": "z", "timestamp": {"at": 1}}',
        "'timestamp' must be a text or number, as in most",
    ),
    "truth": (b'{"user": "u", "item": "z", "timestamp": true}', "'timestamp' must be a text or number, as in most"),
    "no key": (b'{"item": "z", "timestamp": 1}', "'user' is empty"),
    "list": (b'{"user": ["u"], "item": "z", "timestamp": 1}', "'user' must be a text or number, not a list"),
    "id": (b'{"user": "u", "item": true, "timestamp": 1}', "'item' must be a text or number, not true or false"),
    "half a pair": (b'{"user": "u", "item": "\\ud800", "timestamp": 1}', "a text holds half a surrogate pair"),
    "no number": (b'{"user": "u", "item": "z", "timestamp": NaN}', "no JSON: NaN is not known there"),
    "infinite": (b'{"user": "u", "item": "z", "timestamp": 1e999}', "'timestamp' is beyond what a table can hold"),
    "null": (b'{"user": "u", "item": null, "timestamp": 1}', "'item' is empty"),
    "no time": (b'{"user": "u", "item": "z"}', "'timestamp' must be a number or an ISO date, not None"),
    "text": (
        b'{"user": "u", "item": "z", "timestamp": "soon"}',
        "'timestamp' must be a number or an ISO date, not 'so",
    ),
}


@settings(max_examples=60)
@given(tables, st.data(), st.sampled_from([*OBJECTS]))
def test_the_line_of_a_bad_row_of_json_lines_is_named(drawn, data, defect):
    bad, expected = OBJECTS[defect]
    chosen = data.draw(st.integers(0, len(drawn) - 1))
    lines, line = [], None
    for number, title in enumerate(drawn):
        lines += [b""] * (title == "")
        row = {"user": "u", "item": str(number), "timestamp": number, "title": title}
        lines.append(bad if number == chosen else json.dumps(row).encode())
        line = len(lines) if number == chosen else line
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        said = message(path, b"\n".join(lines) + b"\n", False)
        assert said.startswith(f"{path}, line {line}, row {chosen + 1}: {expected}")


def written(path: Path, rows: list[bytes]) -> None:
    path.write_bytes(gzip.compress(b"".join(rows)) if path.suffix == ".gz" else b"".join(rows))


MOVIES = {"movies.csv": b"movieId,title,genres\n7,Heat,A\n", "tags.csv": b"userId,movieId,tag,timestamp\n"}
SEQUENCES = {"datamaps.json": b'{"user2id": {"u": "1", "v": "2", "w": "3"}, "item2id": {"a": "1", "b": "2"}}'}
# Other formats: other files that must lie there, how one is read, its header and its row number n, counted from 1, and
# rows with a defect with what is said of them.
FORMATS = {
    "t.inter": (
        {},
        lambda path: CustomData("mine", str(path)).read(),
        b"user:token\titem:token\tnote:token_seq\ttimestamp:float\n",
        b'u\ti%d\tsay "x\t%d.5\n',
        {
            b"u\ti\tx\t1\t2\n": "5 fields where the header has 4",
            b"u\t\xe9\tx\t1\n": "'item:token': the bytes are not UTF-8",
            b"nan\ti\tx\t1\n": "'user' is empty",
            b"u\ti\tx\tnan\n": "'timestamp' must be a number or an ISO date, not None",
            b"u\ti\tx\t5 May\n": "'timestamp' must be a number or an ISO date, not '5 May'",
        },
    ),
    "ratings.csv": (
        MOVIES,
        lambda path: read_movielens(path.parent, "mine"),
        b"userId,movieId,rating,timestamp\n",
        b"%d,7,4.5,%d\n",
        {
            b"1,7,4.5\n": "3 fields where there must be 4",
            b"1,7,4.5,5,6\n": "5 fields where there must be 4",
            b"1,8,4.5,5\n": "movieId 8 is not among the movies",
            b"1,7,4.5,\xd9\xa1\n": "timestamp must be a number in plain digits",
            b"1,7,inf,5\n": "rating must be finite",
            b"1,7,4.5,soon\n": "timestamp must be a number, not 'soon'",
            b"1,7,4.5,99999999999999999999\n": "timestamp must be within 64 bits",
            b"\xe9,7,4.5,5\n": "the bytes are not UTF-8",
            b"\n": "0 fields where there must be 4",
        },
    ),
    "ratings.dat": (
        {"movies.dat": b"7::Heat::A\n"},
        lambda path: read_ml1m(path.parent, "mine"),
        b"",
        b"%d::7::5::%d\n",
        {
            b"1::7::5\n": "3 fields where there must be 4",
            b"1::7::5::5::\n": "5 fields where there must be 4",
            b"1:7:5:5\n": "1 fields where there must be 4",
            b"1::8::5::5\n": "movieId 8 is not among the movies",
            b"1::7::5::1_000\n": "timestamp must be a number in plain digits",
            b"1::7::5::soon\n": "timestamp must be a number, not 'soon'",
            b"1::7::5::99999999999999999999\n": "timestamp must be within 64 bits",
        },
    ),
    "reviews.json.gz": (
        {"meta.json.gz": gzip.compress(b"{'asin': 'i2'}\n")},
        lambda path: read_reviews(path, path.parent / "meta.json.gz", "mine"),
        b"",
        b'{"reviewerID": "u%d", "asin": "i", "unixReviewTime": %d}\n',
        {
            b'{"reviewerID": "u", "asin": "i"}\n': "reviewerID and asin must be strings",
            b'{"reviewerID": "u", "asin": "i", "unixReviewTime": 1e9}\n': "reviewerID and asin must be strings",
            b'{"reviewerID": "u", "asin": "i", "unixReviewTime": 9999999999999999999}\n': "within 64 bits",
            b'{"reviewerID": "\\ud800", "asin": "i", "unixReviewTime": 1}\n': "a text holds half a surrogate pair",
            b'{"reviewerID": "\xe9"}\n': "the bytes are not UTF-8",
            b"[1]\n": "must be an object",
            b"[" * 100_000 + b"\n": "no JSON: ",
            b'{"reviewerID": "u", "asin\n': "no JSON: ",
            b"\n": "no JSON: ",
        },
    ),
    "sequential_data.txt": (
        SEQUENCES | {"meta.json.gz": gzip.compress(b"{'asin': 'a'}\n")},
        lambda path: read_amazon(path.parent, "mine"),
        b"",
        b"%d 1 2 %d\n",
        {
            b"2 x\n": "",
            b"2 3\n": "item 3 is not one of 1 to 2",
            b"2\n": "user 2 has no items",
            b"\n": "a line starts with",
        },
    ),
    "meta.json.gz": (
        SEQUENCES | {"sequential_data.txt": b"1 1 2\n2 1\n3 2\n"},
        lambda path: read_amazon(path.parent, "mine"),
        b"",
        b"{'asin': 'a%d', 'price': %d.5}\n",
        {
            b"{'asin': open('x')}\n": "not a Python dict literal",
            b"{'title': 'x'}\n": "not a Python dict literal with an 'asin'",
            b"{'asin': 'x', 'price': 'low'}\n": "price",
            b"{'asin': '\xe9'}\n": "not a Python dict literal",
            b"(" * 100_000 + b"\n": "not a Python dict literal",
            b"\n": "not a Python dict literal",
        },
    ),
}


@settings(max_examples=150)
@given(st.data(), st.sampled_from([(name, bad) for name, found in FORMATS.items() for bad in found[-1]]))
def test_the_line_of_a_bad_row_of_other_formats_is_named(data, case):
    name, bad = case
    others, read, header, good, defects = FORMATS[name]
    sized = name == "sequential_data.txt"  # by its maps, and only user 2 has bad rows
    size = 3 if sized else data.draw(st.integers(1, 12))
    chosen = 1 if sized else data.draw(st.integers(0, size - 1))
    rows = [bad if n == chosen else good % ((n + 1,) * good.count(b"%d")) for n in range(size)]
    line = chosen + 1 + bool(header)
    with tempfile.TemporaryDirectory() as folder:
        for other, content in others.items():
            (Path(folder) / other).write_bytes(content)
        written(path := Path(folder) / name, [header, *rows])
        with pytest.raises(ValueError) as raised:
            read(path)
    row = f", row {chosen + 1}" if name == "t.inter" else ""
    assert str(raised.value).startswith(f"{path}, line {line}{row}: ") and defects[bad] in str(raised.value)


def test_rows_of_other_files_have_no_line(tmp_path):
    assert place(tmp_path / "t.parquet", 4) == ", row 5"
