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

ALL, CAUSAL, LIMITS = 0, 1, 2  # which keys a query sees
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # finite, so that a difference of two is a number
BEYOND = tl.constexpr(2**31 - 1)  # no token


@triton.jit
def key_ranges_kernel(
    q_offsets, k_offsets, limits, begin, end, place, n_rows,
    MASK: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """begin, end, place [Tq] int32 of every query, counted in keys."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    i = (tl.program_id(1) * LENGTH + tl.arange(0, LENGTH))[None, :]
    q_start = tl.load(q_offsets + row, mask=row < n_rows, other=0)
    q_stop = tl.load(q_offsets + row + 1, mask=row < n_rows, other=0)
    k_start = tl.load(k_offsets + row, mask=row < n_rows, other=0).to(tl.int32)
    k_stop = tl.load(k_offsets + row + 1, mask=row < n_rows, other=0).to(tl.int32)
    m, inside = q_start + i, i < q_stop - q_start
    if MASK == 2:
        limit = tl.load(limits + m, mask=inside, other=0)
        last = k_start + tl.minimum(tl.maximum(limit, 0), k_stop - k_start).to(tl.int32)
        at = last - 1
    else:
        at = k_start + i
        last = tl.minimum(at + 1, k_stop) if MASK == 1 else k_stop + i * 0
    tl.store(begin + m, k_start + i * 0, mask=inside)
    tl.store(end + m, last, mask=inside)
    tl.store(place + m, at, mask=inside)


@triton.jit
def query_ranges_kernel(
    q_offsets, k_offsets, begin, end, n_rows, MASK: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr
):  # fmt: skip
    """begin, end [Tk] int32: no query outside begin[j] to end[j] - 1 sees key j."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1) * LENGTH + tl.arange(0, LENGTH))[None, :]
    k_start = tl.load(k_offsets + row, mask=row < n_rows, other=0)
    k_stop = tl.load(k_offsets + row + 1, mask=row < n_rows, other=0)
    q_start = tl.load(q_offsets + row, mask=row < n_rows, other=0).to(tl.int32)
    q_stop = tl.load(q_offsets + row + 1, mask=row < n_rows, other=0).to(tl.int32)
    n, inside = k_start + j, j < k_stop - k_start
    first = tl.minimum(q_start + j, q_stop) if MASK == 1 else q_start + j * 0
    tl.store(begin + n, first, mask=inside)
    tl.store(end + n, q_stop + j * 0, mask=inside)


@triton.jit
def _pair(M: tl.constexpr, N: tl.constexpr):
    """Place of each pair of a block in memory. [M, N]"""
    return tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]


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
def _scores(
    q, k, n, first, last, place, bias, step, radius, reach, scale,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2, -inf where a key is not visible. [BLOCK_M, BLOCK_N] float32.

    step: how many blocks to the right of the diagonal this one lies. If TILED, `bias` holds the biases of such a
    block, pair by pair, for the steps -reach - 1 to reach + 1; otherwise it holds them by distance.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    visible = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
    if HAS_BIAS:
        if TILED:
            M: tl.constexpr = q.shape[0]
            N: tl.constexpr = k.shape[0]
            tile = tl.minimum(tl.maximum(step + reach + 1, 0), 2 * reach + 2)
            scores += tl.load(bias + tile * (M * N) + _pair(M, N))
        else:
            distance = tl.minimum(tl.maximum(n[None, :] - place[:, None], -radius), radius)
            scores += tl.load(bias + (distance + radius), mask=visible, other=0.0).to(tl.float32) * LOG2E
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
    first = tl.load(begin + m, mask=m < n_queries, other=BEYOND)
    last = tl.load(end + m, mask=m < n_queries, other=0)
    at = tl.load(place + m, mask=m < n_queries, other=0) if HAS_BIAS and not TILED else first
    q = _load(query, m_start, n_queries, q_stride, d, D, BLOCK_M, BLOCK_D)
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = tl.min(first)
    for n_start in range(low // BLOCK_N * BLOCK_N if TILED else low, tl.max(last), BLOCK_N):
        n = n_start + tl.arange(0, BLOCK_N)
        k = _load(key, n_start, n_keys, k_stride, d, D, BLOCK_N, BLOCK_D)
        v = _load(value, n_start, n_keys, v_stride, d, D, BLOCK_N, BLOCK_D)
        scores = _scores(
            q, k, n, first, last, at, bias, (n_start - m_start) // BLOCK_N, radius, reach, scale,
            HAS_BIAS, TILED, PRECISION,
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
def _add_by_distance(
    sums, ds, n_start, first, last, place, radius, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FAR: tl.constexpr
):
    """sums[clamp(n - place, -radius, radius) + radius] += ds, [BLOCK_M, BLOCK_N], in memory that is the program's own.

    Windows of distances are twice as wide as the block; each row of ds, moved by its place, is a row of the window.
    They start at multiples of their width, so that the same thread adds to a sum each time. Outside the keys first to
    last - 1 that a query sees, ds is 0. FAR: some distances are beyond the radius.
    """
    SPAN: tl.constexpr = 2 * BLOCK_N
    slot = tl.arange(0, SPAN)
    first, last = tl.maximum(first, n_start), tl.minimum(last, n_start + BLOCK_N)
    visible = first < last
    lowest = tl.min(tl.where(visible, first - place, BEYOND))
    highest = tl.max(tl.where(visible, last - 1 - place, -BEYOND))
    for start in range(lowest & -SPAN, highest + 1, SPAN):
        column = start + slot[None, :] + place[:, None] - n_start  # [BLOCK_M, SPAN]
        inside = (column >= 0) & (column < BLOCK_N) & visible[:, None]
        moved = tl.gather(ds, tl.minimum(tl.maximum(column, 0), BLOCK_N - 1), 1)
        total = tl.sum(tl.where(inside, moved, 0.0), 0)  # [SPAN], of the distances start + slot
        distance = start + slot
        if FAR:
            below = (distance <= -radius) | (radius == 0)
            tl.atomic_add(sums, tl.sum(tl.where(below, total, 0.0)), sem="relaxed")
            above = (distance >= radius) & (radius > 0)
            tl.atomic_add(sums + 2 * radius, tl.sum(tl.where(above, total, 0.0)), sem="relaxed")
            inner = (distance > -radius) & (distance < radius)
        else:
            inner = (distance >= -radius) & (distance <= radius)
        tl.atomic_add(sums + radius + distance, total, mask=inner, sem="relaxed")


@triton.jit
def _store_pairs(
    part, on_diagonal, left, right, before, after, reach, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A program's part of the bias gradient, beyond what it added on its way."""
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    middle = part + reach * SIZE + _pair(BLOCK_M, BLOCK_N)
    tl.store(middle, on_diagonal)
    if reach > 0:
        tl.store(middle - SIZE, left)
        tl.store(middle + SIZE, right)
    far = part + (2 * reach + 1) * SIZE + tl.arange(0, BLOCK_M)
    tl.store(far, before)
    tl.store(far + BLOCK_M, after)


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

    RIGHT: there are visible keys to the right of the diagonal. FAR: there are some farther than `reach` blocks, or
    beyond the radius where the bias is not tiled.
    """
    head = tl.program_id(0) % n_heads
    query, key, value, out = query + head * D, key + head * D, value + head * D, out + head * D
    grad_out, grad_query = grad_out + head * D, grad_query + head * D
    lse += tl.cast(head, tl.int64) * n_queries
    delta += tl.cast(head, tl.int64) * n_queries
    if HAS_BIAS:
        bias += head * bias_stride
    d = tl.arange(0, BLOCK_D)
    # Sums over the blocks on the diagonal and beside it, pair by pair.
    on_diagonal = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    left, right = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    before, after = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)  # sums beyond reach
    grad_bias += tl.program_id(0).to(tl.int64) * part_size
    jump = tl.num_programs(0) // n_heads * BLOCK_M
    for m_start in range(tl.program_id(0) // n_heads * BLOCK_M, n_queries, jump):
        m = m_start + tl.arange(0, BLOCK_M)
        first = tl.load(begin + m, mask=m < n_queries, other=BEYOND)
        last = tl.load(end + m, mask=m < n_queries, other=0)
        at = tl.load(place + m, mask=m < n_queries, other=0) if HAS_BIAS and not TILED else first
        q = _load(query, m_start, n_queries, q_stride, d, D, BLOCK_M, BLOCK_D)
        do = _load(grad_out, m_start, n_queries, grad_out_stride, d, D, BLOCK_M, BLOCK_D)
        o = _load(out, m_start, n_queries, out_stride, d, D, BLOCK_M, BLOCK_D)
        inner = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + m, inner, mask=m < n_queries)
        normalizer = tl.load(lse + m, mask=m < n_queries, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        low = tl.min(first)
        for n_start in range(low // BLOCK_N * BLOCK_N if TILED else low, tl.max(last), BLOCK_N):
            n = n_start + tl.arange(0, BLOCK_N)
            k = _load(key, n_start, n_keys, k_stride, d, D, BLOCK_N, BLOCK_D)
            v = _load(value, n_start, n_keys, v_stride, d, D, BLOCK_N, BLOCK_D)
            step = (n_start - m_start) // BLOCK_N
            scores = _scores(
                q, k, n, first, last, at, bias, step, radius, reach, scale, HAS_BIAS, TILED, PRECISION
            )  # fmt: skip
            p = tl.exp2(scores - normalizer[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if BIAS_GRAD:
                if TILED:
                    if step == 0:
                        on_diagonal += ds
                    elif step == -1 and reach > 0:
                        left += ds
                    elif RIGHT and step == 1 and reach > 0:
                        right += ds
                    elif FAR and step < -reach:
                        before += tl.sum(ds, 1)
                    elif FAR and step > reach:
                        after += tl.sum(ds, 1)
                    else:  # no other program and no other thread adds there: the order is that of the loop
                        pairs = grad_bias + (step + reach) * BLOCK_M * BLOCK_N + _pair(BLOCK_M, BLOCK_N)
                        tl.atomic_add(pairs, ds, sem="relaxed")
                else:
                    _add_by_distance(grad_bias, ds, n_start, first, last, at, radius, BLOCK_M, BLOCK_N, FAR)
        _store(grad_query, dq * scale, m_start, n_queries, grad_query_stride, d, D, BLOCK_M, BLOCK_D)
    if BIAS_GRAD and TILED:
        _store_pairs(grad_bias, on_diagonal, left, right, before, after, reach, BLOCK_M, BLOCK_N)


@triton.jit
def backward_key_kernel(
    query, key, value, bias, begin, end, place, q_begin, q_end, lse, grad_out, delta, grad_key, grad_value,
    q_stride, k_stride, v_stride, grad_out_stride, grad_key_stride, grad_value_stride,
    n_heads, n_queries, n_keys, bias_stride, radius, reach, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, n_start = tl.program_id(0) % n_heads, tl.program_id(0) // n_heads * BLOCK_N
    query, key, value, grad_out = query + head * D, key + head * D, value + head * D, grad_out + head * D
    grad_key, grad_value = grad_key + head * D, grad_value + head * D
    lse += tl.cast(head, tl.int64) * n_queries
    delta += tl.cast(head, tl.int64) * n_queries
    if HAS_BIAS:
        bias += head * bias_stride
    d, n = tl.arange(0, BLOCK_D), n_start + tl.arange(0, BLOCK_N)
    low = tl.min(tl.load(q_begin + n, mask=n < n_keys, other=BEYOND))
    high = tl.max(tl.load(q_end + n, mask=n < n_keys, other=0))
    k = _load(key, n_start, n_keys, k_stride, d, D, BLOCK_N, BLOCK_D)
    v = _load(value, n_start, n_keys, v_stride, d, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m_start in range(low // BLOCK_M * BLOCK_M if TILED else low, high, BLOCK_M):
        m = m_start + tl.arange(0, BLOCK_M)
        first = tl.load(begin + m, mask=m < n_queries, other=BEYOND)
        last = tl.load(end + m, mask=m < n_queries, other=0)
        at = tl.load(place + m, mask=m < n_queries, other=0) if HAS_BIAS and not TILED else first
        q = _load(query, m_start, n_queries, q_stride, d, D, BLOCK_M, BLOCK_D)
        do = _load(grad_out, m_start, n_queries, grad_out_stride, d, D, BLOCK_M, BLOCK_D)
        normalizer = tl.load(lse + m, mask=m < n_queries, other=0.0)
        inner = tl.load(delta + m, mask=m < n_queries, other=0.0)
        scores = _scores(
            q, k, n, first, last, at, bias, (n_start - m_start) // BLOCK_N, radius, reach, scale,
            HAS_BIAS, TILED, PRECISION,
        )  # fmt: skip
        p = tl.exp2(scores - normalizer[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    _store(grad_key, dk * scale, n_start, n_keys, grad_key_stride, d, D, BLOCK_N, BLOCK_D)
    _store(grad_value, dv, n_start, n_keys, grad_value_stride, d, D, BLOCK_N, BLOCK_D)


@triton.jit
def bias_table_kernel(bias, table, radius, reach, BLOCK: tl.constexpr):
    """[H, 2R+1] by distance -> [H, 2 * reach + 3, BLOCK, BLOCK] by block and pair, in units of log 2."""
    m, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK) + (tl.program_id(0) - reach - 1) * BLOCK
    distance = tl.minimum(tl.maximum(n[None, :] - m[:, None], -radius), radius)
    tile = tl.load(bias + tl.program_id(1) * (2 * radius + 1) + distance + radius).to(tl.float32) * LOG2E
    start = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    tl.store(table + start + _pair(BLOCK, BLOCK), tile)


@triton.jit
def sum_diagonals_kernel(sums, grad_bias, stride, radius, reach, BLOCK: tl.constexpr):
    """Adds sums by block and pair, and those before and after reach, to sums by distance [H, 2R+1] of a head."""
    sums += tl.program_id(0) * stride
    grad_bias += tl.program_id(0) * (2 * radius + 1)
    m = tl.arange(0, BLOCK)
    for step in range(2 * reach + 1):
        ds = tl.load(sums + step * BLOCK * BLOCK + _pair(BLOCK, BLOCK))
        start = (step - reach) * BLOCK
        _add_by_distance(grad_bias, ds, start, m * 0 + start, m * 0 + start + BLOCK, m, radius, BLOCK, BLOCK, True)
    far = sums + (2 * reach + 1) * BLOCK * BLOCK + m
    tl.atomic_add(grad_bias, tl.sum(tl.load(far)), sem="relaxed")
    tl.atomic_add(grad_bias + 2 * radius, tl.sum(tl.load(far + BLOCK)), sem="relaxed")
