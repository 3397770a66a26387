"""Jagged attention as an operator: how its kernels are launched, its registration with torch, and its gradient."""

import torch
import triton
from torch import Tensor

from ops.triton.attention_kernels import backward_key_kernel, backward_query_kernel, forward_kernel
from ops.triton.bias import Bias, bias_gradient
from ops.triton.ranges import key_ranges, query_ranges

MAX_PARTS = 1056  # programs that sum the bias gradient, each into a part of its own


def _tiles(max_query: int, max_key: int, head_dim: int, half: bool) -> dict[str, int]:
    """Block sizes, warps and stages: small blocks for short rows, the largest efficient ones for long rows."""
    if max_key <= 192:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1, "num_stages": 2}
    # What fits in shared memory, of which some cards have 99 KiB.
    block, warps, stages = {
        (True, True): (64, 4, 3), (True, False): (32, 4, 2), (False, True): (32, 2, 2), (False, False): (32, 4, 1)
    }[half, head_dim <= 64]  # fmt: skip
    return {"BLOCK_M": 16 if max_query <= 16 else block, "BLOCK_N": block, "num_warps": warps, "num_stages": stages}


def _constants(
    query: Tensor, memory: Tensor | None, max_query: int, max_key: int, bias: Tensor | None, key_limits: Tensor | None
) -> dict:
    """What the kernels are compiled for."""
    head_dim, half = query.shape[2], query.dtype != torch.float32
    tiles = _tiles(max_query, max_key, head_dim, half)
    tf32 = half or torch.get_float32_matmul_precision() != "highest"
    square = memory is None and tiles["BLOCK_M"] == tiles["BLOCK_N"]  # diagonals of blocks are those of distances
    return {
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_BIAS": bias is not None,
        "TILED": bias is not None and key_limits is None and square,
        "PRECISION": "tf32" if tf32 else "tf32x3",  # three products in TF32 are as exact as one in float32
        **tiles,
    }


