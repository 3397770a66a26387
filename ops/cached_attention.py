"""Attention to tokens decoded before, for one new token per sequence: contract, twin, and the choice of the kernel."""

import torch
from torch import Tensor

from ops.dispatch import has_kernel


def cached_attention(packed: Tensor, cache: Tensor, places: Tensor, scale: float) -> Tensor:
    """Each sequence's newest token looks at itself and at the tokens before it. Without gradients on a GPU.

    packed: [S, 3, H, D], the query, key and value of the new tokens. cache: [R, 2, H, D], keys and values of tokens of
    any sequences; places: [S, P] integers, those of the P tokens before each new one. Beams may share them.

    Shape: -> [S, H, D], in the dtype of `packed`; scores and softmax accumulate in float32 or wider.
    """
    if not has_kernel(packed.device, packed.dtype):
        return reference_cached_attention(packed, cache, places, scale)
    from ops.triton.cached_attention import cached_attention as kernel

    return kernel(packed, cache, places, scale)


def reference_cached_attention(packed: Tensor, cache: Tensor, places: Tensor, scale: float) -> Tensor:
    """The twin of the kernel; see `cached_attention`."""
    seen = torch.cat([cache[places], packed[:, None, 1:]], 1)  # [S, P + 1, 2, H, D]
    query, key, value = packed[:, :1], *seen.to(torch.promote_types(seen.dtype, torch.float32)).unbind(2)
    weights = ((query * key).sum(-1) * scale).softmax(1)  # [S, P + 1, H]
    return (weights[..., None] * value).sum(1).to(packed.dtype)
