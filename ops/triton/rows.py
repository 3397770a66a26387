"""Copies of rows between the jagged and the padded layout.

A row is one stretch of memory in both, so a program moves a stretch of it, whatever the shape of a value. Each
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
