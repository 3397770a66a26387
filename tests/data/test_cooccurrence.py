"""Co-occurrence features against loops and dense algebra."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schemas import Interactions
from data import cooccurrence
from data.cooccurrence import CoOccurrenceSvd, cooccurrence_counts, mutual_information, sklearn_svd, torch_svd
from data.corpus import Corpus
from data.features import item_features
from data.items import Items

N_ITEMS = 8


def make(rows: list[list[int]], n_items: int = N_ITEMS) -> Corpus:
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    interactions = Interactions(torch.tensor([item for row in rows for item in row], dtype=torch.int32), offsets)
    keys = [f"i{n}" for n in range(n_items)]
    return Corpus.build("tiny", interactions, keys, [f"u{n}" for n in range(len(rows))], keys, [[]] * n_items)


def vectors(source: CoOccurrenceSvd, corpus: Corpus, lengths: torch.Tensor) -> np.ndarray:
    return source.transform(source.fit(corpus, lengths), Items.of(corpus))


def counts_by_hand(rows: list[list[int]], n_items: int, window: int) -> np.ndarray:
    """Every ordered pair of one user's interactions: [N, N]."""
    counts = np.zeros((n_items, n_items))
    for row in rows:
        for i, item in enumerate(row):
            for j, other in enumerate(row):
                if 1 <= abs(i - j) <= window:
                    counts[item, other] += 1 / abs(i - j)
    return counts


def vectors_by_hand(counts: np.ndarray, dim: int) -> np.ndarray:
    """The formula of `CoOccurrenceSvd` on dense matrices: [N, dim]."""
    sums = counts.sum(1)
    ppmi = np.zeros_like(counts)
    for i, j in zip(*counts.nonzero(), strict=True):
        context = sums[j] ** 0.75 / (sums**0.75).sum()
        ppmi[i, j] = max(0, np.log(counts[i, j] / sums[i] / context))
    left, singular, _ = np.linalg.svd(ppmi)
    assert singular[dim - 1] - singular[dim] > 1e-3, "the choice of these components is not unique"
    vectors = left[:, :dim] * np.sqrt(singular[:dim])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-9)
    vectors -= vectors[sums > 0].mean(0)
    vectors[sums == 0] = 0
    return vectors


rows_strategy = st.lists(st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=25)
@given(rows_strategy, st.integers(1, 14), st.data())
def test_counts_are_those_of_a_double_loop(rows, window, data):
    items = np.array([item for row in rows for item in row], dtype=np.int32)
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    blocks = list(cooccurrence_counts(items, users, N_ITEMS, window, block=data.draw(st.integers(1, 20))))
    assert [first for first, _ in blocks] == [0, *np.cumsum([block.shape[0] for _, block in blocks])[:-1]]
    counts = np.concatenate([block.toarray() for _, block in blocks])
    np.testing.assert_allclose(counts, counts_by_hand(rows, N_ITEMS, window), rtol=1e-5)


def random_rows(seed: int, n_items: int, n_users: int = 30) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, n_items, generator.integers(3, 15)).tolist() for _ in range(n_users)]


@pytest.mark.parametrize(("n_items", "dim"), [(8, 7), (8, 1), (30, 12)])
def test_vectors_are_those_of_the_dense_decomposition(n_items, dim):
    rows = random_rows(n_items, n_items)
    lengths = torch.tensor([len(row) - 2 for row in rows])
    values = vectors(CoOccurrenceSvd(dim, window=3), make(rows, n_items), lengths)
    assert values.shape == (n_items, dim) and values.dtype == np.float32
    counts = counts_by_hand([row[:-2] for row in rows], n_items, window=3)
    expected = vectors_by_hand(counts, dim)
    np.testing.assert_allclose(values @ values.T, expected @ expected.T, atol=1e-5)  # up to the signs of columns


