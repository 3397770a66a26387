"""Jagged attention against torch's own, one row and one query at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.attention import jagged_attention
from ops.jagged import JaggedTensor
from tests.ops.rows import random_rows, split

HEADS, DIM = 2, 3


def attention_by_row(query, key, value, bias, key_limits, scale) -> Tensor:
    """torch's own attention, one row and one query at a time, over the keys that the query sees."""
    limits = key_limits.split(query.lengths.tolist()) if key_limits is not None else [None] * query.batch_size
    outputs = []
    values = value.split(key.lengths.tolist())
    for q, k, v, limit in zip(split(query), split(key), values, limits, strict=True):
        for i in range(len(q)):
            seen = len(k) if limit is None else min(int(limit[i]), len(k))
            if seen == 0:
                outputs.append(q[i] * 0)
                continue
            mask = None
            if bias is not None:
                radius, place = bias.shape[1] // 2, i if limit is None else seen - 1
                distances = [max(-radius, min(radius, j - place)) for j in range(seen)]
                mask = torch.stack([bias[:, radius + distance] for distance in distances], -1)[:, None]  # [H, 1, seen]
            heads = [t.transpose(0, 1) for t in (q[i : i + 1], k[:seen], v[:seen])]  # [H, ., D]
            outputs.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).squeeze(1))
    return torch.stack(outputs)


def pair(key: JaggedTensor, value: Tensor) -> JaggedTensor:
    """Keys and values side by side."""
    return key.with_values(torch.stack([key.values, value], 1))


def check_attention(query, key, bias=None, key_limits=None, scale=0.7) -> Tensor:
    """Output and gradients of q, k, v and bias agree with `attention_by_row`; returns the output."""
    value = torch.randn(key.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    leaves = [query.values, key.values, value] + ([bias] if bias is not None else [])
    for leaf in leaves:
        leaf.requires_grad_()
    attended = jagged_attention(query, pair(key, value), bias, key_limits, scale=scale)
    assert torch.equal(attended.offsets, query.offsets) and attended.max_length == query.max_length
    expected = attention_by_row(query, key, value, bias, key_limits, scale)
    torch.testing.assert_close(attended.values, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    mine = torch.autograd.grad((attended.values * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    for grad, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)
    return attended.values


rows_strategy = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=5).filter(
    lambda rows: any(queries for queries, _ in rows)
)


@settings(max_examples=40)
@given(rows_strategy, st.integers(0, 2), st.sampled_from([None, 0, 2, 9]), st.booleans(), st.data())
def test_attention_is_that_of_each_row_alone(rows, slack, radius, limited, data):
    queries, keys = (list(column) for column in zip(*rows, strict=True))
    query, key = (random_rows(n, HEADS, DIM, seed=i, slack=slack) for i, n in enumerate((queries, keys)))
    bias = torch.randn(HEADS, 2 * radius + 1, dtype=torch.float64) if radius is not None else None
    limits = None
    if limited:  # some beyond the end of the row, which is as good as its end
        limits = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=sum(queries), max_size=sum(queries))))
    check_attention(query, key, bias, limits)


