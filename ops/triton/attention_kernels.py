"""Attention within the rows of jagged tensors, forward and backward, without padding.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i].k[j] + bias[h, clamp(j - place[i], -R, R) + R])

A program takes blocks of BLOCK_M queries of one row and head and walks over the row's keys in blocks of BLOCK_N with
a running maximum and sum (Milakov and Gimelshein 2018; Dao 2023, algorithm 1). It keeps lse[i] = log sum_j exp(score),
from which the backward pass computes p again (Dao 2023, algorithm 2):

    delta[i] = dout[i].out[i],   ds[i, j] = p[i, j] (dout[i].v[j] - delta[i])
    dq[i] = scale sum_j ds[i, j] k[j],   dk[j] = scale sum_i ds[i, j] q[i],   dv[j] = sum_i p[i, j] dout[i]
    dbias[h, x] = sum of ds[i, j] over all pairs at distance x

Every sum runs in a fixed order, as no two threads add to one place: equal inputs give equal bits. Scores and sums
are float32.
"""

import triton
import triton.language as tl

ALL, CAUSAL, LIMITS = 0, 1, 2  # which keys a query sees
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # finite, so that a difference of two is a number


@triton.jit
def _row(row, q_offsets, k_offsets, n_tokens, SEGMENT: tl.constexpr):
    """Where a row's queries and keys start, and how many there are.

    SEGMENT > 0: all rows have so many tokens, and as many of them as fill a block are taken as one row of segments that
    do not see each other.
    """
    if SEGMENT > 0:
        start = tl.cast(row, tl.int64) * (16 // SEGMENT * SEGMENT)
        length = tl.minimum(n_tokens - start, 16 // SEGMENT * SEGMENT).to(tl.int32)
        return start, start, length, length
    else:
        q_start, k_start = tl.load(q_offsets + row), tl.load(k_offsets + row)
        q_length = (tl.load(q_offsets + row + 1) - q_start).to(tl.int32)
        k_length = (tl.load(k_offsets + row + 1) - k_start).to(tl.int32)
        return q_start, k_start, q_length, k_length


@triton.jit
def _visible(m, limits, q_start, q_length, k_length, MASK: tl.constexpr, SEGMENT: tl.constexpr):
    """How many keys the queries m of a row see, and the place from which their distances count. [BLOCK_M] each."""
    if MASK == 2:
        limit = tl.load(limits + q_start + m, mask=m < q_length, other=0).to(tl.int32)
        limit = tl.minimum(limit, k_length)
        return limit, limit - 1
    elif MASK == 1:
        return tl.where(m < q_length, tl.minimum(m + 1, k_length), 0), m
    elif SEGMENT > 0:
        return tl.where(m < q_length, m // SEGMENT * SEGMENT + SEGMENT, 0), m
    else:
        return tl.where(m < q_length, k_length, 0), m


@triton.jit
def _bias_tile(bias, n, place, visible, radius):
    """The bias of each pair in units of log 2. [BLOCK_M, BLOCK_N] float32."""
    distance = n[None, :] - place[:, None]
    index = tl.minimum(tl.maximum(distance, -radius), radius) + radius
    return tl.load(bias + index, mask=visible, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _scores(
    q, k, n, limit, place, bias, step, radius, reach, scale,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2, -inf where a key is not visible. [BLOCK_M, BLOCK_N] float32.

    step: how many blocks to the right of the diagonal this one lies. If TILED, `bias` holds the biases of such a
    block, pair by pair, for the steps -reach - 1 to reach + 1; otherwise it holds them by distance.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    visible = n[None, :] < limit[:, None]
    if SEGMENT > 0:
        visible = visible & (n[None, :] >= (place // SEGMENT * SEGMENT)[:, None])
    if HAS_BIAS:
        if TILED:
            M: tl.constexpr = q.shape[0]
            N: tl.constexpr = k.shape[0]
            tile = tl.minimum(tl.maximum(step + reach + 1, 0), 2 * reach + 2)
            scores += tl.load(bias + tile * (M * N) + _pair(M, N))
        else:
            scores += _bias_tile(bias, n, place, visible, radius)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _pair(M: tl.constexpr, N: tl.constexpr):
    """Place of each pair of a block in memory. [M, N]"""
    return tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def _load(pointer, start, rows, length, stride, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start + rows of a [T, H, D] tensor at one head, zeros beyond the row's length. [BLOCK, BLOCK_D]."""
    mask = (rows < length)[:, None] if D == BLOCK_D else (rows < length)[:, None] & (d < D)[None, :]
    return tl.load(pointer + start * stride + (rows[:, None] * stride + d[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(pointer, values, start, rows, length, stride, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = (rows < length)[:, None] if D == BLOCK_D else (rows < length)[:, None] & (d < D)[None, :]
    pointers = pointer + start * stride + (rows[:, None] * stride + d[None, :])
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    query, key, value, bias, limits, out, lse,
    q_offsets, k_offsets,
    q_stride, k_stride, v_stride, out_stride,
    n_heads, n_work, pieces, n_tokens, bias_stride, radius, reach, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, MASK: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0) % n_heads, tl.program_id(0) // n_heads
    query, key, value, out = query + head * D, key + head * D, value + head * D, out + head * D
    if HAS_BIAS:
        bias += head * bias_stride
    d = tl.arange(0, BLOCK_D)
    for work in range(first, n_work, tl.num_programs(0) // n_heads):
        row, piece = work // pieces, work % pieces
        q_start, k_start, q_length, k_length = _row(row, q_offsets, k_offsets, n_tokens, SEGMENT)
        for m_start in range(piece * BLOCK_M, q_length, BLOCK_M * pieces):
            m = m_start + tl.arange(0, BLOCK_M)
            limit, place = _visible(m, limits, q_start, q_length, k_length, MASK, SEGMENT)
            q = _load(query, q_start, m, q_length, q_stride, d, D, BLOCK_D)
            largest = tl.full([BLOCK_M], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for n_start in range(0, tl.max(limit), BLOCK_N):
                n = n_start + tl.arange(0, BLOCK_N)
                k = _load(key, k_start, n, k_length, k_stride, d, D, BLOCK_D)
                v = _load(value, k_start, n, k_length, v_stride, d, D, BLOCK_D)
                scores = _scores(
                    q, k, n, limit, place, bias, (n_start - m_start) // BLOCK_N, radius, reach, scale,
                    HAS_BIAS, TILED, SEGMENT, PRECISION,
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
            _store(out, weighted / safe[:, None], q_start, m, q_length, out_stride, d, D, BLOCK_D)
            normalizer = tl.where(seen, largest + tl.log2(safe), 0.0)
            tl.store(lse + (q_start + m) * n_heads + head, normalizer, mask=m < q_length)


@triton.jit
def _add_by_distance(
    total, ds, n_start, place, visible, radius,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds ds [BLOCK_M, BLOCK_N] to total [WIDTH], a sum for each distance clamp(n - place, -radius, radius) + radius.

    A window of distances is as wide as the block: each row of ds, moved by its place, is a row of the window.
    """
    SPAN: tl.constexpr = 2 * BLOCK_N
    slot = tl.arange(0, SPAN)
    x = tl.arange(0, WIDTH) - radius  # the distance of each sum
    lowest = n_start - tl.max(tl.where(visible, place, -(2**30)))
    highest = n_start + BLOCK_N - 1 - tl.min(tl.where(visible, place, 2**30))
    for first in range(lowest, highest + 1, SPAN):
        column = first + slot[None, :] + place[:, None] - n_start  # [BLOCK_M, SPAN]
        inside = (column >= 0) & (column < BLOCK_N) & visible[:, None]
        moved = tl.gather(ds, tl.minimum(tl.maximum(column, 0), BLOCK_N - 1), 1)
        sums = tl.sum(tl.where(inside, moved, 0.0), 0)  # [SPAN], of the distances first + slot
        offset = x - first
        inner = (offset >= 0) & (offset < SPAN) & (x > -radius) & (x < radius)
        total += tl.where(inner, tl.gather(sums, tl.minimum(tl.maximum(offset, 0), SPAN - 1), 0), 0.0)
        below, above = first + slot <= -radius, (first + slot >= radius) & (radius > 0)
        total += tl.where(x == -radius, tl.sum(tl.where(below | (radius == 0), sums, 0.0)), 0.0)
        total += tl.where(x == radius, tl.sum(tl.where(above, sums, 0.0)), 0.0)
    return total


@triton.jit
def _store_bias_sums(
    grad_bias, by_distance, on_diagonal, left, right, before, after, radius, reach,
    TILED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program's part of the bias gradient, beyond what it added on its way."""
    if TILED:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        middle = grad_bias + reach * SIZE + _pair(BLOCK_M, BLOCK_N)
        tl.store(middle, on_diagonal)
        if reach > 0:
            tl.store(middle - SIZE, left)
            tl.store(middle + SIZE, right)
        far = grad_bias + (2 * reach + 1) * BLOCK_M * BLOCK_N + tl.arange(0, BLOCK_M)
        tl.store(far, before)
        tl.store(far + BLOCK_M, after)
    else:
        x = tl.arange(0, WIDTH)
        tl.store(grad_bias + x, by_distance, mask=x < 2 * radius + 1)


@triton.jit
def backward_query_kernel(
    query, key, value, bias, limits, out, lse, grad_out, delta, grad_query, grad_bias,
    q_offsets, k_offsets,
    q_stride, k_stride, v_stride, out_stride, grad_out_stride, grad_query_stride,
    n_heads, n_work, pieces, n_tokens, bias_stride, radius, reach, scale, part_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, MASK: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
    BIAS_GRAD: tl.constexpr, FAR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """delta, dq, and this program's part of dbias. A program takes every so-many-th piece of a row at one head."""
    head, first = tl.program_id(0) % n_heads, tl.program_id(0) // n_heads
    query, key, value, out = query + head * D, key + head * D, value + head * D, out + head * D
    grad_out, grad_query = grad_out + head * D, grad_query + head * D
    if HAS_BIAS:
        bias += head * bias_stride
    d = tl.arange(0, BLOCK_D)
    by_distance = tl.zeros([WIDTH], tl.float32)
    # Sums over the blocks on the diagonal and beside it, pair by pair.
    on_diagonal = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    left, right = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    before, after = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)  # sums beyond reach
    pair = _pair(BLOCK_M, BLOCK_N)
    grad_bias += tl.program_id(0).to(tl.int64) * part_size
    for work in range(first, n_work, tl.num_programs(0) // n_heads):
        row, piece = work // pieces, work % pieces
        q_start, k_start, q_length, k_length = _row(row, q_offsets, k_offsets, n_tokens, SEGMENT)
        for m_start in range(piece * BLOCK_M, q_length, BLOCK_M * pieces):
            m = m_start + tl.arange(0, BLOCK_M)
            limit, place = _visible(m, limits, q_start, q_length, k_length, MASK, SEGMENT)
            q = _load(query, q_start, m, q_length, q_stride, d, D, BLOCK_D)
            do = _load(grad_out, q_start, m, q_length, grad_out_stride, d, D, BLOCK_D)
            o = _load(out, q_start, m, q_length, out_stride, d, D, BLOCK_D)
            inner = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            tl.store(delta + (q_start + m) * n_heads + head, inner, mask=m < q_length)
            normalizer = tl.load(lse + (q_start + m) * n_heads + head, mask=m < q_length, other=0.0)
            dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for n_start in range(0, tl.max(limit), BLOCK_N):
                n = n_start + tl.arange(0, BLOCK_N)
                k = _load(key, k_start, n, k_length, k_stride, d, D, BLOCK_D)
                v = _load(value, k_start, n, k_length, v_stride, d, D, BLOCK_D)
                scores = _scores(
                    q, k, n, limit, place, bias, (n_start - m_start) // BLOCK_N, radius, reach, scale,
                    HAS_BIAS, TILED, SEGMENT, PRECISION,
                )  # fmt: skip
                p = tl.exp2(scores - normalizer[:, None])
                ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
                if BIAS_GRAD:
                    if TILED:
                        step = (n_start - m_start) // BLOCK_N
                        if step == 0:
                            on_diagonal += ds
                        elif step == -1 and reach > 0:
                            left += ds
                        elif MASK != 1 and step == 1 and reach > 0:
                            right += ds
                        elif FAR and step < -reach:
                            before += tl.sum(ds, 1)
                        elif FAR and step > reach:
                            after += tl.sum(ds, 1)
                        else:  # no other program and no other thread adds there: the order is that of the loop
                            tl.atomic_add(grad_bias + (step + reach) * BLOCK_M * BLOCK_N + pair, ds, sem="relaxed")
                    else:
                        by_distance = _add_by_distance(
                            by_distance, ds, n_start, place, limit > 0, radius, BLOCK_M, BLOCK_N, WIDTH
                        )
            _store(grad_query, dq * scale, q_start, m, q_length, grad_query_stride, d, D, BLOCK_D)
    if BIAS_GRAD:
        _store_bias_sums(
            grad_bias, by_distance, on_diagonal, left, right, before, after, radius, reach,
            TILED, BLOCK_M, BLOCK_N, WIDTH,
        )  # fmt: skip


@triton.jit
def backward_key_kernel(
    query, key, value, bias, limits, lse, grad_out, delta, grad_key, grad_value,
    q_offsets, k_offsets,
    q_stride, k_stride, v_stride, grad_out_stride, grad_key_stride, grad_value_stride,
    n_heads, n_work, pieces, n_tokens, bias_stride, radius, reach, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILED: tl.constexpr, MASK: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0) % n_heads, tl.program_id(0) // n_heads
    query, key, value, grad_out = query + head * D, key + head * D, value + head * D, grad_out + head * D
    grad_key, grad_value = grad_key + head * D, grad_value + head * D
    if HAS_BIAS:
        bias += head * bias_stride
    d = tl.arange(0, BLOCK_D)
    for work in range(first, n_work, tl.num_programs(0) // n_heads):
        row, piece = work // pieces, work % pieces
        q_start, k_start, q_length, k_length = _row(row, q_offsets, k_offsets, n_tokens, SEGMENT)
        for n_start in range(piece * BLOCK_N, k_length, BLOCK_N * pieces):
            n = n_start + tl.arange(0, BLOCK_N)
            k = _load(key, k_start, n, k_length, k_stride, d, D, BLOCK_D)
            v = _load(value, k_start, n, k_length, v_stride, d, D, BLOCK_D)
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            m_first = n_start // BLOCK_M * BLOCK_M if MASK == 1 else 0
            for m_start in range(m_first, q_length, BLOCK_M):
                m = m_start + tl.arange(0, BLOCK_M)
                limit, place = _visible(m, limits, q_start, q_length, k_length, MASK, SEGMENT)
                q = _load(query, q_start, m, q_length, q_stride, d, D, BLOCK_D)
                do = _load(grad_out, q_start, m, q_length, grad_out_stride, d, D, BLOCK_D)
                normalizer = tl.load(lse + (q_start + m) * n_heads + head, mask=m < q_length, other=0.0)
                inner = tl.load(delta + (q_start + m) * n_heads + head, mask=m < q_length, other=0.0)
                scores = _scores(
                        q, k, n, limit, place, bias, (n_start - m_start) // BLOCK_N, radius, reach, scale,
                        HAS_BIAS, TILED, SEGMENT, PRECISION,
                    )  # fmt: skip
                p = tl.exp2(scores - normalizer[:, None])
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
                ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None])
                dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
            _store(grad_key, dk * scale, k_start, n, k_length, grad_key_stride, d, D, BLOCK_D)
            _store(grad_value, dv, k_start, n, k_length, grad_value_stride, d, D, BLOCK_D)


@triton.jit
def bias_table_kernel(bias, table, radius, reach, BLOCK: tl.constexpr):
    """[H, 2R+1] by distance -> [H, 2 * reach + 3, BLOCK, BLOCK] by block and pair, in units of log 2."""
    m, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK) + (tl.program_id(0) - reach - 1) * BLOCK
    always = (m[:, None] >= 0) & (m[None, :] >= 0)
    tile = _bias_tile(bias + tl.program_id(1) * (2 * radius + 1), n, m, always, radius)
    start = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    tl.store(table + start + _pair(BLOCK, BLOCK), tile)


@triton.jit
def sum_diagonals_kernel(sums, grad_bias, stride, radius, reach, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Sums by block and pair, then those before and after reach, -> by distance [H, 2R+1]. A program a head."""
    sums += tl.program_id(0) * stride
    m = tl.arange(0, BLOCK)
    total = tl.zeros([WIDTH], tl.float32)
    for step in range(2 * reach + 1):
        ds = tl.load(sums + step * BLOCK * BLOCK + _pair(BLOCK, BLOCK))
        total = _add_by_distance(total, ds, (step - reach) * BLOCK, m, m >= 0, radius, BLOCK, BLOCK, WIDTH)
    far = sums + (2 * reach + 1) * BLOCK * BLOCK + m
    x = tl.arange(0, WIDTH)
    total += tl.where(x == 0, tl.sum(tl.load(far)), 0.0)
    total += tl.where(x == 2 * radius, tl.sum(tl.load(far + BLOCK)), 0.0)
    tl.store(grad_bias + tl.program_id(0) * (2 * radius + 1) + x, total, mask=x < 2 * radius + 1)
