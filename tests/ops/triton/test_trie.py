"""The softmax over children, and the choice of the best, against their twins in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import reference
from ops.trie import best_children
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

kernels = pytest.importorskip("ops.triton.trie")


def level(children: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """first_child, code and fanout of nodes with so many children, of distinct codes below `width` in order."""
    first_child = torch.tensor([0, *children]).cumsum(0)
    code = torch.cat([torch.randperm(width)[:n].sort().values for n in children])
    return first_child.int().to(DEVICE), code.int().to(DEVICE), max(children)


def check(children: list[int], width: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    nodes = torch.randint(0, len(children), shape, device=DEVICE, dtype=torch.int32)
    logits = (4 * torch.randn(*shape, width, device=DEVICE)).to(dtype)
    tables = level(children, width)
    tables = tables[0], tables[1].to(torch.uint8) if width <= 256 else tables[1], tables[2]
    expected = reference.child_log_probs(logits.double(), *tables[:2], nodes, tables[2])
    actual = kernels.child_log_probs(logits, *tables[:2], nodes, tables[2])
    assert actual.dtype == torch.float32 and actual.shape == (*shape, max(children))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=20 * TOLERANCE[torch.float32])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([(1,), (7,), (3, 5), (0,), (2, 0)]))
def test_small_nodes(children, shape):
    check(children, 11, shape, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("children", [[1], [256, 3, 255], [1024, 1], [2500, 1025, 7]])
def test_wide_nodes_and_dtypes(children, dtype):
    """Also more children than a program looks at together."""
    check(children, 2600, (4, 3), dtype)


def test_views_of_logits_and_nodes():
    first_child, code, fanout = level([2, 3, 1], 5)
    wide = torch.randn(4, 2, 9, device=DEVICE)
    nodes = torch.tensor([[0, 1, 2, 1]] * 2, device=DEVICE, dtype=torch.int32).T
    actual = kernels.child_log_probs(wide[..., 2:7], first_child, code, nodes, fanout)
    expected = reference.child_log_probs(wide[..., 2:7], first_child, code, nodes, fanout)
    torch.testing.assert_close(actual, expected)


def choose(children, users, n_nodes, count, width=11, dtype=torch.float32, left_out=0.0):
    """Checks the best children against the twin's scores of all children."""
    first_child, code, fanout = level(children, width)
    code = code.to(torch.uint8 if width <= 256 else torch.int16)
    nodes = torch.randint(0, len(children), (users, n_nodes), device=DEVICE, dtype=torch.int32)
    logits = (4 * torch.randn(users, n_nodes, width, device=DEVICE)).to(dtype)
    scores = torch.randn(users, n_nodes, device=DEVICE)
    out = torch.rand(users, n_nodes, fanout, device=DEVICE) < left_out if left_out else None
    actual = kernels.best_children(logits, scores, first_child, code, nodes, fanout, count, out)
    best, parents, chosen = actual
    assert [t.dtype for t in actual] == [torch.float32, torch.int64, torch.int32]
    assert all(t.shape == (users, count) for t in actual)

    log_probs = reference.child_log_probs(logits.double(), first_child, code, nodes, fanout)
    total = scores[..., None] + log_probs
    total = total.masked_fill(out, -torch.inf) if out is not None else total
    tolerance = dict(rtol=0, atol=20 * TOLERANCE[torch.float32])
    torch.testing.assert_close(best.double(), total.flatten(1).sort(descending=True).values[:, :count], **tolerance)
    assert torch.equal(best, best.sort(descending=True).values)
    places = chosen - first_child[nodes.gather(1, parents)]
    assert bool((places >= 0).all())
    own = total.flatten(1).gather(1, parents * fanout + places)
    real = best > -torch.inf
    torch.testing.assert_close(best.double()[real], own[real], **tolerance)
    for row, there in zip(parents * fanout + places, real, strict=True):
        assert len(row[there].unique()) == int(there.sum())


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 3), st.integers(1, 5), st.integers(1, 12),
    st.sampled_from([0.0, 0.4, 1.0]),
)  # fmt: skip
def test_the_best_of_small_nodes(children, users, n_nodes, count, left_out):
    choose(children, users, n_nodes, min(count, n_nodes * max(children)), left_out=left_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 10, 50, kernels.MAX_CHOSEN])
@pytest.mark.parametrize("n_nodes, children", [(10, [256, 3, 255]), (50, [40, 256]), (1, [2500]), (13, [1000, 1])])
def test_the_best_of_wide_nodes_and_dtypes(n_nodes, children, count, dtype):
    """Up to the most that the kernel takes."""
    assert kernels.chooses(n_nodes, max(children), count)
    choose(children, 2, n_nodes, count, 2600, dtype)


@pytest.mark.parametrize("left_out", [0.3, 0.99])
def test_wide_nodes_with_children_left_out(left_out):
    choose([256, 3, 255], 3, 10, 20, 256, left_out=left_out)


