"""Attention to tokens decoded before, for one new token a sequence; the choice of kernel or twin is made here."""

from torch import Tensor

from ops import reference
from ops.jagged import has_kernel


def past_attention(packed: Tensor, past: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Each sequence's newest token looks at itself and at the tokens before it. Without gradients on a GPU.

    packed: [S, 3, H, D], the query, key and value of the new tokens. past: [R, 2, H, D], keys and values of tokens of
    any sequences; rows: [S, P] integers, those of the P tokens before each new one. Beams may share them.

    Shape: -> [S, H, D], in the dtype of `packed`; scores and softmax accumulate in float32 or wider.
    """
    if not has_kernel(packed):
        return reference.past_attention(packed, past, rows, scale)
    from ops.triton import past as kernels

    return kernels.past_attention(packed, past, rows, scale)
