"""Keys and predicates against loops over the items."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.serving.lookup import Lookup

KEYS = ["a", "7", "b c", "é"]
TITLES = ["One", "two = 2", "Two Ones", ""]
LOOKUP = Lookup(KEYS, TITLES, {"genres": [["Horror", "Sci-Fi"], ["horror"], [], ["War"]]})
rows = st.lists(st.lists(st.sampled_from([*KEYS, "", "A", "none"]), max_size=5), max_size=5)


@given(rows, st.booleans())
def test_rows_of_keys_become_rows_of_items(rows, series):
    given = pl.Series(rows, dtype=pl.List(pl.String)) if series else rows
    found, unknown = LOOKUP.rows(given)
    expected = [[KEYS.index(key) for key in row if key in KEYS] for row in rows]
    bounds = found.offsets.tolist()
    assert [found.values[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)] == expected
    assert unknown.tolist() == [len(row) - len(known) for row, known in zip(rows, expected, strict=True)]
    assert found.max_length == max(map(len, expected), default=0)


def test_numbers_are_keys_as_text_has_them():
    found, unknown = LOOKUP.rows([[7, 7.0, np.int64(7), np.float32(7), "7", 7.5], {"a"}, np.array([7, 8])])
    assert found.values.tolist() == [1, 1, 1, 1, 1, 0, 1] and unknown.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("predicate", "items"),
    [
        ("genres = horror", [0, 1]),
        ("  genres=HORROR ", [0, 1]),
        ("genres contains hor", [0, 1]),
        ("genres = Sci-Fi", [0]),
        ("title = two = 2", [1]),
        ("title contains ONE", [0, 2]),
        ('genres = "Sci-Fi"', [0]),
        ("title='two ones'", [2]),
    ],
)
def test_a_predicate_fits_items(predicate, items):
    assert LOOKUP.mask(predicate).nonzero()[:, 0].tolist() == items


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ("Horror", "'Horror' is neither a list of keys nor a predicate"),
        ("genres =", "nor a predicate"),
        ("genre = Horror", "no column 'genre', but title, genres; train.item_columns"),
        ("genres = Hor", r"'genres = Hor' fits no item\.$"),
        ("genres = Horror or genres = War", "fits no item. A predicate has one value: for several give a file of keys"),
        ("genres = Horror and War", "fits no item. A predicate has one value"),
    ],
)
def test_what_is_no_predicate_of_these_items_is_named(predicate, message):
    with pytest.raises(ValueError, match=message):
        LOOKUP.mask(predicate)


@pytest.mark.parametrize("rows", [["ab"], [None], [5], [[None]], [[("a",)]]])
def test_what_is_no_list_of_keys_is_refused(rows):
    with pytest.raises(ValueError, match="as a list of their keys|is a text or a number"):
        LOOKUP.rows(rows)
