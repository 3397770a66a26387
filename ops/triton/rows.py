"""Copies of rows between layouts: jagged, padded, and jagged at other offsets.

    target[target_start(b) + i] = source[source_start(b) + i]    for 0 <= i < lengths[b]

Every jagged copy is this one: padding, its inverse, and joining rows; its gradient is the copy back. It moves each
value once, so its limit is the copy bandwidth of the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values a program moves at a time


@triton.jit
def _copy_kernel(
    source, target, lengths, source_starts, target_starts,
    source_capacity, target_capacity, width, fill,
    SOURCE_STARTS: tl.constexpr, TARGET_STARTS: tl.constexpr, FILL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    length = tl.load(lengths + row).to(tl.int32)
    source += (tl.load(source_starts + row) if SOURCE_STARTS else row * source_capacity) * width
    target += (tl.load(target_starts + row) if TARGET_STARTS else row * target_capacity) * width
    inside = i < length
    written = i < target_capacity if FILL else inside
    for w_start in range(0, width, BLOCK_W):
        w = w_start + tl.arange(0, BLOCK_W)
        place = i[:, None] * width + w[None, :]
        values = tl.load(source + place, mask=inside[:, None] & (w < width)[None, :], other=fill)
        tl.store(target + place, values, mask=written[:, None] & (w < width)[None, :])


def _launch(
    source: Tensor,
    target: Tensor,
    lengths: Tensor,
    source_starts: Tensor | None,
    source_capacity: int,
    target_starts: Tensor | None,
    target_capacity: int,
    max_length: int,
    fill: float = 0.0,
) -> None:
    """Writes into `target`; the other arguments are those of `copy_rows`."""
    width, longest = target[:1].numel(), max(max_length, target_capacity)
    if not (len(lengths) and width and longest):
        return
    block_w = min(triton.next_power_of_2(width), 512)
    block_m = min(max(1, TILE // block_w), triton.next_power_of_2(longest))
    _copy_kernel[(len(lengths), triton.cdiv(longest, block_m))](
        source.contiguous(), target, lengths, source_starts, target_starts, source_capacity, target_capacity, width,
        fill, source_starts is not None, target_starts is not None, target_capacity > 0, block_m, block_w,
    )  # fmt: skip


@torch.library.custom_op("jagged::copy_rows", mutates_args=())
def copy_rows(
    source: Tensor,
    lengths: Tensor,
    source_starts: Tensor | None,
    source_capacity: int,
    target_starts: Tensor | None,
    target_capacity: int,
    max_length: int,
    target_size: int,
    fill: float = 0.0,
) -> Tensor:
    """B rows of `source` at their places in a new tensor. Shape: source [S, ...] -> [target_size, ...], same dtype.

    lengths: [B] integers, at most max_length. A row starts at its entry of the starts ([B] int64), or, where they are
    None, at b * capacity. target_capacity > 0: `fill` is written behind the row up to that length; with capacity 0
    the rows must cover the target. source_capacity: the same for the way back, which the gradient takes.
    """
    target = source.new_empty(target_size, *source.shape[1:])
    places = (source_starts, source_capacity, target_starts, target_capacity)
    _launch(source, target, lengths, *places, max_length, fill)
    return target


@copy_rows.register_fake
def _(source, lengths, source_starts, source_capacity, target_starts, target_capacity, max_length, target_size,
      fill=0.0):  # fmt: skip
    return source.new_empty(target_size, *source.shape[1:])


def _setup_context(ctx, inputs, output) -> None:
    source, lengths, source_starts, ctx.source_capacity, target_starts, ctx.target_capacity, ctx.max_length, *_ = inputs
    ctx.save_for_backward(lengths, source_starts, target_starts)
    ctx.source_size = len(source)


def _backward(ctx, grad: Tensor):
    lengths, source_starts, target_starts = ctx.saved_tensors
    back = copy_rows(
        grad, lengths, target_starts, ctx.target_capacity, source_starts, ctx.source_capacity, ctx.max_length,
        ctx.source_size,
    )  # fmt: skip
    return back, *(None,) * 8


copy_rows.register_autograd(_backward, setup_context=_setup_context)


def jagged_to_padded(values: Tensor, offsets: Tensor, max_length: int, padding: float = 0.0) -> Tensor:
    """[T, ...] -> [B, max_length, ...]; see `ops.reference.jagged_to_padded`."""
    batch = len(offsets) - 1
    starts, lengths = offsets[:-1], offsets.diff()
    padded = copy_rows(values, lengths, starts, 0, None, max_length, max_length, batch * max_length, padding)
    return padded.unflatten(0, (batch, max_length))


def padded_to_jagged(padded: Tensor, offsets: Tensor, total: int) -> Tensor:
    """[B, M, ...] -> [total, ...]; see `ops.reference.padded_to_jagged`."""
    length = padded.shape[1]
    return copy_rows(padded.flatten(0, 1), offsets.diff(), None, length, offsets[:-1], 0, length, total)


@torch.library.custom_op("jagged::concat_rows", mutates_args=())
def concat_rows(
    first: Tensor, second: Tensor, first_offsets: Tensor, second_offsets: Tensor, max_first: int, max_second: int
) -> Tensor:
    """Row b of `first`, then row b of `second`, for each b; see `ops.reference.jagged_concat`."""
    joined = first.new_empty(len(first) + len(second), *first.shape[1:])
    starts, middles = _places(first_offsets, second_offsets)
    _launch(first, joined, first_offsets.diff(), first_offsets, 0, starts, 0, max_first)
    _launch(second, joined, second_offsets.diff(), second_offsets, 0, middles, 0, max_second)
    return joined


def _places(first_offsets: Tensor, second_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Where the two parts of each joined row start."""
    return first_offsets[:-1] + second_offsets[:-1], first_offsets[1:] + second_offsets[:-1]


@concat_rows.register_fake
def _(first, second, first_offsets, second_offsets, max_first, max_second):
    return first.new_empty(len(first) + len(second), *first.shape[1:])


def _setup_concat(ctx, inputs, output) -> None:
    first, second, first_offsets, second_offsets, *ctx.longest = inputs
    ctx.save_for_backward(first_offsets, second_offsets)
    ctx.sizes = len(first), len(second)


def _split(ctx, grad: Tensor):
    offsets = ctx.saved_tensors
    parts = [
        copy_rows(grad, own.diff(), starts, 0, own[:-1], 0, longest, size)
        for own, starts, longest, size in zip(offsets, _places(*offsets), ctx.longest, ctx.sizes, strict=True)
    ]
    return *parts, None, None, None, None


concat_rows.register_autograd(_split, setup_context=_setup_concat)
