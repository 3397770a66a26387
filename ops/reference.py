"""Pure-torch twins of kernels: the oracle of their tests, and the path that runs without a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 4  # of rows that are padded to one length


def row_indices(offsets: Tensor, total: int) -> Tensor:
    """Row number of each of the `total` = `offsets[-1]` values.

    Shape: offsets [B+1] -> [T] int64.
    """
    rows = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=total)


def jagged_to_padded(values: Tensor, offsets: Tensor, max_length: int, padding: float = 0.0) -> Tensor:
    """Rows of a jagged tensor laid side by side, padded at the end.

    Shape: values [T, ...], offsets [B+1] -> [B, max_length, ...].
    """
    batch = offsets.shape[0] - 1
    if values.shape[0] == batch * max_length:  # every row is full: the same memory, seen as a matrix
        return values.reshape(batch, max_length, *values.shape[1:])
    rows = row_indices(offsets, values.shape[0])
    columns = torch.arange(values.shape[0], device=values.device) - offsets[rows]
    padded = values.new_full((batch * max_length, *values.shape[1:]), padding)
    padded = padded.index_copy(0, rows * max_length + columns, values)
    return padded.reshape(batch, max_length, *values.shape[1:])


def padded_to_jagged(padded: Tensor, offsets: Tensor, total: int) -> Tensor:
    """The inverse of `jagged_to_padded`: the leading `lengths[b]` entries of each row, back to back.

    Shape: padded [B, M, ...], offsets [B+1] -> [T, ...] where T = `total` = `offsets[-1]`.
    """
    batch, max_length = padded.shape[:2]
    flat = padded.reshape(batch * max_length, *padded.shape[2:])
    if total == batch * max_length:
        return flat
    rows = row_indices(offsets, total)
    columns = torch.arange(total, device=padded.device) - offsets[rows]
    return flat.index_select(0, rows * max_length + columns)


def jagged_attention(
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
) -> Tensor:
    """Attention within rows. See `ops.jagged.jagged_attention` for the contract.

    Rows of similar length are padded together, so that short ones are not padded to the longest of all.
    """
    query, key, value = query.unbind(1) if memory is None else (query, *memory.unbind(1))
    rows = query_offsets.shape[0] - 1
    # Few rows, hardly any padding, or a GPU, which the lengths of the groups would have to be asked for.
    if rows < 16 * GROUPS or key.shape[0] * 4 > rows * max_key * 3 or query.is_cuda:
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
    own = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(own[-1])
    inside = row_indices(own, total)
    places = (offsets[rows] - own[:-1])[inside] + torch.arange(total, device=offsets.device)
    return places, own, int(lengths.max())


def _padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    bias: Tensor | None,
    key_limits: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    max_key = max(max_key, 1)  # so that the scores have a maximum where all rows are empty
    q = jagged_to_padded(query, query_offsets, max_query).transpose(1, 2)  # [B, H, Mq, D]
    k = jagged_to_padded(key, key_offsets, max_key).transpose(1, 2)  # [B, H, Mk, D]
    v = jagged_to_padded(value, key_offsets, max_key).transpose(1, 2)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # which would round the scores to half precision
        scores = q.to(accumulate) @ k.to(accumulate).transpose(-1, -2) * scale  # [B, H, Mq, Mk]
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
    output = output.transpose(1, 2).masked_fill((limits == 0)[..., None, None], 0.0)
    return padded_to_jagged(output, query_offsets, query.shape[0])


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
        matrix = by_distance[distance + radius].movedim(-1, 0)  # [H, Mq, Mk]
        return matrix.masked_fill((columns >= limits[..., None])[:, None], lowest)
    # Equal limits have equal rows: look them up by limit, row by row, instead of number by number.
    every_limit = torch.arange(max_key + 1, device=limits.device)[:, None]
    distance = (columns - (every_limit - 1)).clamp(-radius, radius)  # [Mk+1, Mk]
    rows = by_distance[distance + radius].masked_fill((columns >= every_limit)[..., None], lowest)
    rows = rows.transpose(1, 2).contiguous()  # [Mk+1, H, Mk]
    return rows.index_select(0, limits.flatten()).unflatten(0, limits.shape).transpose(1, 2)


def past_attention(packed: Tensor, past: Tensor, rows: Tensor, scale: float) -> Tensor:
    """See `ops.past.past_attention`."""
    seen = torch.cat([past[rows], packed[:, None, 1:]], 1)  # [S, P + 1, 2, H, D]
    query, key, value = packed[:, :1], *seen.to(torch.promote_types(seen.dtype, torch.float32)).unbind(2)
    weights = ((query * key).sum(-1) * scale).softmax(1)  # [S, P + 1, H]
    return (weights[..., None] * value).sum(1).to(packed.dtype)


def add_norm(
    x: Tensor | None, branch: Tensor, weight: Tensor, dropout: float, last: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """See `ops.residual.add_norm`."""
    hidden = F.dropout(branch, dropout)
    hidden = hidden if x is None else x + hidden
    normed = F.rms_norm(hidden.to(weight.dtype), weight.shape, weight, eps)
    return hidden, F.dropout(normed, dropout) if last else normed


def relu_dropout(x: Tensor, dropout: float) -> Tensor:
    """See `ops.residual.relu_dropout`."""
    return F.dropout(x.relu(), dropout)


def kept(seed: int, rows: int, columns: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """The mask that the kernels draw: whether dropout of probability p keeps each number. -> [rows, columns] bool.

    A number's random bits are a hash of its column and of a key, a hash of its row; both mix in half of the seed.
    """

    def mix(x: Tensor) -> Tensor:  # in 32 bits
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    key = (mix(row ^ (seed & 0xFFFFFFFF)) + (seed >> 32)) & 0xFFFFFFFF
    bits = mix((mix(key)[:, None] + column * 0x9E3779B9) & 0xFFFFFFFF)
    return bits >= round(p * 2**32)
