"""Jagged attention as an operator: how its kernels are launched, its registration with torch, and its gradient."""

import torch
import triton
from torch import Tensor

from ops.triton.attention_kernels import (
    ALL,
    CAUSAL,
    LIMITS,
    backward_key_kernel,
    backward_query_kernel,
    bias_table_kernel,
    forward_kernel,
    sum_diagonals_kernel,
)

MAX_PROGRAMS = 16384  # that share the rows of a launch
MAX_PARTS = 2048  # programs that sum the bias gradient, each into a part of its own


def _tiles(max_query: int, max_key: int, head_dim: int, half: bool, limited_backward: bool) -> dict[str, int]:
    """Block sizes, warps and stages: rows of a few blocks get one warp each, long rows the largest efficient tiles."""
    small = half and head_dim <= 64
    if max_key <= 192:
        tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1, "num_stages": 2}
        if limited_backward:  # sums the bias gradient by distance, which costs less in wide blocks
            return tiles | {"BLOCK_N": 32 if small else 16}
        return tiles | {"maxnreg": 128} if small else tiles  # twice the warps a multiprocessor
    block, stages = (64, 3) if small else (32, 2)  # what fits in shared memory
    return {"BLOCK_M": 16 if max_query <= 16 else block, "BLOCK_N": block, "num_warps": 4, "num_stages": stages}


