"""Reading tables of a user's own: CSV, TSV, parquet or JSON lines, with errors that name file and row."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import polars as pl

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*SEPARATORS, ".parquet", ".jsonl", ".ndjson")


def read_table(path: Path, columns: Sequence[str], text: Sequence[str] = ()) -> "pl.DataFrame":
    """The named columns. CSV and TSV have a header, and their columns come as strings, empty fields as nulls.

    text: columns that are strings whatever a JSON lines file has, such as ids that are numbers in places.

    Raises FileNotFoundError where there is no file; ValueError where it is of another kind, lacks a column, or can't
    be read, with the line if that is known.
    """
    import polars as pl

    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the file name must end with one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        if path.suffix in SEPARATORS:
            frame = pl.scan_csv(path, separator=SEPARATORS[path.suffix], infer_schema=False)
        elif path.suffix == ".parquet":
            frame = pl.scan_parquet(path)
        else:
            frame = pl.scan_ndjson(path, infer_schema_length=None, schema_overrides=dict.fromkeys(text, pl.String))
        names = frame.collect_schema().names()
        absent = [column for column in columns if column not in names]
        if absent:
            raise ValueError(f"{path} has no column {absent[0]!r}; its columns are {', '.join(names)}")
        return frame.select(columns).collect()
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        found = None if path.suffix == ".parquet" else _bad_line(path)
        reason = found or f" can't be read as {path.suffix[1:]}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{path}{reason}") from error


def _bad_line(path: Path) -> str | None:
    """Where the first line is that is no UTF-8, no JSON, or no row as wide as the header, and why. Slow."""
    with open(path, "rb") as lines:
        text = (line.decode("utf-8") for line in lines)
        if path.suffix in SEPARATORS:
            rows = csv.reader(text, delimiter=SEPARATORS[path.suffix], strict=True)
        else:
            rows = (json.loads(line) for line in text)
        number, width = 0, None
        try:
            for row in rows:
                number = getattr(rows, "line_num", number + 1)
                width = width or len(row)
                if path.suffix in SEPARATORS and len(row) > width:
                    return f", line {number}: {len(row)} fields where the header has {width}"
        except UnicodeDecodeError:
            return f", line {number + 1}: the bytes are not UTF-8; convert the file first"
        except (json.JSONDecodeError, csv.Error) as error:
            return f", line {number + 1}: {error}"
    return None


def fail(path: Path, row: int, problem: str) -> NoReturn:
    """Raises ValueError that names the row, counted from 1 without the header; `row` counts from 0."""
    raise ValueError(f"{path}, row {row + 1}: {problem}")


def keys(path: Path, table: "pl.DataFrame", column: str) -> "pl.Series":
    """A column of ids as strings; ValueError where one is missing or empty."""
    import polars as pl

    if table[column].dtype.is_nested():
        raise ValueError(f"{path}: {column!r} must hold ids, not {table[column].dtype}")
    ids = table[column]
    if ids.dtype.is_float() and (ids.drop_nulls() == ids.drop_nulls().round()).all():
        ids = ids.cast(pl.Int64)  # whole numbers beside missing ones, as pandas writes them
    ids = ids.cast(pl.String)
    empty = ids.is_null() | (ids.str.strip_chars() == "")
    if empty.any():
        fail(path, int(empty.arg_true()[0]), f"{column!r} is empty")
    return ids


def times(path: Path, table: "pl.DataFrame", column: str) -> "pl.Series":
    """A column of times as numbers that sort: whole numbers as they are, decimal ones and dates as float seconds.

    ValueError where one is missing or no time.
    """
    import polars as pl

    raw = table[column]
    if raw.dtype == pl.String:
        readings = [raw.cast(pl.Int64, strict=False), raw.cast(pl.Float64, strict=False), _dates(raw)]
        found = min(readings, key=lambda reading: reading.null_count())
    elif raw.dtype in (pl.Date, pl.Datetime):
        found = _seconds(raw.cast(pl.Datetime("us")))
    elif raw.dtype.is_integer():
        found = raw.cast(pl.Int64, strict=False)
    elif raw.dtype.is_float():
        found = raw.cast(pl.Float64)
    else:
        raise ValueError(f"{path}: {column!r} must hold numbers or dates, not {raw.dtype}")
    bad = found.is_null() if found.dtype == pl.Int64 else ~found.is_finite().fill_null(False)
    if bad.any():
        row = int(bad.arg_true()[0])
        fail(path, row, f"{column!r} must be a number or an ISO date, not {raw[row]!r}")
    return found


def _dates(raw: "pl.Series") -> "pl.Series":
    """ISO dates, with or without a time of day and a time zone, as seconds; null where it is none."""
    import polars as pl

    text = raw.str.strip_chars().str.replace(" ", "T")
    zoned = text.str.to_datetime("%+", time_unit="us", time_zone="UTC", strict=False).dt.replace_time_zone(None)
    readings = [zoned]
    for pattern in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M"):
        readings.append(text.str.to_datetime(pattern, time_unit="us", strict=False))
    readings.append(text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")))
    return _seconds(pl.select(pl.coalesce(readings)).to_series())


def _seconds(moments: "pl.Series") -> "pl.Series":
    import polars as pl

    return moments.dt.epoch("us").cast(pl.Float64) / 1e6
