"""Batches against slicing Python lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schemas import Interactions
from data.batches import (
    CONSUMED_BUCKET,
    SequenceSource,
    bucket_size,
    history_items,
    padding_rows,
)
from data.splits import drawn, every_prefix, leave_one_out, windows
from ops.jagged import JaggedTensor

CPU = torch.device("cpu")
users_strategy = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=50), min_size=1, max_size=8)


def to_interactions(rows: list[list[int]]) -> Interactions:
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return Interactions(torch.tensor([item for row in rows for item in row], dtype=torch.int32), offsets)


def to_rows(jagged: JaggedTensor) -> list[list[int]]:
    bounds = jagged.offsets.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(jagged.values)
    rows = [jagged.values[start:end].tolist() for start, end in zip(bounds, bounds[1:], strict=False)]
    assert max(map(len, rows)) <= jagged.max_length
    return rows


@settings(max_examples=25)
@given(users_strategy, st.integers(1, 60), st.sampled_from(["every_prefix", "windows", "test"]), st.data())
def test_a_batch_is_what_slicing_gives(rows, max_items, rule, data):
    interactions = to_interactions(rows)
    splits = leave_one_out(interactions)
    samples = {
        "every_prefix": every_prefix(splits.train_lengths),
        "windows": windows(splits.train_lengths, max_items),
        "test": splits.test,
    }[rule]
    if len(samples) == 0:
        return
    source = SequenceSource(interactions, samples, max_items, CPU)
    index = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=9))
    batch = source.batch(torch.tensor(index))
    users = [int(samples.user[i]) for i in index]
    positions = [int(samples.position[i]) for i in index]
    assert source.n_targets(source.lengths(torch.tensor(index))) == len(index)
    assert batch.user.tolist() == users and len(source) == len(samples)
    histories = [rows[u][max(0, p - max_items) : p] for u, p in zip(users, positions, strict=True)]
    assert to_rows(batch.history) == histories
    assert to_rows(batch.targets) == [[rows[u][p]] for u, p in zip(users, positions, strict=True)]
    assert batch.history.values.dtype == batch.targets.values.dtype == batch.user.dtype == torch.int64


@settings(max_examples=25)
@given(users_strategy, st.integers(1, 60), st.data())
def test_every_position_is_the_target_of_what_came_before_it(rows, max_items, data):
    """The contract of SeqBatch: target i of row b followed the first n_b - m_b + 1 + i items of the history."""
    interactions = to_interactions(rows)
    samples = windows(leave_one_out(interactions).train_lengths, max_items)
    if len(samples) == 0:
        return
    uniform = data.draw(st.lists(st.floats(0, 0.999), min_size=len(samples), max_size=len(samples)))
    uniform = torch.tensor(uniform, dtype=torch.float64)
    index = torch.arange(len(samples))
    source = SequenceSource(interactions, samples, max_items, CPU, every_position=True)
    batch = source.batch(index, uniform)
    last = SequenceSource(interactions, samples, max_items, CPU).batch(index, uniform)
    assert to_rows(batch.history) == to_rows(last.history)
    assert source.n_targets(source.lengths(index, uniform)) == len(batch.targets.values)
    for row, (history, targets, final) in enumerate(
        zip(to_rows(batch.history), to_rows(batch.targets), to_rows(last.targets), strict=True)
    ):
        user = rows[int(samples.user[row])]
        position, length = (int(part[row]) for part in drawn(samples, index, uniform, max_items))
        seen = len(history) - len(targets) + 1
        assert 1 <= seen and targets[-1:] == final
        for i, target in enumerate(targets):
            before = position - len(targets) + 1 + i
            assert target == user[before] and history[: seen + i] == user[position - length : before]


@settings(max_examples=25)
@given(users_strategy, st.integers(1, 10))
def test_consumed_is_all_that_came_before_the_target(rows, max_items):
    interactions = to_interactions(rows)
    samples = leave_one_out(interactions).test
    if len(samples) == 0:
        return
    source = SequenceSource(interactions, samples, max_items, CPU)
    [batch] = source.in_order(len(samples))
    assert to_rows(batch.consumed) == [row[:-1] for row in rows if len(row) >= 3]


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_in_order_covers_each_sample_once_over_the_ranks(n, batch_size, world_size):
    interactions = to_interactions([[user, user, user] for user in range(n)])
    source = SequenceSource(interactions, leave_one_out(interactions).test, 10, CPU)
    shares = [[b.user.tolist() for b in source.in_order(batch_size, rank, world_size)] for rank in range(world_size)]
    assert sorted(user for share in shares for batch in share for user in batch) == list(range(n))
    assert all(len(batch) <= batch_size and batch == sorted(batch) for share in shares for batch in share)
    assert [user for b in source.in_order(batch_size) for user in b.user.tolist()] == list(range(n))


@settings(max_examples=25)
@given(users_strategy, st.integers(1, 10), st.booleans(), st.data())
def test_what_a_target_has_seen_is_each_item_before_it_once(rows, max_items, every_position, data):
    interactions = to_interactions(rows)
    lengths = interactions.offsets.diff()
    samples = windows(lengths, max_items) if every_position else every_prefix(lengths)
    if len(samples) == 0:
        return
    source = SequenceSource(interactions, samples, max_items, CPU, every_position)
    index = torch.arange(len(samples))
    uniform = torch.full((len(samples),), data.draw(st.floats(0, 0.99)), dtype=torch.float64)
    batch, (position, _) = source.batch(index, uniform), drawn(samples, index, uniform, max_items)
    (first, last, items), (own, own_seen, target_seen) = batch.seen, history_items(batch)
    place = 0
    counts = zip(batch.user.tolist(), position.tolist(), batch.targets.lengths.tolist(), strict=True)
    for row, (user, end, count) in enumerate(counts):
        history = rows[user][end - int(batch.history.lengths[row]) : end]
        once = [-1 if item in history[:n] else item for n, item in enumerate(history)]
        assert own[row].tolist() == once + [-1] * (max_items - len(once))
        for before in range(end - count + 1, end + 1):
            seen = [item for item in items[first[place] : last[place]].tolist() if item >= 0]
            assert sorted(seen) == sorted(set(rows[user][:before]))
            of_history = own_seen[place, : len(once)].tolist()
            assert all(mark == (item in seen) for item, mark in zip(once, of_history, strict=True) if item >= 0)
            assert bool(target_seen[place]) == (rows[user][before] in seen)
            assert int(batch.n_before[place]) == before - (end - len(history))
            place += 1
    assert place == len(batch.targets.values) == len(first) == len(last)


def test_a_source_with_other_samples_is_one_of_its_own_that_shares_the_items():
    splits = leave_one_out(to_interactions([[3, 1, 4, 1, 5], [9, 2, 6], [5, 3]]))
    source = SequenceSource(splits.interactions, windows(splits.train_lengths, 4), 4, CPU, every_position=True)
    before = len(source)
    other = source.with_samples(splits.test)
    fresh = SequenceSource(splits.interactions, splits.test, 4, CPU)
    for mine, own in zip(other.in_order(8), fresh.in_order(8), strict=True):
        assert to_rows(mine.history) == to_rows(own.history) == [[3, 1, 4, 1], [9, 2]]
        assert mine.targets.values.tolist() == own.targets.values.tolist() == [5, 6]
        assert to_rows(mine.consumed) == to_rows(own.consumed)
    assert other.data is source.data and len(source) == before and source.every_position


@pytest.mark.parametrize("every_position", [True, False])
def test_padding_rows_make_up_the_size_and_leave_the_samples_as_they_are(every_position):
    interactions = Interactions(torch.arange(40, dtype=torch.int32) % 17, torch.tensor([0, 3, 15, 40]))
    samples = windows(interactions.offsets.diff(), 6) if every_position else every_prefix(interactions.offsets.diff())
    source = SequenceSource(interactions, samples, 6, torch.device("cpu"), every_position)
    index, uniform = torch.tensor([0, 2, 3]), torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)
    plain, n_items = source.batch(index, uniform), source.n_items(index, uniform)
    assert len(plain.history.values) == n_items
    assert len(plain.targets.values) == source.n_targets(source.lengths(index, uniform))
    for size in (n_items, n_items + 1, n_items + 6, n_items + 17, n_items + 18):
        filled = source.batch(index, uniform, size, padding=3)
        n_targets = len(plain.targets.values)
        assert len(filled.history.values) == int(filled.history.offsets[-1]) == size
        assert filled.history.batch_size == len(filled.user) == len(index) + 3
        assert int(filled.history.lengths.max()) <= filled.history.max_length == 6
        assert torch.equal(filled.history.values[:n_items], plain.history.values)
        assert torch.equal(filled.history.offsets[: len(index) + 1], plain.history.offsets)
        assert torch.equal(filled.user[: len(index)], plain.user)
        assert torch.equal(filled.targets.values[:n_targets], plain.targets.values)
        assert torch.equal(filled.targets.offsets[: len(index) + 1], plain.targets.offsets)
        assert filled.target_weights.tolist() == [1.0] * n_targets + [0.0] * (len(filled.targets.values) - n_targets)


@settings(max_examples=50)
@given(st.integers(1, 5000), st.integers(1, 50), st.data())
def test_a_batch_is_filled_up_by_less_than_the_padding_rows_can_hold(batch_size, max_items, data):
    n_items, padding = data.draw(st.integers(1, batch_size * max_items)), padding_rows(batch_size)
    size = bucket_size(n_items, padding, max_items)
    assert n_items <= size < n_items + padding * max_items and size % (padding * max_items) == 0
    assert bucket_size(n_items, 0, max_items) == n_items


def test_padding_rows_may_be_longer_than_the_data():
    interactions = Interactions(torch.arange(6, dtype=torch.int32), torch.tensor([0, 6]))
    source = SequenceSource(interactions, windows(interactions.offsets.diff(), 20), 20, torch.device("cpu"), True)
    batch = source.batch(torch.tensor([0]), None, 20, padding=1)
    assert len(batch.history.values) == 20 and int(batch.target_weights.sum()) == 5
    items, *_ = history_items(batch)
    assert items[0].tolist() == [0, 1, 2, 3, 4] + [-1] * 15


@settings(max_examples=25)
@given(users_strategy, st.integers(1, 8), st.integers(1, 6))
def test_filled_batches_hold_each_sample_once_and_have_few_shapes(rows, max_items, batch_size):
    interactions = to_interactions(rows)
    samples = leave_one_out(interactions).test
    if len(samples) == 0:
        return
    source = SequenceSource(interactions, samples, max_items, CPU)
    plain, filled = ([*source.in_order(batch_size, filled=filled)] for filled in (False, True))
    width = min(batch_size, len(source))
    for mine, theirs in zip(filled, plain, strict=True):
        n, padding = len(theirs.user), padding_rows(width)
        assert len(mine.user) == width + padding and len(mine.history.values) % (padding * max_items) == 0
        assert mine.target_weights.tolist() == [1.0] * n + [0.0] * (len(mine.user) - n)
        assert torch.equal(mine.user[:n], theirs.user)
        assert torch.equal(mine.targets.values[:n], theirs.targets.values)
        assert to_rows(mine.history)[:n] == to_rows(theirs.history)
        assert to_rows(mine.consumed)[:n] == to_rows(theirs.consumed)
        assert mine.consumed.batch_size == len(mine.user)
        assert len(mine.consumed.values) % (width * CONSUMED_BUCKET) == 0
