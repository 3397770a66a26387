"""Tables that are written chunk by chunk, and what a failure leaves of them."""

import numpy as np
import polars as pl
import pytest

from data.results import Texts, partial_path, write_table


def texts(values: list[str]) -> Texts:
    return Texts(values, np.arange(len(values)))


def chunk(n: int) -> dict:
    return {
        "user": Texts(["v", f"u{n}"], np.array([1, 0, 0])),
        "rank": np.array([n, 2, 3]),
        "id": np.array([[1, 2], [3, 4], [5, 6]]),
        "new": np.array([True, False, n > 0]),
    }


ROWS = [(f"u{n}", n, [1, 2], True) for n in range(2)]
ROWS = [row for n, first in enumerate(ROWS) for row in (first, ("v", 2, [3, 4], False), ("v", 3, [5, 6], n > 0))]


def written(path) -> list[tuple]:
    if path.suffix == ".parquet":
        return pl.read_parquet(path).rows()
    if path.suffix == ".jsonl":
        return pl.read_ndjson(path).rows()
    frame = pl.read_csv(path)
    return frame.with_columns(frame["id"].str.split("-").cast(pl.List(pl.Int64))).rows()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_what_was_written_before_a_failure_stays_whole_and_marked(suffix, tmp_path):
    def chunks(n_chunks: int, fails: bool):
        yield from map(chunk, range(n_chunks))
        if fails:
            raise OSError("the disk is full")

    path = tmp_path / f"out{suffix}"
    for _ in range(2):  # the second time over what the first left
        with pytest.raises(OSError, match="full"):
            write_table(path, chunks(2, fails=True))
    part = partial_path(path)
    assert [found.name for found in tmp_path.iterdir()] == [part.name]
    if suffix == ".parquet":
        assert pl.read_parquet(part / "*.parquet").rows() == ROWS
    for n_chunks in (1, 2):
        write_table(path, chunks(n_chunks, fails=False))
        assert written(path) == ROWS[: 3 * n_chunks]
        assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_full_disk_leaves_whole_chunks(suffix, tmp_path, small_disk):
    path, rows = tmp_path / f"out{suffix}", [{"user": texts(["a"])}, {"user": texts([f"{n}" for n in range(10_000)])}]
    with small_disk(2000), pytest.raises(OSError, match="File too large: '.*out"):
        write_table(path, rows)
    part = partial_path(path)
    assert [found.name for found in tmp_path.iterdir()] == [part.name]
    read = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}[suffix]
    assert read(part / "*.parquet" if suffix == ".parquet" else part).rows() == [("a",)]
