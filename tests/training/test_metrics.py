"""Metrics against their definitions, scikit-learn and scipy."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, entropy
from sklearn.metrics import ndcg_score
from sklearn.neighbors import NearestNeighbors

from common.schemas import Interactions
from data.batches import SequenceSource
from data.splits import leave_one_out
from ops.jagged import JaggedTensor
from tests.ops.rows import jagged
from training import metrics
from training.metrics import (
    all_figures,
    bins,
    breakdown,
    codebook_usage,
    collisions,
    exact_ranks,
    gains,
    neighbour_agreement,
    occurring,
    paired_bootstrap,
    ranking_metrics,
    task_groups,
)

N_ITEMS = 7
users_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(-2, 2), min_size=N_ITEMS, max_size=N_ITEMS),  # scores, with ties
        st.integers(0, N_ITEMS - 1),  # target
        st.lists(st.integers(0, N_ITEMS - 1), max_size=9),  # consumed, with repeats
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100)
@given(users_strategy, st.lists(st.integers(0, N_ITEMS - 1), max_size=4))
def test_exact_ranks_are_those_of_sorting_with_the_target_last_of_its_equals(users, padding):
    scores, targets, consumed = (list(column) for column in zip(*users, strict=True))
    rows = jagged([torch.tensor(row, dtype=torch.int64) for row in [*consumed, padding]])
    ranks = exact_ranks(torch.tensor(scores, dtype=torch.float32), torch.tensor(targets), rows)
    expected = []
    for row, target, gone in zip(scores, targets, consumed, strict=True):
        order = sorted(range(N_ITEMS), key=lambda item, row=row, target=target: (-row[item], item == target))
        new = [item for item in order if item not in gone]
        expected.append((order.index(target), N_ITEMS if target in gone else new.index(target)))
    assert torch.stack(ranks, 1).tolist() == [list(pair) for pair in expected]
    assert all(own.dtype == torch.int64 for own in ranks)


@pytest.mark.parametrize(("score", "rank"), [(float("nan"), 3), (float("-inf"), 3), (float("inf"), 1)])
def test_scores_that_are_not_finite_are_never_in_favour_of_the_target(score, rank):
    scores = torch.tensor([[1.0, score, 2.0, float("inf")]])
    none = JaggedTensor(torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 0)
    assert [int(own) for own in exact_ranks(scores, torch.tensor([1]), none)] == [rank, rank]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.sets(st.integers(1, 15), min_size=1, max_size=4))
def test_the_figures_are_those_of_their_definitions(ranks, ks):
    result = ranking_metrics(torch.tensor(ranks), tuple(ks))
    assert set(result) == {f"{name}@{k}" for name in ("recall", "ndcg") for k in ks} | {"mrr"}
    for k in ks:
        found = [rank + 1 for rank in ranks if rank + 1 <= k]
        assert result[f"recall@{k}"] == pytest.approx(len(found) / len(ranks), abs=1e-12)
        gain = sum(1 / math.log2(place + 1) for place in found)
        assert result[f"ndcg@{k}"] == pytest.approx(gain / len(ranks), abs=1e-12)
    reciprocal = sum(1 / (rank + 1) for rank in ranks if rank < max(ks))
    assert result["mrr"] == pytest.approx(reciprocal / len(ranks), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_is_that_of_sklearn(k):
    generator = np.random.default_rng(0)
    relevance = np.eye(50)[generator.integers(0, 50, 40)]
    scores = generator.normal(size=(40, 50)) + 2 * relevance
    none = JaggedTensor(torch.zeros(0, dtype=torch.int64), torch.zeros(41, dtype=torch.int64), 0)
    ranks, _ = exact_ranks(torch.tensor(scores), torch.tensor(relevance.argmax(1)), none)
    expected = ndcg_score(relevance, scores, k=k)
    assert 0.1 < expected < 0.9
    assert ranking_metrics(ranks, (k,))[f"ndcg@{k}"] == pytest.approx(expected, abs=1e-12)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="the split is empty"):
        ranking_metrics(torch.zeros(0, dtype=torch.int64), (5,))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 30)), min_size=1, max_size=20))
def test_a_breakdown_has_the_figures_of_each_group_alone(users):
    ranks, lengths = (torch.tensor(column) for column in zip(*users, strict=True))
    groups = bins(lengths, (1, 2, 6, 21))
    found = breakdown(ranks, groups, 5)
    expected = {"1": range(1, 2), "2-5": range(2, 6), "6-20": range(6, 21), "21+": range(21, 31)}
    assert list(groups) == list(expected)
    for name, members in expected.items():
        own = [rank for rank, length in users if length in members]
        if own:
            figures = ranking_metrics(torch.tensor(own), (5,))
            assert found.pop(name) == pytest.approx(
                {"users": len(own), "recall@5": figures["recall@5"], "ndcg@5": figures["ndcg@5"]}
            )
    assert not found


def test_tasks_are_grouped_by_their_target_and_their_history_and_all_figures_are_flat():
    rows = [[0, 1, 2, 0], [1, 1, 1, 1, 1, 1, 0, 1], [2, 1, 3]]  # training: [0, 1], [1] * 6, [2]
    offsets = torch.tensor([0, 4, 12, 15])
    interactions = Interactions(torch.tensor(sum(rows, []), dtype=torch.int32), offsets)
    splits = leave_one_out(interactions)
    source = SequenceSource(interactions, splits.test, 5, torch.device("cpu"))
    groups = task_groups(source, splits.train_lengths, 5)
    names = [{name for name, group in groups[kind].items() if group[user]} for kind in groups for user in range(3)]
    assert names == [{"1-5"}, {"6-20"}, {"0"}, {"1-5"}, {"6-10"}, {"1-5"}]  # targets 0, 1, 3; 3, 7, 2 items before
    ranks = {"most_popular": {"all": torch.tensor([0, 3, 9]), "new": torch.tensor([5, 5, 1])}}
    figures = all_figures(ranks, groups, (1, 2), 5)
    assert (figures["users"], figures["unseen_targets"], figures["consumed_targets"]) == (3, 1, 2)
    assert figures["most_popular/all/recall@1"] == pytest.approx(1 / 3)
    assert figures["most_popular/new/mrr"] == pytest.approx(1 / 6)
    assert figures["most_popular/new/target_in_training/0/recall@10"] == 1.0
    assert figures["most_popular/all/history/1-5/users"] == 2


def test_the_interval_and_the_share_are_those_of_scipys_paired_bootstrap(monkeypatch):
    monkeypatch.setattr(metrics, "DRAWS", 5000)  # several chunks
    a, b = torch.randint(0, 15, (2, 300)), torch.randint(0, 15, (300,)).expand(2, -1)
    a = torch.where(torch.rand(a.shape) < 0.5, b, a)  # two runs each
    found = paired_bootstrap(a, b, 10)
    assert found == paired_bootstrap(a, b, 10)
    for name, own, other in zip(("recall@10", "ndcg@10"), gains(a, 10), gains(b, 10), strict=True):
        difference = (own - other).mean(0).numpy()
        drawn = bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", rng=0)
        noise = drawn.standard_error / 10
        assert found[name]["difference"] == pytest.approx(difference.mean(), abs=1e-12)
        assert found[name]["low"] == pytest.approx(drawn.confidence_interval.low, abs=noise)
        assert found[name]["high"] == pytest.approx(drawn.confidence_interval.high, abs=noise)
        share = (drawn.bootstrap_distribution <= 0).mean()
        assert found[name]["not_better"] == pytest.approx(share, abs=0.02)
    assert paired_bootstrap(b[0], b[0], 10)["ndcg@10"] == {"difference": 0, "low": 0, "high": 0, "not_better": 1}


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(-1, 8), min_size=3, max_size=3), max_size=5))
def test_items_that_occur_are_those_in_the_lists(lists):
    found = occurring(torch.tensor(lists, dtype=torch.int64).view(-1, 3), 9)
    assert found.nonzero().flatten().tolist() == sorted({item for row in lists for item in row} - {-1})
    assert found.shape == (9,) and found.dtype == torch.bool


codes_strategy = st.integers(1, 3).flatmap(
    lambda levels: st.lists(st.tuples(*[st.integers(0, 4)] * levels), min_size=1, max_size=30)
)


@settings(max_examples=25)
@given(codes_strategy, st.integers(5, 8))
def test_usage_counts_codes_and_perplexity_is_that_of_scipy(rows, size):
    usage = codebook_usage(torch.tensor(rows), size)
    assert len(usage) == 2 * len(rows[0])
    for level, column in enumerate(zip(*rows, strict=True), start=1):
        assert usage[f"usage_{level}"] == pytest.approx(len(set(column)) / size)
        expected = np.exp(entropy(list(Counter(column).values())))
        assert usage[f"perplexity_{level}"] == pytest.approx(expected, abs=1e-6)


@settings(max_examples=25)
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
