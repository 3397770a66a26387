import gzip
import html
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.amazon import describe, read_amazon, read_reviews
from data.processed import RecDataset, load_corpus
from tests.data import real
from tests.data.real import needs_real

REAL = real.REAL / "amazon"
needs_real_data = needs_real("amazon")
MAPS = {"user2id": {"u": "1", "v": "2"}, "item2id": {"a": "1", "b": "2", "c": "3"}}
META = b"{'asin': 'b', 'title': 'Blue'}\n{'asin': 'z', 'title': 'Not in the data set'}\n"


def write(folder: Path, sequences: str = "1 1 2\n2 3\n", maps: object = MAPS, meta: bytes = META) -> Path:
    raw = folder / "raw" / "beauty"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "sequential_data.txt").write_text(sequences)
    (raw / "datamaps.json").write_text(maps if isinstance(maps, str) else json.dumps(maps))
    (raw / "meta.json.gz").write_bytes(gzip.compress(meta))
    return raw


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z0-9]+", text))


@needs_real_data
@pytest.mark.parametrize(
    ("split", "counts"), [("beauty", (22_363, 12_101, 198_502)), ("toys", (19_412, 11_924, 167_597))]
)
def test_the_real_files(tmp_path, split, counts):
    (tmp_path / "raw").symlink_to(REAL / "raw")
    corpus = load_corpus(RecDataset.AMAZON, str(tmp_path), split)
    assert (corpus.n_users, corpus.n_items, len(corpus.interactions)) == counts
    assert corpus.name == f"amazon_{split}" and corpus.interactions.timestamps is None

    maps = json.loads((REAL / "raw" / split / "datamaps.json").read_text())
    lines = [line.split() for line in (REAL / "raw" / split / "sequential_data.txt").read_text().splitlines()]
    items, offsets = corpus.interactions.items.tolist(), corpus.interactions.offsets.tolist()
    for line, user, start, end in zip(lines, corpus.user_keys, offsets, offsets[1:], strict=False):
        assert user == maps["id2user"][line[0]]
        assert [corpus.item_keys[n] for n in items[start:end]] == [maps["id2item"][n] for n in line[1:]]

    described = {}
    for line in gzip.open(REAL / "raw" / split / "meta.json.gz", "rt"):
        line = html.unescape(line).replace("\\t", " ").replace("\\n", " ")
        described[re.search(r"'asin': '(\w+)'", line)[1]] = words(line)
    for key, text in zip(corpus.item_keys, corpus.texts(), strict=True):
        assert words(text) <= described[key] | {"Brand", "Categories"}
        assert len(words(text)) > 2 and " ".join(text.split()) == text


def write_reviews(path: Path, rows: list[tuple[str, str, int]]) -> None:
    """A file as UCSD's: one JSON object a line, with fields that are not read."""
    with gzip.open(path, "wt", compresslevel=1) as file:
        for user, item, time in rows:
            fields = {"reviewerID": user, "asin": item, "reviewText": "Süß", "overall": 5.0, "unixReviewTime": time}
            file.write(json.dumps(fields) + "\n")


