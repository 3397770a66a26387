"""Where the rows of a text file lie, and which of them can't be read. Slow: asked only where something is wrong."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
LINES = (".jsonl", ".ndjson")
ATOMIC = (".inter", ".item")  # RecBole's, which know no quotes
QUOTED = rb'"[^"]*+(?:""[^"]*+)*+'  # without the closing quote
KINDS = {dict: "an object", list: "a list", bool: "true or false"}


def rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number of the first line, from 1, and bytes of each row, with the header if there is one."""
    quotes = path.suffix in SEPARATORS and path.suffix not in ATOMIC
    is_open = re.compile(b"(?:%b)*+%b" % (_field(path), QUOTED)) if quotes else None
    row, first = [], 1
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row.append(line)
            may_end = len(row) == 1 or line.count(b'"') % 2  # else it lies within the quotes that are open
            if quotes and not (may_end and (b'"' not in line or not is_open.fullmatch(b"".join(row)))):
                continue
            if line.strip() or path.suffix not in LINES:
                yield first, b"".join(row)
            row, first = [], number + 1
    if row:
        yield first, b"".join(row)


def _field(path: Path) -> bytes:
    """The pattern of a field and the separator after it (RFC 4180)."""
    separator, quotes = SEPARATORS[path.suffix].encode(), path.suffix not in ATOMIC
    return (
        rb'(?:%b"|[^"\r\n%b]*+)%b' % (QUOTED, separator, separator) if quotes else b"[^%b]*+%b" % (separator, separator)
    )


def place(path: Path, row: int) -> str:
    """ ", line 3, row 2" of a row, which is counted from 0 without the header; without the line for other files."""
    line = ""
    if path.suffix in (*SEPARATORS, *LINES):
        index = row + (path.suffix in SEPARATORS)
        line = next((f", line {line}" for number, (line, _) in enumerate(rows(path)) if number == index), "")
    return f"{line}, row {row + 1}"


def broken(path: Path) -> str | None:
    """Line, row and column of the first row that can't be read, and why; None where all can."""
    return _broken_fields(path) if path.suffix in SEPARATORS else _broken_objects(path)


def _broken_fields(path: Path) -> str | None:
    """Of rows of fields: no UTF-8, quotes at a wrong place, or more fields than the header has."""
    names, field = [], re.compile(_field(path))
    for number, (line, row) in enumerate(rows(path)):
        at, problem = _defect(row.rstrip(b"\r\n") + SEPARATORS[path.suffix].encode(), field, len(names))
        if problem:
            column = len(_starts(field, row[:at])) - 1
            what = (
                f"row {number}: " + (f"{names[column]!r}: " if column < len(names) else "")
                if number
                else "the header: "
            )
            line += row[:at].count(b"\n")
            return f", line {line}, {what}{problem}"
        names = names or next(csv.reader(row.decode("utf-8-sig").splitlines(), delimiter=SEPARATORS[path.suffix]), [])
    return None


def _defect(row: bytes, field: re.Pattern, width: int) -> tuple[int, str | None]:
    """Where a row can't be read, and why; None where it can. It ends with a separator. width: columns; 0: any."""
    try:
        row.decode()
    except UnicodeDecodeError as error:
        return error.start, "the bytes are not UTF-8; convert the file first"
    if b'"' not in row and row.count(row[-1:]) <= width:
        return 0, None
    *starts, end = _starts(field, row)
    if end < len(row):
        return end, 'quotes must stand around the whole field, and be doubled within it: "15"" TV"'
    if 0 < width < len(starts):
        return starts[width], f"{len(starts)} fields where the header has {width}; is a {chr(row[-1])!r} not in quotes?"
    return 0, None


def _starts(field: re.Pattern, row: bytes) -> list[int]:
    """Where the fields of a row start, as far as they can be read, and where the last of them ends."""
    starts = [0]
    while found := field.match(row, starts[-1]):
        starts.append(found.end())
    return starts


def _broken_objects(path: Path) -> str | None:
    """Of JSON lines: no UTF-8, no JSON, no object, or of another kind in a column than most rows."""
    kinds = []
    for number, (line, row) in enumerate(rows(path), 1):
        try:
            value = json.loads(row.strip().decode())
        except UnicodeDecodeError:
            return f", line {line}, row {number}: the bytes are not UTF-8; convert the file first"
        except (ValueError, RecursionError) as error:
            return f", line {line}, row {number}: no JSON: {error}"
        if not isinstance(value, dict):
            return f", line {line}, row {number}: must be an object, such as " + '{"user": "a", "item": "x"}'
        kinds.append({name: KINDS.get(type(one), "a text or number") for name, one in value.items() if one is not None})
    pairs = Counter(pair for row in kinds for pair in row.items())
    usual = {name: kind for (name, kind), _ in reversed(pairs.most_common())}
    for number, row in enumerate(kinds):
        for name, kind in row.items():
            if kind != usual[name]:
                return f"{place(path, number)}: {name!r} must be {usual[name]}, as in most rows, not {kind}"
    return None
