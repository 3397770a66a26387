"""The cross-entropy over the children of trie nodes against its twin in float64."""

import pytest
import torch

from ops import reference
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

cross_entropy = pytest.importorskip("ops.triton.cross_entropy").trie_cross_entropy

FANOUTS = {
    "one child": ([1], 1),
    "single children": ([1, 1, 1], 7),
    "odd": ([3, 1, 5, 2], 11),
    "all codes": ([64], 64),
    "more than a block": ([300, 2, 257, 1], 301),
}


def level(counts: list[int], V: int) -> tuple[torch.Tensor, torch.Tensor]:
    """first_child [n+1] and code [m] of nodes with these many children, the codes of each ascending in [0, V)."""
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randperm(V, generator=generator)[:count].sort().values for count in counts]
    first_child = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return first_child.to(DEVICE), torch.cat(codes).to(torch.int32).to(DEVICE)


def draw(counts: list[int], V: int, P: int) -> tuple[torch.Tensor, ...]:
    """Logits [P, V] float64, the level, nodes and targets [P]: views of the rows of a matrix, as in training."""
    first_child, code = level(counts, V)
    nodes = torch.randint(0, len(counts), (P,), device=DEVICE)
    first, last = first_child[nodes], first_child[nodes + 1]
    targets = first + (torch.rand(P, device=DEVICE) * (last - first)).int()
    pairs = torch.stack([nodes.int(), targets], 1)
    return 3 * torch.randn(P, V, dtype=torch.float64, device=DEVICE), first_child, code, pairs[:, 0], pairs[:, 1]


def check(logits: torch.Tensor, *places, fanout: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Compares, and returns the kernel's losses and gradient."""
    wide = logits.to(dtype).double().requires_grad_()
    narrow = logits.to(dtype).requires_grad_()
    weights = torch.randn(len(logits), dtype=torch.float64, device=DEVICE)
    expected = reference.trie_cross_entropy(wide, *places, fanout)
    losses = cross_entropy(narrow, *places, fanout)[0]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), wide)
    (mine,) = torch.autograd.grad((losses.double() * weights).sum(), narrow)
    assert mine.dtype == dtype
    size = max(float(theirs.abs().max()), 1.0) if theirs.numel() else 1.0
    torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=TOLERANCE[dtype] * size)
    assert not mine[theirs == 0].any(), "codes of no child get no gradient"
    return [losses, mine]


@pytest.mark.parametrize("P", [0, 1, 77])
@pytest.mark.parametrize("case", FANOUTS)
def test_losses_and_gradients(case, P):
    counts, V = FANOUTS[case]
    torch.manual_seed(0)
    check(*draw(counts, V, P), fanout=max(counts), dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_logits_that_are_not_contiguous(dtype):
    logits, *places = draw([3, 1, 40], 50, 33)
    check(logits.T.contiguous().T, *places, fanout=40, dtype=dtype)


def test_large_logits_do_not_overflow():
    logits, *places = draw([300, 2], 301, 9)
    check(1e4 * logits, *places, fanout=300, dtype=torch.float32)


def test_the_only_child_is_certain():
    losses, grad = check(*draw([1, 1], 5, 12), fanout=1, dtype=torch.float32)
    assert not losses.any() and not grad.any()


def test_one_gradient_for_all_losses():
    """The gradient of a mean is one number, expanded."""
    logits, *places = draw([4, 2], 6, 10)
    narrow, wide = logits.float().requires_grad_(), logits.float().double().requires_grad_()
    cross_entropy(narrow, *places, 4)[0].mean().backward()
    reference.trie_cross_entropy(wide, *places, 4).mean().backward()
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=0, atol=1e-6)


def test_the_operator_is_registered_completely():
    logits, *places = draw([4, 2], 6, 10)
    torch.library.opcheck(cross_entropy, (logits.float().requires_grad_(), *places, 4))
