"""Attention of one new token per sequence to itself and to those before it, which several sequences share.

    out[s] = sum_p softmax_p(scale * q[s].k_p) v_p,   over the keys and values cache[places[s, p]] and the token's own

Beams that continue the same prefix have the same places, so nothing is copied when beams are chosen. It reads each
query, key and value once per sequence, and writes the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers of a tile: sequences by columns of a head


@triton.jit
def _kernel(
    packed, cache, places, out, n_sequences, n_cached, heads, cache_stride, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    sequence = tl.minimum(sequence, n_sequences - 1)  # what is left of the last program repeats the last one
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    columns = head * D + d
    own = packed + sequence[:, None] * (3 * heads * D) + columns
    query = tl.load(own, mask=d < D, other=0.0).to(tl.float32) * scale
    highest = tl.sum(query * tl.load(own + heads * D, mask=d < D, other=0.0).to(tl.float32), 1)
    total = tl.full([BLOCK_S], 1.0, tl.float32)
    value = tl.load(own + 2 * heads * D, mask=d < D, other=0.0).to(tl.float32)
    for p in range(n_cached):
        row = tl.load(places + sequence * n_cached + p).to(tl.int64)
        place = cache + row[:, None] * cache_stride + columns
        score = tl.sum(query * tl.load(place, mask=d < D, other=0.0).to(tl.float32), 1)
        above = tl.maximum(highest, score)
        before, weight = tl.exp(highest - above), tl.exp(score - above)
        more = tl.load(place + heads * D, mask=d < D, other=0.0).to(tl.float32)
        value = value * before[:, None] + more * weight[:, None]
        total = total * before + weight
        highest = above
    value = value / total[:, None]
    tl.store(out + sequence[:, None] * (heads * D) + columns, value.to(out.dtype.element_ty), mask=d < D)


@torch.library.custom_op("retrieval::cached_attention", mutates_args=())
def cached_attention(packed: Tensor, cache: Tensor, places: Tensor, scale: float) -> Tensor:
    """See `ops.cached_attention.cached_attention`; without gradients."""
    packed, places = packed.contiguous(), places.contiguous()
    sequences, _, heads, width = packed.shape
    cache = cache if cache.stride()[1:] == (heads * width, width, 1) else cache.contiguous()
    out = torch.empty(sequences, heads, width, dtype=packed.dtype, device=packed.device)
    if sequences:
        block_d = triton.next_power_of_2(width)
        block_s = max(1, BLOCK // block_d)
        _kernel[(triton.cdiv(sequences, block_s), heads)](
            packed, cache, places, out, sequences, places.shape[1], heads, cache.stride(0), scale,
            D=width, BLOCK_D=block_d, BLOCK_S=block_s,
        )  # fmt: skip
    return out


@cached_attention.register_fake
def _(packed, cache, places, scale):
    return packed.new_empty(packed.shape[0], *packed.shape[2:])
