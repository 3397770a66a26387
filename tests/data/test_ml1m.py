import re
from collections import Counter
from pathlib import Path

import pytest

from data.ml1m import read_ml1m
from data.processed import RecDataset, load_corpus
from tests.data.real import REAL, needs_real

GOOD = {
    "movies.dat": "7::Amélie (2001)::Comedy|Romance\n2::Heat, The :Film: (1995)::Action\n9::Alone::\n".encode(
        "latin-1"
    ),
    "ratings.dat": b"2::7::5::20\n1::2::4::10\n2::2::3::5\n2::9::1::20\n",
}


def write(folder: Path, **changed: bytes) -> Path:
    for file, content in (GOOD | {f"{name}.dat": content for name, content in changed.items()}).items():
        (folder / file).write_bytes(content)
    return folder


@needs_real("ml-1m")
def test_the_real_files(tmp_path):
    (tmp_path / "raw").symlink_to(REAL / "ml-1m")
    corpus = load_corpus(RecDataset.ML_1M, str(tmp_path))
    assert (corpus.name, corpus.n_users, corpus.n_items, len(corpus.interactions)) == ("ml1m", 6040, 3883, 1_000_209)
    rated = Counter(corpus.interactions.items.tolist())
    assert len(rated) == 3706 and sum(count >= 5 for count in rated.values()) == 3416

    rows = {}
    for line in (REAL / "ml-1m/ratings.dat").read_text().splitlines():
        user, movie, _, time = line.split("::")
        rows.setdefault(user, []).append((int(time), movie))
    offsets, times = corpus.interactions.offsets.tolist(), corpus.interactions.timestamps.tolist()
    items = [corpus.item_keys[n] for n in corpus.interactions.items.tolist()]
    assert corpus.user_keys == sorted(rows, key=int)
    for user, start, end in zip(corpus.user_keys, offsets, offsets[1:], strict=False):
        expected = sorted(rows[user], key=lambda row: row[0])
        assert list(zip(times[start:end], items[start:end], strict=True)) == expected

    assert corpus.texts()[0] == "Toy Story (1995). Genres: Animation, Children's, Comedy."
    assert any("é" in text for text in corpus.texts()) and not any("\ufffd" in text for text in corpus.texts())
    assert len({name for group in corpus.categories() for name in group}) == 18


def test_what_is_read(tmp_path):
    corpus = read_ml1m(write(tmp_path), "tiny")
    assert corpus.item_keys == ["7", "2", "9"] and corpus.user_keys == ["1", "2"]
    assert corpus.interactions.offsets.tolist() == [0, 1, 4]
    assert corpus.interactions.items.tolist() == [1, 1, 0, 2]  # ties in the order of the file
    assert corpus.interactions.timestamps.tolist() == [10, 5, 20, 20]
    assert corpus.texts() == [
        "Amélie (2001). Genres: Comedy, Romance.",
        "Heat, The :Film: (1995). Genres: Action.",
        "Alone.",
    ]
    assert corpus.categories() == [["Comedy", "Romance"], ["Action"], []]
    windows = {name: content.replace(b"\n", b"\r\n") for name, content in GOOD.items()}
    assert read_ml1m(write(tmp_path, **{k[:-4]: v for k, v in windows.items()}), "tiny").hash == corpus.hash


BAD = [
    ("ratings", b"1::7::5::20\n1::7::5\n", "line 2: 3 fields where there must be 4"),
    ("ratings", b"1::7::5::20\n1::7::5::2::9\n", "line 2: 5 fields where there must be 4"),
    ("ratings", b"1::7::5::20\n\n1::7::5::2\n", "line 2: 1 fields"),
    ("ratings", b"1::7::5::x\n", "line 1: timestamp must be a number, not 'x'"),
    ("ratings", b"1::7::5::\n", "line 1: timestamp must be a number, not ''"),
    ("ratings", b"1::8::5::20\n", "line 1: movieId 8 is not among the movies"),
    ("ratings", b"1:7:5:20\n", "line 1: 1 fields"),
    ("ratings", b"1::\xe9::5::20\n", "line 1: movieId must be a number, not 'é'"),
    ("movies", b"7::Heat\n", "line 1: must be a number::title::genres, not '7::Heat'"),
    ("movies", b"7::Heat::A\nx::Heat::A\n", "line 2: must be a number::title::genres"),
    ("movies", b"7:: ::A\n", "line 1: every movie needs a title"),
    ("movies", b"7::A::B\n7::C::D\n", "line 2: movieId 7 appears more than once"),
    ("movies", b"", "there must be a movie"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD)
def test_malformed_rows_are_named(tmp_path, file, content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_ml1m(write(tmp_path, **{file: content}), "tiny")
    assert str(tmp_path / f"{file}.dat") in str(raised.value)
