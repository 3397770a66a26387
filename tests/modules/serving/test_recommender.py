"""Recommendations against every item's probability by brute force, ranked by hand."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import title
from modules.serving import recommender as module
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from modules.tokenizer.semids import SemanticIds
from tests.modules.helpers import dense_log_probs, dense_queries, make_model, random_catalogue
from tests.modules.test_model import features_of

N, MAX_ITEMS, SHARE = 23, 3, 0.3
COUNTS = torch.arange(N) % 7
COLUMNS = {"categories": [["All", f"Group {n % 4}"] if n else [] for n in range(N)]}


def make_recommender(**changed) -> Recommender:
    """Of items with the keys "0" to "22"; both heads count."""
    codes, sizes = random_catalogue(N, seed=1)
    model = make_model(codes, **changed)
    model.item_share.fill_(SHARE if len(model.heads) == 2 else float(model.item_share))
    if model.seen is not None:
        model.seen.data.fill_(-0.05)
    ids = SemanticIds(codes, sizes, [str(n) for n in range(N)], "made", "0" * 16)
    titles = [f"title {n}" for n in range(N)]
    return Recommender(Pipeline(model, ids, None, titles, COUNTS, MAX_ITEMS, columns=COLUMNS))


@torch.no_grad()
def by_hand(recommender: Recommender, histories: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of every item by the tree and by the item head, in float64: [B, N] each."""
    model, recent = recommender.model.double(), [history[-MAX_ITEMS:] for history in histories]
    every = [(history, n) for history in recent for n in range(N)]
    state, queries, items, nodes = dense_queries(
        model, recommender.codes, [row for row, _ in every], [[n] for _, n in every], features_of(model)
    )
    tree = dense_log_probs(queries, recommender.codes, nodes).sum(2).view(-1, N, N).diagonal(dim1=1, dim2=2)
    logits = (state @ items.T).view(-1, N, N)[:, 0].clone()
    for user, history in enumerate(histories):
        logits[user, sorted(set(history))] += float(model.seen_bias)
    return tree, logits.log_softmax(1)


def scores_by_item(ranked) -> torch.Tensor:
    """[B, N] float32, -inf for items that are not there."""
    table = torch.full((len(ranked.items), N + 1), -math.inf)
    return table.scatter(1, ranked.items % (N + 1), ranked.scores)[:, :N]


HISTORIES = [[3, 1, 2, 7, 7], [5], [0, 0, 7, 22]]


