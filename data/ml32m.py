"""MovieLens as CSV files: the layout of ml-32m, and of the bundled latest-small, whose statistics are

| data set     | users   | movies | ratings    | tags      |
|--------------|---------|--------|------------|-----------|
| latest-small | 610     | 9,742  | 100,836    | 3,683     |
| 32M          | 200,948 | 87,585 | 32,000,204 | 2,000,072 |

Harper and Konstan 2015, https://doi.org/10.1145/2827872.
"""

import csv
import math
import re
from collections.abc import Container
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data.corpus import Corpus
from data.download import RemoteFile
from data.events import factorize, sequences
from data.lines import rows
from data.tags import Tags

if TYPE_CHECKING:
    import polars as pl

FILES = ("movies.csv", "ratings.csv", "tags.csv")
COLUMNS: dict[str, dict[str, type]] = {
    "movies.csv": {"movieId": int, "title": str, "genres": str},
    "ratings.csv": {"userId": int, "movieId": int, "rating": float, "timestamp": int},
    "tags.csv": {"userId": int, "movieId": int, "tag": str, "timestamp": int},
    "ratings.dat": dict.fromkeys(("userId", "movieId", "rating", "timestamp"), int),  # of 1M
}
NO_GENRES = "(no genres listed)"


def grouplens(name: str, checksum: str, files: tuple[str, ...]) -> RemoteFile:
    """The archive of a data set, with these files in its folder."""
    urls = tuple(f"{kind}://files.grouplens.org/datasets/movielens/{name}.zip" for kind in ("https", "http"))
    return RemoteFile(f"{name}.zip", urls, checksum, {file: f"{name}/{file}" for file in files})


ARCHIVE = grouplens("ml-32m", "md5:d472be332d4daa821edc399621853b57", FILES)


def read_movielens(folder: Path, name: str) -> Corpus:
    """Reads movies.csv, ratings.csv and tags.csv from `folder`.

    Items are all movies, rated or not, in file order; users are those who rated, by ascending id. A user's
    interactions are all their ratings, whatever the stars, by timestamp; ties keep the order of the file.

    Raises ValueError that names file and line where a row has another number of fields, no number where one
    must be, an unknown movieId, or bytes that are not UTF-8.
    """
    import polars as pl

    movies = _read(folder, "movies.csv").with_row_index("item")
    if movies.is_empty() or movies["title"].str.strip_chars().eq("").any():
        raise ValueError(f"{folder / 'movies.csv'}: every movie needs a title, and there must be a movie")
    if movies["movieId"].is_duplicated().any():
        repeated = movies.filter(pl.col("movieId").is_duplicated())["movieId"][0]
        raise ValueError(f"{folder / 'movies.csv'}: movieId {repeated} appears more than once")
    ratings = _with_item(_read(folder, "ratings.csv").drop("rating"), movies, folder / "ratings.csv")
    tags = _with_item(_read(folder, "tags.csv"), movies, folder / "tags.csv")
    return build(name, movies, ratings, tags)


def build(name: str, movies: "pl.DataFrame", ratings: "pl.DataFrame", tags: "pl.DataFrame | None" = None) -> Corpus:
    """A corpus from tables of movies (item, movieId, title, genres), ratings (userId, item, timestamp) and tags
    (userId, item, tag, timestamp)."""
    import polars as pl

    users, interactions = sequences(ratings.select("item", "timestamp", user="userId"))
    movies = _describe(movies).with_columns(pl.col("movieId").cast(pl.String))
    item_keys, texts, categories = (movies[column].to_list() for column in ("movieId", "text", "categories"))
    known = None if tags is None else _tags(tags, users)
    return Corpus.build(name, interactions, item_keys, [str(user) for user in users], texts, categories, known)


def _clean(column: str) -> "pl.Expr":
    import polars as pl

    return pl.col(column).str.replace_all(r"\s+", " ").str.strip_chars()


def _describe(movies: "pl.DataFrame") -> "pl.DataFrame":
    """Adds `categories`, the genres, and `text`: "Toy Story (1995). Genres: Animation, Children."."""
    import polars as pl

    genres, stop = pl.col("genres"), pl.when(~pl.col("title").str.ends_with(".")).then(pl.lit("."))
    named = pl.when(~genres.is_in([NO_GENRES, ""])).then(genres.str.split("|"))
    movies = movies.with_columns(_clean("title"), categories=named)
    listed = pl.format(" Genres: {}.", pl.col("categories").list.join(", "))
    text = pl.concat_str("title", stop, listed, ignore_nulls=True)
    return movies.with_columns(text=text, categories=pl.col("categories").fill_null([]))


