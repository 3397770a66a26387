"""Splits and windows against one Python loop per user."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.schemas import Interactions, Samples
from data.batches import SequenceSource
from data.cooccurrence import mutual_information
from data.splits import draw_splits, drawn, every_prefix, in_training, leave_one_out, shuffle_ties, temporal, windows

lengths_strategy = st.lists(st.integers(1, 50), min_size=1, max_size=12)
LARGEST = math.nextafter(1.0, 0.0)


def make(lengths: list[int]) -> Interactions:
    """Each interaction has an item of its own, so that an item tells its user and position."""
    items = torch.arange(sum(lengths), dtype=torch.int32)
    return Interactions(items, torch.tensor([0, *lengths]).cumsum(0))


def pairs(samples: Samples) -> list[tuple[int, int]]:
    return list(zip(samples.user.tolist(), samples.position.tolist(), strict=True))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_training_data_are_the_first_of_each_user(lengths, data):
    known = [data.draw(st.integers(0, length)) for length in lengths]
    expected = [place < n for n, length in zip(known, lengths, strict=True) for place in range(length)]
    assert in_training(make(lengths), torch.tensor(known)).tolist() == expected


@settings(max_examples=25)
@given(lengths_strategy)
def test_leave_one_out_is_the_last_and_the_one_before(lengths):
    splits = leave_one_out(make(lengths))
    long = [user for user, length in enumerate(lengths) if length >= 3]
    assert pairs(splits.valid) == [(user, lengths[user] - 2) for user in long]
    assert pairs(splits.test) == [(user, lengths[user] - 1) for user in long]
    assert splits.train_lengths.tolist() == [length - 2 if length >= 3 else length for length in lengths]
    for samples in (splits.valid, splits.test):
        assert samples.user.dtype == samples.position.dtype == samples.slack.dtype == torch.int64
        assert samples.slack.tolist() == [0] * len(long)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_every_prefix_is_each_training_position_but_the_first(train_lengths):
    samples = every_prefix(torch.tensor(train_lengths))
    expected = [(user, position) for user, length in enumerate(train_lengths) for position in range(1, length)]
    assert pairs(samples) == expected and samples.slack.tolist() == [0] * len(expected)


@settings(max_examples=25)
@given(lengths_strategy, st.integers(1, 60))
def test_windows_make_each_training_interaction_but_the_first_a_target_once(lengths, max_items):
    interactions = make(lengths)
    train_lengths = leave_one_out(interactions).train_lengths
    samples = windows(train_lengths, max_items)
    source = SequenceSource(interactions, samples, max_items, torch.device("cpu"), every_position=True)
    targets = source.batch(torch.arange(len(source))).targets.values.tolist() if len(source) else []
    offsets = interactions.offsets.tolist()
    expected = [
        offsets[user] + position for user, length in enumerate(train_lengths.tolist()) for position in range(1, length)
    ]
    assert sorted(targets) == expected
    fewest = [math.ceil((length - 1) / max_items) for length in train_lengths.tolist()]
    assert torch.bincount(samples.user, minlength=len(lengths)).tolist() == fewest


@settings(max_examples=25)
@given(lengths_strategy, st.integers(1, 60), st.data())
def test_windows_slide_within_the_training_data_only(lengths, max_items, data):
    interactions = make(lengths)
    train_lengths = leave_one_out(interactions).train_lengths
    samples = windows(train_lengths, max_items)
    if len(samples) == 0:
        assert max(train_lengths) == 1
        return
    source = SequenceSource(interactions, samples, max_items, torch.device("cpu"), every_position=True)
    uniform = st.one_of(st.sampled_from([0.0, LARGEST]), st.floats(0, LARGEST))
    uniform = data.draw(st.lists(uniform, min_size=len(samples), max_size=len(samples)))
    batch = source.batch(torch.arange(len(samples)), torch.tensor(uniform, dtype=torch.float64))
    starts = interactions.offsets.tolist()
    for row, user in enumerate(samples.user.tolist()):
        first, last = starts[user], starts[user] + int(train_lengths[user]) - 1
        for rows in (batch.history, batch.targets):
            values = rows.values[rows.offsets[row] : rows.offsets[row + 1]].tolist()
            assert values and first <= min(values) and max(values) <= last


@settings(max_examples=60)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=9), st.integers(1, 30), st.data())
def test_whatever_is_drawn_for_a_user_each_target_is_covered_once(train_lengths, max_items, data):
    samples = windows(torch.tensor(train_lengths), max_items)
    uniform = st.one_of(st.sampled_from([0.0, LARGEST]), st.floats(0, LARGEST))
    uniform = data.draw(st.lists(uniform, min_size=len(train_lengths), max_size=len(train_lengths)))
    uniform = torch.tensor(uniform, dtype=torch.float64)[samples.user]
    position, length = drawn(samples, torch.arange(len(samples)), uniform, max_items)
    assert position.dtype == length.dtype == torch.int64
    covered = [[] for _ in train_lengths]
    for user, end, n in zip(samples.user.tolist(), position.tolist(), length.tolist(), strict=True):
        assert 1 <= n <= max_items
        covered[user] += range(end - n + 1, end + 1)  # the items before a window's end are its history
    assert list(map(sorted, covered)) == [[*range(1, n)] for n in train_lengths]


def test_the_cuts_between_windows_take_all_places_that_they_can():
    samples, seen = windows(torch.tensor([19]), 5), []  # 18 targets on 4 windows
    for uniform in torch.arange(40, dtype=torch.float64) / 40:
        seen.append(tuple(drawn(samples, torch.arange(4), uniform.expand(4), 5)[0].tolist()))
    assert Counter(seen) == {(18, 13, 8, 3): 14, (18, 14, 9, 4): 13, (18, 15, 10, 5): 13}
    assert windows(torch.tensor([6]), 5).slack.tolist() == [0], "one window holds all that there is"


timed = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1, max_size=9)


def with_times(rows: list[list[int]]) -> Interactions:
    interactions = make([len(row) for row in rows])
    times = torch.tensor([time for row in rows for time in sorted(row)])
    return Interactions(interactions.items, interactions.offsets, times)


@settings(max_examples=60)
@given(timed, st.sampled_from([(0.1, 0.1), (0.2, 0.3), (0.45, 0.5), (0.01, 0.02)]))
def test_the_temporal_split_cuts_all_users_at_the_same_two_times(rows, shares):
    every = sorted(time for row in rows for time in row)
    first, second = (
        every[min(round(len(every) * share), len(every) - 1)] for share in (1 - sum(shares), 1 - shares[1])
    )
    expected = {"valid": [], "test": []}
    for user, row in enumerate(map(sorted, rows)):
        for name, start, end in (("valid", first, second), ("test", second, math.inf)):
            later = [position for position, time in enumerate(row) if start <= time < end]
            if later and later[0] > 0:
                expected[name].append((user, later[0]))
    if not all(expected.values()):
        with pytest.raises(ValueError, match="leave no user"):
            temporal(with_times(rows), *shares)
        return
    splits = temporal(with_times(rows), *shares)
    assert (pairs(splits.valid), pairs(splits.test)) == (expected["valid"], expected["test"])
    assert splits.train_lengths.tolist() == [sum(time < first for time in row) for row in rows]
    assert splits.name.startswith("temporal ") and splits.name.endswith(" %")


@settings(max_examples=20)
@given(timed, st.integers(0, 2**32))
def test_what_comes_after_the_cut_reaches_neither_features_nor_training_batches(rows, seed):
    """Two corpora that differ only in which items come from the first cut on."""
    interactions = with_times(rows)
    try:
        splits = temporal(interactions, 0.2, 0.2)
    except ValueError:
        assume(False)
    starts = interactions.offsets[:-1].repeat_interleave(interactions.offsets.diff())
    positions = torch.arange(len(interactions)) - starts
    later = positions >= splits.train_lengths.repeat_interleave(interactions.offsets.diff())
    n_items = len(interactions)
    changed = interactions.items.clone()
    changed[later] = torch.randint(n_items, (int(later.sum()),), generator=torch.Generator().manual_seed(seed)).int()
    seen = []
    for items in (interactions.items, changed):
        corpus_interactions = Interactions(items, interactions.offsets, interactions.timestamps)
        lengths = temporal(corpus_interactions, 0.2, 0.2).train_lengths
        counts = mutual_information(corpus_interactions, lengths, n_items, window=2)[0].toarray()
        samples = windows(lengths, 3)
        source = SequenceSource(corpus_interactions, samples, 3, torch.device("cpu"), every_position=True)
        batch = source.batch(torch.arange(len(samples))) if len(samples) else None
        seen.append((counts, batch))
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    for one, other in zip(
        *(([] if batch is None else [batch.history.values, batch.targets.values]) for _, batch in seen), strict=True
    ):
        assert torch.equal(one, other)


@settings(max_examples=40)
@given(timed, st.integers(0, 2**32 - 1))
def test_shuffled_ties_stay_with_their_user_and_moment_and_are_split(rows, seed):
    interactions = with_times(rows)
    shuffled = shuffle_ties(interactions, seed)
    assert torch.equal(shuffled.offsets, interactions.offsets)
    assert torch.equal(shuffled.timestamps, interactions.timestamps)
    users = torch.arange(len(rows)).repeat_interleave(interactions.offsets.diff())

    def triples(some: Interactions) -> list[tuple[int, int, int]]:
        return list(zip(users.tolist(), some.timestamps.tolist(), some.items.tolist(), strict=True))

    assert sorted(triples(shuffled)) == sorted(triples(interactions))
    assert torch.equal(shuffle_ties(interactions, seed).items, shuffled.items)
    splits, plain = draw_splits("leave-one-out", interactions, seed), draw_splits("leave-one-out", interactions)
    assert torch.equal(splits.interactions.items, shuffled.items) and plain.interactions is interactions
    assert pairs(splits.test) == pairs(plain.test) and torch.equal(splits.train_lengths, plain.train_lengths)
    assert splits.name == f"leave-one-out (tie seed {seed})"


def test_every_order_of_a_tie_is_as_likely():
    interactions = with_times([[0, 7, 7, 7, 9], [7, 7]])
    orders = Counter(tuple(shuffle_ties(interactions, seed).items.tolist()) for seed in range(1200))
    assert len(orders) == 12 and all(65 <= count <= 135 for count in orders.values())  # 100 each, +- 3.6 deviations


def test_splits_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="split.tie_seed = 3 needs timestamps"):
        draw_splits("leave-one-out", make([5]), 3)
    with pytest.raises(ValueError, match="needs timestamps"):
        temporal(make([5, 5]))
    for shares in ((0, 0.1), (0.1, 0), (0.5, 0.5), (-0.1, 0.2)):
        with pytest.raises(ValueError, match="must have a sum below 1|Input should be greater than 0"):
            temporal(with_times([[1, 2, 3]]), *shares)
    with pytest.raises(ValueError, match="split.kind = 'random': Input should be 'leave-one-out' or 'temporal'"):
        draw_splits("random", make([5]))
    assert draw_splits("leave-one-out", make([5])).name == "leave-one-out"
    assert draw_splits("temporal", with_times([[*range(50)]])).name == "temporal 80/10/10 %"
    assert temporal(with_times([[*range(2000)]]), 0.002, 0.005).name == "temporal 99.3/0.2/0.5 %"