def _launch(rows: int, heads: int, max_length: int, block: int, most: int) -> tuple[tuple[int], int, int]:
    """Grid, pieces of work, and pieces a row: short rows are taken whole, long ones in blocks."""
    pieces = 1 if max_length <= 6 * block else triton.cdiv(max_length, block)
    programs = min(rows * pieces, max(1, most // heads))
    return (programs * heads,), rows * pieces, pieces


def _constants(
    query: Tensor,
    max_query: int,
    max_key: int,
    bias: Tensor | None,
    key_limits: Tensor | None,
    causal: bool,
    segment: int,
    backward: bool = False,
) -> dict:
    """What the kernels are compiled for."""
    head_dim, half = query.shape[2], query.dtype != torch.float32
    tiles = _tiles(max_query, max_key, head_dim, half, backward and key_limits is not None)
    tf32 = half or torch.get_float32_matmul_precision() != "highest"
    return {
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_BIAS": bias is not None,
        "TILED": bias is not None and key_limits is None and tiles["BLOCK_M"] == tiles["BLOCK_N"],
        "MASK": LIMITS if key_limits is not None else CAUSAL if causal else ALL,
        "SEGMENT": segment,
        "PRECISION": "tf32" if tf32 else "ieee",
        **tiles,
    }


def _bias_table(bias: Tensor | None, max_length: int, constants: dict) -> tuple[Tensor | None, int, int, int]:
    """The bias as `_scores` reads it, the size of a head's part, R, and how many blocks from the diagonal there are
    distances below R."""
    if bias is None:
        return None, 0, 0, 0
    bias = bias.contiguous()
    radius, block = bias.shape[1] // 2, constants["BLOCK_M"]
    if not constants["TILED"]:
        return bias, bias.shape[1], radius, 0
    reach = min(triton.cdiv(max_length, block) - 1, (radius + block - 2) // block)
    table = torch.empty(len(bias), 2 * reach + 3, block, block, dtype=torch.float32, device=bias.device)
    bias_table_kernel[(2 * reach + 3, len(bias))](bias, table, radius, reach, block)
    return table, table.stride(0), radius, reach


def _segments(memory: Tensor | None, total: int, rows: int, max_query: int) -> tuple[int, int]:
    """Rows of self-attention that are all full and so short that a block holds several: their length, and the number of
    blocks. Otherwise 0, and the number of rows."""
    if memory is not None or total != rows * max_query or not 0 < max_query <= 8:
        return 0, rows
    return max_query, triton.cdiv(total, 16 // max_query * max_query)


def _parts(query: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, views [T, H, D]."""
    return query.unbind(1) if memory is None else (query, *memory.unbind(1))


def _addressable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads of a token back to back, as the kernels address them."""
    return tuple(t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in tensors)


@torch.library.custom_op("jagged::attention", mutates_args=())
def attention(
    query: Tensor,
    memory: Tensor | None,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    bias: Tensor | None = None,
    key_limits: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `ops.jagged.jagged_attention`. Returns out [Tq, H, D] and lse [Tq, H] float32, in units of log 2.

    query, memory: float32, float16 or bfloat16, both alike; D at most 128.
    """
    query, key, value = _addressable(*_parts(query, memory))
    query_offsets, key_offsets = query_offsets.contiguous(), key_offsets.contiguous()
    key_limits = key_limits.contiguous() if key_limits is not None else None
    total, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=value.dtype, device=value.device)
    lse = torch.empty(total, heads, dtype=torch.float32, device=query.device)
    segment, rows = _segments(memory, total, query_offsets.shape[0] - 1, max_query)
    constants = _constants(query, max_query, max_key, bias, key_limits, causal, segment)
    table, bias_stride, radius, reach = _bias_table(bias, max(max_query, max_key), constants)
    if total and rows:
        grid, work, pieces = _launch(rows, heads, max_query, constants["BLOCK_M"], MAX_PROGRAMS)
        forward_kernel[grid](
            query, key, value, table, key_limits, out, lse,
            query_offsets, key_offsets,
            query.stride(0), key.stride(0), value.stride(0), out.stride(0),
            heads, work, pieces, total, bias_stride, radius, reach, scale,
            **constants,
        )  # fmt: skip
    return out, lse


@attention.register_fake
def _(query, memory, query_offsets, key_offsets, max_query, max_key, bias=None, key_limits=None, causal=False,
      scale=1.0):  # fmt: skip
    query = _parts(query, memory)[0]
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("jagged::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    memory: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    bias: Tensor | None,
    key_limits: Tensor | None,
    causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, memory (empty without it) and bias [H, 2R+1] float32 (empty without `bias_grad`)."""
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, memory) if t is not None]
    grad_query, grad_key, grad_value = _parts(grads[0], grads[1] if memory is not None else None)
    grads = grads if memory is not None else [*grads, query.new_empty(0)]
    query, key, value, grad_out = _addressable(*_parts(query, memory), grad_out)
    query_offsets, key_offsets = query_offsets.contiguous(), key_offsets.contiguous()
    key_limits = key_limits.contiguous() if key_limits is not None else None
    total, heads, _ = query.shape
    delta = torch.empty_like(lse)
    segment, rows = _segments(memory, total, query_offsets.shape[0] - 1, max_query)
    constants = _constants(query, max_query, max_key, bias, key_limits, causal, segment, backward=True)
    table, bias_stride, radius, reach = _bias_table(bias, max(max_query, max_key), constants)
    distances = triton.next_power_of_2(2 * radius + 1)
    most, block = MAX_PARTS if bias_grad else MAX_PROGRAMS, constants["BLOCK_M"]
    grid, work, pieces = _launch(rows, heads, max_query, block, most)
    k_grid, k_work, k_pieces = _launch(rows, heads, max_key, constants["BLOCK_N"], MAX_PROGRAMS)
    blocks = (2 * reach + 1) * block**2
    width = blocks + 2 * block if constants["TILED"] else bias_stride
    parts = lse.new_zeros(grid[0] // heads, heads, width) if bias_grad else lse.new_empty(0)
    options = constants | {
        "BIAS_GRAD": bias_grad, "FAR": max(max_query, max_key) > (reach + 1) * block, "WIDTH": distances
    }  # fmt: skip
    if total and rows:
        backward_query_kernel[grid](
            query, key, value, table, key_limits, out, lse, grad_out, delta, grad_query, parts,
            query_offsets, key_offsets,
            query.stride(0), key.stride(0), value.stride(0), out.stride(0), grad_out.stride(0), grad_query.stride(0),
            heads, work, pieces, total, bias_stride, radius, reach, scale, width,
            **options,
        )  # fmt: skip
    if key.shape[0] and rows:
        backward_key_kernel[k_grid](
            query, key, value, table, key_limits, lse, grad_out, delta, grad_key, grad_value,
            query_offsets, key_offsets,
            query.stride(0), key.stride(0), value.stride(0), grad_out.stride(0), grad_key.stride(0),
            grad_value.stride(0),
            heads, k_work, k_pieces, total, bias_stride, radius, reach, scale,
            **constants,
        )  # fmt: skip
    if not bias_grad:
        return *grads, parts
    sums = parts.sum(0)
    if not constants["TILED"]:
        return *grads, sums
    grad_bias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    sum_diagonals_kernel[(heads,)](sums, grad_bias, width, radius, reach, block, distances)
    return *grads, grad_bias


@attention_backward.register_fake
def _(grad_out, query, memory, out, lse, query_offsets, key_offsets, max_query, max_key, bias, key_limits, causal,
      scale, bias_grad):  # fmt: skip
    grad_bias = lse.new_empty(bias.shape) if bias_grad else lse.new_empty(0)
    return query.new_empty(query.shape), query.new_empty(memory.shape if memory is not None else 0), grad_bias


def _setup_context(ctx, inputs, output) -> None:
    query, memory, query_offsets, key_offsets, max_query, max_key, bias, key_limits, causal, scale = inputs
    ctx.save_for_backward(query, memory, *output, query_offsets, key_offsets, bias, key_limits)
    ctx.options = (max_query, max_key, causal, scale)


def _backward(ctx, grad_out, grad_lse):
    query, memory, out, lse, query_offsets, key_offsets, bias, key_limits = ctx.saved_tensors
    max_query, max_key, causal, scale = ctx.options
    bias_grad = bias is not None and ctx.needs_input_grad[6]
    grad_query, grad_memory, grad_bias = attention_backward(
        grad_out, query, memory, out, lse, query_offsets, key_offsets, max_query, max_key, bias, key_limits,
        causal, scale, bias_grad,
    )  # fmt: skip
    grad_memory = grad_memory if memory is not None else None
    grad_bias = grad_bias.to(bias.dtype) if bias_grad else None
    return grad_query, grad_memory, None, None, None, None, grad_bias, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)
