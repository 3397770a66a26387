"""Which keys a query sees, and which queries a key is seen by, as ranges of tokens: what attention knows of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ALL, CAUSAL, LIMITS = 0, 1, 2  # which keys of its row a query sees


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


def _ranges_grid(rows: int, longest: int) -> tuple[tuple[int, int], dict[str, int]]:
    length = min(32, triton.next_power_of_2(max(longest, 1)))
    blocks = {"ROWS": 1024 // length, "LENGTH": length}
    return (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(max(longest, 1), length)), blocks


def key_ranges(
    total: int, q_offsets: Tensor, k_offsets: Tensor, max_query: int, key_limits: Tensor | None, causal: bool
) -> Tensor:
    """First key, last key + 1 and place of each query: [3, Tq] int32, counted from the first key of all rows."""
    ranges = torch.empty(3, total, dtype=torch.int32, device=q_offsets.device)
    rows, mask = len(q_offsets) - 1, LIMITS if key_limits is not None else CAUSAL if causal else ALL
    if total:
        limits = key_limits.contiguous() if key_limits is not None else None
        grid, blocks = _ranges_grid(rows, max_query)
        key_ranges_kernel[grid](q_offsets, k_offsets, limits, *ranges, rows, mask, **blocks)
    return ranges


def query_ranges(total: int, q_offsets: Tensor, k_offsets: Tensor, max_key: int, causal: bool) -> Tensor:
    """First query that may see each key, and the last + 1: [2, Tk] int32, counted from the first query of all rows."""
    ranges = torch.empty(2, total, dtype=torch.int32, device=q_offsets.device)
    rows = len(q_offsets) - 1
    if total:
        grid, blocks = _ranges_grid(rows, max_key)
        query_ranges_kernel[grid](q_offsets, k_offsets, *ranges, rows, CAUSAL if causal else ALL, **blocks)
    return ranges
