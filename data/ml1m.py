"""MovieLens 1M in its own format: fields separated by "::", text in Latin-1, no header.

| users | movies | rated | rated five times or more | ratings   |
|-------|--------|-------|--------------------------|-----------|
| 6,040 | 3,883  | 3,706 | 3,416                    | 1,000,209 |

Harper and Konstan 2015, https://doi.org/10.1145/2827872.
"""

from pathlib import Path

from data.corpus import Corpus
from data.ml32m import COLUMNS, bad_row, build, grouplens

FILES = ("movies.dat", "ratings.dat")
ARCHIVE = grouplens("ml-1m", "md5:c4d9eecfca2ab87c1945afe126590906", FILES)
SEPARATOR = "\x1f"


def read_ml1m(folder: Path, name: str) -> Corpus:
    """Reads movies.dat and ratings.dat from `folder`; items, users and errors as of `data.ml32m.read_movielens`."""
    import polars as pl

    movies = _read_movies(folder / "movies.dat")
    path = folder / "ratings.dat"
    columns = dict.fromkeys(COLUMNS[path.name], pl.Int64)
    content = path.read_bytes().replace(b"::", SEPARATOR.encode())
    try:
        ratings = pl.read_csv(content, has_header=False, separator=SEPARATOR, quote_char=None, schema=columns)
    except pl.exceptions.PolarsError as error:
        raise bad_row(path, set(movies["movieId"])) or ValueError(f"{path} can't be read: {error}") from error
    ratings = ratings.join(movies.select("movieId", "item"), on="movieId", how="left", maintain_order="left")
    if sum(ratings.null_count().row(0)):
        raise bad_row(path, set(movies["movieId"])) or ValueError(f"{path} can't be read")
    return build(name, movies, ratings)


def _read_movies(path: Path):
    """A frame with item (row number), movieId, title, genres."""
    import polars as pl

    rows, known = [], set()
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), start=1):
        fields = line.split("::")
        if len(fields) != 3 or not fields[0].isdecimal():
            raise ValueError(f"{path}, line {number}: must be a number::title::genres, not {line[:200]!r}")
        if not fields[1].strip():
            raise ValueError(f"{path}, line {number}: every movie needs a title")
        if int(fields[0]) in known:
            raise ValueError(f"{path}, line {number}: movieId {fields[0]} appears more than once")
        known.add(int(fields[0]))
        rows.append((int(fields[0]), *fields[1:]))
    if not rows:
        raise ValueError(f"{path}: there must be a movie")
    return pl.DataFrame(rows, ["movieId", "title", "genres"], orient="row").with_row_index("item")
