"""Sums of rows of a table, and the gradient of the table without atomics.

Forward, one kernel reads k rows for each output and writes their sum: it is bound by the bytes of the outputs and of
the rows. Backward, the gradient of an output belongs to each of its k rows. These pairs are sorted by row; a program
sums the runs of equal rows in a stretch of pairs, and another kernel joins the runs that more than one stretch has a
part of. Which numbers are added in which order depends on the rows alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 64  # pairs that a program sums
PARTS = 32  # parts of a long run that are added at a time


@triton.jit
def _forward(table, rows, out, M, width, K: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[m] = sum over j of table[rows[m, j]]."""
    outputs = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = outputs < M
    inside = real[:, None] & (columns < width)
    total = tl.zeros([OUTPUTS, BLOCK], tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows + outputs * K + j, mask=real, other=0).to(tl.int64)
        total += tl.load(table + row[:, None] * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + outputs[:, None] * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_runs(
    grad, keys, order, sums, parts, n_pairs, width, K: tl.constexpr, STRETCH: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[r] = sum of the rows of grad whose pair has key r, for the runs that lie in the stretch; parts[0] is the
    sum of its first run, parts[1] that of its last, as far as they lie in it. Pair p belongs to output p // K."""
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
        output = tl.load(order + i).to(tl.int64) // K
        total += tl.load(grad + output * width + columns, mask=inside, other=0.0).to(tl.float32)
        opens = (key != first) | (begun == 0)
        tl.store(sums + key.to(tl.int64) * width + columns, total.to(sums.dtype.element_ty), mask=inside & ends & opens)
        tl.store(parts + columns, total, mask=inside & (key == first) & (ends | (i + 1 == stop)))
        tl.store(parts + width + columns, total, mask=inside & (i + 1 == stop))
        total = tl.where(ends, 0.0, total)


@triton.jit
def _join_runs(
    keys, ends, sums, parts, n_pairs, width, STRETCH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[r] of a run that begins in the stretch and ends in a later one: its last part and the first ones of those.
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


@torch.library.custom_op("retrieval::sum_rows", mutates_args=())
def sum_rows(table: Tensor, rows: Tensor, keys: Tensor | None, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """table [R, d], rows [M, k] -> sums [M, d] in `dtype`; see `ops.sums`. keys, order: [M * k], as in `RowSums`; None
    where the backward pass has to sort."""
    (M, k), width = rows.shape, table.shape[1]
    out = table.new_empty(M, width, dtype=dtype)
    if M:
        block = min(triton.next_power_of_2(width), 512)
        outputs = 2048 // block
        grid = (triton.cdiv(M, outputs), triton.cdiv(width, block))
        _forward[grid](table.contiguous(), rows.contiguous(), out, M, width, k, outputs, block)
    return out


@sum_rows.register_fake
def _(table, rows, keys, order, dtype):
    return table.new_empty(len(rows), table.shape[1], dtype=dtype)


@torch.library.custom_op("retrieval::sum_rows_backward", mutates_args=())
def sum_rows_backward(
    grad: Tensor, rows: Tensor, keys: Tensor | None, order: Tensor | None, n_rows: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the table, [n_rows, d] in `dtype`: grad [M, d], the others as in `sum_rows`."""
    grad = grad.contiguous()
    (M, k), width = rows.shape, grad.shape[1]
    sums = grad.new_zeros(n_rows, width, dtype=dtype)
    if M:
        if keys is None:
            keys, order = rows.flatten().to(torch.int32).sort(stable=True)
        stretches = triton.cdiv(len(keys), STRETCH)
        parts = torch.empty(stretches, 2, width, dtype=torch.float32, device=grad.device)
        block = min(triton.next_power_of_2(width), 512)
        _sum_runs[(stretches, triton.cdiv(width, block))](
            grad, keys, order, sums, parts, len(keys), width, k, STRETCH, block, num_warps=1
        )
        block = min(block, 128)
        ends = torch.searchsorted(keys, keys[::STRETCH].contiguous(), right=True)
        _join_runs[(stretches, triton.cdiv(width, block))](
            keys, ends, sums, parts, len(keys), width, STRETCH, PARTS, block
        )
    return sums


@sum_rows_backward.register_fake
def _(grad, rows, keys, order, n_rows, dtype):
    return grad.new_empty(n_rows, grad.shape[1], dtype=dtype)


def _save(ctx, inputs, output) -> None:
    table, *structure, _ = inputs
    ctx.n_rows, ctx.dtype = len(table), table.dtype
    ctx.save_for_backward(*structure)


def _gradient(ctx, grad: Tensor):
    return sum_rows_backward(grad, *ctx.saved_tensors, ctx.n_rows, ctx.dtype), *(None,) * 4


sum_rows.register_autograd(_gradient, setup_context=_save)