def test_views_choose_as_their_copies():
    first_child, code, fanout = level([2, 3, 1], 5)
    logits = torch.randn(2, 4, 9, device=DEVICE)[..., 2:7]
    scores = torch.randn(4, 2, device=DEVICE).T
    nodes = torch.tensor([[0, 1], [2, 1], [1, 0], [2, 2]], device=DEVICE, dtype=torch.int32).T
    out = (torch.rand(2, 3, 4, device=DEVICE) < 0.2).transpose(1, 2)
    views, copies = (logits, scores, nodes, out), (t.contiguous() for t in (logits, scores, nodes, out))
    results = []
    for one, weights, places, hidden in (views, tuple(copies)):
        results.append(kernels.best_children(one, weights, first_child, code, places, fanout, 5, hidden))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("count", [0, 7])
def test_more_children_than_there_are_places_is_an_error(count):
    first_child, code, fanout = level([2, 3], 5)
    nodes = torch.tensor([[1, 0]], device=DEVICE)
    with pytest.raises(ValueError, match=f"count = {count} .* 1 to 2 x 3"):
        kernels.best_children(
            torch.randn(1, 2, 5, device=DEVICE),
            torch.zeros(1, 2, device=DEVICE),
            first_child,
            code,
            nodes,
            fanout,
            count,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_nodes, children, count", [(70, [256, 3], 20), (10, [40, 7], 129), (10, [40, 7], 20)])
def test_what_the_kernel_takes_and_what_not_give_the_same(n_nodes, children, count):
    first_child, code, fanout = level(children, 256)
    nodes = torch.randint(0, len(children), (2, n_nodes), device=DEVICE, dtype=torch.int32)
    logits, scores = torch.randn(2, n_nodes, 256, device=DEVICE), torch.randn(2, n_nodes, device=DEVICE)
    best, parents, chosen = best_children(logits, scores, first_child, code, nodes, fanout, count)
    log_probs = reference.child_log_probs(logits, first_child, code, nodes, fanout)
    expected = reference.best_children(log_probs, scores, first_child, nodes, count, None)
    torch.testing.assert_close(best, expected[0])
    real = best > -torch.inf
    assert torch.equal(parents[real], expected[1][real]) and torch.equal(chosen[real], expected[2][real])


def test_more_than_the_kernel_takes_is_left_to_others():
    assert kernels.chooses(64, 256, 128)
    assert not kernels.chooses(65, 256, 10) and not kernels.chooses(64, 257, 10) and not kernels.chooses(10, 256, 129)


@pytest.mark.parametrize("left_out", [False, True])
def test_of_equal_children_the_first_are_chosen(left_out):
    first_child, code, fanout = level([30, 30, 30], 40)
    nodes = torch.tensor([[0, 2, 1, 1]], device=DEVICE, dtype=torch.int32)
    logits, scores = torch.zeros(1, 4, 40, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    out = None
    if left_out:
        out = torch.zeros(1, 4, 30, device=DEVICE, dtype=torch.bool)
        out[0, 0, :27] = True
    _, parents, chosen = kernels.best_children(logits, scores, first_child, code, nodes, fanout, 7, out)
    expected = [27, 28, 29, 60, 61, 62, 63] if left_out else [0, 1, 2, 3, 4, 5, 6]
    assert chosen.tolist() == [expected] and parents.tolist() == [[0, 0, 0, 1, 1, 1, 1] if left_out else [0] * 7]


def test_scores_that_are_not_finite_end_the_search_as_well():
    first_child, code, fanout = level([30, 30], 40)
    nodes = torch.tensor([[0, 1]] * 3, device=DEVICE, dtype=torch.int32)
    logits, scores = torch.randn(3, 2, 40, device=DEVICE), torch.zeros(3, 2, device=DEVICE)
    logits[0], scores[1, 0], scores[2] = torch.nan, -torch.inf, torch.inf
    least = torch.full_like(logits, -1, dtype=torch.int32).view(torch.float32)  # the NaN with all bits set
    assert bool(kernels.best_children(least, scores, first_child, code, nodes, fanout, 5)[0].isnan().all())
    best, parents, _ = kernels.best_children(logits, scores, first_child, code, nodes, fanout, 5)
    assert bool(best[0].isnan().all()) and parents[1].tolist() == [1] * 5 and best[2].tolist() == [torch.inf] * 5


def test_the_operators_are_registered_completely():
    nodes = torch.tensor([[1, 0]], device=DEVICE)
    first_child, code, fanout = level([2, 3], 5)
    logits, scores = torch.randn(1, 2, 5, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    torch.library.opcheck(kernels.child_log_probs, (logits, first_child, code, nodes, fanout))
    arguments = (logits, scores, first_child, code, nodes, fanout, 3)
    torch.library.opcheck(kernels.best_children, arguments)
    torch.library.opcheck(kernels.best_children, (*arguments, torch.zeros(1, 2, 3, dtype=torch.bool, device=DEVICE)))
