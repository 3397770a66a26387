import csv
import math
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import Corpus
from data.ml32m import read_movielens
from data.splits import Splits, leave_one_out, temporal

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
HEADERS = {
    "movies.csv": ["movieId", "title", "genres"],
    "ratings.csv": ["userId", "movieId", "rating", "timestamp"],
    "tags.csv": ["userId", "movieId", "tag", "timestamp"],
}
GOOD = {
    "movies.csv": "5,Heat (1995),Action|Crime\n2,M,(no genres listed)\n",
    "ratings.csv": "1,5,4.0,100\n1,2,0.5,90\n",
    "tags.csv": "1,5,Pacino,7\n",
}


def write(folder: Path, **contents: str | bytes) -> Path:
    """The three files under their headers; `movies="..."` takes the place of what is in GOOD."""
    for file, header in HEADERS.items():
        content = contents.get(file.removesuffix(".csv"), GOOD[file])
        content = content if isinstance(content, bytes) else content.encode()
        (folder / file).write_bytes((",".join(header) + "\n").encode() + content)
    return folder


def expected(folder: Path, cut: float = math.inf) -> dict:
    """The same corpus by the standard library, row by row. cut: the time that the temporal split has; without one, of
    leave-one-out."""
    movies = list(csv.DictReader((folder / "movies.csv").open(encoding="utf-8", newline="")))
    ratings = list(csv.DictReader((folder / "ratings.csv").open(encoding="utf-8", newline="")))
    number = {row["movieId"]: n for n, row in enumerate(movies)}
    users: dict[int, list] = defaultdict(list)
    for row in ratings:
        users[int(row["userId"])].append((int(row["timestamp"]), number[row["movieId"]]))
    rows = [sorted(users[user], key=lambda pair: pair[0]) for user in sorted(users)]
    held_out = set()
    for user, row in zip(sorted(users), rows, strict=True):
        last = [pair for pair in row if pair[0] >= cut] if cut < math.inf else row[-2:] if len(row) > 2 else []
        held_out |= {(user, item) for _, item in last}
    tags: dict[str, Counter] = defaultdict(Counter)
    for row in csv.DictReader((folder / "tags.csv").open(encoding="utf-8", newline="")):
        if int(row["timestamp"]) < cut and (int(row["userId"]), number[row["movieId"]]) not in held_out:
            tags[row["movieId"]][" ".join(row["tag"].split()).lower()] += 1
    texts = []
    for movie in movies:
        title = " ".join(movie["title"].split())
        text = title if title.endswith(".") else title + "."
        if movie["genres"] != "(no genres listed)":
            text += " Genres: " + ", ".join(movie["genres"].split("|")) + "."
        ranked = sorted((-count, tag) for tag, count in tags[movie["movieId"]].items() if tag)[:10]
        texts.append(text + (" Tags: " + ", ".join(tag for _, tag in ranked) + "." if ranked else ""))
    return {
        "item_keys": [row["movieId"] for row in movies],
        "user_keys": [str(user) for user in sorted(users)],
        "items": [item for row in rows for _, item in row],
        "timestamps": [time for row in rows for time, _ in row],
        "lengths": [len(row) for row in rows],
        "texts": texts,
    }


def found(corpus: Corpus, splits: Splits) -> dict:
    corpus.apply_split(splits)
    return {
        "item_keys": corpus.item_keys,
        "user_keys": corpus.user_keys,
        "items": corpus.interactions.items.tolist(),
        "timestamps": corpus.interactions.timestamps.tolist(),
        "lengths": corpus.interactions.offsets.diff().tolist(),
        "texts": corpus.texts(),
    }


def test_the_sample_is_what_row_by_row_reading_gives():
    corpus = read_movielens(SAMPLE, "sample")
    assert (corpus.n_users, corpus.n_items, len(corpus.interactions)) == (610, 9742, 100_836)
    assert corpus.texts()[0] == "Toy Story (1995). Genres: Adventure, Animation, Children, Comedy, Fantasy."
    before = corpus.text_hash
    assert found(corpus, leave_one_out(corpus.interactions)) == expected(SAMPLE)
    assert corpus.text_hash != before
    genres = {name for group in corpus.categories() for name in group}
    assert len(genres) == 19 and "(no genres listed)" not in genres
    assert corpus.texts()[0] == (
        "Toy Story (1995). Genres: Adventure, Animation, Children, Comedy, Fantasy. Tags: pixar, fun."
    )
    cut = sorted(corpus.interactions.timestamps.tolist())[round(0.8 * 100_836)]
    assert found(corpus, temporal(corpus.interactions)) == expected(SAMPLE, cut)


def test_the_sample_carries_its_licence_and_all_files_unchanged():
    assert "Usage License" in (SAMPLE / "README.txt").read_text(encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in SAMPLE.iterdir()}
    assert sizes == {
        "README.txt": 8342,
        "links.csv": 197_979,
        "movies.csv": 494_431,
        "ratings.csv": 2_483_723,
        "tags.csv": 118_660,
    }


