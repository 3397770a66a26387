"""Attention within the rows of jagged tensors, forward and backward, without padding.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i].k[j] + bias[h, clamp(j - place[i], -R, R) + R])

Rows are not taken one by one: a program takes BLOCK_M consecutive tokens, wherever rows begin and end among them, so
that short rows fill blocks as well as long ones do. Which keys a query sees is a range, `begin[i]` to `end[i]` - 1. The
program walks over the keys from the first to the last that any of its queries sees, in blocks of BLOCK_N, with a
running maximum and sum (Milakov and Gimelshein 2018; Dao 2023, algorithm 1). It keeps lse[i] = log sum_j exp(score),
from which the backward pass computes p again (Dao 2023, algorithm 2):

    delta[i] = dout[i].out[i],   ds[i, j] = p[i, j] (dout[i].v[j] - delta[i])
    dq[i] = scale sum_j ds[i, j] k[j],   dk[j] = scale sum_i ds[i, j] q[i],   dv[j] = sum_i p[i, j] dout[i]
    dbias[h, x] = sum of ds[i, j] over all pairs at distance x

Every sum runs in a fixed order, as no two threads add to one place: equal inputs give equal bits. Scores and sums
are float32. All ranges and places count tokens from the start of the tensor, in 32 bits; addresses have 64.
"""

import triton
import triton.language as tl

from ops.triton.bias import BEYOND, LOG2E, add_by_distance, from_memory, store_pairs, to_memory

LOWEST = tl.constexpr(-1e30)  # finite, so that a difference of two is a number


