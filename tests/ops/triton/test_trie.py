"""The softmax over children against its twin in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import reference
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


def test_the_operator_is_registered_completely():
    nodes = torch.tensor([1, 0], device=DEVICE)
    first_child, code, fanout = level([2, 3], 5)
    torch.library.opcheck(kernels.child_log_probs, (torch.randn(2, 5, device=DEVICE), first_child, code, nodes, fanout))
