"""Tables of recommendations into files, chunk by chunk."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import naming
from data.tables import LINES, SUFFIXES

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Texts:
    """A column of texts: values[index[m]] in row m. index: [M] integers."""

    values: Sequence[str]
    index: np.ndarray


Columns = dict[str, Texts | np.ndarray]


def partial_path(path: Path) -> Path:
    """Where `write_table` writes until all is written."""
    return path.with_name(f"{path.name}.partial")


def write_table(path: Path, chunks: Iterable[Columns]) -> None:
    """A table of all chunks as .csv, .tsv, .parquet, .jsonl or .ndjson; memory holds one chunk.

    chunks: columns of equal length, the same in each; arrays are [M], or [M, j], which are lists in parquet and JSON,
    and text with "-" between the numbers in CSV and TSV.
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
        with naming(path):
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
    aside, joined, number = part / "aside", part / "joined", -1
    try:
        for number, chunk in enumerate(chunks):
            _frame(chunk).write_parquet(aside)
            os.replace(aside, part / f"{number:06}.parquet")
        if number > 0:
            pl.scan_parquet(part / "*.parquet").sink_parquet(joined)
        os.replace(joined if number > 0 else part / "000000.parquet", path)
        shutil.rmtree(part)
    finally:
        aside.unlink(missing_ok=True)
        joined.unlink(missing_ok=True)


def _write_lines(path: Path, part: Path, chunks: Iterable[Columns]) -> None:
    with open(part, "wb", buffering=0) as file:
        for chunk in chunks:
            whole = file.tell()
            lines = _json(chunk) if path.suffix in LINES else _csv(chunk, "\t" if path.suffix == ".tsv" else ",", whole)
            content = memoryview(lines.encode())
            try:
                while content:
                    content = content[file.write(content) :]
            except BaseException:
                file.truncate(whole)
                raise
    os.replace(part, path)


def _json(chunk: Columns) -> str:
    """Without polars."""
    lists = [[c.values[n] for n in c.index.tolist()] if isinstance(c, Texts) else c.tolist() for c in chunk.values()]
    encode = json.JSONEncoder(ensure_ascii=False).encode
    return "".join(encode(dict(zip(chunk, row, strict=True))) + "\n" for row in zip(*lists, strict=True))


def _csv(chunk: Columns, separator: str, written: int) -> str:
    import polars as pl

    joined = pl.selectors.list().cast(pl.List(pl.String)).list.join("-")
    return _frame(chunk).with_columns(joined).write_csv(include_header=written == 0, separator=separator)


def _frame(chunk: Columns) -> "pl.DataFrame":
    import polars as pl

    texts = {name: column for name, column in chunk.items() if isinstance(column, Texts)}
    columns = {name: pl.Series(c.values, dtype=pl.String).gather(c.index) for name, c in texts.items()}
    return pl.DataFrame(chunk | columns).with_columns(pl.selectors.array().arr.to_list())
