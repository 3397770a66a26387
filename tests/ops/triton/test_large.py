"""Tensors of more than 2^31 elements, whose addresses do not fit 32 bits, on a GPU with the memory for them."""

import pytest
import torch

from ops import tree
from ops.add_norm import reference_add_norm
from ops.attention import reference_attention
from ops.sums import take_rows

attention = pytest.importorskip("ops.triton.attention").attention
kernels = pytest.importorskip("ops.triton.add_norm")

LARGE = 2**31 + 2**20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30,
        reason="needs a CUDA device with 70 GiB",
    ),
]


@pytest.fixture(autouse=True)
def release():
    yield
    torch.cuda.empty_cache()


def noise(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


def test_attention_and_its_gradients():
    heads, dim, length = 8, 128, 100
    count = LARGE // (3 * heads * dim) // length + 1
    packed, weights = noise(count * length, 3, heads, dim), noise(length, heads, dim)
    offsets = torch.arange(count + 1, device="cuda") * length
    bias = torch.randn(heads, 2 * 128 + 1, device="cuda")
    packed.requires_grad_()
    out = attention(packed, None, offsets, offsets, length, length, bias, None, True, dim**-0.5)[0]
    assert packed.numel() > 2**31
    grad = torch.autograd.grad((out[-length:].float() * weights).sum(), packed)[0]
    last = packed.detach()[-length:].double().requires_grad_()
    expected = reference_attention(
        last, None, offsets[:2], offsets[:2], length, length, bias.double(), None, True, dim**-0.5
    )
    wanted = torch.autograd.grad((expected * weights).sum(), last)[0]
    torch.testing.assert_close(out[-length:].double(), expected, rtol=0, atol=2e-2)
    torch.testing.assert_close(grad[-length:].double(), wanted, rtol=0, atol=2e-2 * float(wanted.abs().max()))
    assert not grad[:-length].any()


def test_sums_normalizations_and_dropout():
    width = 512
    x, branch = noise(LARGE // width + 1, width), noise(LARGE // width + 1, width)
    weight, seed = torch.rand(width, device="cuda"), torch.tensor([77], device="cuda")
    hidden, normed = kernels.add_norm(x, branch, weight, None, 0.0, False, 1e-6, torch.bfloat16)
    expected = reference_add_norm(x[-3:].float(), branch[-3:].float(), weight, 0.0, False)
    for actual, wide in zip((hidden, normed), expected, strict=True):
        torch.testing.assert_close(actual[-3:].float(), wide, rtol=0, atol=5e-2)
    out = kernels.relu_dropout(x, seed, 0.5)
    kept = out[-1000:] > 0
    assert torch.equal(out[-1000:][kept], 2 * x[-1000:][kept])
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)


def test_rows_that_are_taken_and_their_gradient():
    width, table = 512, noise(1000, 512).requires_grad_()
    index = torch.randint(0, 999, (LARGE // width + 1,), device="cuda")
    out = take_rows(table, index)
    assert torch.equal(out[-1000:], table[index[-1000:]])
    weights = noise(1000, width)
    grad = torch.autograd.grad((out[-1000:].float() * weights).sum(), table)[0]
    expected = torch.zeros(1000, width, dtype=torch.float64, device="cuda").index_add(
        0, index[-1000:], weights.double()
    )
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-2)


def children() -> tuple[torch.Tensor, int]:
    """first_child of 20 nodes with 1 to 256 children, and the most."""
    counts = torch.randint(1, 257, (20,), device="cuda")
    counts[0] = 256
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(), 256


def test_losses_of_children_and_their_gradient():
    (first_child, fanout), width = children(), 512
    query, vectors = noise(LARGE // width + 1, width).mul_(0.1).requires_grad_(), noise(int(first_child[-1]), width)
    parents = torch.randint(0, 20, (len(query),), device="cuda")
    arguments = first_child, parents, first_child[parents], fanout
    losses = tree.tree_cross_entropy(query, vectors, *arguments)
    grad = torch.autograd.grad(losses[-3:].sum(), query)[0]
    last = query.detach()[-3:].cpu().double().requires_grad_()
    expected = tree.tree_cross_entropy(
        last, vectors.cpu().double(), first_child.cpu(), parents[-3:].cpu(), arguments[2][-3:].cpu(), fanout
    )
    wanted = torch.autograd.grad(expected.sum(), last)[0]
    torch.testing.assert_close(losses[-3:].cpu().double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad[-3:].cpu().double(), wanted, rtol=0, atol=2e-2 * float(wanted.abs().max()))
    assert not grad[:-3].any()


def test_the_best_children():
    (first_child, fanout), beams = children(), 32
    users = LARGE // (beams * fanout) + 1
    query, vectors = torch.randn(users, 1, 16, device="cuda"), torch.randn(int(first_child[-1]), 16, device="cuda")
    scores, nodes = torch.randn(users, beams, device="cuda"), torch.randint(0, 20, (users, beams), device="cuda").int()
    best, parents, chosen = tree.best_children(query, scores, vectors, first_child, nodes, fanout, 10)
    last = (query[-3:].cpu(), scores[-3:].cpu(), vectors.cpu(), first_child.cpu(), nodes[-3:].cpu())
    expected, _, _ = tree.best_children(*last, fanout, 10)
    torch.testing.assert_close(best[-3:].cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(nodes.gather(1, parents)[-3:], torch.searchsorted(first_child, chosen[-3:], right=True) - 1)
