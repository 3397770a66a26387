"""The operations on the tree against loops over queries and over children, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import tree
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

kernels = pytest.importorskip("ops.triton.tree")
search = pytest.importorskip("ops.triton.tree_search")

COUNTS = {
    "one child": [1],
    "single children": [1, 1, 1],
    "odd": [3, 1, 5, 2, 18, 1],
    "more than a block": [300, 2, 257, 1],
}


def depth(counts: list[int], d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [n, d] float64 and first_child [m+1] of nodes with so many children."""
    first_child = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return torch.randn(sum(counts), d, dtype=torch.float64, device=DEVICE), first_child.to(DEVICE)


def draw(counts: list[int], P: int, d: int = 48) -> tuple[torch.Tensor, ...]:
    """Queries [P, d] and vectors in float64, first_child, parents and targets [P]: views of a matrix's columns."""
    vectors, first_child = depth(counts, d)
    parents = torch.randint(0, len(counts), (P,), device=DEVICE)
    first, last = first_child[parents], first_child[parents + 1]
    pairs = torch.stack([parents.int(), first + (torch.rand(P, device=DEVICE) * (last - first)).int()], 1)
    query = torch.randn(P, d, dtype=torch.float64, device=DEVICE) * (3 / d**0.5)
    return query, vectors, first_child, pairs[:, 0], pairs[:, 1]


def loop(query, vectors, first_child, parents, targets, smoothing) -> torch.Tensor:
    """The losses, one target after another."""
    losses, bounds = [query.sum(1)[:0]], first_child.tolist()
    for q, parent, target in zip(query, parents.tolist(), targets.tolist(), strict=True):
        log_probs = (vectors[bounds[parent] : bounds[parent + 1]] @ q).log_softmax(0)
        losses.append(-(1 - smoothing) * log_probs[target - bounds[parent], None] - smoothing * log_probs.mean())
    return torch.cat(losses)


def operation(name: str):
    if name == "twin":
        return tree.tree_cross_entropy
    return lambda q, v, f, parents, t, fanout, smoothing: kernels.tree_cross_entropy(
        q, v, f, parents, t, parents.argsort(stable=True), smoothing
    )[0]


def check(name, query, vectors, *places, smoothing=0.0, dtype=torch.float32) -> list[torch.Tensor]:
    """Compares with the loop, and returns the losses and both gradients."""
    narrow = [t.to(dtype).requires_grad_() for t in (query, vectors)]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    weights = torch.randn(len(query), dtype=torch.float64, device=DEVICE)
    fanout = int(places[0].diff().max())
    losses = operation(name)(*narrow, *places, fanout, smoothing)
    expected = loop(*wide, *places, smoothing)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    # Tensor cores cut off what float32 arithmetic rounds; there, float32 products are three in TF32.
    rounding = 2e-6 if dtype.itemsize == 2 else 1e-6 if DEVICE == "cpu" else 4e-6
    size = max(1.0, float((query @ vectors.T).detach().abs().max())) if len(query) else 1.0
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=rounding * size)
    mine = torch.autograd.grad((losses.double() * weights).sum(), narrow)
    theirs = torch.autograd.grad((expected * weights).sum(), wide, allow_unused=True, materialize_grads=True)
    for one, other in zip(mine, theirs, strict=True):
        scale = max(float(other.abs().max()), 1.0) if other.numel() else 1.0
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=TOLERANCE.get(dtype, 1e-12) * scale)
    parents, targets = places[1:]
    single = places[0].diff()[parents] == 1
    assert not losses[single].any() and not mine[0][single].any(), "an only child is certain"
    reached = torch.isin(torch.arange(len(vectors), device=DEVICE), children_of(places[0], parents[~single]))
    assert not mine[1][~reached].any(), "a node that no target is near gets no gradient"
    return [losses, *mine]


def children_of(first_child: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    ranges = [torch.arange(*first_child[p : p + 2].tolist()) for p in parents.unique().tolist()]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ranges]).to(DEVICE)


NAMES = ["kernel", pytest.param("twin", marks=pytest.mark.skipif(DEVICE != "cpu", reason="runs elsewhere"))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [0, 1, 77])
@pytest.mark.parametrize("case", COUNTS)
def test_losses_and_gradients(case, P, name):
    check(name, *draw(COUNTS[case], P), smoothing=0.1 if P == 77 else 0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 1024])
