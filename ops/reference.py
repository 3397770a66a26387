"""Pure-torch twins of every kernel: the oracle of the tests, and the path that runs without a GPU."""

import torch
from torch import Tensor


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
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query: int,
    max_key: int,
    bias: Tensor | None = None,
    key_limits: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Attention within rows, computed on padded rows. See `ops.jagged.jagged_attention` for the contract."""
    max_key = max(max_key, 1)  # so that the scores have a maximum where all rows are empty
    q = jagged_to_padded(query, query_offsets, max_query).transpose(1, 2)  # [B, H, Mq, D]
    k = jagged_to_padded(key, key_offsets, max_key).transpose(1, 2)  # [B, H, Mk, D]
    v = jagged_to_padded(value, key_offsets, max_key).transpose(1, 2)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(accumulate) * scale  # [B, H, Mq, Mk]
    columns = torch.arange(max_key, device=key.device)
    lengths = key_offsets.diff()[:, None]  # [B, 1]
    if key_limits is None:
        limits, places = lengths, torch.arange(max_query, device=key.device)[None]  # [B, 1], [1, Mq]
    else:
        limits = jagged_to_padded(key_limits, query_offsets, max_query)  # [B, Mq]
        limits, places = limits.minimum(lengths), limits - 1
    if bias is not None:
        radius = bias.shape[1] // 2
        distance = (columns - places[..., None]).clamp(-radius, radius)  # [B or 1, Mq, Mk]
        scores = scores + bias.to(accumulate)[:, distance + radius].transpose(0, 1)
    if key_limits is not None or key.shape[0] != k.shape[0] * max_key:
        hidden = columns >= limits[..., None]  # [B, 1 or Mq, Mk]
        scores = scores.masked_fill(hidden[:, None], float("-inf"))
    # A query that sees no key gets zeros: the maximum and the sum are kept finite and above zero.
    peak = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(accumulate).min)
    weights = (scores - peak).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(accumulate).tiny)
    output = weights.to(value.dtype) @ v  # [B, H, Mq, D]
    return padded_to_jagged(output.transpose(1, 2), query_offsets, query.shape[0])


def jagged_prepend(prefix: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """One value in front of every row: row b becomes [prefix[b], values of row b].

    Shape: prefix [B, ...], values [T, ...], offsets [B+1] -> [B + T, ...]; the new offsets are
    `offsets + arange(B+1)`.
    """
    batch = prefix.shape[0]
    first = offsets[:-1] + torch.arange(batch, device=offsets.device)
    rest = torch.arange(values.shape[0], device=offsets.device) + row_indices(offsets, values.shape[0]) + 1
    joined = torch.cat([prefix, values])
    return torch.empty_like(joined).index_copy(0, torch.cat([first, rest]), joined)