def _tags(tags: "pl.DataFrame", users: list[int]) -> Tags:
    """The tags in lower case, but for empty ones."""
    import polars as pl

    tags = tags.with_columns(_clean("tag").str.to_lowercase()).filter(pl.col("tag") != "")
    tags = tags.sort("tag", maintain_order=True)
    rows = pl.DataFrame({"userId": users}, {"userId": pl.Int64}).with_row_index("user")
    names, name = factorize(tags["tag"])
    tags = tags.with_columns(name=name).join(rows, on="userId", how="left", maintain_order="left")
    columns = tags.select(pl.col("user").cast(pl.Int64).fill_null(-1), "item", "name", time="timestamp").cast(pl.Int64)
    return Tags(**columns.to_torch("dict"), names=names)


def _with_item(rows: "pl.DataFrame", movies: "pl.DataFrame", path: Path) -> "pl.DataFrame":
    """Adds `item`, the movie's row in movies.csv; raises ValueError where there is none."""
    rows = rows.join(movies.select("movieId", "item"), on="movieId", how="left", maintain_order="left")
    if rows["item"].null_count():
        known = set(movies["movieId"].to_list())
        raise bad_row(path, known) or ValueError(f"{path}: a movieId is not among the movies")
    return rows


def _read(folder: Path, file: str) -> "pl.DataFrame":
    """One of the files as a frame with the columns of COLUMNS; an empty text is ""."""
    import polars as pl

    path = folder / file
    types = {int: pl.Int64, float: pl.Float64, str: pl.String}
    expected = ",".join(COLUMNS[file])
    with open(path, "rb") as lines:
        header = lines.readline().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if header != expected.encode():
        raise ValueError(f"{path}, line 1: the header must be {expected!r}, it is {header[:200]!r}")
    try:
        frame = pl.read_csv(path, schema={column: types[kind] for column, kind in COLUMNS[file].items()})
    except pl.exceptions.PolarsError as error:
        raise bad_row(path) or ValueError(f"{path} can't be read as CSV: {error}") from error
    # A null is an empty field or one that is not there: the slow reader tells them apart.
    suspect = sum(frame.null_count().row(0)) > 0
    if file == "ratings.csv":
        suspect |= not frame["rating"].is_finite().all()
    if suspect and (problem := bad_row(path)):
        raise problem
    return frame.with_columns(pl.col(pl.String).fill_null(""))


def bad_row(path: Path, known_movies: Container[int] | None = None) -> ValueError | None:
    """The error that describes the first malformed row, or None. Slow: for suspect files. Those of MovieLens 1M have no
    header, "::" between fields, and bytes that are all text."""
    is_csv = path.suffix == ".csv"
    for line, row in islice(rows(path), is_csv, None):
        try:
            fields = row.decode("latin-1").rstrip("\r\n").split("::")
            if is_csv:
                fields = next(csv.reader(StringIO(row.decode(), newline=""), strict=True), [])
            problem = _problem(fields, COLUMNS[path.name], known_movies)
        except (UnicodeDecodeError, csv.Error) as error:
            problem = f"the bytes are not UTF-8 ({error.reason})" if hasattr(error, "reason") else str(error)
        if problem:
            return ValueError(f"{path}, line {line}: {problem}")
    return None


def _problem(row: list[str], columns: dict[str, type], known_movies: Container[int] | None) -> str | None:
    """What is wrong with a row, if anything."""
    if len(row) != len(columns):
        return f"{len(row)} fields where there must be {len(columns)}"
    for (column, kind), field in zip(columns.items(), row, strict=True):
        try:
            value = kind(field)
        except ValueError:
            return f"{column} must be a number, not {field!r}"
        if kind is not str and re.search(r"[^ -^`-~]| $", field):  # which Python takes, such as 1_000
            return f"{column} must be a number in plain digits, not {field!r}"
        if kind is int and abs(value) >= 2**63:
            return f"{column} must be within 64 bits, not {field!r}"
        if kind is float and not math.isfinite(value):
            return f"{column} must be finite, not {field!r}"
        if column == "movieId" and known_movies is not None and value not in known_movies:
            return f"movieId {value} is not among the movies"
    return None
