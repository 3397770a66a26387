"""Reading tables of a user's own: CSV, TSV, parquet, JSON or RecBole's, with errors that name file and row."""

import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data.lines import ATOMIC, KINDS, LINES, PLAIN, SEPARATORS, broken, place

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = (".csv", ".tsv", ".parquet", *LINES)
BILLION = 10**9
UNITS = {"ns": BILLION, "us": 10**6, "ms": 10**3}  # of a second
NO_ID = r"^[\[{]|^(true|false)$"  # what may stand for a list, an object, true or false
MAX_SHOWN = 300  # characters of the names of columns
TYPES = ("token", "token_seq", "float", "float_seq")  # of columns in RecBole's files


def read_table(path: Path, columns: Sequence[str], text: Sequence[str] = ()) -> "pl.DataFrame":
    """The named columns. CSV and TSV have a header, and their columns come as strings, empty fields as nulls.

    In RecBole's .inter and .item files a column is named without its type; a token_seq is a list of strings. A .json
    file is an object: of {user: [item, ...]} each item, of {item: {column: value, ...}} each member is a row; the names
    of its members are the first of `columns`, listed items the second.
    text: columns that are strings whatever a JSON file has, such as ids that are numbers in places.

    Raises FileNotFoundError where there is no file; ValueError where it is of another kind, lacks a column, or can't
    be read, with the line if that is known.
    """
    import polars as pl

    with reading(path):
        frame = scan_table(path, columns, text)
        check_columns(path, frame.collect_schema().names(), columns)
        table = frame.select(columns).collect(optimizations=whole_rows(path))
    texts = table.select(pl.col(pl.String)).get_columns() if path.suffix in LINES else []
    if any(column.str.contains("\0", literal=True).any() for column in texts) and (found := broken(path)):
        raise ValueError(f"{path}{found}")  # half a surrogate pair, which polars reads as that
    return table


def check_columns(path: Path, names: Sequence[str], needed: Sequence[str], else_: str = "") -> None:
    """ValueError where a table lacks a column that is needed, or has it twice. else_: what would serve instead."""
    if absent := [column for column in needed if column not in names]:
        shown = ", ".join(name if name.isprintable() and name == name.strip() else repr(name) for name in names)
        found = broken(path) if path.suffix in SEPARATORS else None
        if not found or "the header" not in found:
            found = f" has no column {absent[0]!r}{else_}; its columns are {shown[:MAX_SHOWN]}"
        raise ValueError(f"{path}{found}")
    for column in needed:
        if f"{column}_duplicated_0" in names:
            raise ValueError(f"{path}: two columns are called {column!r}")
        if needed.count(column) > 1:
            raise ValueError(f"{path}: {column!r} can't be the column of two things, of {', '.join(needed)}")


def scan_table(path: Path, columns: Sequence[str], text: Sequence[str] = ()) -> "pl.LazyFrame":
    """All columns, as of `read_table`, to be collected within `reading`."""
    import polars as pl

    if path.suffix not in (allowed := (*SUFFIXES, *ATOMIC, ".json")):
        raise ValueError(f"{path}: the file name must end with one of {', '.join(allowed)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'no file' if path.exists() else 'missing'}")
    if path.suffix in ATOMIC:
        return _atomic(path)
    if path.suffix in SEPARATORS:
        return pl.scan_csv(path, separator=SEPARATORS[path.suffix], infer_schema=False)
    if path.suffix == ".parquet":
        return pl.scan_parquet(path)
    source: Path | bytes = _as_lines(path, columns) if path.suffix == ".json" else path
    with open(path, "rb") as file:
        if isinstance(source, Path) and file.read(3) == BOM_UTF8:
            source = file.read()
    return pl.scan_ndjson(source, infer_schema_length=None, schema_overrides=dict.fromkeys(text, pl.String))


def whole_rows(path: Path) -> "pl.QueryOptFlags":
    """For `collect`: of CSV all columns are read, so that a row with too many is an error whichever are asked for."""
    import polars as pl

    return pl.QueryOptFlags(projection_pushdown=path.suffix not in SEPARATORS)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What polars says about a file becomes a ValueError that names the file, and the line if that is known."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.ColumnNotFoundError, pl.exceptions.SchemaFieldNotFoundError) as error:  # `text`, of JSON
        raise ValueError(f"{path} has no column {str(error).partition(chr(10))[0]!r}") from error
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        found = None if path.suffix in (".parquet", ".json") else broken(path)
        reason = found or f" can't be read as {path.suffix[1:]}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{path}{reason}") from error


def _atomic(path: Path) -> "pl.LazyFrame":
    """As RecBole's converters write it: tabs, no quotes, "nan" for what is missing, types in the header."""
    import polars as pl

    frame = pl.scan_csv(path, separator="\t", infer_schema=False, quote_char=None, null_values="nan")
    columns = []
    for header in frame.collect_schema().names():
        name, _, kind = header.rpartition(":")
        if not name or kind not in TYPES:
            rule = f"column {header!r} must be a name with a type ({', '.join(TYPES)}), such as user_id:token"
            raise ValueError(f"{path}{broken(path) or f': {rule}'}")
        column = pl.col(header).str.split(" ") if kind == "token_seq" else pl.col(header)
        columns.append(column.alias(name))
    return frame.select(columns)


