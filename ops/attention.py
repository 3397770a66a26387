"""Attention within the rows of jagged tensors: contract, twin in plain torch, and the choice between it and the kernel.

The twin pads rows of similar length together, so that short ones are not padded to the longest of all.
"""

import torch
from einops import rearrange
from torch import Tensor

from ops.dispatch import has_kernel
from ops.jagged import JaggedTensor, jagged_to_padded, lengths_to_offsets, padded_to_jagged, row_indices

GROUPS = 4  # of rows that are padded to one length
MAX_HEAD_DIM = 128  # of the kernel


def jagged_attention(
    query: JaggedTensor, memory: JaggedTensor | None = None, bias: Tensor | None = None,
    key_limits: Tensor | None = None, causal: bool = False, scale: float = 1.0,
) -> JaggedTensor:  # fmt: skip
    """Scaled dot-product attention in which the queries of row b see the keys of row b only.

    out[i] = sum_j softmax_j(scale * q[i].k[j] + bias[h, clamp(j - place[i], -R, R) + R]) v[j]

    with i, j counted from the start of their rows (Vaswani et al. 2017, eq. 1; the bias is that of T5,
    Raffel et al. 2020, section 2.1, already looked up by distance). A query without keys gets zeros.

    query: queries [Tq, H, D] that look at the keys and values of memory [Tk, 2, H, D]; without memory, self-attention:
    the queries, keys and values [T, 3, H, D] of each token side by side, as one product makes them.
    Shape: bias [H, 2R+1] -> values [Tq, H, D].
    key_limits: [Tq] integers; a query sees only the first `key_limits` keys of its row, and its place is that
    of the last of them. Without them it sees all keys of its row, or, if `causal`, keys 0 to i; its place is i.
    dtype: scores and softmax accumulate in float32 or wider; the result has the dtype of the values.
    """
    if causal and key_limits is not None:
        raise ValueError("jagged_attention takes key_limits or causal, not both.")
    keys, packed = query if memory is None else memory, query.values
    arguments = (query.offsets, keys.offsets, query.max_length, keys.max_length, bias, key_limits, causal, scale)
    arguments = (packed, memory.values if memory is not None else None, *arguments)
    if has_kernel(packed.device, packed.dtype) and packed.shape[-1] <= MAX_HEAD_DIM:
        from ops.triton.attention import attention

        return query.with_values(attention(*arguments)[0])
    return query.with_values(reference_attention(*arguments))


def reference_attention(
    query: Tensor, memory: Tensor | None, query_offsets: Tensor, key_offsets: Tensor, max_query: int, max_key: int,
    bias: Tensor | None = None, key_limits: Tensor | None = None, causal: bool = False, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The twin of the kernel; see `jagged_attention`."""
    query, key, value = query.unbind(1) if memory is None else (query, *memory.unbind(1))
    rows = len(query_offsets) - 1
    # Few rows, hardly any padding, or a GPU, which the lengths of the groups would have to be asked for.
    if rows < 16 * GROUPS or len(key) * 4 > rows * max_key * 3 or query.is_cuda:
        arguments = (query_offsets, key_offsets, max_query, max_key, bias, key_limits, causal, scale)
        return _padded_attention(query, key, value, *arguments)
    outputs, places = [], []
    for group in key_offsets.diff().argsort().tensor_split(GROUPS):
        q_places, q_offsets, longest_query = _select_rows(query_offsets, group)
        k_places, k_offsets, longest_key = _select_rows(key_offsets, group)
        tensors = (query[q_places], key[k_places], value[k_places], q_offsets, k_offsets, longest_query, longest_key)
        limits = key_limits[q_places] if key_limits is not None else None
        outputs.append(_padded_attention(*tensors, bias, limits, causal, scale))
        places.append(q_places)
    joined = torch.cat(outputs)
    return torch.empty_like(joined).index_copy(0, torch.cat(places), joined)


def _select_rows(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the values of some rows lie [T'], their new offsets, and the length of the longest."""
    lengths = offsets.diff()[rows]
    own = lengths_to_offsets(lengths)
    total = int(own[-1])
    inside = row_indices(own, total)
    places = (offsets[rows] - own[:-1])[inside] + torch.arange(total, device=offsets.device)
    return places, own, int(lengths.max())


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, max_query: int, max_key: int,
    bias: Tensor | None, key_limits: Tensor | None, causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    max_key = max(max_key, 1)  # so that the scores have a maximum where all rows are empty
    q = rearrange(jagged_to_padded(query, query_offsets, max_query), "b q h d -> b h q d")
    k, v = (rearrange(jagged_to_padded(t, key_offsets, max_key), "b k h d -> b h k d") for t in (key, value))
    accumulate = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # which would round the scores to half precision
        scores = q.to(accumulate) @ k.to(accumulate).mT * scale  # [B, H, Mq, Mk]
    lengths = key_offsets.diff()[:, None]  # [B, 1]
    places = torch.arange(max_query, device=key.device)
    if key_limits is not None:
        limits = jagged_to_padded(key_limits, query_offsets, max_query).minimum(lengths).clamp_min(0)  # [B, Mq]
        places = None
    elif causal:
        limits = (places + 1).minimum(lengths)
    else:
        limits = lengths.expand(-1, max_query)
    scores = scores + _visible_bias(bias, limits, places, max_key, accumulate)
    # A query without keys weighs padding; its output is zero by contract.
    output = scores.softmax(-1).to(value.dtype) @ v  # [B, H, Mq, D]
    output = rearrange(output, "b h q d -> b q h d").masked_fill((limits == 0)[..., None, None], 0.0)
    return padded_to_jagged(output, query_offsets, len(query))


def _visible_bias(
    bias: Tensor | None, limits: Tensor, places: Tensor | None, max_key: int, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores: the bias by distance, and the lowest number where a key is not visible.

    limits: [B, Mq] visible keys. places: [Mq], or None where a query's place is its limit - 1.
    -> [B, H or 1, Mq, Mk] or a shape that broadcasts to it.
    """
    columns = torch.arange(max_key, device=limits.device)
    lowest = torch.finfo(dtype).min
    if bias is None:
        hidden = columns >= limits[..., None]  # [B, Mq, Mk]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, lowest)[:, None]
    radius = bias.shape[1] // 2
    by_distance = bias.to(dtype).T  # [2R+1, H]
    if places is not None:
        distance = (columns - places[:, None]).clamp(-radius, radius)  # [Mq, Mk]
        matrix = rearrange(by_distance[distance + radius], "q k h -> h q k")
        return matrix.masked_fill((columns >= limits[..., None])[:, None], lowest)
    # Equal limits have equal rows: look them up by limit, row by row, instead of number by number.
    every_limit = torch.arange(max_key + 1, device=limits.device)[:, None]
    distance = (columns - (every_limit - 1)).clamp(-radius, radius)  # [Mk+1, Mk]
    rows = by_distance[distance + radius].masked_fill((columns >= every_limit)[..., None], lowest)
    rows = rearrange(rows, "limit k h -> limit h k").contiguous()
    return rearrange(rows.index_select(0, limits.flatten()).unflatten(0, limits.shape), "b q h k -> b h q k")