def grouped_corpus(n_items: int, groups: int) -> Corpus:
    """Users who stay in one of the groups, but for every fifth item."""
    draw = np.random.default_rng(0)
    own = draw.integers(groups, size=(1500, 1)) + groups * draw.integers(n_items // groups, size=(1500, 20))
    return make(np.where(draw.random(own.shape) < 0.2, draw.integers(n_items, size=own.shape), own).tolist(), n_items)


@pytest.mark.parametrize("svd", [sklearn_svd, partial(torch_svd, device=torch.device("cpu"))])
def test_a_catalogue_larger_than_the_random_subspace_has_the_exact_one(svd):
    corpus = grouped_corpus(n_items=600, groups=12)
    matrix, _ = mutual_information(corpus.interactions, corpus.interactions.offsets.diff(), 600, window=5)
    left, singular = svd(matrix, 12)
    exact, values, _ = np.linalg.svd(matrix.toarray().astype(float))
    np.testing.assert_allclose(singular, values[:12], rtol=1e-3)
    assert np.linalg.norm(exact[:, :12].T @ left) ** 2 / 12 > 0.999  # 1: the same subspace


def test_a_row_keeps_its_largest_entries(monkeypatch):
    corpus = grouped_corpus(n_items=60, groups=3)
    lengths = corpus.interactions.offsets.diff()
    whole = mutual_information(corpus.interactions, lengths, 60, window=5)[0].toarray()
    monkeypatch.setattr(cooccurrence, "NEIGHBOURS", 7)
    kept = mutual_information(corpus.interactions, lengths, 60, window=5)[0].toarray()
    assert ((whole > 0).sum(1) > 7).all()
    np.testing.assert_array_equal(kept, np.where(whole >= np.sort(whole, 1)[:, [-7]], whole, 0))


def test_items_that_training_never_shows_are_zero_and_do_not_shift_the_others():
    rows = random_rows(1, n_items=8)
    lengths = torch.tensor([len(row) for row in rows])
    wide = vectors(
        CoOccurrenceSvd(6, window=2), make([[3 + item for item in row] for row in rows], n_items=13), lengths
    )
    narrow = vectors(CoOccurrenceSvd(6, window=2), make(rows, n_items=8), lengths)
    assert not wide[:3].any() and not wide[11:].any()
    np.testing.assert_allclose(wide[3:11] @ wide[3:11].T, narrow @ narrow.T, atol=1e-5)
    np.testing.assert_allclose(narrow.mean(0), 0, atol=1e-6)


def test_validation_and_test_interactions_are_never_read(tmp_path):
    rows = random_rows(2, n_items=20)
    lengths = torch.tensor([len(row) - 2 for row in rows])
    changed = [[*row[:-2], 19 - row[-2], 19 - row[-1]] for row in rows]
    source = CoOccurrenceSvd(5)
    made = [item_features(make(kind, 20), [source], str(tmp_path), lengths) for kind in (rows, changed)]
    built = [features.values for features in made]
    by_key = made[0].fitted.transform(Items(["i3", "new", "i0"], [""] * 3, [[]] * 3))
    np.testing.assert_array_equal(by_key, [built[0][3], np.zeros(5), built[0][0]])
    assert made[0].fitted.from_interactions.tolist() == [True] * 5
    assert len(list((tmp_path / "features/tiny").glob("*.npy"))) == 2, "computed for each corpus"
    assert np.array_equal(*built)
    everything = vectors(source, make(rows, 20), lengths + 2)
    assert not np.array_equal(everything, vectors(source, make(changed, 20), lengths + 2)), "but read as training data"


def test_vectors_are_deterministic_and_cached_by_content(tmp_path):
    corpus = make(random_rows(3, n_items=20), 20)
    lengths = corpus.interactions.offsets.diff()
    source = CoOccurrenceSvd(5)
    assert np.array_equal(vectors(source, corpus, lengths), vectors(source, corpus, lengths))
    variants = [
        (source, lengths),
        (source, lengths - 1),
        (CoOccurrenceSvd(4), lengths),
        (CoOccurrenceSvd(5, 2), lengths),
    ]
    for variant, cut in [*variants, *variants]:
        item_features(corpus, [variant], str(tmp_path), cut)
    assert len(list((tmp_path / "features/tiny").glob("*.npy"))) == len(variants)
    items = corpus.interactions.items
    corpus.interactions = replace(corpus.interactions, items=items.flip(0))  # as a split may put ties in another order
    item_features(corpus, [source], str(tmp_path), lengths)
    assert len(list((tmp_path / "features/tiny").glob("*.npy"))) == len(variants) + 1


@pytest.mark.parametrize("dim", [8, 128])
def test_dimensions_that_do_not_fit_are_refused(dim):
    corpus = make(random_rows(4, N_ITEMS))
    with pytest.raises(ValueError, match=f"dim = {dim} does not fit 8 items: the largest possible value is 7"):
        CoOccurrenceSvd(dim).fit(corpus, corpus.interactions.offsets.diff())


@pytest.mark.parametrize("rows", [[[0], [1]], [[2, 2, 2]]])
def test_data_in_which_nothing_goes_together_are_refused(rows):
    corpus = make(rows)
    with pytest.raises(ValueError, match="no items in the training data that go together"):
        CoOccurrenceSvd(3).fit(corpus, corpus.interactions.offsets.diff())
