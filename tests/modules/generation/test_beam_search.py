"""Beam search and the exact ranking against each other, and against every item's probability by brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.generation.beam_search import LeftOut, beam_search, head_normalizer, whole_catalogue
from modules.tree import Tree
from ops.jagged import JaggedTensor
from tests.modules.helpers import dense_log_probs, dense_queries, make_model, random_catalogue
from tests.modules.test_model import features_of
from tests.ops.rows import jagged

HISTORIES = [[3, 1, 2], [5], [0, 0, 7, 7]]


def rows_of(histories: list[list[int]]) -> JaggedTensor:
    return jagged([torch.tensor(row, dtype=torch.int64) for row in histories])


@torch.no_grad()
def encoded(model, histories: list[list[int]]) -> tuple:
    """The first arguments of each search."""
    vectors = model.vectors()
    return model, model.encode(rows_of(histories), vectors), vectors


def by_item(candidates, values: torch.Tensor, n_items: int) -> torch.Tensor:
    """Values [B, C] of candidates as [B, N], -inf for items that are none."""
    table = torch.full((len(values), n_items + 1), float("-inf"), dtype=values.dtype)
    return table.scatter(1, candidates.items % (n_items + 1), values)[:, :n_items]


@pytest.mark.parametrize("decoder_layers", [0, 2])
def test_all_beams_and_the_exact_ranking_are_the_products_of_the_probabilities(decoder_layers):
    codes, _ = random_catalogue(23, seed=1)
    model = make_model(codes, decoder_layers=decoder_layers).double()
    inputs = encoded(model, HISTORIES)
    found = [beam_search(*inputs, beams=23)]
    found += [whole_catalogue(*inputs)] if decoder_layers == 0 else []
    items = list(range(23))  # each as the target of each history, whose path a decoder follows
    state, queries, own, nodes = dense_queries(
        model, codes, [h for h in HISTORIES for _ in items], [[n] for _ in HISTORIES for n in items], features_of(model)
    )
    every = dense_log_probs(queries, codes, nodes).sum(2).view(3, 23, 23)
    expected = every.diagonal(dim1=1, dim2=2)  # [B, N]
    head = (state @ own.T).view(3, 23, 23)[:, 0]
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(3).double(), rtol=1e-9, atol=0)
    for candidates in found:
        torch.testing.assert_close(by_item(candidates, candidates.tree, 23).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(by_item(candidates, candidates.head, 23).double(), head, rtol=1e-5, atol=1e-5)


def test_both_heads_rank_by_their_weighted_sum():
    codes, _ = random_catalogue(23, seed=2)
    model = make_model(codes)
    inputs = encoded(model, HISTORIES)
    exact, beams = whole_catalogue(*inputs), beam_search(*inputs, 23)
    for share in (0.0, 0.3, 1.0):
        ranked, other = exact.best(share, 10), beams.best(share, 10)
        scores = (1 - share) * exact.tree + share * exact.head
        best = scores.topk(10)
        assert torch.equal(ranked.items, best.indices) and torch.equal(other.items, best.indices)
        torch.testing.assert_close(ranked.scores, best.values)
        torch.testing.assert_close(other.scores, best.values)


def test_consumed_items_have_the_learned_bias():
    codes, _ = random_catalogue(23, seed=3)
    model, consumed = make_model(codes), [[3, 1, 2, 3], [5], [22, 7, 22]]
    inputs = encoded(model, HISTORIES)
    plain, biased = (whole_catalogue(*inputs, rows) for rows in (None, rows_of(consumed)))
    expected = plain.head.clone()
    for user, items in enumerate(consumed):
        expected[user, items] += model.seen_bias
    torch.testing.assert_close(biased.head, expected)
    beams = beam_search(*inputs, 23, rows_of(consumed))
    torch.testing.assert_close(by_item(beams, beams.head, 23), expected, rtol=1e-4, atol=1e-4)
    for size in (1, 5, 30):  # items at a time
        normalizer = head_normalizer(*inputs, rows_of(consumed), size)
        torch.testing.assert_close(normalizer, expected.logsumexp(1, keepdim=True))


@pytest.mark.parametrize("decoder_layers", [0, 1])
def test_beams_do_not_die_in_a_consumed_cluster(decoder_layers):
    """60 of the 64 items of the cluster that the model likes best are consumed; 10 beams give 10 items."""
    codes = torch.tensor([[n // 64, n % 64 // 8, n % 8] for n in range(256)])
    model = make_model(codes, decoder_layers=decoder_layers, tree_loss=1.0)
    inputs = encoded(model, [[0, 1]])
    first = int(codes[beam_search(*inputs, 1).items[0, 0], 0])
    cluster = (codes[:, 0] == first).nonzero()[:, 0]
    consumed = cluster[torch.randperm(64)[:60]]
    found = beam_search(*inputs, 10, rows_of([consumed.tolist()]), new=True).items[0]
    assert len(set(found.tolist())) == 10 and (found >= 0).all()
    assert not torch.isin(found, consumed).any()


@settings(max_examples=40)
@given(st.data())
def test_k_items_come_whenever_k_are_left(data):
    n = data.draw(st.integers(1, 40), "items")
    codes, _ = random_catalogue(n, data.draw(st.integers(0, 10**6), "seed"), data.draw(st.integers(1, 6), "codes"))
    users = data.draw(st.integers(1, 3), "users")
    ids = st.integers(0, n - 1)
    histories = [data.draw(st.lists(ids, min_size=1, max_size=5)) for _ in range(users)]
    gone = [data.draw(st.lists(ids, max_size=2 * n)) for _ in range(users)]
    beams = data.draw(st.integers(1, n), "beams")
    model = make_model(codes, dim=4, ff_dim=4, n_heads=1, head_dim=2, encoder_layers=1)
    inputs = encoded(model, histories)
    found = beam_search(*inputs, beams, rows_of(gone), new=True)
    exact = whole_catalogue(*inputs, rows_of(gone), new=True)
    for user in range(users):
        items = found.items[user][found.items[user] >= 0].tolist()
        assert len(items) == min(beams, n - len(set(gone[user])))
        assert len(set(items)) == len(items) and not set(items) & set(gone[user])
        assert set(exact.items[user].tolist()) - {-1} == set(range(n)) - set(gone[user])
        if beams == n:
            mine, other = (c.best(0.5, n) for c in (found, exact))
            torch.testing.assert_close(mine.scores, other.scores, rtol=1e-4, atol=1e-4)


def test_a_node_is_covered_once_all_its_leaves_are():
    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]])
    tree = Tree.build(codes)
    out = LeftOut.of(rows_of([[0, 1, 1, 3], [3, 4, 5, 2, 4], []]), tree)
    nodes = torch.tensor([[0, 1, 2]] * 3)
    assert out.covers(tree.first_leaf[1], nodes).tolist() == [[True, False, False], [False, True, True], [False] * 3]


def test_a_decoder_has_no_exact_ranking():
    codes, _ = random_catalogue(9, seed=0)
    model = make_model(codes, decoder_layers=1)
    with pytest.raises(ValueError, match="with N beams"):
        whole_catalogue(*encoded(model, [[1]]))
