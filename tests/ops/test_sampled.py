"""Sampled cross-entropies against the whole ones, and their estimate of the softmax's sum against the sum."""

import pytest
import torch
import torch.nn.functional as F

from ops.jagged import JaggedTensor
from ops.sampled import RowItems, sampled_cross_entropy, sampled_losses, sampled_tree_cross_entropy

FIRST_CHILD = torch.tensor([0, 1, 4, 9], dtype=torch.int32)  # 1, 3 and 5 children


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_with_all_others_in_the_sample_it_is_the_cross_entropy():
    logits, targets = normal(6, 9), torch.tensor([0, 8, 3, 3, 7, 1])
    own, left_out = logits.gather(1, targets[:, None])[:, 0], F.one_hot(targets, 9).bool()
    losses = sampled_losses(own, logits, torch.zeros(9), left_out)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))


def test_the_sum_over_the_others_is_estimated_without_bias():
    """That over the row's items, with their bias, is exact."""
    x, vectors, targets = normal(3, 4), normal(20, 4), torch.tensor([2, 2, 19])
    drawn = torch.arange(1.0, 21.0, dtype=torch.float64) / 210
    items, bias, target_bias = torch.tensor([[18, 2, -1], [-1, 5, 19]]), normal(3, 3), normal(3)
    queries = JaggedTensor(x, torch.tensor([0, 2, 3]), 2)
    own_items = RowItems(items, vectors[items], bias, target_bias)
    torch.manual_seed(0)
    others, own = [], (x * vectors[targets]).sum(1) + target_bias
    for _ in range(400):
        losses = sampled_cross_entropy(queries, vectors.__getitem__, targets, drawn, drawn.cumsum(0), 50, own_items)
        others.append((losses + own).exp() - own.exp())
    logits = x @ vectors.T
    for p, row in enumerate(items[[0, 0, 1]].tolist()):
        for place, item in enumerate(row):
            if item >= 0:
                logits[p, item] += bias[p, place]
    logits.scatter_(1, targets[:, None], float("-inf"))
    spread = torch.stack(others).std(0) / 20
    assert bool(((torch.stack(others).mean(0) - logits.exp().sum(1)).abs() < 4 * spread).all())


def test_nothing_is_drawn_where_a_row_holds_all_items():
    x, vectors, targets = normal(2, 4), normal(5, 4), torch.tensor([3, 0])
    queries, items = JaggedTensor(x, torch.tensor([0, 1, 2]), 1), torch.stack([torch.randperm(5), torch.arange(5)])
    own = RowItems(items, vectors[items], torch.zeros(2, 5), torch.zeros(2))
    drawn = torch.full((5,), 0.2, dtype=torch.float64)
    losses = sampled_cross_entropy(queries, vectors.__getitem__, targets, drawn, drawn.cumsum(0), 30, own)
    torch.testing.assert_close(losses, F.cross_entropy(x @ vectors.T, targets, reduction="none"))


@pytest.mark.parametrize("size", [5, 64])
def test_over_all_children_it_is_the_softmax_of_each_parent(size):
    parents, targets = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 1, 3, 8, 5])
    query, vectors = normal(5, 4).requires_grad_(), normal(9, 4).requires_grad_()
    losses = sampled_tree_cross_entropy(query, vectors.__getitem__, FIRST_CHILD, parents, targets, 5, size)
    expected = []
    for q, parent, target in zip(query, parents.tolist(), targets.tolist(), strict=True):
        start, end = FIRST_CHILD[parent : parent + 2].tolist()
        expected.append(F.cross_entropy(vectors[start:end] @ q, torch.tensor(target - start)))
    expected = torch.stack(expected)
    torch.testing.assert_close(losses, expected)
    for mine, theirs in zip(*(torch.autograd.grad(t.sum(), (query, vectors)) for t in (losses, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_only_of_a_parent_with_more_children_than_size_some_are_drawn():
    parents, targets = torch.tensor([1] * 3 + [2] * 2000), torch.tensor([1, 2, 3] + [4] * 2000)
    query, vectors = torch.ones(2003, 1, dtype=torch.float64), normal(9, 1)
    torch.manual_seed(0)
    losses = sampled_tree_cross_entropy(query, vectors.__getitem__, FIRST_CHILD, parents, targets, 5, size=3)
    torch.testing.assert_close(losses[:3], -vectors[1:4, 0].log_softmax(0))
    others = (losses[3:] + vectors[4, 0]).exp() - vectors[4, 0].exp()
    error = float(others.mean() - vectors[5:9, 0].exp().sum())
    assert abs(error) < 4 * float(others.std()) / 2000**0.5