printable = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6)
words = st.lists(printable, min_size=1, max_size=3).map(" ".join)
stars = st.sampled_from(["0.5", "3", "5.0"])
raw_files = st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True).flatmap(
    lambda movies: st.fixed_dictionaries(
        {
            "movies": st.tuples(
                *[st.tuples(st.just(m), words, st.sampled_from(["A|B", "(no genres listed)", "C"])) for m in movies]
            ),
            "ratings": st.lists(
                st.tuples(st.integers(1, 12), st.sampled_from(movies), stars, st.integers(0, 3)), min_size=1
            ),
            "tags": st.lists(
                st.tuples(st.integers(1, 3), st.sampled_from(movies), words | st.just(""), st.just(9)),
                max_size=40,
            ),
        }
    )
)


@settings(max_examples=50)
@given(raw_files)
def test_any_files_are_read_as_row_by_row(raw):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, header in HEADERS.items():
            with (folder / file).open("w", encoding="utf-8", newline="") as output:
                csv.writer(output, lineterminator="\n").writerows([header, *raw[file.removesuffix(".csv")]])
        corpus = read_movielens(folder, "drawn")
        assert found(corpus, leave_one_out(corpus.interactions)) == expected(folder)


def test_ties_keep_the_file_order_and_users_sort_by_number(tmp_path):
    ratings = "10,5,1,7\n9,5,1,7\n9,2,1,7\n10,2,1,7\n10,2,1,3\n"
    corpus = read_movielens(write(tmp_path, ratings=ratings), "tiny")
    assert corpus.user_keys == ["9", "10"]
    assert corpus.interactions.items.tolist() == [0, 1, 1, 0, 1]
    assert corpus.interactions.offsets.tolist() == [0, 2, 5]


def test_only_the_ten_most_frequent_tags_ties_by_alphabet(tmp_path):
    tags = "".join(f"1,5,{letter},1\n" for letter in "lkjihgfedcbaKK")
    corpus = read_movielens(write(tmp_path, tags=tags), "tiny")
    corpus.apply_split(leave_one_out(corpus.interactions))
    assert corpus.texts()[0] == "Heat (1995). Genres: Action, Crime. Tags: k, a, b, c, d, e, f, g, h, i."


def test_windows_line_ends_byte_order_mark_and_quoted_line_breaks(tmp_path):
    plain = read_movielens(write(tmp_path), "tiny")
    for file in HEADERS:
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert read_movielens(tmp_path, "tiny").hash == plain.hash
    corpus = read_movielens(write(tmp_path, movies='5,"A ""B"",\nC.",X\n2,D,(no genres listed)\n'), "tiny")
    corpus.apply_split(leave_one_out(corpus.interactions))
    assert corpus.texts() == ['A "B", C. Genres: X. Tags: pacino.', "D."]


BAD = [
    ("ratings", "1,5,4.0,100\n1,2,0.5\n", "line 3: 3 fields where there must be 4"),
    ("ratings", "1,5,4.0,100,6\n", "line 2: 5 fields where there must be 4"),
    ("ratings", "1,5,4.0,100\n\n1,2,0.5,90\n", "line 3: 0 fields"),
    ("ratings", "1,5,good,100\n", "line 2: rating must be a number, not 'good'"),
    ("ratings", "1,5,nan,100\n", "line 2: rating must be finite"),
    ("ratings", "1,5,4.0,100\nx,5,4.0,100\n", "line 3: userId must be a number, not 'x'"),
    ("ratings", "1,5,4.0,\n", "line 2: timestamp must be a number, not ''"),
    ("ratings", "1,5,4.0,1.5\n", "line 2: timestamp must be a number"),
    ("ratings", "1,5,4.0,100\n1,7,4.0,100\n", "line 3: movieId 7 is not among the movies"),
    ("ratings", "1,\xe9,4.0,100\n".encode("latin-1"), "line 2: the bytes are not UTF-8"),
    ("movies", "5,Heat\n2,M,X\n", "line 2: 2 fields where there must be 3"),
    ("movies", "5,Heat,X\ntwo,M,X\n", "line 3: movieId must be a number, not 'two'"),
    ("movies", "5,Mis\xe9rables,X\n2,M,X\n".encode("latin-1"), "line 2: the bytes are not UTF-8"),
    ("movies", "5,Heat,X\n5,M,X\n2,N,X\n", "movieId 5 appears more than once"),
    ("movies", "5,,X\n2,N,X\n", "every movie needs a title"),
    ("movies", '5,"Heat,X\n2,M,X\n', "line 2: "),
    ("movies", "", "there must be a movie"),
    ("tags", "1,5,a,1\n1,5,a\n", "line 3: 3 fields where there must be 4"),
    ("tags", "1,7,a,1\n", "line 2: movieId 7 is not among the movies"),
    ("tags", '1,5,"a\nb",1\n1,5,c,then\n', "line 4: timestamp must be a number, not 'then'"),
    ("tags", b"1,5,\xff,1\n", "line 2: the bytes are not UTF-8"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD)
def test_malformed_rows_are_named(tmp_path, file, content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_movielens(write(tmp_path, **{file: content}), "tiny")
    assert str(tmp_path / f"{file}.csv") in str(raised.value)


@pytest.mark.parametrize("header", [b"", b"1,5,4.0,100\n", b"movieId,userId,rating,timestamp\n1,5,4,1\n"])
def test_another_header_is_refused(tmp_path, header):
    write(tmp_path)
    (tmp_path / "ratings.csv").write_bytes(header)
    with pytest.raises(ValueError, match="ratings.csv, line 1: the header must be 'userId,movieId"):
        read_movielens(tmp_path, "tiny")
