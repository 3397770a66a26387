import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.schemas import Interactions
from data.baselines import MostPopular, Transition
from data.processed import RecDataset, load_corpus
from tests.data.real import REAL, needs_real


def to_interactions(rows: list[list[int]]) -> Interactions:
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return Interactions(torch.tensor([item for row in rows for item in row], dtype=torch.int32), offsets)


def rankings(training: list[list[int]], last: list[int], k: int, n_items: int, by_first_seen: bool = False):
    """Most popular and transition by counting, one user at a time.

    Ties go to the smaller item id, or, `by_first_seen`, to the item (or the pair) that training has first.
    """
    counts = Counter(item for row in training for item in row)
    followers: dict[int, Counter] = defaultdict(Counter)
    for row in training:
        for item, following in zip(row, row[1:], strict=False):
            followers[item][following] += 1

    def order(counter: Counter) -> list[int]:
        keys = list(counter) if by_first_seen else sorted(counter)
        return sorted(keys, key=lambda item: -counter[item])

    popular = order(counts) + [item for item in range(n_items) if item not in counts]
    transition = []
    for item in last:
        best = order(followers[item])[:k]
        transition.append((best + [other for other in popular[: 2 * k] if other not in best])[:k])
    return [popular[:k]] * len(last), transition


n_items = 6
rows_strategy = st.lists(st.lists(st.integers(0, n_items - 1), max_size=9), min_size=1, max_size=8)


@given(rows_strategy, st.data())
def test_the_rankings_are_those_of_counting(rows, data):
    cuts = [data.draw(st.integers(0, len(row))) for row in rows]
    last = list(range(n_items))
    training = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    popular, transition = rankings(training, last, n_items, n_items)
    arguments = (to_interactions(rows), torch.tensor(cuts), n_items)
    for baseline, expected in ((MostPopular, popular), (Transition, transition)):
        owners = torch.tensor(last).repeat_interleave(n_items)
        places = baseline(*arguments).places(owners, torch.tensor(expected).flatten())
        assert places.dtype == torch.int64
        assert places.view(n_items, n_items).tolist() == [last] * n_items


def figures(places: list[int]) -> tuple[float, ...]:
    """Recall@5, Recall@10 and NDCG@10, rounded to four decimals."""
    n_users, places = len(places), [place for place in places if place < 10]
    gains = (
        sum(place < 5 for place in places),
        len(places),
        sum(1 / math.log2(place + 2) for place in places),
    )
    return tuple(round(gain / n_users, 4) for gain in gains)


PUBLISHED = {
    "amazon_beauty": ((0.0072, 0.0114, 0.0053), (0.0485, 0.0624, 0.0413)),
    "amazon_toys": ((0.0055, 0.0089, 0.0049), (0.0570, 0.0686, 0.0475)),
}
# Ours: ties go to the smaller item id, on MovieLens ratings of the same second keep the order of the file.
EXPECTED = {
    "sample": ((0.0115, 0.0197, 0.0092), (0.0393, 0.0656, 0.0361)),
    "amazon_beauty": ((0.0072, 0.0114, 0.0053), (0.0502, 0.0648, 0.0427)),
    "amazon_toys": ((0.0055, 0.0089, 0.0049), (0.0578, 0.0701, 0.0475)),
}


@pytest.mark.parametrize(
    "name", ["sample", *(pytest.param(f"amazon_{split}", marks=needs_real("amazon")) for split in ("beauty", "toys"))]
)
def test_the_figures_on_the_test_targets(tmp_path, name):
    """The published transition figures break ties by what training has first; all else is as here."""
    dataset, _, split = name.partition("_")
    if split:
        (tmp_path / "raw").symlink_to(REAL / "amazon" / "raw")
    corpus = load_corpus(RecDataset(dataset), str(tmp_path), split)
    items, offsets = corpus.interactions.items.tolist(), corpus.interactions.offsets.tolist()
    rows = [items[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]
    assert min(map(len, rows)) >= 3
    training, last, targets = [row[:-2] for row in rows], [row[-2] for row in rows], [row[-1] for row in rows]

    lengths = corpus.interactions.offsets.diff() - 2
    for baseline, expected in zip((MostPopular, Transition), EXPECTED[name], strict=True):
        places = baseline(corpus.interactions, lengths, corpus.n_items).places(
            torch.tensor(last), torch.tensor(targets)
        )
        assert figures(places.tolist()) == pytest.approx(expected, abs=1e-9)
    if name in PUBLISHED:
        for ranked, published in zip(
            rankings(training, last, 10, corpus.n_items, by_first_seen=True), PUBLISHED[name], strict=True
        ):
            places = [row.index(target) if target in row else 10 for row, target in zip(ranked, targets, strict=True)]
            assert figures(places) == pytest.approx(published, abs=1e-9)
