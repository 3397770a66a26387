"""Attention against torch's own module, position buckets against those of transformers' T5."""

import pytest
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from modules.transformer.attention import CrossAttention, RelativePositionBias, SelfAttention, products
from ops.jagged import JaggedTensor
from tests.ops.rows import jagged


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (32, 256), (16, 64), (8, 20)])
def test_buckets_are_those_of_t5(n_buckets, max_distance, bidirectional):
    bias = RelativePositionBias(3, bidirectional, n_buckets, max_distance)
    nn.init.normal_(bias.table.weight)
    distance = torch.arange(-max_distance, max_distance + 1)
    bucket = T5Attention._relative_position_bucket(distance, bidirectional, n_buckets, max_distance)
    assert torch.equal(bias(), bias.table.weight[bucket].T)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_beyond_the_largest_distance_t5_uses_the_last_bucket_too(bidirectional):
    """So clamping the distance, as jagged attention does, changes nothing."""
    far = torch.tensor([-100_000, -129, 129, 100_000])
    expected = T5Attention._relative_position_bucket(far, bidirectional, 32, 128)
    assert expected.tolist() == RelativePositionBias(1, bidirectional).bucket[[0, 0, -1, -1]].tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_torch_row_by_row(causal):
    torch.manual_seed(0)
    heads, dim, lengths = 3, 12, [4, 1, 6]
    own, cross = (kind(dim, heads, dim // heads).double() for kind in (SelfAttention, CrossAttention))
    oracle = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(own.query_key_value.weight)
        oracle.out_proj.weight.copy_(own.out.weight)
        cross.query.weight.copy_(own.query_key_value.weight[:dim])
        cross.key_value.weight.copy_(own.query_key_value.weight[dim:])
        cross.out.weight.copy_(own.out.weight)
    rows = [torch.randn(length, dim, dtype=torch.float64) for length in lengths]
    x = jagged(rows)
    limits = x.positions() + 1 if causal else torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
    for attended in (own(x, causal=causal)[0], cross(x, *cross.memories(x, [cross]), None, limits)):
        for row, out in zip(rows, attended.split(lengths), strict=True):
            mask = torch.ones(len(row), len(row), dtype=torch.bool).triu(1) if causal else None
            expected, _ = oracle(row[None], row[None], row[None], attn_mask=mask)
            torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-10)


def test_a_token_sees_what_came_before_it():
    attention = SelfAttention(4, n_heads=3, head_dim=5).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    whole, seen = attention(JaggedTensor.uniform(x), causal=True)
    _, cache = attention(JaggedTensor.uniform(x[:, :2]), causal=True)
    last, seen_last = attention(JaggedTensor.uniform(x[:, 2:]), cache=(cache, torch.tensor([[0, 1], [2, 3]])))
    torch.testing.assert_close(torch.cat([cache.unflatten(0, (2, 2)), seen_last[:, None]], 1).flatten(0, 1), seen)
    torch.testing.assert_close(last, whole.view(2, 3, 4)[:, 2])


@pytest.mark.parametrize("count", [1, 3])
def test_products_have_the_gradients_of_single_ones(count):
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4 + n, 5, dtype=torch.float64, requires_grad=True) for n in range(count)]
    together, apart = products(x, weights), [torch.nn.functional.linear(x, weight) for weight in weights]
    by = [torch.randn_like(out) for out in apart]
    grads = [torch.autograd.grad(outs, [x, *weights], by) for outs in (together, apart)]
    for mine, theirs in zip([*together, *grads[0]], [*apart, *grads[1]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    half = [out.dtype for out in products(x.float(), [weight.float() for weight in weights])]
    with torch.autocast("cpu", torch.bfloat16):
        cast = products(x.float(), [weight.float() for weight in weights])
    assert set(half) == {torch.float32} and {out.dtype for out in cast} == {torch.bfloat16}
    assert torch.autograd.grad(sum(out.float().sum() for out in cast), x)[0].dtype == torch.float64


def test_heads_may_be_wider_than_the_model():
    own, cross = (kind(4, n_heads=3, head_dim=5) for kind in (SelfAttention, CrossAttention))
    x = jagged([torch.randn(2, 4), torch.randn(3, 4)])
    (memory,) = cross.memories(x, [cross])
    assert memory.values.shape == (5, 2, 3, 5)
    assert own(x)[0].shape == cross(x, memory, None, torch.full((5,), 2)).shape == (5, 4)
