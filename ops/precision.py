"""How exact matrix products in float32 are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