@pytest.mark.parametrize("beams", [False, True])
def test_a_score_is_the_log_probability_of_both_heads(beams, monkeypatch):
    monkeypatch.setattr(module, "MAX_EXACT", 0 if beams else N)
    recommender = make_recommender()
    ranked, new = (recommender.rank(HISTORIES, N, exclude_seen) for exclude_seen in (False, True))
    tree, head = by_hand(recommender, HISTORIES)
    expected = (1 - SHARE) * tree + SHARE * head
    if not beams:
        expected = expected.log_softmax(1)
        torch.testing.assert_close(ranked.scores.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(scores_by_item(ranked), expected.float(), rtol=1e-4, atol=1e-4)
    for user, history in enumerate(HISTORIES):
        expected[user, history] = -math.inf
    torch.testing.assert_close(scores_by_item(new), expected.float(), rtol=1e-4, atol=1e-4)


def test_beams_down_a_decoder_score_as_its_tree_does():
    recommender = make_recommender(decoder_layers=1, item_loss=0.0, item_tokens=False, node_parts=("codes",))
    ranked = recommender.rank([[3, 1], [], [2]], N, exclude_seen=False)
    torch.testing.assert_close(ranked.scores.exp().sum(1), torch.ones(3))
    assert ranked.popular.tolist() == [False, True, False]


keys = st.integers(-2, N + 1)  # some outside the catalogue
key_sets = st.one_of(st.none(), st.sets(keys, max_size=N))


@settings(max_examples=60)
@given(st.data())
def test_the_best_of_what_is_left_come_whatever_the_filters(data):
    """Exact, and by so many beams that nothing is lost; then by few beams, which find as many items."""
    users = data.draw(st.integers(1, 4), "users")
    histories = data.draw(st.lists(st.lists(keys, max_size=6), min_size=users, max_size=users), "histories")
    each = st.lists(st.sets(keys, max_size=N), min_size=users, max_size=users)
    allow, block = (data.draw(st.one_of(key_sets, each), name) for name in ("allow", "block"))
    seen, k = data.draw(st.booleans(), "exclude seen"), data.draw(st.integers(1, N + 3), "k")
    every = RECOMMENDER.rank(histories, N, exclude_seen=False)
    left = [set(range(N)) for _ in range(users)]
    for user, history in enumerate(histories):
        allowed, blocked = (value[user] if isinstance(value, list) else value for value in (allow, block))
        left[user] &= allowed if allowed is not None else left[user]
        left[user] -= (blocked or set()) | (set(history) if seen else set())
    for most, beams in ((N, N), (0, N), (0, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RECOMMENDER, "_exact", most > 0)
            patch.setattr(module, "BEAMS", beams)
            ranked = RECOMMENDER.rank(histories, k, seen, allow, block, batch_size=3)
        for user in range(users):
            expected = [(n, s) for n, s in zip(every.items[user].tolist(), every.scores[user].tolist(), strict=True)]
            expected = [(n, s) for n, s in expected if n in left[user]][:k]
            found = [n for n in ranked.items[user].tolist() if n >= 0]
            assert len(found) == len(set(found)) == len(expected) and set(found) <= left[user]
            if beams == N:
                assert found == [n for n, _ in expected]
            if most:
                scores = torch.tensor([s for _, s in expected])
                torch.testing.assert_close(ranked.scores[user][: len(found)], scores, rtol=1e-4, atol=1e-4)


RECOMMENDER = make_recommender()


def test_a_history_without_a_known_item_gets_the_most_popular():
    found = RECOMMENDER.recommend([[], ["x", "y"], [3, "z"]], k=4, block=["6"])
    assert [(row.popular, row.unknown) for row in found] == [(True, 0), (True, 2), (False, 1)]
    order = sorted(range(N), key=lambda n: -n % 7 if n % 7 else 7)  # by count, 6 first, then by place
    assert [int(item.key) for item in found[0].items] == [n for n in order if n != 6][:4]
    share = (6 + 1) / (int(COUNTS.sum()) + N)
    assert found[0].items[0].score == pytest.approx(math.log(share), abs=1e-5)
    first = found[2].items[0]
    assert first.title == f"title {first.key}" and first.semantic_id == tuple(
        RECOMMENDER.codes[int(first.key)].tolist()
    )


def test_the_rows_of_a_batch_do_not_touch_each_other():
    histories = [[n % N, "x", 3 * n % N][: n % 4] for n in range(40)]
    whole = RECOMMENDER.rank(histories, 5)
    for n, history in enumerate(histories):
        alone = RECOMMENDER.rank([history], 5)
        assert torch.equal(alone.items[0], whole.items[n])
        torch.testing.assert_close(alone.scores[0], whole.scores[n], rtol=1e-5, atol=1e-5)
    assert RECOMMENDER.recommend([]) == []


def test_a_predicate_stands_for_the_keys_of_the_items_that_it_fits():
    keys = RECOMMENDER.where("categories = group 2")
    assert keys == [str(n) for n in range(2, N, 4)]
    for name, predicate in (("allow", "categories contains P 2"), ("block", "categories=Group 2")):
        one, other = (RECOMMENDER.rank(HISTORIES, N, **{name: given}) for given in (predicate, keys))
        assert torch.equal(one.items, other.items) and torch.equal(one.scores, other.scores)
    each = [RECOMMENDER.where("title = title 9"), ["1", "2"], []]
    found = [[item.key for item in row.items] for row in RECOMMENDER.recommend(HISTORIES, allow=each)]
    assert found[::2] == [["9"], []]


def test_a_series_of_lists_ranks_as_lists_do():
    rows = [["3", "none", "1"], [], ["5"], None]
    one, other = RECOMMENDER.rank(pl.Series(rows), 5), RECOMMENDER.rank([row or [] for row in rows], 5)
    for field in ("items", "scores", "known", "unknown"):
        assert (getattr(one, field) == getattr(other, field)).all()


def test_wrong_arguments_are_named():
    for name in ("k", "batch_size"):
        for value in (0, "5", 2.5, True):
            with pytest.raises(ValueError, match=f"^{name} = {value!r} must be a whole number, 1 or more.$"):
                RECOMMENDER.recommend([[1]], **{name: value})
    for value in ("a", math.inf, None):
        with pytest.raises(ValueError, match=f"^cold_bonus = {value!r} must be a finite number.$"):
            RECOMMENDER.recommend([[1]], cold_bonus=value)
    assert torch.equal(
        RECOMMENDER.rank([[1]], np.int64(3), batch_size=np.int32(2)).items, RECOMMENDER.rank([[1]], 3).items
    )
    with pytest.raises(ValueError, match="allow has 2 collections of keys for 1 histories"):
        RECOMMENDER.rank([[1]], allow=[{1}, {2}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Toy Story (1995). Genres: Animation, Comedy.", "Toy Story (1995)"),
        ("Mr. Bean. Brand: BBC. Price: 3", "Mr. Bean"),
        ("Mission: Impossible (1996).", "Mission: Impossible (1996)"),
        ("one line.\nanother", "one line"),
        ("long " * 50, "long " * 19 + "long…"),
    ],
)
def test_the_title_is_what_stands_before_the_labels(text, expected):
    assert title(text) == expected


@pytest.mark.parametrize("histories", [["ab", "cd"], [None], [[("a",)]]])
def test_what_is_no_list_of_keys_is_refused(histories):
    with pytest.raises(ValueError, match="key"):
        make_recommender().recommend(histories)
    with pytest.raises(ValueError, match="'12' is neither a list of keys nor a predicate"):
        make_recommender().recommend([["1"]], block="12")
