"""Times of tables. Reading them is tested with the corpora made of them."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tables import times

whole = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 50).map(lambda n: 1_700_000_000_000_000_000 + n)
numbers = (
    whole.map(Decimal) | st.decimals(-(10**12), 10**12, places=9) | st.sampled_from([Decimal("17e8"), Decimal("1.5")])
)
moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))


def read(values: pl.Series) -> list[int]:
    return times(Path("t"), pl.DataFrame({"time": values}), "time").to_list()


@given(st.lists(numbers, min_size=1))
def test_numbers_keep_their_order_whatever_stands_beside_them(values):
    assert read(pl.Series([str(value) for value in values])) == [int(value * 10**9) for value in values]


@given(st.lists(st.tuples(moments, st.integers(0, 999), st.sampled_from(["", "Z", "+02:00"])), min_size=1))
def test_dates_keep_their_nanoseconds(rows):
    texts, expected = [], []
    for moment, nanoseconds, zone in rows:
        texts.append(f"{moment.replace(tzinfo=None).isoformat(timespec='microseconds')}{nanoseconds:03}{zone}")
        since = moment - datetime(1970, 1, 1, tzinfo=UTC) - timedelta(hours=2 if zone == "+02:00" else 0)
        expected.append((since // timedelta(microseconds=1)) * 1000 + nanoseconds)
    assert read(pl.Series(texts)) == expected


@pytest.mark.parametrize("unit", ["ns", "us", "ms"])
@given(st.lists(st.integers(-(2**50), 2**50), min_size=1))
def test_columns_of_moments_integers_and_floats_are_exact(unit, values):
    scale = {"ns": 1, "us": 10**3, "ms": 10**6}[unit]
    moments = pl.Series(values, dtype=pl.Int64).cast(pl.Datetime(unit))
    assert read(moments) == read(moments.dt.replace_time_zone("UTC")) == [value * scale for value in values]
    assert read(pl.Series(values)) == [value * 10**9 for value in values]
    floats = np.array(values) / 1024
    assert (np.argsort(read(pl.Series(floats)), kind="stable") == np.argsort(floats, kind="stable")).all()


@pytest.mark.parametrize("bad", ["", "x", "nan", "1e30", "9223372036854775808", "2024-02-30", None])
def test_what_is_no_time_is_named_with_its_row(bad):
    with pytest.raises(ValueError, match=r"t, row 2: 'time' must be a number or an ISO date, not"):
        read(pl.Series(["5", bad, "7.5"]))
    with pytest.raises(ValueError, match=r"t, row 1: 'time' must be a number"):
        read(pl.Series([float("inf"), 1.0]))