def _as_lines(path: Path, columns: Sequence[str]) -> bytes:
    """The rows of a .json file, as `read_table` has them, as JSON lines."""
    try:
        members = json.loads(path.read_bytes(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from error
    kinds, rows = {type(member) for member in members.values()} if isinstance(members, dict) else set(), []
    if kinds == {list}:
        named = [(name, item) for name, items in members.items() for item in items]
        for row, (_, item) in enumerate(named):
            if type(item) in KINDS:
                fail(path, row, f"{columns[1]!r} must be {PLAIN}, not {KINDS[type(item)]}")
        rows = [dict(zip(columns, pair, strict=False)) for pair in named]
    elif kinds == {dict}:
        rows = [member | {columns[0]: name} for name, member in members.items()]
    if not rows:
        raise ValueError(
            f'{path} must hold an object of lists, {{"user": ["item", ...], ...}}, or of objects, {{"item": {{"title": '
            "..}, ...}"
        )
    try:
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: {error.object[:80]!r} holds half a surrogate pair") from error


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. ValueError where it has two members of one name, of which one would be lost."""
    if len(members := dict(pairs)) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is in it twice")
    return members


def fail(path: Path, row: int, problem: str) -> NoReturn:
    """Raises ValueError that names the line and the row, from 1 without the header; `row` counts from 0."""
    raise ValueError(f"{path}{place(path, row)}: {problem}")


def keys(path: Path, table: "pl.DataFrame", column: str) -> "pl.Series":
    """A column of ids as strings; ValueError where one is missing or empty."""
    import polars as pl

    if table[column].dtype.is_nested():
        raise ValueError(f"{path}: {column!r} must hold ids, not {table[column].dtype}")
    ids = table[column]
    if ids.dtype.is_float() and (ids.drop_nulls() == ids.drop_nulls().round()).all():
        ids = ids.cast(pl.Int64)  # whole numbers beside missing ones, as pandas writes them
    ids = ids.cast(pl.String)
    if path.suffix in LINES and ids.str.contains(NO_ID).any() and (found := broken(path, [column])):
        raise ValueError(f"{path}{found}")
    empty = ids.is_null() | (ids.str.strip_chars() == "")
    if empty.any():
        fail(path, int(empty.arg_true()[0]), f"{column!r} is empty")
    return ids


def times(path: Path, table: "pl.DataFrame", column: str) -> "pl.Series":
    """A column of times as Int128, in billionths: of the unit of numbers, of a second of dates, since 1970.

    Whole and decimal numbers, with or without an exponent, and dates keep their order down to a billionth. ValueError
    where one is missing or no time, or its whole units don't fit 64 bits.
    """
    import polars as pl

    raw, readings = table[column], {}
    if raw.dtype == pl.String:
        readings = {"a number": _billionths(raw), "an ISO date": _dates(raw)}
        kind, found = min(readings.items(), key=lambda pair: pair[1].null_count())
    elif raw.dtype in (pl.Date, pl.Datetime):
        moments = raw.cast(pl.Datetime("us")) if raw.dtype == pl.Date else raw
        assert isinstance(moments.dtype, pl.Datetime)
        found = _billionths(moments.to_physical()) // UNITS[moments.dtype.time_unit]
    elif raw.dtype.is_float():
        whole = raw.floor()
        found = _billionths(whole.cast(pl.Int64, strict=False)) + ((raw - whole) * 1e9).cast(pl.Int128, strict=False)
    elif raw.dtype.is_numeric():
        found = _billionths(raw)
    else:
        raise ValueError(f"{path}: {column!r} must hold numbers or dates, not {raw.dtype}")
    bad = found.is_null() | (found // BILLION).cast(pl.Int64, strict=False).is_null()
    if bad.any():
        row = int(bad.arg_true()[0])
        mixed = found[row] is None and any(reading[row] is not None for reading in readings.values())
        rule = f"{kind}, as in most rows" if mixed else "a number or an ISO date"
        fail(path, row, f"{column!r} must be {rule}, not {raw[row]!r}")
    return found


def _billionths(numbers: "pl.Series") -> "pl.Series":
    """Numbers, or texts of them, times 10^9 as Int128, what is smaller cut off; null where there is none."""
    import polars as pl

    return numbers.cast(pl.Decimal(38, 9), strict=False).to_physical()


def _dates(raw: "pl.Series") -> "pl.Series":
    """ISO dates, with or without a time of day and a time zone, in 10^-9 seconds as Int128; null where it is none."""
    import polars as pl

    text = raw.str.strip_chars().str.replace(" ", "T")
    zoned = text.str.to_datetime("%+", time_unit="us", time_zone="UTC", strict=False).dt.replace_time_zone(None)
    readings = [zoned]
    for pattern in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M"):
        readings.append(text.str.to_datetime(pattern, time_unit="us", strict=False))
    readings.append(text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")))
    seconds = pl.select(pl.coalesce(readings)).to_series().dt.epoch("us") // 10**6
    digits = text.str.extract(r"\.(\d{1,9})").str.pad_end(9, "0")  # of which polars reads six, or no date before 1678
    return _billionths(seconds) + digits.cast(pl.Int128, strict=False).fill_null(0)
