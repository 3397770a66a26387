"""What lies between the matrix products of a transformer block, fused; the choice of kernel or twin is made here."""

import torch
from torch import Tensor

from ops import reference
from ops.jagged import has_kernel


def add_norm(
    x: Tensor | None, branch: Tensor, weight: Tensor, dropout: float = 0.0, last: bool = False, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """hidden = x + dropout(branch) (x may be None), normed = weight * hidden / sqrt(mean(hidden^2) + eps).

    The end of one residual branch and the root-mean-square normalization at the start of the next (Zhang and Sennrich
    2019, eq. 4). dropout: probability; 0 outside training. last: at the end of a stack, normed is dropped out too.

    Shape: x, branch [..., D], weight [D] -> hidden, in the dtype of x (of the branch without it), and normed, on a GPU
    in that of autocast where it is on.
    """
    if not has_kernel(branch):
        return reference.add_norm(x, branch, weight, dropout, last, eps)
    from ops.triton import residual

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    return residual.add_norm(x, branch, weight, _seed(branch, dropout), dropout, last, eps, dtype)


def stream_dtype(tensor: Tensor) -> torch.dtype:
    """What the residual stream starts in: bfloat16 where that is autocast's, else the dtype of the tensor; float16
    lacks the range for a sum over layers."""
    kind = tensor.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if half else tensor.dtype


def relu_dropout(x: Tensor, dropout: float = 0.0) -> Tensor:
    """dropout(relu(x)). dropout: probability; 0 outside training. Shape: [...] both, same dtype."""
    if dropout == 0.0 or not has_kernel(x):
        return reference.relu_dropout(x, dropout)
    from ops.triton import residual

    return residual.relu_dropout(x, _seed(x, dropout), dropout)


def _seed(tensor: Tensor, dropout: float) -> Tensor | None:
    """From torch's generator of the device, so that seeds and CUDA graphs work as for torch's own dropout."""
    if dropout == 0.0:
        return None
    return torch.randint(2**63 - 1, (2,), device=tensor.device)
