"""Vectors of semantic IDs, and the gradient of their tables without atomics.

Forward, one kernel hashes the prefixes, reads a row of each table and writes their sum: it is bound by the bytes of
the result and of the prefix rows. Backward, a row of the gradient belongs to a row of each table. The pairs are
sorted by row of the table; a program sums the runs of equal rows in a stretch of pairs, and another kernel joins the
runs that more than one stretch has a part of. Which numbers are added in which order depends on the codes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 64  # pairs that a program sums
PARTS = 32  # parts of a long run that are added at a time


@triton.jit
def _forward(
    codes, starts, table, prefixes, out, rows, n_tokens, code_row, code_column, width, table_rows, buckets,
    LEVELS: tl.constexpr, PREFIXES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t, l] = table[starts[l] + codes[t, l]] + (l > 0) * prefixes[hash(codes[t, :l+1]) % buckets], and rows[t]:
    of each level the row of the table, then of each level but the first table_rows + that of the prefixes.
    The hash is `reference.hash_prefixes`, in 64 bits."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = token < n_tokens
    inside = real[:, None] & (columns < width)
    writes = real & (tl.program_id(1) == 0)
    rows += token * (2 * LEVELS - 1 if PREFIXES else LEVELS)
    state = tl.zeros([TOKENS], tl.int64)
    for level in tl.static_range(LEVELS):
        code = tl.load(codes + token * code_row + level * code_column, mask=real, other=0).to(tl.int64)
        row = tl.load(starts + level) + code
        tl.store(rows + level, row.to(tl.int32), mask=writes)
        vector = tl.load(table + row[:, None] * width + columns, mask=inside, other=0.0).to(tl.float32)
        if PREFIXES:
            state = (state * 1_000_003 + code + 1) % (2**31 - 1)
            state = state ^ (state >> 15)
            if level > 0:
                bucket = state * 48_271 % (2**31 - 1) % buckets
                tl.store(rows + LEVELS + level - 1, (table_rows + bucket).to(tl.int32), mask=writes)
                vector += tl.load(prefixes + bucket[:, None] * width + columns, mask=inside, other=0.0).to(tl.float32)
        place = (token * LEVELS + level)[:, None] * width + columns
        tl.store(out + place, vector.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_runs(
    grad, keys, order, sums, parts, n_pairs, width,
    LEVELS: tl.constexpr, PAIRS: tl.constexpr, STRETCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[k] = sum of the rows of grad whose pair has key k, for the runs that lie in the stretch; parts[0] is the
    sum of its first run, parts[1] that of its last, as far as they lie in it. Pair p of PAIRS = 2 LEVELS - 1 a token
    (see `_forward`; LEVELS without prefixes) is of level p, or p - LEVELS + 1 where it is of a prefix."""
    stretch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = stretch * STRETCH
    stop = tl.minimum(start + STRETCH, n_pairs)
    parts += stretch * 2 * width
    first = tl.load(keys + start)
    begun = tl.load(keys + start - 1, mask=start > 0, other=-1) == first
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(start, stop):
        key = tl.load(keys + i)
        ends = tl.load(keys + i + 1, mask=i + 1 < n_pairs, other=-1) != key
        pair = tl.load(order + i).to(tl.int32)
        kind = pair % PAIRS
        row = (pair // PAIRS * LEVELS + tl.where(kind < LEVELS, kind, kind - LEVELS + 1)).to(tl.int64)
        total += tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        opens = (key != first) | (begun == 0)
        tl.store(sums + key.to(tl.int64) * width + columns, total.to(sums.dtype.element_ty), mask=inside & ends & opens)
        tl.store(parts + columns, total, mask=inside & (key == first) & (ends | (i + 1 == stop)))
        tl.store(parts + width + columns, total, mask=inside & (i + 1 == stop))
        total = tl.where(ends, 0.0, total)


@triton.jit
def _join_runs(
    keys, ends, sums, parts, n_pairs, width, STRETCH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[k] of a run that begins in the stretch and ends in a later one: its last part and the first ones of those.
    ends[s] is the end of the run that stretch s starts in."""
    stretch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, stop = stretch * STRETCH, (stretch + 1) * STRETCH
    follows = stop < n_pairs
    key = tl.load(keys + stop - 1, mask=follows, other=-1)
    goes_on = follows & (tl.load(keys + stop, mask=follows, other=-1) == key)
    begun = tl.load(keys + start - 1, mask=start > 0, other=-1) == key
    if goes_on & (begun == 0):
        inside = columns < width
        total = tl.load(parts + (2 * stretch + 1) * width + columns, mask=inside, other=0.0)
        last = (tl.load(ends + stretch + 1) - 1) // STRETCH
        for later in range(stretch + 1, last + 1, PARTS):
            part = later + tl.arange(0, PARTS)
            mask = (part <= last)[:, None] & inside[None, :]
            total += tl.sum(tl.load(parts + part[:, None] * 2 * width + columns[None, :], mask=mask, other=0.0), 0)
        tl.store(sums + key.to(tl.int64) * width + columns, total.to(sums.dtype.element_ty), mask=inside)


@torch.library.custom_op("retrieval::embed_codes", mutates_args=())
def embed_codes(
    codes: Tensor, starts: Tensor, table: Tensor, prefix_table: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Vectors [T, l, dim] in `dtype`, and the rows they are made of, [T, 2l - 1] int32, or [T, l] without prefixes; see
    `_forward` and `ops.embedding`."""
    tokens, levels = codes.shape
    width = table.shape[1]
    prefixes = prefix_table is not None
    out = table.new_empty(tokens, levels, width, dtype=dtype)
    rows = codes.new_empty(tokens, 2 * levels - 1 if prefixes else levels, dtype=torch.int32)
    if tokens:
        block = min(triton.next_power_of_2(width), 512)
        at_a_time = 2048 // block
        _forward[(triton.cdiv(tokens, at_a_time), triton.cdiv(width, block))](
            codes, starts, table.contiguous(), prefix_table.contiguous() if prefixes else None, out, rows,
            tokens, *codes.stride(), width, len(table), len(prefix_table) if prefixes else 0,
            levels, prefixes, at_a_time, block,
        )  # fmt: skip
    return out, rows


@embed_codes.register_fake
def _(codes, starts, table, prefix_table, dtype):
    tokens, levels = codes.shape
    pairs = 2 * levels - 1 if prefix_table is not None else levels
    return table.new_empty(tokens, levels, table.shape[1], dtype=dtype), codes.new_empty(
        tokens, pairs, dtype=torch.int32
    )


@torch.library.custom_op("retrieval::embed_codes_backward", mutates_args=())
def embed_codes_backward(grad: Tensor, rows: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """Gradients of both tables, one after the other: grad [T, l, dim], rows as from `embed_codes` -> [n_rows, dim]
    in `dtype`."""
    grad = grad.contiguous()
    tokens, levels, width = grad.shape
    sums = grad.new_zeros(n_rows, width, dtype=dtype)
    if tokens:
        keys, order = rows.flatten().sort(stable=True)
        stretches = triton.cdiv(len(keys), STRETCH)
        parts = torch.empty(stretches, 2, width, dtype=torch.float32, device=grad.device)
        block = min(triton.next_power_of_2(width), 512)
        _sum_runs[(stretches, triton.cdiv(width, block))](
            grad, keys, order, sums, parts, len(keys), width, levels, rows.shape[1], STRETCH, block, num_warps=1
        )
        block = min(block, 128)
        ends = torch.searchsorted(keys, keys[::STRETCH].contiguous(), right=True)
        _join_runs[(stretches, triton.cdiv(width, block))](
            keys, ends, sums, parts, len(keys), width, STRETCH, PARTS, block
        )
    return sums


@embed_codes_backward.register_fake
def _(grad, rows, n_rows, dtype):
    return grad.new_empty(n_rows, grad.shape[2], dtype=dtype)


def _save(ctx, inputs, output) -> None:
    _, _, table, prefix_table, _ = inputs
    ctx.table_rows, ctx.dtype = len(table), table.dtype
    ctx.n_rows = len(table) + (len(prefix_table) if prefix_table is not None else 0)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _gradients(ctx, grad: Tensor, _):
    sums = embed_codes_backward(grad, *ctx.saved_tensors, ctx.n_rows, ctx.dtype)
    prefixes = sums[ctx.table_rows :] if ctx.n_rows > ctx.table_rows else None
    return None, None, sums[: ctx.table_rows], prefixes, None


embed_codes.register_autograd(_gradients, setup_context=_save)