def test_dtypes_and_widths(d, dtype, smoothing, name):
    check(name, *draw([3, 1, 40], 33, d), smoothing=smoothing, dtype=dtype)


def test_double_precision():
    check("twin", *draw(COUNTS["odd"], 50), smoothing=0.2, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_large_logits_do_not_overflow(name):
    query, vectors, *places = draw([300, 2], 9)
    narrow = [(1e4 * query).float().requires_grad_(), vectors.float().requires_grad_()]
    losses = operation(name)(*narrow, *places, 300, 0.0)
    expected = loop(*(t.detach().double() for t in narrow), *places, 0.0)
    assert bool((losses > 1e3).any())
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0.1)
    assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(losses.sum(), narrow))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_bit_for_bit(name):
    """More targets of a parent than are taken together, and one gradient for all losses: a number, expanded."""
    query, vectors, *places = draw([40, 2], 70)
    narrow = query.float().requires_grad_(), vectors.float().requires_grad_()
    runs = [torch.autograd.grad(operation(name)(*narrow, *places, 40, 0.1).mean(), narrow) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_autocast_rounds_as_a_linear_layer_does():
    query, vectors, *places = draw(COUNTS["odd"], 20)
    query, vectors = query.float().requires_grad_(), vectors.float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = tree.tree_cross_entropy(query, vectors, *places, 18)
    expected = loop(*(t.detach().bfloat16().double() for t in (query, vectors)), *places, 0.0)
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-5)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(losses.sum(), (query, vectors)))


def brute_force(query, scores, vectors, first_child, nodes, fanout, dead) -> torch.Tensor:
    """The score of every child [B, K, fanout] in float64, -inf where there is none or it is dead."""
    bounds = first_child.tolist()
    total = torch.full((*nodes.shape, fanout), -torch.inf, dtype=torch.float64, device=DEVICE)
    for user, row in enumerate(nodes.tolist()):
        for k, node in enumerate(row):
            logits = vectors[bounds[node] : bounds[node + 1]].double() @ query[user, k % query.shape[1]].double()
            total[user, k, : len(logits)] = scores[user, k] + logits.log_softmax(0)
    return total if dead is None else total.masked_fill(dead, -torch.inf)


def beams(counts: list[int], users: int, K: int, shares: bool, d: int = 24, dtype: torch.dtype = torch.float32):
    """query, scores, vectors, first_child and nodes; one score is -inf."""
    vectors, first_child = depth(counts, d)
    nodes = torch.randint(0, len(counts), (K, users), device=DEVICE, dtype=torch.int32).T
    query = torch.randn(users, 1 if shares else K, d, device=DEVICE) * (4 / d**0.5)
    scores = torch.randn(users, K, device=DEVICE)
    scores[:1, 1:2] = -torch.inf
    return query.to(dtype), scores, vectors.to(dtype), first_child, nodes


def by_kernels(query, scores, vectors, first_child, nodes, fanout, count, dead):
    assert search.chooses(nodes.shape[1], fanout, count)
    logits = search.child_logits(query, vectors, first_child, nodes, fanout)
    return search.choose_children(logits, scores, first_child, nodes, count, dead)


CHOOSERS = {"kernel": by_kernels, "twin": tree.best_children}


def choose(name: str, arguments: tuple, fanout: int, count: int, share_dead: float = 0.0) -> None:
    """Checks the best children against the scores of all."""
    query, scores, vectors, first_child, nodes = arguments
    users, K = nodes.shape
    dead = torch.rand(users, fanout, K, device=DEVICE).transpose(1, 2) < share_dead if share_dead else None
    best, parents, children = CHOOSERS[name](*arguments, fanout, count, dead)
    assert [t.dtype for t in (best, parents, children)] == [torch.float32, torch.int64, torch.int32]
    assert all(t.shape == (users, count) for t in (best, parents, children))
    total = brute_force(*arguments, fanout, dead)
    expected = total.flatten(1).sort(descending=True).values[:, :count]
    torch.testing.assert_close(best.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(best, best.sort(descending=True).values)
    places = children - first_child[nodes.gather(1, parents)]
    assert bool((places >= 0).all())
    positions, real = parents * fanout + places, best > -torch.inf
    torch.testing.assert_close(best.double()[real], total.flatten(1).gather(1, positions)[real], rtol=0, atol=1e-4)
    for row, there in zip(positions, real, strict=True):
        assert len(row[there].unique()) == int(there.sum())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 3), st.integers(1, 5), st.integers(1, 12),
    st.booleans(), st.sampled_from([0.0, 0.4, 1.0]),
)  # fmt: skip
def test_the_best_children_are_those_of_all(name, counts, users, K, count, shares, share_dead):
    choose(name, beams(counts, users, K, shares), max(counts), min(count, K * max(counts)), share_dead)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts, K, count", [([256, 3, 255], 10, 50), ([40, 7], 50, 10), ([1025], 1, 128)])
