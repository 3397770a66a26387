"""Histories of item keys from files, and recommendations into files, chunk by chunk."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.tables import SEPARATORS, SUFFIXES, fail, keys, read_table, times

CHUNK = 4096  # histories read at once from a parquet file
Columns = dict[str, list | np.ndarray]


def read_histories(path: Path, columns: tuple[str, str, str] = ("user", "item", "timestamp")) -> Iterator[tuple]:
    """Pairs of a user's key and the list of its items' keys, oldest first; keys as the file has them.

    path: a .csv, .tsv, .parquet, .jsonl or .ndjson file. With a column "items" each row is a history, read as it is
    asked for: a column "user", and the items' keys as a list or as text with "|" between them. Otherwise each row is an
    interaction, `columns` are the names of user, item and time, and all rows are read at once; without the column of
    times they are in time order.

    Raises FileNotFoundError where there is no file; ValueError that names the file, and the row where it is known,
    where it is of another kind, empty, lacks a column or can't be read.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the file name must end with one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    names, user = _names(path), columns[0]
    if "items" not in names and columns[1] not in names:
        raise ValueError(
            f"{path} has no column 'items', a list of item keys for each user, nor {columns[1]!r}, one item a row; its "
            f"columns are {', '.join(names) or 'none'}"
        )
    if "items" not in names:
        yield from _grouped(path, user, columns[1], columns[2] if columns[2] in names else None)
        return
    row = -1
    for row, record in enumerate(_parquet(path) if path.suffix == ".parquet" else _records(path)):
        if not isinstance(record, dict) or record.get("user") is None:
            fail(path, row, "there is no 'user'")
        if None in record:
            fail(path, row, "there are more fields than columns; the item keys of a row are separated by |")
        yield record["user"], _items(path, row, record.get("items"))
    if row < 0:
        raise ValueError(f"{path} holds no history")


def _names(path: Path) -> list[str]:
    """The columns; of JSON lines, those of the first row."""
    if path.suffix == ".parquet":
        import polars as pl

        try:
            return list(pl.read_parquet_schema(path))
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"{path} can't be read as parquet: {str(error).partition(chr(10))[0]}") from error
    if path.suffix in SEPARATORS:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            return next(csv.reader(file, delimiter=SEPARATORS[path.suffix]), [])
    first = next(_records(path), {})
    return list(first) if isinstance(first, dict) else []


def _records(path: Path) -> Iterator[dict]:
    """The rows of a text file."""
    row = 0
    csv.field_size_limit(sys.maxsize)  # of a history's items
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix in SEPARATORS:
                rows = csv.DictReader(file, delimiter=SEPARATORS[path.suffix], strict=True)
            else:
                rows = (json.loads(line) for line in file if line.strip())
            for record in rows:
                yield record
                row += 1
    except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
        fail(path, row, str(error))


def _parquet(path: Path) -> Iterator[dict]:
    import polars as pl

    frame = pl.scan_parquet(path)
    if "user" not in (names := frame.collect_schema().names()):
        raise ValueError(f"{path} has no column 'user'; its columns are {', '.join(names)}")
    try:
        for rows in frame.select("user", "items").collect_batches(chunk_size=CHUNK, maintain_order=True):
            for user, items in zip(rows["user"].to_list(), rows["items"].to_list(), strict=True):
                yield {"user": user, "items": items}
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} can't be read ({error})") from error


def _items(path: Path, row: int, value: object) -> list:
    if isinstance(value, str):
        return [key.strip() for key in value.split("|") if key.strip()]
    if value is not None and not isinstance(value, list):
        fail(path, row, f"'items' must be a list of item keys, not {value!r}")
    return value or []


def _grouped(path: Path, user: str, item: str, time: str | None) -> Iterator[tuple[str, list[str]]]:
    """Histories from one interaction a row; users come in the order of their first row."""
    import polars as pl

    table = read_table(path, [user, item] + [time] * (time is not None), text=(user, item))
    if table.is_empty():
        raise ValueError(f"{path} holds no interaction")
    frame, items = pl.DataFrame({"user": keys(path, table, user), "item": keys(path, table, item)}), pl.col("item")
    if time is not None:
        frame, items = frame.with_columns(time=times(path, table, time)), items.sort_by("time", maintain_order=True)
    yield from frame.group_by("user", maintain_order=True).agg(items).iter_rows()


def read_keys(path: Path) -> list[str]:
    """The lines of a text file, without empty ones. FileNotFoundError and ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the bytes are not UTF-8; convert the file first") from error


def partial_path(path: Path) -> Path:
    """Where `write_table` writes until all is written."""
    return path.with_name(f"{path.name}.partial")


def write_table(path: Path, chunks: Iterable[Columns]) -> None:
    """A table of all chunks as .csv, .tsv, .parquet, .jsonl or .ndjson; memory holds one chunk.

    chunks: columns of equal length, the same in each: lists of texts, or arrays [M] or [M, j]; the latter are lists in
    parquet and JSON, and text with "-" between the numbers in CSV and TSV.
    Written under `partial_path` and renamed at the end. After a failure whole chunks stay there: lines, or for parquet
    a folder with a file for each. ValueError where the file name ends otherwise.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the file name must end with one of {', '.join(SUFFIXES)}")
    part = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    try:
        (_write_parquet if path.suffix == ".parquet" else _write_lines)(path, part, chunks)
    except BaseException:
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()
        elif part.is_file() and part.stat().st_size == 0:
            part.unlink()
        raise


def _write_parquet(path: Path, part: Path, chunks: Iterable[Columns]) -> None:
    import polars as pl

    part.unlink(missing_ok=True)
    part.mkdir()
    aside, joined = part / "aside", part / "joined"
    try:
        for number, chunk in enumerate(chunks):
            texts = {name: pl.String for name, column in chunk.items() if isinstance(column, list)}
            frame = pl.DataFrame(chunk, schema_overrides=texts)
            frame.with_columns(pl.selectors.array().arr.to_list()).write_parquet(aside)
            os.replace(aside, part / f"{number:06}.parquet")
        pl.scan_parquet(part / "*.parquet").sink_parquet(joined)
        os.replace(joined, path)
        shutil.rmtree(part)
    except pl.exceptions.PolarsError as error:
        raise OSError(f"{path} can't be written: {str(error).partition(chr(10))[0]}") from error
    finally:
        aside.unlink(missing_ok=True)
        joined.unlink(missing_ok=True)


def _write_lines(path: Path, part: Path, chunks: Iterable[Columns]) -> None:
    with open(part, "wb", buffering=0) as file:
        for chunk in chunks:
            whole = file.tell()
            content = memoryview(_text(path.suffix, chunk, header=whole == 0).encode())
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(whole)
                raise
    os.replace(part, path)


def _text(suffix: str, chunk: Columns, header: bool) -> str:
    columns = [column.tolist() if isinstance(column, np.ndarray) else column for column in chunk.values()]
    rows = zip(*columns, strict=True)
    if suffix not in SEPARATORS:
        return "".join(json.dumps(dict(zip(chunk, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=SEPARATORS[suffix], lineterminator="\n")
    if header:
        writer.writerow(chunk)
    writer.writerows(["-".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row] for row in rows)
    return text.getvalue()
