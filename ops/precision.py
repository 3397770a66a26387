"""How exact matrix products in float32 are, and the dtype of the residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it float32 matrix products are "highest" (float32) or "high" (TF32 on a GPU that has it: 10 bits of
    mantissa, summed in float32). A CUDA graph keeps what was set when it was captured."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def stream_dtype(tensor: Tensor) -> torch.dtype:
    """What the residual stream starts in: bfloat16 where that is autocast's, else the dtype of the tensor; float16
    lacks the range for a sum over layers."""
    kind = tensor.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if half else tensor.dtype
