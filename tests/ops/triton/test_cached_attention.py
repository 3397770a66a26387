"""Attention to shared earlier tokens against its twin in float64, and the twin against torch's attention."""

import pytest
import torch
import torch.nn.functional as F

from ops.cached_attention import reference_cached_attention
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

kernels = pytest.importorskip("ops.triton.cached_attention")


def draw(sequences: int, n_cached: int, stored: int, heads: int, width: int) -> tuple[torch.Tensor, ...]:
    packed = torch.randn(sequences, 3, heads, width, dtype=torch.float64, device=DEVICE)
    cache = torch.randn(stored, 2, heads, width, dtype=torch.float64, device=DEVICE)
    return packed, cache, torch.randint(0, stored, (sequences, n_cached), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (37, 3, 50, 2, 24), (70, 5, 9, 3, 64), (0, 2, 4, 2, 16)])
def test_kernel_is_its_twin(shape, dtype):
    packed, cache, places = draw(*shape)
    packed, cache = packed.to(dtype), cache.to(dtype)
    expected = reference_cached_attention(packed.double(), cache.double(), places, 0.3)
    actual = kernels.cached_attention(packed, cache, places, 0.3)
    assert actual.dtype == dtype and actual.shape == (shape[0], *shape[3:])
    size = max(1.0, float(expected.abs().max())) if len(expected) else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[dtype] * size)


def test_the_cache_may_be_a_view():
    packed, cache, places = draw(8, 2, 8, 2, 16)
    packed, cache = packed.float(), cache.float()
    other = torch.cat([cache[:, :1], cache], 1)  # as queries, keys and values of earlier tokens lie
    actual = kernels.cached_attention(packed, other[:, 1:], places, 0.3)
    torch.testing.assert_close(actual, kernels.cached_attention(packed, cache, places, 0.3))


def test_the_cache_may_be_empty():
    packed, cache, _ = (tensor.float() for tensor in draw(3, 1, 1, 2, 16))
    out = kernels.cached_attention(packed, cache[:0], torch.zeros(3, 0, dtype=torch.int64, device=DEVICE), 0.3)
    torch.testing.assert_close(out, packed[:, 2])


def test_twin_is_scaled_dot_product_attention():
    packed, cache, places = draw(11, 3, 20, 2, 8)
    seen = torch.cat([cache[places], packed[:, None, 1:]], 1)  # [S, P + 1, 2, H, D]
    key, value = (tensor.transpose(1, 2) for tensor in seen.unbind(2))
    expected = F.scaled_dot_product_attention(packed[:, 0, :, None], key, value, scale=0.3)[:, :, 0]
    torch.testing.assert_close(reference_cached_attention(packed, cache, places, 0.3), expected)


def test_the_operator_is_registered_completely():
    packed, cache, places = draw(5, 2, 7, 2, 16)
    torch.library.opcheck(kernels.cached_attention, (packed.float(), cache.float(), places, 0.3))
