"""Where the rows of a text file lie, and which of them can't be read. Slow: asked only where something is wrong."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
LINES = (".jsonl", ".ndjson")
ATOMIC = (".inter", ".item")  # RecBole's, which know no quotes
QUOTED = rb'"[^"]*+(?:""[^"]*+)*+'  # without the closing quote
KINDS, PLAIN = {dict: "an object", list: "a list", bool: "true or false"}, "a text or number"
MAX_NUMBER = 1e38
SURROGATE = re.compile("[\ud800-\udfff]")


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not known there")


DECODER = json.JSONDecoder(parse_constant=_refused)  # NaN, Infinity


def rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number of the first line, from 1, and bytes of each row, with the header if there is one."""
    quotes = path.suffix in SEPARATORS and path.suffix not in ATOMIC
    is_open = re.compile(b"(?:%b)*+%b" % (_field(path), QUOTED)) if quotes else None
    row, first = [], 1
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row.append(line)
            may_end = len(row) == 1 or line.count(b'"') % 2  # else it lies within the quotes that are open
            if is_open and not (may_end and (b'"' not in line or not is_open.fullmatch(b"".join(row)))):
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


def parsed(line: bytes) -> dict:
    """The object on a line of JSON lines. ValueError that says what is wrong."""
    try:
        value = DECODER.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("the bytes are not UTF-8; convert the file first") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(value, dict):
        raise ValueError('must be an object, such as {"user": "a", "item": "x"}')
    if b"\\ud" in line.lower() and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("a text holds half a surrogate pair")
    return value


def broken(path: Path, ids: Sequence[str] = ()) -> str | None:
    """Line, row and column of the first row that can't be read, and why; None where all can. ids: columns of JSON lines
    that hold texts or numbers."""
    return _broken_fields(path) if path.suffix in SEPARATORS else _broken_objects(path, ids)


def _broken_fields(path: Path) -> str | None:
    """Of rows of fields: no UTF-8, quotes at a wrong place, or more fields than the header has."""
    names, field = list[str](), re.compile(_field(path))
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
    if end < len(row) and re.compile(rb'[^"\r]*\r').match(row, end):
        return end, r"lines must end with \n or \r\n, not with \r alone; convert the file first"
    if end < len(row):
        return end, 'quotes must stand around the whole field, and be doubled within it: "15"" TV"'
    if 0 < width < len(starts):
        hint = "" if row[-1:] == b"\t" else f"; is a {chr(row[-1])!r} not in quotes?"
        return starts[width], f"{len(starts)} fields where the header has {width}{hint}"
    return 0, None


def _starts(field: re.Pattern, row: bytes) -> list[int]:
    """Where the fields of a row start, as far as they can be read, and where the last of them ends."""
    starts = [0]
    while found := field.match(row, starts[-1]):
        starts.append(found.end())
    return starts


def _broken_objects(path: Path, ids: Sequence[str]) -> str | None:
    """Of JSON lines: what `parsed` refuses, a number that no table holds, or another kind in a column than most rows
    have."""
    kinds = []
    for number, (line, row) in enumerate(rows(path), 1):
        try:
            value = parsed(row)
        except ValueError as error:
            return f", line {line}, row {number}: {error}"
        for name, one in value.items():
            if isinstance(one, (int, float)) and abs(one) > MAX_NUMBER:
                return f", line {line}, row {number}: {name!r} is beyond what a table can hold"
        kinds.append({name: KINDS.get(type(one), PLAIN) for name, one in value.items() if one is not None})
    pairs = Counter(pair for row in kinds for pair in row.items())
    usual = {name: kind for (name, kind), _ in reversed(pairs.most_common())} | dict.fromkeys(ids, PLAIN)
    for number, row in enumerate(kinds):
        for name, kind in row.items():
            if kind != usual[name]:
                most = "" if name in ids else ", as in most rows"
                return f"{place(path, number)}: {name!r} must be {usual[name]}{most}, not {kind}"
    return None if kinds else " holds no row"
