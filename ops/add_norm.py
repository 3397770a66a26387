"""What lies between the matrix products of a transformer block, fused: contracts, twins, and the choice of kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import has_kernel

EPS = 1e-6  # that T5 adds to the mean square


def add_norm(
    x: Tensor | None, branch: Tensor, weight: Tensor, dropout: float = 0.0, last: bool = False
) -> tuple[Tensor, Tensor]:
    """hidden = x + dropout(branch) (x may be None), normed = weight * hidden / sqrt(mean(hidden^2) + EPS).

    The end of one residual branch and the root-mean-square normalization at the start of the next (Zhang and Sennrich
    2019, eq. 4). dropout: probability; 0 outside training. last: at the end of a stack, normed is dropped out too.

    Shape: x, branch [..., D], weight [D] -> hidden, in the dtype of x (of the branch without it), and normed, on a GPU
    in that of autocast where it is on.
    """
    if not has_kernel(branch.device, branch.dtype):
        return reference_add_norm(x, branch, weight, dropout, last)
    from ops.triton.add_norm import add_norm as kernel

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    return kernel(x, branch, weight, _seed(branch, dropout), dropout, last, EPS, dtype)


def reference_add_norm(
    x: Tensor | None, branch: Tensor, weight: Tensor, dropout: float, last: bool
) -> tuple[Tensor, Tensor]:
    """The twin of the kernel; see `add_norm`."""
    hidden = F.dropout(branch, dropout)
    hidden = hidden if x is None else x + hidden
    normed = F.rms_norm(hidden.to(weight.dtype), weight.shape, weight, EPS)
    return hidden, F.dropout(normed, dropout) if last else normed


def relu_dropout(x: Tensor, dropout: float = 0.0) -> Tensor:
    """dropout(relu(x)). dropout: probability; 0 outside training. Shape: [...] both, same dtype."""
    if dropout == 0.0 or not has_kernel(x.device, x.dtype):
        return F.dropout(x.relu(), dropout)
    from ops.triton.add_norm import relu_dropout as kernel

    return kernel(x, _seed(x, dropout), dropout)


def _seed(tensor: Tensor, dropout: float) -> Tensor | None:
    """From torch's generator of the device, so that seeds and CUDA graphs work as for torch's own dropout."""
    if dropout == 0.0:
        return None
    return torch.randint(2**63 - 1, (2,), device=tensor.device)
