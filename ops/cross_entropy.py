"""Cross-entropy over a catalogue of vectors, without the matrix of all logits.

The logits of a chunk of targets become their own gradient in place, so that all gradients are there when the loss is;
the backward pass only scales them. (After Hsu et al. 2024, Liger Kernel.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.dispatch import has_kernel
from ops.jagged import lengths_to_offsets, row_indices

CHUNK = 2**28  # logits that exist at a time
CPU_CHUNK = 2**21  # there: caches hold them, which takes half of the time
ALIGNED = 64  # what N is padded to a multiple of: products of odd widths are several times as slow on a GPU


@dataclass(frozen=True)
class Seen:
    """The items that target p has seen, items[first[p]:last[p]], and what is added to their logits. An item occurs in
    a range once at most; a negative number stands for none. The bias may be learned: where users never come back to an
    item it becomes very negative. (After the repeat and explore modes of Ren et al. 2019, RepeatNet.)

    Shape: first, last [P], items [T], integers, first <= last, bias [] or [1] float32.
    """

    first: Tensor
    last: Tensor
    items: Tensor
    bias: Tensor

    def of(self, targets: slice) -> "Seen":
        return Seen(self.first[targets], self.last[targets], self.items, self.bias)


def linear_cross_entropy(
    x: Tensor, vectors: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0, seen: Seen | None = None
) -> Tensor:
    """sum over p of weights[p] * ((1 - smoothing) * l[p, targets[p]] + smoothing * mean over n of l[p, n]),
    l[p, n] = -log of the softmax over n of x[p].vectors[n] + (seen.bias where target p has seen n, else 0).

    Label smoothing as in Szegedy et al. 2016, section 7. Gradients reach x, vectors and the bias. A weight of 0 takes
    all effect from a finite row of x.

    Shape: x [P, d], vectors [N, d], targets [P] int64, weights [P] float32 -> [], in float32, or wider where x is.
    Logits and their gradients have the dtype of x, that of autocast where it is on.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    arguments = (x, vectors, targets, weights, smoothing, seen, dtype)
    bias = seen.bias if seen is not None else None
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, vectors, bias)):
            return _LinearCrossEntropy.apply(bias, *arguments)
        return _chunked(*arguments, gradients=False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bias, x, vectors, targets, weights, smoothing, seen, dtype):
        """bias: that of the seen items once more, since autograd looks for tensors among the arguments alone."""
        loss, *gradients = _chunked(x, vectors, targets, weights, smoothing, seen, dtype, gradients=True)
        ctx.dtypes = x.dtype, vectors.dtype
        ctx.save_for_backward(*gradients, weights, bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dvectors, dbias, weights, bias = ctx.saved_tensors
        dx = dx * (grad * weights)[:, None]  # in float32: a weight alone may be too small for float16
        dbias = (dbias * grad).to(bias.dtype).reshape(bias.shape) if bias is not None else None
        return dbias, dx.to(ctx.dtypes[0]), (dvectors * grad).to(ctx.dtypes[1]), *(None,) * 5


def _chunked(
    x: Tensor, vectors: Tensor, targets: Tensor, weights: Tensor, smoothing: float, seen: Seen | None,
    dtype: torch.dtype, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss [], its gradients of x [P, d], not yet multiplied by weights, in `dtype`, of vectors [N, d], in float32
    or wider, and of the bias []; they are meaningless where no gradients are wanted.

    What all vectors share changes no softmax, and no gradient moves it. In half precision it is left out, since logits
    would be rounded by its size, and taken from the gradient, which rounding leaves there. It is the same in every
    step, so that Adam would make it grow.
    """
    wide = torch.promote_types(dtype, torch.float32)
    N = len(vectors)
    vectors = vectors - vectors.mean(0, dtype=wide) if dtype != wide else vectors
    vectors = F.pad(vectors.to(dtype), (0, 0, 0, -N % ALIGNED))  # [N', d]
    x, weights = x.to(dtype), weights.to(wide)
    unit = torch.linalg.vector_norm(weights)
    shares = (weights / unit.clamp_min(torch.finfo(wide).tiny))[:, None]  # which float16 holds, unlike the weights
    sums = x.new_zeros(2, dtype=wide)  # the loss, its gradient of the bias
    dx = torch.empty_like(x) if gradients else x.new_empty(0)
    dvectors = torch.zeros_like(vectors, dtype=wide) if gradients else x.new_empty(0)
    size = max((CHUNK if x.is_cuda else min(CHUNK, CPU_CHUNK)) // len(vectors), 1)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        logits = x[part] @ vectors.T  # [p, N']
        chunk = seen.of(part) if seen is not None else None
        sums += (_losses(logits, N, targets[part], smoothing, chunk, gradients) * weights[part]).sum(1)
        if gradients:
            torch.mm(logits, vectors, out=dx[part])
            _add_product(dvectors, logits.T, (x[part] * shares[part]).to(dtype))
    dvectors = dvectors[:N] * unit
    if gradients and dtype != wide:
        dvectors -= dvectors.mean(0)
    return sums[0], dx, dvectors, sums[1]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, k] @ b [k, n], whose dtype may be narrower than that of the total."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _losses(logits: Tensor, N: int, targets: Tensor, smoothing: float, seen: Seen | None, gradients: bool) -> Tensor:
    """[2, P], in float32 or wider: losses of logits [P, N'], of which the first N columns count, and the gradient of
    each of the bias. The logits are overwritten, where gradients are wanted by their gradient, which is 0 in the other
    columns."""
    if not has_kernel(logits.device, logits.dtype):
        return reference_losses(logits, N, targets, smoothing, seen)
    from ops.triton.cross_entropy import cross_entropy_

    ranges = (seen.first, seen.last, seen.items, seen.bias) if seen is not None else (None,) * 4
    return cross_entropy_(logits, N, targets, smoothing, *ranges, gradients)


def reference_losses(logits: Tensor, N: int, targets: Tensor, smoothing: float, seen: Seen | None) -> Tensor:
    """The twin of the kernel; see `_losses`."""
    own, limit = targets[:, None], torch.finfo(logits.dtype).max
    scores = logits[:, :N].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if seen is not None:
        pairs = _pairs(seen)
        scores[pairs] += seen.bias
    log_probs = scores.clamp_(-limit, limit).log_softmax(1)
    logits[:, :N] = log_probs.exp().sub_(smoothing / N)
    logits[:, N:] = 0
    logits.scatter_add_(1, own, torch.full_like(own, smoothing - 1, dtype=logits.dtype))
    losses = -(1 - smoothing) * log_probs.gather(1, own).squeeze(1) - smoothing * log_probs.mean(1)
    dbias = torch.zeros_like(losses)
    if seen is not None:
        dbias.index_add_(0, pairs[0], logits[pairs].to(losses.dtype))
    return torch.stack([losses, dbias])


def _pairs(seen: Seen) -> tuple[Tensor, Tensor]:
    """Rows and columns of the seen items, one after another."""
    offsets = lengths_to_offsets(seen.last - seen.first)
    rows = row_indices(offsets, int(offsets[-1]))
    items = seen.items[(seen.first - offsets[:-1])[rows] + torch.arange(len(rows), device=rows.device)].long()
    return rows[items >= 0], items[items >= 0]
