"""One row of a table gets one defect; its line, row and column must be named, whatever stands in the others."""

import json
import tempfile
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.custom import CustomData
from data.lines import place

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


@settings(max_examples=120, deadline=None)
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
    "null": (b'{"user": "u", "item": null, "timestamp": 1}', "'item' is empty"),
    "no time": (b'{"user": "u", "item": "z"}', "'timestamp' must be a number or an ISO date, not None"),
    "text": (
        b'{"user": "u", "item": "z", "timestamp": "soon"}',
        "'timestamp' must be a number or an ISO date, not 'so",
    ),
}


@settings(max_examples=60, deadline=None)
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


def test_rows_of_other_files_have_no_line(tmp_path):
    assert place(tmp_path / "t.parquet", 4) == ", row 5"
