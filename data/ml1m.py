"""MovieLens 1M in its own format: fields separated by "::", text in Latin-1, no header.

| users | movies | rated | rated five times or more | ratings   |
|-------|--------|-------|--------------------------|-----------|
| 6,040 | 3,883  | 3,706 | 3,416                    | 1,000,209 |

Harper and Konstan 2015, https://doi.org/10.1145/2827872.
"""

from collections.abc import Container
from pathlib import Path

from data.corpus import Corpus
from data.download import RemoteFile
from data.ml32m import build, row_problem

FILES = ("movies.dat", "ratings.dat")
ARCHIVE = RemoteFile(
    "ml-1m.zip",
    (
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "http://files.grouplens.org/datasets/movielens/ml-1m.zip",
    ),
    "md5:c4d9eecfca2ab87c1945afe126590906",
    {name: f"ml-1m/{name}" for name in FILES},
)
SEPARATOR = "\x1f"
COLUMNS = dict.fromkeys(("userId", "movieId", "rating", "timestamp"), int)


def read_ml1m(folder: Path, name: str) -> Corpus:
    """Reads movies.dat and ratings.dat from `folder`.

    Items are all 3,883 movies, rated or not, in file order; users are those who rated, by ascending id. A user's
    interactions are all their ratings, whatever the stars, by timestamp; ties keep the order of the file.

    Raises ValueError that names file and line where a row has another number of fields, no number where one must be,
    an unknown or repeated movie, or no title.
    """
    import polars as pl

    movies = _read_movies(folder / "movies.dat")
    path = folder / "ratings.dat"
    columns = dict.fromkeys(COLUMNS, pl.Int64)
    content = path.read_bytes().replace(b"::", SEPARATOR.encode())
    try:
        ratings = pl.read_csv(content, has_header=False, separator=SEPARATOR, quote_char=None, schema=columns)
    except pl.exceptions.PolarsError as error:
        raise _bad_rating(path, movies["movieId"]) or ValueError(f"{path} can't be read: {error}") from error
    ratings = ratings.join(movies.select("movieId", "item"), on="movieId", how="left", maintain_order="left")
    if sum(ratings.null_count().row(0)):
        raise _bad_rating(path, movies["movieId"]) or ValueError(f"{path} can't be read")
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


def _bad_rating(path: Path, known_movies: Container[int]) -> ValueError | None:
    """The error that describes the first malformed row, or None. Slow: for suspect files."""
    known = set(known_movies)
    with open(path, encoding="latin-1") as lines:
        for number, line in enumerate(lines, start=1):
            if problem := row_problem(line.rstrip("\r\n").split("::"), COLUMNS, known):
                return ValueError(f"{path}, line {number}: {problem}")
    return None
