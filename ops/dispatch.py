"""Whether kernels run: decided here alone."""

from importlib.util import find_spec

import torch

TRITON = find_spec("triton") is not None


def has_kernel(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether operations on such tensors run as kernels of `ops.triton`: on a GPU, if Triton is installed. Elsewhere
    all is plain torch code, which may ask the device for numbers, so that training is not recorded as CUDA graphs
    either."""
    return device.type == "cuda" and TRITON and dtype in (torch.float32, torch.float16, torch.bfloat16)
