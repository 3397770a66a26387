"""What codes stand for, by brute force, and calibration on outcomes drawn from the predictions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr

from common.schemas import Interactions
from data.corpus import Corpus
from data.histories import read_histories
from data.splits import leave_one_out
from modules.serving import inspection
from modules.serving.inspection import HeldOut, calibration, first_codes, neighbours, save_held_out, typical
from modules.serving.pipeline import Pipeline
from modules.tokenizer.semids import SemanticIds
from tests.modules.helpers import random_catalogue
from tests.modules.serving.test_recommender import RECOMMENDER


@given(st.integers(1, 30), st.integers(0, 99), st.integers(1, 8))
@settings(max_examples=40)
def test_neighbours_have_the_longest_common_prefixes(n_items, seed, k):
    codes, _ = random_catalogue(n_items, seed)
    item, rows = seed % n_items, codes.tolist()

    def shared(other: list[int]) -> int:
        return next(n for n, (a, b) in enumerate(zip(other + [-1], rows[item] + [-2], strict=True)) if a != b)

    expected = sorted(((n, shared(row)) for n, row in enumerate(rows) if n != item), key=lambda pair: -pair[1])
    assert neighbours(codes, item, k) == [pair for pair in expected if pair[1]][:k]


LABELS = st.lists(st.tuples(st.sets(st.sampled_from("abcdef")), st.integers(0, 2)), min_size=1, max_size=60)


@given(LABELS)
@settings(max_examples=60)
def test_typical_labels_are_those_with_the_largest_likelihood_ratio(items):
    labels, groups = zip(*items, strict=True)
    found = typical(labels, groups, 3)
    for group in set(groups):
        inside = [names for names, other in items if other == group]
        outside = [names for names, other in items if other != group]
        scores = {}
        for name in "abcdef":
            count = sum(name in names for names in inside)
            p, q = count / len(inside), (sum(name in names for names in outside) + 1) / (len(outside) + 2)
            scores[name] = len(inside) * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)) if p > q and count > 1 else 0.0
        best = sorted((score for score in scores.values() if score >= 3 + 1e-9), reverse=True)[:3]
        assert [scores[name] for name in found[group]][: len(best)] == pytest.approx(best)
        assert all(scores[name] > 3 - 1e-9 for name in found[group])


def test_first_codes_tell_their_items_from_others():
    codes = torch.tensor([[n % 4, n // 4] for n in range(40)])
    ids = SemanticIds(codes, (4, 10), [f"k{n}" for n in range(40)], "made", "0" * 16)
    titles = [f"The {('red', 'blue', 'red', 'green')[n % 4]} one ({n})" for n in range(40)]
    columns = {"kind": [["Thing", "Toy"] if n % 4 == 1 else ["Thing"] for n in range(40)]}
    found = first_codes(Pipeline(None, ids, None, titles, torch.arange(40), 5, columns=columns), k=2)
    told = {code: set(of.typical) for code, of in found.items()}
    assert told == {0: {"red"}, 1: {"blue", "toy"}, 2: {"red"}, 3: {"green"}}
    assert found[3].n_items == 10 and found[3].titles == ["The green one (39)", "The green one (35)"]


def test_held_out_histories_are_those_of_the_split(tmp_path, monkeypatch):
    lengths = torch.tensor([3, 2, 5, 4, 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    items = torch.randint(0, 6, (17,), dtype=torch.int32)
    keys = [f"ä{n}" for n in range(6)]
    corpus = Corpus.build("made", Interactions(items, offsets), keys, [*"uvwxy"], keys, [[]] * 6)
    tasks = leave_one_out(corpus.interactions).test
    rows = {user: [keys[n] for n in row] for user, row in zip("uvwxy", items.split(lengths.tolist()), strict=True)}
    for limit, users in ((4, "uwxy"), (2, "ux")):
        monkeypatch.setattr(inspection, "MAX_HELD_OUT", limit)
        save_held_out(tmp_path / "held_out.jsonl", corpus, tasks)
        [(found, histories)] = read_histories(tmp_path / "held_out.jsonl")
        assert dict(zip(found, histories, strict=True)) == {user: rows[user] for user in users}


def test_histories_that_the_catalogue_does_not_know_are_left_out():
    held_out = HeldOut.of(RECOMMENDER, [["1", "none", "3"], [4, 5.0], ["1", "none"], ["none", "1"], ["2"], []])
    assert held_out.histories == [["1", "none"], ["4"]] and held_out.targets.tolist() == [3, 5]
    assert held_out.left_out == 4
    with pytest.raises(ValueError, match="None of the 1 histories"):
        HeldOut.of(RECOMMENDER, [["2"]])


def test_predictions_that_outcomes_are_drawn_from_are_calibrated():
    p = torch.distributions.Dirichlet(torch.full((40,), 0.2)).sample((3000,)).sort(1, descending=True).values
    came = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.multinomial(1), True)
    found = calibration(p.log(), came)
    assert ((found.low <= found.predicted) & (found.predicted <= found.high)).double().mean() > 0.8
    assert found.top == pytest.approx(found.recall, abs=0.02) and len(found.pairs) >= 6
    bold = calibration((2 * p.log()).log_softmax(1), came)
    assert bold.low[0] > 0 and bold.high[0] < bold.predicted[0] and bold.top > bold.recall


def test_bins_hold_the_pairs_of_like_probability():
    p = torch.tensor([[0.5, 0.3, 0.26, 1e-9]] * 12)
    came = torch.zeros_like(p, dtype=torch.bool)
    came[:5, 0] = came[5:7, 2] = True
    found = calibration(p.log(), came)
    assert found.pairs.tolist() == [12, 24]
    torch.testing.assert_close(found.predicted, torch.tensor([0.5, 0.28]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.came, torch.tensor([5 / 12, 2 / 24]).double())
    assert found.recall == pytest.approx(7 / 12) and math.isclose(found.top, 1.06, rel_tol=1e-5)
