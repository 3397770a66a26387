"""Rows of different lengths against lists of rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.jagged import (
    JaggedTensor,
    first_occurrences,
    jagged_to_padded,
    lengths_to_offsets,
    padded_to_jagged,
    row_indices,
)
from tests.ops.rows import jagged, random_rows, split

lengths_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=6)
DIM = 3


@settings(max_examples=25)
@given(lengths_strategy)
def test_rows_have_lengths_offsets_and_positions(lengths):
    rows = [torch.randn(length, DIM) for length in lengths]
    joined = jagged(rows)
    assert all(torch.equal(*pair) for pair in zip(split(joined), rows, strict=True))
    assert torch.equal(lengths_to_offsets(torch.tensor(lengths)), joined.offsets)
    assert joined.lengths.tolist() == lengths and joined.batch_size == len(lengths)
    assert joined.positions().tolist() == [place for length in lengths for place in range(length)]
    owners = row_indices(joined.offsets, sum(lengths))
    assert owners.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    doubled = joined.with_values(joined.values * 2)
    assert torch.equal(doubled.offsets, joined.offsets) and torch.equal(split(doubled)[-1], rows[-1] * 2)


@settings(max_examples=25)
@given(lengths_strategy, st.integers(0, 3))
def test_padding_and_back(lengths, slack):
    rows = random_rows(lengths, DIM, slack=slack)
    padded = jagged_to_padded(rows.values, rows.offsets, rows.max_length)
    assert padded.shape == (len(lengths), max(lengths) + slack, DIM)
    for row, expected in zip(padded, split(rows), strict=True):
        assert torch.equal(row[: len(expected)], expected) and not row[len(expected) :].any()
    assert torch.equal(padded_to_jagged(padded, rows.offsets, sum(lengths)), rows.values)


def test_uniform_rows_are_a_matrix():
    matrix = torch.randn(3, 4, DIM)
    rows = JaggedTensor.uniform(matrix)
    assert torch.equal(torch.stack(split(rows)), matrix) and rows.max_length == 4


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=5))
def test_what_occurs_again_in_a_row_is_marked(rows):
    values = torch.tensor([item for row in rows for item in row], dtype=torch.int64)
    found = first_occurrences(JaggedTensor(values, lengths_to_offsets(torch.tensor([len(row) for row in rows])), 9))
    assert found.tolist() == [-1 if item in row[:n] else item for row in rows for n, item in enumerate(row)]
