"""Vectors of items and nodes against sums of the parts they name, in float64, each prefix by itself."""

import pytest
import torch

from modules.embedding import VectorSum, item_vectors, node_vectors
from modules.tree import Tree
from tests.modules.helpers import described, random_catalogue

N_ITEMS, COLUMNS, DIM = 17, 4, 6
CODES, SIZES = random_catalogue(N_ITEMS, seed=3)
ROWS = [tuple(row) for row in CODES.tolist()]
LEVELS = range(len(SIZES))
PREFIXES = [sorted({row[: level + 1] for row in ROWS}) for level in LEVELS]
FEATURES = torch.randn(N_ITEMS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PARTS = [("free",), ("codes",), ("nodes",), ("features",), ("features", "nodes", "codes", "free")]


def make(build, parts: tuple[str, ...], features: torch.Tensor | None = FEATURES, max_rows: int = 100):
    """In float64 and evaluation mode."""
    return build(parts, Tree.build(CODES, SIZES), features, DIM, 0.5, 8, max_rows).double().eval()


def blocks(vectors: VectorSum, sizes: list[int]) -> list[torch.Tensor]:
    """The blocks of the table, which have no rows but those."""
    table = vectors.table if sizes else torch.empty(0, DIM)
    assert len(table) == sum(sizes) and (vectors.table is None) == (not sizes)
    return list(table.split(sizes)) if sizes else []


@pytest.mark.parametrize("parts", PARTS)
def test_an_item_is_the_sum_of_its_parts(parts):
    vectors = make(item_vectors, parts)
    sizes = [N_ITEMS] if "free" in parts else []
    sizes += list(SIZES) if "codes" in parts else []
    sizes += [len(own) for own in PREFIXES] if "nodes" in parts else []
    tables, expected = iter(blocks(vectors, sizes)), torch.zeros(N_ITEMS, DIM, dtype=torch.float64)
    if "free" in parts:
        expected = expected + next(tables)
    for level in LEVELS if "codes" in parts else ():
        table = next(tables)
        expected = expected + torch.stack([table[row[level]] for row in ROWS])
    for level in LEVELS if "nodes" in parts else ():
        table = next(tables)
        expected = expected + torch.stack([table[PREFIXES[level].index(row[: level + 1])] for row in ROWS])
    if "features" in parts:
        expected = expected + described(vectors.mlp, FEATURES)
    check(vectors, expected)


@pytest.mark.parametrize("parts", [parts for parts in PARTS if parts != ("nodes",)])
def test_a_node_is_the_sum_of_its_parts(parts):
    parts = tuple(part for part in parts if part != "nodes")
    levels = make(node_vectors, parts)
    assert len(levels) == len(SIZES)
    for level, (vectors, own) in enumerate(zip(levels, PREFIXES, strict=True)):
        sizes = ([len(own)] if "free" in parts else []) + ([SIZES[level]] if "codes" in parts else [])
        tables, expected = iter(blocks(vectors, sizes)), torch.zeros(len(own), DIM, dtype=torch.float64)
        if "free" in parts:
            expected = expected + next(tables)
        if "codes" in parts:
            table = next(tables)
            expected = expected + torch.stack([table[prefix[-1]] for prefix in own])
        if "features" in parts:
            below = [[n for n, row in enumerate(ROWS) if row[: level + 1] == prefix] for prefix in own]
            means = torch.stack([FEATURES[items].mean(0) for items in below])
            expected = expected + described(vectors.mlp, means)
        check(vectors, expected)


def check(vectors: VectorSum, expected: torch.Tensor) -> None:
    """Values and the gradients of all parameters."""
    out, weights = vectors(), torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    leaves = list(vectors.parameters())
    grads = [torch.autograd.grad((t * weights).sum(), leaves) for t in (out, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_more_items_than_rows_share_hashed_ones():
    max_rows = 13
    vectors = make(item_vectors, ("free", "codes", "features"), max_rows=max_rows)
    assert len(vectors.table) == max_rows + sum(SIZES)
    own, shared = vectors.rows[:, :2].long(), vectors.rows[:, 2:].long()
    assert 0 <= own.min() and own.max() < max_rows and len(own.unique(dim=0)) > max_rows  # pairs tell most items apart
    assert torch.equal(shared, CODES + torch.tensor([max_rows, max_rows + SIZES[0], max_rows + sum(SIZES[:2])]))
    expected = vectors.table[own].sum(1) + vectors.table[shared].sum(1) + described(vectors.mlp, FEATURES)
    torch.testing.assert_close(vectors(), expected.detach(), rtol=1e-10, atol=1e-12)
    index = torch.tensor([3, 0, 3, 16])
    taken, leaves = vectors.take(index), list(vectors.parameters())
    torch.testing.assert_close(taken, expected[index], rtol=1e-10, atol=1e-12)
    weights = torch.randn(taken.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((t * weights).sum(), leaves, retain_graph=True) for t in (taken, expected[index])]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    levels = make(node_vectors, ("free",), max_rows=len(PREFIXES[1]))
    assert [level.all_at_once for level in levels] == [True, True, len(PREFIXES[2]) <= len(PREFIXES[1])]


def test_vectors_start_the_residual_stream():
    vectors = make(item_vectors, PARTS[-1], FEATURES.half()).float()
    assert vectors().dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        half = vectors()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), vectors(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("build", "name"), [(item_vectors, "item_parts"), (node_vectors, "node_parts")])
def test_features_that_are_missing_are_named(build, name):
    with pytest.raises(ValueError, match=rf'{name} names "features".*features\.npy'):
        make(build, ("free", "features"), features=None)
    make(build, ("free",), features=None)


def test_columns_that_pad_the_features_change_nothing():
    """As on a GPU, where products of odd widths are slow."""
    for vectors in (make(item_vectors, ("free", "features")), *make(node_vectors, ("features",))):
        plain = vectors()
        vectors.features = torch.nn.functional.pad(vectors.features, (0, 3))
        torch.testing.assert_close(vectors(), plain)
        grads = torch.autograd.grad(vectors().sum(), vectors.mlp[0].weight)
        assert grads[0].shape == vectors.mlp[0].weight.shape
