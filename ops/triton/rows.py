"""Copies of rows between layouts: jagged, padded, and joined with the rows of another jagged tensor.

A row is one stretch of memory in every layout, so a program moves a stretch of it, whatever the shape of a value. Each
value is read and written once; the limit is the copy bandwidth of the device. The gradient is the copy back. Offsets
are int64, from which places in memory get their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 8192  # that a program moves at a time


@triton.jit
def _pad_kernel(jagged, padded, offsets, width, capacity, fill, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """padded[b, i] = jagged[offsets[b] + i] for i < length of row b, fill beyond; BACK: the other way."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    size = (tl.load(offsets + row + 1) - start) * width
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    jagged += start * width + i
    padded += row * capacity * width + i
    if BACK:
        tl.store(jagged, tl.load(padded, mask=i < size, other=0), mask=i < size)
    else:
        inside = i < capacity * width
        tl.store(padded, tl.load(jagged, mask=inside & (i < size), other=fill), mask=inside)


@triton.jit
def _join_kernel(
    first, second, joined, first_offsets, second_offsets, width, BACK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Row b of joined is row b of first, then row b of second; BACK: the other way."""
    row = tl.program_id(0).to(tl.int64)
    first_start, second_start = tl.load(first_offsets + row), tl.load(second_offsets + row)
    border = (tl.load(first_offsets + row + 1) - first_start) * width
    size = border + (tl.load(second_offsets + row + 1) - second_start) * width
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first += first_start * width + i
    second += second_start * width + (i - border)
    joined += (first_start + second_start) * width + i
    if BACK:
        values = tl.load(joined, mask=i < size, other=0)
        tl.store(first, values, mask=i < border)
        tl.store(second, values, mask=(i >= border) & (i < size))
    else:
        values = tl.load(first, mask=i < border, other=0)
        others = tl.load(second, mask=(i >= border) & (i < size), other=0)
        tl.store(joined, tl.where(i < border, values, others), mask=i < size)


def _grid(rows: int, longest: int, values: Tensor) -> tuple[tuple[int, int], int, int]:
    """Grid, numbers in a value, and numbers that a program moves."""
    width = values[:1].numel() if len(values) else 0
    block = min(BYTES // values.element_size(), triton.next_power_of_2(max(longest * width, 1)))
    return (rows, triton.cdiv(longest * width, block)), width, block


@torch.library.custom_op("jagged::to_padded", mutates_args=())
def jagged_to_padded(values: Tensor, offsets: Tensor, max_length: int, padding: float = 0.0) -> Tensor:
    """[T, ...] -> [B, max_length, ...]; see `ops.reference.jagged_to_padded`."""
    values, offsets = values.contiguous(), offsets.contiguous()
    padded = values.new_empty(len(offsets) - 1, max_length, *values.shape[1:])
    grid, width, block = _grid(len(padded), max_length, padded.flatten(0, 1))
    if padded.numel():
        _pad_kernel[grid](values, padded, offsets, width, max_length, padding, False, block)
    return padded


@jagged_to_padded.register_fake
def _(values, offsets, max_length, padding=0.0):
    return values.new_empty(len(offsets) - 1, max_length, *values.shape[1:])


@torch.library.custom_op("jagged::from_padded", mutates_args=())
def padded_to_jagged(padded: Tensor, offsets: Tensor, total: int) -> Tensor:
    """[B, M, ...] -> [total, ...]; see `ops.reference.padded_to_jagged`."""
    padded, offsets = padded.contiguous(), offsets.contiguous()
    values = padded.new_empty(total, *padded.shape[2:])
    grid, width, block = _grid(len(padded), padded.shape[1], values)
    if values.numel():
        _pad_kernel[grid](values, padded, offsets, width, padded.shape[1], 0.0, True, block)
    return values


@padded_to_jagged.register_fake
def _(padded, offsets, total):
    return padded.new_empty(total, *padded.shape[2:])


def _save_sizes(ctx, inputs, output) -> None:
    source, offsets, *_ = inputs
    ctx.save_for_backward(offsets)
    ctx.sizes = source.shape


jagged_to_padded.register_autograd(
    lambda ctx, grad: (padded_to_jagged(grad, *ctx.saved_tensors, ctx.sizes[0]), None, None, None),
    setup_context=_save_sizes,
)
padded_to_jagged.register_autograd(
    lambda ctx, grad: (jagged_to_padded(grad, *ctx.saved_tensors, ctx.sizes[1]), None, None),
    setup_context=_save_sizes,
)


@torch.library.custom_op("jagged::concat_rows", mutates_args=())
def concat_rows(
    first: Tensor, second: Tensor, first_offsets: Tensor, second_offsets: Tensor, max_first: int, max_second: int
) -> Tensor:
    """[S, ...], [T, ...] -> [S + T, ...]; see `ops.reference.jagged_concat`."""
    first, second = first.contiguous(), second.contiguous()
    joined = first.new_empty(len(first) + len(second), *first.shape[1:])
    _join(first, second, joined, first_offsets, second_offsets, max_first + max_second, back=False)
    return joined


@concat_rows.register_fake
def _(first, second, first_offsets, second_offsets, max_first, max_second):
    return first.new_empty(len(first) + len(second), *first.shape[1:])


@torch.library.custom_op("jagged::split_rows", mutates_args=())
def split_rows(
    joined: Tensor, first_offsets: Tensor, second_offsets: Tensor, n_first: int, max_length: int
) -> tuple[Tensor, Tensor]:
    """The inverse of `concat_rows`: [S + T, ...] -> [S, ...], [T, ...], where S = n_first."""
    joined = joined.contiguous()
    first, second = (joined.new_empty(n, *joined.shape[1:]) for n in (n_first, len(joined) - n_first))
    _join(first, second, joined, first_offsets, second_offsets, max_length, back=True)
    return first, second


@split_rows.register_fake
def _(joined, first_offsets, second_offsets, n_first, max_length):
    return tuple(joined.new_empty(n, *joined.shape[1:]) for n in (n_first, len(joined) - n_first))


def _join(first, second, joined, first_offsets, second_offsets, longest: int, back: bool) -> None:
    grid, width, block = _grid(len(first_offsets) - 1, longest, joined)
    if joined.numel():
        offsets = first_offsets.contiguous(), second_offsets.contiguous()
        _join_kernel[grid](first, second, joined, *offsets, width, back, block)


def _save_offsets(ctx, inputs, output) -> None:
    first, _, first_offsets, second_offsets, max_first, max_second = inputs
    ctx.save_for_backward(first_offsets, second_offsets)
    ctx.sizes = len(first), max_first + max_second


concat_rows.register_autograd(
    lambda ctx, grad: (*split_rows(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None),
    setup_context=_save_offsets,
)
