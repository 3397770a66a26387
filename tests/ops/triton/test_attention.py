"""The attention kernels against their twin in float64: on the GPU, or on the CPU through the interpreter."""

import pytest
import torch

from ops.attention import reference_attention
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

attention = pytest.importorskip("ops.triton.attention").attention

ROWS = {
    "one token": ([1], [1]),
    "one row": ([7], [7]),
    "short full rows": ([3] * 12, [3] * 12),
    "odd and empty rows": ([3, 0, 33, 1, 0, 17], [5, 2, 33, 0, 0, 40]),
    "no queries": ([0, 0], [3, 1]),
    "no keys": ([3, 2], [0, 0]),
    "several blocks": ([70, 4, 33], [70, 4, 33]),
    "many queries": ([1, 100], [3, 9]),
    "long keys": ([2, 40], [5, 230]),
    "long rows": ([230, 5], [230, 5]),
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def both(queries, keys, mask, radius, dtype, heads=2, dim=16, scale=0.3):
    """Output and gradients of q, k, v and bias: of the twin in float64, and of the kernels."""
    offsets = [torch.tensor([0, *lengths], device=DEVICE).cumsum(0) for lengths in (queries, keys)]
    own = queries == keys and mask != "limits"  # self-attention
    tensors = [noise(sum(queries), 3, heads, dim)]
    if not own:
        tensors = [noise(sum(queries), heads, dim), noise(sum(keys), 2, heads, dim)]
    bias = noise(heads, 2 * radius + 1) if radius is not None else None
    limits = None
    if mask == "limits":  # some beyond the end of the row, which is as good as its end
        limits = torch.randint(0, max(keys) + 3, (sum(queries),), device=DEVICE)
    weights = noise(sum(queries), heads, dim)
    results = []
    for function in (reference_attention, attention):
        wide = function is not attention
        leaves = [t.to(dtype).to(torch.float64 if wide else dtype).requires_grad_() for t in tensors]
        packed = leaves if not own else [*leaves, None]
        b = bias.float().to(torch.float64 if wide else torch.float32).requires_grad_() if radius is not None else None
        out = function(*packed, *offsets, max(queries), max(keys), b, limits, mask == "causal", scale)
        out = out if wide else out[0]
        assert out.dtype == leaves[0].dtype
        wanted = leaves + ([b] if radius is not None else [])
        results.append([out, *torch.autograd.grad((out.double() * weights).sum(), wanted)])
    return results


def check(*args, **kwargs) -> None:
    expected, actual = both(*args, **kwargs)
    tolerance = TOLERANCE[kwargs["dtype"]]
    for wide, narrow in zip(expected, actual, strict=True):
        size = float(wide.detach().abs().max()) if wide.numel() else 1.0
        torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=tolerance * max(size, 1.0))


@pytest.mark.parametrize("mask", ["all", "causal", "limits"])
@pytest.mark.parametrize("radius", [None, 2, 40])
@pytest.mark.parametrize("rows", ROWS)
def test_output_and_gradients(rows, radius, mask):
    check(*ROWS[rows], mask, radius, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 24, 64, 128])
def test_dtypes_and_head_dimensions(dtype, dim):
    check([3, 0, 35], [3, 0, 35], "causal", 5, dtype=dtype, heads=3, dim=dim, scale=dim**-0.5)


def test_long_rows_with_wide_heads():
    check([200, 5], [200, 5], "causal", 5, dtype=torch.float32, heads=1, dim=128, scale=0.1)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mask", ["all", "causal", "limits"])
@pytest.mark.parametrize("dim, radius", [(64, 5), (64, 100), (64, None), (128, 40)])
def test_long_rows_in_half_precision(dim, radius, mask, dtype):
    """The largest tiles; blocks within the radius, beyond it, and both."""
    check([200, 0, 70], [200, 0, 70], mask, radius, dtype=dtype, heads=2, dim=dim, scale=dim**-0.5)


def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient():
    expected, actual = both([2, 3], [0, 4], "limits", 2, torch.float32)
    blind = expected[0].abs().sum((1, 2)) == 0
    assert bool(blind[:2].all())
    for narrow in actual[:2]:
        assert not narrow[blind].any() and bool(narrow.isfinite().all())


@pytest.mark.parametrize("keys", [[20, 1], [20, 3]])
def test_one_bias_for_all_distances_has_no_gradient(keys):
    """A softmax does not change when all its scores move."""
    actual = both([20, 1], keys, "all", 0, torch.float32)[1]
    assert float(actual[-1].abs().max()) < 1e-4


@pytest.mark.parametrize("radius", [5, 100])
@pytest.mark.parametrize("mask", ["all", "causal", "limits"])
def test_equal_inputs_give_equal_bits(mask, radius):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(both([70, 4, 33], [70, 4, 33], mask, radius, torch.float32)[1])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_only_the_output_has_a_gradient():
    offsets, packed = torch.tensor([0, 3], device=DEVICE), torch.randn(3, 3, 2, 16, device=DEVICE, requires_grad=True)
    out, lse, ranges = attention(packed, None, offsets, offsets, 3, 3)
    assert out.requires_grad and not lse.requires_grad and not ranges.requires_grad


def test_no_graph_break_under_compile():
    offsets = torch.tensor([0, 3, 5], device=DEVICE)
    bias = torch.randn(2, 5, device=DEVICE)
    packed = torch.randn(5, 3, 2, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(attention, (packed, None, offsets, offsets, 3, 3, bias, None, True, 0.25))
    q, memory = packed.detach()[:, 0].requires_grad_(), packed.detach()[:, 1:].contiguous()
    torch.library.opcheck(attention, (q, memory, offsets, offsets, 3, 3, bias, None, False, 0.25))


def test_limits_may_be_negative_or_views():
    offsets = torch.tensor([0, 3, 5], device=DEVICE)
    q, memory = torch.randn(5, 2, 16, device=DEVICE), torch.randn(5, 2, 2, 16, device=DEVICE)
    limits = torch.tensor([[1, 9], [-1, 9], [3, 9], [0, 9], [2, 9]], device=DEVICE)[:, 0]
    arguments = (q, memory, offsets, offsets, 3, 3, None)
    out = attention(*arguments, limits)[0]
    torch.testing.assert_close(out, reference_attention(*arguments, limits), rtol=0, atol=1e-5)
    assert not out[[1, 3]].any() and bool(out[[0, 2, 4]].any(-1).all())