@triton.jit
def _load(pointer, start, size, stride, d, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens start + 0.. of a [size, H, D] tensor at one head, the last one again beyond the end. [BLOCK, BLOCK_D]."""
    rows = tl.minimum(tl.arange(0, BLOCK), size - 1 - start)
    pointers = pointer + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + d[None, :])
    if D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(rows >= 0)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(pointer, values, start, size, stride, d, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    mask = (rows < size - start)[:, None] if D == BLOCK_D else (rows < size - start)[:, None] & (d < D)[None, :]
    pointers = pointer + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + d[None, :])
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _seen(begin, end, place, m, n_queries, PLACES: tl.constexpr):
    """The keys first to last - 1 that each of the queries m sees, none beyond the end, and their places if needed."""
    first = tl.load(begin + m, mask=m < n_queries, other=BEYOND)
    last = tl.load(end + m, mask=m < n_queries, other=0)
    if PLACES:
        return first, last, tl.load(place + m, mask=m < n_queries, other=0)
    else:
        return first, last, first


@triton.jit
def _scores(
    a, b, visible, distance, bias, step, radius, reach, scale,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2 of queries a and keys b, or of keys a and queries b, -inf where a key is not visible.
    [A, B] float32, as `visible` and `distance`, from a query's place to a key.

    step: how many blocks to the right of the diagonal this one lies. If TILED, `bias` holds the biases of such a
    block, in the order of `bias.place_of`, for the steps -reach - 1 to reach + 1; otherwise it holds them by distance.
    """
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * (scale * LOG2E)
    if HAS_BIAS:
        if TILED:
            A: tl.constexpr = a.shape[0]
            B: tl.constexpr = b.shape[0]
            tile = tl.minimum(tl.maximum(step + reach + 1, 0), 2 * reach + 2)
            scores += from_memory(tl.load(bias + tile * (A * B) + tl.arange(0, A * B)), A, B)
        else:
            place = tl.minimum(tl.maximum(distance, -radius), radius) + radius
            scores += tl.load(bias + place, mask=visible, other=0.0).to(tl.float32) * LOG2E
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def forward_kernel(
    query, key, value, bias, begin, end, place, out, lse,
    q_stride, k_stride, v_stride, out_stride,
    n_heads, n_queries, n_keys, bias_stride, radius, reach, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, m_start = tl.program_id(0) % n_heads, tl.program_id(0) // n_heads * BLOCK_M
    query, key, value, out = query + head * D, key + head * D, value + head * D, out + head * D
    if HAS_BIAS:
        bias += head * bias_stride
    d, m = tl.arange(0, BLOCK_D), m_start + tl.arange(0, BLOCK_M)
    first, last, at = _seen(begin, end, place, m, n_queries, HAS_BIAS and not TILED)
    q = _load(query, m_start, n_queries, q_stride, d, D, BLOCK_M, BLOCK_D)
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low, high = tl.min(first), tl.max(last)
    low = low // BLOCK_N * BLOCK_N if TILED else low
    for n_start in range(low, high, BLOCK_N):
        n = n_start + tl.arange(0, BLOCK_N)
        k = _load(key, n_start, n_keys, k_stride, d, D, BLOCK_N, BLOCK_D)
        v = _load(value, n_start, n_keys, v_stride, d, D, BLOCK_N, BLOCK_D)
        visible = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        scores = _scores(
            q, k, visible, n[None, :] - at[:, None], bias,
            (n_start - m_start) // BLOCK_N, radius, reach, scale, HAS_BIAS, TILED, PRECISION,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, 1)
        weighted = weighted * shrink[:, None]
        weighted = tl.dot(p.to(v.dtype), v, weighted, input_precision=PRECISION)
        largest = new_largest
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    _store(out, weighted / safe[:, None], m_start, n_queries, out_stride, d, D, BLOCK_M, BLOCK_D)
    normalizer = tl.where(seen, largest + tl.log2(safe), 0.0)
    tl.store(lse + tl.cast(head, tl.int64) * n_queries + m, normalizer, mask=m < n_queries)


@triton.jit
def backward_query_kernel(
    query, key, value, bias, begin, end, place, out, lse, grad_out, delta, grad_query, grad_bias,
    q_stride, k_stride, v_stride, out_stride, grad_out_stride, grad_query_stride,
    n_heads, n_queries, n_keys, bias_stride, radius, reach, scale, part_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr,
    BIAS_GRAD: tl.constexpr, RIGHT: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """delta, dq, and this program's part of dbias. A program takes every so-many-th block of queries at one head.
    RIGHT: there are visible keys to the right of the diagonal. FAR: see `Bias`."""
    head = tl.program_id(0) % n_heads
    query, key, value, out = query + head * D, key + head * D, value + head * D, out + head * D
    grad_out, grad_query = grad_out + head * D, grad_query + head * D
    lse += tl.cast(head, tl.int64) * n_queries
    delta += tl.cast(head, tl.int64) * n_queries
    if HAS_BIAS:
        bias += head * bias_stride
    d = tl.arange(0, BLOCK_D)
    # Sums over the blocks on the diagonal and, where blocks are small, beside it, pair by pair.
    on_diagonal = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    left, right = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    before, after = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)  # sums beyond reach
    grad_bias += tl.program_id(0).to(tl.int64) * part_size
    jump = tl.num_programs(0) // n_heads * BLOCK_M
    for m_start in range(tl.program_id(0) // n_heads * BLOCK_M, n_queries, jump):
        m = m_start + tl.arange(0, BLOCK_M)
        first, last, at = _seen(begin, end, place, m, n_queries, HAS_BIAS and not TILED)
        q = _load(query, m_start, n_queries, q_stride, d, D, BLOCK_M, BLOCK_D)
        do = _load(grad_out, m_start, n_queries, grad_out_stride, d, D, BLOCK_M, BLOCK_D)
        o = _load(out, m_start, n_queries, out_stride, d, D, BLOCK_M, BLOCK_D)
        inner = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + m, inner, mask=m < n_queries)
        normalizer = tl.load(lse + m, mask=m < n_queries, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        low, high = tl.min(first), tl.max(last)
        low = low // BLOCK_N * BLOCK_N if TILED else low
        for n_start in range(low, high, BLOCK_N):
            n = n_start + tl.arange(0, BLOCK_N)
            k = _load(key, n_start, n_keys, k_stride, d, D, BLOCK_N, BLOCK_D)
            v = _load(value, n_start, n_keys, v_stride, d, D, BLOCK_N, BLOCK_D)
            step = (n_start - m_start) // BLOCK_N
            visible = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
            scores = _scores(
                q, k, visible, n[None, :] - at[:, None], bias,
                step, radius, reach, scale, HAS_BIAS, TILED, PRECISION,
            )  # fmt: skip
            p = tl.exp2(scores - normalizer[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if BIAS_GRAD:
                if not TILED:
                    add_by_distance(grad_bias, ds, n_start, first, last, at, radius, BLOCK_M, BLOCK_N, FAR)
                elif step == 0:
                    on_diagonal += ds
                elif BLOCK_M == 16 and step == -1 and reach > 0:
                    left += ds
                elif BLOCK_M == 16 and RIGHT and step == 1 and reach > 0:
                    right += ds
                elif FAR and step < -reach:
                    before += tl.sum(ds, 1)
                elif FAR and step > reach:
                    after += tl.sum(ds, 1)
                else:  # no other program and no other thread adds there: the order is that of the loop
                    block = grad_bias + (step + reach) * (BLOCK_M * BLOCK_N) + tl.arange(0, BLOCK_M * BLOCK_N)
                    tl.atomic_add(block, to_memory(ds, BLOCK_M, BLOCK_N), sem="relaxed")
        _store(grad_query, dq * scale, m_start, n_queries, grad_query_stride, d, D, BLOCK_M, BLOCK_D)
    if BIAS_GRAD and TILED:
        store_pairs(grad_bias, on_diagonal, left, right, before, after, reach, BLOCK_M, BLOCK_N)


@triton.jit
def backward_key_kernel(
    query, key, value, bias, begin, end, place, q_begin, q_end, lse, grad_out, delta, grad_key, grad_value,
    q_stride, k_stride, v_stride, grad_out_stride, grad_key_stride, grad_value_stride,
    n_heads, n_queries, n_keys, bias_stride, radius, reach, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """dk and dv. LIMITED: the ranges of `q_begin` and `q_end` hold queries that don't see the key."""
    head, n_start = tl.program_id(0) % n_heads, tl.program_id(0) // n_heads * BLOCK_N
    query, key, value, grad_out = query + head * D, key + head * D, value + head * D, grad_out + head * D
    grad_key, grad_value = grad_key + head * D, grad_value + head * D
    lse += tl.cast(head, tl.int64) * n_queries
    delta += tl.cast(head, tl.int64) * n_queries
    if HAS_BIAS:
        bias += head * bias_stride
    d, n = tl.arange(0, BLOCK_D), n_start + tl.arange(0, BLOCK_N)
    seen_from = tl.load(q_begin + n, mask=n < n_keys, other=BEYOND)
    seen_to = tl.load(q_end + n, mask=n < n_keys, other=0)
    low, high = tl.min(seen_from), tl.max(seen_to)
    low = low // BLOCK_M * BLOCK_M if TILED else low
    k = _load(key, n_start, n_keys, k_stride, d, D, BLOCK_N, BLOCK_D)
    v = _load(value, n_start, n_keys, v_stride, d, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m_start in range(low, high, BLOCK_M):
        m = m_start + tl.arange(0, BLOCK_M)
        first, last, at = _seen(begin, end, place, m, n_queries, HAS_BIAS and not TILED)
        q = _load(query, m_start, n_queries, q_stride, d, D, BLOCK_M, BLOCK_D)
        do = _load(grad_out, m_start, n_queries, grad_out_stride, d, D, BLOCK_M, BLOCK_D)
        normalizer = tl.load(lse + m, mask=m < n_queries, other=0.0)
        inner = tl.load(delta + m, mask=m < n_queries, other=0.0)
        if LIMITED:
            visible = (n[:, None] >= first[None, :]) & (n[:, None] < last[None, :])
        else:
            visible = (m[None, :] >= seen_from[:, None]) & (m[None, :] < seen_to[:, None])
        scores = _scores(
            k, q, visible, n[:, None] - at[None, :], bias,
            (n_start - m_start) // BLOCK_N, radius, reach, scale, HAS_BIAS, TILED, PRECISION,
        )  # fmt: skip
        p = tl.exp2(scores - normalizer[None, :])  # [BLOCK_N, BLOCK_M], as the products below need it
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - inner[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(grad_key, dk * scale, n_start, n_keys, grad_key_stride, d, D, BLOCK_N, BLOCK_D)
    _store(grad_value, dv, n_start, n_keys, grad_value_stride, d, D, BLOCK_N, BLOCK_D)
