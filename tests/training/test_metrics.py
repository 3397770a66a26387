"""Metrics against their definitions, scikit-learn and scipy."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import ndcg_score
from sklearn.neighbors import NearestNeighbors

from training.metrics import RankingMetrics, codebook_usage, collisions, neighbour_agreement, target_rank

N_ITEMS = 12
rankings_strategy = st.integers(1, N_ITEMS).flatmap(
    lambda k: st.lists(
        st.tuples(
            st.permutations(range(N_ITEMS)).map(lambda row: row[:k]),
            st.integers(0, N_ITEMS - 1),
            st.integers(0, k),  # how many were found: the rest is -1
        ),
        min_size=1,
        max_size=12,
    )
)


def unpack(rankings) -> tuple[list[list[int]], list[int]]:
    items = [row[:found] + [-1] * (len(row) - found) for row, _, found in rankings]
    return items, [target for _, target, _ in rankings]


def by_definition(items: list[list[int]], targets: list[int], k: int) -> tuple[float, float]:
    """Recall: relevant items retrieved over relevant items. NDCG: DCG over the DCG of the best ranking."""
    recalls, ndcgs = [], []
    for row, target in zip(items, targets, strict=True):
        relevance = [int(item == target) for item in row[:k]]
        recalls.append(sum(relevance) / 1)
        gain = sum(rel / math.log2(place + 1) for place, rel in enumerate(relevance, start=1))
        ndcgs.append(gain / (1 / math.log2(1 + 1)))
    return sum(recalls) / len(targets), sum(ndcgs) / len(targets)


@settings(deadline=None, max_examples=50)
@given(rankings_strategy, st.sets(st.integers(1, 15), min_size=1, max_size=4), st.data())
def test_recall_and_ndcg_are_those_of_their_definitions_in_any_batches(rankings, ks, data):
    items, targets = unpack(rankings)
    metrics = RankingMetrics(tuple(ks))
    metrics.update(torch.tensor(items), torch.tensor(targets), torch.zeros(len(targets), dtype=torch.bool))  # no one
    cuts = sorted(data.draw(st.sets(st.integers(1, len(targets)), max_size=3)) | {0, len(targets)})
    for start, end in zip(cuts, cuts[1:], strict=False):
        metrics.update(torch.tensor(items[start:end]), torch.tensor(targets[start:end]))
    result = metrics.compute()
    assert set(result) == {f"{name}@{k}" for name in ("recall", "ndcg") for k in ks}
    for k in ks:
        recall, ndcg = by_definition(items, targets, k)
        assert result[f"recall@{k}"] == pytest.approx(recall, abs=1e-12)
        assert result[f"ndcg@{k}"] == pytest.approx(ndcg, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_is_that_of_sklearn(k):
    generator = np.random.default_rng(0)
    relevance = np.eye(50)[generator.integers(0, 50, 40)]
    scores = generator.normal(size=(40, 50)) + 2 * relevance
    order = np.argsort(-scores, axis=1)[:, :20].copy()
    metrics = RankingMetrics((k,))
    metrics.update(torch.tensor(order), torch.tensor(relevance.argmax(1)))
    expected = ndcg_score(relevance, scores, k=k)
    assert 0.1 < expected < 0.9
    assert metrics.compute()[f"ndcg@{k}"] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(rankings_strategy)
def test_the_rank_is_the_place_in_the_list(rankings):
    items, targets = unpack(rankings)
    expected = [row.index(t) if t in row else len(row) for row, t in zip(items, targets, strict=True)]
    assert target_rank(torch.tensor(items), torch.tensor(targets)).tolist() == expected


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="the split is empty"):
        RankingMetrics((5,)).compute()


codes_strategy = st.integers(1, 3).flatmap(
    lambda levels: st.lists(st.tuples(*[st.integers(0, 4)] * levels), min_size=1, max_size=30)
)


@settings(deadline=None, max_examples=25)
@given(codes_strategy, st.integers(5, 8))
def test_usage_counts_codes_and_perplexity_is_that_of_scipy(rows, size):
    usage = codebook_usage(torch.tensor(rows), size)
    assert len(usage) == 2 * len(rows[0])
    for level, column in enumerate(zip(*rows, strict=True), start=1):
        assert usage[f"usage_{level}"] == pytest.approx(len(set(column)) / size)
        expected = np.exp(entropy(list(Counter(column).values())))
        assert usage[f"perplexity_{level}"] == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(codes_strategy)
def test_collisions_count_items_that_share_their_codes(rows):
    counts = Counter(rows)
    found = collisions(torch.tensor(rows))
    assert found["unique_share"] == pytest.approx(sum(counts[row] == 1 for row in rows) / len(rows))
    assert found["largest_group"] == max(counts.values())


@pytest.mark.parametrize(("n", "queries"), [(40, 100), (40, 7), (5, 100)])
def test_neighbours_that_share_a_prefix_are_counted_as_by_sklearn(n, queries):
    x = torch.randn(n, 6)
    codes = torch.randint(0, 3, (n, 3))
    k = min(10, n - 1)
    _, nearest = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(x.numpy()).kneighbors(x.numpy())
    asked = list(range(0, n, max(1, n // queries)))[:queries]
    agreement = neighbour_agreement(codes, x, k=10, n_queries=queries)
    for level in range(1, 4):
        same = [codes[a, :level].tolist() == codes[b, :level].tolist() for a in asked for b in nearest[a] if a != b]
        assert agreement[f"neighbours_sharing_{level}"] == pytest.approx(sum(same) / len(same))