def test_wide_nodes_and_dtypes(counts, K, count, dtype, name):
    choose(name, beams(counts, 2, K, False, 64, dtype), max(counts), count, 0.3 if K == 10 else 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_of_equal_children_the_first_are_chosen(name):
    _, _, vectors, first_child, _ = beams([30, 30, 30], 1, 1, True)
    nodes = torch.tensor([[0, 2, 1, 1]], device=DEVICE, dtype=torch.int32)
    dead = torch.zeros(1, 4, 30, device=DEVICE, dtype=torch.bool)
    dead[0, 0, :27] = True
    arguments = torch.zeros(1, 1, 24, device=DEVICE), torch.zeros(1, 4, device=DEVICE), vectors, first_child, nodes, 30
    for hidden, first in ((None, [0, 1, 2, 3, 4, 5, 6]), (dead, [27, 28, 29, 60, 61, 62, 63])):
        _, parents, children = CHOOSERS[name](*arguments, 7, hidden)
        assert children.tolist() == [first] and parents.tolist() == [[int(child >= 60) for child in first]]


def test_log_probabilities_of_children():
    """Of the kernel and the twin alike; small nodes beside large ones have -inf behind their children."""
    counts = [300, 2, 1]
    query, _, vectors, first_child, nodes = beams(counts, 3, 4, True)
    expected = brute_force(query, torch.zeros(3, 4), vectors, first_child, nodes, 300, None)
    kernel = search.child_logits(query, vectors, first_child, nodes, 300).log_softmax(-1)
    for actual in (kernel, tree.child_log_probs(query, vectors, first_child, nodes, 300)):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


def test_scores_that_are_not_finite_end_the_search_as_well():
    _, _, _, first_child, _ = beams([30, 30], 1, 1, True)
    nodes = torch.tensor([[0, 1]] * 3, device=DEVICE, dtype=torch.int32)
    logits, scores = torch.randn(3, 2, 30, device=DEVICE), torch.zeros(3, 2, device=DEVICE)
    logits[0], scores[1, 0], scores[2] = torch.nan, -torch.inf, torch.inf
    least = torch.full_like(logits, -1, dtype=torch.int32).view(torch.float32)  # the NaN with all bits set
    assert bool(search.choose_children(least, scores, first_child, nodes, 5)[0].isnan().all())
    best, parents, _ = search.choose_children(logits, scores, first_child, nodes, 5)
    assert bool(best[0].isnan().all()) and parents[1].tolist() == [1] * 5 and best[2].tolist() == [torch.inf] * 5


def test_what_the_kernel_chooses_among():
    assert search.chooses(64, 256, 128)
    assert not search.chooses(65, 256, 10) and not search.chooses(64, 257, 10) and not search.chooses(10, 256, 129)


@pytest.mark.parametrize("count", [0, 7])
def test_more_children_than_there_are_places_is_an_error(count):
    with pytest.raises(ValueError, match=f"count = {count} .* 1 to 2 x 3"):
        tree.best_children(*beams([2, 3], 1, 2, True), 3, count)


def test_the_operators_are_registered_completely():
    query, vectors, *places = draw([4, 2], 6)
    arguments = query.float().requires_grad_(), vectors.float().requires_grad_(), *places
    order = places[1].argsort(stable=True)
    torch.library.opcheck(kernels.tree_cross_entropy, (*arguments, order, 0.1))
    query, scores, vectors, first_child, nodes = beams([2, 3], 1, 2, True)
    torch.library.opcheck(search.child_logits, (query, vectors, first_child, nodes, 3))
    logits = torch.randn(1, 2, 3, device=DEVICE)
    for dead in (None, logits > 0):
        torch.library.opcheck(search.choose_children, (logits, scores, first_child, nodes, 3, dead))