@needs_real_data
@pytest.mark.parametrize("split", ["beauty", "toys"])
def test_review_files_give_the_sequences_of_p5(tmp_path, split):
    """Written from P5's own sequences: in the order of the users' first rows, else shuffled, but for rows of one user
    and day; with users and items that are no part of the 5-core."""
    raw = REAL / "raw" / split
    expected = read_amazon(raw, "rebuilt")
    draw = random.Random(0)
    bounds = zip(expected.interactions.offsets, expected.interactions.offsets[1:], strict=False)
    rows, firsts = [], []
    for user, (start, end) in zip(expected.user_keys, bounds, strict=True):
        items = [expected.item_keys[n] for n in expected.interactions.items[start:end].tolist()]
        days = sorted(draw.randrange(3) for _ in items)
        by_day = [[(user, item, day) for item, d in zip(items, days, strict=True) if d == day] for day in range(3)]
        draw.shuffle(by_day)
        first, *rest = [row for day in by_day for row in day]
        firsts.append(first)
        rows.append(rest)
    strangers = [(f"stranger{n}", f"odd{n % 9}", 7) for n in range(40)]  # items have 4 or 5 users, users one item
    order = [n for n, rest in enumerate(rows) for _ in rest]
    draw.shuffle(order)
    shuffled = [rows[n].pop(0) for n in order]
    category = {"beauty": "Beauty", "toys": "Toys_and_Games"}[split]
    folder = tmp_path / "raw" / split
    folder.mkdir(parents=True)
    write_reviews(folder / f"reviews_{category}_5.json.gz", [*strangers[:20], *firsts, *strangers[20:], *shuffled])
    (folder / f"meta_{category}.json.gz").symlink_to(raw / "meta.json.gz")

    corpus = load_corpus(RecDataset.AMAZON, str(tmp_path), split)
    assert corpus.user_keys == expected.user_keys and corpus.item_keys == expected.item_keys
    assert corpus.interactions.items.equal(expected.interactions.items)
    assert corpus.interactions.offsets.equal(expected.interactions.offsets)
    assert corpus.texts() == expected.texts() and corpus.interactions.timestamps.max() == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"reviewerID": "u", "asin": "a"', "line 26: "),
        (b'{"reviewerID": "u", "asin": "a"}', "line 26: reviewerID and asin must be strings"),
        (b'{"reviewerID": "u", "asin": 5, "unixReviewTime": 1}', "line 26: reviewerID and asin must be strings"),
        (b'{"reviewerID": "u", "asin": "a", "unixReviewTime": 1.5}', "line 26: reviewerID and asin must be"),
        (b"[1]", "line 26: "),
        (b'{"reviewerID": "\xff"}', "line 26: "),
    ],
)
def test_malformed_reviews_are_named(tmp_path, line, message):
    path = tmp_path / "reviews_Beauty_5.json.gz"
    write_reviews(path, [(f"u{n % 5}", f"i{n // 5}", n) for n in range(25)])
    (tmp_path / "meta.json.gz").write_bytes(gzip.compress(b"{'asin': 'i2'}\n"))
    assert read_reviews(path, tmp_path / "meta.json.gz", "tiny").n_users == 5
    path.write_bytes(path.read_bytes() + gzip.compress(line + b"\n"))
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        read_reviews(path, tmp_path / "meta.json.gz", "tiny")


def test_reviews_without_a_5_core_are_refused(tmp_path):
    write_reviews(tmp_path / "reviews.json.gz", [("u", f"i{n}", n) for n in range(9)])
    with pytest.raises(ValueError, match="no user and item have 5 reviews each"):
        read_reviews(tmp_path / "reviews.json.gz", tmp_path / "meta.json.gz", "tiny")


@pytest.mark.parametrize(
    ("item", "text", "categories"),
    [
        (
            {
                "title": "Toni&amp;Guy  Whip ",
                "brand": "L&#39;Oreal",
                "categories": [["Beauty", "Hair &amp; Care", "Whips"]],
                "price": 9.99,
            },
            "Toni&Guy Whip. Brand: L'Oreal. Categories: Beauty > Hair & Care > Whips. Price: $9.99.",
            ["Beauty", "Hair & Care", "Whips"],
        ),
        (
            {"title": "Done!", "categories": [["A", "B"], ["C", "B"], ["A", "B"]], "price": 5},
            "Done! Categories: A > B; C > B. Price: $5.00.",
            ["A", "B", "C"],
        ),
        ({"title": "Dr. Bronner Jr."}, "Dr. Bronner Jr.", []),
        ({"brand": "X", "title": "", "categories": [[]]}, "Brand: X.", []),
        ({"brand": None, "title": None, "categories": None, "price": None}, "Unknown item.", []),
        ({}, "Unknown item.", []),
    ],
)
def test_the_description_of_an_item(item, text, categories):
    assert describe(item) == (text, categories)


@pytest.mark.parametrize(
    "item",
    [
        {"title": 5},
        {"brand": ["x"]},
        {"categories": ["A"]},
        {"categories": [[1]]},
        {"price": "9"},
        {"price": True},
    ],
)
def test_fields_of_another_type_are_refused(item):
    with pytest.raises(ValueError, match=next(iter(item))):
        describe(item)


def test_items_without_metadata_and_users_out_of_order(tmp_path):
    corpus = read_amazon(write(tmp_path, "2 3\n1 1 2\n"), "tiny")
    assert corpus.user_keys == ["v", "u"] and corpus.item_keys == ["a", "b", "c"]
    assert corpus.interactions.items.tolist() == [2, 0, 1]
    assert corpus.interactions.offsets.tolist() == [0, 1, 3]
    assert corpus.texts() == ["Unknown item.", "Blue.", "Unknown item."]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6), st.randoms())
def test_any_sequences_come_back(tmp_path, rows, random):
    numbers = list(range(1, len(rows) + 1))
    random.shuffle(numbers)
    users = {f"u{n}": str(n) for n in numbers}
    items = {f"i{n}": str(n) for n in random.sample(range(1, 10), 9)}
    lines = [" ".join(map(str, [n, *row])) + "\n" for n, row in zip(numbers, rows, strict=True)]
    meta = b"{'asin': 'i1', 'title': 'One'}\n"
    corpus = read_amazon(write(tmp_path, "".join(lines), {"user2id": users, "item2id": items}, meta), "drawn")
    assert corpus.user_keys == [f"u{n}" for n in numbers]
    found = [corpus.item_keys[item] for item in corpus.interactions.items.tolist()]
    assert found == [f"i{n}" for row in rows for n in row]
    assert corpus.interactions.offsets.diff().tolist() == [len(row) for row in rows]


