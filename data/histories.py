"""Histories of item keys from files, chunk by chunk."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.lines import parsed
from data.tables import LINES, check_columns, fail, keys, read_table, reading, scan_table, times, whole_rows

if TYPE_CHECKING:
    import polars as pl

CHUNK, MAX_KEYS = 4096, 2**20  # histories, and item keys, read at once
COLUMNS = ("user", "item", "timestamp")
KEY = r"[^|\s](?:[^|]*[^|\s])?"  # between | and spaces


Histories = tuple[list[str], "list[list] | pl.Series"]


def as_key(value: object) -> str:
    """A key that a file has as a number."""
    return str(int(value)) if isinstance(value, (float, np.floating)) and value.is_integer() else str(value)


def read_histories(
    path: Path,
    columns: tuple[str, str, str] = COLUMNS,
    only: Collection[str] | None = None,
    size: int = CHUNK,
) -> Iterator[Histories]:
    """Up to `size` users' keys, and of each user the keys of the items, oldest first; and so on.

    Lists of keys as JSON lines have them, a polars Series of lists of texts from other files. only: users to read.
    With a column "items" each row is a history, read as it is asked for: a column "user", and the items' keys as a list
    or as text with "|" between them. Otherwise each row is an interaction, `columns` are the names of user, item and
    time, and all rows are read at once; without a column "timestamp" they are in time order. See `read_table`, too.

    Raises FileNotFoundError where there is no file; ValueError that names the file, and the row where it is known,
    where it is of another kind, empty, lacks a column or can't be read.
    """
    first = next(_records(path), None) if path.suffix in LINES and path.is_file() else {}
    if first is None:
        raise ValueError(f"{path} holds no history")
    yield from (_from_lines(path, only, size) if "items" in first else _from_table(path, columns, only, size))


def _records(path: Path) -> Iterator[dict]:
    """The rows of JSON lines."""
    with open(path, "rb") as file:
        for row, line in enumerate(filter(bytes.strip, file)):
            try:
                record = parsed(line)
            except ValueError as error:
                fail(path, row, str(error))
            yield record


def _from_lines(path: Path, only: Collection[str] | None, size: int) -> Iterator[Histories]:
    """Without polars."""
    users, rows, n_keys = [], [], 0
    for row, record in enumerate(_records(path)):
        user, items = record.get("user"), record.get("items", "")
        if type(user) not in (str, int, float):
            fail(path, row, "there is no 'user'" if user is None else f"'user' must be a key, not {user!r}")
        if "items" not in record:
            fail(path, row, "there is no 'items'")
        items = [key.strip() for key in items.split("|") if key.strip()] if isinstance(items, str) else items or []
        if not isinstance(items, list) or not set(map(type, items)) <= {str, int, float}:
            fail(path, row, f"'items' must be a list of item keys, not {str(items)[:80]}")
        if only is None or as_key(user) in only:
            users.append(as_key(user))
            rows.append(items)
            n_keys += len(items)
        if len(rows) == size or n_keys >= MAX_KEYS:
            yield users, rows
            users, rows, n_keys = [], [], 0
    if rows:
        yield users, rows


def _from_table(
    path: Path, columns: tuple[str, str, str], only: Collection[str] | None, size: int
) -> Iterator[Histories]:
    import polars as pl

    user, item, time = columns
    with reading(path):
        table = scan_table(path, (user, item), text=(user, item))
        names = table.collect_schema().names()
        if "items" in names:
            whole = whole_rows(path)
            batches = _lists(path, table).collect_batches(chunk_size=size, maintain_order=True, optimizations=whole)
        elif item in names:
            if time != COLUMNS[2]:
                check_columns(path, names, [time])
            batches = _grouped(path, user, item, time if time in names else None).iter_slices(size)
        else:
            check_columns(path, names, ["items"], f", a list of item keys for each user, nor {item!r}, one item a row")
        row = 0
        for batch in batches:
            if (empty := batch["user"].is_null()).any():
                fail(path, row + int(empty.arg_true()[0]), "there is no 'user'")
            row += len(batch)
            if only is not None:
                batch = batch.filter(pl.col("user").is_in(list(only)))
            for part in _cut(batch, size):
                yield part["user"].to_list(), part["items"]
        if row == 0:
            raise ValueError(f"{path} holds no history")


def _cut(batch: "pl.DataFrame", size: int) -> Iterator["pl.DataFrame"]:
    """Parts that memory holds as arrays."""
    if len(batch) > size or (len(batch) > 1 and batch["items"].list.len().sum() > MAX_KEYS):
        half = len(batch) // 2
        yield from _cut(batch[:half], size)
        yield from _cut(batch[half:], size)
    elif len(batch):
        yield batch


def _lists(path: Path, table: "pl.LazyFrame") -> "pl.LazyFrame":
    """Histories from a table with one per row."""
    import polars as pl

    schema = table.collect_schema()
    check_columns(path, schema.names(), ("user", "items"))
    if schema["user"].is_nested():
        raise ValueError(f"{path}: 'user' must hold keys, not {schema['user']}")
    kind, items = schema["items"], pl.col("items")
    if kind == pl.String:
        items = items.str.extract_all(KEY)
    elif isinstance(kind, pl.List | pl.Array) and not kind.inner.is_nested():
        items = items.cast(pl.List(kind.inner)).list.eval(_text(pl.element(), kind.inner))
    else:
        raise ValueError(f"{path}: 'items' must be a list of item keys, not {kind}")
    return table.select(user=_text(pl.col("user"), schema["user"]), items=items)


def _text(values: "pl.Expr", kind: "pl.DataType | pl.datatypes.DataTypeClass") -> "pl.Expr":
    """Keys as `as_key` has them."""
    import polars as pl

    texts = values.cast(pl.String)
    whole = pl.when(values.round() == values).then(values.cast(pl.Int64, strict=False)) if kind.is_float() else None
    return texts if whole is None else pl.coalesce(whole.cast(pl.String), texts)


def _grouped(path: Path, user: str, item: str, time: str | None) -> "pl.DataFrame":
    """Histories from one interaction a row; users come in the order of their first row."""
    import polars as pl

    table = read_table(path, [name for name in (user, item, time) if name is not None], text=(user, item))
    frame, items = pl.DataFrame({"user": keys(path, table, user), "item": keys(path, table, item)}), pl.col("item")
    if time is not None:
        frame, items = frame.with_columns(time=times(path, table, time)), items.sort_by("time", maintain_order=True)
    return frame.group_by("user", maintain_order=True).agg(items=items)


def read_keys(path: Path) -> list[str]:
    """The lines of a text file, without empty ones. FileNotFoundError and ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'no file' if path.exists() else 'missing'}")
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the bytes are not UTF-8; convert the file first") from error
