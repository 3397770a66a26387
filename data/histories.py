"""Histories of item keys from files and cached corpora, chunk by chunk."""

import ast
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from accelerate import PartialState

from data.corpus import Corpus
from data.lines import DECODER, parsed
from data.tables import LINES, check_columns, fail, keys, read_table, reading, scan_table, times, whole_rows

if TYPE_CHECKING:
    import polars as pl

logger = logging.getLogger(__name__)
CHUNK, MAX_KEYS = 4096, 2**20  # histories, and item keys, read at once
COLUMNS = ("user", "item", "timestamp")
KEY = r"[^|\s](?:[^|]*[^|\s])?"  # between | and spaces
LISTED = r"(?s)^\s*\[.*\]\s*$"
NO_COMMA = re.compile(r"""['"]\s+['"]""")  # between texts, as numpy writes them; Python would join them


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
    path: a file, the folder of a cached corpus, or a dataset folder with one in processed/. With a column "items" each
    row is a history, read as it is asked for: a column "user", and the items' keys as a list, as the text of one, or as
    text with "|" between them. Otherwise each row is an interaction, `columns` are the names of user, item and time,
    and all rows are read at once; without a column "timestamp" they are in time order. See `read_table`, too.

    Raises FileNotFoundError where there is no file; ValueError that names the file, and the row where it is known,
    where it is of another kind, empty, lacks a column or can't be read.
    """
    if path.is_dir():
        yield from _chunks(_of_corpus(path, columns), only, size)
        return
    first = next(_records(path), None) if path.suffix in LINES and path.is_file() else {}
    if first is None:
        raise ValueError(f"{path} holds no history")
    lists = "items" in first
    yield from (_chunks(_from_lines(path), only, size) if lists else _from_table(path, columns, only, size))


def _of_corpus(folder: Path, columns: tuple[str, str, str]) -> Iterator[tuple[str, list]]:
    """Users, and the keys of their items, of a cached corpus."""
    found = [file.parent for at in ("", "processed/*/") for file in sorted(folder.glob(f"{at}corpus.json"))]
    if not found:
        raise ValueError(f"{folder} holds no cached corpus: name a file, or a dataset folder of the train scripts")
    if len(found) > 1:
        raise ValueError(f"{folder} holds several corpora: name one of {', '.join(map(str, found))}")
    if columns != COLUMNS:
        raise ValueError(f"{folder} is a corpus, whose columns have no names: leave out {' '.join(columns)}")
    corpus = Corpus.load(found[0])
    items, offsets = corpus.interactions.items.numpy(), corpus.interactions.offsets.tolist()
    for user, start, end in zip(corpus.user_keys, offsets, offsets[1:], strict=False):
        yield user, [corpus.item_keys[n] for n in items[start:end]]


def _records(path: Path) -> Iterator[dict]:
    """The rows of JSON lines."""
    with open(path, "rb") as file:
        for row, line in enumerate(filter(bytes.strip, file)):
            try:
                record = parsed(line)
            except ValueError as error:
                fail(path, row, str(error))
            yield record


def _from_lines(path: Path) -> Iterator[tuple[str, list]]:
    """Without polars."""
    for row, record in enumerate(_records(path)):
        user, items = record.get("user"), record.get("items", "")
        if type(user) not in (str, int, float):
            fail(path, row, "there is no 'user'" if user is None else f"'user' must be a key, not {user!r}")
        if "items" not in record:
            fail(path, row, "there is no 'items'")
        items = _keys(path, row, items) if isinstance(items, str) else items or []
        if not _are_keys(items):
            fail(path, row, f"'items' must be a list of item keys, not {str(items)[:80]}")
        yield as_key(user), items


def _chunks(pairs: Iterable[tuple[str, list]], only: Collection[str] | None, size: int) -> Iterator[Histories]:
    users, rows, n_keys = [], [], 0
    for user, items in pairs:
        if only is None or user in only:
            users.append(user)
            rows.append(items)
            n_keys += len(items)
        if len(rows) == size or n_keys >= MAX_KEYS:
            yield users, rows
            users, rows, n_keys = [], [], 0
    if rows:
        yield users, rows


def _keys(path: Path, row: int, text: str) -> list[str]:
    """The keys in a field: between |, or of a list as JSON or Python writes it."""
    if not re.match(LISTED, text):
        return re.findall(KEY, text)
    try:
        found = DECODER.decode(text)
    except ValueError:
        try:
            found = None if NO_COMMA.search(text) else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            found = None
    if not _are_keys(found):
        fail(path, row, f"'items' must be keys with | between them, or a list such as [1, 260], not {text[:80]!r}")
    return [as_key(key) for key in found]


def _are_keys(items: object) -> TypeGuard[list]:
    return isinstance(items, list) and set(map(type, items)) <= {str, int, float}


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
            elif time not in names and path.suffix != ".json" and PartialState().is_main_process:
                logger.warning(f"{path} has no column {time!r}: each user's rows are taken to be in time order")
            batches = _grouped(path, user, item, time if time in names else None).iter_slices(size)
        else:
            check_columns(path, names, ["items"], f", a list of item keys for each user, nor {item!r}, one item a row")
        row = 0
        for batch in batches:
            if (empty := batch["user"].is_null()).any():
                fail(path, row + int(empty.arg_true()[0]), "there is no 'user'")
            if batch["items"].dtype == pl.String:
                batch = batch.with_columns(items=_split(path, row, batch["items"]))
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
    if isinstance(kind, pl.List | pl.Array) and not kind.inner.is_nested():
        items = items.cast(pl.List(kind.inner)).list.eval(_text(pl.element(), kind.inner))
    elif kind != pl.String:
        raise ValueError(f"{path}: 'items' must be a list of item keys, not {kind}")
    return table.select(user=_text(pl.col("user"), schema["user"]), items=items)


def _split(path: Path, row: int, texts: "pl.Series") -> "pl.Series":
    """Lists of keys from fields, of which the first is of this row."""
    import polars as pl

    if not texts.str.contains(LISTED).any():
        return texts.str.extract_all(KEY)
    return pl.Series([_keys(path, row + n, text or "") for n, text in enumerate(texts)], dtype=pl.List(pl.String))


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
