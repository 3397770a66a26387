"""The position bias of attention as tiles, and its gradient from tiles: biases depend on distance alone.

Blocks with the same distance from the diagonal hold the same distances at the same places.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
BEYOND = tl.constexpr(2**31 - 1)  # no token
SPAN = 64  # distances whose gradients a program sums


@triton.jit
def place_of(a, b, A: tl.constexpr):
    """Where the pair (a, b) of a block of A rows lies in memory: pairs are in the order in which the tensor cores leave
    a product in a warp's registers, 16 rows per warp and 8 columns at a time, four numbers of a thread side by side."""
    tile = b // 8 * (A // 16) + a // 16
    lane = a % 8 * 4 + b % 8 // 2
    return (tile * 32 + lane) * 4 + a // 8 % 2 * 2 + b % 2


@triton.jit
def from_memory(pairs, A: tl.constexpr, B: tl.constexpr):
    """[A * B] in the order of `place_of` -> [A, B]; no thread needs another's numbers."""
    parts = tl.reshape(pairs, [B // 8, A // 16, 8, 4, 2, 2])
    return tl.reshape(tl.permute(parts, [1, 4, 2, 0, 3, 5]), [A, B])


@triton.jit
def to_memory(block, A: tl.constexpr, B: tl.constexpr):
    """[A, B] -> [A * B] in the order of `place_of`."""
    parts = tl.reshape(block, [A // 16, 2, 8, B // 8, 4, 2])
    return tl.reshape(tl.permute(parts, [3, 0, 2, 4, 1, 5]), [A * B])


@triton.jit
def add_by_distance(
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
def store_pairs(
    part, on_diagonal, left, right, before, after, reach, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A program's part of the bias gradient, beyond what it added on its way."""
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    middle = part + reach * SIZE + tl.arange(0, SIZE)
    tl.store(middle, to_memory(on_diagonal, BLOCK_M, BLOCK_N))
    if BLOCK_M == 16 and reach > 0:
        tl.store(middle - SIZE, to_memory(left, BLOCK_M, BLOCK_N))
        tl.store(middle + SIZE, to_memory(right, BLOCK_M, BLOCK_N))
    far = part + (2 * reach + 1) * SIZE + tl.arange(0, BLOCK_M)
    tl.store(far, before)
    tl.store(far + BLOCK_M, after)


@triton.jit
def bias_table_kernel(bias, table, mirrored, radius, reach, BLOCK: tl.constexpr, MIRRORED: tl.constexpr):
    """[H, 2R+1] by distance -> [H, 2 * reach + 3, BLOCK, BLOCK] by block, in units of log 2, pairs in the order of
    `place_of`; and the same with pairs (key, query) instead of (query, key) if MIRRORED."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    apart = (tl.program_id(0) - reach - 1) * BLOCK
    bias += tl.program_id(1) * (2 * radius + 1) + radius
    start = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK + place_of(i, j, BLOCK)
    tile = tl.load(bias + tl.minimum(tl.maximum(j - i + apart, -radius), radius)).to(tl.float32) * LOG2E
    tl.store(table + start, tile)
    if MIRRORED:
        tile = tl.load(bias + tl.minimum(tl.maximum(i - j + apart, -radius), radius)).to(tl.float32) * LOG2E
        tl.store(mirrored + start, tile)


@triton.jit
def _diagonals(sums, distance, reach, BLOCK: tl.constexpr):
    """Sums by block and pair -> sums over all pairs at each distance, [SPAN]."""
    m = tl.arange(0, BLOCK)[:, None]
    column = distance[None, :] + m + reach * BLOCK  # of the block rows side by side
    inside = (column >= 0) & (column < (2 * reach + 1) * BLOCK)
    place = column // BLOCK * (BLOCK * BLOCK) + place_of(m, column % BLOCK, BLOCK)
    return tl.sum(tl.load(sums + place, mask=inside, other=0.0), 0)


@triton.jit
def sum_diagonals_kernel(sums, grad_bias, stride, radius, reach, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Sums by block and pair, and those before and after reach, to sums by distance [H, 2R+1], SPAN in a program."""
    sums += tl.program_id(0) * stride
    slot = tl.arange(0, SPAN)
    distance = tl.program_id(1) * SPAN - radius + slot
    total = tl.where((distance > -radius) & (distance < radius), _diagonals(sums, distance, reach, BLOCK), 0.0)
    far = sums + (2 * reach + 1) * BLOCK * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        beyond = tl.sum(tl.load(far))
        for start in range(-(reach + 1) * BLOCK, 1 - radius, SPAN):
            here = start + slot
            beyond += tl.sum(tl.where(here <= -radius, _diagonals(sums, here, reach, BLOCK), 0.0))
        total += tl.where(distance == -radius, beyond, 0.0)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        beyond = tl.sum(tl.load(far + BLOCK))
        for start in range(tl.maximum(radius, 1), (reach + 1) * BLOCK, SPAN):
            beyond += tl.sum(_diagonals(sums, start + slot, reach, BLOCK))
        total += tl.where(distance == radius, beyond, 0.0)
    tl.store(grad_bias + tl.program_id(0) * (2 * radius + 1) + radius + distance, total, mask=distance <= radius)


@dataclass(frozen=True)
class Bias:
    """The bias as the attention kernels read it.

    table: [H, 2R+1] by distance, or if TILED [H, 2 * reach + 3, BLOCK, BLOCK] by block, pairs (query, key) in the order
    of `place_of`; mirrored: the same by (key, query), for a backward pass. stride: size of a head's part. reach: how
    many blocks from the diagonal there are distances below R. far: there are pairs beyond: blocks if TILED, else
    distances above R.
    """

    table: Tensor | None
    mirrored: Tensor | None
    stride: int = 0
    radius: int = 0
    reach: int = 0
    far: bool = False

    @staticmethod
    def make(bias: Tensor | None, max_length: int, constants: dict, mirrored: bool) -> "Bias":
        if bias is None:
            return Bias(None, None)
        bias = bias.contiguous()
        radius, block = bias.shape[1] // 2, constants["BLOCK_M"]
        if not constants["TILED"]:
            return Bias(bias, bias, bias.shape[1], radius, 0, max_length > radius + 1)
        farthest = triton.cdiv(max(max_length - 1, 0), block)  # blocks that two tokens of a row can be apart
        reach = min(farthest, (radius + block - 2) // block)
        tables = torch.empty(
            1 + mirrored, len(bias), 2 * reach + 3, block, block, dtype=torch.float32, device=bias.device
        )
        grid = 2 * reach + 3, len(bias)
        bias_table_kernel[grid](bias, tables[0], tables[-1], radius, reach, block, mirrored)
        return Bias(tables[0], tables[1] if mirrored else None, tables.stride(1), radius, reach, farthest > reach)


def bias_gradient(sums: Tensor, bias: Tensor, constants: dict, radius: int, reach: int) -> Tensor:
    """From the sums of all programs [H, width] -> [H, 2R+1] float32."""
    if not constants["TILED"]:
        return sums
    grad_bias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    grid = len(bias), triton.cdiv(bias.shape[1], SPAN)
    sum_diagonals_kernel[grid](sums, grad_bias, sums.shape[1], radius, reach, constants["BLOCK_M"], SPAN)
    return grad_bias
