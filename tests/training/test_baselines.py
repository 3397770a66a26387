"""Ranks of the baselines against full rankings by hand, and a SASRec that has to learn."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator

from common.schemas import Interactions
from data.batches import SequenceSource
from data.splits import leave_one_out, windows
from modules.sasrec import SasRec
from tests.data.test_baselines import rankings, to_interactions
from training import baselines
from training.baselines import baseline_ranks, sasrec_ranks, train_sasrec

CPU = torch.device("cpu")
N_ITEMS, MAX_ITEMS = 12, 5


def by_hand(order: list[int], target: int, consumed: list[int]) -> tuple[int, int]:
    new = [item for item in order if item not in consumed]
    return order.index(target), N_ITEMS if target in consumed else new.index(target)


def walks(n_users: int) -> Interactions:
    """Users who step through the items by 5, from anywhere, and some who stay at one item."""
    starts = torch.randint(0, N_ITEMS, (n_users,)).tolist()
    strides = [5 * (user % 4 > 0) for user in range(n_users)]
    lengths = [4 + user % 6 for user in range(n_users)]
    users = zip(starts, strides, lengths, strict=True)
    return to_interactions([[(start + stride * n) % N_ITEMS for n in range(length)] for start, stride, length in users])


def test_ranks_are_places_in_the_full_rankings_under_both_protocols():
    rows = [torch.randint(0, N_ITEMS, (length,)).tolist() for length in torch.randint(3, 9, (1100,))]  # two batches
    interactions = to_interactions(rows)
    splits = leave_one_out(interactions)
    source = SequenceSource(interactions, splits.test, 2, CPU)
    found = baseline_ranks(source, splits.train_lengths, N_ITEMS)
    orders = rankings([row[:-2] for row in rows], [row[-2] for row in rows], N_ITEMS, N_ITEMS)
    for name, ranking in zip(("most_popular", "transition"), orders, strict=True):
        expected = [by_hand(order, row[-1], row[:-1]) for order, row in zip(ranking, rows, strict=True)]
        assert list(zip(found[name]["all"].tolist(), found[name]["new"].tolist(), strict=True)) == expected


@pytest.fixture
def task():
    interactions = walks(300)
    splits = leave_one_out(interactions)
    source = partial(SequenceSource, interactions, max_items=MAX_ITEMS, device=CPU)
    train = source(samples=windows(splits.train_lengths, MAX_ITEMS), every_position=True)
    return train, source(samples=splits.valid), source(samples=splits.test)


def test_sasrec_ranks_are_those_of_sorted_scores(task):
    _, _, test = task
    model = SasRec(N_ITEMS, MAX_ITEMS, dim=16, n_layers=1)
    found = sasrec_ranks(model, test, Accelerator())
    assert model.training
    model.eval()
    for user, batch in enumerate(test.in_order(1)):
        order = (model.state(batch.history) @ model.vectors.T)[0].argsort(descending=True).tolist()
        expected = by_hand(order, int(batch.targets.values), batch.consumed.values.tolist())
        assert (int(found["all"][user]), int(found["new"][user])) == expected


@pytest.fixture
def fit(task, monkeypatch):
    monkeypatch.setattr(baselines, "SasRec", partial(SasRec, dim=16, n_layers=1, dropout=0.0))
    train, valid, _ = task
    settings = {"seed": 3, "batch_size": 32, "learning_rate": 1e-2}
    return partial(train_sasrec, train, valid, N_ITEMS, "all", Accelerator(), **settings)


def test_sasrec_learns_and_repeats(task, fit):
    model = fit(iterations=200, eval_every=100)
    ranks = sasrec_ranks(model, task[2], Accelerator())["all"]
    assert (ranks == 0).float().mean() > 0.9  # who takes the last item alone is right for three of four
    weights, again = (fit(iterations=5).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_the_weights_of_the_best_validation_are_kept_and_patience_ends_the_training(fit, monkeypatch):
    figures, weights = iter([0.2, 0.6, 0.6, 0.5, 0.9]), []

    def ranks(model: SasRec, *_) -> dict[str, torch.Tensor]:
        weights.append(model.vectors.detach().clone())
        return {"all": torch.zeros(1)}

    monkeypatch.setattr(baselines, "ranking_metrics", lambda *_: {"ndcg@10": next(figures)})
    monkeypatch.setattr(baselines, "sasrec_ranks", ranks)
    model = fit(iterations=10, eval_every=2, patience=2)
    assert len(weights) == 4  # the two after the best are not better
    assert torch.equal(model.vectors, weights[1]) and not torch.equal(weights[1], weights[2])