BAD = [
    ("sequential_data.txt", {"sequences": "1 1 x\n2 3\n"}, "line 1: "),
    ("sequential_data.txt", {"sequences": "1 1 2\n2 3.0\n"}, "line 2: "),
    ("sequential_data.txt", {"sequences": "1 1 2\n2 4\n"}, "line 2: item 4 is not one of 1 to 3"),
    ("sequential_data.txt", {"sequences": "1 0 2\n2 3\n"}, "line 1: item 0 is not one of 1 to 3"),
    ("sequential_data.txt", {"sequences": "1 1 2\n2\n"}, "line 2: user 2 has no items"),
    ("sequential_data.txt", {"sequences": "1 1 2\n\n2 1\n"}, "line 2: a line starts with a user"),
    ("sequential_data.txt", {"sequences": "1 1 2\n3 1\n"}, "line 2: a line starts with a user"),
    ("sequential_data.txt", {"sequences": "1 1 2\n2 3\n1 3\n"}, "line 3: user 1 has a line already"),
    ("sequential_data.txt", {"sequences": "1 1 2\n"}, "line 2: the file ends after 1 of 2 users"),
    ("sequential_data.txt", {"sequences": ""}, "line 1: the file ends after 0 of 2 users"),
    ("datamaps.json", {"maps": '{"user2id": {"u": "1",\n "v": '}, "line 2: not valid JSON"),
    ("datamaps.json", {"maps": "[]"}, "line 1: 'user2id' must map"),
    ("datamaps.json", {"maps": {"user2id": MAPS["user2id"]}}, "line 1: 'item2id' must map"),
    ("datamaps.json", {"maps": {**MAPS, "item2id": {"a": "1", "b": "3"}}}, "[2] is missing"),
    ("datamaps.json", {"maps": {**MAPS, "item2id": {"a": "1", "b": "1"}}}, "[2] is missing"),
    ("datamaps.json", {"maps": {**MAPS, "item2id": {"a": 1, "b": 2}}}, "as strings"),
    ("datamaps.json", {"maps": {**MAPS, "item2id": {}}}, "'item2id' must map"),
    ("meta.json.gz", {"meta": META + b"{'asin': \n"}, "line 3: not a Python dict literal"),
    ("meta.json.gz", {"meta": b"{'asin': open('x')}\n"}, "line 1: not a Python dict literal"),
    ("meta.json.gz", {"meta": META + b"['asin']\n"}, "line 3: not a Python dict literal with an 'asin'"),
    ("meta.json.gz", {"meta": b"{'title': 'x'}\n"}, "line 1: not a Python dict literal with an 'asin'"),
    ("meta.json.gz", {"meta": META + b"\n"}, "line 3: not a Python dict literal"),
    ("meta.json.gz", {"meta": META + b"{'asin': 'y', 'title': 3}\n"}, "line 3: title has the unexpected"),
    ("meta.json.gz", {"meta": b"{'asin': 'z'}\n"}, "line 2: the file ends, and describes no item of"),
    ("meta.json.gz", {"meta": META + META}, "line 3: item 'b' has a line already"),
    ("meta.json.gz", {"meta": b"{'asin': 'b', 'title': '\xff'}\n"}, "line 1: "),
    ("meta.json.gz", {"meta": b"{'asin': 'b', 'title': '\\ud800'}\n"}, "line 1: "),
]


@pytest.mark.parametrize(("file", "contents", "message"), BAD)
def test_malformed_files_are_named_and_leave_no_cache(tmp_path, file, contents, message):
    raw = write(tmp_path, **contents)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_corpus(RecDataset.AMAZON, str(tmp_path), "beauty")
    assert f"{raw / file}, line " in str(raised.value)
    assert not (tmp_path / "processed").exists()


@pytest.mark.parametrize("content", [gzip.compress(META, mtime=0)[:-9], META, b"\x1f\x8bxx", b""])
def test_a_truncated_or_foreign_gzip_file_is_named(tmp_path, content):
    raw = write(tmp_path)
    (raw / "meta.json.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"meta.json.gz, line \d+: "):
        load_corpus(RecDataset.AMAZON, str(tmp_path), "beauty")
    assert not (tmp_path / "processed").exists()