@pytest.mark.parametrize("limited", [True, False])
def test_attention_over_many_rows_of_all_lengths(limited):
    """Which are padded in groups."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(0, 9, (80,), generator=generator).tolist() for _ in range(2))
    query, key = (random_rows(n, HEADS, DIM, seed=i) for i, n in enumerate((queries, keys)))
    limits = torch.randint(0, 10, (sum(queries),), generator=generator) if limited else None
    check_attention(query, key, torch.randn(HEADS, 7, dtype=torch.float64), limits)


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [4, 4], [3, 0, 5], [0, 0, 2]])
def test_causal_self_attention(lengths):
    rows = random_rows(lengths, HEADS, DIM)
    bias = torch.randn(HEADS, 7, dtype=torch.float64)
    packed = torch.randn(sum(lengths), 3, HEADS, DIM, dtype=torch.float64)
    query, key, value = packed.unbind(1)
    places = rows.positions() + 1
    packed.requires_grad_()
    out = jagged_attention(rows.with_values(packed), None, bias, causal=True).values
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    expected = jagged_attention(rows.with_values(leaves[0]), pair(rows.with_values(leaves[1]), leaves[2]), bias, places)
    assert torch.equal(out, expected.values)
    grads = torch.autograd.grad(out.square().sum(), packed)[0].unbind(1)
    theirs = torch.autograd.grad(expected.values.square().sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(grads, theirs, strict=True))


@pytest.mark.parametrize(("keys", "limits"), [([0, 0], None), ([0, 3], None), ([2, 3], [0, 0, 0]), ([0, 3], [1, 0, 2])])
@pytest.mark.parametrize("size", [1.0, 1e30])
def test_queries_without_keys_get_zeros_and_finite_gradients(keys, limits, size):
    query = random_rows([2, 1], HEADS, DIM, dtype=torch.float32)
    key = random_rows(keys, HEADS, DIM, dtype=torch.float32)
    value, bias = torch.randn_like(key.values), torch.zeros(HEADS, 3)
    leaves = [leaf.requires_grad_() for leaf in (query.values, key.values, value, bias)]
    limits = torch.tensor(limits) if limits is not None else None
    out = jagged_attention(query, pair(key, value), bias, limits).values
    seen = torch.tensor([keys[0], keys[0], keys[1]])
    blind = (seen if limits is None else torch.minimum(seen, limits)) == 0
    assert bool(blind.any()) and not out[blind].any() and bool(out[~blind].any(-1).all())
    grads = torch.autograd.grad((out * size).sum(), leaves)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][blind].any()


def test_attention_gradients_are_those_of_finite_differences():
    queries, keys = random_rows([2, 0, 1], HEADS, DIM), random_rows([3, 1, 0], HEADS, DIM, seed=1)
    value, bias = torch.randn_like(keys.values), torch.randn(HEADS, 3, dtype=torch.float64)
    limits = torch.tensor([1, 3, 2])

    def attend(q, k, v, b):
        return jagged_attention(queries.with_values(q), pair(keys.with_values(k), v), b, limits, scale=0.5).values

    leaves = [leaf.requires_grad_() for leaf in (queries.values, keys.values, value, bias)]
    assert torch.autograd.gradcheck(attend, leaves)


def test_rows_do_not_see_each_other():
    query, key = random_rows([3, 2], HEADS, DIM), random_rows([2, 4], HEADS, DIM, seed=1)
    value = torch.randn_like(key.values)
    before = jagged_attention(query, pair(key, value)).values
    poisoned = key.with_values(torch.cat([key.values[:2], torch.full_like(key.values[2:], float("nan"))]))
    after = jagged_attention(query, pair(poisoned, value)).values
    assert torch.equal(after[:3], before[:3]) and bool(after[3:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loud", [1, 6])
def test_scores_and_softmax_of_half_precision_accumulate_in_float32(dtype, loud):
    """The result is off by the rounding of the weights and of the output only, also where scores reach +-100."""
    query, key = (random_rows([40, 3], HEADS, 64, seed=i, dtype=torch.float32) for i in range(2))
    query, key = (rows.with_values((rows.values * loud).to(dtype)) for rows in (query, key))
    value = torch.randn(key.values.shape).to(dtype)
    out = jagged_attention(query, pair(key, value), scale=1 / 8).values
    wide = [rows.with_values(rows.values.double()) for rows in (query, key)]
    exact = attention_by_row(*wide, value.double(), None, None, 1 / 8)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3 * torch.finfo(dtype).eps)


def test_scores_may_exceed_the_largest_float16():
    q = torch.full((1, 1, 1, 64), 40.0, dtype=torch.float16)
    k = torch.cat([q, q + 1], 1)  # scores of 102400 and 104960 before they are scaled
    v = torch.tensor([0.0, 1.0], dtype=torch.float16)[:, None, None].expand(2, 1, 64)
    out = jagged_attention(JaggedTensor.uniform(q), pair(JaggedTensor.uniform(k), v), scale=1e-3).values
    assert float(out[0, 0, 0]) == pytest.approx(1 / (1 + math.exp(-2.56)), abs=1e-3)
