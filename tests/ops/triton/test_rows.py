"""The copying kernels against their twins: on the GPU, or on the CPU through the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import reference
from tests.ops.triton.device import DEVICE

rows = pytest.importorskip("ops.triton.rows")

lengths_strategy = st.lists(st.integers(0, 12), min_size=1, max_size=5)
shapes = st.sampled_from([(), (1,), (5,), (3, 4), (600,)])


def make_offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def agree(kernel, twin, *leaves: torch.Tensor) -> None:
    """Bit for bit: values and gradients are moved, not computed."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mine, theirs = kernel(*leaves), twin(*leaves)
    assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    weights = torch.randn_like(theirs)
    grads = [torch.autograd.grad((out * weights).sum(), leaves) for out in (mine, theirs)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@settings(deadline=None, max_examples=20)
@given(lengths_strategy, shapes, st.integers(0, 9))
def test_padding_and_back(lengths, shape, slack):
    offsets, longest, total = make_offsets(lengths), max(lengths) + slack, sum(lengths)
    values, padded = (
        torch.randn(total, *shape, device=DEVICE),
        torch.randn(len(lengths), longest, *shape, device=DEVICE),
    )
    agree(
        lambda v: rows.jagged_to_padded(v, offsets, longest, -7.0),
        lambda v: reference.jagged_to_padded(v, offsets, longest, -7.0),
        values,
    )
    agree(
        lambda p: rows.padded_to_jagged(p, offsets, total),
        lambda p: reference.padded_to_jagged(p, offsets, total),
        padded,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.int32, torch.bool])
def test_any_dtype_moves(dtype):
    offsets = make_offsets([3, 0, 2])
    values = torch.randn(5, 7, device=DEVICE).mul(9).to(dtype)
    assert torch.equal(rows.jagged_to_padded(values, offsets, 4), reference.jagged_to_padded(values, offsets, 4))


def test_views_that_are_not_contiguous():
    offsets, values = make_offsets([3, 2]), torch.randn(7, 5, device=DEVICE).T
    assert torch.equal(rows.jagged_to_padded(values, offsets, 3), reference.jagged_to_padded(values, offsets, 3))


def test_registered_for_compile():
    offsets = make_offsets([3, 0, 2])
    values = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    padded = torch.randn(3, 4, 2, device=DEVICE, requires_grad=True)
    torch.library.opcheck(rows.jagged_to_padded, (values, offsets, 4, 1.0))
    torch.library.opcheck(rows.padded_to_jagged, (padded, offsets, 5))