def _parts(query: Tensor, memory: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values, views [T, H, D]."""
    return query.unbind(1) if memory is None else (query, *memory.unbind(1))


def _addressable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads of a token back to back, as the kernels address them."""
    return tuple(t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in tensors)


@torch.library.custom_op("jagged::attention", mutates_args=())
def attention(
    query: Tensor, memory: Tensor | None, query_offsets: Tensor, key_offsets: Tensor, max_query: int, max_key: int,
    bias: Tensor | None = None, key_limits: Tensor | None = None, causal: bool = False, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ops.attention.jagged_attention`. Returns out [Tq, H, D], lse [H, Tq] float32, in units of log 2, and the
    ranges of `key_ranges`.

    query, memory: float32, float16 or bfloat16, both alike, less than 2^31 tokens; D at most 128. A value that is not
    finite may spoil the rows beside its own.
    """
    query, key, value = _addressable(*_parts(query, memory))
    query_offsets, key_offsets = query_offsets.contiguous(), key_offsets.contiguous()
    total, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=value.dtype, device=value.device)
    lse = torch.empty(heads, total, dtype=torch.float32, device=query.device)
    ranges = key_ranges(total, query_offsets, key_offsets, max_query, key_limits, causal)
    if not total:
        return out, lse, ranges
    if not len(key):
        return out.zero_(), lse.zero_(), ranges
    constants = _constants(query, memory, max_query, max_key, bias, key_limits)
    own = Bias.make(bias, max(max_query, max_key), constants, mirrored=False)
    if bias is not None:  # whose loads take shared memory as well
        constants["num_stages"] = min(constants["num_stages"], 2)
    forward_kernel[(heads * triton.cdiv(total, constants["BLOCK_M"]),)](
        query, key, value, own.table, *ranges, out, lse,
        query.stride(0), key.stride(0), value.stride(0), out.stride(0),
        heads, total, len(key), own.stride, own.radius, own.reach, scale,
        **constants,
    )  # fmt: skip
    return out, lse, ranges


@attention.register_fake
def _(query, memory, query_offsets, key_offsets, max_query, max_key, bias=None, key_limits=None, causal=False,
      scale=1.0):  # fmt: skip
    query = _parts(query, memory)[0]
    lse = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    return query.new_empty(query.shape), lse, lse.new_empty(3, len(query), dtype=torch.int32)


@torch.library.custom_op("jagged::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor, query: Tensor, memory: Tensor | None, out: Tensor, lse: Tensor, ranges: Tensor,
    query_offsets: Tensor, key_offsets: Tensor, max_query: int, max_key: int, bias: Tensor | None,
    key_limits: Tensor | None, causal: bool, scale: float, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, memory (empty without it) and bias [H, 2R+1] float32 (empty without `bias_grad`)."""
    grad_query, grad_memory = (query.new_empty(t.shape if t is not None else 0) for t in (query, memory))
    grads = _parts(grad_query, grad_memory if memory is not None else None)
    query, key, value, grad_out = _addressable(*_parts(query, memory), grad_out)
    query_offsets, key_offsets = query_offsets.contiguous(), key_offsets.contiguous()
    total, heads, _ = query.shape
    if not (total and len(key)):
        grad_bias = lse.new_zeros(bias.shape) if bias is not None and bias_grad else lse.new_empty(0)
        return grad_query.zero_(), grad_memory.zero_(), grad_bias
    constants = _constants(query, memory, max_query, max_key, bias, key_limits)
    block = constants["BLOCK_M"]
    own = Bias.make(bias, max(max_query, max_key), constants, mirrored=True)
    width = (2 * own.reach + 1) * block**2 + 2 * block if constants["TILED"] else own.stride
    programs = triton.cdiv(total, block)
    if bias_grad:
        programs = min(programs, max(1, MAX_PARTS // heads))
    parts = lse.new_zeros(programs if bias_grad else 0, heads, width)
    delta = torch.empty_like(lse)
    backward_query_kernel[(programs * heads,)](
        query, key, value, own.table, *ranges, out, lse, grad_out, delta, grads[0], parts,
        query.stride(0), key.stride(0), value.stride(0), out.stride(0), grad_out.stride(0), grads[0].stride(0),
        heads, total, len(key), own.stride, own.radius, own.reach, scale, width,
        **constants, BIAS_GRAD=bias_grad, RIGHT=not causal, FAR=own.far,
    )  # fmt: skip
    q_ranges = query_ranges(len(key), query_offsets, key_offsets, max_key, causal)
    if block == 16 and query.dtype != torch.float32 and query.shape[2] <= 64:
        constants["maxnreg"] = 128  # a third more warps on a multiprocessor, and nothing spills
    backward_key_kernel[(heads * triton.cdiv(len(key), constants["BLOCK_N"]),)](
        query, key, value, own.mirrored, *ranges, *q_ranges, lse, grad_out, delta, *grads[1:],
        query.stride(0), key.stride(0), value.stride(0), grad_out.stride(0), grads[1].stride(0), grads[2].stride(0),
        heads, total, len(key), own.stride, own.radius, own.reach, scale,
        **constants, LIMITED=key_limits is not None,
    )  # fmt: skip
    if bias is None or not bias_grad:
        return grad_query, grad_memory, lse.new_empty(0)
    return grad_query, grad_memory, bias_gradient(parts.sum(0), bias, constants, own.radius, own.reach)


@attention_backward.register_fake
def _(grad_out, query, memory, out, lse, ranges, query_offsets, key_offsets, max_query, max_key, bias, key_limits,
      causal, scale, bias_grad):  # fmt: skip
    grad_bias = lse.new_empty(bias.shape) if bias_grad else lse.new_empty(0)
    return query.new_empty(query.shape), query.new_empty(memory.shape if memory is not None else 0), grad_bias


def _setup_context(ctx, inputs, output) -> None:
    query, memory, query_offsets, key_offsets, max_query, max_key, bias, key_limits, causal, scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, memory, *output, query_offsets, key_offsets, bias, key_limits)
    ctx.options = (max_query, max_key, causal, scale)


def _backward(ctx, grad_out, grad_lse, _):
    query, memory, out, lse, ranges, query_offsets, key_offsets, bias, key_limits = ctx.saved_tensors
    max_query, max_key, causal, scale = ctx.options
    bias_grad = bias is not None and ctx.needs_input_grad[6]
    grad_query, grad_memory, grad_bias = attention_backward(
        grad_out, query, memory, out, lse, ranges, query_offsets, key_offsets, max_query, max_key, bias, key_limits,
        causal, scale, bias_grad,
    )  # fmt: skip
    grad_memory = grad_memory if memory is not None else None
    grad_bias = grad_bias.to(bias.dtype) if bias_grad else None
    return grad_query, grad_memory, None, None, None, None, grad_bias, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)
